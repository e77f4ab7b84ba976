"""From a pretrained Mamba to an adapted and shrunk one: order, masks, hybrid PEFT."""

from monkeyjump.mamba.adapting.run import adapt
from monkeyjump.mamba.adapting.settings import AdaptRun, open_adapting
from monkeyjump.mamba.adapting.shrinking import ShrinkRequest, shrink_model

__all__ = ["AdaptRun", "ShrinkRequest", "adapt", "open_adapting", "shrink_model"]
