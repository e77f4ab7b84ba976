"""Linear probes: places against plain indexing, a planted answer found, noise at chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_inputs import model, tokenizer

from monkeyjump.evaluation.probes import PLACES, at_place, features, fit_probe, probe_task
from monkeyjump.evaluation.questions import Question
from monkeyjump.tasks import Collator

COLLATOR = Collator.of(tokenizer())


def test_places() -> None:
    states = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(at_place(states, "first"), states[0])
    assert torch.equal(at_place(states, "end-1"), states[11])
    assert torch.equal(at_place(states, "end-10"), states[2])
    assert at_place(states, "end-20") is None
    torch.testing.assert_close(at_place(states, "mean"), states.sum(0) / 12)
    assert torch.equal(at_place(states, "max"), states.max(0).values)
    weights = torch.tensor([torch.cosine_similarity(state, states[11], dim=0) for state in states]).softmax(0)
    torch.testing.assert_close(at_place(states, "attention"), (weights[:, None] * states).sum(0))


def test_features_are_those_of_each_row_alone() -> None:
    net = model()
    rows = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    found = features(net, [Question({"input_ids": row}) for row in rows], COLLATOR, [1])
    assert {place for _, place in found} == set(PLACES) - {"end-20", "end-30"}
    vectors, numbers = found[1, "end-10"]
    assert numbers.tolist() == [1]  # the other is too short
    with torch.no_grad():
        alone = net(input_ids=torch.tensor([rows[1]]), output_hidden_states=True).hidden_states[1][0]
    np.testing.assert_allclose(vectors[0], alone[1].numpy(), atol=1e-5)


@pytest.mark.parametrize(("signal", "low", "high"), [(3.0, 0.95, 1.0), (0.0, 0.35, 0.65)])
def test_a_probe_finds_what_is_there_and_nothing_else(signal: float, low: float, high: float) -> None:
    draw = np.random.default_rng(0)
    sides = []
    for count in (400, 300):
        answers = draw.integers(0, 2, count)
        vectors = draw.standard_normal((count, 8))
        vectors[:, 3] += signal * (2 * answers - 1)
        sides.append((vectors, answers))
    right, chance = fit_probe(*sides)
    assert low <= np.mean(right) <= high
    assert 0.5 <= chance < 0.6


def test_an_answer_that_stands_in_the_prompt_is_read_off_its_token() -> None:
    """The last token is the answer: a probe there is perfect, one at the first token is at chance."""
    draw = np.random.default_rng(1)

    def rows(count: int) -> list[Question]:
        answers = draw.integers(0, 2, count)
        return [
            Question({"input_ids": [*draw.integers(50, 90, 5).tolist(), 30 + int(a)]}, answer=int(a)) for a in answers
        ]

    found = {one.place: one for one in probe_task(model(), "t", rows(120), rows(80), COLLATOR, [0])}
    assert found["end-1"].accuracy.value == 1.0
    assert found["first"].accuracy.low < found["first"].chance
    assert (found["mean"].train_rows, found["mean"].test_rows) == (120, 80)
