"""Parameter counts as formulas: one text that is printed, evaluated, and tested against real adapters.

i, o     inputs and outputs of an adapted projection        E   adapted projections of a block
d        width of the block's states                        R   those of them that Monkey Jump routes
r        rank                                               F   those of them in the feed-forward
N        experts of a projection                            T   tasks; H   attention heads
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
SHARED = ("o_proj", "gate_proj")  # what Monkey Jump does not route by default


@dataclass(frozen=True)
class Block:
    """The adapted projections of a block: name -> (inputs, outputs); `hidden` is the width of its states."""

    hidden: int
    projections: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Formula:
    """Parameters of one block, summed over its adapted projections, and what a model has once.

    Attributes:
        projection: of each adapted projection.
        feed_forward: of those in the feed-forward, where it differs.
        block: beside the projections.
        model: beside the blocks.
    """

    projection: str = ""
    feed_forward: str = ""
    block: str = ""
    model: str = ""

    def __str__(self) -> str:
        parts = []
        if self.feed_forward:
            parts += [f"Σ attention [{self.projection}]", f"Σ feed-forward [{self.feed_forward}]"]
        elif self.projection:
            parts.append(f"Σ [{self.projection}]")
        parts += [self.block] if self.block else []
        parts += [f"once {self.model}"] if self.model else []
        return " + ".join(parts).replace(" * ", " ") or "0"

    def count(self, blocks: Sequence[Block], values: Mapping[str, int], experts: Sequence[int] = ()) -> int:
        """Parameters of a whole model.

        Args:
            values: of the symbols that are not shapes: r, N, T and so on.
            experts: N of each block, where it differs from block to block.
        """
        total = _value(self.model, {**values, "d": blocks[0].hidden})
        for number, block in enumerate(blocks):
            own = {**values, "N": experts[number]} if experts else values
            total += self._of_block(block, own)
        return total

    def _of_block(self, block: Block, values: Mapping[str, int]) -> int:
        names = list(block.projections)
        routed = [name for name in names if name not in SHARED] or names
        forward = [name for name in names if name in FEED_FORWARD]
        known = {**values, "d": block.hidden, "E": len(names), "R": len(routed), "F": len(forward)}
        total = _value(self.block, known)
        for name, (i, o) in block.projections.items():
            text = self.feed_forward if self.feed_forward and name in FEED_FORWARD else self.projection
            total += _value(text, {**known, "i": i, "o": o})
        return total


def _value(text: str, known: Mapping[str, int]) -> int:
    return eval(text, {"__builtins__": {}}, dict(known)) if text else 0  # only ever the table's own texts
