"""`monkeyjump mamba adapt` stopped by a real signal goes on and ends with the bytes of a run that never was."""

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
from mamba_inputs import FAST, metrics, write_base
from test_kill import CHILD

from monkeyjump.cli import app

RUN = ["mamba", "adapt", "model", "text.txt", "--steps", "40", *FAST]
WRITTEN = (
    "model.safetensors",
    "config.json",
    "masks.safetensors",
    "adapter/adapters.safetensors",
    "order/scan_order.npy",
)
# module, function, before or after it, at which call
POINTS = [
    ("monkeyjump.mamba.adapting.run", "write_settings", "after", 1),
    ("monkeyjump.mamba.adapting.run", "lay_out", "after", 1),
    ("monkeyjump.training.callbacks", "finish", "before", 5),
    ("monkeyjump.mamba.adapting.export", "save_masks", "after", 1),
    ("monkeyjump.mamba.adapting.export", "save_peft", "after", 1),
    ("monkeyjump.mamba.adapting.run", "save_model", "after", 1),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a finished, uninterrupted run in `whole`."""
    folder = write_base(tmp_path_factory.mktemp("kill"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.run([*RUN, "--output", "whole"]) == 0
    return folder


def assert_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert not (folder / "out" / "result.json").exists()
    assert app.run([*RUN, "--output", "out", "--resume"]) == 0
    for name in WRITTEN:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    lines = [{json.dumps(line, sort_keys=True) for line in metrics(folder / name)} for name in ("out", "whole")]
    assert lines[0] >= lines[1]  # a signal adds a line where it came
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(
        path.name for path in (folder / "whole").iterdir()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_training(inputs: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    shutil.rmtree(inputs / "out", ignore_errors=True)
    line = [sys.executable, "-m", "monkeyjump", *RUN, "--output", "out"]
    process = subprocess.Popen(line, env=environment(), cwd=inputs, stderr=subprocess.PIPE, text=True)
    while not (inputs / "out" / "checkpoints" / "checkpoint-8").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    reached = max(int(path.name.rpartition("-")[2]) for path in (inputs / "out" / "checkpoints").glob("checkpoint-*"))
    assert reached < 40
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert f"step {reached} is saved" in stderr
        assert "go on with: monkeyjump mamba adapt --output out --resume" in stderr.splitlines()[-1]
    assert_goes_on(inputs, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[1]} {point[2]} {point[3]}")
def test_killed_at_a_stage(inputs: Path, monkeypatch: pytest.MonkeyPatch, point: tuple) -> None:
    shutil.rmtree(inputs / "out", ignore_errors=True)
    line = [sys.executable, "-c", CHILD, *map(str, point), *RUN, "--output", "out"]
    done = subprocess.run(line, cwd=inputs, env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_goes_on(inputs, monkeypatch)
