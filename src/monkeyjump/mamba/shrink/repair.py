"""Least-squares repair: out_proj of a shrunk block learns to give what the dense one gave.

Over data, with `x [tokens, k]` what the shrunk block's reader (out_proj, down_proj) reads and `y [tokens, d]` what the
dense block's reader gives, the new weight minimizes

    mean |W x + b - y|^2 + ridge * mean(x^2) * |W - W0|^2,     W0 the weight as it was kept.

Blocks are repaired in their order, a pass over the data for each, which then reads what the repaired blocks before it
give. Without `one_by_one` a single pass serves all, which repairs less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.evaluating import Batch, attended, evaluating


def repair(
    shrunk: nn.Module, dense: nn.Module, batches: Iterable[Batch], *, ridge: float = 1e-3, one_by_one: bool = True
) -> None:
    """Fit the readers of `shrunk`, in place, to what those of `dense` give on `batches`, keyword arguments of both.

    Blocks that are as wide in both stay as they are. Raises `ValueError` if there is no batch or `ridge` is negative.
    """
    if ridge < 0:
        raise ValueError(f"ridge={ridge!r} must be 0 or more")
    narrow, wide = channel_groups(shrunk), channel_groups(dense)
    names = [name for name in narrow if narrow[name].units < wide[name].units]
    kept = list(batches)
    if not kept:
        raise ValueError("batches is empty: the repair needs at least one batch")
    for chosen in [[name] for name in names] if one_by_one else [names]:
        readers = {name: _reader(narrow[name]) for name in chosen}
        sums = {name: _Sums(reader) for name, reader in readers.items()}
        _accumulate(shrunk, dense, kept, sums, {name: _reader(wide[name]) for name in chosen})
        for name, reader in readers.items():
            with torch.no_grad():
                reader.weight.copy_(sums[name].solve(reader.weight, ridge))


class _Sums:
    """`x^T x [k, k]` and `x^T (y - b) [k, d]`, float64."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.x = reader, torch.empty(0)
        self.xx = self.xy = torch.zeros((), dtype=torch.float64, device=reader.weight.device)

    def add(self, target: Tensor) -> None:
        x = self.x.double()
        y = target.double() - (0 if self.reader.bias is None else self.reader.bias.double())
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ y

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        tiny = torch.finfo(torch.float32).eps  # channels that never fire keep their weight
        strength = (ridge + tiny) * self.xx.diagonal().mean()
        regular = self.xx + strength * torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        return torch.linalg.solve(regular, self.xy + strength * weight.double().T).T.to(weight.dtype)


def _reader(group: Any) -> Any:
    return group.block.get_submodule(group.reader)


def _accumulate(
    shrunk: nn.Module, dense: nn.Module, batches: list[Batch], sums: dict[str, _Sums], targets: dict[str, Any]
) -> None:
    current: Batch = {}

    def read(name: str, x: Tensor) -> None:
        sums[name].x = attended(x, current)

    def given(name: str, y: Tensor) -> None:
        sums[name].add(attended(y, current))

    hooks = [
        s.reader.register_forward_pre_hook(lambda module, inputs, name=name: read(name, inputs[0]))
        for name, s in sums.items()
    ]
    hooks += [
        target.register_forward_hook(lambda module, inputs, output, name=name: given(name, output))
        for name, target in targets.items()
    ]
    with evaluating(shrunk), evaluating(dense), torch.no_grad(), _removed(hooks):
        for current in batches:
            shrunk(**current)
            dense(**current)


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
