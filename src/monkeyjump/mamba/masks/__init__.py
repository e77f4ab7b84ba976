"""Learned masks: gates on channels, states or single weights, under one budget."""

from monkeyjump.mamba.masks.callback import MaskUpdate
from monkeyjump.mamba.masks.config import MaskConfig
from monkeyjump.mamba.masks.learned import LearnedMasks, attach_masks

__all__ = ["LearnedMasks", "MaskConfig", "MaskUpdate", "attach_masks"]
