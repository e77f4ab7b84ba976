"""MixLoRA: LoRA on the attention, experts that are whole feed-forward networks, one router per network.

The config, and the tuner that tells the two kinds of targets apart; the experts are in feed_forward.py.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from monkeyjump.moe import feed_forward
from monkeyjump.moe.auxiliary import Seen, Term
from monkeyjump.moe.config import LowRankExpertConfig, setting
from monkeyjump.moe.feed_forward import NetworkProjection, NetworkRouter
from monkeyjump.moe.layer import ExpertLayer, SingleLoRA
from monkeyjump.moe.losses import load_balance
from monkeyjump.moe.model import MoETuner
from monkeyjump.tuner.targets import block_of, targeted_modules

logger = logging.getLogger("monkeyjump")


@dataclass
class MixLoRAConfig(LowRankExpertConfig):
    """MixLoRA (Li et al., 2024, arXiv:2404.15159).

    Targets inside a feed-forward network get N updates each, and the network becomes N networks behind one
    router that reads the network's input; the gates, summing to 1, multiply the networks' whole outputs. All
    other targets get plain LoRA. Without a target in a feed-forward network nothing is left but LoRA; the
    variant of it that mixes experts in the attention is `MixLoRAAttentionConfig`.
    """

    balance_weight: float = setting(0.001, "Weight of the load-balance loss, over the tokens of all routers.")
    feed_forward_modules: list[str] | str | None = setting(
        None, "Modules that are feed-forward networks, by name or regex. None: those that are called so."
    )

    peft_name: ClassVar[str] = "MIXLORA"

    def terms(self) -> list[Term]:
        return [Term("load_balance", self.balance_weight, _balance_of_all)]


@dataclass
class MixLoRAAttentionConfig(LowRankExpertConfig):
    """A top-k mixture of LoRA experts on each projection with MixLoRA's name and a load-balance loss: not the original.

    For comparisons that adapt the attention alone, where the original has no experts.
    """

    balance_weight: float = setting(0.01, "Weight of the load-balance loss, a mean over routers.")

    peft_name: ClassVar[str] = "MIXLORA_ATTN"


class MixLoRATuner(MoETuner):
    """Wraps projections of feed-forward networks and all others in layers of two kinds."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        found = (self._network_of(prepared, name) for name in targeted_modules(self, prepared))
        networks = {network for network in found if network is not None}
        for network in networks:
            feed_forward.check_network(network, self.model.get_submodule(network))
        if not networks:
            logger.warning(
                "MixLoRA's experts are feed-forward networks, but target_modules reaches none: this is plain LoRA; "
                "target their projections, or take MixLoRAAttentionConfig"
            )
        return prepared

    def _network_of(self, config: Any, name: str) -> str | None:
        return feed_forward.network_of(name, config.feed_forward_modules, block_of(self.model, name))

    def _kind(self, config: Any, name: str) -> type[ExpertLayer]:
        return SingleLoRA if self._network_of(config, name) is None else NetworkProjection

    def _complete(self, adapter: str, config: Any, layers: dict[str, ExpertLayer]) -> None:
        inside: dict[str, list[ExpertLayer]] = defaultdict(list)
        for name, layer in layers.items():
            if (network := self._network_of(config, name)) is not None:
                if not isinstance(layer, NetworkProjection):
                    raise ValueError(
                        f"feed_forward_modules={config.feed_forward_modules!r} makes {network} a feed-forward network, "
                        "which it is not for an earlier adapter of this model; name the same modules"
                    )
                inside[network].append(layer)
        for path, members in inside.items():
            self._router_of(path, members[0]).start(adapter, config)

    def _router_of(self, path: str, member: ExpertLayer) -> NetworkRouter:
        """The router of a network; with the first adapter the network's other projections become able to share."""
        network: Any = self.model.get_submodule(path)
        if not isinstance(network, feed_forward.MixedNetwork):
            for name, child in feed_forward.linear_children(network).items():
                self._replace_module(network, name, self._wrap(f"{path}.{name}", child, NetworkProjection), child)
            projections = [m for m in network.children() if isinstance(m, NetworkProjection)]
            width = projections[0].in_features  # the first reads what the network reads
            own = (path, member.block, member.context, self.auxiliary, width, member, list(self.active_adapters))
            feed_forward.install(network, router := NetworkRouter(*own))
            for projection in projections:
                projection.stage = router.stage
        return getattr(network, feed_forward.ROUTER)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if not merge:
            feed_forward.remove(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def _balance_of_all(seen: Seen) -> Any:
    """`N sum_n f_n P_n` over the tokens of all routers, where f sums to k, as every token has k experts."""
    config = seen.layers[0].configs[seen.adapter]
    (value,) = load_balance(seen.notes, "model")
    return min(config.top_k or config.num_experts, config.num_experts) * value
