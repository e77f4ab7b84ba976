"""One run as one YAML file: five sections, each field with its range and one line of help.

    model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
    method: {base: lora, r: 8, top_k: 2, centers: {max_tokens: 50000}}
    data: {tasks: [tweets, my-task.yaml, {name: mine, source: {kind: files, train: rows.jsonl}}]}
    train: {epochs: 2, learning_rate: 2e-4}
    output: {folder: runs/mine}

`method` also takes every field of `MonkeyJumpConfig` and of the PEFT method in `base`. Reading a file, with
presets and dotted overrides, is in `read.py`; what an unknown key is told is there as well.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from monkeyjump.presets import PRESETS
from monkeyjump.suggest import check_choice
from monkeyjump.tasks.description import Task
from monkeyjump.tasks.loading import SizeName
from monkeyjump.training.adapters import adapter_fields, check_method, routed_unless_told
from monkeyjump.training.arguments import check_arguments
from monkeyjump.training.problems import explain

DType = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this, `epochs: true` would mean one epoch."""
        kinds = typing.get_args(cls.model_fields[info.field_name or ""].annotation) or (
            cls.model_fields[info.field_name or ""].annotation,
        )
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("a number is needed, not a truth value")
        return value


class Model(Section):
    """The frozen base model."""

    path: str = Field(min_length=1, description="folder, Hub id, or 'demo' (SmolLM2-135M-Instruct)")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub")
    dtype: DType = Field(default="auto", description="of the frozen weights; auto: as they were saved")
    attention: str | None = Field(default=None, description="attn_implementation of transformers: eager, sdpa, ...")

    @field_validator("path")
    @classmethod
    def _from_the_files_folder(cls, path: str, info: ValidationInfo) -> str:
        found = (info.context or {}).get("folder", Path()) / path
        return str(found) if found.exists() else path


class Centers(Section):
    """How the centers start, and when they move."""

    max_tokens: int | None = Field(default=50_000, ge=1, description="tokens that k-means sees")
    max_samples: int | None = Field(default=None, ge=1, description="rows that k-means sees; null: no limit")
    iterations: int = Field(default=50, ge=1, description="of k-means")
    restarts: int = Field(default=4, ge=1, description="of k-means; the best one is kept")
    seed: int = Field(default=0, ge=0, description="of k-means and of the rows it sees")
    every: int = Field(default=2, ge=1, description="optimizer steps from one move of the centers to the next")
    until: int | float = Field(default=0.6, description="last step with a move: a step, or a share of all in (0, 1]")

    @field_validator("until")
    @classmethod
    def _a_step_or_a_share(cls, until: int | float) -> int | float:
        if isinstance(until, float) and not 0 < until <= 1:
            raise ValueError("use a number of steps, or a share of them in (0, 1]")
        if until < 0:
            raise ValueError("use a number of steps from 0 on, or a share of them in (0, 1]")
        return until


