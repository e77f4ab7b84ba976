"""The backward pass.

With g the gradient of y, k that of the state at a chunk's end, h the state at its beginning, u = dt x and
W = G * decay, the gradients within a chunk are

    u: W^T g + to_end * (k B)         G: sum over heads of (g u^T) * decay
    C: (from_start * g) h + G' B      B: (to_end * u) k + G'^T C           (G' the gradient of G)
    h: (from_start * g)^T C + decay over the chunk * k

and the gradient of l_i (a sum of dt A) gathers what row i of W, column i of W, from_start and to_end get.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monkeyjump.mamba.ssd.blocks import Decays, Scratch, decay_matrices, runs, swap


class _OfSteps(NamedTuple):
    """What reaches the factors of steps, `[n, B, G, R, Q]`; `chunks`, for the decays over chunks, `[n, B, G, R]`."""

    rows: Tensor  # l as a row and as a column of W
    from_start: Tensor  # times from_start
    input: Tensor  # dt, as a factor of u in W u
    kept: Tensor  # dt * to_end
    skip: Tensor  # D
    chunks: Tensor

    @classmethod
    def like(cls, t: Tensor) -> _OfSteps:
        rows, from_start, of_input, kept, skip = (torch.empty_like(t) for _ in range(5))
        return cls(rows, from_start, of_input, kept, skip, torch.empty_like(t[..., 0]))

    def at(self, block: slice) -> _OfSteps:
        return _OfSteps(*(t[block] for t in self))


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor,
    grad: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D and the first state, given those of y and of the last state.

    The inputs are those of `forward`, `starts` is what it kept.
    """
    grad_x, grad_dt, grad_b, grad_c = (t.new_empty(t.shape) for t in (x, dt, B, C))
    grad_a, grad_skip = torch.zeros_like(A), torch.zeros_like(A)
    scratch = Scratch(starts)
    for run in reversed(runs(x.shape[1])):
        decays = Decays.of(run.per_head(dt, len(A)).contiguous(), A)
        over_chunks = decays.of_chunks(x.shape[3])
        got = _OfSteps.like(decays.dt)
        inputs, grads, grads_x = (run.per_head(t, len(A)) for t in (x, grad, grad_x))
        b, c, grads_b, grads_c = (run.per_group(t) for t in (B, C, grad_b, grad_c))
        for block in reversed(run.blocks(x)):
            b_, c_ = (t[block].flatten(0, 2).to(starts.dtype) for t in (b, c))
            work = _Block(inputs[block], grads[block], b_, c_, decays.at(block), got.at(block), scratch)
            grad_state = work.across(starts[run.chunks][block], over_chunks[block], grad_state)
            work.within()
            work.finish(D, grads_x[block], grads_b[block], grads_c[block])
        of_sums = _of_sums(decays, got)
        grad_a += (of_sums * decays.dt).sum((0, 1, 4))[..., None]
        of_dt = got.input * decays.before + got.kept * decays.to_end + (of_sums * A).to(decays.dt.dtype)
        run.per_head(grad_dt, len(A)).copy_(of_dt)
        if D is not None:
            grad_skip += got.skip.sum((0, 1, 4))[..., None]
    return grad_x, grad_dt, grad_a, grad_b, grad_c, grad_skip, grad_state.clone()


def _of_sums(decays: Decays, got: _OfSteps) -> Tensor:
    """The gradients of dt A in float64: each is in the sums l of its own and all later steps of the chunk."""
    kept = got.kept * decays.dt * decays.to_end
    grad = (got.rows + got.from_start - kept).double()
    grad[..., -1] += kept.sum(4) + got.chunks * decays.from_start[..., -1]
    return grad.flip(4).cumsum(4).flip(4)


