"""From what a user has (a loader, rows, texts) to batches that a model can be called with."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from monkeyjump.routing.context import OURS
from monkeyjump.routing.pooling import IGNORED_LABEL


def batches_of(
    data: Any, tokenizer: Any, batch_size: int, seed: int, rank: int = 0, size: int = 1
) -> Iterator[Mapping[str, Any]]:
    """Batches of `data`, which is a loader or iterable of batches, a data set of rows, or texts.

    Rows and texts come in a seeded random order, of which rank r of `size` takes the batches r, r + size, ...;
    batches come as they are.

    Raises:
        ValueError: a single mapping; in iterating, texts without a tokenizer or rows without `input_ids`.
    """
    if isinstance(data, Mapping):
        raise ValueError(
            f"data is a single mapping of {', '.join(map(str, data))}; pass a list of batches, a loader, or one split "
            "of a data set"
        )
    if _is_data_set(data):
        count = len(data)
        if _is_batch(data[0]):
            return (data[i] for i in range(count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        starts = range(rank * batch_size, count, size * batch_size)
        return _batches_of_rows(
            (data[i] for start in starts for i in order[start : start + batch_size]), tokenizer, batch_size
        )
    items = iter(data)
    first = next(items, None)
    if first is None:
        return iter(())
    items = chain([first], items)
    return items if _is_batch(first) else _batches_of_rows(items, tokenizer, batch_size)


def identity(data: Any) -> str | None:
    """What tells one data set of rows from another; None where `data` is a share of batches or a stream."""
    if isinstance(data, Mapping) or not _is_data_set(data) or _is_batch(data[0]):
        return None
    ends = zlib.crc32(f"{data[0]!r} {data[len(data) - 1]!r}".encode())
    return f"{len(data)} rows (checksum of the first and last: {ends:08x})"


def _is_data_set(data: Any) -> bool:
    """Whether items can be had by number, and there are any."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data) > 0


def _is_batch(item: Any) -> bool:
    """Whether an item has a batch dimension already: two-dimensional ids, or other tensors (images, say)."""
    if not isinstance(item, Mapping):
        return False
    ids = item.get("input_ids")
    return ids.dim() == 2 if torch.is_tensor(ids) else ids is None and any(map(torch.is_tensor, item.values()))


def _batches_of_rows(rows: Iterator[Any], tokenizer: Any, batch_size: int) -> Iterator[Mapping[str, Any]]:
    while batch := list(islice(rows, batch_size)):
        if isinstance(batch[0], str):
            if tokenizer is None:
                raise ValueError("data is a list of texts: pass the model's tokenizer=, too")
            batch = [dict(tokenizer(row, truncation=True)) for row in batch]
        yield _collate(batch)


def _collate(rows: list[Any]) -> dict[str, Tensor]:
    """Rows of lists, padded on the right to the longest: masks and labels say what is padding."""
    if not isinstance(rows[0], Mapping) or "input_ids" not in rows[0]:
        has = ", ".join(rows[0]) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
        raise ValueError(f"data has rows without input_ids (they hold: {has}); tokenize them first")
    rows = [{**row, "attention_mask": row.get("attention_mask", [1] * len(row["input_ids"]))} for row in rows]
    batch = {}
    for name, value in rows[0].items():
        if not _is_numeric(value):
            continue
        tensors = [torch.as_tensor(row[name]) for row in rows]
        if tensors[0].dim() == 0:
            batch[name] = torch.stack(tensors)
        elif tensors[0].dim() == 1:
            fill = IGNORED_LABEL if name == "labels" else 0
            batch[name] = pad_sequence(tensors, batch_first=True, padding_value=fill)
        else:
            batch[name] = torch.stack(tensors)
    return batch


def _is_numeric(value: Any) -> bool:
    """Numbers, nested lists of numbers, tensors and arrays; texts and the like stay behind."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_numeric, value))
    return torch.is_tensor(value) or hasattr(value, "__array__") or isinstance(value, (int, float))


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a batch into what the model is called with and what its routers are told.

    Labels go to the routers alone (`prompt_end` reads them), so that no loss is computed; an
    encoder-decoder needs them to know its decoder's input. Columns that the model does not take are
    left out, and logits that nobody reads are not computed.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes = inspect.signature(base.forward).parameters
    device = next(base.parameters()).device
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k in takes}
    if not inputs:
        raise ValueError(
            f"data has batches of {', '.join(batch)}, none of which the model takes ({', '.join(takes)}); rename them"
        )
    told = {OURS[k]: v.to(device) for k, v in batch.items() if k in OURS and v is not None}
    encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if not encoder_decoder and inputs.get("labels") is not None:
        told["labels"] = inputs.pop("labels")
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs, told
