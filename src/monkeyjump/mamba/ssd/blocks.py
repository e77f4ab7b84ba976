"""How the steps of a sequence are cut and laid out, their decays, and the buffers of a block.

Letters of shapes: n chunks of Q steps, c of them in a block; batch B; G groups of R heads; m = c B G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
BLOCK = 2**17  # elements of a buffer, for each thread of a CPU
BLOCK_ELSEWHERE = 2**26


class Run(NamedTuple):
    """Chunks of one length: all the whole ones of a sequence, or the shorter one behind them."""

    steps: slice
    chunks: slice
    size: int

    def per_head(self, t: Tensor, groups: int) -> Tensor:
        """A view of `t` `[B, L, H, ...]` as `[n, B, G, R, Q, ...]`."""
        t = t[:, self.steps].unflatten(1, (-1, self.size)).unflatten(3, (groups, -1))
        return t.permute(1, 0, 3, 4, 2, *range(5, t.dim()))

    def per_group(self, t: Tensor) -> Tensor:
        """A view of `t` `[B, L, G, N]` as `[n, B, G, Q, N]`."""
        return t[:, self.steps].unflatten(1, (-1, self.size)).permute(1, 0, 3, 2, 4)

    def blocks(self, x: Tensor) -> list[slice]:
        """The chunks of each block, counted from the first of the run."""
        batch, _, heads, width = x.shape
        limit = BLOCK * torch.get_num_threads() if x.device.type == "cpu" else BLOCK_ELSEWHERE
        number = max(1, limit // max(1, batch * heads * width * self.size))
        total = self.chunks.stop - self.chunks.start
        return [slice(start, min(start + number, total)) for start in range(0, total, number)]


def runs(length: int) -> list[Run]:
    whole, left = divmod(length, CHUNK)
    found = [Run(slice(0, whole * CHUNK), slice(0, whole), CHUNK)] if whole else []
    return found + ([Run(slice(whole * CHUNK, length), slice(whole, whole + 1), left)] if left else [])


class Decays(NamedTuple):
    """Factors of steps, `[n, B, G, R, Q]`.

    With l the sum of dt A from the chunk's beginning, the decay from step j to i is exp(l_i - l_j). The sums are taken
    in float64; `rows` is l rounded. What rounding left goes into `after`, a factor of the output, and `before`, one of
    the input, so that a matrix of decays need not be float64.
    """

    dt: Tensor
    rows: Tensor
    after: Tensor
    before: Tensor
    from_start: Tensor
    to_end: Tensor

    @classmethod
    def of(cls, dt: Tensor, A: Tensor) -> Decays:
        """For dt `[n, B, G, R, Q]` and A `[G, R, 1]`."""
        sums = (dt * A).double().cumsum(4)
        rows = sums.to(dt.dtype)
        rest = (sums - rows.double()).to(dt.dtype)
        from_start, to_end = (t.exp().to(dt.dtype) for t in (sums, sums[..., -1:] - sums))
        return cls(dt, rows, rest.exp(), (-rest).exp(), from_start, to_end)

    def at(self, block: slice) -> Decays:
        return Decays(*(t[block] for t in self))

    def of_chunks(self, width: int) -> Tensor:
        """The decay over each chunk, `[n, B, G, R * P, 1]`, for states `[B, G, R * P, N]`."""
        whole = self.from_start[..., -1:]
        return whole.expand(*whole.shape[:-1], width).flatten(3)[..., None]


class Scratch:
    """Buffers by name, the same memory for every block."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        elements = torch.Size(shape).numel()
        if name not in self._buffers or len(self._buffers[name]) < elements:
            self._buffers[name] = self._like.new_empty(elements)
        return self._buffers[name][:elements].view(shape)


def swap(t: Tensor) -> Tensor:
    """`[c, B, G, R, Q, ...]` as `[c, B, G, Q, R, ...]`, and back."""
    return t.transpose(3, 4)


def decay_matrices(rows: Tensor, out: Tensor) -> Tensor:
    """exp(l_i - l_j) for j <= i, else 0: `[m, R, Q, Q]`, for rows `[m, R, Q]`."""
    return torch.sub(rows[..., None], rows[..., None, :], out=out).exp_().tril_()
