"""Pretraining of a small Mamba on real text, on a CPU."""

from monkeyjump.mamba.pretraining.run import pretrain
from monkeyjump.mamba.pretraining.settings import PretrainRun, open_pretraining

__all__ = ["PretrainRun", "open_pretraining", "pretrain"]
