"""Linear probes: how much of a task's answer can be read off the hidden states (Fig. 6a, b).

A logistic regression per block, place and task: from the state that enters the block, at one token or pooled
over the prompt, to the right answer; trained on training rows, scored on test rows.

    first, end-1, end-10, end-20, end-30   one token; rows that are too short are left out
    mean, max                              over the prompt's tokens
    attention                              weights: softmax of the tokens' cosines with the last one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monkeyjump.evaluation.intervals import Estimate, accuracy
from monkeyjump.evaluation.questions import Question, told
from monkeyjump.tasks import InputError
from monkeyjump.tasks.prompts import Collator

PLACES = ("first", "end-1", "end-10", "end-20", "end-30", "mean", "max", "attention")


@dataclass(frozen=True)
class Probe:
    """Accuracy of one probe on test rows; `chance` is the share of the most frequent answer there."""

    task: str
    layer: int
    place: str
    accuracy: Estimate
    chance: float
    train_rows: int
    test_rows: int


def at_place(states: Tensor, place: str) -> Tensor | None:
    """One vector `[d]` of a row's states `[T, d]`; None where the row is too short."""
    if place == "first":
        return states[0]
    if place.startswith("end-"):
        back = int(place.removeprefix("end-"))
        return states[-back] if back <= len(states) else None
    if place == "mean":
        return states.mean(0)
    if place == "max":
        return states.amax(0)
    unit = torch.nn.functional.normalize(states, dim=-1)
    return (unit @ unit[-1]).softmax(0) @ states


@torch.no_grad()
def features(
    model: Any, questions: Sequence[Question], collator: Collator, layers: Sequence[int], batch_size: int = 16
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """(layer, place) -> vectors `[rows, d]` float32, and the numbers of the rows that they are of."""
    found: dict[tuple[int, str], list[tuple[int, np.ndarray]]] = {(n, p): [] for n in layers for p in PLACES}
    for start in range(0, len(questions), batch_size):
        asked = [questions[row] for row in range(start, min(start + batch_size, len(questions)))]
        batch = collator([{**question.inputs, "attention_mask": [1] * question.length} for question in asked])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with told(model, asked):
            states = model(**inputs, output_hidden_states=True).hidden_states
        for layer in layers:
            for number, question in enumerate(asked):
                own = states[layer][number, : question.length].float().cpu()
                for place in PLACES:
                    if (vector := at_place(own, place)) is not None:
                        found[layer, place].append((start + number, vector.numpy()))
    return {
        key: (np.stack([vector for _, vector in rows]), np.array([row for row, _ in rows]))
        for key, rows in found.items()
        if rows
    }


def fit_probe(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], seed: int = 0
) -> tuple[list[bool], float]:
    """Right or wrong on each test row, and chance. `train`, `test`: vectors `[rows, d]` and their answers.

    Raises InputError where scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise InputError(f"probes need scikit-learn: {error}", hint="python -m pip install scikit-learn") from error
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    model.fit(*train)
    counts = np.unique(test[1], return_counts=True)[1]
    return (model.predict(test[0]) == test[1]).tolist(), float(counts.max() / len(test[1]))


def probe_task(
    model: Any,
    name: str,
    train: Sequence[Question],
    test: Sequence[Question],
    collator: Collator,
    layers: Sequence[int],
    batch_size: int = 16,
) -> list[Probe]:
    """All probes of one task with closed answers."""
    sides = [features(model, rows, collator, layers, batch_size) for rows in (train, test)]
    answers = [np.array([question.answer for question in rows]) for rows in (train, test)]
    probes = []
    for key in sides[0].keys() & sides[1].keys():
        known, asked = [(vectors, answers[side][rows]) for side, (vectors, rows) in enumerate(s[key] for s in sides)]
        if len(np.unique(known[1])) < 2:
            continue
        right, chance = fit_probe(known, asked)
        probes.append(Probe(name, *key, accuracy(right), chance, len(known[1]), len(right)))
    return sorted(probes, key=lambda one: (one.layer, PLACES.index(one.place)))
