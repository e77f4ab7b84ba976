"""Modules whose adapter would never act: their parent reads their weight and does not call them.

transformers' Mamba computes `self.dt_proj.weight @ x`, torch's `MultiheadAttention` hands
`self.out_proj.weight` to one function: an adapter on such a module is created, counted and saved,
changes nothing and gets no gradient. The source of the parent's class tells. The mixers that
`monkeyjump.mamba.patch_mamba` puts in place of transformers' call all their projections as modules.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("monkeyjump")
PATCHED = "monkeyjump.mamba.patch_mixers"  # named, not imported: it loads models of transformers
PATCHABLE = (
    "MambaMixer",
    "FalconMambaMixer",
    "JambaMambaMixer",
    "ZambaMambaMixer",
    "Mamba2Mixer",
    "BambaMixer",
    "Zamba2MambaMixer",
    "NemotronHMamba2Mixer",
    "GraniteMoeHybridMambaLayer",
    "FalconH1Mixer",
)
# what a mixer hands to mamba_ssm's fused kernels as weights, in training, and how its source shows it
FUSED_MIXER = {"x_proj": "mamba_inner_fn", "out_proj": r"mamba_inner_fn|outproj_weight=self\.out_proj\.weight"}


def check_reach(model: nn.Module, names: Iterable[str], training: bool) -> None:
    """Refuse targets whose adapter would be silent.

    Args:
        names: paths of the targeted modules.
        training: whether the adapters will train.

    Raises:
        ValueError: naming the modules, the reason and `exclude_modules`.
    """
    reasons: dict[str, list[str]] = {}
    for name in names:
        if (reason := why_silent(model, name, training)) is not None:
            reasons.setdefault(reason, []).append(name)
    for reason, silent in reasons.items():
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        leaves = sorted({name.rpartition(".")[2] for name in silent})
        raise ValueError(
            f"target_modules reaches {silent[0]}{more}: {reason}; leave it out of target_modules, or set "
            f"exclude_modules={leaves}"
        )


def call_adapters_in_evaluation(model: nn.Module) -> None:
    """Switch off torch's fast path where it would skip adapters.

    In evaluation `nn.TransformerEncoderLayer` hands its linear layers' weights to one function, and
    whatever PEFT has put in their place is not called.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    if fast and any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)
        logger.warning(
            "torch.backends.mha.set_fastpath_enabled(False) for this process: in evaluation the fast path of "
            "nn.TransformerEncoderLayer reads the weights of its linear layers and skips their adapters"
        )


def why_silent(model: nn.Module, name: str, training: bool) -> str | None:
    """Why an adapter on this module would not act, or would get no gradient; None where it does."""
    path, _, leaf = name.rpartition(".")
    owner: Any = type(model.get_submodule(path))
    if owner.__module__ == PATCHED:
        return f"{owner.__name__} reads conv1d.weight directly" if leaf == "conv1d" else None
    forward, everything = _sources(owner)
    remedy = " (patch_mamba of monkeyjump.mamba makes it act)" if _is_mended(owner, leaf) else ""
    if f"self.{leaf}.weight" in forward and not re.search(rf"self\.{leaf}\(", everything):
        return (
            f"{owner.__name__} reads {leaf}.weight directly and never calls the module, so its adapter would get no "
            f"gradient and change nothing{remedy}"
        )
    if leaf not in FUSED_MIXER or not re.search(FUSED_MIXER[leaf], forward):
        return None
    if leaf == "out_proj":
        return (
            f"the fused kernel of {owner.__name__} reads {leaf}.weight, so its adapter would act on some machines and "
            f"not on others, and PEFT refuses it on Mamba{remedy}"
        )
    if training and importlib.util.find_spec("mamba_ssm") is not None:
        reader = "mamba_ssm is installed, and its fused kernel"
        return f"{reader} reads {leaf}.weight in training and skips the adapter{remedy}"
    return None


def _is_mended(owner: type, leaf: str) -> bool:
    """Whether `patch_mamba` would make an adapter on this child act."""
    return owner.__name__ in PATCHABLE and leaf != "conv1d"


@functools.cache
def _sources(owner: type) -> tuple[str, str]:
    """The text of a module class's forward methods, and of all of it and its parents; empty where there is none."""
    classes = [cls for cls in owner.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    methods = [value for cls in classes for name, value in vars(cls).items() if "forward" in name and callable(value)]
    return "\n".join(map(_source, methods)), "\n".join(map(_source, classes))


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made at run time
        return ""
