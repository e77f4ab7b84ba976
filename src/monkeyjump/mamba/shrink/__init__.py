"""Physically smaller models: removal, repair, loading."""

from monkeyjump.mamba.shrink.folder import load_shrunk
from monkeyjump.mamba.shrink.remove import shrink
from monkeyjump.mamba.shrink.repair import repair

__all__ = ["load_shrunk", "repair", "shrink"]
