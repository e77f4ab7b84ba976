"""Experts that are whole feed-forward networks (MixLoRA): one router, one network, N sets of low-rank updates.

    p = softmax(W_g h)   g = its top-k, renormalized                     h [n, d], the tokens that the network reads
    FFN_n(h) = W2n(act(W1n h) * W3n h)     Wjn = Wj + s Bjn Ajn           y = sum_n g_n FFN_n(h)

Each expert runs the network's own forward on the tokens that chose it, so any activation and any number
of projections will do; none of it is wider than [n k, d_ff]. The frozen products W1 h and W3 h are the
same for every expert and are taken once, for all tokens. All of it happens inside the network's forward:
a checkpointed block recomputes the same decision from the same h.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.moe.layer import LowRankExperts
from monkeyjump.moe.module import Companion
from monkeyjump.native import is_traced
from monkeyjump.ops import gated_delta, mixture_delta_reference
from monkeyjump.tuner.block import rebind
from monkeyjump.tuner.targets import matches

ROUTER = "expert_router"  # the companion's name; without PEFT's prefix, or PEFT would not look into it
NETWORKS = ("mlp", "feed_forward", "ffn", "DenseReluDense")  # what feed-forward networks are called
# what their projections are called, wherever they stand
PROJECTIONS = (
    *(
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "fc1",
        "fc2",
        "c_fc",
        "wi",
        "wi_0",
        "wi_1",
        "w1",
        "w2",
        "w3",
    ),
    *("dense_h_to_4h", "dense_4h_to_h", "lin1", "lin2", "intermediate.dense"),
)


def network_of(name: str, given: list[str] | str | None, block: str | None) -> str | None:
    """Path of the feed-forward network that a projection is part of; None for a projection of no such network.

    Args:
        name: path of the projection.
        given: names of the networks, or a regex; None: those in `NETWORKS`.
        block: path of the block around it.

    Raises:
        ValueError: by its name it belongs to one, but no module around it is one.
    """
    parent = name.rpartition(".")[0]
    if matches(parent, list(NETWORKS) if given is None else given):
        return parent
    if given is None and matches(name, list(PROJECTIONS)) and parent != "":
        where = "which is the block itself" if parent == block else "which is none by its name"
        raise ValueError(
            f"target_modules reaches {name}, a projection of a feed-forward network by its name, but it lies in "
            f"{parent}, {where}; the experts are whole networks: leave it out of target_modules, or name the modules "
            "that are networks in feed_forward_modules"
        )
    return None


class Stage:
    """What the projections of a network see while one expert runs.

    Attributes:
        adapter, expert: whose experts, and which of them; None where no expert runs.
        whole: `[n, d]`, all tokens.
        rows: the tokens that chose the expert, by number.
        part: `[1, len(rows), d]`, what the network is called with.
    """

    def __init__(self) -> None:
        self.clear()

    def __getstate__(self) -> dict:
        return Stage().__dict__  # activations: not for pickle or deepcopy

    def clear(self) -> None:
        self.adapter: str | None = None
        self.expert = 0
        self.whole: Any = None
        self.rows: Any = None
        self.part: Any = None
        self.products: dict[nn.Module, Tensor] = {}

    def base(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The base layer's product with the expert's tokens `x`."""
        if x is not self.part:
            return layer(x)
        if layer not in self.products:
            self.products[layer] = layer(self.whole)
        return self.products[layer].index_select(0, self.rows).unsqueeze(0)


class NetworkProjection(LowRankExperts):
    """A projection of a feed-forward network; without an adapter it only shares its product."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stage = Stage()

    def _add_router(self, adapter: str, config: Any, experts: int) -> None:
        """The network's router decides."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stage = self.stage
        if stage.adapter is None:
            if self.acting():
                raise RuntimeError(f"{self.name} was called outside its feed-forward network; call the network")
            return self.base_layer(x, *args, **kwargs)
        y = stage.base(self.base_layer, x)
        if stage.adapter not in self.acting():
            return y
        a, b = self._of(stage.adapter, stage.expert)
        scale, dropout = self.configs[stage.adapter].scale, self._dropout(stage.adapter, x)
        if is_traced():
            keep = None if dropout is None else dropout.keep(x.dtype)
            return y + mixture_delta_reference(x, a, b, x.new_ones(1), scale, keep).to(y.dtype)
        return y + gated_delta(x.to(y.dtype), a, b, None, scale, dropout)

    def _of(self, adapter: str, expert: int) -> tuple[Tensor, Tensor]:
        rank = self.configs[adapter].rank
        mine = slice(expert * rank, (expert + 1) * rank)
        return self.mixture_A[adapter][mine], self.mixture_B[adapter][:, mine].contiguous()


