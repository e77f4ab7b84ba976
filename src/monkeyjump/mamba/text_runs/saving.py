"""A model and its tokenizer in Hugging Face's format, each file complete before it is where it is looked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from monkeyjump.training.checkpoints import sync
from monkeyjump.training.saving import SaveFailed, no_space

WEIGHTS = "model.safetensors"


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with no_space(folder):
        aside = _empty(folder / ".tokenizer")
        tokenizer.save_pretrained(aside)
        _move(aside, folder)


def save_model(model: Any, folder: Path) -> None:
    """config.json and the weights, written aside and read back before they take their place in `folder`.

    Raises:
        SaveFailed: the disk is full, or what was written is not what the model holds.
    """
    with no_space(folder):
        aside = _empty(folder / ".model")
        model.save_pretrained(aside)
        saved, held = load_file(aside / WEIGHTS), model.state_dict()
        wrong = next((name for name, tensor in saved.items() if not held[name].cpu().equal(tensor)), None)
        if wrong is not None:
            raise SaveFailed(f"{folder}: {wrong} is not what the model holds; nothing was replaced")
        _move(aside, folder)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _move(aside: Path, folder: Path) -> None:
    """Each file complete before it is where it is looked for."""
    for path in sorted(aside.iterdir()):
        sync(path)
        path.replace(folder / path.name)
    aside.rmdir()
