"""What is logged when an adapter has been routed."""

from __future__ import annotations

import logging

from torch import nn

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.tuner.architectures import FUSED, expert_parameters, language_tower
from monkeyjump.tuner.router import Router

logger = logging.getLogger("monkeyjump")


def announce(model: nn.Module, mine: list[Router], adapter: str, config: MonkeyJumpConfig) -> None:
    """Say per block what is routed, and once what is out of the ordinary.

    Args:
        mine: the routers of `adapter`.
    """
    for router in mine:
        logger.info("%s: routed %s", router.name, ", ".join(router.slots[adapter]))
    _announce_architecture(model, mine, adapter, config)
    if config.granularity == "task":
        return
    few = [r.name for r in mine if len(r.slots[adapter]) < config.top_k]
    if few:
        logger.warning("fewer than top_k=%d routed adapters, so all act, in: %s", config.top_k, ", ".join(few))
    uneven = {len(r.slots[adapter]) for r in mine}
    if len(uneven) > 1:
        logger.warning("the number of routed adapters differs between blocks: %s", sorted(uneven))
    decoder = config.task_type == "CAUSAL_LM" or type(model).__name__.endswith("ForCausalLM")
    if decoder and config.granularity in ("last", "mean", "max"):
        logger.warning(
            "granularity=%r sees the answer in training, which generation does not have; 'prompt_end' "
            "decides on what both have",
            config.granularity,
        )


def _announce_architecture(model: nn.Module, mine: list[Router], adapter: str, config: MonkeyJumpConfig) -> None:
    """What of this architecture is routed otherwise than its names suggest."""
    fused = {slot for r in mine for slot in r.slots[adapter] if slot.rpartition(".")[2] in FUSED}
    if fused:
        logger.warning("fused projections are one slot, switched as a whole for a token: %s", ", ".join(sorted(fused)))
    experts = [f"{r.name}.{name}" for r in mine for name in expert_parameters(model.get_submodule(r.name))]
    if experts and not getattr(config, "target_parameters", None):
        logger.warning(
            "the experts of this model are parameters (%s, ...) and no modules: they get no adapter and no routing, "
            "only the modules around them do; target_parameters adapts them without routing",
            experts[0],
        )
    tower = language_tower(model)
    outside = sorted({r.name.partition(".layers.")[0] for r in mine if tower and not r.name.startswith(tower + ".")})
    if outside:
        logger.warning(
            "target_modules reaches beyond the language model %s: %s; exclude_modules as a regex keeps that as it is",
            tower,
            ", ".join(outside),
        )
