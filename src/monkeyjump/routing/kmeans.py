"""K-means for routing centers: bounded memory, reproducible, never a NaN center.

    states [N, d] --drop unusable rows--> seeds [k, d] --(assign, update) until stable--> centers [k, d]

Three distances share one loop:

    cosine      rows are L2-normalized; cost = squared chord |x - c|^2 = 2 - 2 cos; mean, renormalized
    euclidean   raw rows;               cost = |x - c|^2;                           mean
    l1          raw rows;               cost = sum |x - c|;                         coordinate-wise median

Rows are read chunk by chunk, so that memory beyond `states` stays within `working_memory`, whatever N is.
Distances are taken from differences, not from |x|^2 - 2xc + |c|^2: hidden states sit far from the origin
and close to each other, where that expansion loses all digits, and equal rows must be at distance zero.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

logger = logging.getLogger("monkeyjump")

Distance = Literal["cosine", "euclidean", "l1"]

CHUNK_BYTES = 4 * 2**20  # of float32 rows read at a time; larger is not faster (it leaves the cache)
SAME_DIRECTION = 1e-10  # squared chord below which two directions are one: the rounding of normalizing
SAFE_RANGE = (1e-15, 1e15)  # values whose squares can be summed in float32


@dataclass(frozen=True)
class KMeansResult:
    centers: Tensor  # [k, d] float32; unit rows for cosine
    inertia: float  # sum of costs over the rows used
    iterations: int  # updates of the centers, in the best restart
    dropped: int  # rows not used: NaN, inf or, for cosine, zero


@torch.no_grad()
def kmeans(
    states: Tensor,
    num_centers: int,
    *,
    distance: Distance = "cosine",
    iterations: int = 50,
    restarts: int = 1,
    seed: int = 0,
    name: str = "states",
) -> KMeansResult:
    """Fit `num_centers` centers to `states` [N, d] (any float dtype, any device); the best of `restarts`.

    Arithmetic is float32. The same seed gives the same bits on a CPU; the global generator is not touched.
    `name` says in messages what is clustered. Rows that are not finite in float32 are dropped and counted,
    for cosine zero rows too.

    Raises:
        ValueError: a malformed argument, no usable row, or fewer distinct rows (directions) than centers.
    """
    _check(states, num_centers, distance, iterations, restarts, name)
    points = _usable(states, distance, num_centers, name)
    generator = torch.Generator().manual_seed(seed)
    best: KMeansResult | None = None
    for _ in range(restarts):
        seeds = _seed(points, num_centers, generator, name)
        result = _lloyd(points, seeds, iterations, name)
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    return best


def working_memory(num_rows: int, dim: int, num_centers: int) -> int:
    """Bytes that `kmeans` may hold beyond the states themselves: an upper bound."""
    # The last chunk; the next one gathered, upcast and normalized; two more where d < k and costs are larger.
    chunks = 6 * max(CHUNK_BYTES, 4 * dim, 4 * num_centers)
    per_row = 64 + 4 * _trials(num_centers)  # row numbers, labels, costs, sampling weights, candidates
    per_center_value = 48  # seeds, centers, float64 sums, the best so far
    return chunks + per_row * num_rows + per_center_value * num_centers * dim


def _check(states: Tensor, num_centers: int, distance: str, iterations: int, restarts: int, name: str) -> None:
    if states.ndim != 2 or states.shape[1] == 0 or not states.is_floating_point():
        raise ValueError(f"{name}: wanted floating-point [N, d], got {states.dtype} {list(states.shape)}")
    if distance not in get_args(Distance):
        raise ValueError(f"distance={distance!r}: wanted one of {', '.join(get_args(Distance))}")
    for label, value in (("num_centers", num_centers), ("iterations", iterations), ("restarts", restarts)):
        if value < 1:
            raise ValueError(f"{label}={value}: wanted at least 1")


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Points:
    """The usable rows of `states`, read in float32 chunks; nothing of size [N, d] is ever copied."""

    states: Tensor  # [N, d] as given
    rows: Tensor | None  # [M] numbers of the usable rows; None: all
    distance: Distance
    rescale: bool  # cosine: squares in some row overflow or vanish in float32
    scale: float  # raw distances: power of two that brings extreme values near 1; 1.0 for ordinary ones
    chunk: int  # rows per chunk
    dropped: int

    def __len__(self) -> int:
        return self.states.shape[0] if self.rows is None else self.rows.shape[0]

    def prepare(self, raw: Tensor) -> Tensor:
        """raw [n, d], any dtype -> float32 [n, d] as the distance wants it; a plain float32 chunk as is."""
        raw = raw.float()
        if self.distance != "cosine":
            return raw if self.scale == 1.0 else raw * self.scale
        if self.rescale:
            raw = raw / torch.linalg.vector_norm(raw, math.inf, dim=1, keepdim=True)
        return raw / torch.linalg.vector_norm(raw, dim=1, keepdim=True)

    def take(self, index: Tensor) -> Tensor:
        """The rows numbered `index` [n] among the usable ones: [n, d]."""
        return self.prepare(self.states[index if self.rows is None else self.rows[index]])

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self), self.chunk):
            part = slice(start, min(start + self.chunk, len(self)))
            yield part, self.prepare(self.states[part if self.rows is None else self.rows[part]])


def _usable(states: Tensor, distance: Distance, num_centers: int, name: str) -> _Points:
    chunk = max(1, CHUNK_BYTES // (4 * max(states.shape[1], num_centers)))
    # The largest magnitude of a row is NaN or inf exactly where some value is: one pass, no mask of [N, d].
    largest = torch.empty(states.shape[0], device=states.device)
    for sizes, part in zip(largest.split(chunk), states.split(chunk)):
        torch.linalg.vector_norm(part.float(), math.inf, dim=1, out=sizes)
    keep = largest.isfinite()
    if distance == "cosine":
        keep &= largest > 0
    used = int(keep.sum())
    dropped = states.shape[0] - used
    if used == 0:
        raise ValueError(
            f"{name}: no usable row for {num_centers} center(s): {dropped} given, all of them zero or not "
            "finite. Give data with attended tokens and check that the model's hidden states are finite"
        )
    if dropped:
        logger.warning("%s: %d of %d rows dropped (zero or not finite)", name, dropped, states.shape[0])
    rows = keep.nonzero().squeeze(1) if dropped else None
    low, top = (float(size) for size in largest[keep].aminmax())
    rescale, scale = False, 1.0
    if distance == "cosine":
        rescale = low < SAFE_RANGE[0] or top > SAFE_RANGE[1]
    elif top > SAFE_RANGE[1] or 0 < top < SAFE_RANGE[0]:
        scale = 2.0 ** max(-126, min(126, -math.frexp(top)[1]))
    return _Points(states, rows, distance, rescale, scale, chunk, dropped)


# ------------------------------------------------------------------------------------------------ maths


def _costs(rows: Tensor, centers: Tensor, distance: Distance) -> Tensor:
    """rows [n, d], centers [k, d] -> costs [n, k]: squared distance, or plain for l1; exactly 0 if equal."""
    if distance == "l1":
        return torch.cdist(rows, centers, p=1.0)
    costs = torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist").square_()
    if distance == "cosine":
        costs.masked_fill_(costs <= SAME_DIRECTION, 0.0)
    return costs


def _all_costs(points: _Points, centers: Tensor) -> Tensor:
    """centers [k, d] -> costs [N, k]: for a handful of centers only."""
    costs = torch.empty(len(points), centers.shape[0], device=centers.device)
    for part, rows in points.chunks():
        costs[part] = _costs(rows, centers, points.distance)
    return costs


def _assign(points: _Points, centers: Tensor) -> tuple[Tensor, Tensor]:
    """centers [k, d] -> nearest center of every row [N] and its cost [N]."""
    labels = torch.empty(len(points), dtype=torch.int64, device=centers.device)
    cost = torch.empty(len(points), device=centers.device)
    for part, rows in points.chunks():
        cost[part], labels[part] = _costs(rows, centers, points.distance).min(dim=1)
    return labels, cost


def _update(points: _Points, labels: Tensor, centers: Tensor) -> Tensor:
    """labels [N], all k of them in use -> centers [k, d] of least cost; `centers` are the present ones."""
    if points.distance == "l1":
        return _medians(points, labels, centers.shape[0])
    sums = torch.zeros_like(centers, dtype=torch.float64)
    for part, rows in points.chunks():
        members = torch.nn.functional.one_hot(labels[part], centers.shape[0]).to(rows.dtype)
        sums += members.T @ rows
    means = sums / labels.bincount(minlength=centers.shape[0]).unsqueeze(1)
    if points.distance == "euclidean":
        return means.float()
    norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    # Opposite unit vectors cancel: every direction is then equally good, and the present one has no NaN.
    return torch.where(norms > 1e-6, means / norms.clamp_min(1e-6), centers.double()).float()


def _medians(points: _Points, labels: Tensor, num_centers: int) -> Tensor:
    """labels [N] -> coordinate-wise (lower) medians [k, d], a few columns at a time."""
    dim = points.states.shape[1]
    medians = torch.empty(num_centers, dim, device=labels.device)
    for center in range(num_centers):
        members = (labels == center).nonzero().squeeze(1)
        rows = members if points.rows is None else points.rows[members]
        width = max(1, CHUNK_BYTES // (4 * len(rows)))
        for left in range(0, dim, width):
            columns = points.states[:, left : left + width].index_select(0, rows)
            medians[center, left : left + width] = points.prepare(columns).median(dim=0).values
    return medians


# -------------------------------------------------------------------------------------------- algorithm


def _trials(num_centers: int) -> int:
    return 2 + int(math.log(num_centers))  # as scikit-learn


def _seed(points: _Points, num_centers: int, generator: torch.Generator, name: str) -> Tensor:
    """Greedy k-means++: the next seed is the best of a few rows drawn in proportion to their cost: [k, d]."""
    device = points.states.device
    first = torch.randint(len(points), (1,), generator=generator)
    seeds = points.take(first.to(device))
    cost = _all_costs(points, seeds).squeeze(1)
    while len(seeds) < num_centers:
        weights = cost.cumsum(0, dtype=torch.float64)
        if weights[-1] == 0:  # every row equals a seed, and seeds differ: this counts the distinct rows
            raise ValueError(
                f"{name}: {num_centers} centers wanted, but only {len(seeds)} distinct row(s) among "
                f"{len(points)}. Give more (and more varied) data, or fewer centers through num_centers"
            )
        draws = torch.rand(_trials(num_centers), generator=generator, dtype=torch.float64)
        picks = torch.searchsorted(weights, draws.to(device) * weights[-1], right=True)
        rows = points.take(picks.clamp_(max=len(points) - 1))
        costs = torch.minimum(_all_costs(points, rows), cost.unsqueeze(1))
        winner = costs.sum(dim=0, dtype=torch.float64).argmin()
        seeds = torch.cat([seeds, rows[winner].unsqueeze(0)])
        cost = costs[:, winner].clone()
    return seeds


def _lloyd(points: _Points, centers: Tensor, iterations: int, name: str) -> KMeansResult:
    """Assign and update until no row changes its center, `iterations` updates at most."""
    labels, cost = _assign(points, centers)
    updates = 0
    stable = False
    while updates < iterations and not stable:
        _fill_empty(points, labels, cost, len(centers), name)
        centers = _update(points, labels, centers)
        before = labels
        labels, cost = _assign(points, centers)
        stable = torch.equal(labels, before)
        updates += 1
    unscale = points.scale if points.distance == "l1" else points.scale**2
    inertia = float(cost.sum(dtype=torch.float64)) / unscale
    return KMeansResult(centers / points.scale, inertia, updates, points.dropped)


def _fill_empty(points: _Points, labels: Tensor, cost: Tensor, num_centers: int, name: str) -> None:
    """Give every empty cluster the row farthest from its center (in place: labels [N], cost [N]).

    A cluster's only row stays where it is, and a row equal to one just moved no longer counts as far. With at
    least `num_centers` distinct rows some other cluster holds two distinct ones, so a far row always exists.
    """
    counts = labels.bincount(minlength=num_centers)
    for empty in (counts == 0).nonzero().flatten().tolist():
        row = cost.masked_fill(counts[labels] == 1, -1.0).argmax()
        counts[labels[row]] -= 1
        counts[empty] = 1
        labels[row] = empty
        torch.minimum(cost, _all_costs(points, points.take(row.unsqueeze(0))).squeeze(1), out=cost)
        logger.info("%s: center %d lost all its rows and moved to the farthest one", name, empty)
