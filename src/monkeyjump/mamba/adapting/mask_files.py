"""Learned masks as a file, to cut by them later, at any sparsity.

masks.safetensors   "logits.<block>" float32 [units], "kept.<block>" bool [units]
                    metadata "masks": JSON with format and target_sparsity

Units are numbered as in the model that was given to `adapt`, before an order was folded in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from monkeyjump.mamba.channels import ChannelGroup
from monkeyjump.mamba.masks import LearnedMasks
from monkeyjump.mamba.selection import select_kept
from monkeyjump.tasks.errors import InputError
from monkeyjump.training.checkpoints import sync
from monkeyjump.training.saving import no_space

MASKS, FORMAT = "masks.safetensors", 1
ABOUT = "masks"  # one entry of metadata: safetensors writes several in a random order, and bytes would differ
LOGITS, KEPT = "logits.", "kept."


@dataclass(frozen=True)
class SavedMasks:
    """By block: learned logits `[units]`, and which units stay, `bool [units]`; `sparsity` is what was learned for."""

    logits: dict[str, Tensor]
    kept: dict[str, Tensor]
    sparsity: float

    @classmethod
    def of(cls, masks: LearnedMasks) -> SavedMasks:
        """The masks of a model as it is now. Raises ValueError for element masks, which choose no units."""
        logits = {name: values.detach().float().cpu() for name, values in masks.ranking().items()}
        kept = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in logits.items()}
        for name, units in masks.kept().items():
            kept[name][units.cpu()] = True
        return cls(logits, kept, masks.config.target_sparsity)

    def reordered(self, orders: Mapping[str, Tensor]) -> SavedMasks:
        """For the model after `fold(model, orders)`: `int64 [units]` by block."""
        logits = {name: values[orders[name]] for name, values in self.logits.items()}
        return SavedMasks(logits, {name: stay[orders[name]] for name, stay in self.kept.items()}, self.sparsity)

    def select(
        self, groups: Mapping[str, ChannelGroup], sparsity: float | None = None, block: int = 1
    ) -> dict[str, Tensor]:
        """Units that stay, ascending `int64` per group: those of the file, at another sparsity or block re-selected.

        Raises ValueError as `select_kept` does.
        """
        if block == 1 and sparsity in (None, self.sparsity):
            return {name: self.kept[name].nonzero().flatten() for name in groups}
        return select_kept(groups, self.logits, self.sparsity if sparsity is None else sparsity, block=block)


def save_masks(masks: SavedMasks, path: Path) -> None:
    """The file appears whole or not at all. Raises SaveFailed where the disk is full."""
    tensors = {f"{LOGITS}{name}": values.contiguous() for name, values in masks.logits.items()}
    tensors |= {f"{KEPT}{name}": stay.contiguous() for name, stay in masks.kept.items()}
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    with no_space(path.parent):
        save_file(tensors, aside, {ABOUT: json.dumps({"format": FORMAT, "target_sparsity": masks.sparsity})})
        sync(aside)
        aside.replace(path)


def load_masks(place: Path) -> SavedMasks:
    """What `save_masks` wrote: the file, or the folder of a run that has it.

    Raises InputError where it is missing, damaged or of another format.
    """
    path = place / MASKS if place.is_dir() else place
    if not path.is_file():
        raise InputError(
            f"{place}: no {MASKS} in it" if place.is_dir() else f"{path}: no such file",
            hint="a finished run of `monkeyjump mamba adapt` with masks has one",
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: no whole safetensors file ({error})", hint="copy it again") from error
    logits = {name.removeprefix(LOGITS): found for name, found in tensors.items() if name.startswith(LOGITS)}
    kept = {name.removeprefix(KEPT): found for name, found in tensors.items() if name.startswith(KEPT)}
    whole = kept.keys() == logits.keys() and all(kept[name].shape == logits[name].shape for name in kept)
    if about.get("format") != FORMAT or not whole:
        raise InputError(f"{path}: holds no learned masks", hint=f"`monkeyjump mamba adapt` writes {MASKS}")
    return SavedMasks(logits, kept, float(about["target_sparsity"]))


def check_fit(masks: SavedMasks, ours: Mapping[str, int], source: str) -> None:
    """Raises InputError, naming both shapes, where the masks are not those of a model with these units by block."""
    theirs = {name: len(values) for name, values in masks.logits.items()}
    if theirs == ours:
        return
    wrong = next((name for name in ours if theirs.get(name) != ours[name]), None)
    if wrong is None or wrong not in theirs:
        said = f"masks of {len(theirs)} blocks {_shapes(theirs)}, the model has {len(ours)} {_shapes(ours)}"
    else:
        said = f"a mask of {theirs[wrong]} units for {wrong}, which has {ours[wrong]} in the model"
    raise InputError(
        f"{source}: {said}", hint="give the model that the masks were learned on, before anything was cut from it"
    )


def _shapes(units: Mapping[str, int]) -> str:
    named = [f"{name} [{count}]" for name, count in list(units.items())[:2]]
    return f"({', '.join(named)}{', ...' if len(units) > 2 else ''})"
