"""Hugging Face's Mamba mixers on our scans: subclasses that differ in `forward` alone.

All widths are read off the weights, so that a layer may have been made narrower than its config says. The projections
are called as modules: adapters, gates and parametrizations on them act and get their gradients. (Hugging Face's own
forward reads `dt_proj.weight`, past an adapter on `dt_proj`.) The convolution's weight is read as an attribute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from monkeyjump.mamba.conv import causal_conv
from monkeyjump.mamba.scan import selective_scan
from monkeyjump.mamba.ssd import ssd_scan


class ScanMambaMixer(MambaMixer):
    """`MambaMixer` on `selective_scan`."""

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """`[B, L, d_model]`, as `MambaMixer.forward`."""
        return _selective(self, hidden_states, cache_params, attention_mask)

    def _normed(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step, b, c


class ScanFalconMambaMixer(FalconMambaMixer):
    """`FalconMambaMixer` on `selective_scan`."""

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """`[B, L, d_model]`, as `FalconMambaMixer.forward`."""
        return _selective(self, hidden_states, cache_params, attention_mask)

    def _normed(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(step), self.b_layernorm(b), self.c_layernorm(c)


class ScanMamba2Mixer(Mamba2Mixer):
    """`Mamba2Mixer` on `ssd_scan`."""

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """`[B, L, d_model]`, as `Mamba2Mixer.forward`."""
        first = _last_state(cache_params, self.layer_idx)
        heads, inner, mixed = len(self.A_log), len(self.norm.weight), len(self.conv1d.weight)
        projected = self.in_proj(_masked(hidden_states, attention_mask))
        gate, xbc, dt = projected.split([inner, mixed, heads], -1)
        xbc = _masked(_convolved(self, xbc, cache_params), attention_mask)
        shared = (mixed - inner) // 2
        x, b, c = xbc.split([inner, shared, shared], -1)
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.time_step_limit)
        A = -torch.exp(self.A_log.float())
        x, (b, c) = x.unflatten(2, (heads, -1)), (t.unflatten(2, (self.n_groups, -1)) for t in (b, c))
        y, last = ssd_scan(x, dt, A, b, c, self.D, initial_state=first, return_last_state=True)
        if cache_params is not None:
            cache_params.update_recurrent_state(last, self.layer_idx)
        return self.out_proj(self.norm(y.flatten(2), gate).to(hidden_states.dtype))


SCANNING: dict[type, type] = {
    MambaMixer: ScanMambaMixer,
    FalconMambaMixer: ScanFalconMambaMixer,
    Mamba2Mixer: ScanMamba2Mixer,
}


def _selective(
    mixer: ScanMambaMixer | ScanFalconMambaMixer, x: Tensor, cache: Cache | None, attention_mask: Tensor | None
) -> Tensor:
    """The mixer of the first Mamba: `[B, L, d_model]` for `x` of that shape."""
    dtype, states, first = x.dtype, mixer.A_log.shape[1], _last_state(cache, mixer.layer_idx)
    inner, gate = mixer.in_proj(_masked(x, attention_mask)).chunk(2, -1)
    inner = _masked(_convolved(mixer, inner, cache), attention_mask)
    selected = mixer.x_proj(inner)
    step, b, c = selected.split([selected.shape[2] - 2 * states, states, states], -1)
    step, b, c = mixer._normed(step, b, c)
    u, delta, z, b, c = (t.transpose(1, 2) for t in (inner, mixer.dt_proj(step), gate, b, c))
    A = -torch.exp(mixer.A_log.float())
    y, last = selective_scan(
        u, delta, A, b, c, mixer.D, z, delta_softplus=True, return_last_state=True, initial_state=first
    )
    if cache is not None:
        cache.update_recurrent_state(last, mixer.layer_idx)
    return mixer.out_proj(y.transpose(1, 2).to(dtype))


def _masked(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`x` `[B, L, D]` with zeros for padding, which neither the convolution nor the state then notices."""
    return x if attention_mask is None else (x * attention_mask[:, :, None]).to(x.dtype)


def _last_state(cache: Cache | None, layer: int) -> Tensor | None:
    return None if cache is None else cache.get_recurrent_state(layer, state_idx=0)


def _convolved(mixer: MambaMixer | FalconMambaMixer | Mamba2Mixer, x: Tensor, cache: Cache | None) -> Tensor:
    """`x` `[B, L, D]` after convolution and activation, with the cache's last inputs before it."""
    weight, length = mixer.conv1d.weight, x.shape[1]
    if cache is not None:
        x = cache.update_conv_state(x.transpose(1, 2), mixer.layer_idx, conv_kernel_size=weight.shape[2]).transpose(
            1, 2
        )
    return mixer.act(causal_conv(x, weight, mixer.conv1d.bias)[:, -length:])
