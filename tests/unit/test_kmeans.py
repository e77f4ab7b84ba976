"""K-means against scikit-learn and brute force, on hostile input, and within its memory bound."""

import itertools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets
from sklearn.cluster import KMeans
from torch import Tensor

from monkeyjump.routing import kmeans as module
from monkeyjump.routing.kmeans import kmeans, working_memory

RESTARTS = 10


def blobs(dim: int, centers: int, std: float) -> np.ndarray:
    return datasets.make_blobs(1500, dim, centers=centers, cluster_std=std, random_state=dim)[0]


def anisotropic() -> np.ndarray:
    skew = np.array([[0.6, -0.6, 0.1], [-0.4, 0.85, 0.3], [0.2, 0.1, 3.0]])
    return datasets.make_blobs(1200, 3, centers=4, random_state=170)[0] @ skew


def imbalanced() -> np.ndarray:
    return datasets.make_blobs([1500, 150, 40, 10], 16, cluster_std=3.0, random_state=1)[0]


def far_and_tight() -> np.ndarray:
    """Directions within 1e-3 of each other, as hidden states with a few huge channels are."""
    return blobs(32, 6, 1.0) * 1e-3 + np.eye(32)[0] * 50


# Name -> data [N, d] and number of centers.
DATA = {
    "blobs": (blobs(8, 5, 2.0), 5),
    "noisy blobs": (blobs(64, 7, 12.0), 7),
    "digits": (datasets.load_digits().data, 10),
    "iris": (datasets.load_iris().data, 3),
    "anisotropic": (anisotropic(), 4),
    "imbalanced": (imbalanced(), 4),
    "far and tight": (far_and_tight(), 6),
}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def squared_inertia(rows: np.ndarray, centers: np.ndarray) -> float:
    """Sum over rows of the squared distance to the nearest center, float64."""
    return float(((rows[:, None] - centers[None]) ** 2).sum(-1).min(1).sum())


@pytest.mark.parametrize("name", DATA)
def test_cosine_is_as_good_as_scikit_learn_on_normalized_vectors(name: str) -> None:
    data, k = DATA[name]
    data = data.astype(np.float32)
    rows = unit(data.astype(np.float64))
    ours = kmeans(torch.from_numpy(data), k, restarts=RESTARTS)
    theirs = KMeans(k, n_init=RESTARTS, random_state=0).fit(rows).cluster_centers_
    found = squared_inertia(rows, ours.centers.double().numpy())
    assert found <= 1.001 * squared_inertia(rows, unit(theirs))
    assert ours.inertia == pytest.approx(found, rel=1e-4)
    torch.testing.assert_close(ours.centers.norm(dim=1), torch.ones(k))


@pytest.mark.parametrize("name", DATA)
def test_euclidean_is_as_good_as_scikit_learn(name: str) -> None:
    data, k = DATA[name]
    data = data.astype(np.float32)
    ours = kmeans(torch.from_numpy(data), k, distance="euclidean", restarts=RESTARTS)
    rows = data.astype(np.float64)
    theirs = KMeans(k, n_init=RESTARTS, random_state=0).fit(rows).cluster_centers_
    found = squared_inertia(rows, ours.centers.double().numpy())
    assert found <= 1.001 * squared_inertia(rows, theirs)
    assert ours.inertia == pytest.approx(found, rel=1e-4)


def best_medians(rows: np.ndarray, k: int) -> float:
    """The least L1 cost over all ways to split the rows into k clusters."""
    best = np.inf
    for labels in itertools.product(range(k), repeat=len(rows)):
        cost = 0.0
        for e in set(labels):
            members = rows[np.array(labels) == e]
            cost += np.abs(members - np.median(members, axis=0)).sum()
        best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_l1_finds_the_optimum_of_small_cases(seed: int, k: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(7, 2)).astype(np.float32)
    rows[0] *= 20  # an outlier: medians and means then differ
    ours = kmeans(torch.from_numpy(rows), k, distance="l1", restarts=30)
    assert ours.inertia == pytest.approx(best_medians(rows.astype(np.float64), k), rel=1e-5)


def test_l1_ignores_an_outlier_that_euclidean_follows() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]])
    assert kmeans(rows, 1, distance="l1").centers.item() == 2.0
    assert kmeans(rows, 1, distance="euclidean").centers.item() == pytest.approx(201.2)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "l1"])
