"""Which backend serves."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from monkeyjump.mamba.scan import cuda
from monkeyjump.native.scan import MOST_STATES, is_compiled
from monkeyjump.suggest import check_choice

logger = logging.getLogger("monkeyjump")

BACKENDS = ("auto", "cuda", "native", "chunked", "reference")
COMPILED = is_compiled()  # asked once, when this is imported: torch.compile does not look into it
_said: set[str] = set()


def choose(backend: str, u: Tensor, states: int, continued: bool) -> str:
    """The backend's name, never "auto".

    Args:
        backend: one of BACKENDS.
        u: the scan's input.
        states: N.
        continued: whether there is an initial state, which mamba-ssm's kernel does not take.

    Raises:
        ValueError: no such backend, or not for these tensors.
        RuntimeError: it is not installed.
    """
    check_choice("backend", backend, BACKENDS)
    obstacles = {"cuda": _against_cuda(u, continued), "native": _against_native(u, states)}
    if backend == "auto":
        found = next((name for name, obstacle in obstacles.items() if obstacle is None), "chunked")
        _say(found, obstacles["cuda" if u.is_cuda else "native"])
        return found
    obstacle = obstacles.get(backend)
    if obstacle is not None:
        raise obstacle
    return backend


def _against_cuda(u: Tensor, continued: bool) -> Exception | None:
    if not u.is_cuda:
        return ValueError(f'backend "cuda" takes tensors on a GPU; u is on {u.device.type}: choose "auto"')
    if continued:
        return ValueError('backend "cuda" takes no initial_state: choose "auto" or "chunked"')
    if not cuda.INSTALLED:
        return RuntimeError('backend "cuda" needs mamba-ssm or the kernels package: pip install mamba-ssm')
    return None


def _against_native(u: Tensor, states: int) -> Exception | None:
    if u.device.type not in ("cpu", "meta"):
        return ValueError(f'backend "native" takes tensors on the CPU; u is on {u.device.type}: choose "auto"')
    if u.dtype == torch.float64:
        return ValueError('backend "native" computes in float32; u is float64: choose "chunked" or "reference"')
    if states > MOST_STATES:
        return ValueError(f'backend "native" takes at most {MOST_STATES} states; A has {states}: choose "chunked"')
    if not COMPILED:
        return RuntimeError(
            "the compiled scan is not there (no C compiler when monkeyjump was installed, or MONKEYJUMP_NATIVE=0): "
            "install a compiler and monkeyjump again"
        )
    return None


def _say(found: str, obstacle: Exception | None) -> None:
    """Once per backend, and not while torch.compile looks on."""
    if torch.compiler.is_compiling() or found in _said:
        return
    _said.add(found)
    if obstacle is None:
        logger.info("selective_scan: backend %s", found)
    else:
        logger.warning("selective_scan: backend %s, slower: %s", found, obstacle)
