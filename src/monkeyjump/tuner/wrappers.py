"""What other libraries have to hand on to routed adapters, and do not; mended for routed adapters only.

* The `forward` of PEFT's model wrappers takes `task_ids` for Poly and drops it for every other method.
* Their `generate` refuses keywords that the base model does not know, and without a cache nobody tells
  the blocks where the prompt ended.
* The `load_adapter` of transformers' own models knows an adapter's tensors by its method's prefix, and
  would leave the centers in the file.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import transformers_weight_conversion
from torch import Tensor
from transformers.core_model_loading import WeightRenaming

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.tuner.block import ROUTER
from monkeyjump.tuner.model import routing_inputs

TOLD: list[type[PeftConfig]] = [MonkeyJumpConfig]  # configs of methods whose blocks read task ids and prompts


def extend_wrappers() -> None:
    """Mend `forward` and `generate` of every wrapper class of PEFT, and the names of what transformers loads."""
    names = transformers_weight_conversion
    names.build_peft_weight_mapping = _with_centers(names.build_peft_weight_mapping)
    for wrapper in set(MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()):
        wrapper.forward = _with_task_ids(wrapper.forward)
    for wrapper in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        if "generate" in vars(wrapper):
            wrapper.generate = _with_prompt(wrapper.generate)


def _is_routed(model: PeftModel) -> bool:
    return any(isinstance(config, tuple(TOLD)) for config in model.peft_config.values())


def _with_task_ids(forward: Any) -> Any:
    @functools.wraps(forward)
    def forward_with_task_ids(self: Any, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if task_ids is not None:
            kwargs["mj_task_ids" if _is_routed(self) else "task_ids"] = task_ids
        return forward(self, *args, **kwargs)

    return forward_with_task_ids


def _with_prompt(generate: Any) -> Any:
    @functools.wraps(generate)
    def generate_with_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_routed(self):
            return generate(self, *args, **kwargs)
        told = {
            "task_ids": kwargs.pop("task_ids", None),
            "prompt_lengths": kwargs.pop("mj_prompt_lengths", None),
            "prompt_columns": _columns(args, kwargs),
        }
        with routing_inputs(self, **told):
            return generate(self, *args, **kwargs)

    return generate_with_prompt


def _with_centers(build: Any) -> Any:
    @functools.wraps(build)
    def build_with_centers(conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        built = build(conversions, adapter_name, peft_config=peft_config)
        if isinstance(peft_config, MonkeyJumpConfig):
            built.append(WeightRenaming(rf"({ROUTER}\.(?:learned_)?centers)$", rf"\1.{adapter_name}"))
        return built

    return build_with_centers


def _columns(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """Width of text prompts, padding included: what is generated stands to the right of it."""
    named = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((p for p in (*args[:1], *named) if p is not None), None)
    if prompt is None or (prompt.dim() != 2 and prompt is not kwargs.get("inputs_embeds")):
        return None
    return int(prompt.shape[1])
