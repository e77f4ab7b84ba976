"""A row of the table of methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monkeyjump.methods.formula import Block, Formula

NO_LOSS = "none"


@dataclass(frozen=True)
class Table4:
    """A row of Table 4 of the Monkey Jump paper, per block; d stands for inputs and outputs alike."""

    space: str
    time: str
    trainable: str
    router: str


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: on the command line: `--methods` of train, `--candidates` of bench.
        title: in papers.
        base: as a run's file names it.
        routed: whether Monkey Jump routes it.
        options: fields that make it this variant of `base`.
        unread: fields that its config has and does not read.
        trains: what trains.
        adapters, router: trainable parameters of a block.
        routing: who decides what acts on a token.
        losses: beside the task's.
        source: where the definition comes from.
        sure: how sure we are of it.
        cost: Table 4's columns as we find them; `paper`: as they are printed, None where it has no such row.
        reported: trainable parameters in thousands as in the paper's Figure 2, None where it has no such bar.
        remarks: where `cost` and `paper` differ, and why.
    """

    name: str
    title: str
    base: str
    trains: str
    adapters: Formula
    source: str
    sure: str
    cost: Table4
    paper: Table4 | None = None
    router: Formula = Formula()
    routing: str = "none: every adapter acts on every token"
    losses: str = NO_LOSS
    routed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    reported: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def config_class(self) -> type:
        """Its config's class, as PEFT knows it."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        from monkeyjump.tuner.registry import config_class

        return config_class(self.base) if self.routed else PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.base.upper()]]

    def fields(self) -> set[str]:
        """Names of its config's fields that mean something."""
        return {one.name for one in dataclasses.fields(self.config_class)} - set(self.unread)

    def config(self, **fields: Any) -> Any:
        """Its config, from those of the given fields that it has: one call for methods with different fields."""
        known = self.fields()
        taken = {name: value for name, value in {**fields, **self.options}.items() if name in known}
        return self.config_class(**taken)

    def count(self, blocks: Sequence[Block], values: Mapping[str, int], experts: Sequence[int] = ()) -> int:
        """Trainable parameters by its formulas; arguments as in `Formula.count`."""
        return self.adapters.count(blocks, values, experts) + self.router.count(blocks, values, experts)
