"""`monkeyjump mamba pretrain`: the folder that it leaves, and going on exactly where it was."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from monkeyjump.cli import app
from monkeyjump.mamba.perplexity import perplexity
from monkeyjump.mamba.pretraining import open_pretraining

SMALL = {
    "d_model": 24, "n_layers": 2, "state_size": 8, "vocab_size": 300, "context_length": 24, "batch_size": 4,
    "learning_rate": 0.02, "log_every": 1, "save_every": 5, "evaluate_every": 6, "keep": 9,
}  # fmt: skip
FAST = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
ANIMALS = ("cat", "dog", "hen", "fox", "eel")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text with so much order that a small model learns some of it in a few steps."""
    lines = (
        f"The {ANIMALS[n % 5]} number {n} likes the {ANIMALS[(n + 1) % 5]} and the {ANIMALS[(n + 2) % 5]}.\n"
        for n in range(240)
    )
    (tmp_path / "text.txt").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pretrain(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process: its exit code and its lines on stderr."""

    def pretrain(*arguments: str):
        code = app.run(["mamba", "pretrain", *arguments])
        return code, [line for line in capsys.readouterr().err.splitlines() if "gemm_4bit" not in line]

    return pretrain


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in lines]


def result(folder: Path) -> dict:
    found = json.loads((folder / "result.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "finished")}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_folder_is_a_model_that_has_learned_something(pretrain, folder: Path):
    code, lines = pretrain("text.txt", "--output", "out", "--steps", "40", *FAST)
    assert code == 0, lines
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors",
        "pretraining.yaml", "result.json", "run.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    found = result(out)
    assert found["held_out"]["perplexity"] < 0.5 * found["unigram"]["perplexity"]
    text = (folder / "text.txt").read_text()
    assert found["held_out"]["bytes"] == pytest.approx(0.05 * len(text), rel=0.1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    scored = perplexity(model, tokenizer, text[-found["held_out"]["bytes"] :], 24, 12)
    assert scored.per_token == pytest.approx(found["held_out"]["perplexity"], rel=1e-4)
    held = [line for line in metrics(out) if "held_out/perplexity" in line]
    assert [line["step"] for line in held] == [6, 12, 18, 24, 30, 36, 40]
    losses = [line["loss"] for line in metrics(out) if "loss" in line]
    assert len(losses) == 40
    assert abs(losses[0] - math.log(300)) < 0.7  # the mean over the predicted tokens
    facts = json.loads((out / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["seeds"] == {"train": 0}
    assert set(facts["fingerprints"]) == {"text", "held_out"}
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["steps"] == 40
    assert open_pretraining(out).settings.d_model == 24
    assert not any("training_args.bin" in str(path) for path in out.rglob("*"))


@pytest.mark.parametrize("step", [5, 15])
def test_going_on_in_another_place_equals_never_having_stopped(pretrain, folder: Path, step: int):
    assert pretrain("text.txt", "--output", "out", "--steps", "16", *FAST)[0] == 0
    moved = folder / "elsewhere"
    shutil.copytree(folder / "out", moved)
    for name in ("model.safetensors", "config.json", "result.json"):
        (moved / name).unlink()
    for path in (moved / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    code, lines = pretrain("--output", "elsewhere", "--resume")
    assert code == 0, lines
    assert f"going on after step {step} of 16" in lines
    assert weights(moved) == weights(folder / "out")
    assert metrics(moved) == metrics(folder / "out")
    assert result(moved) == result(folder / "out")


def test_minutes_become_steps_once(pretrain, folder: Path):
    assert pretrain("text.txt", "--output", "out", "--minutes", "0.01", *FAST)[0] == 0
    facts = json.loads((folder / "out" / "run.json").read_text())
    assert facts["steps"] == max(1, int(0.93 * 0.6 / facts["measured_seconds_per_step"]))
    (folder / "out" / "result.json").unlink()
    assert pretrain("--output", "out", "--resume")[0] == 0
    assert json.loads((folder / "out" / "run.json").read_text()) == facts


def test_held_out_text_of_its_own_and_epochs(pretrain, folder: Path):
    (folder / "other").mkdir()
    (folder / "other" / "held.jsonl").write_text(json.dumps({"text": "The cat likes the dog."}) + "\n")
    arguments = ("text.txt", "--held-out", "other", "--epochs", "1", "--seed", "3", "--output", "out")
    assert pretrain(*arguments, *FAST)[0] == 0
    facts = json.loads((folder / "out" / "run.json").read_text())
    assert facts["seeds"] == {"train": 3}
    assert result(folder / "out")["held_out"]["bytes"] == 22
    assert facts["bytes"]["text"] == (folder / "text.txt").stat().st_size
    windows = (facts["training_tokens"] - 1) // 23 - 1
    assert facts["steps"] == math.ceil(windows / 4)


def test_a_begun_run_needs_the_word_and_the_same_settings(pretrain, folder: Path):
    same = ("text.txt", "--output", "out", "--steps", "2", *FAST)
    assert pretrain(*same)[0] == 0
    before = weights(folder / "out")
    code, lines = pretrain(*same)
    assert (code, lines[0]) == (2, "error: --output: out holds a run already")
    code, lines = pretrain(*same, "--set", "learning_rate=0.5", "--resume")
    assert code == 2
    assert "settings.learning_rate was 0.02, is 0.5" in lines[0]
    for arguments in (("--output", "out", "--resume"), (*same, "--resume")):
        code, lines = pretrain(*arguments)
        assert (code, lines) == (0, ["out is done already"])
    assert weights(folder / "out") == before
    (folder / "out" / "result.json").unlink()
    (folder / "text.txt").write_text((folder / "text.txt").read_text().replace("fox", "ape"))
    code, lines = pretrain("--output", "out", "--resume")
    assert code == 2
    assert "the text is not the one that the run was begun with" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.txt"], "none.txt: no such file or folder"),
        (["text.txt", "--set", "vocab_size=5000"], "vocab_size = 5000: the text gives no more than"),
        (["text.txt", "--set", "context_length=99999"], "context_length = 99999: the training text has only"),
        (["text.txt", "--set", "contxt=9"], "--set contxt=9: unknown field 'contxt'"),
        (["text.txt", "--set", "seed"], "--set seed: expected field=value"),
        (["text.txt", "--preset", "big"], "unknown preset 'big'"),
        (["text.txt", "--minutes", "0"], "minutes = 0.0: input should be greater than 0"),
        (["text.txt", "--held-out", "empty.txt"], "empty.txt: no text in it"),
        (["one.txt"], "one.txt: no text is left beside the part that is held out"),
        (["text.txt", "--held-out", "text.txt"], "text.txt: no text is left beside the part that is held out"),
        (["text.txt", "--output", "text.txt"], "--output: text.txt is a file"),
        (["text.txt", "--output", "full"], "--output: full holds something else"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing_behind(pretrain, folder: Path, arguments: list[str], words: str):
    (folder / "empty.txt").write_text(" ")
    (folder / "one.txt").write_text("word")
    (folder / "full").mkdir()
    (folder / "full" / "thing").touch()
    before = sorted(folder.rglob("*"))
    code, lines = pretrain("--output", "deep/er", *FAST, *arguments)
    assert code == 2
    assert words in next(line for line in lines if line.startswith("error"))
    assert sorted(folder.rglob("*")) == before


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return [sys.executable, "-m", "monkeyjump", "mamba", "pretrain", *arguments], environment


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_saves_and_a_kill_goes_on(pretrain, folder: Path, number: int):
    same = ("text.txt", "--steps", "100", *FAST)
    assert pretrain(*same, "--output", "whole")[0] == 0
    line, environment = command(*same, "--output", "out")
    process = subprocess.Popen(line, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
    while not list((folder / "out" / "checkpoints").glob("checkpoint-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "go on with: monkeyjump mamba pretrain --output out --resume" in stderr.splitlines()[-1]
    assert not (folder / "out" / "result.json").exists()
    assert pretrain("--output", "out", "--resume")[0] == 0
    assert weights(folder / "out") == weights(folder / "whole")
    assert {json.dumps(line, sort_keys=True) for line in metrics(folder / "out")} >= {
        json.dumps(line, sort_keys=True) for line in metrics(folder / "whole")
    }


def test_a_half_written_model_is_not_taken_for_one(pretrain, folder: Path, monkeypatch: pytest.MonkeyPatch):
    from monkeyjump.mamba.text_runs import saving as place

    def damaged(path: Path) -> dict[str, torch.Tensor]:
        found = load_file(path)
        next(iter(found.values()))[0] += 1
        return found

    monkeypatch.setattr(place, "load_file", damaged)
    code, lines = pretrain("text.txt", "--output", "out", "--steps", "1", *FAST)
    assert code == 1
    assert "is not what the model holds" in " ".join(lines)
    assert not (folder / "out" / "model.safetensors").exists()


def test_a_mistyped_folder_starts_no_run_of_the_demos_texts(pretrain, folder: Path):
    code, lines = pretrain("--output", "mistyped", "--resume")
    assert (code, lines[0]) == (2, "error: --resume: mistyped holds no run to go on with")
    assert not (folder / "mistyped").exists()


def test_a_signal_before_the_first_step_does_not_promise_what_is_not_kept(pretrain, folder: Path, monkeypatch):
    def ctrl_c(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("monkeyjump.mamba.pretraining.run.train_tokenizer", ctrl_c)
    code, lines = pretrain("text.txt", "--output", "out", "--steps", "2", *FAST)
    assert code == 130
    assert lines[-1] == "error: interrupted; nothing is kept yet: give the whole command again"
    assert not (folder / "out").exists()
