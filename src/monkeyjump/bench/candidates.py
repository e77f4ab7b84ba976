"""The candidates: a name -> a model with the adapters of that name, all over the same frozen weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from monkeyjump import CenterUpdate, MonkeyJumpConfig
from monkeyjump.bench.settings import FLOOR, PEFTS_OWN, Settings
from monkeyjump.methods import method
from monkeyjump.moe import MoETuner, RankUpdate
from monkeyjump.tasks.errors import InputError, near_miss

# AdaLoRA wants to know how long training is; a benchmark must not come to the end of it
TOTAL_STEPS = 1_000_000
TASKS = 4  # of MoRE; the rows of a batch take turns


@dataclass
class Candidate:
    """A model ready to train, and the optimizer of its adapters (None for the floor, which has none)."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer | None


def load_base(settings: Settings) -> Any:
    """The frozen base model, in its dtype and on its device."""
    torch.manual_seed(settings.seed)
    dtype = getattr(torch, settings.dtype)
    if settings.model is None:
        model = AutoModelForCausalLM.from_config(_llama_config(settings), dtype=dtype)
    else:
        model = _load(settings.model, dtype)
        _check_positions(model.config, settings)
    return model.requires_grad_(False).to(settings.device)


def _llama_config(settings: Settings) -> LlamaConfig:
    shape = settings.shape
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(512, settings.positions),
        bos_token_id=None,
        eos_token_id=None,
    )


def _load(name: str, dtype: torch.dtype) -> Any:
    try:
        config = AutoConfig.from_pretrained(name)
        if _is_config_only(name):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model: '{name}' cannot be read: {str(error).splitlines()[0]}",
            hint="give a folder with config.json (and safetensors weights, else they are random), a Hub id, or nothing",
        ) from error


def _is_config_only(name: str) -> bool:
    """Whether `name` is a config file, or a folder with one and no weights: they are drawn at random then."""
    path = Path(name)
    return path.is_file() or (path.is_dir() and not any(path.glob("*.safetensors*")))


def _check_positions(config: Any, settings: Settings) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)  # models without positions have none
    if most is not None and settings.positions > most:
        raise InputError(
            f"--length: {settings.length} and {settings.decode_tokens} decoded tokens are more than the model's {most}",
            hint=f"--length {most - settings.decode_tokens} at most",
        )


def check_targets(base: nn.Module, targets: tuple[str, ...]) -> None:
    """Raises InputError for a target that is no linear layer of the model."""
    found = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for target in targets:
        if target not in found:
            raise InputError(
                f"--targets: the model has no linear layer '{target}'",
                hint=near_miss(target, found, "its linear layers"),
            )


def build(name: str, base: nn.Module, settings: Settings, center_init: str = "random") -> Candidate:
    """The candidate `name` over the weights of `base`, which it shares and does not change.

    Args:
        center_init: of the routed candidates.
    """
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    torch.manual_seed(settings.seed)
    if name == FLOOR or settings.input_gradients:
        model.enable_input_require_grads()  # type: ignore[operator]
    if name == FLOOR:
        return Candidate(name, model.train(), None)
    try:
        model = get_peft_model(model, _config(name, settings, center_init))
    except ValueError as error:
        raise InputError(f"{name} cannot be built: {error}", hint="change --targets, --rank or --candidates") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Candidate(name, model.train(), _optimizer(model, settings))


def _optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; a routed model's centers follow its steps, and its routers gather for them in every pass."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    config, tuner = model.peft_config["default"], model.base_model
    if isinstance(config, MonkeyJumpConfig):
        CenterUpdate(every=2, until=TOTAL_STEPS).attach(model, optimizer, total_steps=TOTAL_STEPS)
    elif isinstance(config, AdaLoraConfig):
        optimizer.register_step_post_hook(_rank_schedule(model))
    elif isinstance(tuner, MoETuner) and tuner.rankallocator is not None:
        RankUpdate().attach(model, optimizer)
    return optimizer


def _rank_schedule(model: Any) -> Callable[..., None]:
    """AdaLoRA's allocation after every step, as PEFT asks a training loop to call it."""
    done = 0

    def after_step(*_: Any) -> None:
        nonlocal done
        done += 1
        model.base_model.update_and_allocate(done)

    return after_step


def _config(name: str, settings: Settings, center_init: str) -> PeftConfig:
    row = method(PEFTS_OWN.get(name, name))
    fields: dict[str, Any] = {
        "target_modules": list(settings.targets),
        "r": settings.rank,
        "target_r": settings.rank,
        "init_r": math.ceil(1.5 * settings.rank),  # AdaLoRA's ranks start above the one that they end with
        "total_step": TOTAL_STEPS,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "num_experts": _experts_of_layers(settings.experts) if row.base == "mola" else settings.experts,
        "num_tasks": TASKS,
        "center_init": center_init,
    }
    if row.base == "more":  # its experts are the ranks of one LoRA: as many as those of N experts
        fields["r"] *= settings.experts
    if row.base != "hydralora":  # it is defined as a mixture of all its heads
        fields["top_k"] = settings.top_k
    return row.config(**fields)


def _experts_of_layers(mean: int) -> list[int]:
    """MoLA's four groups of layers with `mean` experts on average: 1, 3, 5, 7 for 4."""
    spread = min(3, mean - 1)
    return [mean - spread, mean - spread // 3, mean + spread // 3, mean + spread]
