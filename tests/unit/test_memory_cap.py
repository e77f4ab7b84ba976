"""The public memory cap of `initialize_centers`, kept in a process that may not have more."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys, warnings
import torch
from torch import nn
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from peft import get_peft_model
from monkeyjump import MonkeyJumpConfig, initialize_centers
from monkeyjump.tuner.model import routers

BLOCKS, DIM, TOKENS = 32, 4096, 50_000

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 2), nn.Linear(DIM, 2)
    def forward(self, h):
        self.a(h), self.b(h)
        return h.roll(1, -1)  # other states for every block, at the price of one copy

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return h

def batches(count, size=1000):
    base = torch.randn(1, size, DIM)
    for i in range(count):
        yield {"h": base * (1 + (i % 7)) + i % 5}

model = get_peft_model(Net(), MonkeyJumpConfig(target_modules=["a", "b"], shared_modules=[], r=1))
initialize_centers(model, batches(1), max_tokens=500, restarts=1, iterations=1, progress=False)  # warm up
with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
limit = now + int(sys.argv[1]) + 256 * 2**20  # beside the cap: one batch and what the blocks make of it
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
done = initialize_centers(
    model, batches(50), max_tokens=TOKENS, memory_limit=int(sys.argv[2]), restarts=1, iterations=2, progress=False
)
assert done.seen == TOKENS and all(r.ready["default"] for r in routers(model))
print("kept", done.kept)
"""


def child(room: int, memory_limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(room), str(memory_limit)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_cap_of_initialize_centers_is_kept() -> None:
    """32 blocks x 4,096 x 50,000 states are 26 GB; they pass through a process with 1 GiB for them."""
    done = child(2**30, 2**30)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 3_000 < int(done.stdout.split()[-1]) < 5_000
    too_much = child(2**30, 2**31)  # the same room, and a cap twice as high
    assert too_much.returncode != 0
