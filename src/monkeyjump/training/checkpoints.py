"""Checkpoints that are complete or absent.

Trainer writes into `.writing`. What is whole there gets a manifest with the sha256 of every file, is forced to
the disk, renamed to `checkpoint-N`, and only then do older ones go. A kill at any moment leaves the last
complete one in its place; a file that was damaged later is found by its sum when it is resumed from.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from monkeyjump.tasks.cache import MANIFEST, verify_manifest, write_manifest
from monkeyjump.tasks.errors import InputError

ASIDE = ".writing"
PREFIX = "checkpoint-"
PICKLED = "training_args.bin"  # Trainer's own settings; never read, and nothing of ours is pickled


def number_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def found_in(folder: Path) -> list[Path]:
    """Checkpoints, newest first, complete or not."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=number_of, reverse=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. Says which ones it passes over, and why."""
    for path in found_in(folder):
        try:
            if not (path / MANIFEST).is_file():
                raise InputError(f"{path}: no {MANIFEST}: it was never complete")
            verify_manifest(path)
        except InputError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def finish(written: Path, folder: Path, keep: int) -> Path:
    """Makes what Trainer wrote a checkpoint of `folder`, and removes all but the `keep` newest."""
    (written / PICKLED).unlink(missing_ok=True)
    write_manifest(written)
    for path in written.rglob("*"):
        sync(path)
    sync(written)
    place = folder / written.name
    if place.exists():  # one that was passed over
        _remove(place)
    written.rename(place)
    sync(folder)
    for old in found_in(folder)[keep:]:
        _remove(old)
    return place


def clear_aside(folder: Path) -> None:
    """Removes what a killed process left unfinished."""
    for path in (folder / ASIDE, *folder.glob(".removed-*")):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Renamed first: half of a checkpoint must not look like one."""
    gone = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
