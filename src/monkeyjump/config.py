"""`MonkeyJumpConfig`: how a block's adapters are routed, on top of any PEFT method's own config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig

from monkeyjump.presets import PRESETS
from monkeyjump.routing.ema import EmaAssignment, EmaSpace
from monkeyjump.routing.gates import GateNorm, Similarity
from monkeyjump.routing.pooling import Granularity
from monkeyjump.suggest import check_choice, check_fields

CenterInit = Literal["kmeans", "random", "random_normalized", "random_tokens", "trainable"]
CHOICES: dict[str, tuple[str, ...]] = {
    "granularity": get_args(Granularity),
    "similarity": get_args(Similarity),
    "gate_norm": get_args(GateNorm),
    "ema_assignment": get_args(EmaAssignment),
    "ema_space": get_args(EmaSpace),
    "center_init": get_args(CenterInit),
}


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class MonkeyJumpConfig(PeftConfig):
    """Route each token to the top-k of the adapters that a block already has.

    `MonkeyJumpConfig(base="lora", r=8, target_modules=[...])` returns an instance of a generated
    class that is both this and the base method's config (`LoraConfig`), so that every field of the
    base method passes through. `base` is any PEFT method by name ("lora", "lora_fa", "adalora",
    "propulsion", "ia3", "vera", "loha", ...).

    Raises:
        TypeError: an unknown field; the message lists the near misses.
        ValueError: a value outside its range; the message names field, value and remedy.
    """

    base: str = _field("lora", "PEFT method whose adapters are routed.")
    shared_modules: list[str] | str | None = _field(
        None,
        "Targets that act on every token, by name or regex. None: the attention output and the gate "
        "projection where targeted, as long as something stays routed. []: none.",
    )
    layers_to_route: list[int] | int | None = _field(None, "Blocks with routing, by index; None: all.")
    expert_order: list[str] | Literal["targets"] | None = _field(
        None,
        "Which routed slot takes which center: names in order. None: the order in which the block defines "
        "its modules. 'targets': the order of target_modules.",
    )
    granularity: Granularity = _field("token", "What one routing decision is for: " + ", ".join(CHOICES["granularity"]))
    similarity: Similarity = _field(
        "cosine",
        "Score of a hidden state against a center. The others than cosine see raw states, and a "
        "temperature that suits cosine does not suit them.",
    )
    top_k: int = _field(2, "Routed adapters that act on a token.")
    temperature: float = _field(1.0, "tau: logits are divided by it before the softmax.")
    gate_norm: GateNorm = _field("k", "What the chosen gates sum to: k, one, or none (Eq. 4 as written).")
    jitter_noise: float = _field(0.0, "j: in training, logits times a factor uniform in [1 - j, 1 + j].")
    ema_momentum: float = _field(0.5, "beta of the centers' moving average.")
    ema_assignment: EmaAssignment = _field("topk", "Tokens that move a center: all routed to it (topk), or top1.")
    ema_space: EmaSpace | None = _field(
        None, "sphere, raw or mixed; None: sphere for cosine, raw for the other similarities."
    )
    center_init: CenterInit = _field("kmeans", "Start of the centers: " + ", ".join(CHOICES["center_init"]))
    center_seed: int = _field(0, "Seed of the random starts.")
    num_centers: int | None = _field(
        None, "Fewer centers than routed adapters: adapter e takes center e mod this. None: one each."
    )
    task_experts: dict[int, list[str]] | None = _field(
        None, "granularity='task': slots of each task id. None: the slot with number id mod E."
    )
    base_fingerprint: dict[str, list[float]] | None = _field(
        None, "Sampled weights of the base model, written when saving and compared when loading."
    )

    default_of_lora: ClassVar[dict[str, Any]] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}

    def __new__(cls, *args: Any, **kwargs: Any) -> MonkeyJumpConfig:
        if cls is MonkeyJumpConfig:
            from monkeyjump.tuner.registry import config_class  # the generated classes derive from this one

            cls = config_class(kwargs.get("base", "lora"))
        check_fields(cls, kwargs, f"MonkeyJumpConfig(base={kwargs.get('base', 'lora')!r})")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if self.expert_order == "targets":
            self.expert_order = _target_order(self)
        if isinstance(self.expert_order, str):
            raise ValueError(f"expert_order={self.expert_order!r} is out of range: use a list of names, or 'targets'")
        super().__post_init__()
        if self.ema_space is None:
            self.ema_space = "sphere" if self.similarity == "cosine" else "raw"
        if self.task_experts is not None:
            self.task_experts = _task_experts(self.task_experts)
        self._check()

    def _check(self) -> None:
        for name, options in CHOICES.items():
            check_choice(name, getattr(self, name), options)
        _check_layers(self.layers_to_route)
        check_integer("top_k", self.top_k, least=1)
        if self.num_centers is not None:
            check_integer("num_centers", self.num_centers, least=1)
        check_integer("center_seed", self.center_seed, least=0)
        check_number("temperature", self.temperature, "above 0", lambda v: v > 0)
        check_number("jitter_noise", self.jitter_noise, "in [0, 1)", lambda v: 0 <= v < 1)
        check_number("ema_momentum", self.ema_momentum, "in [0, 1]", lambda v: 0 <= v <= 1)
        if self.similarity != "cosine" and self.ema_space != "raw":
            raise ValueError(
                f"ema_space={self.ema_space!r} is out of range: similarity={self.similarity!r} needs 'raw'"
            )
        if self.task_experts is not None and self.granularity != "task":
            raise ValueError(
                f"task_experts is set but granularity={self.granularity!r} never reads it; use granularity='task'"
            )

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> MonkeyJumpConfig:
        """A named setting (`recommended`, `paper`, `released`, `readme`, `ablation`), overrides on top.

        The presets' schedules and k-means arguments are in `monkeyjump.PRESETS[name]`.
        """
        check_choice("preset", preset, PRESETS)
        from monkeyjump.tuner.registry import config_class

        takes = {f.name for f in dataclasses.fields(config_class(overrides.get("base", "lora")))}
        chosen = dict(PRESETS[preset].config)
        if "target_r" in takes and "r" in chosen:  # AdaLoRA starts above the rank that it ends with
            rank = chosen.pop("r")
            chosen |= {"target_r": rank, "init_r": math.ceil(1.5 * rank)}
        return cls(**{**{k: v for k, v in chosen.items() if k in takes}, **overrides})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the adapter's README the import that loading needs."""
        from monkeyjump.tuner.folder import note_import

        super().save_pretrained(save_directory, **kwargs)
        note_import(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """As PEFT's, after checking that a local adapter's weights are whole."""
        from monkeyjump.tuner.folder import check_weights

        check_weights(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


def _target_order(config: MonkeyJumpConfig) -> list[str]:
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, (list, tuple)):
        raise ValueError(
            f"expert_order='targets' needs target_modules as a list of names, but it is {targets!r}; name the "
            "order in expert_order itself"
        )
    return list(targets)


def _task_experts(given: Any) -> dict[int, list[str]]:
    """Task ids as integers again (JSON has no integer keys), each with a list of slots."""
    try:
        experts = {int(task): slots for task, slots in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"task_experts={given!r} is out of range: map task ids (integers) to lists of slots") from None
    for task, slots in experts.items():
        if not isinstance(slots, (list, tuple)) or not all(isinstance(slot, str) for slot in slots):
            raise ValueError(f"task_experts[{task}]={slots!r} is out of range: use a list of names")
    return {task: list(slots) for task, slots in experts.items()}


def _check_layers(layers: Any) -> None:
    for layer in [] if layers is None else [layers] if isinstance(layers, int) else layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layers_to_route={layers!r} is out of range: use block numbers from 0, or None for all")


def check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is out of range: use an integer of at least {least}")


def check_number(name: str, value: Any, range_: str, inside: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not inside(value):
        raise ValueError(f"{name}={value!r} is out of range: use a number {range_}")
