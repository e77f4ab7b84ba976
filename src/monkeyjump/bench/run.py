"""All sections of a benchmark -> one record, which JSON can hold."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from monkeyjump.bench.candidates import Candidate, build, check_targets, load_base
from monkeyjump.bench.memory import peak_in_child, saved_bytes
from monkeyjump.bench.passes import decode, forward, loss_of, prefill, tokens, training_step, vocabulary_of
from monkeyjump.bench.settings import FLOOR, MONKEY_JUMP, REFERENCE, Settings, check
from monkeyjump.bench.size import kmeans_times, sizes
from monkeyjump.bench.timing import Work, interleaved, ratio, summary
from monkeyjump.methods import METHODS
from monkeyjump.tasks.errors import InputError

PACKAGES = ("monkeyjump", "torch", "transformers", "peft", "numpy", "scipy")
Record = dict[str, Any]


class Advances(Protocol):
    def advance(self) -> None: ...


class Progress(Protocol):
    """Where a run says how far it is."""

    def bar(self, name: str, total: int) -> AbstractContextManager[Advances]: ...


def run(settings: Settings, progress: Progress) -> Record:
    """Measure the sections that `settings.only` names.

    Returns:
        `machine`, `settings`, and one entry for each section: by candidate, every raw measurement,
        medians and quartiles, ratios to the floor, to PEFT's LoRA and to MJ-LoRA.

    Raises:
        InputError: a setting out of range, a model that cannot be read, a target that is not there.
        RuntimeError: a process that measures memory failed.
    """
    check(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda is not available", hint="--device cpu, or install a CUDA build of torch")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    record: Record = {"machine": machine(settings.device), "settings": asdict(settings)}
    base = load_base(settings)
    check_targets(base, settings.targets)
    candidates = {name: build(name, base, settings) for name in settings.candidates}
    record.update(_on_candidates(candidates, settings, progress))
    del candidates
    if "memory" in settings.only:
        record["memory"] = _memory(settings, progress)
    routed = [name for name in settings.candidates if name.startswith("mj-") and not METHODS[name].options]
    if "kmeans" in settings.only and routed:
        with progress.bar("k-means", 1) as bar:
            # the same for all of them: the states are the base model's, the centers one per routed slot
            record["kmeans"] = kmeans_times(routed[0], base, settings)
            bar.advance()
    record["machine"]["load_after"] = os.getloadavg()
    return record


def _on_candidates(candidates: Mapping[str, Candidate], settings: Settings, progress: Progress) -> Record:
    """The sections that are measured in this process; sizes first, while no step has changed a rank."""
    record: Record = {}
    vocabulary = vocabulary_of(next(iter(candidates.values())).model)
    ids = tokens(vocabulary, settings.batch, settings.length, settings.seed, settings.device)
    if "size" in settings.only:
        record["size"] = {name: sizes(candidate) for name, candidate in candidates.items()}
    if "saved" in settings.only:
        counted = {name: saved_bytes(c.model, _loss(c.model, ids)) for name, c in candidates.items()}
        record["saved"] = above_floor({name: [value] for name, value in counted.items()})
    if "step" in settings.only:
        works = {name: training_step(c, ids, settings.optimizer) for name, c in candidates.items()}
        record["step"] = _timed("training step", works, settings, progress)
    if "inference" in settings.only:
        record["inference"] = _inference(candidates, ids, settings, progress)
    return record


def _loss(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: loss_of(model, ids)


def _inference(
    candidates: Mapping[str, Candidate], ids: torch.Tensor, settings: Settings, progress: Progress
) -> Record:
    """`forward` over the whole batch; `prefill` and `decode` for its first row, with tokens per second."""
    prompt, count = ids[:1], settings.decode_tokens
    record = {
        "forward": {name: forward(c, ids) for name, c in candidates.items()},
        "prefill": {name: prefill(c, prompt) for name, c in candidates.items()},
        "decode": {name: decode(c, prompt, count) for name, c in candidates.items()},
    }
    taken = {"forward": ids.numel(), "prefill": prompt.numel(), "decode": count}
    found = {kind: _timed(kind, works, settings, progress) for kind, works in record.items()}
    for kind, rows in found.items():
        for row in rows.values():
            row["tokens_per_second"] = taken[kind] / row["median"]
    return found


def _timed(kind: str, works: Mapping[str, Work], settings: Settings, progress: Progress) -> Record:
    with progress.bar(kind, settings.warmup + settings.pairs) as bar:
        seconds = interleaved(works, settings.pairs, settings.warmup, settings.device, bar.advance)
    return {
        name: {
            "seconds": values,
            **asdict(summary(values)),
            **{key: asdict(ratio(values, seconds[other])) for key, other in _others(seconds)},
        }
        for name, values in seconds.items()
    }


def _others(present: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What times are compared with, as far as it takes part."""
    references = (("to_floor", FLOOR), ("to_peft_lora", REFERENCE), ("to_mj_lora", MONKEY_JUMP))
    return [(key, name) for key, name in references if name in present]


def above_floor(measured: Mapping[str, Sequence[int]]) -> Record:
    """Bytes by candidate; what it adds to the floor; that as a ratio of what PEFT's LoRA adds.

    Args:
        measured: bytes of every run, of which the median counts.
    """
    medians = {name: median(values) for name, values in measured.items()}
    floor, reference = medians.get(FLOOR), medians.get(REFERENCE)
    record: Record = {}
    for name, value in medians.items():
        row: Record = {"runs": list(measured[name]), "bytes": value}
        if floor is not None:
            row["above_floor"] = value - floor
            if reference is not None and reference > floor:
                row["to_peft_lora"] = (value - floor) / (reference - floor)
        record[name] = row
    return record


def _memory(settings: Settings, progress: Progress) -> Record:
    """Peaks from processes of their own, interleaved like the times."""
    found: dict[str, list[Record]] = {name: [] for name in settings.candidates}
    with progress.bar("peak memory", settings.memory_runs * len(found)) as bar:
        for _ in range(settings.memory_runs):
            for name, runs in found.items():
                runs.append(peak_in_child(name, settings))
                bar.advance()
    record = above_floor({name: [run["peak"] for run in runs] for name, runs in found.items()})
    for name, row in record.items():
        row["before"] = [run["before"] for run in found[name]]
    return record


def machine(device: str) -> Record:
    """What a reader needs to know to judge the figures or to repeat them."""
    return {
        "command": ["monkeyjump", *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_before": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "KMP_"))},
        **{package: version(package) for package in PACKAGES},
    }


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
