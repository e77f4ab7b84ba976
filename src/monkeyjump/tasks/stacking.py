"""Pictures and videos of several rows as the tensors that a model takes.

pixel_values         [pictures, tiles, 3, H, W]   all pictures of the batch, row after row; missing tiles are 0
image_sizes          [pictures, 2]                height and width before tiling
batch_num_images     [rows with pictures]
pixel_values_videos  [videos, frames, 3, H, W]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from monkeyjump.tasks.errors import InputError

TILED, VIDEOS = "pixel_values", "pixel_values_videos"
JOINED = ("image_sizes", "batch_num_images")


def stack_media(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows without pictures add nothing: a model finds each row's pictures by its placeholder tokens."""
    batch = {}
    tiled = [torch.as_tensor(row[TILED]) for row in rows if row.get(TILED) is not None]
    if tiled:
        most = max(pictures.shape[1] for pictures in tiled)
        batch[TILED] = torch.cat([_with_tiles(pictures, most) for pictures in tiled])
    for name in JOINED:
        found = [torch.as_tensor(row[name]) for row in rows if row.get(name) is not None]
        if found:
            batch[name] = torch.cat(found)
    videos = [torch.as_tensor(row[VIDEOS]) for row in rows if row.get(VIDEOS) is not None]
    if videos:
        lengths = {video.shape[1] for video in videos}
        if len(lengths) > 1:
            raise InputError(
                f"videos of {sorted(lengths)} frames in one batch", hint="give all video tasks the same media.frames"
            )
        batch[VIDEOS] = torch.cat(videos)
    return batch


def _with_tiles(pictures: Tensor, count: int) -> Tensor:
    missing = count - pictures.shape[1] if pictures.ndim == 5 else 0
    return pad(pictures, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else pictures
