"""LoRA and IA³ as parametrizations of a weight: whoever reads `module.weight` reads the adapted one.

    LoRA    W + s B A       A [r, d_in], B [d_out, r] (0 at the start)
    IA³     l * W, l * b    l [d_out] (1 at the start), on the rows of the weight and on the bias

PEFT's adapters act where a module is called. Mamba's mixer also computes with `dt_proj.weight` and
`conv1d.weight`, and fused kernels with the weights of x_proj and out_proj; a parametrization reaches all of them.
Its price: each reading computes the adapted weight, and the backward pass the gradient of all of it. Dropout on
the input, as PEFT's LoRA has it, cannot be expressed. Adapters are float32; the sum has the weight's dtype, so
in bfloat16 changes below 1/256 of a weight are rounded away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monkeyjump.allocation.matrices import Matrix, matrix_of, plain_weight


class LowRank(nn.Module):
    """`W + scale * B A`."""

    def __init__(self, matrix: Matrix, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.output_axis, self.rank, self.scale = matrix.output_axis, rank, scale
        self.lora_A = nn.Parameter(torch.empty(rank, matrix.d_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(matrix.d_out, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT's

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.scale * (self.lora_B @ self.lora_A)
            delta = delta.T if self.output_axis == 1 else delta
            return weight + delta.reshape(weight.shape).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class RowScale(nn.Module):
    """`l * W`, one factor for each output."""

    def __init__(self, matrix: Matrix, device: torch.device) -> None:
        super().__init__()
        self.output_axis = matrix.output_axis
        self.ia3_l = nn.Parameter(torch.ones(matrix.d_out, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        shape = [1] * weight.dim()
        shape[self.output_axis] = -1
        return weight * self.ia3_l.view(shape).to(weight.dtype)


class BiasScale(nn.Module):
    """`l * b` with the factors of a `RowScale`, which stays the only owner of them."""

    def __init__(self, rows: RowScale) -> None:
        super().__init__()
        self.rows = (rows,)  # in a tuple, so that the factors are registered and saved once

    def forward(self, bias: Tensor) -> Tensor:
        return bias * self.rows[0].ia3_l.to(bias.dtype)


Adapter = LowRank | RowScale | BiasScale


def put_lora(module: nn.Module, rank: int, scale: float) -> None:
    """Adapt a module's weight by LoRA."""
    matrix = matrix_of(module)
    assert matrix is not None
    adapter = LowRank(matrix, rank, scale, plain_weight(module).device)
    parametrize.register_parametrization(module, "weight", adapter, unsafe=True)
    module.train(module.training)  # the list that torch puts around the adapter is born in training mode


def put_ia3(module: nn.Module) -> None:
    """Adapt a module's output by IA³: its weight's rows, and its bias where it has one."""
    matrix = matrix_of(module)
    assert matrix is not None
    rows = RowScale(matrix, plain_weight(module).device)
    parametrize.register_parametrization(module, "weight", rows, unsafe=True)
    if module.bias is not None:
        parametrize.register_parametrization(module, "bias", BiasScale(rows), unsafe=True)
    module.train(module.training)


def adapters_on(module: nn.Module) -> dict[str, Adapter]:
    """The adapters on a module, by the name of the tensor ("weight", "bias")."""
    if not parametrize.is_parametrized(module):
        return {}
    found = {}
    for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
        for one in chain:
            if isinstance(one, Adapter):
                found[name] = one
    return found


def take_off(module: nn.Module, merge: bool) -> None:
    """Remove a module's adapters; `merge` leaves the adapted tensors, else the original ones come back."""
    found = adapters_on(module)
    if not found:  # frozen in the plan: its class is the stock one, which a copy of would no longer be known by
        return
    own_class(module)
    for name in found:
        parametrize.remove_parametrizations(module, name, leave_parametrized=merge)


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that it shares with no copy of it.

    torch makes the class when it parametrizes and deletes the class's properties when it stops; a deepcopy has the
    same class, and would lose its weight together with the original.
    """
    cls: Any = type(module)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, members)


def foreign_parametrizations(module: nn.Module) -> list[str]:
    """Names of tensors whose adapter shares them with a parametrization that is none of ours."""
    chains = {name: module.parametrizations[name] for name in adapters_on(module)}  # type: ignore[index]
    return [name for name, chain in chains.items() if not all(isinstance(one, Adapter) for one in chain)]


def parameters_along(module: nn.Module, tensor: str, axis: int) -> list[tuple[nn.Parameter, int]]:
    """The parameters that follow an axis of a module's tensor, each with its own axis.

    Whoever permutes or removes entries of `module.weight` or `module.bias` along `axis` must do the same to each
    of these, and to the optimizer's moments of them. The factors of IA³, which act on both tensors, are listed with
    the weight alone.

    Args:
        tensor: "weight" or "bias".
        axis: of the tensor as it is stored.
    """
    found = [(plain_weight(module, tensor), axis)]
    adapter = adapters_on(module).get(tensor)
    if isinstance(adapter, RowScale) and axis == adapter.output_axis:
        found.append((adapter.ia3_l, 0))
    elif isinstance(adapter, LowRank):
        outputs = axis == adapter.output_axis
        found.append((adapter.lora_B, 0) if outputs else (adapter.lora_A, 1))
    return found
