"""The kernel of the authors of Mamba, from the mamba-ssm package or from the Hub through the kernels package."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

from torch import Tensor

HUB = "kernels-community/mamba-ssm"
INSTALLED = any(importlib.util.find_spec(package) is not None for package in ("mamba_ssm", "kernels"))


@functools.cache
def _kernel() -> Callable:
    if importlib.util.find_spec("mamba_ssm") is not None:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return importlib.import_module("kernels").get_kernel(HUB, version=1).selective_scan_fn


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`y` `[B, D, L]` and the last state `[B, D, N]`; the arguments are those of `selective_scan`.

    The kernel reads A, D and the bias as float32.
    """
    d, bias = (None if t is None else t.float() for t in (D, delta_bias))
    return _kernel()(u, delta.to(u.dtype), A.float(), B, C, d, z, bias, delta_softplus, return_last_state=True)
