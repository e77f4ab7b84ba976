"""`monkeyjump evaluate`: numbers that are right, paired with another run's, and an adapter that does something."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from run_inputs import write_run_inputs
from safetensors.torch import load_file, save_file
from small_inputs import rows, tokenizer, write_lines, write_task

from monkeyjump.cli import app
from monkeyjump.tasks.cache import write_manifest

QUICK = ("train.epochs=4", "train.save_every=100", "train.routing_every=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods x two seeds, trained by one command."""
    folder = tmp_path_factory.mktemp("runs")
    write_run_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.run(["train", "run.yaml", *QUICK, "--methods", "lora,mj-lora", "--seeds", "0,1"]) == 0
    return folder


@pytest.fixture
def evaluate(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(runs)

    def evaluate(*arguments: str):
        capsys.readouterr()
        code = app.run(["evaluate", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and code == 0 else out, err

    return evaluate


def test_one_command_made_a_run_for_each_method_and_seed(runs: Path):
    names = sorted(path.name for path in (runs / "out").iterdir())
    assert names == ["lora-seed0", "lora-seed1", "mj-lora-seed0", "mj-lora-seed1"]
    facts = [json.loads((runs / "out" / name / "run.json").read_text()) for name in names]
    assert len({json.dumps(one["fingerprints"]) for one in facts}) == 1  # the same rows everywhere
    assert len({one["trainable_parameters"] for one in facts}) == 1
    assert [one["seeds"]["train"] for one in facts] == [0, 1, 0, 1]
    losses = [json.loads((runs / "out" / name / "result.json").read_text())["losses"] for name in names]
    assert len({tuple(one) for one in losses}) == 4


def test_scores_come_with_intervals_and_are_written_down(evaluate, runs: Path):
    code, found, _ = evaluate("out/mj-lora-seed0", "--generate", "--json")
    assert code == 0
    assert [task["task"] for task in found["tasks"]] == ["films", "food"]
    for task in found["tasks"]:
        score = task["scores"]["accuracy"]
        right = [answer == accepted[0] for answer, accepted in zip(task["answers"], task["accepted"])]
        assert score["value"] == sum(right) / 8
        assert score["low"] <= score["value"] <= score["high"]
        assert score["rows"] == [float(one) for one in right]
        assert len(task["written_answers"]) == 8
    table = (runs / "out/mj-lora-seed0/evaluation/adapter/results.csv").read_text()
    lines = list(csv.DictReader(table.splitlines()))
    assert [(line["task"], line["answers"]) for line in lines] == [
        ("films", "chosen"), ("films", "written"), ("food", "chosen"), ("food", "written")
    ]  # fmt: skip
    assert float(lines[0]["value"]) == pytest.approx(found["tasks"][0]["scores"]["accuracy"]["value"])


def test_a_second_time_nothing_is_done_again(evaluate, monkeypatch: pytest.MonkeyPatch):
    assert evaluate("out/lora-seed0")[0] == 0

    def never(*args, **kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr("monkeyjump.evaluation.run.load_subject", never)
    code, out, err = evaluate("out/lora-seed0")
    assert (code, "evaluated already" in err, "films" in out) == (0, True, True)
    assert evaluate("out/lora-seed0", "--limit", "4")[0] == 1  # other rows are another evaluation


def test_paired_differences_against_the_base_and_another_run(evaluate):
    for against in ("base", "out/lora-seed0"):
        code, found, _ = evaluate("out/mj-lora-seed0", "--against", against, "--json")
        assert code == 0
        films, food, pooled = found["against"]
        assert (films["task"], food["task"], pooled["task"]) == ("films", "food", "all tasks, pooled")
        assert films["second"] == found["tasks"][0]["scores"]["accuracy"]["value"]
        for line in (films, food, pooled):
            assert line["difference"]["value"] == pytest.approx(line["second"] - line["first"])
            assert line["difference"]["low"] < line["difference"]["high"]
        assert pooled["rows"] == 16
    code, out, _ = evaluate("out/mj-lora-seed0", "--against", "base", "--markdown")
    assert code == 0
    assert out.splitlines()[0].startswith("| task | metric | rows | base | mj-lora-seed0 |")
    assert len(out.strip().splitlines()) == 5


def test_one_command_pairs_methods_over_seeds(evaluate):
    code, found, _ = evaluate("out", "--json")
    assert (code, found["reference"]) == (0, "lora")
    for line in found["differences"]["mj-lora"]:
        assert len(line["by_seed"]) == 2
        assert line["difference"]["value"] == pytest.approx(sum(line["by_seed"]) / 2)
        spread = abs(line["by_seed"][0] - line["by_seed"][1]) / 2
        half = 12.7062 * spread  # Student, one degree of freedom: t * (|a - b| / sqrt 2) / sqrt 2
        assert line["difference"]["high"] - line["difference"]["value"] == pytest.approx(half, abs=1e-4)
    code, out, _ = evaluate("out")
    assert (code, "mj-lora minus lora" in out, "by seed" in out) == (0, True, True)


def test_other_tasks_and_fewer_rows(evaluate, runs: Path):
    write_lines(runs / "more.jsonl", rows(30))
    (runs / "more.yaml").write_text((runs / "films.yaml").read_text().replace("films", "more"))
    code, found, _ = evaluate("out/lora-seed1", "--tasks", "more.yaml", "--limit", "5", "--json")
    assert (code, [(task["task"], len(task["answers"])) for task in found["tasks"]]) == (0, [("more", 5)])


def test_an_adapter_without_effect_is_refused(evaluate, runs: Path, monkeypatch):
    shutil.copytree(runs / "out" / "lora-seed0", runs / "idle", ignore=shutil.ignore_patterns("evaluation"))
    weights = runs / "idle" / "adapter" / "adapter_model.safetensors"
    tensors = {k: v * 0 if "lora_B" in k else v for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, err = evaluate("idle")
    assert code == 2
    assert "damaged file" in err  # the manifest knows
    write_manifest(runs / "idle" / "adapter")
    code, _, err = evaluate("idle")
    assert code == 2
    assert "the adapter has no effect" in err
    assert not (runs / "idle" / "evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("nowhere",), "nowhere: no such folder", "output.folder"),
        ((".",), ".: neither a run nor a folder of runs", "--methods"),
        (("model",), "model is a whole model, which does not say its tasks", "--tasks"),
        (("model", "--tasks", "films.yaml", "--model", "model"), "model is a whole model, without a base", "--model"),
        (("model", "--tasks", "films.yaml", "--against", "base"), "there is no base", "another folder"),
        (("out", "--against", "mj-lroa"), "no method 'mj-lroa'", "mj-lora"),
        (("out/lora-seed0", "--against", "out"), "out is not the folder of a run", "base"),
        (("out/lora-seed0", "--tasks", "tweet"), "unknown task 'tweet'", "tweets"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(evaluate, arguments, error: str, hint: str):
    code, _, err = evaluate(*arguments)
    assert (code, len(err.splitlines())) == (2, 2)
    assert error in err.splitlines()[0]
    assert hint in err.splitlines()[1]


def test_probes_of_a_run(runs: Path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert app.run(["probe", "out/mj-lora-seed0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["probes"]
    assert {(one["task"], one["layer"]) for one in found} == {("films", 1), ("food", 1)}
    assert {"first", "end-1", "mean", "max", "attention"} <= {one["place"] for one in found}
    assert (runs / "out" / "mj-lora-seed0" / "evaluation" / "probes.json").is_file()
    assert app.run(["probe", "out/mj-lora-seed0", "--layers", "2"]) == 2
    assert "no block 2" in capsys.readouterr().err


def test_a_run_that_is_not_done_is_told_to_go_on(evaluate, runs: Path, monkeypatch):
    result = runs / "out" / "mj-lora-seed1" / "result.json"
    text = result.read_text()
    result.unlink()
    try:
        code, _, err = evaluate("out/mj-lora-seed1")
    finally:
        result.write_text(text)
    assert code == 2
    assert "monkeyjump train out/mj-lora-seed1 --resume" in err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--methods", "mj-lroa"), "--methods: 'mj-lroa': base='lroa' is not known"),
        (("--seeds", "0,x"), "--seeds: 'x' is no seed"),
    ],
)
def test_bad_sweeps_are_told(runs: Path, monkeypatch, capsys, arguments, error: str):
    monkeypatch.chdir(runs)
    assert app.run(["train", "run.yaml", "output.folder=never", *arguments]) == 2
    assert error in capsys.readouterr().err
    assert not (runs / "never").exists()


@pytest.fixture
def alone(runs: Path) -> Path:
    """What `save_pretrained` writes: the folder of an adapter, and no run around it."""
    folder = runs / "alone"
    if not folder.exists():
        shutil.copytree(runs / "out/mj-lora-seed0/adapter", folder)
        (folder / "manifest.json").unlink()
    return folder


def test_an_adapter_alone_against_its_base(evaluate, alone: Path):
    tasks = ("--tasks", "films.yaml", "--tasks", "food.yaml")
    code, found, _ = evaluate("alone", *tasks, "--limit", "5", "--against", "base", "--json")
    assert code == 0
    assert [one["task"] for one in found["tasks"]] == ["films", "food"]
    assert len(found["against"]) == 3
    assert (alone / "evaluation/adapter/results.json").is_file()


def test_an_adapter_alone_equals_its_run_row_by_row(evaluate, alone: Path, runs: Path):
    (runs / "both.yaml").write_text(
        (runs / "films.yaml").read_text().replace("small: {train: 16, test: 8}", "full: {train: 16, test: 8}")
    )
    run = evaluate("out/mj-lora-seed0", "--json")[1]["tasks"][0]
    code, found, _ = evaluate("alone", "--tasks", "both.yaml", "--json")
    assert code == 0
    first = found["tasks"][0]
    assert (first["accepted"], first["answers"]) == (run["accepted"], run["answers"])


def test_what_an_adapter_alone_leaves_open_is_asked_for(evaluate, alone: Path, runs: Path, capsys, monkeypatch):
    code, _, err = evaluate("alone")
    assert (code, "does not say its tasks" in err, "--tasks" in err) == (2, True, True)
    config = alone / "adapter_config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "base_model_name_or_path": None}))
    code, _, err = evaluate("alone", "--tasks", "films.yaml")
    assert (code, "names no base model" in err, "--model" in err) == (2, True, True)
    assert evaluate("alone", "--tasks", "films.yaml", "--model", "model")[0] == 0
    config.write_text(text[:20])
    assert (code := evaluate("alone", "--tasks", "films.yaml"))[0] == 2
    assert "adapter_config.json: cannot be read" in code[2]
    config.write_text(text)
    code, _, err = evaluate("out/lora-seed0", "--model", "model")
    assert (code, "leave --model out" in err) == (2, True)


def test_plan_and_probe_take_an_adapter_alone(alone: Path, runs: Path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert app.run(["plan", "alone", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = json.loads((runs / "out/mj-lora-seed0/run.json").read_text())
    for name in ("trainable_parameters", "total_parameters", "routed", "shared"):
        assert found[name] == facts[name]
    assert app.run(["plan", "out/mj-lora-seed0", "--json"]) == 0  # a run's folder, too
    assert json.loads(capsys.readouterr().out)["rows"]["films"]["train"] == 16
    assert app.run(["plan", "alone", "train.epochs=2"]) == 2
    capsys.readouterr()
    assert app.run(["probe", "alone", "--tasks", "films.yaml", "--json"]) == 0
    assert {one["task"] for one in json.loads(capsys.readouterr().out)["probes"]} == {"films"}


def test_other_rows_under_the_same_name_are_scored_anew(evaluate, runs: Path):
    """A result is reused for the same rows only, not for the same name of a task."""
    write_task(runs, "mine", rows(30))
    for count in (30, 26):
        write_task(runs, "mine", rows(count))
        for known in (False, True):
            code, _, err = evaluate("out/lora-seed0", "--tasks", "mine.yaml")
            assert (code, "evaluated already" in err) == (0, known)


def test_json_has_no_nan(evaluate):
    """The standard error of one row is not known: null, which every JSON reader knows."""
    code, found, _ = evaluate("out/lora-seed0", "--limit", "1", "--json")
    assert (code, found["tasks"][0]["scores"]["accuracy"]["standard_error"]) == (0, None)


def test_markdown_of_one_run(evaluate):
    code, out, _ = evaluate("out/lora-seed0", "--markdown")
    assert code == 0
    assert [line.split("|")[1].strip() for line in out.strip().splitlines()] == [
        "task",
        "---",
        "films",
        "food",
        "mean of own",
    ]


def test_lm_eval_is_told_to_be_installed(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = evaluate("out/lora-seed0", "--lm-eval", "piqa")
    assert (code, "--lm-eval needs the lm-eval package" in err, "monkeyjump[eval]" in err) == (2, True, True)


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_a_task_that_lm_eval_does_not_know(evaluate):
    code, _, err = evaluate("out/lora-seed0", "--lm-eval", "arc_esay")
    assert (code, "lm-eval has no task 'arc_esay'" in err, "arc_easy" in err) == (2, True, True)


LM_TASK = """
task: films_lm
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Review : {{sentence}} is this positive or negative ?\nAnswer:"
doc_to_choice: [positive, negative]
doc_to_target: mark
metric_list: [{metric: acc}]
"""


def test_lm_eval_finds_our_number_for_the_same_rows(evaluate, runs: Path):
    """The routed adapter through lm-eval's own loop, on a task of ours written as one of theirs."""
    shutil.copytree(runs / "model", runs / "plain")
    tokenizer(None).save_pretrained(runs / "plain")  # no chat template, which lm-eval does not apply either
    (runs / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    shutil.copytree(runs / "out/mj-lora-seed0/adapter", runs / "plain-adapter")
    (runs / "plain-adapter" / "manifest.json").unlink()
    draw = random.Random(0)
    asked = [{**row, "mark": draw.choice(["positive", "negative"])} for row in rows(40)]
    write_lines(runs / "asked.jsonl", asked)
    write_task(runs, "asked", asked)
    task = (runs / "asked.yaml").read_text().replace("asked.jsonl", "films.jsonl, test: asked.jsonl")
    task = task.replace("balanced: true\nsizes: {small: {train: 16, test: 8}}", "sizes: {full: {train: 4, test: null}}")
    (runs / "asked.yaml").write_text(task)
    write_lines(runs / "films.jsonl", [{"sentence": f"poor {row['sentence']}", "mark": row["mark"]} for row in rows()])
    (runs / "films_lm.yaml").write_text(LM_TASK % (runs / "asked.jsonl"))
    common = ("plain-adapter", "--model", "plain")
    code, ours, err = evaluate(*common, "--tasks", "asked.yaml", "--json")
    assert code == 0, err
    assert evaluate(*common, "--lm-eval", "films_lm.yaml")[0] == 0
    theirs = json.loads((runs / "plain-adapter/evaluation/lm_eval/results.json").read_text())["films_lm"]
    score = ours["tasks"][0]["scores"]["accuracy"]
    assert theirs["acc,none"] == score["value"]
    assert theirs["acc_stderr,none"] == pytest.approx(score["standard_error"])
    assert 0.2 < score["value"] < 0.8
    assert len(ours["tasks"][0]["answers"]) == 40


def tell_apart(adapter: Path) -> None:
    """Task 0 takes one rank of MoRE's, task 1 all of them, and they matter."""
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, value in weights.items():
        if name.endswith("mixture_tasks"):
            value.zero_()[:, 0] = torch.tensor([-1.0, 1.0])
        elif name.endswith("mixture_router"):
            value.zero_()[-1, 0] = 5.0
        elif name.endswith("mixture_B"):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    write_manifest(adapter)


def test_the_numbers_of_mores_tasks_follow_their_names(tmp_path: Path, monkeypatch, capsys):
    write_run_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    few = [option.replace("epochs=4", "max_steps=2") for option in QUICK]
    assert app.run(["train", "run.yaml", "method.base=more", "method.r=4", *few]) == 0
    rename = (tmp_path / "films.yaml").read_text().replace("films", "tales", 1)
    (tmp_path / "tales.yaml").write_text(rename)  # the films' rows under a name that was not trained on
    adapter = tmp_path / "out" / "adapter"
    tell_apart(adapter)
    turned = shutil.copytree(adapter, tmp_path / "turned") / "adapter_config.json"
    names = json.loads(turned.read_text())
    turned.write_text(json.dumps({**names, "task_names": ["food", "films"]}))
    write_manifest(turned.parent)

    def asked(folder: str, *tasks: str) -> tuple[dict[str, dict], str]:
        named = [word for task in tasks for word in ("--tasks", f"{task}.yaml")]
        capsys.readouterr()
        code = app.run(["evaluate", folder, *named, "--json", "--generate"])
        found = capsys.readouterr()
        assert code == 0, found.err
        return {task["task"]: task for task in json.loads(found.out)["tasks"]}, found.err

    both, said = asked("out/adapter", "films", "food")
    assert "not among" not in said
    assert asked("out/adapter", "food", "films")[0] == both
    assert asked("out/adapter", "food")[0]["food"] == both["food"]
    assert asked("turned", "films", "food")[0]["films"]["written_answers"] != both["films"]["written_answers"]
    strange, said = asked("out/adapter", "food", "tales")
    assert strange["food"] == both["food"]
    assert "tales: not among the adapter's tasks; each row takes the nearest of them" in said
