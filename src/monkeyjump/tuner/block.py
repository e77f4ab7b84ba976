"""A block that computes its gates once per forward, outside activation checkpointing.

transformers checkpoints a block's `forward`: what hooks on the block or its layers decide in there is
decided again when the backward pass recomputes it. So the block's class is exchanged for a cached
subclass of the same name. Its `__call__` runs outside the checkpoint, computes the gates and hands
them on as a keyword, which the checkpointed closure captures; its `forward` takes the keyword off
and shows the gates to the layers. The recomputation sees the very same gates, also with two forwards
before one backward, and also when the centers have moved in between.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from monkeyjump.tuner.router import Router

ROUTER = "jump_router"  # must not contain any PEFT method's prefix: PEFT skips such modules when deleting
GATES = "mj_gates"


class RoutedBlock:
    """Mixin of the generated block classes."""

    jump_router: Router

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if GATES not in kwargs:
            gates = self.jump_router.route(_hidden(args, kwargs), kwargs)
            if gates is not None:
                kwargs[GATES] = gates
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the generated class has the name of the original, so pickle and deepcopy need to be told
        return _rebuild, (type(self).routed_class_of,), self.__dict__  # type: ignore[attr-defined]


@functools.cache
def routed_class(original: Any) -> Any:
    """The routed subclass of a block class; it keeps name, module and signature."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, mj_gates: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        if mj_gates is None:  # `forward` was called directly
            mj_gates = self.jump_router.route(_hidden(args, kwargs), kwargs)
        with self.jump_router.box.showing(mj_gates):
            return original.forward(self, *args, **kwargs)

    names = {
        "routed_class_of": original,
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    return type(original.__name__, (RoutedBlock, original), names)


def _rebuild(original: Any) -> nn.Module:
    cls = routed_class(original)
    return cls.__new__(cls)


def install_router(block: nn.Module, router: Router) -> None:
    """Make `block` a routed block."""
    setattr(block, ROUTER, router)
    original: Any = type(block)
    block.__class__ = routed_class(original)
    _rebind(block)


def remove_router(block: nn.Module) -> None:
    """Give the block its own class back."""
    delattr(block, ROUTER)
    block.__class__ = type(block).routed_class_of  # type: ignore[attr-defined]
    _rebind(block)


def _rebind(block: nn.Module) -> None:
    # accelerate's hooks keep the forward that they found, bound to the former class
    if "_old_forward" in block.__dict__:
        block._old_forward = type(block).forward.__get__(block)


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states `[B, T, d]` among a block's arguments: the first tensor."""
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
