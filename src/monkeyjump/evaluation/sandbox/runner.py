"""Run a program in the sandbox of `jail.py` and say whether it came to its end.

What the program gets: Python's standard library, an empty /tmp in memory, and the limits. What it does not get:
network (a namespace of its own without interfaces), the machine's files, environment variables, input, other
processes, the rights of the user who started it. It is killed with everything it has started when time is up.
Without those namespaces nothing is run.

What this does not prove: that an answer has not been made for the tests. A program that reads the frames of the
interpreter around it can pretend to have passed; it cannot leave the sandbox by that.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monkeyjump.tasks.errors import InputError

JAIL = Path(__file__).with_name("jail.py")
LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64")
MOST = 4096  # bytes of a verdict


@dataclass(frozen=True)
class Limits:
    """Of each program: seconds on the clock and of CPU, MiB of memory a process and of one file, processes."""

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 512
    file: int = 4
    processes: int = 8

    def as_resources(self) -> dict[str, int]:
        megabyte = 1 << 20
        return {
            "CPU": self.cpu,
            "AS": self.memory * megabyte,
            "FSIZE": self.file * megabyte,
            "NPROC": self.processes,
            "NOFILE": 64,
        }


@dataclass(frozen=True)
class Verdict:
    """Whether a program came to its end, and if not, why."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits = Limits()) -> Verdict:
    """Run Python source in the sandbox.

    Raises:
        InputError: this machine gives no sandbox (no Linux, or no right to make namespaces).
    """
    if sys.platform != "linux":
        raise InputError(f"the sandbox needs Linux, not {sys.platform}", hint="leave out tasks with pass@1")
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="monkeyjump-") as root:
        job = {"program": program, "token": token, "root": root, "libraries": _libraries()}
        said, code = _converse(json.dumps({**job, "limits": limits.as_resources()}), limits.seconds)
    return _judge(said, code, token, limits)


def check_sandbox() -> None:
    """Raises InputError where this machine gives no sandbox, before any long work."""
    found = run_program("assert True")
    if not found.passed:
        raise InputError(
            f"the sandbox does not work here: {found.reason}", hint="leave out tasks with pass@1, or run elsewhere"
        )


def _libraries() -> list[str]:
    """What the interpreter reads while it runs, outermost folders first."""
    found = {sys.base_prefix, sys.base_exec_prefix, *LIBRARIES}
    return sorted(path for path in found if os.path.isdir(path))


def _converse(job: str, seconds: float) -> tuple[bytes, int | None]:
    """What the jail says, and its exit code; None where it had to be killed."""
    python = getattr(sys, "_base_executable", sys.executable)  # without the virtual environment around it
    child = subprocess.Popen(
        [python, "-I", "-S", "-B", str(JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    until = time.monotonic() + seconds
    try:
        child.stdin.write(job.encode())
        child.stdin.close()
        said = _listen(child.stdout.fileno(), until)
        return said, child.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, BrokenPipeError):
        return b"", None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # with it goes its process namespace
        child.wait()
        child.stdout.close()


def _listen(pipe: int, until: float) -> bytes:
    """What comes through a pipe until it is closed, time is up, or it is more than any verdict."""
    said, waiting = b"", select.poll()  # select takes no descriptor from 1,024 on
    waiting.register(pipe, select.POLLIN)
    while len(said) <= MOST and waiting.poll(1000 * max(0.0, until - time.monotonic())):
        part = os.read(pipe, MOST)
        if not part:
            break
        said += part
    return said


def _judge(said: bytes, code: int | None, token: str, limits: Limits) -> Verdict:
    try:
        verdict: Any = json.loads(said) if len(said) <= MOST else None
    except (ValueError, RecursionError):
        verdict = None
    if not isinstance(verdict, dict):
        if code is None:
            return Verdict(False, f"not done after {limits.seconds:g} seconds")
        if code - 128 in signal.valid_signals():  # a program may also give such a code by itself
            return Verdict(False, f"killed by {signal.Signals(code - 128).name} (limits of CPU time, memory or files)")
        return Verdict(False, "ended before its tests did")
    if "refused" in verdict and verdict.get("token") == token:
        raise InputError(
            f"the sandbox cannot be made: {verdict['refused']}",
            hint="it needs Linux 5.12 and namespaces: run as a user who may make them (in a container, with "
            "--security-opt seccomp=unconfined or CAP_SYS_ADMIN), or leave out tasks with pass@1",
        )
    passed = verdict.get("passed") is True and verdict.get("token") == token
    return Verdict(passed, "" if passed else str(verdict.get("reason") or "no valid verdict"))
