"""A model cut without training: the channels with the lowest Taylor scores go, or those that learned masks close."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from monkeyjump.mamba.adapting.comparison import before_and_after
from monkeyjump.mamba.adapting.export import unit_counts
from monkeyjump.mamba.adapting.mask_files import SavedMasks, check_fit, load_masks
from monkeyjump.mamba.adapting.stages import calibration, left_alone
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.order.order import METHODS
from monkeyjump.mamba.perplexity import check_window
from monkeyjump.mamba.selection import select_kept
from monkeyjump.mamba.shrink import repair, shrink
from monkeyjump.mamba.text_runs.corpus import read_texts
from monkeyjump.mamba.text_runs.saving import save_model, save_tokenizer
from monkeyjump.mamba.text_runs.windows import encode, windows_in
from monkeyjump.suggest import check_choice
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import check_model, load_tokenizer
from monkeyjump.training import folder as files
from monkeyjump.training.run import Display

HELD_OUT = 0.05  # of the text, where no other is given
SPARSITY = 0.5  # where neither a number nor masks say it


@dataclass(frozen=True)
class ShrinkRequest:
    """`block` > 1: whole runs of so many neighbors go, after `order` was folded in.

    `masks`: learned ones, a file or the folder of the run that learned them, in place of Taylor scores; `sparsity` is
    then what they were learned for, unless another is given.
    """

    model: str
    text: list[str]
    output: Path
    sparsity: float | None = None
    masks: Path | None = None
    held_out_text: list[str] = field(default_factory=list)
    order: str | None = None
    block: int = 1
    repair: bool = False
    context_length: int = 256
    batch_size: int = 4
    calibration_batches: int = 8
    seed: int = 0


def shrink_model(request: ShrinkRequest, display: Display) -> dict[str, Any]:
    """Writes the smaller model to `output` and returns result.json's content.

    Raises:
        InputError: for names and numbers that are wrong, before anything is written.
        SaveFailed: the disk is full.
    """
    _check(request)
    masks = None if request.masks is None else load_masks(request.masks)
    train, held_out = read_texts(request.text, request.held_out_text, HELD_OUT, request.seed, display)
    tokenizer = load_tokenizer(request.model)
    stream = encode(tokenizer, train.texts)
    windows_in(stream, request.context_length)
    dense = load_model(request.model).float()
    for line in left_alone(dense):
        display.note(line)
    batches = calibration(stream, request)
    model = copy.deepcopy(dense)
    try:
        units = {name: group.units for name, group in channel_groups(model).items()}
        if masks is not None:
            check_fit(masks, units, f"--masks {request.masks}")
        order, kept = _choose(model, request, masks, batches)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    shrink(model, kept)
    if request.repair:
        repair(model, dense, batches)
    with files.made(request.output, "--output"):
        save_tokenizer(tokenizer, request.output)
        save_model(model, request.output)
        if order is not None:
            order.save(request.output / "order")
    result = {
        "masks": None if request.masks is None else str(request.masks),
        "parameters_before": dense.num_parameters(),
        "parameters": model.num_parameters(),
        **unit_counts(units, kept),
        "repaired": request.repair,
        **before_and_after(dense, model, order, tokenizer, held_out.texts, request),
    }
    files.write_json(request.output / files.RESULT, result)
    return result


def _choose(
    model: Any, request: ShrinkRequest, masks: SavedMasks | None, batches: list[Any]
) -> tuple[ChannelOrder | None, dict[str, Tensor]]:
    """The order, folded into `model`, and the units that stay, `int64` by block."""
    order, sparsity = None, request.sparsity
    if request.order is not None:
        order = ChannelOrder(request.order, seed=request.seed)
        order.update(model, batches)
    groups = channel_groups(model)
    if masks is None:
        scores = channel_importance(model, batches, groups)
        return order, select_kept(groups, scores, SPARSITY if sparsity is None else sparsity, block=request.block)
    return order, (masks if order is None else masks.reordered(order.orders)).select(groups, sparsity, request.block)


def _check(request: ShrinkRequest) -> None:
    if request.sparsity is not None and not 0 <= request.sparsity < 1:
        raise InputError(f"--sparsity = {request.sparsity}: it must be at least 0 and below 1")
    if request.order is not None:
        try:
            check_choice("--order", request.order, METHODS)
        except ValueError as error:
            raise InputError(str(error)) from error
    check_window(request.context_length, request.context_length)
    if request.output.exists() and (not request.output.is_dir() or any(request.output.iterdir())):
        raise InputError(f"--output: {request.output} holds something else", hint="name a new folder")
    check_model(request.model)
