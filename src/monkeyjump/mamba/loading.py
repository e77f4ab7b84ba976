"""A causal language model by folder or Hub id: shrunk ones as well, Mamba on our scans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.patch_mixers import SCANNING
from monkeyjump.mamba.shrink import load_shrunk
from monkeyjump.mamba.shrink.remove import WIDTHS
from monkeyjump.tasks.models import load_base


def load_model(name: str | Path, load: Callable[[str | Path], Any] = load_base) -> Any:
    """In evaluation mode, in the dtype it was saved in. Raises InputError where the weights cannot be read.

    Args:
        load: reads a model that was not shrunk.
    """
    shrunk = WIDTHS in AutoConfig.from_pretrained(name).to_dict()
    model = load_shrunk(name, dtype="auto", use_safetensors=True) if shrunk else load(name)
    if any(type(module) in SCANNING for module in model.modules()):
        patch_mamba(model)
    return model
