"""Which module gets LoRA, which IA³, which stays frozen: `allocate_peft`, and the allocations it is compared with.

Modules are ranked by importance, highest first; equal scores keep the model's own order.

    n modules   ->  tuned   = round(n * peft_application_ratio)
                    LoRA    = round(tuned * importance_threshold)     the first of them
                    IA³     = the other tuned ones;  frozen: the rest

`round` rounds halves up, on the decimal that was written: 4 modules at 0.3 are 1.2, so one is tuned, and half of
one is 0.5, so it gets LoRA; 5 modules at 0.5 are 2.5, so three are tuned and 1.5 -> 2 of them get LoRA. A ratio
that tunes no module is refused.

LoRA of rank r costs r (d_out + d_in) parameters, IA³ costs d_out. A rank is never above min(d_out, d_in), where a
larger one could not add anything. The scale of every LoRA is peft_alpha / peft_r, also where its rank is another.

With `budget`, kinds stay as above and the ranks follow from it: first the largest rank that all LoRA modules can
have alike, then one more for each in the order of importance, again and again, as long as it still fits. What is
left over is less than the cheapest step. IA³ has no rank, so a plan without LoRA costs what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from torch import nn

from monkeyjump.allocation.importance import MEANING, Importance
from monkeyjump.allocation.matrices import Matrix, adaptable_modules, known_matrices
from monkeyjump.suggest import check_choice, did_you_mean

Kind = Literal["lora", "ia3", "frozen"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class ModulePlan:
    """What one module gets. `rank` is 0 where it is no LoRA, `parameters` is what it trains."""

    name: str
    kind: Kind
    score: float
    rank: int
    parameters: int


@dataclass(frozen=True)
class PeftPlan:
    """An allocation: its modules, most important first.

    Attributes:
        method: what the scores are (`Importance.method`).
        scale: of every LoRA, peft_alpha / peft_r.
    """

    modules: tuple[ModulePlan, ...]
    method: str
    scale: float

    @property
    def parameters(self) -> int:
        """How many parameters the plan trains."""
        return sum(module.parameters for module in self.modules)

    def of(self, kind: Kind) -> list[ModulePlan]:
        return [module for module in self.modules if module.kind == kind]

    def lines(self, show: int = 5) -> list[str]:
        """The plan for a log: the first `show` modules of each kind with their scores."""
        meaning = MEANING[self.method.removeprefix("shuffled ")]
        found = [f"Importance: {self.method} ({meaning}), {len(self.modules)} modules"]
        for kind, label in (("lora", "LoRA"), ("ia3", "IA³"), ("frozen", "frozen")):
            members = self.of(kind)  # type: ignore[arg-type]
            found.append(f"{label}: {len(members)} modules, {sum(one.parameters for one in members):,} parameters")
            for one in members[:show]:
                rank = f", rank {one.rank}" if one.rank else ""
                found.append(f"  {one.name}: {self.method} {one.score:.4g}{rank}")
            if len(members) > show:
                found.append(f"  and {len(members) - show} more layers")
        return found

    def as_record(self) -> dict[str, Any]:
        """For JSON; `plan_from` is the inverse."""
        return asdict(self)


def plan_from(record: Mapping[str, Any]) -> PeftPlan:
    """Raises KeyError or TypeError where fields are missing or unknown, ValueError for an unknown kind."""
    modules = tuple(ModulePlan(**one) for one in record["modules"])
    for one in modules:
        check_choice(f"kind of {one.name}", one.kind, KINDS)
    return PeftPlan(**{**record, "modules": modules})


def allocate_peft(
    model: nn.Module,
    scores: Importance | Mapping[str, float],
    peft_application_ratio: float = 0.3,
    importance_threshold: float = 0.5,
    peft_r: int = 16,
    peft_alpha: float = 32,
    budget: int | None = None,
) -> PeftPlan:
    """Allocate LoRA, IA³ and nothing to modules by importance; the module's docstring has the rules.

    Args:
        scores: importance by module path; only these modules take part.
        peft_application_ratio: share of the modules that are tuned, in (0, 1].
        importance_threshold: share of the tuned ones that get LoRA, in [0, 1].
        peft_r, peft_alpha: rank and alpha of LoRA; its scale is their quotient.
        budget: trainable parameters in all, instead of the rank; the plan never costs more.

    Raises:
        ValueError: an option out of range, an unknown module, a score that is not finite, a ratio that tunes
            nothing, a budget that does not pay for rank 1.
    """
    given = scores if isinstance(scores, Importance) else Importance("given", dict(scores))
    _check_options(peft_application_ratio, importance_threshold, peft_r, peft_alpha)
    matrices = _ranked(model, given)
    tuned = _round(Fraction(str(peft_application_ratio)) * len(matrices))
    if not tuned:
        raise ValueError(
            f"peft_application_ratio={peft_application_ratio} of {len(matrices)} modules is none; "
            f"raise it to at least {0.5 / max(1, len(matrices)):.3g}"
        )
    lora = _round(Fraction(str(importance_threshold)) * tuned)
    places = range(len(matrices))
    kinds: list[Kind] = ["lora" if i < lora else "ia3" if i < tuned else "frozen" for i in places]
    return _plan(given, matrices, kinds, peft_r, peft_alpha, budget)


def uniform_peft(
    model: nn.Module,
    kind: Kind,
    only: Sequence[str] | None = None,
    peft_r: int = 16,
    peft_alpha: float = 32,
    budget: int | None = None,
) -> PeftPlan:
    """The same kind of adapter on every module, or on those that `only` names: an allocation to compare with.

    Args:
        kind: "lora" or "ia3".
        only: last parts of module paths, such as the projections of the state space model of Mamba,
            `("x_proj", "dt_proj")`; the others are frozen.
        peft_r, peft_alpha, budget: as for `allocate_peft`.

    Raises:
        ValueError: an unknown kind or name, a budget that does not pay for rank 1.
    """
    check_choice("kind", kind, ("lora", "ia3"))
    _check_options(1.0, 1.0, peft_r, peft_alpha)
    known = adaptable_modules(model)
    leaves = {name.rpartition(".")[2] for name in known}
    for name in only or ():
        if name not in leaves:
            raise ValueError(
                f"only names {name!r}, which no module is called: {did_you_mean(name, leaves)}there are "
                f"{', '.join(sorted(leaves))}"
            )
    kinds: dict[str, Kind] = {
        name: kind if only is None or name.rpartition(".")[2] in only else "frozen" for name in known
    }
    order = sorted(known, key=lambda name: kinds[name] == "frozen")
    none = Importance("none", dict.fromkeys(known, 0.0))
    return _plan(none, {n: known[n] for n in order}, [kinds[n] for n in order], peft_r, peft_alpha, budget)


def _check_options(ratio: float, threshold: float, r: int, alpha: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"peft_application_ratio={ratio} must be above 0 and at most 1: the share of modules tuned")
    if not 0 <= threshold <= 1:
        raise ValueError(f"importance_threshold={threshold} must be from 0 to 1: the share of them that gets LoRA")
    if not (isinstance(r, int) and r >= 1):
        raise ValueError(f"peft_r={r!r} must be a whole number from 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"peft_alpha={alpha} must be above 0 and finite")


def _ranked(model: nn.Module, importance: Importance) -> dict[str, Matrix]:
    """The matrices of the scored modules, most important first; ties in the model's order."""
    if not importance.scores:
        raise ValueError("scores is empty; score at least one module, for instance with taylor_importance")
    known_matrices(model, importance.scores, "scores")
    for name, score in importance.scores.items():
        if not math.isfinite(score):
            raise ValueError(f"scores[{name!r}] is {score}; give finite scores")
    in_order = {name: matrix for name, matrix in adaptable_modules(model).items() if name in importance.scores}
    return {name: in_order[name] for name in sorted(in_order, key=lambda name: -importance.scores[name])}


