"""`monkeyjump demo` as a person runs it: a process, its streams and its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_inputs import rows, save_model, write_task

from monkeyjump.cli import app


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "MONKEYJUMP_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return [sys.executable, "-m", "monkeyjump", *arguments], environment


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line, variables = command(folder, *arguments)
    return subprocess.run(
        line, env={**variables, **environment}, cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_model(folder / "model")
    write_task(folder, "films", [{**row, "sentence": f"{row['sentence']} \u00e9"} for row in rows()])  # not ASCII
    write_task(folder, "food", [{**row, "sentence": row["sentence"].replace("film", "food")} for row in rows()])  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def done(inputs: Path) -> subprocess.CompletedProcess[str]:
    tasks = ("--tasks", "films.yaml", "--tasks", "food.yaml")
    return run(inputs, "demo", "--model", "model", *tasks, "--output", "out", PYTHONIOENCODING="ascii")


def test_demo_runs_to_the_end(done: subprocess.CompletedProcess[str]):
    assert done.returncode == 0, done.stderr
    assert "Task films: 16 training rows, 8 test rows, 2 choices" in done.stdout
    assert "2 blocks route each token among" in done.stdout
    assert "parameters train" in done.stdout
    assert "MJ-LoRA minus LoRA" in done.stdout
    assert "all tasks, pooled" in done.stdout
    assert "bit for bit equal" in done.stdout
    assert "Expected in all" in done.stderr
    assert "tokens/s" in done.stderr
    assert "Peak memory" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no terminal: no color, no redrawing


def test_demo_leaves_an_adapter_and_its_numbers(done: subprocess.CompletedProcess[str], inputs: Path):
    assert sorted(path.name for path in (inputs / "out").iterdir()) == ["adapter", "results.json"]
    assert (inputs / "out" / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((inputs / "out" / "results.json").read_text())
    assert set(record["accuracy"]) == {"untouched", "LoRA", "MJ-LoRA"}
    assert [len(right) for right in record["correct"]["MJ-LoRA"].values()] == [8, 8]
    assert record["reload"]["equal"]
    assert record["reload"]["difference"] == 0
    for found in record["routing"].values():
        assert sum(found["shares"].values()) == pytest.approx(1)


@pytest.fixture
def attempt(inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process (a start takes seconds): its exit code and lines on stderr."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("MONKEYJUMP_HOME", str(inputs / "home"))

    def attempt(*arguments: str) -> tuple[int, list[str]]:
        return app.run(["demo", *arguments]), capsys.readouterr().err.splitlines()

    return attempt


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("--tasks", "tweet"), "unknown task 'tweet'", "tweets"),
        (("--tasks", "films.yaml", "--model", "modle"), "model: 'modle' cannot be read", "config.json"),
        (("--tasks", "films.yaml", "--output", "films.yaml"), "films.yaml is a file", "folder"),
        (("--tasks", "films.yaml", "--tasks", "films.yaml", "--model", "model"), "'films' is given twice", "name"),
        (("--sise", "small"), "No such option", "--help"),
        (("--size", "smal"), "smal", "--help"),
        (("--seed", "-1"), "--seed: -1", "from 0 on"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(attempt, arguments, error: str, hint: str):
    code, lines = attempt(*arguments)
    assert (code, len(lines)) == (2, 2)
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


def test_bad_row_is_found_before_any_training(attempt, inputs: Path):
    write_task(inputs, "broken", [*rows(), {"sentence": "film", "mark": "fine"}])
    code, (line, hint) = attempt("--model", "model", "--tasks", "broken.yaml", "--output", "o2")
    assert code == 2
    assert "broken.jsonl, row 25, field 'mark': 'fine' is no answer of task broken" in line
    assert "positive" in hint


def test_weights_that_cannot_be_read_are_bad_input(attempt, inputs: Path):
    bare = save_model(inputs / "bare")
    (bare / "model.safetensors").unlink()
    code, lines = attempt("--model", "bare", "--tasks", "films.yaml", "--output", "o3")
    assert code == 2
    assert "the weights of 'bare' cannot be read" in lines[0]
    assert "safetensors" in lines[1]


def test_other_failures_are_exit_code_1_and_debug_shows_the_traceback(attempt, monkeypatch: pytest.MonkeyPatch):
    def fail(model):
        raise RuntimeError("not today")

    monkeypatch.setattr("monkeyjump.cli.demo_run.describe_routing", fail)
    arguments = ("--model", "model", "--tasks", "films.yaml", "--output", "o5")
    code, lines = attempt(*arguments)
    assert (code, lines) == (1, ["error: RuntimeError: not today", "hint: add --debug for the traceback"])
    code, lines = attempt(*arguments, "--debug")
    assert code == 1
    assert lines[0].startswith("Traceback")


def test_a_process_refuses_without_traceback(inputs: Path):
    done = run(inputs, "demo", "--tasks", "tweet")
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


def test_help_teaches(inputs: Path):
    done = run(inputs, "demo", "--help")
    assert done.returncode == 0
    for word in ("--model", "--tasks", "tweets", "YAML", "--size", "--output", "--seed", "monkeyjump demo"):
        assert word in done.stdout


def test_the_bare_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert app.run([]) == 0
    assert "demo" in capsys.readouterr().out


def test_interrupt_is_exit_code_130(inputs: Path):
    # thousands of rows, so that no machine is done before the signal comes
    many = [{**row, "sentence": f"film {n // 100} {n % 100} {row['sentence']}"} for n, row in enumerate(rows(4000))]
    task = write_task(inputs, "long", many)
    task.write_text(task.read_text().replace("{train: 16, test: 8}", "{train: 3900, test: 8}"))
    line, environment = command(inputs, "demo", "--model", "model", "--tasks", "long.yaml", "--output", "o4")
    process = subprocess.Popen(
        line, env=environment, cwd=inputs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # the plan has begun: imports are over
    time.sleep(0.2)
    for _ in range(10):  # Python drops an interrupt that falls into a destructor: then one presses again
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=5)
            break
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in stderr