class NetworkRouter(Companion):
    """The router of one feed-forward network, `[N, d]` float32, and the loop over its experts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stage = Stage()

    def start(self, adapter: str, config: Any) -> None:
        """Add an adapter's router."""
        weight = nn.init.normal_(torch.empty(config.num_experts, self.in_features), std=0.02)
        self.add(adapter, config, mixture_router=weight)

    def mix(self, network: Any, hidden: Tensor) -> Tensor:
        """The experts' sum for `hidden` `[..., d]`.

        Args:
            network: the network's own forward.

        Raises:
            ValueError: several adapters are active.
        """
        adapters = self.acting()
        if not adapters:
            return network(hidden)
        if len(adapters) > 1:
            raise ValueError(
                f"adapters {adapters} are active at once in {self.name}, whose output is one adapter's mixture of "
                "whole networks; activate one"
            )
        gates, chosen = (t.flatten(0, -2) for t in self.decide(adapters[0], hidden))
        stage, flat, y = self.stage, hidden.reshape(-1, hidden.shape[-1]), None
        try:
            stage.adapter, stage.whole = adapters[0], flat
            for expert in range(gates.shape[1]):
                stage.expert, stage.rows = expert, chosen[:, expert].nonzero().squeeze(1)
                stage.part = flat.index_select(0, stage.rows).unsqueeze(0)
                out = network(stage.part).squeeze(0)
                y = out.new_zeros(len(flat), out.shape[-1]) if y is None else y
                gate = gates[:, expert].index_select(0, stage.rows).unsqueeze(1)
                y = y.index_add_(0, stage.rows, out * gate.to(out.dtype))
        finally:
            stage.clear()
        assert y is not None
        return y.view(*hidden.shape[:-1], -1)


# ---------------------------------------------------------------------- the network's class


class MixedNetwork:
    """Mixin of the generated classes of feed-forward networks."""

    mixed_class_of: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the generated class has the name of the original, so pickle and deepcopy need to be told
        return _rebuild, (self.mixed_class_of,), self.__dict__


@functools.cache
def _mixed_class(original: Any) -> Any:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        (hidden,) = (*args, *kwargs.values())
        return getattr(self, ROUTER).mix(functools.partial(original.forward, self), hidden)

    names = {
        "mixed_class_of": original,
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    return type(original.__name__, (MixedNetwork, original), names)


def _rebuild(original: Any) -> nn.Module:
    cls: Any = _mixed_class(original)
    return cls.__new__(cls)


def check_network(name: str, network: nn.Module) -> None:
    """Refuse networks whose forward takes more than hidden states.

    Raises:
        ValueError: naming the network.
    """
    taken = list(inspect.signature(type(network).forward).parameters)[1:]
    if len(taken) != 1:
        raise ValueError(
            f"{name}, a {type(network).__name__}, takes {', '.join(taken)}; experts that are whole feed-forward "
            "networks need one that takes the hidden states alone: leave its projections out of target_modules"
        )


def install(network: nn.Module, router: NetworkRouter) -> None:
    """Make the network mix experts."""
    setattr(network, ROUTER, router)
    original: Any = type(network)
    network.__class__ = _mixed_class(original)
    rebind(network)


def remove(model: nn.Module) -> None:
    """Give all networks of a model their own class back."""
    for network in [m for m in model.modules() if isinstance(m, MixedNetwork)]:
        delattr(network, ROUTER)
        network.__class__ = network.mixed_class_of
        rebind(network)


def linear_children(network: nn.Module) -> dict[str, nn.Module]:
    """The network's projections that no adapter wraps yet, by name."""
    return {name: child for name, child in network.named_children() if isinstance(child, (nn.Linear, Conv1D))}
