"""Answers that the model writes: greedy, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from monkeyjump.evaluation.choices import Advance
from monkeyjump.evaluation.questions import Question, told
from monkeyjump.tasks.prompts import Collator


@torch.no_grad()
def generate_answers(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    collator: Collator,
    new_tokens: int,
    batch_size: int = 16,
    advance: Advance = lambda tokens: None,
) -> list[str]:
    """What the model writes after each prompt, up to the end token or `new_tokens`, without special tokens."""
    left = replace(collator, side="left")
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda row: questions[row].length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        asked = [questions[row] for row in rows]
        batch = left([{**question.inputs, "attention_mask": [1] * question.length} for question in asked])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with told(model, asked):
            written = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=collator.pad_id,
            )
        new = written[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True)):
            answers[row] = text.strip()
        advance(sum(question.length for question in asked))
    return answers
