"""The columns of the paper's Figure 2 as bars, one panel a column. Needs matplotlib."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PANELS = {
    "trainable_k": "trainable parameters, K",
    "total_m": "all parameters, M",
    "model_mb": "weights, MB",
    "peak_memory_mb": "peak memory, MB",
    "it_per_s": "training, it/s",
    "train_minutes": "training, minutes",
    "inference_it_per_s": "inference, it/s",
}


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw(columns: dict[str, dict[str, float | None]], path: Path) -> bool:
    """Bars of every column that was measured, as a PNG; False where there is none to draw.

    Args:
        columns: `report.figure2`: candidate -> column -> value.
    """
    measured = [key for key in PANELS if any(row[key] is not None for row in columns.values())]
    if not measured:
        return False
    figure_class = import_module("matplotlib.figure").Figure  # no pyplot: no window system, no global state
    figure = figure_class(figsize=(2.6 * len(measured), 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured):
        _panel(axes, PANELS[key], {name: row[key] or 0.0 for name, row in columns.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _panel(axes: Any, title: str, values: dict[str, float]) -> None:
    bars = axes.bar(list(values), list(values.values()), color=[f"C{number}" for number in range(len(values))])
    axes.bar_label(bars, fmt=" {:.4g}", fontsize=7, rotation=90)
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.25)  # room for the numbers
