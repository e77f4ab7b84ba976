"""The forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from monkeyjump.mamba.ssd.blocks import CHUNK, Decays, Scratch, decay_matrices, runs, swap


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`y`, the last state and the states at the beginnings of the chunks `[chunks, B, G, R * P, N]`.

    Args:
        x, dt, B, C: as in `ssd_scan`.
        A: `[G, R, 1]`.
        D: `[G, 1, R, 1]` or None.
        state: `[B, G, R * P, N]`, as dt, A and D in the precision of the computation.
    """
    y, scratch = x.new_empty(x.shape), Scratch(state)
    starts = state.new_empty(-(-x.shape[1] // CHUNK), *state.shape)
    for run in runs(x.shape[1]):
        decays = Decays.of(run.per_head(dt, len(A)).contiguous(), A)
        over_chunks = decays.of_chunks(x.shape[3])
        inputs, outputs = (run.per_head(t, len(A)) for t in (x, y))
        b, c = run.per_group(B), run.per_group(C)
        for block in run.blocks(x):
            here = starts[run.chunks][block]
            b_, c_ = (t[block].flatten(0, 2).to(state.dtype) for t in (b, c))
            added = _added(inputs[block], decays.at(block), b_, scratch)
            for start, factor, new in zip(here, over_chunks[block], added.view(here.shape)):
                start.copy_(state)
                state = torch.addcmul(new, factor, state)
            _output(inputs[block], decays.at(block), b_, c_, D, here, outputs[block], scratch)
    return y, state.clone(), starts


def _added(x: Tensor, decays: Decays, b: Tensor, scratch: Scratch) -> Tensor:
    """What each chunk adds to the state, `[m, R * P, N]`, for x `[c, B, G, R, Q, P]` and b `[m, Q, N]`."""
    c, batch, groups, heads, size, width = x.shape
    columns = scratch("columns", c, batch, groups, size, heads, width)
    torch.mul(swap(x), swap(decays.dt * decays.to_end)[..., None], out=columns)
    product = scratch("product", len(b), heads * width, b.shape[2])
    return torch.bmm(columns.view(len(b), size, heads * width).transpose(1, 2), b, out=product)


def _output(
    x: Tensor, decays: Decays, b: Tensor, c: Tensor, D: Tensor | None, starts: Tensor, out: Tensor, scratch: Scratch
) -> None:
    """Writes `y` to `out`, laid out as x."""
    heads, size, width = x.shape[3:]
    m, per_step = len(b), swap(x).shape
    columns = torch.mul(x, (decays.dt * decays.before)[..., None], out=scratch("columns", *x.shape))
    scores = decay_matrices(decays.rows.view(m, heads, size), scratch("scores", m, heads, size, size))
    scores.mul_(torch.bmm(c, b.transpose(1, 2), out=scratch("g", m, size, size))[:, None])
    flat = scores.view(m * heads, size, size), columns.view(m * heads, size, width)
    within = torch.bmm(*flat, out=scratch("product", m * heads, size, width)).view(x.shape)
    y = scratch("columns", m, size, heads * width)
    y = torch.bmm(c, starts.view(m, heads * width, b.shape[2]).transpose(1, 2), out=y).view(per_step)
    y.mul_(swap(decays.from_start)[..., None]).addcmul_(swap(within), swap(decays.after)[..., None])
    if D is None:
        swap(out).copy_(y)
    else:
        torch.addcmul(y, swap(x), D, out=swap(out))
