"""Tests that need a GPU; elsewhere their files are not even collected. `pytest tests/gpu` runs them."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "contract"))  # its tables of methods
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
