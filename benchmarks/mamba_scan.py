"""What the scans cost beside mambapy and Hugging Face's slow path, and over the length of the sequence.

    python benchmarks/mamba_scan.py [--only scan,long,memory,lengths,ssd,train,generate,slow] [--rounds 10]

Float32, forward and backward, two threads. Candidates take turns within a round; a ratio is taken within a round, and
its median and bootstrap 95 % interval over rounds are printed. Memory is the peak of a process of its own above what
it had with the inputs in place. "slow" runs Hugging Face's own loop, once (half a minute).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from monkeyjump.bench.memory import peak_bytes
from monkeyjump.bench.timing import Work, interleaved, ratio, summary, time_once
from monkeyjump.mamba import patched_mamba, selective_scan, ssd_scan

BATCH, CHANNELS, STATES = 4, 512, 16
SECTIONS = ("scan", "long", "memory", "lengths", "ssd", "train", "generate", "slow")


def inputs(length: int, batch: int = BATCH) -> list[Tensor]:
    """u, delta, A, B, C, D as `selective_scan` takes them."""
    torch.manual_seed(0)
    wide = [torch.randn(batch, CHANNELS, length), F.softplus(torch.randn(batch, CHANNELS, length) - 2)]
    a = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    narrow = [torch.randn(batch, STATES, length) for _ in range(2)]
    return [t.requires_grad_() for t in (*wide, a, *narrow, torch.ones(CHANNELS))]


def mambapy_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As `MambaBlock.selective_scan` of mambapy, on its own layout `[B, L, D]`."""
    from mambapy.pscan import pscan

    states = pscan(torch.exp(delta[..., None] * A), delta[..., None] * B[:, :, None] * u[..., None])
    return (states @ C[..., None]).squeeze(3) + D * u


def backend(name: str) -> Callable[..., Tensor]:
    return lambda *tensors: selective_scan(*tensors, backend=name)


SCANS = {"native": backend("native"), "chunked": backend("chunked"), "mambapy": mambapy_scan}


def both_passes(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[object], object]:
    with torch.no_grad():
        weights = torch.randn_like(function(*tensors))
    return lambda _: torch.autograd.grad(function(*tensors), tensors, weights)


def scan_work(name: str, length: int, batch: int = BATCH) -> Work:
    tensors = inputs(length, batch)
    if name == "mambapy":
        tensors = [t.detach().transpose(1, 2).contiguous().requires_grad_() if t.dim() == 3 else t for t in tensors]
    return Work(lambda: None, both_passes(SCANS[name], tensors))


def report(seconds: dict[str, list[float]], base: str) -> None:
    for name, values in seconds.items():
        s, r = summary(values), ratio(seconds[base], values)
        print(
            f"  {name:24s} {1e3 * s.median:9.2f} ms ({1e3 * s.lower:.2f} to {1e3 * s.upper:.2f})"
            f"   {r.median:7.2f} x {base} ({r.low:.2f} to {r.high:.2f})"
        )


def scan(rounds: int, length: int = 512) -> None:
    print(f"selective scan, B {BATCH}, L {length}, D {CHANNELS}, N {STATES}, forward and backward")
    report(interleaved({name: scan_work(name, length) for name in SCANS}, rounds, warmup=1), "mambapy")


def slow(_: int) -> None:
    tensors = inputs(512)
    own = Work(lambda: None, both_passes(backend("native"), tensors))
    theirs = Work(lambda: None, both_passes(mamba_selective_scan, tensors))
    time_once(own)
    mine, stock = time_once(own), time_once(theirs)
    print(f"Hugging Face's loop, same scan: {stock:.1f} s, native {1e3 * mine:.1f} ms: {stock / mine:.0f} x")


def memory(_: int) -> None:
    print(f"peak memory above the inputs, B {BATCH}, D {CHANNELS}, N {STATES}")
    for length in (512, 2048):
        used = {name: in_child(name, length, BATCH) for name in SCANS}
        shares = "   ".join(f"{n} {m / 2**20:.0f} MB ({m / used['mambapy']:.2f})" for n, m in used.items())
        print(f"  L {length}: {shares}")