def test_seeding_tries_several_rows_and_spreads_out(distance: str) -> None:
    """Seeds alone, one update: every one of 8 equal, well separated clusters gets a center."""
    rows = torch.eye(8).repeat(20, 1) * 10 + torch.rand(160, 8, generator=torch.Generator().manual_seed(0)) / 10
    for seed in range(10):
        result = kmeans(rows, 8, distance=distance, iterations=1, seed=seed)
        assert sorted(result.centers.argmax(dim=1).tolist()) == list(range(8))


# ------------------------------------------------------------------------------------------ hostile input

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e-42, 3e38, -3e38, 1e20, 65504.0]
BROKEN = [float("nan"), float("inf"), float("-inf")]


@st.composite
def hostile(draw: st.DrawFn) -> Tensor:
    """A few base rows, repeated and mixed: ordinary, zero, extreme, with or without NaN and inf."""
    dim = draw(st.integers(1, 5))
    values = st.one_of(
        st.floats(-4, 4, width=16),
        st.sampled_from(SPECIAL),
        st.sampled_from(SPECIAL + BROKEN),
    )
    base = draw(st.lists(st.lists(values, min_size=dim, max_size=dim), min_size=1, max_size=8))
    order = draw(st.lists(st.integers(0, len(base) - 1), min_size=0, max_size=24))
    return torch.tensor([base[i] for i in order]).reshape(len(order), dim)


def distinct(rows: Tensor, distance: str) -> tuple[int, int]:
    """How many rows (cosine: directions) differ by far, and at all, at the resolution of float32."""
    rows = rows.double()
    scale = rows.abs().amax(1, keepdim=True) if distance == "cosine" else rows.abs().max().clamp_min(1e-300)
    rows = rows / scale
    if distance == "cosine":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return tuple(apart(rows, limit) for limit in ((3e-5, 3e-6) if distance == "cosine" else (1e-18, 0.0)))


def apart(rows: Tensor, limit: float) -> int:
    found: list[Tensor] = []
    for row in rows:
        if all(float((row - other).norm()) > limit for other in found):
            found.append(row)
    return len(found)


def assert_sound(states: Tensor, k: int, distance: str, seed: int) -> None:
    """A finite result of the promised form, or a ValueError that names the data."""
    usable = states.isfinite().all(1) & ((states != 0).any(1) | torch.tensor(distance != "cosine"))
    by_far, at_all = distinct(states[usable], distance) if usable.any() else (0, 0)
    try:
        result = kmeans(states, k, distance=distance, seed=seed, iterations=8, name="block 3")
    except ValueError as error:
        message = str(error)
        result = None
    if result is None:
        assert "block 3: " in message
        assert by_far < k
        return
    assert at_all >= k
    assert result.centers.shape == (k, states.shape[1])
    assert result.centers.dtype == torch.float32
    assert result.centers.isfinite().all()
    assert result.dropped == int((~usable).sum())
    assert np.isfinite(result.inertia)
    assert result.inertia >= 0
    if distance == "cosine":
        torch.testing.assert_close(result.centers.norm(dim=1), torch.ones(k))


@given(
    states=hostile(),
    k=st.integers(1, 6),
    distance=st.sampled_from(["cosine", "euclidean", "l1"]),
    seed=st.integers(0, 3),
)
@settings(max_examples=400, deadline=None)
def test_any_input_gives_finite_centers_or_a_clear_error(states: Tensor, k: int, distance: str, seed: int) -> None:
    assert_sound(states, k, distance, seed)


