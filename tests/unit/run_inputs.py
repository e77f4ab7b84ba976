"""A folder with a tiny model, two tasks and the YAML file of a run over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small_inputs import rows, save_model, write_task

RUN = """
model: {path: model}
method: {r: 2, centers: {max_tokens: 500}}
data: {tasks: [films.yaml, food.yaml], size: small}
train: {batch_size: 4, epochs: 2, learning_rate: 1e-2, log_every: 1, save_every: 5, keep: 4, routing_every: 4}
output: {folder: out}
"""


def write_run_inputs(folder: Path, run: str = RUN) -> Path:
    """Returns the path of run.yaml: 2 tasks x 16 training rows, 16 steps, checkpoints at 5, 10, 15 and 16."""
    save_model(folder / "model")
    write_task(folder, "films")
    write_task(folder, "food", [{**row, "sentence": str(row["sentence"]).replace("film", "food")} for row in rows()])
    path = folder / "run.yaml"
    path.write_text(run, encoding="utf-8")
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in line.items() if k not in timed and "per_second" not in k} for line in lines]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
