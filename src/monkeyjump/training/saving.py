"""An adapter folder that is either complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monkeyjump.tasks.cache import folder_in_one_piece


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter aside and renames it to `folder`, replacing an older one."""
    with folder_in_one_piece(folder) as aside:
        model.save_pretrained(aside, safe_serialization=True)
