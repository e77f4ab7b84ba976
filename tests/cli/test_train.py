"""`monkeyjump train`: a run's folder, what is measured on the way, and going on exactly where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from run_inputs import adapter_bytes, metrics, write_run_inputs
from safetensors.torch import load_file
from small_inputs import model as base_model

from monkeyjump.cli import app
from monkeyjump.training import open_run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_run_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MONKEYJUMP_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def train(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process: its exit code and its lines on stderr."""

    def train(*arguments: str):
        code = app.run(["train", *arguments])
        return code, capsys.readouterr().err.splitlines()

    return train


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_leaves_all_that_later_commands_need(train, folder: Path):
    code, lines = train("run.yaml")
    assert code == 0, lines
    out = folder / "out"
    assert entries(out) == [
        "adapter", "centers.safetensors", "checkpoints", "config.yaml", "metrics.jsonl", "result.json", "run.json"
    ]  # fmt: skip
    assert entries(out / "checkpoints") == ["checkpoint-10", "checkpoint-15", "checkpoint-16", "checkpoint-5"]
    facts = json.loads((out / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["seeds"] == {"train": 0, "data": 0, "centers": 0}
    assert facts["rows_per_epoch"] == {"films": 16, "food": 16}
    assert set(facts["fingerprints"]) == {"films", "food"}
    assert (facts["steps"], facts["trainable_parameters"]) == (16, 1216)
    assert json.loads((out / "result.json").read_text())["steps"] == 16
    assert open_run(out).train.learning_rate == 1e-2
    reloaded = PeftModel.from_pretrained(base_model(), out / "adapter")
    assert any(parameter.any() for name, parameter in reloaded.named_parameters() if "lora_B" in name)
    assert not any("training_args.bin" in str(path) for path in out.rglob("*"))


def test_losses_and_routing_are_logged_by_task_and_step(train, folder: Path):
    assert train("run.yaml")[0] == 0
    lines = metrics(folder / "out")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == list(range(1, 17))
    assert sum(line["loss"] for line in losses[-4:]) < sum(line["loss"] for line in losses[:4])
    for line in losses:  # every row has two supervised tokens, so the tasks' means lie around the batch's
        parts = [value for name, value in line.items() if name.startswith("loss/")]
        assert min(parts) - 1e-4 <= line["loss"] <= max(parts) + 1e-4
    routing = [line for line in lines if "routing/effective" in line]
    assert [line["step"] for line in routing] == [0, 4, 8, 12, 16]
    for line in routing:
        assert sum(share for name, share in line.items() if name.startswith("usage/")) == pytest.approx(1)
        assert {"routing/effective/films", "routing/effective/food"} <= set(line)
        assert 1 <= line["routing/effective"] <= 3
    assert "routing/churn" not in routing[0]
    assert routing[0]["routing/drift"] == pytest.approx(0, abs=1e-6)
    assert all(line["routing/drift"] > 1e-4 for line in routing[1:])
    assert routing[-1]["routing/drift"] == routing[-2]["routing/drift"]  # centers stand still from step 9 on


# ranks are pruned from step 2 to step 12, and held from there on
PRUNED = ("method.base=adalora", "method.tinit=1", "method.tfinal=4")


@pytest.mark.parametrize(
    ("step", "method"),
    [
        (5, ("method.base=lora",)),
        (15, PRUNED),
        (5, (*PRUNED, "method.routed=false")),
        (15, (*PRUNED, "method.routed=false")),
    ],
    ids=["lora", "adalora", "plain-adalora-while-pruning", "plain-adalora-after"],
)
def test_going_on_in_another_place_equals_never_having_stopped(train, folder: Path, step: int, method: tuple[str, ...]):
    if "method.base=adalora" in method:  # its ranks have other names
        (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace("r: 2", "target_r: 1, init_r: 3"))
    code, lines = train("run.yaml", *method)
    assert code == 0, lines
    if "method.base=adalora" in method:
        tensors = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
        ranks = [int(value.count_nonzero()) for name, value in tensors.items() if "lora_E" in name]
        assert sum(ranks) < 3 * len(ranks)  # some were pruned
        assert not any("training_state" in name for name in tensors)
        PeftModel.from_pretrained(base_model(), folder / "out" / "adapter")  # which PEFT alone could not read again
    moved = folder / "elsewhere" / "run"
    shutil.copytree(folder / "out", moved)
    for name in ("adapter", "result.json"):
        target = moved / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    for path in (moved / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    code, lines = train(str(moved), "--resume")
    assert code == 0, lines
    assert f"going on after step {step} of 16" in lines
    assert adapter_bytes(moved) == adapter_bytes(folder / "out")
    assert metrics(moved) == metrics(folder / "out")
    assert json.loads((moved / "result.json").read_text())["steps"] == 16


def test_a_begun_run_needs_the_word_and_the_same_settings(train, folder: Path):
    assert train("run.yaml")[0] == 0
    before = adapter_bytes(folder / "out")
    code, lines = train("run.yaml")
    assert code == 2
    assert "holds a run already" in lines[0]
    assert "--resume" in lines[1]
    code, lines = train("run.yaml", "train.epochs=3", "--resume")
    assert code == 2
    assert "train.epochs was 2.0, is 3.0" in lines[0]
    code, lines = train("run.yaml", "--resume")
    assert (code, lines) == (0, ["out is done already"])
    assert adapter_bytes(folder / "out") == before


def test_other_data_than_it_was_begun_with_are_refused(train, folder: Path):
    assert train("run.yaml")[0] == 0
    (folder / "out" / "result.json").unlink()
    text = (folder / "films.jsonl").read_text()
    (folder / "films.jsonl").write_text(text.replace("film 3 ", "film 99 "))
    code, lines = train("run.yaml", "--resume")
    assert code == 2
    assert "the data are not those that the run was begun with" in lines[0]


def test_the_plain_method_trains_on_the_same_rows(train, folder: Path):
    for name, routed in (("a", "true"), ("b", "false")):
        assert train("run.yaml", f"method.routed={routed}", f"output.folder={name}")[0] == 0
    first, second = (json.loads((folder / name / "run.json").read_text()) for name in "ab")
    assert first["fingerprints"] == second["fingerprints"]
    assert first["trainable_parameters"] == second["trainable_parameters"]
    assert (second["routed"], second["shared"]) == ([], [])
    assert not any("routing/effective" in line for line in metrics(folder / "b"))


def test_bad_rows_leave_nothing_behind(train, folder: Path):
    with (folder / "films.jsonl").open("a") as file:
        file.write('{"sentence": "film", "mark": "fine"}\n')
    before = entries(folder)
    code, lines = train("run.yaml", "output.folder=deep/er")
    assert (code, len(lines)) == (2, 2)
    assert "films.jsonl, row 25, field 'mark'" in lines[0]
    assert [name for name in entries(folder) if name not in (*before, "home")] == []


def test_repeated_losses_that_are_not_finite_end_the_run_and_name_the_rows(train, folder: Path, monkeypatch):
    from monkeyjump.training.trainer import RunTrainer

    original = RunTrainer.compute_loss

    def broken(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = original(self, model, inputs, return_outputs, num_items_in_batch)
        return loss * float("nan") if self.state.global_step in (1, 6, 7, 8) else loss

    monkeypatch.setattr(RunTrainer, "compute_loss", broken)
    code, lines = train("run.yaml")
    assert code == 1
    message = next(line for line in lines if line.startswith("error"))
    assert "no finite gradient in 3 steps in a row, up to step 9 of 16" in message  # one alone (step 2) is survived
    assert "films.jsonl, row" in message or "food.jsonl, row" in message
    assert "train.learning_rate (now 0.01)" in message
    assert entries(folder / "out" / "checkpoints") == [".writing", "checkpoint-5"]


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "MONKEYJUMP_HOME": "home"}
    return [sys.executable, "-m", "monkeyjump", "train", *arguments], environment


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(train, folder: Path, number: int, code: int):
    long = ("train.epochs=300", "train.save_every=100000")
    line, environment = command("run.yaml", *long)
    process = subprocess.Popen(line, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
    path = folder / "out" / "metrics.jsonl"
    while not path.is_file() or '"loss"' not in path.read_text():  # it trains
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    last = stderr.splitlines()[-1]
    assert "go on with: monkeyjump train out --resume" in last
    assert "Traceback" not in stderr
    (saved,) = (folder / "out" / "checkpoints").glob("checkpoint-*")
    assert f"step {saved.name.rpartition('-')[2]} is saved" in last


MIXTURES = {
    "moelora": ["num_experts=3"],
    "moe_adalora": ["num_experts=3", "init_r=4", "target_r=2"],
    "more": ["r=4"],
    "moa": ["variant=sparse"],
}


@pytest.mark.parametrize("base", MIXTURES)
def test_a_mixture_trains_and_answers_like_any_method(train, folder: Path, base: str, capsys):
    options = [f"method.{option}" for option in ("lora_dropout=0", *MIXTURES[base])]
    code, lines = train("run.yaml", f"method.base={base}", *options)
    assert code == 0, lines
    out = folder / "out"
    losses = [line["loss"] for line in metrics(out) if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not (out / "centers.safetensors").exists()
    assert json.loads((out / "run.json").read_text())["routed"] == []
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    if base == "more":
        assert (saved["num_tasks"], saved["task_names"]) == (2, ["films", "food"])  # the run's
    if base == "moe_adalora":
        assert saved["total_step"] == 16
        weights = load_file(out / "adapter" / "adapter_model.safetensors")
        singular = [value for name, value in weights.items() if name.endswith("mixture_E")]
        left = sum(int((value != 0).sum()) for value in singular)
        assert left == 3 * 2 * len(singular)  # target_r of three experts, over all layers
    assert app.run(["evaluate", "out", "--against", "base"]) == 0
    assert "films" in capsys.readouterr().out


def test_methods_of_all_kinds_are_trained_from_one_file(train, folder: Path):
    code, lines = train("run.yaml", "train.max_steps=2", "--methods", "mj-lora,moelora,moe-propulsion")
    assert code == 0, lines
    kinds = {path.name: json.loads((path / "adapter" / "adapter_config.json").read_text())["peft_type"]
             for path in (folder / "out").iterdir()}  # fmt: skip
    assert kinds == {"mj-lora-seed0": "MJ_LORA", "moelora-seed0": "MOELORA", "moe-propulsion-seed0": "MOE_PROPULSION"}
    code, lines = train("run.yaml", "output.folder=never", "--methods", "moelroa")
    assert code == 2
    assert "--methods: 'moelroa': base='moelroa' is not known: did you mean 'moelora'" in lines[0]
