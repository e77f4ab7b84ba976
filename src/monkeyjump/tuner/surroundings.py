"""What stands around the blocks: the model whose mask is theirs, its forward context, their width."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from monkeyjump.routing.context import ForwardContext
from monkeyjump.tuner.blocks import hook_of


def holder_of(model: nn.Module, block: str) -> nn.Module:
    """The innermost transformers model around a block: its mask is the one of the block's tokens."""
    holder: Any = model
    path: Any = model
    for part in block.split("."):
        path = getattr(path, part)
        if isinstance(path, PreTrainedModel):
            holder = path
    return holder


def context_of(model: nn.Module, holder: nn.Module) -> ForwardContext:
    """The model's context, with its hooks on the outermost model and on the one that holds the blocks."""
    context = _hooked(model)
    if context is None:
        context = ForwardContext()
        context.watch(model)
    if _hooked(holder) is None:
        context.watch(holder)
    return context


def _hooked(model: nn.Module) -> ForwardContext | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ForwardContext)), None)


def context_in(model: nn.Module) -> ForwardContext:
    """The context that adapters of a model read.

    Raises:
        ValueError: it has none, because it has no such adapters.
    """
    found = next((context for m in model.modules() if (context := _hooked(m)) is not None), None)
    if found is None:
        raise ValueError("this model has no routed adapter; make one with get_peft_model(model, MonkeyJumpConfig(...))")
    return found


def remove_context(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), ForwardContext):
                    del hooks[key]
                    for marks in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        marks.pop(key, None)


def hidden_size(model: nn.Module, block: str, holder: nn.Module, first: BaseTunerLayer) -> int:
    """Width of the hidden states entering a block.

    What was registered holds. Else its own norm knows best (the width may differ from stage to stage),
    then the model's config, then the first adapted layer. Norms deeper inside may be as narrow as one
    attention head.
    """
    hook = hook_of(type(model.get_submodule(block)))
    if hook is not None and hook.hidden_size is not None:
        return int(hook.hidden_size(model.get_submodule(block)))
    for child in model.get_submodule(block).children():
        if type(child).__name__.endswith("Norm") and isinstance(weight := getattr(child, "weight", None), Tensor):
            return int(weight.shape[-1])
    width = getattr(getattr(holder, "config", None), "hidden_size", None)
    return int(first.in_features if width is None else width)
