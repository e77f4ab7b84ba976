"""What MoA adds to a block beside its LoRA adapters: the router of all of them, and two further adapters.

    z = LayerNorm(h), without weights            h [B, T, d], what enters the block
    w = sigmoid(R(z))  [B, T, E]                 R(z) = W2 z + b2, or W2 (silu(W1 z + b1) * (W3 z + b3)) + b2
    sparse: G = Gmax sigmoid(v z + c)            weight max(w - G, 0), or w where w >= Gmax / 2 and else 0

    parallel adapter   FFN(h') + w_e (U silu(D h' + b_D) + b_U)
    prompt adapter     what o_proj reads + w_e a_j softmax(q_j K^T / sqrt(d_head)) V     for each head j
                       K = W_k P, V = W_v P     P [tokens, d] learned, W_k and W_v frozen, a_j from zero

Queries and keys of the prompt are taken before any rotary position: a prompt has none. The weights carry a
gradient into h, so they are decided inside the block's forward, and under gradient checkpointing again, alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.moe.module import Companion, kaiming
from monkeyjump.tuner.block import box_of
from monkeyjump.tuner.gates import Gate, GateBox

HOLDERS = (
    *("mixture_router_bias", "mixture_hidden", "mixture_hidden_bias", "mixture_threshold", "mixture_threshold_bias"),
    *("mixture_down", "mixture_down_bias", "mixture_up", "mixture_up_bias", "mixture_prompt", "mixture_prompt_gate"),
)


def adapter_weights(logits: Tensor, threshold: Tensor | float | None, fixed: bool) -> Tensor:
    """Weights of the adapters from router logits `[..., E]`.

    Args:
        threshold: G, `[..., 1]` or a number; None: soft, every adapter acts.
        fixed: whether w itself is kept above G, and not w - G, which alone gives G a gradient.
    """
    w = logits.sigmoid()
    if threshold is None:
        return w
    return w * (w >= threshold) if fixed else (w - threshold).clamp_min(0)


class BlockAdapters(Companion):
    """The router of one block's adapters, its parallel adapter and its prompt adapter."""

    adapter_layer_names = ("mixture_router", *HOLDERS)
    float32_names = ("mixture_router", *HOLDERS[:5])
    other_param_names = ("configs", "places")
    inside = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for holder in HOLDERS:
            setattr(self, holder, nn.ParameterDict())
        self.box, self.dim = GateBox(), self.in_features
        self.places: dict[str, dict[str, Gate]] = {}  # by adapter, the gates of "parallel" and "prompt"
        self._queries: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_queries": None}  # activations: not for pickle or deepcopy

    def start(self, adapter: str, config: Any, experts: int, network: str | None, attention: Any) -> None:
        """Add an adapter's parameters.

        Args:
            experts: its LoRA adapters in this block; the parallel and the prompt adapter come after them.
            network: path of the feed-forward network within the block, for the parallel adapter.
            attention: the attention module, for the prompt adapter, and its path within the block.
        """
        further = {"parallel": network, "prompt": attention and attention[0]}
        own = {kind: path for kind, path in further.items() if path is not None}
        block = self.__dict__["module"]
        self.places[adapter] = {
            kind: Gate(box_of(block, f"{path}."), adapter, experts + number, f"{self.name}.{path}")
            for number, (kind, path) in enumerate(own.items())
        }
        count = experts + len(own)
        parameters = self._router_start(config, count)
        if network is not None:
            parameters |= self._parallel_start(config)
        if attention is not None:
            heads = attention[1].q_proj.out_features // attention[1].head_dim
            parameters["mixture_prompt"] = torch.empty(config.prompt_length, self.in_features).normal_(std=0.02)
            parameters["mixture_prompt_gate"] = torch.full((heads,), 0.0 if config.init_weights else 0.5)
        self.add(adapter, config, **parameters)

    def _router_start(self, config: Any, count: int) -> dict[str, Tensor]:
        swiglu = config.router == "swiglu"
        width = config.router_expansion * count if swiglu else self.in_features
        parameters = {"mixture_router": kaiming(count, width), "mixture_router_bias": torch.zeros(count)}
        if swiglu:  # W1 and W3, one below the other
            parameters["mixture_hidden"] = kaiming(2 * width, self.in_features)
            parameters["mixture_hidden_bias"] = torch.zeros(2 * width)
        if config.variant == "sparse" and config.threshold == "learned":
            parameters["mixture_threshold"] = kaiming(1, self.in_features)
            parameters["mixture_threshold_bias"] = torch.zeros(1)
        return parameters

    def _parallel_start(self, config: Any) -> dict[str, Tensor]:
        size, dim = config.parallel_size, self.in_features
        gain = 1e-4 if config.init_weights else 1.0
        return {
            "mixture_down": nn.init.xavier_uniform_(torch.empty(size, dim), gain=gain),
            "mixture_down_bias": torch.zeros(size),
            "mixture_up": nn.init.xavier_uniform_(torch.empty(dim, size), gain=gain),
            "mixture_up_bias": torch.zeros(dim),
        }

    # ------------------------------------------------------------------ the router

    def route(self, hidden: Tensor, block_kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
        """Weights `[B, T, E]` float32 of every active adapter for the hidden states that enter the block."""
        adapters = self.acting()
        return {adapter: self.weights(adapter, hidden) for adapter in adapters} if adapters else None

    def weights(self, adapter: str, hidden: Tensor) -> Tensor:
        """Weights `[..., E]` for hidden states `[..., d]`: those of the LoRA adapters in order, then the others."""
        config, weight = self.configs[adapter], self.mixture_router[adapter]
        with torch.autocast(hidden.device.type, enabled=False):
            z = F.layer_norm(hidden.to(weight.dtype), hidden.shape[-1:])
            x = z
            if adapter in self.mixture_hidden:
                both = F.linear(z, self.mixture_hidden[adapter], self.mixture_hidden_bias[adapter])
                first, second = both.chunk(2, -1)
                x = F.silu(first) * second
            logits = F.linear(x, weight, self.mixture_router_bias[adapter])
            if config.variant == "soft":
                return adapter_weights(logits, None, True)
            if config.threshold == "fixed":
                return adapter_weights(logits, config.max_threshold / 2, True)
            level = F.linear(z, self.mixture_threshold[adapter], self.mixture_threshold_bias[adapter])
            return adapter_weights(logits, config.max_threshold * level.sigmoid(), False)

    # ------------------------------------------------------------------ hooks

    def add_parallel(self, network: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the feed-forward network."""
        hidden = args[0] if args else next(iter(kwargs.values()))
        added = output[0] if isinstance(output, tuple) else output
        for adapter in self.acting():
            if "parallel" in self.places[adapter]:
                added = added + self._parallel(adapter, hidden).to(added.dtype)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    def _parallel(self, adapter: str, hidden: Tensor) -> Tensor:
        dtype = hidden.dtype
        inner = F.linear(hidden, self.mixture_down[adapter].to(dtype), self.mixture_down_bias[adapter].to(dtype))
        added = F.linear(F.silu(inner), self.mixture_up[adapter].to(dtype), self.mixture_up_bias[adapter].to(dtype))
        return added * self.places[adapter]["parallel"](hidden).to(added.dtype)

    def keep_queries(self, projection: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of q_proj."""
        self._queries = output

    def add_prompt(self, projection: nn.Module, args: tuple) -> tuple | None:
        """Forward pre-hook of o_proj."""
        queries, self._queries = self._queries, None
        acting = [adapter for adapter in self.acting() if "prompt" in self.places[adapter]]
        if queries is None or not acting:
            return None
        x = args[0]
        for adapter in acting:
            gate = self.places[adapter]["prompt"](x)
            x = x + (self._prompt(adapter, queries).view(x.shape) * gate.to(x.dtype)).to(x.dtype)
        return (x, *args[1:])

    def _prompt(self, adapter: str, queries: Tensor) -> Tensor:
        """Each head's attention to the prompt times its gate, `[B, T, heads * d_head]`."""
        attention = self.__dict__["attention"]
        prompt = self.mixture_prompt[adapter].to(queries.dtype)
        keys, values = (_base_of(p)(prompt).unflatten(-1, (-1, attention.head_dim)) for p in _kv(attention))
        groups = queries.unflatten(-1, (keys.shape[1], -1, attention.head_dim))  # [B, T, kv heads, group, d_head]
        scores = torch.einsum("btkgd,pkd->btkgp", groups, keys) * attention.head_dim**-0.5
        found = torch.einsum("btkgp,pkd->btkgd", scores.float().softmax(-1).to(values.dtype), values)
        gate = self.mixture_prompt_gate[adapter].view(keys.shape[1], -1, 1)
        return (found * gate.to(found.dtype)).flatten(-3)


def _kv(attention: Any) -> tuple[nn.Module, nn.Module]:
    return attention.k_proj, attention.v_proj


def _base_of(projection: nn.Module) -> nn.Module:
    return projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