@pytest.mark.slow
@given(
    states=hostile(),
    k=st.integers(1, 6),
    distance=st.sampled_from(["cosine", "euclidean", "l1"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=4000, deadline=None)
def test_any_input_at_length(states: Tensor, k: int, distance: str, seed: int) -> None:
    assert_sound(states, k, distance, seed)


@given(
    grid=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20),
    k=st.integers(1, 17),
    distance=st.sampled_from(["euclidean", "l1"]),
)
@settings(max_examples=200, deadline=None)
def test_the_error_comes_exactly_when_distinct_rows_are_too_few(
    grid: list[tuple[int, int]], k: int, distance: str
) -> None:
    distinct = len(set(grid))
    states = torch.tensor(grid, dtype=torch.float32)
    if distinct >= k:
        assert len(kmeans(states, k, distance=distance).centers.unique(dim=0)) == k
    else:
        with pytest.raises(ValueError, match=rf"{k} centers wanted, but only {distinct} distinct row"):
            kmeans(states, k, distance=distance)


def test_too_few_directions_is_an_error_that_names_the_remedy() -> None:
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1))
    states = torch.cat([row, 3 * row, 7.7 * row, -row])  # two directions
    assert kmeans(states, 2).inertia == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"layers\.7: 3 centers wanted, but only 2 distinct.*num_centers"):
        kmeans(states, 3, name="layers.7")


def test_nothing_usable_is_an_error() -> None:
    nan = torch.full((2, 3), float("nan"))
    for states in (torch.empty(0, 3), torch.zeros(4, 3), nan):
        with pytest.raises(ValueError, match="block 0: no usable row"):
            kmeans(states, 1, name="block 0")
    assert kmeans(torch.zeros(4, 3), 1, distance="euclidean").centers.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "l1"])
def test_one_token_is_its_own_center(distance: str) -> None:
    result = kmeans(torch.tensor([[0.0, 2.0]]), 1, distance=distance)
    assert result.centers.tolist() == [[0.0, 1.0 if distance == "cosine" else 2.0]]
    assert result.inertia == 0


def test_opposite_vectors_that_cancel_keep_a_unit_center() -> None:
    result = kmeans(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1)
    torch.testing.assert_close(result.centers.norm(dim=1), torch.ones(1))
    assert result.inertia == pytest.approx(4.0)


def test_dropped_rows_are_counted_logged_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clean = torch.from_numpy(DATA["iris"][0]).float()
    dirty = torch.cat([clean, torch.zeros(2, 4), torch.full((1, 4), float("inf")), clean[:1] * float("nan")])
    with caplog.at_level(logging.WARNING, logger="monkeyjump"):
        result = kmeans(dirty, 3, restarts=3, name="layers.2")
    assert result.dropped == 4
    assert "layers.2: 4 of 154 rows dropped" in caplog.text
    torch.testing.assert_close(result.centers, kmeans(clean, 3, restarts=3).centers)


@pytest.mark.parametrize("factor", [1e-38, 1e36])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "l1"])
def test_extreme_scales_change_nothing_but_the_scale(distance: str, factor: float) -> None:
    rows = torch.from_numpy(DATA["iris"][0]).float()
    plain = kmeans(rows, 3, distance=distance)
    scaled = kmeans(rows * factor, 3, distance=distance)
    power = {"cosine": 0, "euclidean": 2, "l1": 1}[distance]
    assert scaled.inertia / factor**power == pytest.approx(plain.inertia, rel=1e-4)
    wanted = plain.centers * factor ** min(power, 1)
    torch.testing.assert_close(scaled.centers, wanted, rtol=1e-4, atol=0)