class _Block:
    """A block of chunks: x and the gradient of y `[c, B, G, R, Q, P]`, b and c `[m, Q, N]`."""

    def __init__(
        self, x: Tensor, grad: Tensor, b: Tensor, c: Tensor, decays: Decays, got: _OfSteps, scratch: Scratch
    ) -> None:
        self.x, self.grad, self.b, self.c = x, grad, b, c
        self.decays, self.got, self.scratch = decays, got, scratch
        self.m, (self.heads, self.size, self.width) = len(b), x.shape[3:]

    def across(self, starts: Tensor, over_chunks: Tensor, grad_state: Tensor) -> Tensor:
        """What goes through the states; returns the gradient of the block's first one."""
        columns, per_step = (self.m, self.size, self.heads * self.width), swap(self.x).shape
        states = self.m, self.heads * self.width, self.b.shape[2]
        from_start, kept = (swap(t)[..., None] for t in (self.decays.from_start, self.decays.dt * self.decays.to_end))
        h = starts.view(states)

        grad = torch.mul(swap(self.grad), from_start, out=self.scratch("columns", *per_step)).view(columns)
        added = torch.bmm(grad.transpose(1, 2), self.c, out=self.scratch("product", *states))
        ends = self.scratch("ends", *starts.shape)
        for end, factor, new in reversed([*zip(ends, over_chunks, added.view(starts.shape))]):
            end.copy_(grad_state)
            grad_state = torch.addcmul(new, factor, grad_state)
        ends = ends.view(states)
        self.grad_c = torch.bmm(grad, h, out=self.scratch("c", *self.c.shape))
        from_state = torch.bmm(self.c, h.transpose(1, 2), out=self.scratch("product", *columns))
        torch.sum(grad.mul_(from_state).view(per_step), 5, out=swap(self.got.from_start))

        of_head = *self.x.shape[:4], self.width * states[2]
        self._dots(ends.view(of_head), h.view(of_head), self.got.chunks)
        u = torch.mul(swap(self.x), kept, out=self.scratch("columns", *per_step)).view(columns)
        self.grad_b = torch.bmm(u, ends, out=self.scratch("b", *self.b.shape))
        grad_kept = torch.bmm(self.b, ends.transpose(1, 2), out=self.scratch("x", *columns)).view(per_step)
        self._dots(grad_kept, swap(self.x), swap(self.got.kept))
        self.grad_x = grad_kept.mul_(kept)
        return grad_state

    def within(self) -> None:
        """What steps of a chunk give each other."""
        square, grouped = (self.m * self.heads, self.size, self.size), (self.m, self.heads, self.size, self.size)
        flat = self.m * self.heads, self.size, self.width
        scale = (self.decays.dt * self.decays.before)[..., None]
        u = torch.mul(self.x, scale, out=self.scratch("columns", *self.x.shape)).view(flat)
        grad = self.scratch("product", *self.x.shape)
        grad = torch.mul(self.grad, self.decays.after[..., None], out=grad).view(flat)
        g = torch.bmm(self.c, self.b.transpose(1, 2), out=self.scratch("g", self.m, self.size, self.size))[:, None]
        decay = decay_matrices(self.decays.rows.view(grouped[:3]), self.scratch("scores", *grouped))

        grad_w = torch.bmm(grad, u.transpose(1, 2), out=self.scratch("grad", *square)).view(grouped).mul_(decay)
        grad_g = grad_w.sum(1)
        self.grad_c.baddbmm_(grad_g, self.b)
        self.grad_b.baddbmm_(grad_g.transpose(1, 2), self.c)
        grad_w.mul_(g).diagonal(dim1=2, dim2=3).zero_()  # the decay of no step is 1 whatever the sums are
        torch.sub(grad_w.sum(3), grad_w.sum(2), out=self.got.rows.view(grouped[:3]))

        scores = decay.mul_(g).view(square)
        grad_u = torch.bmm(scores.transpose(1, 2), grad, out=self.scratch("columns", *flat)).view(self.x.shape)
        self._dots(grad_u, self.x, self.got.input)
        self.grad_x.addcmul_(swap(grad_u), swap(scale))

    def finish(self, D: Tensor | None, grad_x: Tensor, grad_b: Tensor, grad_c: Tensor) -> None:
        """Adds the skip and writes the gradients where they belong."""
        grad_b.copy_(self.grad_b.view(grad_b.shape))
        grad_c.copy_(self.grad_c.view(grad_c.shape))
        if D is None:
            swap(grad_x).copy_(self.grad_x)
        else:
            torch.addcmul(self.grad_x, swap(self.grad), D, out=swap(grad_x))
            self._dots(swap(self.grad), swap(self.x), swap(self.got.skip))

    def _dots(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Sums of `a * b` over the last dimension."""
        torch.sum(torch.mul(a, b, out=self.scratch("product", *a.shape)), -1, out=out)
