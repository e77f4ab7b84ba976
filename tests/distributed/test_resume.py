"""A run killed with SIGKILL and resumed from its checkpoint equals the uninterrupted one, bit for bit.

The checkpoint is one of an odd step in the middle of an epoch: statistics wait for the next update of the centers.
The kill comes a step later, so that work is lost and done again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TESTS, process
from training import ADAPTERS, STEPS, Run, as_argument, main

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("training.py")


def wait_for(condition: Any, what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.02)


def kill(stopped: list[Path]) -> None:
    """SIGKILL to the processes that wrote their numbers into these files."""
    for path in stopped:
        wait_for(lambda path=path: path.exists() and path.read_text(), str(path))
        os.kill(int(path.read_text()), signal.SIGKILL)


def run_alone(run: Run) -> dict[str, Any]:
    child = process(main, run)
    child.start()
    try:
        if run.stop_at is None:
            child.join(90)
        else:
            kill([Path(run.folder) / "stopped-0"])
            child.join(10)
    finally:
        child.kill()
    assert child.exitcode == (0 if run.stop_at is None else -signal.SIGKILL)
    return torch.load(Path(run.folder) / "result-0.pt") if run.stop_at is None else {}


@contextmanager
def torchrun(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Two workers; torchrun and what it started are gone at the end."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "unit"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen(
        [*command, str(SCRIPT), as_argument(run)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        try:
            yield agent
        finally:
            agent.terminate()  # it ends its workers; a kill would leave them
            try:
                agent.wait(30)
            finally:
                agent.kill()


def run_ranks(run: Run) -> list[dict[str, Any]]:
    with torchrun(run) as agent:
        if run.stop_at is not None:
            kill([Path(run.folder) / f"stopped-{rank}" for rank in range(2)])
            return []
        _, errors = agent.communicate(timeout=110)
        assert agent.returncode == 0, errors[-3000:]
    return [torch.load(Path(run.folder) / f"result-{rank}.pt") for rank in range(2)]


def compare(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    assert resumed["logs"] == whole["logs"]  # what was logged before the kill comes from the checkpoint
    assert [log["step"] for log in whole["logs"]] == list(range(1, STEPS + 1))
    assert resumed["completed"] == whole["completed"] == STEPS
    assert resumed["ranks"] == whole["ranks"]
    assert resumed["state"].keys() == whole["state"].keys()
    for name, value in whole["state"].items():
        assert torch.equal(resumed["state"][name], value), name


@pytest.mark.proves("integration", "resume after SIGKILL")
@pytest.mark.parametrize("base", ADAPTERS)
def test_resumed_after_a_kill_equals_the_uninterrupted_run(base: str, tmp_path: Path) -> None:
    whole = run_alone(Run(base, str(tmp_path / "whole")))
    killed = Run(base, str(tmp_path / "killed"), stop_at=4)
    run_alone(killed)
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed = run_alone(Run(base, str(tmp_path / "resumed"), resume=str(tmp_path / "killed" / "checkpoint-3")))
    compare(resumed, whole)
    if base == "adalora":
        assert sum(map(sum, whole["ranks"].values())) < 4 * len(whole["ranks"])  # some were pruned


@pytest.mark.proves("integration", "torchrun, 2 processes, stock Trainer")
def test_two_ranks_under_torchrun_equal_one_process(tmp_path: Path) -> None:
    run = Run("lora", str(tmp_path / "ranks"), dropout=False)
    first, second = run_ranks(run)
    alone = run_alone(Run("lora", str(tmp_path / "alone"), dropout=False, batch_size=4))
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(first["logs"], alone["logs"]):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.proves("integration", "resume after SIGKILL under DDP")
def test_two_ranks_resumed_after_a_kill_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    whole = run_ranks(Run("lora", str(tmp_path / "whole"), checkpointing=True))
    run_ranks(Run("lora", str(tmp_path / "killed"), stop_at=4, checkpointing=True))
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    resumed = run_ranks(Run("lora", str(tmp_path / "resumed"), resume=str(checkpoint), checkpointing=True))
    for mine, theirs in zip(resumed, whole):
        compare(mine, theirs)