def in_child(name: str, length: int, batch: int) -> int:
    command = [sys.executable, __file__, "--child", json.dumps([name, length, batch])]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child(name: str, length: int, batch: int) -> None:
    time_once(scan_work(name, 16, 1))  # threads and libraries
    work = scan_work(name, length, batch)
    before = peak_bytes("cpu")
    time_once(work)
    print(peak_bytes("cpu") - before)


def lengths(rounds: int) -> None:
    print(f"over the length, B 1, D {CHANNELS}, N {STATES}: milliseconds, microseconds per step, MB above the inputs")
    for length in (512, 1024, 2048, 4096, 8192):
        names = ("native", "chunked")
        seconds = interleaved({name: scan_work(name, length, 1) for name in names}, rounds, warmup=1)
        for name in names:
            median = summary(seconds[name]).median
            used = in_child(name, length, 1) / 2**20
            print(
                f"  L {length:5d} {name:8s} {1e3 * median:8.2f} ms {1e6 * median / length:7.2f} us/step {used:7.1f} MB"
            )


def ssd(rounds: int) -> None:
    batch, heads, width, states = 2, 8, 64, 64
    for length in (512, 2048):
        torch.manual_seed(0)
        dt = F.softplus(torch.randn(batch, length, heads) - 2)
        shared = [torch.randn(batch, length, 1, states) for _ in range(2)]
        tensors = [torch.randn(batch, length, heads, width), dt, -torch.arange(1.0, heads + 1), *shared]
        tensors = [t.requires_grad_() for t in tensors]
        works = {"ssd_scan": Work(lambda: None, both_passes(ssd_scan, tensors))}
        for chunk in (256, 64):
            theirs = lambda *t, chunk=chunk: mamba2_chunk_scan(*t, chunk)  # noqa: E731
            works[f"Hugging Face, chunk {chunk}"] = Work(lambda: None, both_passes(theirs, tensors))
        print(f"Mamba-2's scan, B {batch}, L {length}, H {heads}, P {width}, N {states}, forward and backward")
        report(interleaved(works, rounds, warmup=1), "Hugging Face, chunk 256")


def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=4, state_size=STATES))


def train(_: int) -> None:
    stock, ids = model().train(), torch.randint(0, 1000, (1, 512))

    def step(_: object) -> None:
        stock.zero_grad()
        stock(ids, labels=ids).loss.backward()

    work = Work(lambda: None, step)
    with patched_mamba(stock):
        seconds = [time_once(work) for _ in range(6)][1:]
    before, mine = time_once(work), summary(seconds)
    print(
        f"training step of a stock model, 4 layers, d 256, B 1, L 512: stock {before:.1f} s (once), "
        f"patched {1e3 * mine.median:.1f} ms ({1e3 * mine.lower:.1f} to {1e3 * mine.upper:.1f}): "
        f"{before / mine.median:.0f} x"
    )


def generate(rounds: int) -> None:
    stock = model().eval()
    for batch in (1, 8):
        ids = torch.randint(1, 1000, (batch, 64))
        asked = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        asked["attention_mask"] = torch.ones_like(ids)

        def patched(_: object, ids: Tensor = ids, asked: dict = asked) -> Tensor:
            with patched_mamba(stock):
                return stock.generate(ids, **asked)

        plain = lambda _, ids=ids, asked=asked: stock.generate(ids, **asked)  # noqa: E731
        works = {"patched": Work(lambda: None, patched), "stock": Work(lambda: None, plain)}
        print(f"generation, 4 layers, d 256, B {batch}, 64 tokens after 64")
        report(interleaved(works, rounds, warmup=1), "stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--child", type=json.loads)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.child:
        return child(*options.child)
    for section in options.only.split(","):
        if section == "long":
            scan(options.rounds, 2048)
        else:
            globals()[section](options.rounds)
    return None


if __name__ == "__main__":
    main()
