"""The reservoir: a uniform sample whatever the batches, and a memory cap that holds."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from monkeyjump.routing.kmeans import kmeans, working_memory
from monkeyjump.routing.reservoir import Reservoir, rows_within


def numbered(n: int, start: int = 0) -> Tensor:
    """[n, 2]: every row says which it is, twice."""
    return torch.arange(start, start + n, dtype=torch.float32).unsqueeze(1).repeat(1, 2)


def sample(n: int, capacity: int, seed: int, batch: int) -> Tensor:
    reservoir = Reservoir(capacity, 2, seed=seed)
    for part in numbered(n).split(batch):
        reservoir.add(part)
    assert reservoir.seen == n
    return reservoir.states()


@pytest.mark.parametrize("batch", [1, 7, 60, 1000])
def test_every_row_is_kept_equally_often(batch: int) -> None:
    """Chi-square over 4,000 seeds: 10 of 60 rows; the smallest p of a fair sampler is far above 1e-4."""
    seeds = 4000 if batch >= 60 else 1000
    counts = torch.zeros(60)
    for seed in range(seeds):
        kept = sample(60, 10, seed, batch)[:, 0].long()
        assert len(kept.unique()) == 10
        counts[kept] += 1
    # Counts are negatively correlated (10 of 60 each time): the statistic shrinks by 50/59, so p is careful.
    assert chisquare(counts.numpy()).pvalue > 1e-4


def test_pairs_of_rows_are_kept_equally_often() -> None:
    """Not only rows but sets of rows: all 15 pairs of 6, at capacity 2 and batches of 4."""
    counts = torch.zeros(6, 6)
    for seed in range(6000):
        first, second = sorted(sample(6, 2, seed, 4)[:, 0].long().tolist())
        counts[first, second] += 1
    observed = counts[torch.triu_indices(6, 6, 1).unbind()]
    assert chisquare(observed.numpy()).pvalue > 1e-4


@given(
    batches=st.lists(st.integers(0, 40), max_size=12),
    capacity=st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_the_split_into_batches_changes_nothing(batches: list[int], capacity: int, seed: int) -> None:
    total = sum(batches)
    parts, whole, single = (Reservoir(capacity, 2, seed=seed) for _ in range(3))
    start = 0
    for n in batches:
        parts.add(numbered(n, start))
        start += n
    whole.add(numbered(total))
    for row in numbered(total):
        single.add(row.unsqueeze(0))
    assert parts.seen == whole.seen == total
    assert parts.states().shape == (min(total, capacity), 2)
    assert torch.equal(parts.states(), whole.states())
    assert torch.equal(parts.states(), single.states())
    if total <= capacity:
        assert torch.equal(parts.states(), numbered(total))
    else:
        kept = parts.states()[:, 0]
        assert len(kept.unique()) == capacity
        assert torch.equal(kept, parts.states()[:, 1])


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = sample(500, 20, seed=1, batch=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, sample(500, 20, seed=1, batch=64))
    assert not torch.equal(first, sample(500, 20, seed=2, batch=64))


def test_dtypes_are_converted_and_the_input_is_not_kept() -> None:
    reservoir = Reservoir(4, 2, seed=0, dtype=torch.float16)
    states = numbered(4).to(torch.bfloat16).requires_grad_()
    reservoir.add(states)
    with torch.no_grad():
        states += 1
    assert reservoir.states().dtype == torch.float16
    assert torch.equal(reservoir.states(), numbered(4).half())
    assert not reservoir.states().requires_grad


def test_half_precision_refuses_what_it_cannot_hold_and_keeps_what_was_broken() -> None:
    reservoir = Reservoir(4, 2, seed=0, dtype=torch.float16)
    reservoir.add(torch.tensor([[float("inf"), float("nan")]]))  # k-means drops such rows, with a count
    with pytest.raises(ValueError, match=r"7e\+04 does not fit torch.float16: normalize"):
        reservoir.add(torch.tensor([[7e4, 0.0]]))
    full = Reservoir(1, 1, seed=1, dtype=torch.float16)
    with pytest.raises(ValueError, match="does not fit"):
        full.add(torch.cat([torch.zeros(1, 1), torch.full((50, 1), -1e6)]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted states \[n, 2\], got \[3, 4\]"):
        Reservoir(4, 2, seed=0).add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="capacity=0"):
        Reservoir(0, 2, seed=0)


# --------------------------------------------------------------------------------------------- the memory cap


@given(
    limit=st.integers(0, 2**36),
    dims=st.lists(st.integers(1, 9000), min_size=1, max_size=80),
    wanted=st.integers(1, 200_000),
    itemsize=st.sampled_from([2, 4]),
)
def test_rows_within_is_the_most_that_fits(limit: int, dims: list[int], wanted: int, itemsize: int) -> None:
    def need(rows: int) -> int:
        return rows * (itemsize * sum(dims) + 16 * len(dims)) + working_memory(rows, max(dims), 8)

    if need(min(wanted, 8)) > limit:
        with pytest.raises(ValueError, match=f"{need(8):,} bytes are needed"):
            rows_within(limit, dims=dims, wanted=wanted, itemsize=itemsize)
        return
    rows = rows_within(limit, dims=dims, wanted=wanted, itemsize=itemsize)
    assert need(rows) <= limit
    assert rows == wanted or need(rows + 1) > limit


def test_rows_within_in_numbers() -> None:
    """The figures that docs/centers.md gives for 32 blocks of d 4,096."""
    dims = [4096] * 32
    assert rows_within(2**30, dims=dims, wanted=50_000, itemsize=2) == 3985
    assert rows_within(4 * 2**30, dims=dims, wanted=50_000, itemsize=2) == 16_245
    assert rows_within(16 * 2**30, dims=dims, wanted=50_000, itemsize=2) == 50_000


BLOCKS, DIM, TOKENS, BATCH = 32, 4096, 50_000, 1000
LIMIT = 2**30
SLACK = 192 * 2**20  # a few batches in float32 (the model's side), and the holes that malloc leaves


def stream_and_fit(capacity: int) -> None:
    """Fill a reservoir per block from a stream of unit states, then cluster block after block."""
    reservoirs = [Reservoir(capacity, DIM, seed=i, dtype=torch.float16) for i in range(BLOCKS)]
    states = torch.nn.functional.normalize(torch.randn(BATCH, DIM), dim=1)
    for step in range(TOKENS // BATCH):
        states[:, step] *= -1  # new data at the price of a column; still unit vectors
        for reservoir in reservoirs:
            states[:, 100 + step] *= -1
            reservoir.add(states)
    for i, reservoir in enumerate(reservoirs):
        assert reservoir.seen == TOKENS
        result = kmeans(reservoir.states(), 5, iterations=3, seed=i)
        assert result.centers.isfinite().all()
    print("clustered", len(reservoirs), "blocks of", capacity)


def child(capacity: int) -> None:
    """Run `stream_and_fit` with an address space of what torch has now + LIMIT + SLACK."""
    import resource

    torch.set_num_threads(1)
    kmeans(torch.randn(2000, 64).half(), 5, iterations=2)  # warm-up: libraries and arenas
    with open("/proc/self/statm") as statm:
        present = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + LIMIT + SLACK,) * 2)
    stream_and_fit(capacity)


def run_child(capacity: int) -> subprocess.CompletedProcess[str]:
    # a mapping of its own for every tensor, given back when it is freed: how many holes a heap keeps differs by machine
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    env = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(capacity)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_32_blocks_of_50_000_tokens_fit_into_one_gibibyte() -> None:
    """Everything at once would be 26 GB (13 GB in half precision)."""
    rows = rows_within(LIMIT, dims=[DIM] * BLOCKS, wanted=TOKENS, itemsize=2)
    bounded = run_child(rows)
    assert bounded.returncode == 0, bounded.stderr
    assert bounded.stdout == f"clustered 32 blocks of {rows}\n"
    assert BLOCKS * TOKENS * DIM * 4 > 24 * LIMIT
    for capacity in (TOKENS, rows * 5 // 4):  # all tokens; and a quarter more than the cap allows
        refused = run_child(capacity)
        assert refused.returncode != 0
        assert "allocate memory" in refused.stderr


if __name__ == "__main__":
    child(int(sys.argv[1]))
