"""Dropout masks of one bit per element.

`torch.nn.functional.dropout` keeps its mask in the dtype of the input, for the backward pass. Here the
mask is drawn as bits, is kept as bits, and is spread out only where it is used. Drawing is cheaper, too:
a bit that is 1 with probability q needs one random bit for each binary digit of q, and a machine word
holds 64 of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from monkeyjump import native

DIGITS = 16  # binary digits of the keep probability: it is exact to 1 / 65,536


class DropoutMask:
    """The mask of one input; layers that read the same input share it.

    Attributes:
        bits: uint8, one bit per element of the input, 1 where it is kept.
        shape: of the input.
        p: probability of dropping, as asked for; what is kept is divided by 1 - p.
    """

    def __init__(self, bits: Tensor, shape: torch.Size, p: float) -> None:
        self.bits, self.shape, self.p = bits, shape, p

    @classmethod
    def draw(cls, x: Tensor, p: float) -> DropoutMask:
        """A mask for `x`, from the global generator of its device (which checkpointing restores)."""
        words = -(-x.numel() // 64)
        keep = round((1 - p) * 2**DIGITS)
        if x.device.type == "cpu" and native.is_there():
            seed = int(torch.empty((), dtype=torch.int64).random_(-(2**63), None))
            bits = native.draw_bits(seed, keep, words)
        elif x.is_cuda:  # few calls, where each costs more than what it computes
            kept = torch.empty(words * 8, 8, dtype=torch.uint8, device=x.device).bernoulli_(keep / 2**DIGITS)
            bits = kept.mul_(_places(x.device)).sum(-1, dtype=torch.uint8)
        else:
            bits = _draw_words(words, keep, x.device)
        return cls(bits.view(torch.uint8), x.shape, p)

    @property
    def factor(self) -> float:
        """What kept elements are multiplied by."""
        return 1 / (1 - self.p)

    def keep(self, dtype: torch.dtype) -> Tensor:
        """The mask as the factors of the input's elements: 0 or 1 / (1 - p)."""
        return spread(self.bits, self.shape, dtype) * self.factor


def _draw_words(words: int, keep: int, device: torch.device) -> Tensor:
    """`[words]` int64 whose bits are each 1 with probability keep / 2^DIGITS."""
    bits = torch.zeros(words, dtype=torch.int64, device=device)
    for digit in range(DIGITS):  # from the least significant: P(1) = keep / 2^16 after the last
        fresh = torch.empty_like(bits).random_(-(2**63), None)
        bits = bits | fresh if keep >> digit & 1 else bits & fresh
    return bits


def spread(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The mask as zeros and ones of the given shape."""
    if bits.is_cuda:
        one = bits.unsqueeze(1).bitwise_and(_places(bits.device)) != 0
        return one.view(-1)[: shape.numel()].view(shape).to(dtype)
    return _bytes(dtype, bits.device).index_select(0, bits.int()).view(-1)[: shape.numel()].view(shape)


@functools.lru_cache(maxsize=16)
def _places(device: torch.device) -> Tensor:
    """The value of each of a byte's eight bits."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


@functools.lru_cache(maxsize=16)
def _bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight bits of every byte: `[256, 8]`. A look-up is faster than shifting."""
    values, places = torch.arange(256, device=device), torch.arange(8, device=device)
    return (values.unsqueeze(1) >> places & 1).to(dtype)
