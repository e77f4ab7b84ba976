"""`register_block`: what cannot be guessed about a block class.

A block is anything that takes hidden states `[B, T, d]` and holds projections. Guessed, for a class
that nobody registered:

block          the nearest gradient-checkpointing layer of transformers, else the outermost element
               of a `ModuleList`
hidden states  the argument `hidden_states`, else the first tensor
d              the width of the block's own norm, else the config's `hidden_size`, else the first
               adapted layer's input
real tokens    the `attention_mask` of the model around the block
token order    every projection reads the block's tokens in the block's order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]  # what the block's forward was called with, by parameter name


@dataclass(frozen=True, eq=False)
class BlockHook:
    """How a block class is to be read; the fields are the arguments of `register_block`."""

    hidden_states: str | Callable[[Inputs], Tensor] | None = None
    hidden_size: Callable[[Any], int] | None = None
    attended: Callable[[Inputs], Tensor | None] | None = None
    rearrange: Mapping[str, Callable[[Any, Tensor, Inputs], Tensor]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """Arguments of one call of the block by name."""
        return {**dict(zip(self.parameters, args)), **kwargs}


_hooks: dict[type, BlockHook] = {}


def register_block(
    block: type[nn.Module],
    *,
    hidden_states: str | Callable[[Inputs], Tensor] | None = None,
    hidden_size: int | Callable[[Any], int] | None = None,
    attended: Callable[[Inputs], Tensor | None] | None = None,
    rearrange: Mapping[str, Callable[[Any, Tensor, Inputs], Tensor]] | None = None,
) -> None:
    """Declare a block class, before `get_peft_model`; registering it again replaces what was said.

    Every instance of the class (or of a subclass) is then a block of its own, wherever it stands.

    Args:
        block: the class.
        hidden_states: which parameter of its forward holds the hidden states, or a function of
            `inputs` (the arguments of the call, by name) that returns them.
        hidden_size: width d of the hidden states, or a function of the block.
        attended: function of `inputs` that returns bool `[B, T]`, True for real tokens, or None
            where all are; for masks that the model does not take as `attention_mask`.
        rearrange: for children of the block that see its tokens in another order or shape: path
            of the child, and a function of (block, gates `[B, T or 1, E]`, `inputs`) that returns the
            gates as the projections inside that child see the tokens.

    Raises:
        TypeError: `block` is no module class.
        ValueError: its forward has no parameter named `hidden_states`.
    """
    if not (isinstance(block, type) and issubclass(block, nn.Module)):
        raise TypeError(f"register_block takes a class of nn.Module, not {block!r}; pass type(block) for an instance")
    parameters = tuple(signature(block.forward).parameters)[1:]
    if isinstance(hidden_states, str) and hidden_states not in parameters:
        raise ValueError(
            f"hidden_states={hidden_states!r} is no parameter of {block.__name__}.forward, which has "
            f"{', '.join(parameters)}"
        )
    size = hidden_size if callable(hidden_size) or hidden_size is None else _constant(hidden_size)
    _hooks[block] = BlockHook(hidden_states, size, attended, dict(rearrange or {}), parameters)


def hook_of(block: type) -> BlockHook | None:
    """What is known of a block class: registered by the user, or one of ours."""
    for cls in block.__mro__:
        if cls in _hooks:
            return _hooks[cls]
        if (ours := _OURS.get(f"{cls.__module__}.{cls.__qualname__}")) is not None:
            # named, not imported: monkeyjump must not load every model of transformers
            register_block(cls, rearrange=ours)
            return _hooks[cls]
    return None


def hidden_of(hook: BlockHook | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states `[B, T, d]` that a block is called with.

    More axes between the first and the last (an image's height and width) become one, in order;
    rows without a batch `[N, d]` count as one row of N tokens.
    """
    wanted = None if hook is None else hook.hidden_states
    hidden: Any
    if callable(wanted):
        hidden = wanted(hook.inputs(args, kwargs))  # type: ignore[union-attr]
    elif wanted is not None:
        hidden = hook.inputs(args, kwargs)[wanted]  # type: ignore[union-attr]
    elif "hidden_states" in kwargs:
        hidden = kwargs["hidden_states"]
    else:
        hidden = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
    if not torch.is_tensor(hidden) or hidden.dim() < 2:
        raise ValueError(
            "a routed block was called without hidden states [B, T, d] among its arguments; say where they are with "
            "register_block(..., hidden_states=...)"
        )
    if hidden.dim() == 2:
        return hidden.unsqueeze(0)
    return hidden if hidden.dim() == 3 else hidden.flatten(1, -2)


def _constant(size: int) -> Callable[[Any], int]:
    return lambda block: size


def _swin_windows(block: Any, gates: Tensor, inputs: Inputs) -> Tensor:
    """Gates `[B, H*W, E]` in the order of Swin's windows: `[B * windows, window**2, E]`.

    The same padding, shift and partition that the layer applies to its hidden states. Padding beyond
    the image's edge gets gate 0.
    """
    height, width = inputs["input_dimensions"]
    if not inputs.get("always_partition"):
        block.set_shift_and_window_size((height, width))
    size = block.window_size
    if gates.shape[1] == 1:  # one decision for the whole image
        windows = -(-height // size) * -(-width // size)
        return gates.repeat_interleave(windows, 0)
    batch, _, experts = gates.shape
    image = block.cyclic_shift(block.maybe_pad(gates.view(batch, height, width, experts), height, width)[0])
    rows, columns = image.shape[1] // size, image.shape[2] // size
    image = image.view(batch, rows, size, columns, size, experts).transpose(2, 3)
    return image.reshape(-1, size * size, experts)


_OURS: dict[str, dict[str, Callable[[Any, Tensor, Inputs], Tensor]]] = {
    "transformers.models.swin.modeling_swin.SwinLayer": {"attention": _swin_windows},
}
