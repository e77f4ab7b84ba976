"""What a benchmark measures, and what of it a person can get wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monkeyjump.methods import METHODS
from monkeyjump.tasks.errors import InputError, near_miss

FLOOR, REFERENCE, MONKEY_JUMP = "floor", "peft-lora", "mj-lora"
CANDIDATES = (FLOOR, REFERENCE, "peft-adalora", MONKEY_JUMP, "mj-lora-fa", "mj-adalora", "mj-propulsion")
PEFTS_OWN = {"peft-lora": "lora", "peft-adalora": "adalora"}  # candidate -> method
ALL = (FLOOR, *PEFTS_OWN, *(name for name in METHODS if name not in PEFTS_OWN.values()))
FIGURE2 = (FLOOR, REFERENCE, "mixlora", "hydralora", "moelora", "moe-lora-fa", "moe-adalora", "mj-lora", "mj-adalora",
           "mj-lora-fa", "mj-propulsion")  # fmt: skip
SECTIONS = ("step", "inference", "saved", "memory", "size", "kmeans")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
PRESETS: dict[str, dict[str, Any]] = {"fig2": {"batch": 8, "accumulation": 2, "memory_batch": 8, "candidates": FIGURE2}}


@dataclass(frozen=True)
class Shape:
    """A Llama-like model with random weights, for where no model is given."""

    hidden_size: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 8
    intermediate_size: int = 1408
    vocab_size: int = 1024


@dataclass(frozen=True)
class Settings:
    """One benchmark.

    Attributes:
        model: Hub id or folder; None: `shape` with random weights.
        batch, length: rows and tokens a row of a training step and of a forward pass.
        accumulation: training steps per optimizer step; only enters the training minutes.
        dtype: of the base model; adapters are float32.
        experts, top_k: of the mixtures (MoLA: `experts` on average; MoRE: one LoRA with as many ranks as all
            experts have); `top_k` also of Monkey Jump, and not of HydraLoRA, which mixes all.
        pairs: rounds, each with one pass of every candidate.
        optimizer: let AdamW step inside the timed training step.
        input_gradients: let gradients flow down to the embeddings in every candidate, as gradient
            checkpointing does, and not in the floor alone. Without it the floor keeps one normalization
            (of the first block) for its backward pass that the adapted models do not need.
        decode_tokens: tokens decoded one by one in a round.
        memory_batch, memory_runs: rows of the step whose peak is measured, and processes per candidate.
        center_tokens: states that k-means works on.
        steps: optimizer steps that the training minutes are stated for.
        threads: of torch; None: as torch chose.
    """

    model: str | None = None
    shape: Shape = Shape()
    batch: int = 4
    length: int = 256
    accumulation: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    rank: int = 2
    alpha: float = 5.0
    dropout: float = 0.0
    experts: int = 4
    top_k: int = 2
    targets: tuple[str, ...] = TARGETS
    pairs: int = 20
    warmup: int = 2
    optimizer: bool = False
    input_gradients: bool = False
    decode_tokens: int = 16
    memory_batch: int = 8
    memory_runs: int = 1
    center_tokens: int = 10_000
    steps: int = 1000
    seed: int = 0
    threads: int | None = None
    candidates: tuple[str, ...] = CANDIDATES
    only: tuple[str, ...] = SECTIONS

    @property
    def positions(self) -> int:
        """Positions that the longest sequence of any pass takes."""
        return self.length + self.decode_tokens


_AT_LEAST_ONE = (
    "batch",
    "accumulation",
    "rank",
    "experts",
    "top_k",
    "warmup",
    "decode_tokens",
    "memory_batch",
    "memory_runs",
    "center_tokens",
    "steps",
)


def check(settings: Settings) -> None:
    """Raises InputError, naming option, value and remedy, for what cannot be measured."""
    for name in _AT_LEAST_ONE:
        _at_least(name, getattr(settings, name), 1)
    for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size"):
        _at_least(name, getattr(settings.shape, name), 1)
    _at_least("vocab_size", settings.shape.vocab_size, 2)
    _at_least("length", settings.length, 2)  # one token predicts the next
    _at_least("pairs", settings.pairs, 2)  # an interval needs two
    _at_least("seed", settings.seed, 0)
    if settings.threads is not None:
        _at_least("threads", settings.threads, 1)
    if settings.top_k > settings.experts:
        raise InputError(
            f"--top-k: {settings.top_k} is more than --experts {settings.experts}", hint=f"{settings.experts} at most"
        )
    if not 0 <= settings.dropout < 1:
        raise InputError(f"--dropout: {settings.dropout} is out of range", hint="a number in [0, 1)")
    if not settings.alpha > 0:
        raise InputError(f"--alpha: {settings.alpha} is out of range", hint="a number above 0")
    _names("candidates", settings.candidates, ALL)
    _names("only", settings.only, SECTIONS)
    if not settings.targets:
        raise InputError("--targets: no module is named", hint=f"such as --targets {','.join(TARGETS)}")
    if settings.model is None:
        _check_heads(settings.shape)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(
            f"--{name.replace('_', '-')}: {value} is below {least}", hint=f"any whole number from {least} on"
        )


def _names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given:
        raise InputError(f"--{option}: nothing is named", hint=f"choose among {', '.join(known)}")
    for name in given:
        if name not in known:
            raise InputError(f"--{option}: '{name}' is not known", hint=near_miss(name, known, option))
        if given.count(name) > 1:
            raise InputError(f"--{option}: '{name}' is given twice", hint="name each once")


def _check_heads(shape: Shape) -> None:
    if shape.hidden_size % shape.heads:
        raise InputError(
            f"--heads: {shape.heads} does not divide --hidden-size {shape.hidden_size}",
            hint="the hidden size is split evenly among the heads",
        )
    if shape.hidden_size // shape.heads % 2:
        raise InputError(
            f"--heads: {shape.heads} leaves an odd head size of {shape.hidden_size // shape.heads}",
            hint="rotary positions need an even one",
        )
    if shape.heads % shape.kv_heads:
        raise InputError(
            f"--kv-heads: {shape.kv_heads} does not divide --heads {shape.heads}", hint="such as one for every 4 heads"
        )
