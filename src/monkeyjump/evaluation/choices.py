"""Closed answers scored by log-likelihood: the model never writes, each choice is weighed.

Where all choices of a row differ in their first token, one forward is enough: they are compared by the
log-probability of that token. Otherwise each (row, choice) pair is run, and a choice counts the mean
log-probability of its tokens, so that long answers are not at a disadvantage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monkeyjump.evaluation.questions import Question, told
from monkeyjump.tasks.prompts import Collator, Tokens

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Pass:
    """One sequence through the model: a row's prompt, alone or with the tokens of one choice."""

    row: int
    choice: int  # -1: all of them, by their first tokens
    tokens: Tokens
    ends: tuple[int, ...]  # positions whose next token is looked at


def differ_at_first(choices: Sequence[Tokens]) -> bool:
    return len({tokens[0] for tokens in choices}) == len(choices)


@torch.no_grad()
def choice_scores(
    model: Any,
    questions: Sequence[Question],
    collator: Collator,
    batch_size: int = 16,
    advance: Advance = lambda tokens: None,
) -> list[Tensor]:
    """Score of every choice of every row -> float32 [choices of the row] each, higher is likelier.

    `advance` is told the number of tokens after each batch. Set the model to eval mode before.
    """
    passes = sorted(_passes(questions), key=lambda one: len(one.tokens))  # neighbors of one length: no padding
    scores = [torch.empty(len(question.choices)) for question in questions]
    for start in range(0, len(passes), batch_size):
        batch = passes[start : start + batch_size]
        for one, log_probs in zip(batch, _log_probs(model, questions, batch, collator)):
            choices = questions[one.row].choices
            if one.choice < 0:
                scores[one.row] = log_probs[0, [tokens[0] for tokens in choices]].cpu()
            else:
                wanted = torch.tensor(choices[one.choice], device=log_probs.device)
                scores[one.row][one.choice] = log_probs.gather(1, wanted[:, None]).mean().cpu()
        advance(sum(len(one.tokens) for one in batch))
    return scores


def _passes(questions: Sequence[Question]) -> list[_Pass]:
    found = []
    for row, question in enumerate(questions):
        prompt: Tokens = list(question.inputs["input_ids"])
        last = len(prompt) - 1
        if differ_at_first(question.choices):
            found.append(_Pass(row, -1, prompt, (last,)))
            continue
        for number, tokens in enumerate(question.choices):
            ends = tuple(range(last, last + len(tokens)))
            found.append(_Pass(row, number, prompt + list(tokens[:-1]), ends))
    return found


def _log_probs(model: Any, questions: Sequence[Question], batch: list[_Pass], collator: Collator) -> list[Tensor]:
    """Log-probabilities of the next token at the `ends` of each pass, float32.

    Padding is on the right, where no causal model can see it. Only the wanted positions go through the
    output layer, where the model can do that.
    """
    asked = [questions[one.row] for one in batch]
    rows = [
        {**question.inputs, "input_ids": one.tokens, "attention_mask": [1] * len(one.tokens)}
        for question, one in zip(asked, batch)
    ]
    inputs = {name: tensor.to(model.device) for name, tensor in collator(rows).items()}
    wanted = sorted({position for one in batch for position in one.ends})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with told(model, asked):
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            kept = torch.tensor(wanted, device=model.device)
            logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
        else:
            logits = model(**inputs).logits[:, wanted]
    column = {position: index for index, position in enumerate(wanted)}
    return [row[[column[position] for position in one.ends]].float().log_softmax(-1) for row, one in zip(logits, batch)]
