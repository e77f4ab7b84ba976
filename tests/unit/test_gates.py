"""Gates against the equations, written out as float64 loops; ties; properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monkeyjump.routing.gates import gates_from_logits, similarity_logits, top_k_mask

SIMILARITIES = ["cosine", "dot", "euclidean", "l1"]


def similarity_by_hand(h: list[float], c: list[float], kind: str) -> float:
    dot = sum(a * b for a, b in zip(h, c))
    if kind == "dot":
        return dot
    if kind == "cosine":
        return dot / (math.sqrt(sum(a * a for a in h)) * math.sqrt(sum(b * b for b in c)))
    if kind == "euclidean":
        return -math.sqrt(sum((a - b) ** 2 for a, b in zip(h, c)))
    return -sum(abs(a - b) for a, b in zip(h, c))


def gates_by_hand(h: list[float], centers: list[list[float]], kind: str, tau: float, k: int, norm: str) -> list[float]:
    """Eq. 3 and 4 for one token, in double precision."""
    z = [similarity_by_hand(h, c, kind) / tau for c in centers]
    total = sum(math.exp(v - max(z)) for v in z)
    p = [math.exp(v - max(z)) / total for v in z]
    chosen = sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]
    m = [p[e] if e in chosen else 0.0 for e in range(len(p))]
    if norm == "none":
        return m
    scale = (min(k, len(p)) if norm == "k" else 1) / sum(m)
    return [v * scale for v in m]


@pytest.mark.parametrize("norm", ["none", "one", "k"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", SIMILARITIES)
def test_gates_equal_the_equations(kind: str, k: int, norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 5, 8, generator=generator)
    centers = torch.randn(3, 8, generator=generator)
    logits = similarity_logits(h, centers, kind) / 0.7
    m, chosen = gates_from_logits(logits, k, norm)
    expected = [[gates_by_hand(t.tolist(), centers.tolist(), kind, 0.7, k, norm) for t in row] for row in h]
    torch.testing.assert_close(m.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-5)
    assert torch.equal(chosen, m > 0)


def test_half_precision_states_are_routed_in_float32() -> None:
    h, centers = torch.randn(4, 8).bfloat16(), torch.randn(3, 8)
    logits = similarity_logits(h, centers, "cosine")
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, similarity_logits(h.double(), centers.double(), "cosine"))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 5, 6), (257, 6)])
def test_ties_go_to_the_lower_slot(shape: tuple[int, ...]) -> None:
    mask = top_k_mask(torch.zeros(shape), 2)
    assert mask[..., :2].all()
    assert not mask[..., 2:].any()


def test_duplicate_centers_choose_the_lower_slot() -> None:
    c = torch.randn(1, 8)
    logits = similarity_logits(torch.randn(50, 8), c.repeat(3, 1), "cosine")
    assert top_k_mask(logits, 1).int().argmax(-1).eq(0).all()


def test_a_zero_state_has_no_preference() -> None:
    assert similarity_logits(torch.zeros(1, 8), torch.randn(3, 8), "cosine").abs().max() == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=7),
    st.integers(1, 8),
    st.sampled_from(["one", "k"]),
)
def test_normalized_gates_sum_to_their_norm(logits: list[float], k: int, norm: str) -> None:
    m, chosen = gates_from_logits(torch.tensor([logits]), k, norm)
    active = min(k, len(logits))
    assert int(chosen.sum()) == active
    assert m.sum().item() == pytest.approx(active if norm == "k" else 1.0, rel=1e-5)
    assert (m >= 0).all()
