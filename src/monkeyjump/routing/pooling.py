"""One representation per sequence, for the granularities that route whole sequences (§3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monkeyjump.routing.checks import refuse_rows

Granularity = Literal["token", "last", "mean", "max", "prompt_end", "task"]
IGNORED_LABEL = -100  # transformers' mark of a position without supervision


def last_attended(attended: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Index of the last attended token of every row, whatever the padding side: long `[B]`."""
    if attended is None:
        return torch.full((batch,), length - 1, device=device)
    positions = torch.arange(length, device=device)
    return (attended.long() * positions).argmax(-1)


def prompt_end(labels: Tensor, attended: Tensor | None) -> Tensor:
    """Index of the token before the first supervised one: long `[B]`.

    A row that is supervised from its first token on has no prompt; that first token decides.

    Args:
        labels: `[B, T]`, unshifted, as transformers takes them.
        attended: bool `[B, T]`, or None where every token is.

    Raises:
        ValueError: a row has no supervised label, so its prompt has no end.
    """
    supervised = labels != IGNORED_LABEL
    refuse_rows(
        ~supervised.any(-1),
        "granularity='prompt_end': every label of row {row} of the batch is masked "
        f"({IGNORED_LABEL}), so the end of its prompt is unknown; drop such rows, or pass mj_prompt_lengths [B]",
    )
    end = supervised.long().argmax(-1) - 1
    start = torch.zeros_like(end) if attended is None else attended.long().argmax(-1).to(end.device)
    return torch.maximum(end, start)


def end_of_length(prompt_lengths: Tensor, attended: Tensor | None, batch: int, length: int) -> Tensor:
    """Index of the `prompt_lengths[b]`-th attended token of every row: long `[B]`.

    Args:
        prompt_lengths: `[B]`, attended tokens of the prompt.
        attended: bool `[B, T]`, or None where every token is.

    Raises:
        ValueError: not one length per row, or one outside its row.
    """
    lengths = prompt_lengths.long().flatten()
    most = torch.full((batch,), length, device=lengths.device)
    if attended is not None:
        most = attended.sum(-1).to(lengths.device)
    if len(lengths) != batch:
        raise ValueError(f"mj_prompt_lengths has {len(lengths)} values for a batch of {batch} rows; pass one per row")
    refuse_rows(
        (lengths < 1) | (lengths > most),
        "mj_prompt_lengths holds {length} for row {row}, which has {most} attended tokens; give the number of prompt "
        "tokens of every row, padding not counted",
        length=lengths,
        most=most,
    )
    if attended is None:
        return lengths - 1
    reached = attended.long().cumsum(-1) >= lengths.to(attended.device)[:, None]
    return reached.long().argmax(-1)


def pool(states: Tensor, granularity: Granularity, attended: Tensor | None, end: Tensor | None) -> Tensor:
    """The representation that decides for the whole sequence.

    Args:
        states: `[B, T, d]`.
        granularity: `last`, `mean`, `max` or `prompt_end`.
        attended: bool `[B, T]`, or None where every token is; padding never counts.
        end: long `[B]`, the prompt's last token, for `prompt_end`.

    Returns:
        `[B, 1, d]` float32; zeros for a row without any attended token (`mean`, `max`).
    """
    batch, length, _ = states.shape
    if granularity in ("last", "prompt_end"):
        index = last_attended(attended, batch, length, states.device) if end is None else end
        rows = torch.arange(batch, device=states.device)
        return states[rows, index.to(states.device)].unsqueeze(1).float()
    if attended is None:
        pooled = states.float().mean(1) if granularity == "mean" else states.amax(1).float()
        return pooled.unsqueeze(1)
    weight = attended.unsqueeze(-1)
    if granularity == "mean":
        total = torch.where(weight, states.float(), 0.0).sum(1)
        return (total / weight.sum(1).clamp_min(1)).unsqueeze(1)
    peak = states.float().masked_fill(~weight, -torch.inf).amax(1)
    return torch.where(weight.any(1), peak, 0.0).unsqueeze(1)
