"""Encoded rows on disk, and how tasks share an epoch."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from monkeyjump.tasks import InputError
from monkeyjump.training.config import Data
from monkeyjump.training.shares import draw_rows, share_out
from monkeyjump.training.token_rows import Facts, TokenRows, rows_are_there, write_rows

SIZES = {"a": 100, "b": 900, "c": 1}


def encoded(count: int = 2500):
    for n in range(count):
        yield {"input_ids": [n, 1, 2 + n % 3], "labels": [-100, -100, 2], "task": n % 2, "where": f"file, row {n}"}


def data(**fields: object) -> Data:
    return Data(tasks=["a"], **fields)


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    rows = write_rows(tmp_path, encoded(), Facts(["x", "y"]))
    assert len(rows) == 2500
    row = rows[1700]
    assert (row["input_ids"], row["labels"], row["attention_mask"]) == ([1700, 1, 4], [-100, -100, 2], [1, 1, 1])
    assert (row["task_ids"], row["row_ids"]) == (0, 1700)
    assert rows.where(3) == "y: file, row 3"
    facts = rows.facts
    assert (facts.kept, facts.tokens, facts.supervised) == ({"x": 1250, "y": 1250}, 7500, 2500)
    again = pickle.loads(pickle.dumps(rows))  # as the workers of a DataLoader get it
    assert again[9] == rows[9]
    assert TokenRows(tmp_path).facts == facts


def test_the_fingerprint_is_of_the_rows(tmp_path: Path):
    first = write_rows(tmp_path / "1", encoded(50), Facts(["x", "y"])).facts.sha256
    assert write_rows(tmp_path / "2", encoded(50), Facts(["x", "y"])).facts.sha256 == first
    assert write_rows(tmp_path / "3", encoded(51), Facts(["x", "y"])).facts.sha256 != first


def test_a_failure_half_way_leaves_no_rows(tmp_path: Path):
    def failing():
        yield from encoded(1500)
        raise InputError("row 1501 is wrong")

    with pytest.raises(InputError):
        write_rows(tmp_path, failing(), Facts(["x", "y"]))
    assert not rows_are_there(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"a": 100, "b": 900, "c": 1}),
        ({"cap": 50}, {"a": 50, "b": 50, "c": 1}),
        ({"weights": {"a": 2}}, {"a": 501, "b": 250, "c": 250}),
        ({"temperature": 1}, {"a": 100, "b": 900, "c": 1}),
        ({"temperature": 1e9}, {"a": 334, "b": 334, "c": 333}),
    ],
)
def test_shares(fields: dict, expected: dict):
    found = share_out(SIZES, data(**fields))
    assert found == expected
    if not fields.get("cap"):
        assert sum(found.values()) == sum(SIZES.values())


def test_no_task_vanishes():
    assert min(share_out({"a": 10_000, "b": 1}, data(temperature=0.2)).values()) == 1


def test_a_weight_for_no_task_is_told():
    with pytest.raises(InputError, match=r"data\.weights: no task 'aa'") as caught:
        share_out(SIZES, data(weights={"aa": 2}))
    assert "'a'" in caught.value.hint


def test_drawn_rows_repeat_only_after_a_whole_pass():
    tasks = np.array([0] * 10 + [1] * 4)
    drawn = draw_rows(tasks, ["a", "b"], {"a": 7, "b": 10}, seed=0)
    assert len(set(drawn[:7])) == 7
    assert set(drawn[:7]) <= set(range(10))
    counts = Counter(drawn[7:].tolist())
    assert sorted(counts.values()) == [2, 2, 3, 3]
    assert (draw_rows(tasks, ["a", "b"], {"a": 7, "b": 10}, seed=0) == drawn).all()
    assert (draw_rows(tasks, ["a", "b"], {"a": 7, "b": 10}, seed=1) != drawn).any()
