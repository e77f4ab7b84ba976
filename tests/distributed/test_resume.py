"""A run killed with SIGKILL and resumed from its checkpoint equals the uninterrupted one, bit for bit.

The checkpoint is one of an odd step in the middle of an epoch: statistics wait for the next update of the centers.
The kill comes a step later, so that work is lost and done again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TESTS, process
from training import ADAPTERS, STEPS, Run, as_argument, main

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("training.py")
LIMIT = 120  # seconds for the processes of one run


def run(what: Run, size: int = 1) -> list[dict[str, Any]]:
    """The results of all ranks; none where the run stops, and all its processes are killed together."""
    folder = Path(what.folder)
    port = free_port()
    children = [process(main, what, **environment(rank, size, port)) for rank in range(size)]
    for child in children:
        child.start()
    end = time.monotonic() + LIMIT
    try:
        if what.stop_at is not None:
            while not all((folder / f"stopped-{rank}").exists() for rank in range(size)):
                assert time.monotonic() < end
                assert all(child.is_alive() for child in children)
                time.sleep(0.02)
            for child in children:
                child.kill()  # SIGKILL
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
    finally:
        for child in children:
            child.kill()
    assert [child.exitcode for child in children] == [0 if what.stop_at is None else -signal.SIGKILL] * size
    return results(folder, size) if what.stop_at is None else []


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its workers."""
    if size == 1:
        return {}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    return {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(size)]


def torchrun(what: Run) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(TESTS), str(TESTS / "unit"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen(
        [*command, str(SCRIPT), as_argument(what)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as agent:
        try:
            _, errors = agent.communicate(timeout=LIMIT)
        finally:
            agent.terminate()  # it ends its workers; a kill would leave them
    assert agent.returncode == 0, errors[-3000:]
    return results(Path(what.folder), 2)


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
    [whole] = run(Run(base, str(tmp_path / "whole")))
    run(Run(base, str(tmp_path / "killed"), stop_at=4))
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    [resumed] = run(Run(base, str(tmp_path / "resumed"), resume=str(tmp_path / "killed" / "checkpoint-3")))
    compare(resumed, whole)
    if base == "adalora":
        assert sum(map(sum, whole["ranks"].values())) < 4 * len(whole["ranks"])  # some were pruned


@pytest.mark.proves("integration", "torchrun, 2 processes, stock Trainer")
def test_two_ranks_under_torchrun_equal_one_process(tmp_path: Path) -> None:
    first, second = torchrun(Run("lora", str(tmp_path / "ranks"), dropout=False))
    [alone] = run(Run("lora", str(tmp_path / "alone"), dropout=False, batch_size=4))
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(first["logs"], alone["logs"]):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.proves("integration", "resume after SIGKILL under DDP")
@pytest.mark.parametrize("base", ["lora", "adalora"])
def test_two_ranks_resumed_after_a_kill_equal_the_uninterrupted_run(base: str, tmp_path: Path) -> None:
    settings = {"base": base, "checkpointing": base == "lora"}
    whole = run(Run(folder=str(tmp_path / "whole"), **settings), size=2)
    run(Run(folder=str(tmp_path / "killed"), stop_at=4, **settings), size=2)
    checkpoint = tmp_path / "killed" / "checkpoint-3"
    resumed = run(Run(folder=str(tmp_path / "resumed"), resume=str(checkpoint), **settings), size=2)
    for mine, theirs in zip(resumed, whole):
        compare(mine, theirs)
        assert all(torch.equal(value, whole[0]["state"][name]) for name, value in theirs["state"].items())
