"""`initialize_centers` on two ranks finds, bit for bit, what one process finds on all data."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from monkeyjump import initialize_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens

pytestmark = [pytest.mark.slow, pytest.mark.proves("integration", "k-means on 2 ranks")]
SCARCE = 25_190_000  # bytes: the states do not fit, and each block keeps a sample of them


def batches(rank: int, counts: list[int]) -> list[dict[str, Tensor]]:
    """Rank's share: `counts[rank]` batches of different sizes."""
    shares = []
    for number in range(counts[rank]):
        ids = tokens(2 + number % 3, 8, seed=10 * number + rank)
        mask = torch.ones_like(ids)
        mask[0, : number % 4] = 0
        shares.append({"input_ids": ids, "attention_mask": mask})
    return shares


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": row.tolist()[: 8 - i % 3]} for i, row in enumerate(tokens(43, 8))]


def fit(data: Any, model: Any = None, **settings: Any) -> dict[str, Any]:
    if model is None:
        config = {k: settings.pop(k) for k in ("granularity", "center_init", "similarity") if k in settings}
        model = routed(llama(num_hidden_layers=3), **{"center_init": "kmeans", **config})
    done = initialize_centers(model, data, progress=False, **settings)
    return {"centers": [r.centers["default"].clone() for r in routers(model)], "done": vars(done)}


def check(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for mine in ranks:
        assert mine["done"] == alone["done"]
        assert all(map(torch.equal, mine["centers"], alone["centers"]))


def on_shares(rank: int, counts: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    data: Any = batches(rank, counts)
    if counts[rank] == 0:
        data = DataLoader([], batch_size=2)
    return fit(data, **settings)


@pytest.mark.parametrize("counts", [[5, 5], [7, 2], [0, 6], [6, 0]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": None},
        {"max_tokens": 90},
        {"max_tokens": None, "max_samples": 13},
        {"max_tokens": None, "memory_limit": SCARCE},
        {"center_init": "random_tokens"},
        {"granularity": "last", "similarity": "euclidean"},
    ],
    ids=str,
)
def test_unequal_shares(counts: list[int], settings: dict[str, Any], tmp_path: Path) -> None:
    turns = chain.from_iterable(zip_longest(batches(0, counts), batches(1, counts)))
    alone = fit([batch for batch in turns if batch is not None], **settings)
    if "memory_limit" in settings:
        assert alone["done"]["kept"] < alone["done"]["seen"]
    check(run_ranks(on_shares, tmp_path, counts, settings), alone)


def on_rows(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    return fit(rows(), **settings)


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 100, "batch_size": 4}, {"memory_limit": SCARCE}], ids=str)
def test_a_data_set_given_whole_is_divided(settings: dict[str, Any], tmp_path: Path) -> None:
    check(run_ranks(on_rows, tmp_path, settings), fit(rows(), **settings))


def wrapped(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(routed(llama(num_hidden_layers=3), center_init="kmeans"))
    return fit(batches(rank, [4, 1]), model)


def test_under_ddp_with_unequal_shares(tmp_path: Path) -> None:
    first, second = run_ranks(wrapped, tmp_path)
    assert all(map(torch.equal, first["centers"], second["centers"]))


def refused(rank: int, fault: str) -> str:
    data: Any = batches(rank, [5, 5])
    settings: dict[str, Any] = {}
    if fault == "batch" and rank == 1:
        data[3] = {"words": torch.ones(2, 3)}
    if fault == "mapping" and rank == 1:
        data = data[0]
    if fault == "rows":
        data = rows()[: 20 + rank]
    if fault == "seed":
        settings["seed"] = rank
    if fault == "too few":
        data = [{"input_ids": torch.full((2, 1), 5)}]
    model = routed(llama(), center_init="kmeans")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        fit(data, model, **settings)
    assert not any(router.observers or router.ready["default"] for router in routers(model))
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("batch", "RuntimeError: rank 1 failed, so rank 0 stops, too: ValueError: data has batches of words", "words"),
        ("mapping", "RuntimeError: rank 1 failed", "ValueError: data is a single mapping"),
        ("rows", "ValueError: initialize_centers: the rows of data differs between ranks: 20 rows", "21 rows"),
        ("seed", "seed differs between ranks: 0 on rank 0, 1 on rank 1", "seed differs"),
        ("too few", "ValueError: model.layers.0", "ValueError: model.layers.1"),
    ],
)
def test_an_error_is_raised_on_every_rank(fault: str, first: str, second: str, tmp_path: Path) -> None:
    messages = run_ranks(refused, tmp_path, fault, timeout=30)
    assert first in messages[0]
    assert second in messages[1]
