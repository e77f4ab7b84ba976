"""`monkeyjump train` on two CPU processes, from the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_inputs import RUN, adapter_bytes, metrics, write_run_inputs


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MONKEYJUMP_HOME": "home"}
    line += ["-m", "monkeyjump", "train", *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_go_on(tmp_path: Path) -> None:
    write_run_inputs(tmp_path, RUN.replace("batch_size: 4", "batch_size: 2"))
    done = torchrun(tmp_path, "run.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    facts = json.loads((out / "run.json").read_text())
    assert (facts["processes"], facts["steps"]) == (2, 16)  # 2 rows on each of 2 processes are a step of 4
    lines = metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))
    assert all({"loss/films", "loss/food"} & set(line) for line in lines if "loss" in line)
    assert lines[-1]["num_input_tokens_seen"] > 0
    moved = tmp_path / "again"
    shutil.copytree(out, moved)
    shutil.rmtree(moved / "adapter")
    (moved / "result.json").unlink()
    for name in ("checkpoint-10", "checkpoint-15", "checkpoint-16"):
        shutil.rmtree(moved / "checkpoints" / name)
    done = torchrun(tmp_path, "again", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapter_bytes(moved) == adapter_bytes(out)
    assert metrics(moved) == metrics(out)
