"""A run killed at any stage goes on and ends with the numbers of one that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_inputs import adapter_bytes, metrics, write_run_inputs

from monkeyjump.cli import app

# module, function, before or after it, at which call
POINTS = [
    ("monkeyjump.training.run", "prepare", "before", 1),
    ("monkeyjump.training.folder", "write_config", "before", 1),
    ("monkeyjump.training.folder", "write_config", "after", 1),
    ("monkeyjump.training.run", "start_centers", "before", 1),
    ("monkeyjump.training.run", "start_centers", "after", 1),
    ("monkeyjump.training.run", "try_saving", "after", 1),
    ("monkeyjump.training.callbacks", "finish", "before", 1),
    ("monkeyjump.training.checkpoints", "write_manifest", "after", 2),
    ("monkeyjump.training.checkpoints", "_remove", "before", 1),
    ("monkeyjump.training.callbacks", "finish", "after", 2),
    ("monkeyjump.training.saving", "write_manifest", "after", 2),
    ("monkeyjump.training.run", "save_adapter", "after", 1),
    ("monkeyjump.training.folder", "write_json", "before", 2),
    ("monkeyjump.training.folder", "write_json", "after", 2),
]
CHILD = """
import importlib, os, signal, sys
from monkeyjump.cli import app
module, name, when, call = sys.argv[1:5]
module = importlib.import_module(module)
original, calls = getattr(module, name), 0

def killing(*args, **kwargs):
    global calls
    calls += 1
    last = calls == int(call)
    if last and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(module, name, killing)
sys.exit(app.run(sys.argv[5:]))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a finished, uninterrupted run in `whole`."""
    folder = tmp_path_factory.mktemp("kill")
    path = write_run_inputs(folder)
    path.write_text(path.read_text().replace("keep: 4", "keep: 2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.run(["train", "run.yaml", "output.folder=whole"]) == 0
    return folder


def killed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", CHILD, *arguments, "train", "run.yaml", "--resume"]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)


def go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert app.run(["train", "run.yaml", "--resume"]) == 0


def assert_same(folder: Path) -> None:
    whole, out = folder / "whole", folder / "out"
    assert adapter_bytes(out) == adapter_bytes(whole)
    assert metrics(out) == metrics(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for place in ("checkpoints", "adapter"):
        assert sorted(p.name for p in (out / place).iterdir()) == sorted(p.name for p in (whole / place).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[1]} {point[2]} {point[3]}")
def test_killed_at_a_stage(inputs: Path, monkeypatch: pytest.MonkeyPatch, point: tuple) -> None:
    shutil.rmtree(inputs / "out", ignore_errors=True)
    done = killed(inputs, *map(str, point))
    assert done.returncode == -signal.SIGKILL, done.stderr
    go_on(inputs, monkeypatch)
    assert_same(inputs)


@pytest.mark.slow
def test_killed_again_and_again(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start is killed at its first checkpoint: it still gets to the end."""
    shutil.rmtree(inputs / "out", ignore_errors=True)
    for _ in range(3):
        assert killed(inputs, "monkeyjump.training.callbacks", "finish", "after", "1").returncode == -signal.SIGKILL
    go_on(inputs, monkeypatch)
    assert_same(inputs)
