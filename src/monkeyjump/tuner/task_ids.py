"""Task ids on their way through PEFT.

PEFT's task-typed wrappers (`PeftModelForCausalLM`, ...) take `task_ids` for Poly and drop it for
every other method, before any tuner sees it. Routed adapters need it, so each wrapper's forward hands
it on under a name of our own.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import Tensor

from monkeyjump.config import MonkeyJumpConfig


def carry_task_ids() -> None:
    """Make every task-typed wrapper of PEFT hand `task_ids` on to routed adapters."""
    for wrapper in set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        wrapper.forward = _carrying(wrapper.forward)


def _carrying(forward: Any) -> Any:
    @functools.wraps(forward)
    def forward_with_task_ids(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if task_ids is not None:
            routed = isinstance(self.active_peft_config, MonkeyJumpConfig)
            kwargs["mj_task_ids" if routed else "task_ids"] = task_ids
        return forward(self, *args, **kwargs)

    return forward_with_task_ids
