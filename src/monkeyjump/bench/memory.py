"""Memory: what a forward pass keeps for its backward pass, and the peak of a process."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monkeyjump.bench.settings import Settings


class _Kept:
    """A saved tensor; as long as the graph holds it, the tensor is saved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that the graph of `forward()` holds once it is there.

    Every storage counts once and in full, however many views of it were saved; parameters and buffers of
    the model do not count. A tensor that a Function keeps past `save_for_backward` is not seen.

    Args:
        model: whose parameters and buffers are left out.
        forward: returns the tensor that `backward` would start from.
    """
    saved: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        root = forward()
    gc.collect()
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    sizes = {_storage(kept.tensor): kept.tensor.untyped_storage().nbytes() for kept in saved}
    del root  # its graph was to live until here
    return sum(size for storage, size in sizes.items() if storage not in own)


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def peak_bytes(device: str) -> int:
    """The most memory that this process (CPU) or its tensors (CUDA) have had so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        # getrusage's peak starts at that of the process that started this one: too high after a large parent
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_in_child(name: str, settings: Settings) -> dict[str, Any]:
    """The record of `monkeyjump.bench.child` for one candidate.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "monkeyjump.bench.child", name, json.dumps(asdict(settings))]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the memory of {name} ended with exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])
