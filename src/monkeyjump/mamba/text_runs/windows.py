"""Token ids as one stream, and the windows of it that a model is trained on.

    stream    END doc END doc ... END          [N]
    window    stream[o + i (L - 1) : ... + L]  [L], labels the same: the model shifts them

Neighbours share a token, so every token of the stream is predicted once in an epoch. Each epoch shifts its windows
by an offset o of its own: what one epoch predicts without context, the next one predicts with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monkeyjump.tasks.errors import InputError
from monkeyjump.training.losses import IGNORED

BATCH = 256  # texts that the tokenizer works on at once


def encode(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """The stream `[N]` of documents, END before, between and after them."""
    end = tokenizer.eos_token_id
    pieces: list[np.ndarray] = [np.array([end], dtype=np.int32)]
    for start in range(0, len(texts), BATCH):
        for ids in tokenizer(texts[start : start + BATCH], verbose=False)["input_ids"]:
            pieces.append(np.array([*ids, end], dtype=np.int32))
    return np.concatenate(pieces)


class Windows(torch.utils.data.Dataset):
    """The windows of a whole run in the order in which it reads them.

    Item k is a function of (stream, seed, k) alone, so a resumed run reads what it would have read.
    """

    def __init__(self, stream: np.ndarray, length: int, count: int, seed: int) -> None:
        """`count` windows of `length` tokens. Raises InputError for a stream shorter than one."""
        self.stream, self.length, self.count, self.seed = stream, length, count, seed
        self.per_epoch = windows_in(stream, length)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.start(index)
        ids = torch.from_numpy(self.stream[start : start + self.length].astype(np.int64))
        labels = torch.cat([ids.new_tensor([IGNORED]), ids[1:]])  # nothing predicts the first; Trainer counts labels
        return {"input_ids": ids, "labels": labels, "row_ids": index}

    def start(self, index: int) -> int:
        """Place in the stream of the first token of item `index`."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            draw = np.random.default_rng([self.seed, epoch])
            room = len(self.stream) - self.length - (self.per_epoch - 1) * (self.length - 1)
            offset = draw.integers(room + 1)
            self._epoch = epoch
            self._starts = offset + (self.length - 1) * draw.permutation(self.per_epoch)
        return int(self._starts[place])

    def where(self, index: int) -> str:
        start = self.start(index)
        return f"tokens {start:,} to {start + self.length - 1:,} of the text"


def windows_in(stream: np.ndarray, length: int) -> int:
    """Windows of an epoch: one fewer than fit, where more than one does, to leave room for the offset."""
    fitting = (len(stream) - 1) // (length - 1)
    if not fitting:
        raise InputError(
            f"context_length = {length}: the training text has only {len(stream)} tokens",
            hint=f"give more text, or set context_length={max(8, len(stream) // 8)}",
        )
    return max(1, fitting - 1)


def collate(rows: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """`[B, L]` each, and the numbers `[B]` of the windows."""
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "row_ids")}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    return {
        "input_ids": torch.stack(columns["input_ids"]),
        "labels": torch.stack(columns["labels"]),
        "row_ids": torch.tensor(columns["row_ids"]),
    }
