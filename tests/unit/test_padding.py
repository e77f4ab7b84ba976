"""Padding side, amount of padding and batch mates change nothing: gates, logits, statistics, centers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monkeyjump import CenterUpdate, record_routing
from monkeyjump.tuner.model import routers
from tiny import VOCAB, bert, llama, routed, tokens

GRANULARITIES = ["token", "last", "mean", "max", "prompt_end"]


def padded(rows: list[list[int]], width: int, side: str) -> dict[str, Tensor]:
    """Rows on one side of a `[B, width]` batch; positions as if there were no padding."""
    batch = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
    for row in rows:
        blank = width - len(row)
        place = (
            (lambda v, fill, n=blank: [fill] * n + v) if side == "left" else (lambda v, fill, n=blank: v + [fill] * n)
        )
        batch["input_ids"].append(place(row, 5))  # a real token's id: only the mask says that it is padding
        batch["attention_mask"].append(place([1] * len(row), 0))
        batch["labels"].append(place([-100] * (len(row) // 2) + row[len(row) // 2 :], -100))
        batch["position_ids"].append(place(list(range(len(row))), 0))
    return {k: torch.tensor(v) for k, v in batch.items()}


def counts(model: object, batch: dict[str, Tensor]) -> Tensor:
    with record_routing(model) as record, torch.no_grad():
        model(**batch)
    return torch.stack(list(record.counts.values()))


def gathered(model: object, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()
    update = CenterUpdate(every=1).attach(model, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), 10)
    model(**batch)
    found = {
        r.name: torch.cat([r.pending["default"].sums, r.pending["default"].counts[:, None]], 1) for r in routers(model)
    }
    update._stop()
    model.eval()
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(deadline=None, max_examples=15)
@given(
    rows=st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=6), min_size=1, max_size=3),
    extra=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
)
def test_padding_and_batch_mates_change_nothing(granularity: str, rows: list[list[int]], extra: int, side: str) -> None:
    model = routed(llama(), granularity=granularity, temperature=0.3).eval()
    width = max(map(len, rows)) + extra
    together = padded(rows, width, side)
    alone = [padded([row], len(row), "left") for row in rows]
    logits = model(**together).logits
    for number, row in enumerate(rows):
        mine = logits[number][together["attention_mask"][number].bool()]
        torch.testing.assert_close(mine, model(**alone[number]).logits[0], atol=1e-5, rtol=1e-4)
        assert len(mine) == len(row)
    assert torch.equal(counts(model, together), sum(counts(model, one) for one in alone))
    joint, single = gathered(model, together), [gathered(model, one) for one in alone]
    for name, statistics in joint.items():
        torch.testing.assert_close(statistics, sum(one[name] for one in single), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_mask_of_ones_is_no_mask(granularity: str) -> None:
    model = routed(llama(), granularity=granularity).eval()
    ids = torch.randint(1, VOCAB, (2, 6))
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("granularity", GRANULARITIES[:4])
def test_padding_changes_nothing_in_an_encoder_either(granularity: str) -> None:
    model = routed(bert(), granularity=granularity, temperature=0.3).eval()
    rows = [tokens(1, 5, seed=1)[0].tolist(), tokens(1, 3, seed=2)[0].tolist()]
    ids = torch.tensor([rows[0], [*rows[1], 7, 7]])  # real tokens' ids: only the mask says that it is padding
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    together = {"input_ids": ids, "attention_mask": mask}
    alone = [{"input_ids": torch.tensor([row])} for row in rows]
    torch.testing.assert_close(model(**together).logits, torch.cat([model(**one).logits for one in alone]))
    assert torch.equal(counts(model, together), sum(counts(model, one) for one in alone))
