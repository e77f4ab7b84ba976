"""Real processes that form one gloo group, each with a time limit after which all of them are killed.

Processes come from a fork server that has imported torch, transformers and peft once: a start takes a fraction
of a second, and no process inherits anything from the tests before it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["conftest", "tiny"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "unit"), os.environ.get("PYTHONPATH", "")])


def run_ranks(function: Callable[..., Any], folder: Path, *given: Any, size: int = 2, timeout: float = 90) -> list[Any]:
    """What `function(rank, *given)` returns on every rank, by rank.

    Raises:
        AssertionError: a rank failed (with the tracebacks of all that did), or none answered in time.
    """
    folder = folder / f"ranks-{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    ranks = [_server.Process(target=_run, args=(function, rank, size, folder, given)) for rank in range(size)]
    for process in ranks:
        process.start()
    end = time.monotonic() + timeout
    try:
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        late = [process.name for process in ranks if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert not late, f"{late} did not end within {timeout} s"
    return [torch.load(folder / f"{rank}.pt") for rank in range(size) if (folder / f"{rank}.pt").exists()]


def process(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """A process that is to call `function(*given, **named)`, not yet started."""
    return _server.Process(target=function, args=given, kwargs=named)


def _run(function: Callable[..., Any], rank: int, size: int, folder: Path, given: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        torch.save(function(rank, *given), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)
    dist.destroy_process_group()
