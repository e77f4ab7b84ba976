"""Kernels in C for what torch has no fast operation for: float32 on a CPU, products of a wide matrix with a thin one.

They are compiled when the package is installed where a compiler is there; everything works without them, and
everything that they compute is stated in torch beside the call (`ops/low_rank.py`, `routing/gates.py`,
`routing/ema.py`, `ops/dropout.py`). `MONKEYJUMP_NATIVE=0` in the environment switches them off.

They are reached through ctypes, so that neither Python's nor torch's headers are needed, and run on the OpenMP
threads of torch, which is imported first: no second pool of threads fights with it for the cores.
"""

from monkeyjump.native.kernels import (
    center_sums,
    draw_bits,
    is_there,
    is_traced,
    low_rank_backward,
    low_rank_forward,
    route,
    scale_backward,
    scale_forward,
    serves,
    serves_update,
)

__all__ = [
    "center_sums",
    "draw_bits",
    "is_there",
    "is_traced",
    "low_rank_backward",
    "low_rank_forward",
    "route",
    "scale_backward",
    "scale_forward",
    "serves",
    "serves_update",
]