class Method(BaseModel):
    """The adapter. Beside these fields it takes those of MonkeyJumpConfig and of the PEFT method."""

    model_config = ConfigDict(extra="allow", frozen=True)

    base: str = Field(default="lora", description="PEFT method by name: lora, lora_fa, ..., or a mixture: moelora, ...")
    routed: bool = Field(
        default=True,
        description="false: the same PEFT method without routing, for comparison; always so for mixtures of experts",
    )
    preset: str = Field(default="recommended", description="defaults of the fields: " + ", ".join(PRESETS))
    centers: Centers = Field(default=Centers(), description="start and movement of the routing centers")

    @property
    def options(self) -> dict[str, Any]:
        """The fields that go to the adapter's own config."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _mixtures_have_routers_of_their_own(cls, given: Any) -> Any:
        return {"routed": routed_unless_told(given.get("base", "lora")), **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _known_to_the_adapter(self) -> Method:
        try:
            check_method(self.base, self.routed, self.preset, self.options)
        except TypeError as error:  # PEFT's configs look at values without checking their types
            raise ValueError(str(error)) from None
        return self


class Data(Section):
    """What is learned. Rows of all tasks are mixed; each keeps its name in every table."""

    tasks: list[str | Task] = Field(description="names of the catalog, YAML files, or task descriptions in place")
    size: SizeName = Field(default="full", description="which of the sizes that a task states")
    seed: int = Field(default=0, ge=0, description="sampling of rows; the same for runs that are to be compared")
    max_length: int = Field(default=1024, ge=2, description="tokens of a row; its texts are cut to fit")
    cap: int | None = Field(default=None, ge=1, description="at most so many training rows of each task")
    weights: dict[str, float] = Field(default={}, description="task: how often it comes, for all tasks")
    temperature: float | None = Field(
        default=None, gt=0, description="tasks come in proportion to size ** (1 / temperature); null: rows as they are"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _described_in_place(cls, tasks: Any, info: ValidationInfo) -> Any:
        if not isinstance(tasks, list):
            raise ValueError("a list is needed, such as [tweets, my-task.yaml]")
        if not tasks:
            raise ValueError("no data: name at least one task")
        folder = (info.context or {}).get("folder", Path())
        found: list[Any] = []
        for number, task in enumerate(tasks):
            if isinstance(task, dict):
                try:
                    found.append(Task.model_validate(task, context={"folder": folder.resolve()}))
                except ValidationError as error:
                    texts = [text for text, _ in explain(error, Task.model_fields)]
                    raise ValueError(f"tasks.{number}: {'; '.join(texts)}") from None
            elif isinstance(task, str) and task.endswith((".yaml", ".yml")):
                found.append(str(folder / task))
            else:
                found.append(task)
        return found

    @model_validator(mode="after")
    def _one_way_to_mix(self) -> Data:
        if self.weights and self.temperature is not None:
            raise ValueError("weights and temperature both say how often a task comes; give one of the two")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights must be above 0; to leave a task out, take it off tasks")
        return self


class Train(Section):
    """The stock transformers Trainer's loop."""

    batch_size: int = Field(default=8, ge=1, description="rows per forward pass and process")
    accumulation: int = Field(default=1, ge=1, description="forward passes per optimizer step")
    epochs: float = Field(default=1, gt=0, description="passes over the rows")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: as epochs says")
    learning_rate: float = Field(default=2e-4, gt=0, description="the highest one")
    scheduler: str = Field(default="linear", description="of the learning rate, by transformers' name")
    warmup: float = Field(default=0.1, ge=0, description="steps of rising learning rate; below 1: a share of all")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are clipped to it")
    optimizer: str = Field(default="adamw_torch", description="by transformers' name")
    precision: Literal["none", "bf16", "fp16"] = Field(default="none", description="autocast of the forward pass")
    gradient_checkpointing: bool = Field(default=False, description="less memory for more time")
    seed: int = Field(default=0, ge=0, description="adapter weights, order of the rows, dropout")
    log_every: int = Field(default=10, ge=1, description="optimizer steps from one line of metrics to the next")
    routing_every: int = Field(default=50, ge=0, description="optimizer steps between routing statistics; 0: none")
    routing_rows: int = Field(default=32, ge=1, description="rows of the fixed batch that they are taken on")
    save_every: int = Field(default=200, ge=1, description="optimizer steps from one checkpoint to the next")
    keep: int = Field(default=2, ge=1, description="complete checkpoints that stay")
    stop_after: int = Field(default=3, ge=1, description="steps in a row without a finite gradient that end the run")
    report_to: list[str] = Field(default=[], description="trackers of transformers: tensorboard, wandb, trackio, ...")
    arguments: dict[str, Any] = Field(default={}, description="any other argument of transformers' TrainingArguments")

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        check_choice("scheduler", name, [kind.value for kind in SchedulerType])
        return name

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        check_choice("optimizer", name, [kind.value for kind in OptimizerNames])
        return name

    @field_validator("arguments")
    @classmethod
    def _known_and_not_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        check_arguments(arguments)
        return arguments


class Output(Section):
    """Where everything goes."""

    folder: Path = Field(description="the run's folder; later commands need nothing else")


class RunConfig(Section):
    """One run."""

    model: Model
    method: Method = Method()
    data: Data
    train: Train = Train()
    output: Output


def absolute(config: RunConfig) -> RunConfig:
    """The same run, whatever folder a later command is started in."""
    model = {"path": str(Path(config.model.path).resolve())} if Path(config.model.path).exists() else {}
    tasks = [str(Path(t).resolve()) if isinstance(t, str) and Path(t).is_file() else t for t in config.data.tasks]
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update={"tasks": tasks}),
        }
    )


SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model, "method": Method, "data": Data, "train": Train, "output": Output
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run's file, with the adapter's fields for `base: lora`."""
    schema = RunConfig.model_json_schema()
    method = schema["$defs"]["Method"]["properties"]
    for name, (_, text) in adapter_fields("lora", routed=True).items():
        method.setdefault(name, {"description": text, "title": name})
    return schema
