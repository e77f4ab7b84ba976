"""A record -> tables for a terminal, results.json, and the columns of the paper's Figure 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from monkeyjump.bench.run import Record
from monkeyjump.tasks.cache import write_in_one_piece

MB = 1_000_000
NONE = "-"


def figure2(record: Record) -> dict[str, dict[str, float | None]]:
    """The columns of Figure 2 by candidate; None for what was not measured.

    Units: trainable parameters in thousands, all in millions; weights and peak memory in MB (10^6 bytes);
    `it_per_s`: training steps (forward and backward of one batch) a second; `train_minutes`: for
    `settings.steps` optimizer steps of `settings.accumulation` such steps each; `inference_it_per_s`:
    forward passes of one batch a second.
    """
    settings = record["settings"]
    passes = settings["steps"] * settings["accumulation"]
    columns: dict[str, dict[str, float | None]] = {}
    for name in settings["candidates"]:
        size = record.get("size", {}).get(name, {})
        step = record.get("step", {}).get(name, {}).get("median")
        forward = record.get("inference", {}).get("forward", {}).get(name, {}).get("median")
        columns[name] = {
            "trainable_k": _over(size.get("trainable"), 1000),
            "total_m": _over(size.get("total"), 1_000_000),
            "model_mb": _over(size.get("model_bytes"), MB),
            "peak_memory_mb": _over(record.get("memory", {}).get(name, {}).get("bytes"), MB),
            "it_per_s": None if step is None else 1 / step,
            "train_minutes": _over(step, 60 / passes),
            "inference_it_per_s": None if forward is None else 1 / forward,
        }
    return columns


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def write(record: Record, folder: Path) -> Path:
    """`results.json`, with the columns of Figure 2 beside the record."""
    path = folder / "results.json"
    write_in_one_piece(path, json.dumps({**record, "figure2": figure2(record)}, indent=1))
    return path


def tables(record: Record) -> Iterator[Table]:
    """One table per section that was measured."""
    settings = record["settings"]
    shape = f"{settings['batch']} x {settings['length']} tokens"
    if "step" in record:
        yield _times(f"Training step, {shape}", record["step"])
    for kind, rows in record.get("inference", {}).items():
        what = {
            "forward": f"Forward only, {shape}",
            "prefill": f"Prefill, 1 x {settings['length']} tokens",
            "decode": f"Decode, {settings['decode_tokens']} tokens one by one after 1 x {settings['length']}",
        }
        yield _times(what[kind], rows)
    if "saved" in record:
        yield _bytes(f"Saved for the backward pass, {shape}", record["saved"])
    if "memory" in record:
        where = "tensors on the GPU" if settings["device"] == "cuda" else "process"
        title = f"Peak memory of the {where}, {settings['memory_batch']} x {settings['length']} tokens"
        yield _bytes(title, record["memory"])
    if "size" in record:
        yield _sizes(record["size"])


def summary_lines(record: Record) -> Iterator[str]:
    """The machine, and what has no table."""
    machine = record["machine"]
    load = ", ".join(f"{value:.2f}" for value in (machine["load_before"][0], machine["load_after"][0]))
    yield (
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, load before and "
        f"after {load}; torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}"
    )
    if machine["load_before"][0] > machine["cores"] / 2:
        yield (
            "The machine was busy before it began: ratios suffer less than times, but measure again when it is idle "
            "(OMP_WAIT_POLICY=passive keeps waiting threads from spinning)"
        )
    if "kmeans" in record:
        found = record["kmeans"]
        yield (
            f"Centers from {found['tokens']:,} tokens: {found['total_seconds']:.2f} s for {found['blocks']} blocks, of "
            f"which k-means {found['seconds_per_block']:.3f} s a block"
        )
    for name, row in record.get("memory", {}).items():
        if record["settings"]["device"] == "cpu" and min(row["runs"]) <= max(row["before"]):
            yield (
                f"{name}: loading the model took more memory than the step, which its peak therefore does not show; "
                "raise --memory-batch"
            )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("candidate", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _times(title: str, rows: dict[str, Any]) -> Table:
    """Medians with quartiles; ratios with 95 % intervals."""
    speed = any("tokens_per_second" in row for row in rows.values())
    table = _table(title, "ms (quartiles)", *(["tokens/s"] if speed else []), "to floor (95 %)", "to peft-lora (95 %)")
    for name, row in rows.items():
        milliseconds = f"{1e3 * row['median']:.1f} [{1e3 * row['lower']:.1f}, {1e3 * row['upper']:.1f}]"
        tokens = [f"{row['tokens_per_second']:,.0f}"] if speed else []
        table.add_row(name, milliseconds, *tokens, _ratio(row.get("to_floor")), _ratio(row.get("to_peft_lora")))
    return table


def _ratio(found: dict[str, float] | None) -> str:
    return NONE if found is None else f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _bytes(title: str, rows: dict[str, Any]) -> Table:
    table = _table(title, "MB", "above the floor", "of what peft-lora adds")
    for name, row in rows.items():
        above, share = row.get("above_floor"), row.get("to_peft_lora")
        table.add_row(
            name,
            f"{row['bytes'] / MB:.2f}",
            NONE if above is None else f"{above / MB:.2f}",
            NONE if share is None else f"{share:.3f}",
        )
    return table


def _sizes(rows: dict[str, Any]) -> Table:
    table = _table("Parameters and files", "trainable", "total", "weights, MB", "adapter file, kB")
    for name, row in rows.items():
        file = NONE if row["adapter_bytes"] is None else f"{row['adapter_bytes'] / 1000:.1f}"
        table.add_row(name, f"{row['trainable']:,}", f"{row['total']:,}", f"{row['model_bytes'] / MB:.1f}", file)
    return table
