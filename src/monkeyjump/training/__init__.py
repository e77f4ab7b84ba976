"""Training runs: from a YAML file to an adapter with its numbers."""

from monkeyjump.training.config import RunConfig
from monkeyjump.training.fit import Fitted, Watch, fit
from monkeyjump.training.folder import open_run
from monkeyjump.training.plan import Plan, make_plan
from monkeyjump.training.read import read_run
from monkeyjump.training.run import train_run
from monkeyjump.training.saving import SaveFailed, save_adapter
from monkeyjump.training.signals import Interrupted

__all__ = [
    "Fitted",
    "Interrupted",
    "Plan",
    "RunConfig",
    "SaveFailed",
    "Watch",
    "fit",
    "make_plan",
    "open_run",
    "read_run",
    "save_adapter",
    "train_run",
]
