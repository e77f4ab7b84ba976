"""Closed answers scored by log-likelihood: the model never writes, each choice is weighed.

Where all choices of a task differ in their first token, one forward per row is enough: the choices are
compared by the log-probability of that token. Otherwise each (row, choice) pair is run, and a choice
counts the mean log-probability of its tokens, so that long answers are not at a disadvantage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from monkeyjump.tasks.prompts import Collator, Tokens

Advance = Callable[[int], None]


def differ_at_first(choices: Sequence[Tokens]) -> bool:
    return len({tokens[0] for tokens in choices}) == len(choices)


@torch.no_grad()
def choice_scores(
    model: Any,
    prompts: Sequence[Tokens],
    choices: Sequence[Tokens],
    collator: Collator,
    batch_size: int = 16,
    advance: Advance = lambda tokens: None,
) -> Tensor:
    """Score of every choice for every prompt -> float32 [len(prompts), len(choices)], higher is likelier.

    `advance` is told the number of tokens after each batch. Set the model to eval mode before.
    """
    if differ_at_first(choices):
        jobs, answers = list(prompts), [[tokens[0] for tokens in choices]] * len(prompts)
        ends: list[tuple[int, ...]] = [(len(prompt) - 1,) for prompt in prompts]
    else:
        jobs = [prompt + tokens[:-1] for prompt in prompts for tokens in choices]
        answers = [tokens for _ in prompts for tokens in choices]
        ends = [
            tuple(range(len(prompt) - 1, len(prompt) + len(tokens) - 1)) for prompt in prompts for tokens in choices
        ]
    scores: list[Tensor] = [torch.empty(0)] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda job: len(jobs[job]))  # neighbors of one length: no padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        picked = _log_probs(model, [jobs[job] for job in batch], [ends[job] for job in batch], collator)
        for job, log_probs in zip(batch, picked):
            scores[job] = _score(log_probs, answers[job])
        advance(sum(len(jobs[job]) for job in batch))
    return torch.stack(scores).view(len(prompts), len(choices))


def _score(log_probs: Tensor, answer: Tokens) -> Tensor:
    """log_probs [positions, vocabulary]; one position: a score per token of `answer`, else their mean."""
    tokens = torch.tensor(answer, device=log_probs.device)
    if len(log_probs) == 1 and len(answer) > 1:
        return log_probs[0, tokens].cpu()
    return log_probs.gather(1, tokens[:, None]).mean().cpu()


def _log_probs(model: Any, sequences: list[Tokens], ends: list[tuple[int, ...]], collator: Collator) -> list[Tensor]:
    """Log-probabilities of the next token at the positions `ends` of each sequence, float32.

    Padding is on the right, where no causal model can see it. Only the wanted positions go through the
    output layer, where the model can do that.
    """
    rows = [{"input_ids": sequence, "attention_mask": [1] * len(sequence)} for sequence in sequences]
    batch = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
    wanted = sorted({position for positions in ends for position in positions})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        kept = torch.tensor(wanted, device=model.device)
        logits = model(**batch, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(**batch).logits[:, wanted]
    column = {position: index for index, position in enumerate(wanted)}
    return [
        row[[column[position] for position in positions]].float().log_softmax(-1)
        for row, positions in zip(logits, ends)
    ]
