"""A training step on a GPU beside PEFT's LoRA, where launching kernels takes the time and where running them does.

    python benchmarks/gpu_step.py [--only small,medium,large] [--rounds 20] [--dropout 0] [--candidates floor,...]

bfloat16 base, r 2, q, k, v, o and gate. Candidates take turns within a round; ratios are taken within a round, medians
and bootstrap 95 % intervals over rounds. Peak is that of the tensors during a step, above what was there before it.
"""

from __future__ import annotations

import argparse
import gc

import torch

from monkeyjump.bench.candidates import build, load_base
from monkeyjump.bench.passes import tokens, training_step
from monkeyjump.bench.settings import Settings, Shape
from monkeyjump.bench.timing import Work, interleaved, ratio, summary

SIZES = {
    "small": (Shape(512, 6, 8, 8, 1408, 1024), 4, 256),
    "medium": (Shape(2048, 8, 32, 8, 8192, 32_000), 8, 512),
    "large": (Shape(4096, 4, 32, 8, 14_336, 32_000), 32, 512),
}
NAMES = "floor,peft-lora,mj-lora,mj-lora-fa"


def peak(work: Work) -> float:
    """GB that a step takes above what is there before it."""
    state = work.prepare()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work.run(state)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def measure(size: str, rounds: int, dropout: float, names: list[str]) -> None:
    shape, batch, length = SIZES[size]
    settings = Settings(
        shape=shape, batch=batch, length=length, dtype="bfloat16", device="cuda", dropout=dropout, input_gradients=True
    )
    base = load_base(settings)
    ids = tokens(shape.vocab_size, batch, length, 0, "cuda")
    works = {name: training_step(build(name, base, settings), ids) for name in names}
    seconds = interleaved(works, rounds, 3, "cuda")
    print(
        f"{size}: d {shape.hidden_size}, {shape.layers} layers, {batch} x {length} tokens, dropout {dropout}",
        flush=True,
    )
    for name, values in seconds.items():
        s, ratios = summary(values), [(other, ratio(values, seconds[other])) for other in ("peft-lora", "floor")]
        print(
            f"  {name:16s} {1e3 * s.median:8.2f} ms ({1e3 * s.lower:.2f} to {1e3 * s.upper:.2f})   ",
            *(f"{other} {r.median:.3f} [{r.low:.3f}, {r.high:.3f}]   " for other, r in ratios),
            f"peak {peak(works[name]):.2f} GB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SIZES), help=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--candidates", default=NAMES, help="of `monkeyjump bench`, floor and peft-lora among them")
    given = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for size in given.only.split(","):
        measure(size, given.rounds, given.dropout, given.candidates.split(","))


if __name__ == "__main__":
    main()
