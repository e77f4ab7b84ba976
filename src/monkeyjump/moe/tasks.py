"""Which task each row of a block belongs to: given with the batch, or else the nearest one (MoRE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monkeyjump.routing.checks import refuse_rows
from monkeyjump.routing.context import CACHE_KEYWORDS, ForwardContext
from monkeyjump.routing.pooling import IGNORED_LABEL, end_of_length
from monkeyjump.tuner.gates import GateBox

TASKS = "_monkeyjump_tasks"  # attribute of a KV cache: what its prompt was taken for
UNKNOWN = -1


@dataclass(frozen=True)
class TaskNote:
    """What one block shows the contrastive loss: `means` `[B, d]` in the graph, `tasks` long `[B]`."""

    means: Tensor
    tasks: Tensor


class TaskRouter:
    """Task ids of one block, in the place of a router: they travel as gates `[B, 1, 1]` (long) do.

    Args:
        name: the block's path.
        table: the `TaskTable` of the model.
    """

    inside = False  # the ids are known outside of gradient checkpoints only

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table, self.dim = name, table, table.in_features
        self.context: ForwardContext = table.context
        self.context.sequence_modes = True  # so that it says how much of the prompt a cache holds
        self.box = GateBox()

    def route(self, hidden: Tensor, block_kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
        """Ids of every active adapter for the hidden states `[B, T, d]` that enter the block.

        Raises:
            ValueError: nothing says which tasks a training batch holds, or an id is no task.
        """
        adapters = self.table.acting()
        if not adapters:
            return None
        given = self.context.tasks(hidden.shape[0], hidden.device)
        cache = next((c for k in CACHE_KEYWORDS if (c := block_kwargs.get(k)) is not None), None)
        return {adapter: self._ids(adapter, hidden, given, cache).view(-1, 1, 1) for adapter in adapters}

    def _ids(self, adapter: str, hidden: Tensor, given: Tensor | None, cache: Any) -> Tensor:
        learning = self.table.training and torch.is_grad_enabled()
        self._check(given, self.table.configs[adapter].num_tasks, learning)
        if not learning and (given is None or bool((given == UNKNOWN).any())):
            nearest = self._nearest(adapter, hidden, cache)
            return nearest if given is None else torch.where(given == UNKNOWN, nearest, given)
        assert given is not None
        frames = self.context.frames
        if self.table.auxiliary.wants(adapter) and not (frames and frames[-1].reads_encoder):
            # beside an encoder, a decoder's tokens are the answer, which no prompt tells
            self.table.auxiliary.note(adapter, TaskNote(self._means(hidden), given))
        return given

    def _check(self, given: Tensor | None, tasks: int, learning: bool) -> None:
        if given is None:
            if learning:
                raise ValueError(
                    "MoRE needs task_ids [B] with every training batch: pass task_ids=... to the model; under Trainer "
                    "set remove_unused_columns=False"
                )
            return
        least = 0 if learning else UNKNOWN
        unknown = "" if learning else ", and -1 where the task is not known"
        refuse_rows(
            (given < least) | (given >= tasks),
            f"task_ids holds {{task}}, but num_tasks={tasks}: use 0 to {tasks - 1}{unknown}",
            task=given,
        )

    def _nearest(self, adapter: str, hidden: Tensor, cache: Any) -> Tensor:
        """The nearest task of every row, as decided on the prompt: `[B]`."""
        frames = self.context.frames
        decided = None if cache is None else cache.__dict__.setdefault(TASKS, {})
        if frames and frames[-1].offset > 0:
            found = None if decided is None else decided.get((self.name, adapter))
            if found is None or len(found) != hidden.shape[0]:
                raise ValueError(
                    "no task_ids were given, and the cache already holds tokens for which no task was decided; start "
                    "with an empty cache, or pass task_ids"
                )
            return found
        table = self.table.mixture_tasks[adapter]
        with torch.autocast(hidden.device.type, enabled=False):
            means = self._means(hidden).to(table.device, table.dtype)
            found = (means @ F.normalize(table, dim=-1).T).argmax(-1).to(hidden.device)
        if decided is not None:
            decided[self.name, adapter] = found
        return found

    def _means(self, hidden: Tensor) -> Tensor:
        """Mean over the real tokens of every row's prompt, `[B, d]` float32."""
        batch, length, _ = hidden.shape
        counts = prompt_tokens(self.context, batch, length, hidden.device).unsqueeze(-1)
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        return torch.where(counts, exact, 0.0).sum(1) / counts.sum(1).clamp_min(1)


def prompt_tokens(context: ForwardContext, batch: int, length: int, device: torch.device) -> Tensor:
    """Which tokens are real and part of a prompt, bool `[B, T]`.

    A prompt ends before the first supervised label, or where the caller or generation says; what is
    supervised from its first token on has that token as its prompt, and what nobody speaks of is all prompt.
    """
    attended = context.attended(batch, length, device)
    positions = torch.arange(length, device=device)
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if attended is None else attended
    if (lengths := context.first("prompt_lengths")) is not None:
        end = end_of_length(lengths, attended, batch, length).to(device)
        return real & (positions <= end.unsqueeze(1))
    if (columns := context.prompt_columns(length)) is not None:
        return real & (positions < columns)
    labels = next((f.labels for f in reversed(context.frames) if f.labels is not None), None)
    if labels is None or labels.shape != (batch, length):
        return real
    supervised = (labels != IGNORED_LABEL).to(device)
    before = supervised.long().cumsum(1) == 0
    first = real & (real.long().cumsum(1) == 1)
    return (real & before) | first