def test_empty_clusters_take_far_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Centers 2 and 3 own nothing: they get the two farthest distinct rows, not a single row or its copy."""
    states = torch.tensor([[0.0], [1.0], [9.0], [9.0], [7.0], [100.0]])
    points = module._usable(states, "euclidean", 4, "x")
    labels, cost = module._assign(points, torch.tensor([[0.0], [103.0], [500.0], [600.0]]))
    assert labels.tolist() == [0, 0, 0, 0, 0, 1]
    with caplog.at_level(logging.INFO, logger="monkeyjump"):
        module._fill_empty(points, labels, cost, 4, "layers.1")
    assert labels.tolist() == [0, 0, 2, 0, 3, 1]
    assert caplog.text.count("layers.1: center") == 2


def test_empty_clusters_are_refilled_inside_the_loop() -> None:
    """Far-off start centers lose every row at once: the result is still a full set of distinct centers."""
    states = torch.arange(12.0).reshape(-1, 1)
    starts = torch.tensor([[-50.0], [-60.0], [-70.0], [-80.0]])
    for distance in ("euclidean", "l1"):
        points = module._usable(states, distance, 4, "x")
        result = module._lloyd(points, starts, 50, "x")
        assert result.centers.isfinite().all()
        assert len(result.centers.unique()) == 4


# -------------------------------------------------------------------------------- determinism and precision


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "l1"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(distance: str) -> None:
    rows = torch.from_numpy(DATA["noisy blobs"][0]).float()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = kmeans(rows, 7, distance=distance, seed=1, iterations=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = kmeans(rows, 7, distance=distance, seed=1, iterations=2)
    assert torch.equal(first.centers, again.centers)
    assert first == type(first)(first.centers, again.inertia, again.iterations, again.dropped)
    assert not torch.equal(first.centers, kmeans(rows, 7, distance=distance, seed=2, iterations=2).centers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "l1"])
def test_other_dtypes_agree_with_float32(distance: str, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(DATA["blobs"][0]).to(dtype)
    a = kmeans(rows, 5, distance=distance, restarts=3)
    b = kmeans(rows.float(), 5, distance=distance, restarts=3)
    assert torch.equal(a.centers, b.centers)  # upcast exactly, then the same arithmetic
    exact = kmeans(torch.from_numpy(DATA["blobs"][0]).float(), 5, distance=distance, restarts=3)
    assert a.inertia == pytest.approx(exact.inertia, rel=0.02)


def test_restarts_never_hurt_and_iterations_stop_when_stable() -> None:
    rows = torch.from_numpy(DATA["digits"][0]).float()
    one = kmeans(rows, 10, seed=3, iterations=300)
    assert kmeans(rows, 10, seed=3, restarts=6, iterations=300).inertia <= one.inertia
    assert one.iterations < 300
    assert kmeans(rows, 10, seed=3, iterations=1).iterations == 1
    assert torch.equal(kmeans(rows, 10, seed=3, iterations=400).centers, one.centers)


def test_arguments_and_gradients() -> None:
    rows = torch.rand(10, 3, requires_grad=True)
    assert not kmeans(rows, 2).centers.requires_grad
    bad: list[tuple[Tensor, dict[str, object], str]] = [
        (rows[0], {}, r"block 1: wanted floating-point \[N, d\]"),
        (rows.long(), {}, "block 1: wanted floating-point"),
        (rows[:, :0], {}, "block 1: wanted floating-point"),
        (rows, {"num_centers": 0}, "num_centers=0"),
        (rows, {"iterations": 0}, "iterations=0"),
        (rows, {"restarts": 0}, "restarts=0"),
        (rows, {"distance": "dot"}, "distance='dot'.*cosine, euclidean, l1"),
    ]
    for states, options, message in bad:
        with pytest.raises(ValueError, match=message):
            kmeans(states, **{"num_centers": 2, "name": "block 1", **options})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- memory

CHILD = """
import resource, sys, torch
from monkeyjump.routing.kmeans import kmeans, working_memory
torch.set_num_threads(1)
distance, dtype, drop, slack = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
states = torch.rand(20_000, 512, dtype=torch.float32).to(dtype)
if drop:
    states[::7] = float("nan")
kmeans(states[:500].clone(), 5, distance=distance, iterations=2)   # warm-up: libraries, arenas
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + working_memory(len(states), 512, 5) + slack
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    states.float() + 1
    sys.exit("the limit does not bind: a copy of the states fits")
except (MemoryError, RuntimeError):
    pass
print(kmeans(states, 5, distance=distance, iterations=2).dropped)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize(
    ("distance", "dtype", "drop"),
    [
        ("cosine", "float32", 1),
        ("cosine", "float16", 0),
        ("euclidean", "float32", 0),
        ("euclidean", "float16", 1),
        ("l1", "float32", 1),
    ],
)
def test_memory_beyond_the_states_stays_within_the_stated_bound(distance: str, dtype: str, drop: int) -> None:
    """20,000 x 512 states (20 or 41 MB) under an address-space limit of working_memory + 8 MiB."""
    command = [sys.executable, "-c", CHILD, distance, dtype, str(drop), str(8 * 2**20)]
    # Large blocks straight from the system: holes in the heap are the allocator's, not ours.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    env = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == drop * len(range(0, 20_000, 7))


def test_the_bound_is_far_below_a_copy_of_the_states() -> None:
    copy = 50_000 * 4096 * 4
    assert working_memory(50_000, 4096, 8) < 0.04 * copy
    assert working_memory(100_000, 4096, 8) < 2 * working_memory(50_000, 4096, 8)
