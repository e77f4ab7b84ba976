"""The names and defaults of the adaptive Mamba: one config that pretraining and every later command read.

`mamba-readme` holds the values of the method's README (`TrainingConfig`). `laptop` is the default: the same model,
with what learned fastest in trials of a few minutes on two CPU cores (docs/mamba/pretraining.md).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.training.config import Section
from monkeyjump.training.problems import explain

LENGTHS = ("num_epochs", "minutes", "max_steps")  # three ways to say how long; exactly one is set


class Training(Section):
    """How a model is trained on text."""

    context_length: int = Field(default=512, ge=8, description="tokens of a training window")
    batch_size: int = Field(default=16, ge=1, description="windows per optimizer step")
    learning_rate: float = Field(default=1e-4, gt=0, description="the highest one, of AdamW")
    num_epochs: float | None = Field(
        default=10, gt=0, description="passes over the text; null: as minutes or max_steps"
    )
    minutes: float | None = Field(
        default=None, gt=0, description="as many steps as fit into it at the speed measured before the first one"
    )
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps")
    scheduler: str = Field(default="cosine", description="of the learning rate, by transformers' name")
    warmup: float = Field(default=0.05, ge=0, description="steps of rising learning rate; below 1: a share of all")
    weight_decay: float = Field(default=0.1, ge=0, description="of the matrices; never of A_log, D, norms and biases")
    beta2: float = Field(default=0.95, gt=0, lt=1, description="of AdamW")
    held_out: float = Field(default=0.05, gt=0, lt=1, description="share of the text kept for perplexity")
    seed: int = Field(default=0, ge=0, description="weights, windows, held-out documents")
    log_every: int = Field(default=10, ge=1, description="optimizer steps from one line of metrics to the next")
    evaluate_every: int = Field(default=200, ge=1, description="optimizer steps between held-out perplexities")
    save_every: int = Field(default=200, ge=1, description="optimizer steps from one checkpoint to the next")
    keep: int = Field(default=2, ge=1, description="complete checkpoints that stay")

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str) -> str:
        from transformers.trainer_utils import SchedulerType

        from monkeyjump.suggest import check_choice

        check_choice("scheduler", name, [kind.value for kind in SchedulerType])
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"{said} set: say how long with exactly one of {', '.join(LENGTHS)} (--steps)")
        return self


class Pretraining(Training):
    """A model and how it is pretrained."""

    d_model: int = Field(default=256, ge=8, description="width of the residual stream; the inner width is expand times")
    n_layers: int = Field(default=4, ge=1, description="Mamba blocks")
    state_size: int = Field(default=16, ge=1, description="states of each inner channel")
    expand: int = Field(default=2, ge=1, description="inner channels per residual channel")
    vocab_size: int = Field(default=1000, ge=260, description="tokens of the byte-level BPE, trained on the text")
    initializer_range: float = Field(default=0.1, gt=0, description="standard deviation of the initial weights")


class Adaptation(Section):
    """Channel order, masks and hybrid PEFT of the pretrained model."""

    order: bool = Field(default=True, description="fold an order of the channels into the weights")
    masks: bool = Field(default=True, description="learn which channels go, and shrink the model")
    adapters: bool = Field(default=True, description="train adapters alone, allocated by importance; else all weights")
    order_method: str = Field(default="correlation", description="importance, correlation, random or identity")
    calibration_batches: int = Field(default=8, ge=1, description="batches that orders and importance are measured on")
    gate_learning_rate: float = Field(default=0.1, gt=0, description="of the masks; a gate has several units to go")
    importance_threshold: float = Field(default=0.5, ge=0, le=1, description="share of the tuned modules with LoRA")
    peft_application_ratio: float = Field(default=0.3, gt=0, le=1, description="share of the modules that are tuned")
    peft_r: int = Field(default=16, ge=1, description="rank of LoRA")
    peft_alpha: float = Field(default=32, gt=0, description="scale of LoRA: peft_alpha / peft_r")
    peft_format: bool = Field(
        default=False, description="adapt only modules that PEFT's own format can hold (Mamba: in_proj, x_proj)"
    )
    target_loss: float | None = Field(
        default=None, gt=0, description="cross-entropy in training: the first logged step below it is reported"
    )
    masking_tau: float = Field(default=0.5, gt=0, description="temperature of the mask samples")
    target_sparsity: float = Field(default=0.3, ge=0, lt=1, description="share of the channels to be removed")
    sparsity_weight: float = Field(default=1e-5, ge=0, description="weight of |sparsity - target| in the loss")
    scan_update_frequency: int = Field(default=1000, ge=1, description="optimizer steps from one channel order on")

    @field_validator("order_method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        from monkeyjump.mamba.order.order import METHODS
        from monkeyjump.suggest import check_choice

        check_choice("order_method", name, METHODS)
        return name


class Adapting(Training, Adaptation):
    """How a pretrained model is adapted."""


class TrainingConfig(Pretraining, Adaptation):
    """All of it, under the README's names."""


# A preset is what it changes of the defaults, which are the README's.
PRESETS: dict[str, dict[str, Any]] = {
    "mamba-readme": {},
    "laptop": {
        "initializer_range": 0.02,
        "context_length": 256,
        "batch_size": 4,
        "learning_rate": 6e-3,
        "num_epochs": None,
        "minutes": 10,
        "order_method": "importance",
        "sparsity_weight": 10.0,
    },
}
DEFAULT_PRESET = "laptop"


def training_config(preset: str = DEFAULT_PRESET, **changes: Any) -> TrainingConfig:
    """The values of a preset with `changes`. A length among them takes the place of the preset's.

    Raises:
        InputError: an unknown preset or field, or a value out of range; names all of them.
    """
    return _checked(TrainingConfig, preset, changes)


def pretraining_config(preset: str = DEFAULT_PRESET, **changes: Any) -> Pretraining:
    """The part of `training_config` that pretraining reads; a field of another part is refused."""
    return _checked(Pretraining, preset, changes)


def adapting_config(preset: str = DEFAULT_PRESET, **changes: Any) -> Adapting:
    """The part of `training_config` that adapting reads; a field of another part is refused."""
    return _checked(Adapting, preset, changes)


def _checked(kind: Any, preset: str, changes: dict[str, Any]) -> Any:
    if preset not in PRESETS:
        raise InputError(f"preset: unknown preset '{preset}'", hint=near_miss(preset, PRESETS, "presets"))
    values = {name: value for name, value in PRESETS[preset].items() if name in kind.model_fields}
    if any(changes.get(name) is not None for name in LENGTHS):
        values |= dict.fromkeys(LENGTHS)
    try:
        return kind(**{**values, **changes})
    except ValidationError as error:
        problems = explain(error, kind.model_fields)
    hints = dict.fromkeys(hint for _, hint in problems if hint)
    raise InputError("; ".join(text for text, _ in problems), hint="; ".join(hints))
