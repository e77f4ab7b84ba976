"""What share of a training step the routers take.

    python benchmarks/router_share.py [--dropout 0.05] [--steps 20]

The routers of one model are timed inside its training steps (forward and backward, centers being
gathered for); the share is taken within each step. Shape, ranks and targets are those of
`monkeyjump bench`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

from monkeyjump.bench.candidates import build, load_base
from monkeyjump.bench.passes import tokens, training_step, vocabulary_of
from monkeyjump.bench.settings import Settings
from monkeyjump.bench.timing import time_once
from monkeyjump.tuner.router import Router

WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    settings = replace(Settings(), dropout=options.dropout, input_gradients=True)
    candidate = build("mj-lora", load_base(settings), settings)
    ids = tokens(vocabulary_of(candidate.model), settings.batch, settings.length, settings.seed, settings.device)
    taken = _timed_routers()
    work, shares, routing = training_step(candidate, ids), [], []
    for step in range(-WARMUP, options.steps):
        taken.clear()
        seconds = time_once(work)
        if step >= 0:
            routing.append(sum(taken))
            shares.append(sum(taken) / seconds)
    low, median, high = np.quantile(shares, [0.25, 0.5, 0.75])
    print(f"routers: {1e3 * np.median(routing):.2f} ms of a step; share {median:.4f} [{low:.4f}, {high:.4f}]")


def _timed_routers() -> list[float]:
    """Seconds of every routing decision from now on, the statistics of the centers included."""
    taken: list[float] = []
    route = Router.route

    def timed(router: Router, *args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        found = route(router, *args, **kwargs)  # type: ignore[arg-type]
        taken.append(time.perf_counter() - start)
        return found

    Router.route = timed  # type: ignore[assignment, method-assign]
    return taken


if __name__ == "__main__":
    main()
