"""Training runs."""

from monkeyjump.training.run import Step, TrainResult, TrainSettings, train
from monkeyjump.training.saving import save_adapter

__all__ = ["Step", "TrainResult", "TrainSettings", "save_adapter", "train"]
