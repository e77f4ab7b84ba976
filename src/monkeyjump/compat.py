"""The entry points of the authors' README, as thin wrappers. docs/compat.md lists old names and new.

    model = apply_monkeyjump(model, blocks={"LlamaDecoderLayer": list(range(32))}, linears=[...])
    trainer = MonkeyTrainer(model=model, args=args, train_dataset=data, step_interval=2)
    init_router_centers(trainer)        # the README asks for it before the trainer that it takes
    trainer.train()

Defaults are those of the README (preset `readme`). What was a fault there is not brought back: padding
never counts, gates carry no gradient, centers are saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.presets import PRESETS
from monkeyjump.suggest import did_you_mean
from monkeyjump.tuner.callback import CenterUpdate
from monkeyjump.tuner.initialize import Initialization, initialize_centers
from monkeyjump.tuner.model import routers


def apply_monkeyjump(
    model: nn.Module,
    blocks: dict[str, Sequence[int]],
    linears: Sequence[str],
    shared_expert: Sequence[str] = (),
    rank: int = 2,
    alpha: float = 16.0,
    temperature: float = 1.0,
    ema_momentum: float = 0.9,
    top_k: int = 2,
    rep_mode: str = "token",
    jitter_noise: float = 0.1,
) -> PeftModel:
    """Adapt and route the given blocks; `linears` are routed in this order, `shared_expert` always on.

    Raises:
        ValueError: `blocks` names a class that the model does not have, or several of them.
    """
    classes = {type(module).__name__ for module in model.modules()}
    for name in blocks:
        if name not in classes:
            raise ValueError(f"blocks names {name!r}: {did_you_mean(name, classes)}it is no class of this model")
    if len(blocks) != 1:
        raise ValueError(f"blocks={sorted(blocks)} has to name one class; use MonkeyJumpConfig for several towers")
    layers = list(next(iter(blocks.values())))
    config = MonkeyJumpConfig.from_preset(
        "readme",
        r=rank,
        lora_alpha=alpha,
        target_modules=[*linears, *shared_expert],
        shared_modules=list(shared_expert),
        expert_order=list(linears),
        layers_to_transform=layers,
        layers_to_route=layers,
        temperature=temperature,
        ema_momentum=ema_momentum,
        top_k=top_k,
        granularity=rep_mode,
        jitter_noise=jitter_noise,
    )
    return get_peft_model(model, config)


def init_router_centers(
    trainer: Trainer,
    subset_size: int = 4000,
    kmeans_iters: int = 15,
    rep_mode: str | None = None,
    seed: int = 0,
) -> Initialization:
    """Fit the centers to `subset_size` rows of the trainer's training data.

    Raises:
        ValueError: `rep_mode` is not the model's own; centers of another granularity would not fit it.
    """
    modes = {config.granularity for router in routers(trainer.model) for config in router.configs.values()}
    if rep_mode is not None and rep_mode not in modes:
        raise ValueError(f"rep_mode={rep_mode!r} is not the model's ({', '.join(modes)}); leave it out")
    settings: dict[str, Any] = {**PRESETS["readme"].initialize_centers, "max_samples": subset_size}
    settings["iterations"] = kmeans_iters
    return initialize_centers(trainer.model, trainer.get_train_dataloader(), seed=seed, **settings)


class MonkeyTrainer(Trainer):
    """`Trainer` with a `CenterUpdate(every=step_interval, until=stop_update_step)`."""

    def __init__(self, *args: Any, step_interval: int = 2, stop_update_step: int = 3000, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(CenterUpdate(every=step_interval, until=stop_update_step))
