"""Mamba: its scans on any machine, and stock Hugging Face models that run on them."""

from monkeyjump.mamba.patch import patch_mamba, patched_mamba, unpatch_mamba
from monkeyjump.mamba.scan import BACKENDS, selective_scan
from monkeyjump.mamba.ssd import ssd_scan

__all__ = ["BACKENDS", "patch_mamba", "patched_mamba", "selective_scan", "ssd_scan", "unpatch_mamba"]
