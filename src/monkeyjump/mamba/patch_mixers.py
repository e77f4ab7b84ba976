"""Hugging Face's Mamba mixers on our scans: subclasses that differ in `forward` alone.

All widths are read off the weights, so that a layer may have been made narrower than its config says. The projections
are called as modules: adapters, gates and parametrizations on them act and get their gradients. (Hugging Face's own
forward reads `dt_proj.weight`, past an adapter on `dt_proj`.) The convolution's weight is read as an attribute.

`SCANNING` at the end says which mixer is of which kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from monkeyjump.mamba.conv import causal_conv
from monkeyjump.mamba.scan import selective_scan
from monkeyjump.mamba.ssd import ssd_scan


class _OnOurScan:
    """What every mixer does around its scan. The attributes are those of the stock mixer that comes after it."""

    layer_idx: int
    in_proj: nn.Module
    conv1d: nn.Conv1d
    act: Callable[[Tensor], Tensor]
    A_log: Tensor
    D: Tensor
    out_proj: nn.Module

    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """`[B, L, d_model]`, as the stock mixer's `forward`.

        Raises:
            ValueError: sequences are packed.
        """
        if kwargs.get("seq_idx") is not None:
            raise ValueError(
                "seq_idx says that rows hold several sequences, and a patched mixer would carry its state from one "
                "into the next: pad them instead, or call unpatch_mamba(model)"
            )
        inner, *others = self._inputs(_masked(hidden_states, attention_mask))
        inner = _masked(self._convolved(inner, cache_params), attention_mask)
        first = None if cache_params is None else cache_params.layers[self.layer_idx].recurrent_states[0]
        y, last = self._scanned(inner, first, *others)
        if cache_params is not None:
            cache_params.update_recurrent_state(last, self.layer_idx)
        return self.out_proj(y.to(hidden_states.dtype))

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        """Of `x` `[B, L, d_model]`: what is convolved, `[B, L, channels]`, and then what else `_scanned` takes."""
        raise NotImplementedError

    def _scanned(self, inner: Tensor, first: Tensor | None, *others: Tensor) -> tuple[Tensor, Tensor]:
        """`y` `[B, L, D]`, gated, and the last state; `first` is the state before the first step."""
        raise NotImplementedError

    def _convolved(self, x: Tensor, cache: Cache | None) -> Tensor:
        """`x` `[B, L, channels]` after convolution and activation, with the cache's last inputs before it."""
        weight, length = self.conv1d.weight, x.shape[1]
        if cache is not None:
            taps = weight.shape[2]
            x = cache.update_conv_state(x.transpose(1, 2), self.layer_idx, conv_kernel_size=taps).transpose(1, 2)
        return self.act(causal_conv(x, weight, self.conv1d.bias)[:, -length:])


