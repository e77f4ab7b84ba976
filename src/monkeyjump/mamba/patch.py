"""Stock Hugging Face Mamba models on our scans: the mixers' class is exchanged, nothing else.

Weights, names, hooks and what is saved stay as they are; `unpatch_mamba` puts the stock classes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from monkeyjump.mamba.patch_mixers import SCANNING

Model = TypeVar("Model", bound=nn.Module)
STOCK = {scanning: stock for stock, scanning in SCANNING.items()}


def patch_mamba(model: Model) -> Model:
    """The same model, its Mamba and Mamba-2 mixers on our scans; those that are already stay so.

    Raises:
        ValueError: the model has no mixer of a class in `SCANNING`.
    """
    if not _exchange(model, SCANNING) and not any(type(module) in STOCK for module in model.modules()):
        known = ", ".join(stock.__module__.split(".")[-2] for stock in SCANNING)  # the model types they belong to
        raise ValueError(
            f"model={type(model).__name__} has no Mamba mixer of transformers that can be patched: it takes models of "
            f"the types {known}"
        )
    return model


def unpatch_mamba(model: Model) -> Model:
    """The same model with Hugging Face's own mixers; a model that was not patched stays as it is."""
    _exchange(model, STOCK)
    return model


@contextmanager
def patched_mamba(model: Model) -> Iterator[Model]:
    """`with patched_mamba(model):` the model is patched inside; afterwards what was stock is stock again.

    Raises:
        ValueError: as `patch_mamba`.
    """
    before = [module for module in model.modules() if type(module) in SCANNING]
    patch_mamba(model)
    try:
        yield model
    finally:
        for module in before:
            _become(module, STOCK[type(module)])


def _exchange(model: nn.Module, classes: dict[type, type]) -> bool:
    """Whether a module was of one of these classes."""
    found = [module for module in model.modules() if type(module) in classes]
    for module in found:
        _become(module, classes[type(module)])
    return bool(found)


def _become(module: Any, cls: Any) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks call what they found as `forward`
        module._old_forward = MethodType(cls.forward, module)
