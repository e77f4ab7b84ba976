"""What one timed pass is: a training step, a forward pass, a prefill, a few decoded tokens."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from monkeyjump.bench.candidates import Candidate
from monkeyjump.bench.timing import Work


def tokens(vocabulary: int, batch: int, length: int, seed: int, device: str) -> Tensor:
    """`[batch, length]` random token ids, the same for every candidate."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)


def vocabulary_of(model: Any) -> int:
    return model.get_input_embeddings().num_embeddings


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The loss of a training forward over `[B, T]` ids; where a method asks for tasks, rows take turns."""
    tasks = getattr(model.peft_config["default"], "num_tasks", None) if isinstance(model, PeftModel) else None
    given = {} if tasks is None else {"task_ids": torch.arange(len(ids), device=ids.device) % tasks}
    return model(input_ids=ids, labels=ids, use_cache=False, **given).loss


def clear_gradients(model: Any) -> None:
    # not optimizer.zero_grad: for a center schedule that means a skipped step, whose statistics it drops
    for parameter in model.parameters():
        parameter.grad = None


def training_step(candidate: Candidate, ids: Tensor, with_optimizer: bool = False) -> Work:
    """Forward and backward over `[B, T]` ids, gradients cleared outside the timed part."""

    def prepare() -> None:
        candidate.model.train()
        clear_gradients(candidate.model)

    def run(_: None) -> None:
        loss_of(candidate.model, ids).backward()
        if with_optimizer and candidate.optimizer is not None:
            candidate.optimizer.step()

    return Work(prepare, run)


def forward(candidate: Candidate, ids: Tensor) -> Work:
    """One inference forward over `[B, T]` ids, without a cache."""
    return _inference(candidate, lambda _: candidate.model(input_ids=ids, use_cache=False).logits)


def prefill(candidate: Candidate, ids: Tensor) -> Work:
    """The prompt `[1, T]` into a fresh cache."""
    return _inference(candidate, lambda _: _filled(candidate, ids))


def decode(candidate: Candidate, ids: Tensor, count: int) -> Work:
    """`count` greedy tokens after the prompt `[1, T]`, one at a time; the prompt itself is not timed."""

    def run(cache: Any) -> Tensor:
        token = ids[:, -1:]
        for _ in range(count):
            output = candidate.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return token

    return _inference(candidate, run, lambda: _filled(candidate, ids))


def _filled(candidate: Candidate, ids: Tensor) -> Any:
    """The cache after the prompt."""
    return candidate.model(input_ids=ids, use_cache=True).past_key_values


def _inference(candidate: Candidate, run: Any, before: Any = lambda: None) -> Work:
    @torch.no_grad()
    def prepare() -> Any:
        candidate.model.eval()
        return before()

    return Work(prepare, torch.no_grad()(run))
