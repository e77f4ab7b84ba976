"""The selective scan of Mamba with interchangeable backends."""

from monkeyjump.mamba.scan.choice import BACKENDS
from monkeyjump.mamba.scan.interface import selective_scan

__all__ = ["BACKENDS", "selective_scan"]
