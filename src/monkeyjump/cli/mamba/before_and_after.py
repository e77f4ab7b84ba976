"""The table that `adapt` and `shrink` end with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from monkeyjump.cli.screen import Screen, duration

WHEN = ("before", "after")


def show_before_and_after(folder: Path, screen: Screen) -> None:
    from monkeyjump.training.folder import RESULT, read_json

    result = read_json(folder / RESULT)
    held, speed, score = result["held_out"], result["latency"], result["efficiency"]
    table = Table("", *WHEN, title_justify="left")
    table.add_row("parameters", f"{result['parameters_before']:,}", f"{result['parameters']:,}")
    table.add_row("perplexity per token", *(f"{held[when]['perplexity']:.3f}" for when in WHEN))
    table.add_row("latency, ms", *(f"{speed[when]['ms']:.1f}" for when in WHEN))
    table.add_row("memory of a pass, MiB", *(f"{result['forward_peak_bytes'][when] / 2**20:.1f}" for when in WHEN))
    table.add_row("FLOPs per token", *(f"{score[when]['flops_per_token']:.3g}" for when in WHEN))
    table.add_row("next-token accuracy", *(f"{score[when]['accuracy']:.2%}" for when in WHEN))
    table.add_row("efficiency, log E", *(_log_efficiency(score[when]) for when in WHEN))
    screen.out.print(table)
    for line in _lines(result):
        screen.say(line)
    screen.say(f"{folder}: done. Next: monkeyjump mamba perplexity {folder} TEXT")


def _log_efficiency(score: dict[str, Any]) -> str:
    """JSON has no infinity: of an accuracy of 0 it holds null."""
    value = score["log_efficiency"]
    return "-inf" if value is None else f"{value:.2f}"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    speed = result["latency"]
    after = speed["after"]
    yield f"the model after: {after['speed']:.2f} x as fast [{after['low']:.2f}, {after['high']:.2f}]"
    if "order alone" in speed:
        alone = speed["order alone"]
        yield (
            f"latency without the order {speed['before']['ms']:.1f} ms, with it {alone['ms']:.1f} ms: "
            f"{alone['speed']:.2f} x as fast [{alone['low']:.2f}, {alone['high']:.2f}]"
        )
    if (cost := result.get("path_cost")) is not None:
        yield f"path cost {cost['before']:.1f} -> {cost['after']:.1f} ({cost['reduction']:.1%} less)"
    if "sparsity" in result:
        target = result.get("target_sparsity")
        yield f"average sparsity {result['sparsity']:.3f}" + ("" if target is None else f", target {target}")
        yield "by block: " + _shortened([f"{share:.2f}" for share in result["sparsity_by_block"].values()])
    if "information_preservation" in result:
        kept = result["information_preservation"]
        yield f"information preservation {kept:.3f}: cosine of hidden states with and without masks"
    if "parameter_reduction" in result:
        yield (
            f"trained {result['trainable_parameters']:,} parameters, {result['parameter_reduction']:.2%} fewer than "
            f"full fine-tuning"
        )
    if (training := result.get("training")) is not None:
        yield from _training(training)


def _shortened(words: list[str], most: int = 12) -> str:
    more = f" and {len(words) - most} more blocks" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _training(training: dict[str, Any]) -> Iterator[str]:
    speed = ""
    if training["epoch_seconds"] is not None:
        speed = f", {duration(training['epoch_seconds'])} for an epoch"
    yield f"training: peak memory of the process {training['process_peak_bytes'] / 2**20:.0f} MiB{speed}"
    if training["target_loss"] is not None:
        reached = training["steps_to_target_loss"]
        yield f"loss below {training['target_loss']}: " + ("not reached" if reached is None else f"at step {reached}")
