"""Pictures and videos of a row, as lists of PIL images.

A cell of a picture: a PIL image, {bytes:, path:}, a path, or a list of them. A cell of a video: a list of
pictures (its frames), a folder of pictures, an animated GIF or WebP, or a file that PyAV reads. A video is
always cut to the same number of evenly spaced frames, so that a batch of videos is one tensor.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from monkeyjump.tasks.description import Media, Task, base_folder
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.lines import Row
from monkeyjump.tasks.origins import IMAGE_SUFFIXES, suffix_of

ROOT = "MONKEYJUMP_MEDIA"
ANIMATED = ("gif", "webp")


def read_media(task: Task, media: Media, row: Row) -> tuple[Image.Image, ...]:
    """The row's pictures or frames, RGB. Raises InputError naming file, row and field."""
    cell = row.values[media.column]
    where = f"{row.where}, field '{media.column}'"
    try:
        if media.kind == "image":
            cells = cell if isinstance(cell, list | tuple) else [cell]
            return tuple(_picture(task, media, item, where) for item in cells)
        return tuple(_frames(task, media, cell, row, where))
    except (OSError, UnidentifiedImageError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{where}: cannot be read as {media.kind}: {error}", hint=f"correct the row, or media of task {task.name}"
        ) from error


def pick(count: int, frames: int) -> list[int]:
    """`frames` evenly spaced places among `count`, the middles of equal parts; repeated where there are fewer."""
    return ((np.arange(frames) + 0.5) * count / frames).astype(int).tolist()


def locate(task: Task, media: Media, name: str, where: str) -> Path:
    """A file or folder: absolute, inside MONKEYJUMP_MEDIA/folder, or beside the rows' file."""
    root = os.environ.get(ROOT)
    beside = base_folder(task)
    candidates = [Path(base) / media.folder / name for base in (root, beside) if base]
    for path in [*candidates, *([Path(name)] if Path(name).is_absolute() else [])]:
        if path.exists():
            return path
    looked = ", ".join(map(str, candidates)) or f"nowhere: {ROOT} is not set"
    raise InputError(
        f"{where}: {media.kind} '{name}' of task {task.name} not found (looked at {looked})",
        hint=f"set {ROOT} to the folder that holds the {media.kind}s",
    )


def _picture(task: Task, media: Media, cell: Any, where: str) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    if isinstance(cell, dict) and cell.get("bytes") is not None:
        return Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
    name = cell.get("path") if isinstance(cell, dict) else cell
    if not isinstance(name, str):
        raise InputError(
            f"{where}: expected a picture or its path, found {type(name).__name__}",
            hint=f"correct the row, or media.column of task {task.name}",
        )
    with Image.open(locate(task, media, name, where)) as picture:
        return picture.convert("RGB")


def _frames(task: Task, media: Media, cell: Any, row: Row, where: str) -> list[Image.Image]:
    if isinstance(cell, list | tuple):
        if not cell:
            raise InputError(f"{where}: a video without frames", hint="remove the row")
        return [_picture(task, media, cell[place], where) for place in pick(len(cell), media.frames)]
    if not isinstance(cell, str):
        raise InputError(
            f"{where}: expected frames or a path, found {type(cell).__name__}",
            hint=f"correct the row, or media.column of task {task.name}",
        )
    path = locate(task, media, cell, where)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file) in IMAGE_SUFFIXES)
        return _frames(task, media, [str(file.resolve()) for file in files], row, where)
    if suffix_of(path) in ANIMATED:
        with Image.open(path) as film:
            shown = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
        return [shown[place] for place in pick(len(shown), media.frames)]
    return _decode(path, media.frames, _second(row, media.start), _second(row, media.end))


def _second(row: Row, column: str | None) -> float | None:
    value = row.values.get(column) if column else None
    return None if value is None else float(value)


def _decode(path: Path, frames: int, start: float | None, end: float | None) -> list[Image.Image]:
    """Two passes, so that only the wanted frames are ever kept."""
    try:
        import av
    except ImportError as error:
        raise InputError(
            f"{path}: reading a video needs the av package", hint="python -m pip install 'monkeyjump[video]'"
        ) from error
    with av.open(str(path)) as film:
        times = [float(frame.time or 0.0) for frame in film.decode(video=0)]
    inside = [n for n, time in enumerate(times) if (start or 0.0) <= time <= (times[-1] if end is None else end)]
    if not inside:
        raise ValueError(f"no frame from second {start} to {end} of {times[-1] if times else 0:.1f}")
    wanted: Sequence[int] = [inside[place] for place in pick(len(inside), frames)]
    kept: dict[int, Image.Image] = {}
    with av.open(str(path)) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number in wanted:
                kept[number] = frame.to_image()
            if number == wanted[-1]:
                break
    return [kept[number] for number in wanted]