def _masked(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`x` `[B, L, D]` with zeros for padding, which neither the convolution nor the state then notices."""
    return x if attention_mask is None else (x * attention_mask[:, :, None]).to(x.dtype)


class _Mamba(_OnOurScan):
    """The first Mamba: step sizes, B and C are selected by the channels, the same B and C for all of them."""

    x_proj: nn.Module
    dt_proj: nn.Module

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        return self.in_proj(x).chunk(2, -1)

    def _scanned(self, inner: Tensor, first: Tensor | None, *others: Tensor) -> tuple[Tensor, Tensor]:
        selected, states = self.x_proj(inner), self.A_log.shape[1]
        step, b, c = selected.split([selected.shape[2] - 2 * states, states, states], -1)
        step, b, c = self._normed(step, b, c)
        u, delta, b, c, z = (t.transpose(1, 2) for t in (inner, self.dt_proj(step), b, c, *others))
        y, last = _selective_scan(u, delta, self.A_log, b, c, self.D, z, first)
        return y.transpose(1, 2), last

    def _normed(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step, b, c


class _NormedMamba(_Mamba):
    """With norms over what is selected."""

    dt_layernorm: nn.Module
    b_layernorm: nn.Module
    c_layernorm: nn.Module

    def _normed(self, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(step), self.b_layernorm(b), self.c_layernorm(c)


class _HeadedMamba(_OnOurScan):
    """With heads that select for themselves. Channels and gates take turns in the rows of in_proj."""

    x_proj_weight: Tensor  # [H, R + 2N, P]: H heads of width P
    dt_proj_weight: Tensor  # [H, P, R]
    dt_proj_bias: Tensor  # [H, P]

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        return self.in_proj(x).unflatten(2, (-1, 2)).unbind(3)

    def _scanned(self, inner: Tensor, first: Tensor | None, *others: Tensor) -> tuple[Tensor, Tensor]:
        heads, _, states = self.A_log.shape
        u, z = (t.unflatten(2, (heads, -1)).permute(2, 0, 3, 1) for t in (inner, *others))  # [H, B, P, L]
        selected = self.x_proj_weight[:, None] @ u  # [H, B, R + 2N, L]
        step, b, c = selected.split([selected.shape[2] - 2 * states, states, states], 2)
        delta = self.dt_proj_weight[:, None] @ step + self.dt_proj_bias[:, None, :, None]
        firsts = [None] * heads if first is None else first.unbind(1)
        by_head = zip(u, delta, self.A_log, b, c, self.D, z, firsts)
        ys, lasts = zip(*(_selective_scan(*of_head) for of_head in by_head))
        return torch.cat(ys, 1).transpose(1, 2), torch.stack(lasts, 1)


def _selective_scan(
    u: Tensor, delta: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    A = -torch.exp(a_log.float())
    y, last = selective_scan(u, delta, A, b, c, d, z, delta_softplus=True, return_last_state=True, initial_state=first)
    return y, last


class _Mamba2(_OnOurScan):
    """Mamba-2: gate, channels, B, C and step sizes are all of in_proj; heads have one step size each."""

    dt_bias: Tensor
    time_step_limit: tuple[float, float]
    n_groups: int
    norm: nn.Module

    def _inputs(self, x: Tensor) -> Sequence[Tensor]:
        projected, convolved, heads = self._projected(x), len(self.conv1d.weight), len(self.A_log)
        gate, xbc, dt = projected.split([projected.shape[2] - convolved - heads, convolved, heads], -1)
        return xbc, gate, dt

    def _scanned(self, inner: Tensor, first: Tensor | None, *others: Tensor) -> tuple[Tensor, Tensor]:
        gate, dt = others
        shared, heads = (inner.shape[2] - gate.shape[2]) // 2, dt.shape[2]
        x, b, c = inner.split([gate.shape[2], shared, shared], -1)
        x, b, c = (t.unflatten(2, (parts, -1)) for t, parts in ((x, heads), (b, self.n_groups), (c, self.n_groups)))
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype)).clamp(*self.time_step_limit)
        A = -torch.exp(self.A_log.float())
        y, last = ssd_scan(x, dt, A, b, c, self.D, initial_state=first, return_last_state=True)
        return self._gated(y.flatten(2), gate), last

    def _projected(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.norm(y, gate)


class _ScaledMamba2(_Mamba2):
    """With constant factors around in_proj, and perhaps without a norm."""

    ssm_in_multiplier: float
    mup_vector: Tensor
    mamba_rms_norm: bool

    def _projected(self, x: Tensor) -> Tensor:
        return self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.norm(y, gate) if self.mamba_rms_norm else y * F.silu(gate)


def _scanning(stock: type, kind: type) -> type:
    """`ScanMambaMixer` of `MambaMixer`, and so on; a name of this module, by which pickle finds it."""
    name = f"Scan{stock.__name__}"
    globals()[name] = made = type(name, (kind, stock), {"__module__": __name__})
    return made


_KINDS: dict[type, type] = {
    MambaMixer: _Mamba,
    FalconMambaMixer: _NormedMamba,
    JambaMambaMixer: _NormedMamba,
    ZambaMambaMixer: _HeadedMamba,
    Mamba2Mixer: _Mamba2,
    BambaMixer: _Mamba2,
    Zamba2MambaMixer: _Mamba2,
    NemotronHMamba2Mixer: _Mamba2,
    GraniteMoeHybridMambaLayer: _Mamba2,
    FalconH1Mixer: _ScaledMamba2,
}
SCANNING: dict[type, type] = {stock: _scanning(stock, kind) for stock, kind in _KINDS.items()}
