"""The modules that an adapter can be put on, and the weight of each as a matrix `[d_out, d_in]`.

nn.Linear           weight [d_out, d_in]
Conv1D (GPT-2)      weight [d_in, d_out]
depthwise conv1d    weight [channels, 1, kernel]: a matrix [channels, kernel]

The output layer is left out: it is large, often tied to the embedding, and no adapter on it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from monkeyjump.suggest import did_you_mean


@dataclass(frozen=True)
class Matrix:
    """The weight of a module as a matrix; `output_axis` is where the outputs are in the stored tensor."""

    d_out: int
    d_in: int
    output_axis: int = 0

    @property
    def full_rank(self) -> int:
        return min(self.d_out, self.d_in)


def plain_weight(module: nn.Module, name: str = "weight") -> nn.Parameter:
    """The stored parameter, under whatever parametrizations lie on it."""
    if parametrize.is_parametrized(module, name):
        return module.parametrizations[name].original  # type: ignore[index, union-attr]
    return getattr(module, name)


def matrix_of(module: nn.Module) -> Matrix | None:
    """The module's weight as a matrix; None where no adapter can be put on it."""
    if isinstance(module, nn.Conv1d):
        if not module.groups == module.in_channels == module.out_channels:
            return None
        found = Matrix(module.out_channels, module.kernel_size[0])
    elif isinstance(module, nn.Linear):
        found = Matrix(module.out_features, module.in_features)
    elif isinstance(module, Conv1D):
        found = Matrix(module.nf, module.nx, output_axis=1)
    else:
        return None
    weight = plain_weight(module)
    is_plain = type(weight) is nn.Parameter and weight.is_floating_point()  # neither quantized nor sharded
    return found if is_plain else None


def adaptable_modules(model: nn.Module) -> dict[str, Matrix]:
    """Path -> matrix of every module that an adapter can be put on, in definition order."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {name: matrix_of(module) for name, module in model.named_modules() if name and module is not head}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def known_matrices(model: nn.Module, names: Iterable[str], field: str) -> dict[str, Matrix]:
    """The matrices of the named modules.

    Raises:
        ValueError: no adapter can be put on a name; `field` is what it stood in.
    """
    known = adaptable_modules(model)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{field} names {name!r}, which is no linear layer or depthwise conv1d with plain weights: "
                f"{did_you_mean(name, known)}monkeyjump.allocation.adaptable_modules(model) lists them"
            )
    return {name: known[name] for name in names}
