"""Which module gets which adapter: importance, allocation by it, and adapters as weight parametrizations."""

from monkeyjump.allocation.attach import adapter_parameters, attach_peft, merge_peft, probe_gradients, remove_peft
from monkeyjump.allocation.export import export_peft
from monkeyjump.allocation.files import load_peft, save_peft
from monkeyjump.allocation.importance import Importance, mask_importance, shuffled, taylor_importance
from monkeyjump.allocation.matrices import adaptable_modules
from monkeyjump.allocation.parametrization import parameters_along
from monkeyjump.allocation.plan import ModulePlan, PeftPlan, allocate_peft, uniform_peft

__all__ = [
    "Importance",
    "ModulePlan",
    "PeftPlan",
    "adaptable_modules",
    "adapter_parameters",
    "allocate_peft",
    "attach_peft",
    "export_peft",
    "load_peft",
    "mask_importance",
    "merge_peft",
    "parameters_along",
    "probe_gradients",
    "remove_peft",
    "save_peft",
    "shuffled",
    "taylor_importance",
    "uniform_peft",
]
