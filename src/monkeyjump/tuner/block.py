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
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from monkeyjump.tuner.blocks import BlockHook, hidden_of, hook_of
from monkeyjump.tuner.gates import GateBox
from monkeyjump.tuner.router import Router

ROUTER = "jump_router"  # must not contain any PEFT method's prefix: PEFT skips such modules when deleting
GATES = "mj_gates"


class RoutedBlock:
    """Mixin of the generated block classes.

    Attributes:
        jump_router: the block's router.
        jump_boxes: further places for gates, by path of a child that sees the tokens in another order.
    """

    jump_router: Router
    jump_boxes: dict[str, GateBox]
    routed_class_of: type
    jump_hook: BlockHook | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outside = GATES not in kwargs and not self.jump_router.inside
        if outside and (gates := _route(self, args, kwargs)) is not None:
            kwargs[GATES] = gates
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the generated class has the name of the original, so pickle and deepcopy need to be told
        return _rebuild, (self.routed_class_of,), self.__dict__


def routed_class(original: Any) -> Any:
    """The routed subclass of a block class; it keeps name, module and signature."""
    return _routed_class(original, hook_of(original))


@functools.cache
def _routed_class(original: Any, hook: BlockHook | None) -> Any:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, mj_gates: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        if mj_gates is None:  # `forward` was called directly, or the router decides in here
            mj_gates = _route(self, args, kwargs)
        with self.jump_router.box.showing(mj_gates):
            if not self.jump_boxes:
                return original.forward(self, *args, **kwargs)
            with _rearranged(self, mj_gates, args, kwargs):
                return original.forward(self, *args, **kwargs)

    names = {
        "routed_class_of": original,
        "jump_hook": hook,
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    return type(original.__name__, (RoutedBlock, original), names)


def _route(block: RoutedBlock, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The gates of one call of a block."""
    router, hook = block.jump_router, block.jump_hook
    hidden = hidden_of(hook, args, kwargs)
    if hidden.shape[-1] != router.dim:
        raise ValueError(
            f"{router.name}: hidden states of width {hidden.shape[-1]} came where {router.dim} was expected; give the "
            "width with register_block(..., hidden_size=...) before get_peft_model"
        )
    if hook is None or hook.attended is None:
        return router.route(hidden, kwargs)
    frames = router.context.frames
    told = {"mask": hook.attended(hook.inputs(args, kwargs)), "offset": frames[-1].offset if frames else 0}
    with router.context.inputs(**told):
        return router.route(hidden, kwargs)


@contextmanager
def _rearranged(block: Any, gates: dict[str, Tensor] | None, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """Show the gates to the children that see the tokens in another order, in that order."""
    with ExitStack() as stack:
        inputs = block.jump_hook.inputs(args, kwargs)
        for child, arrange in block.jump_hook.rearrange.items():
            own = None if gates is None else {name: arrange(block, m, inputs) for name, m in gates.items()}
            stack.enter_context(block.jump_boxes[child].showing(own))
        yield


def _rebuild(original: Any) -> nn.Module:
    cls = routed_class(original)
    return cls.__new__(cls)


def install_router(block: nn.Module, router: Any) -> None:
    """Make `block` a routed block.

    Args:
        router: a `Router`, or what has its `route`, `box`, `context`, `name`, `dim` and `inside`.
    """
    setattr(block, ROUTER, router)
    original: Any = type(block)
    cls = routed_class(original)
    block.__dict__["jump_boxes"] = {child: GateBox() for child in cls.jump_hook.rearrange} if cls.jump_hook else {}
    block.__class__ = cls
    rebind(block)


def box_of(block: Any, slot: str) -> GateBox:
    """Where the gates for a slot of a routed block are shown."""
    inside = (box for child, box in block.jump_boxes.items() if slot.startswith(child + "."))
    return next(inside, block.jump_router.box)


def remove_router(block: nn.Module) -> None:
    """Give the block its own class back."""
    delattr(block, ROUTER)
    del block.__dict__["jump_boxes"]
    block.__class__ = type(block).routed_class_of  # type: ignore[attr-defined]
    rebind(block)


def rebind(block: nn.Module) -> None:
    # accelerate's hooks keep the forward that they found, bound to the former class, and leave it when they go
    if "_old_forward" in block.__dict__:
        block._old_forward = type(block).forward.__get__(block)
    elif inspect.ismethod(block.__dict__.get("forward")):
        del block.forward