def _round(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def _plan(
    importance: Importance,
    matrices: dict[str, Matrix],
    kinds: Sequence[Kind],
    r: int,
    alpha: float,
    budget: int | None,
) -> PeftPlan:
    """The plan for modules in order, given their kinds."""
    low_rank = [matrix for matrix, kind in zip(matrices.values(), kinds) if kind == "lora"]
    scales = sum(matrix.d_out for matrix, kind in zip(matrices.values(), kinds) if kind == "ia3")
    if budget is None:
        ranks = [min(r, matrix.full_rank) for matrix in low_rank]
    else:
        ranks = ranks_within(low_rank, budget - scales, budget)
    following = iter(ranks)
    modules = []
    for (name, matrix), kind in zip(matrices.items(), kinds):
        rank = next(following) if kind == "lora" else 0
        cost = {"lora": rank * (matrix.d_out + matrix.d_in), "ia3": matrix.d_out, "frozen": 0}[kind]
        modules.append(ModulePlan(name, kind, importance.scores[name], rank, cost))
    return PeftPlan(tuple(modules), importance.method, alpha / r)


def ranks_within(matrices: Sequence[Matrix], left: int, budget: int) -> list[int]:
    """Ranks of LoRA modules in order of importance, for `left` parameters of a `budget`.

    Raises:
        ValueError: `left` does not pay for rank 1 of each.
    """
    costs = [matrix.d_out + matrix.d_in for matrix in matrices]
    least = budget - left + sum(costs)
    if left < sum(costs):
        raise ValueError(
            f"budget={budget} is less than the {least} parameters that these modules take at rank 1; raise it, or "
            "tune fewer modules"
        )
    ranks = [1] * len(costs)
    left -= sum(costs)
    while steps := [i for i, matrix in enumerate(matrices) if ranks[i] < matrix.full_rank]:
        if sum(costs[i] for i in steps) <= left:  # one more for all
            taken = steps
        else:
            taken = list(_affordable(steps, costs, left))
        if not taken:
            break
        for i in taken:
            ranks[i] += 1
            left -= costs[i]
    return ranks


def _affordable(steps: Iterable[int], costs: Sequence[int], left: int) -> Iterable[int]:
    for i in steps:
        if costs[i] <= left:
            left -= costs[i]
            yield i
