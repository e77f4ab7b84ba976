"""`CenterUpdate`: what moves between optimizer steps: the centers, and AdaLoRA's ranks."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn
from transformers import TrainerCallback

from monkeyjump.presets import PRESETS
from monkeyjump.routing.collectives import Ranks, all_ranks
from monkeyjump.routing.ema import CenterStatistics, moved_centers, summed
from monkeyjump.suggest import check_choice
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.rank_allocation import allocating_tuner
from monkeyjump.tuner.router import Router
from monkeyjump.tuner.state import split_training_state, training_state

logger = logging.getLogger("monkeyjump")


@dataclass(frozen=True)
class _Moving:
    """Centers that this run moves; they may be deleted before it ends."""

    router: Router
    adapter: str
    shape: tuple[int, int]
    device: torch.device

    def take_pending(self) -> CenterStatistics:
        pending = self.router.pending.pop(self.adapter, None)
        return CenterStatistics.none(*self.shape, self.device) if pending is None else pending


class CenterUpdate(TrainerCallback):
    """Move the centers every `every` completed optimizer steps until step `until` (Eq. 6).

    Under Trainer: `Trainer(..., callbacks=[CenterUpdate()])`. In a plain loop:
    `CenterUpdate().attach(model, optimizer, total_steps=n)`, nothing else. Statistics are gathered in
    training forwards over all micro-batches since the last update; a step that was skipped
    (fp16 overflow) neither counts nor leaves its statistics. For AdaLoRA it also runs PEFT's rank
    schedule, which Trainer alone never calls.

    In a distributed run (torch.distributed is initialized) every rank has one, with the same schedule on the
    same adapters. After each step its statistics are summed over all ranks, so that every rank holds the same
    centers, and whichever rank writes a checkpoint writes what all of them gathered.

    A checkpoint saved in between carries what was gathered, in the adapter's file, so that a resumed
    run equals the uninterrupted one.

    Args:
        every: optimizer steps from one update to the next.
        until: last step with an update: an integer, or a share of all steps in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, every: int = 2, until: int | float = 0.6) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is out of range: use an integer of at least 1")
        share = isinstance(until, float) and 0 < until <= 1
        steps = isinstance(until, int) and not isinstance(until, bool) and until >= 0
        if not (share or steps):
            raise ValueError(f"until={until!r} is out of range: use a number of steps, or a share of them in (0, 1]")
        self.every, self.until = every, until
        self.completed = 0
        self.last: int | None = until if steps else None  # type: ignore[assignment]
        self._has_gradients = False  # since the last step
        self._undo: list[Callable[[], Any]] = []
        self._routers: list[Router] = []
        self._moving: list[_Moving] = []
        self._ranks = Ranks()
        self._adalora: AdaLoraModel | None = None

    @classmethod
    def from_preset(cls, preset: str) -> CenterUpdate:
        """The schedule of a preset: `recommended`, `paper`, `released`, `readme`, `ablation`."""
        check_choice("preset", preset, PRESETS)
        return cls(**PRESETS[preset].center_update)

    # ------------------------------------------------------------------ plain loops

    def attach(
        self, model: nn.Module, optimizer: Any, total_steps: int | None = None, completed: int = 0
    ) -> CenterUpdate:
        """Update after every step of `optimizer` (accelerate's wrapper is looked through).

        Args:
            total_steps: optimizer steps of the whole run; needed where `until` is a share.
            completed: steps that a resumed run has behind it; 0 starts anew.

        Raises:
            ValueError: the schedule does not fit the run, or another rank's schedule, adapters or centers differ.
        """
        self._begin(model, total_steps, completed)
        inner = getattr(optimizer, "optimizer", optimizer)
        self._undo = [inner.register_step_post_hook(self._after_step).remove, *self._watch_gradients(inner)]
        return self

    def detach(self) -> None:
        """Stop, and take the hooks off the optimizer."""
        self._stop()

    def _watch_gradients(self, optimizer: Any) -> list[Callable[[], Any]]:
        """Gradients that came and are cleared without a step: a scaler skipped it, and their statistics go, too.

        Clearing between forward and backward, before any gradient of this step, is no such case.
        """
        original = optimizer.zero_grad
        trained = next((p for group in optimizer.param_groups for p in group["params"] if p.requires_grad), None)
        if trained is None:
            raise ValueError("the optimizer has no parameter that trains; load the adapter with is_trainable=True")

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            if self._has_gradients:
                self.skip()
            original(*args, **kwargs)

        def note(parameter: Tensor) -> None:
            self._has_gradients = True

        optimizer.zero_grad = zero_grad
        handle = trained.register_post_accumulate_grad_hook(note)
        return [handle.remove, lambda: optimizer.__dict__.pop("zero_grad", None)]

    def _after_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        self._allocate_ranks(self.completed + 1)
        self.step()

    def step(self) -> None:
        """One optimizer step was completed."""
        self._has_gradients = False
        self.completed += 1
        due = self.completed % self.every == 0
        of_this_step = summed([moving.take_pending() for moving in self._moving], self._ranks.sum)
        for moving, statistics in zip(self._moving, of_this_step):
            router, adapter = moving.router, moving.adapter
            if adapter in router.centers:
                router.gathered[adapter] = statistics + router.gathered.get(adapter)
                router.steps[adapter] = self.completed
                if due:
                    _move(router, adapter)
        if self.last is not None and self.completed >= self.last:
            self._freeze()

    def skip(self) -> None:
        """The optimizer refused a step: forget what was gathered for it."""
        self._has_gradients = False
        for router in self._routers:
            router.pending.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Counter and gathered statistics, for plain loops that do not save the adapter with them."""
        state: dict[str, Tensor] = {"completed": torch.tensor(self.completed)}
        for adapter in self._adapters():
            for router in self._routers:
                state.update({f"{adapter}|{k}": v for k, v in training_state(router, adapter).items()})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`, after `attach`."""
        self.completed = int(state["completed"])
        for adapter in self._adapters():
            mine = {k.partition("|")[2]: v for k, v in state.items() if k.startswith(f"{adapter}|")}
            for router in self._routers:
                split_training_state(mine)[1].restore(router, adapter)
        if self.last is not None and self.completed >= self.last:
            self._freeze()

    def _adapters(self) -> list[str]:
        return sorted({adapter for router in self._routers for adapter in router.centers})

    # ------------------------------------------------------------------ Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        modes = {config.granularity for router in routers(model) for config in router.configs.values()}
        if args.remove_unused_columns and "task" in modes:
            raise ValueError(
                "remove_unused_columns=True takes task_ids out of the batches, which granularity='task' needs; set "
                "remove_unused_columns=False"
            )
        # global_step counts skipped steps as well; where updates still go on, the file has our own count
        saved = [r.steps[a] for r in routers(model) for a in r.active_adapters if a in r.steps]
        completed = saved[0] if saved and state.global_step else state.global_step
        self._begin(model, state.max_steps, completed)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not _was_skipped(optimizer):  # the gradients, which the ranks are allotted by, are still there
            self._allocate_ranks(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if _was_skipped(optimizer):
            self.skip()
        else:
            self.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    # ------------------------------------------------------------------ inside

    def _begin(self, model: nn.Module, total_steps: int | None, completed: int) -> None:
        ranks = all_ranks()
        _check_equal(ranks.exchange(ranks.together(lambda: self._prepare(model, total_steps, completed))))
        self._ranks = ranks
        if self.last is not None and 0 < self.last < self.every:
            logger.warning("CenterUpdate(every=%d, until=%s) never moves a center", self.every, self.until)

    def _prepare(self, model: nn.Module, total_steps: int | None, completed: int) -> dict[str, Any]:
        """Make ready to count steps; returns what must be the same on every rank, by name."""
        self._claim(routers(model))
        self._adalora = allocating_tuner(model, total_steps)
        if isinstance(self.until, float):
            if total_steps is None:
                raise ValueError(f"until={self.until} is a share of all steps: pass total_steps= to attach as well")
            self.last = math.floor(self.until * total_steps)
        self.completed = completed
        for router in self._routers:
            router.pending.clear()
            if not completed:
                router.gathered.clear()
            for adapter in [a for a in router.centers if not router.configs[a].inference_mode]:
                router.gathering[adapter] = self.last is None or completed < self.last
                if router.gathering[adapter]:
                    centers = router.centers[adapter]
                    self._moving.append(_Moving(router, adapter, tuple(centers.shape), centers.device))
        schedule = {"every": self.every, "until": self.last, "completed": self.completed}
        return {**schedule, **{f"{m.router.name} ({m.adapter})": _checksum(m) for m in self._moving}}

    def _claim(self, found: list[Router]) -> None:
        """Take the centers over; two schedules on them would count every step twice."""
        for former in {id(r.schedule): r.schedule for r in found if r.schedule not in (None, self)}.values():
            logger.warning("this CenterUpdate takes over from another one that was still at work")
            former.detach()
        self._stop()
        self._routers = found
        for router in found:
            router.schedule = self

    def _freeze(self) -> None:
        """Let the centers be; what was gathered for them is of no more use."""
        for router in self._routers:
            for kept in (router.gathering, router.pending, router.gathered, router.steps):
                kept.clear()
        self._moving = []

    def _stop(self) -> None:
        """Leave nothing of this run behind."""
        self._freeze()
        for undo in self._undo:
            undo()
        for router in self._routers:
            router.schedule = None
        self._undo, self._routers = [], []

    def _allocate_ranks(self, step: int) -> None:
        if self._adalora is not None:
            self._adalora.update_and_allocate(step)


def _checksum(moving: _Moving) -> str:
    """Centers and what is gathered for them already, in short."""
    gathered = moving.router.gathered.get(moving.adapter)
    tensors = [moving.router.centers[moving.adapter], *((gathered.sums, gathered.counts) if gathered else ())]
    return " ".join(f"{list(t.shape)} {zlib.crc32(t.cpu().numpy().tobytes()):08x}" for t in tensors)


def _check_equal(said: list[dict[str, Any]]) -> None:
    """Refuse a run whose ranks would move their centers apart, or wait for each other in vain."""
    for rank, theirs in enumerate(said):
        for name in [n for n in {**said[0], **theirs} if said[0].get(n) != theirs.get(n)]:
            raise ValueError(
                f"CenterUpdate: {name} is {said[0].get(name, 'absent')} on rank 0 and {theirs.get(name, 'absent')} on "
                f"rank {rank}; give every rank the same schedule, adapters and centers (initialize_centers after "
                "torch.distributed is initialized, or one adapter loaded on all ranks)"
            )


def _move(router: Router, adapter: str) -> None:
    gathered = router.gathered.pop(adapter, None)
    if gathered is not None:
        config, centers = router.configs[adapter], router.centers[adapter]
        centers.copy_(moved_centers(centers, gathered, config.ema_momentum, config.ema_space or "sphere"))


def _was_skipped(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "step_was_skipped", False))
