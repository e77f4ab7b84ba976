"""`initialize_centers`: what it reads, what it leaves alone, and that its centers are k-means of the right states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import DataLoader

from monkeyjump import initialize_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens


def rows(count: int = 40, length: int = 8) -> list[dict[str, list[int]]]:
    """Rows of different lengths, answers in their second half."""
    made = []
    for i, row in enumerate(tokens(count, length).tolist()):
        row = row[: length - i % 3]
        made.append({"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]})
    return made


@torch.no_grad()
def states_by_hand(index: int, granularity: str) -> Tensor:
    """Hidden states entering block `index` of the bare base model, row by row without padding."""
    model, kept = llama(), []
    hook = model.model.layers[index].register_forward_pre_hook(lambda m, a: kept.append(a[0][0]))
    for row in rows():
        model(torch.tensor([row["input_ids"]]))
    hook.remove()
    if granularity == "token":
        return torch.cat(kept)
    if granularity == "prompt_end":
        return torch.stack([h[len(h) // 2 - 1] for h in kept])
    pick = {"last": lambda h: h[-1], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0)}[granularity]
    return torch.stack([pick(h) for h in kept])


def inertia(states: Tensor, centers: np.ndarray) -> float:
    x = torch.nn.functional.normalize(states.double(), dim=-1).numpy()
    c = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    return float(((x[:, None] - c[None]) ** 2).sum(-1).min(1).sum())


@pytest.mark.parametrize("granularity", ["token", "last", "mean", "max", "prompt_end"])
def test_centers_are_as_good_as_scikit_learns_on_the_right_states(granularity: str) -> None:
    model = routed(llama(), granularity=granularity, center_init="kmeans")
    done = initialize_centers(model, rows(), restarts=100, progress=False)  # few points have many local optima
    for index, router in enumerate(routers(model)):
        states = states_by_hand(index, granularity)
        assert done.seen == len(states)
        unit = torch.nn.functional.normalize(states, dim=-1).double().numpy()
        reference = KMeans(3, n_init=100, random_state=0).fit(unit).cluster_centers_
        mine = inertia(states, router.centers["default"].double().numpy())
        assert mine <= 1.001 * inertia(states, reference)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_reaches_k_means(side: str) -> None:
    """The same rows padded into batches give the centers of the unpadded rows."""
    results = []
    for padded in (False, True):
        model = routed(llama(), center_init="kmeans")
        data = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows()]
        if padded:
            data = []
            for row in rows():
                ids, blank = row["input_ids"], 9 - len(row["input_ids"])
                place = (lambda v, n=blank: [0] * n + v) if side == "left" else (lambda v, n=blank: v + [0] * n)
                batch = {
                    "input_ids": torch.tensor([place(ids)]),
                    "attention_mask": torch.tensor([place([1] * len(ids))]),
                }
                batch["position_ids"] = torch.tensor([place(list(range(len(ids))))])
                data.append(batch)
        initialize_centers(model, data, progress=False)
        results.append(torch.cat([r.centers["default"] for r in routers(model)]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "l1"])
def test_the_other_similarities_get_raw_centers(similarity: str) -> None:
    model = routed(llama(), similarity=similarity, center_init="kmeans")
    initialize_centers(model, rows(), restarts=5, progress=False)
    router = routers(model)[1]
    states = states_by_hand(1, "token")
    reference = KMeans(3, n_init=5, random_state=0).fit(states.double().numpy())
    centers = router.centers["default"].double()
    power = 1 if similarity == "l1" else 2
    mine = (torch.cdist(states.double(), centers, p=power) ** power).min(1).values.sum().item()
    theirs = torch.tensor(reference.cluster_centers_)
    best = (torch.cdist(states.double(), theirs, p=power) ** power).min(1).values.sum().item()
    assert mine <= 1.001 * best


def test_random_tokens_are_states_of_the_data() -> None:
    model = routed(llama(), center_init="random_tokens")
    initialize_centers(model, rows(), progress=False)
    unit = torch.nn.functional.normalize(states_by_hand(1, "token"), dim=-1)
    for center in routers(model)[1].centers["default"]:
        assert (unit - center).norm(dim=-1).min() < 1e-5


@pytest.mark.parametrize("kind", ["rows", "loader", "batches", "tensors"])
def test_data_may_come_as_rows_loaders_or_batches(kind: str) -> None:
    ids = tokens(16, 6)
    data = {
        "rows": [{"input_ids": row.tolist(), "task": "a text"} for row in ids],
        "loader": DataLoader([{"input_ids": row} for row in ids], batch_size=4, shuffle=True),
        "batches": [{"input_ids": part} for part in ids.chunk(4)],
        "tensors": [{"input_ids": row} for row in ids],
    }[kind]
    model = routed(llama(), center_init="kmeans")
    assert initialize_centers(model, data, progress=False).seen == 96


def test_texts_need_a_tokenizer_and_then_work() -> None:
    model = routed(llama(), center_init="kmeans")

    def tokenizer(text: str, truncation: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 60 + 1 for c in text]}

    texts = ["the quick brown fox", "jumps over", "the lazy dog"] * 3
    assert initialize_centers(model, texts, tokenizer=tokenizer, progress=False).seen == sum(map(len, texts))


def test_limits_are_kept() -> None:
    model = routed(llama(), center_init="kmeans")
    assert initialize_centers(model, rows(), max_tokens=50, progress=False).seen == 50
    assert initialize_centers(model, rows(), max_tokens=None, max_samples=8, batch_size=4, progress=False).seen < 64
    done = initialize_centers(model, rows(), memory_limit=25_190_000, progress=False)
    assert 8 <= done.kept < done.seen


def test_the_same_seed_gives_the_same_centers_and_another_seed_others() -> None:
    def centers(seed: int) -> Tensor:
        model = routed(llama(), center_init="kmeans")
        initialize_centers(model, rows(), max_tokens=60, seed=seed, progress=False)
        return torch.cat([r.centers["default"] for r in routers(model)])

    assert torch.equal(centers(0), centers(0))
    assert not torch.equal(centers(0), centers(1))


def test_nothing_but_the_centers_changes() -> None:
    model = routed(llama(), center_init="kmeans").train()
    model.get_base_model().model.norm.eval()
    grads = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before = torch.random.get_rng_state()
    initialize_centers(
        model,
        DataLoader([{"input_ids": r} for r in tokens(16, 6)], batch_size=4, shuffle=True),
        progress=False,
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert grads == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert not any(r.observers for r in routers(model))


def test_the_backbone_is_seen_without_its_adapters() -> None:
    """Adapters that already act, as AdaLoRA's noise does at its start, do not move the centers."""
    results = []
    for seed in (1, 2):
        model = routed(llama(), seed=seed, center_init="kmeans")
        initialize_centers(model, rows(), progress=False)
        results.append(torch.cat([r.centers["default"] for r in routers(model)]))
    assert torch.equal(results[0], results[1])
