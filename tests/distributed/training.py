"""A run of the stock Trainer as a process of its own, started by the fork server or by torchrun; it may be killed.

torchrun --nproc_per_node 2 training.py '{"base": "lora", "folder": "..."}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from monkeyjump import CenterUpdate, initialize_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

STEPS = 6
DROPOUT = 0.05
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": DROPOUT},
    "lora_fa": {"lora_dropout": DROPOUT},
    "adalora": {"lora_dropout": DROPOUT, "init_r": 4, "target_r": 2, "total_step": STEPS, "tinit": 1, "tfinal": 1},
    "propulsion": {"init_weights": False},
}


@dataclass
class Run:
    """What a process is to do.

    Attributes:
        folder: checkpoints, and `result-<rank>.pt` at the end.
        resume: a checkpoint to go on from.
        stop_at: a step after which the process writes `stopped-<rank>` and waits to be killed.
        batch_size: rows of one rank and micro-batch.
    """

    base: str
    folder: str
    resume: str | None = None
    stop_at: int | None = None
    save_steps: int = 3
    batch_size: int = 2
    accumulation: int = 2
    dropout: bool = True
    checkpointing: bool = False


class StopHere(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.run.stop_at:
            (Path(self.run.folder) / f"stopped-{args.process_index}").touch()
            time.sleep(600)


def rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows of different lengths, the answer in their second half."""
    made = []
    for i, row in enumerate(tokens(count, 9).tolist()):
        row = row[: 9 - i % 3]
        made.append({"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]})
    return made


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def column(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (9 - len(row[name])) for row in batch])

    ids = column("input_ids", 0)
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": (ids != 0).long()}


def train(run: Run) -> dict[str, Any]:
    arguments = TrainingArguments(
        run.folder,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        gradient_checkpointing=run.checkpointing,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        save_steps=run.save_steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=11,
        ddp_find_unused_parameters=False,
    )
    config = {**ADAPTERS[run.base]}
    if not run.dropout:
        config.pop("lora_dropout", None)
    model = routed(llama(), base=run.base, task_type="CAUSAL_LM", center_init="kmeans", **config)
    initialize_centers(model, rows(), max_tokens=100, progress=False)
    update = CenterUpdate(every=2, until=5)
    trainer = Trainer(model, arguments, train_dataset=rows(), data_collator=padded, callbacks=[update, StopHere(run)])
    trainer.train(resume_from_checkpoint=run.resume)
    centers = {f"centers of {r.name}": r.centers["default"].clone() for r in routers(model)}
    logs = [
        {k: log[k] for k in ("step", "loss", "learning_rate", "grad_norm")} for log in trainer.state.log_history[:-1]
    ]
    ranks = getattr(model.peft_config["default"], "rank_pattern", None)
    state = {**{n: p.detach().clone() for n, p in trainable(model).items()}, **centers}
    return {"state": state, "logs": logs, "completed": update.completed, "ranks": ranks}


def main(run: Run, **environment: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    result = train(run)
    torch.save(result, Path(run.folder) / f"result-{os.environ.get('RANK', 0)}.pt")


def as_argument(run: Run) -> str:
    return json.dumps(asdict(run))


if __name__ == "__main__":
    main(Run(**json.loads(sys.argv[1])))
