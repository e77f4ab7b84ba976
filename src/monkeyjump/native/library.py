"""The compiled file, if there is one."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # noqa: F401  its OpenMP library must be the first

logger = logging.getLogger("monkeyjump")

SWITCH = "MONKEYJUMP_NATIVE"
NAME = "_kernels"

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mj_low_rank_forward": (c_int, [*[c_void_p] * 6, *[c_int64] * 5, c_float, c_int, *[c_void_p] * 2]),
    "mj_low_rank_backward": (c_int, [*[c_void_p] * 7, *[c_int64] * 5, c_float, c_int, *[c_void_p] * 3]),
    "mj_scale_forward": (None, [*[c_void_p] * 3, *[c_int64] * 2, c_int, c_void_p]),
    "mj_scale_backward": (c_int, [*[c_void_p] * 4, *[c_int64] * 2, c_int, *[c_void_p] * 2]),
    "mj_dropout_bits": (None, [c_uint64, c_uint32, c_int64, c_int, c_void_p]),
    "mj_route": (c_int, [*[c_void_p] * 2, *[c_int64] * 5, *[c_float] * 2, c_int, *[c_void_p] * 3]),
    "mj_center_sums": (c_int, [*[c_void_p] * 2, *[c_int64] * 3, *[c_int] * 2, *[c_void_p] * 2]),
    "mj_scan_forward": (None, [*[c_void_p] * 8, *[c_int64] * 4, c_int, *[c_void_p] * 3]),
    "mj_scan_backward": (c_int, [*[c_void_p] * 10, *[c_int64] * 4, c_int, *[c_void_p] * 7]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they were not compiled, do not load, or are switched off."""
    path = _compiled_file()
    if os.environ.get(SWITCH) == "0" or path is None:
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        logger.info("the compiled kernels do not load, torch's operations serve instead: %s", error)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _compiled_file() -> Path | None:
    candidates = (Path(__file__).with_name(NAME + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)
