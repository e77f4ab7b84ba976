"""An adapter folder that is either complete or absent, and that was looked into after it was written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from monkeyjump.tasks.cache import folder_in_one_piece, write_manifest
from monkeyjump.training.checkpoints import PICKLED, sync

NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class SaveFailed(RuntimeError):
    """Nothing was replaced: what was there before is there still."""


def save_adapter(model: Any, folder: Path, write: Callable[[str], None] | None = None) -> None:
    """Writes the adapter aside, reads it back, and renames it to `folder`, replacing an older one.

    Args:
        write: writes the adapter into a folder, where `model.save_pretrained` is not the way (sharded models).

    Raises:
        SaveFailed: the disk is full, or what was written is not what the model holds.
    """
    with no_space(folder), folder_in_one_piece(folder) as aside:
        if write is None:
            model.save_pretrained(aside, safe_serialization=True)
        else:
            write(str(aside))
            (aside / PICKLED).unlink(missing_ok=True)
        check_saved(model, aside, whole=write is None)
        write_manifest(aside)
        for path in aside.iterdir():
            sync(path)


def check_saved(model: Any, folder: Path, whole: bool = True) -> None:
    """Raises SaveFailed unless every tensor in the file is there, finite and, if `whole`, equal to the model's."""
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    empty = next((name for name, tensor in saved.items() if not tensor.numel() or not tensor.isfinite().all()), None)
    if not saved or empty is not None:
        raise SaveFailed(f"{folder}: {empty or 'the file'} is empty or not finite; nothing was replaced")
    if not whole:
        return
    held = get_peft_model_state_dict(model)
    wrong = next((name for name in held if name not in saved or not held[name].cpu().equal(saved[name])), None)
    if wrong is not None:
        raise SaveFailed(f"{folder}: {wrong} is not what the model holds; nothing was replaced")


def try_saving(model: Any, folder: Path) -> int:
    """Saves the adapter, reads it back and removes it: before hours of training. Returns its bytes."""
    trial = folder / ".trial"
    try:
        save_adapter(model, trial)
        return sum(path.stat().st_size for path in trial.iterdir())
    finally:
        shutil.rmtree(trial, ignore_errors=True)


@contextmanager
def no_space(folder: Path) -> Iterator[None]:
    """A full disk as one sentence with the path. Writers report it in their own ways."""
    try:
        yield
    except Exception as error:
        numbers = {getattr(error, "errno", None)} | {n for n in NO_SPACE if f"os error {n}" in str(error)}
        if not numbers & NO_SPACE:
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        raise SaveFailed(
            f"{folder} could not be written: no space ({free / 2**20:.0f} MiB free); what was complete is still there: "
            "make room and go on with --resume"
        ) from error
