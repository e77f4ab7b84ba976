"""Training runs."""

from .run import Step, TrainResult, TrainSettings, train
from .saving import save_adapter

__all__ = ["Step", "TrainResult", "TrainSettings", "save_adapter", "train"]
