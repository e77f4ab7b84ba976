"""Loading a shrunk model: a stock config cannot say that layers differ in width, so ours says it beside.

`model.save_pretrained(folder)` writes a shrunk model as any other, safetensors and config.json; the widths of its
blocks stand in config.json under `monkeyjump_widths`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from monkeyjump.mamba.shrink.remove import WIDTHS, narrow
from monkeyjump.suggest import check_choice


def load_shrunk(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model that was shrunk and saved to `folder`, in evaluation mode.

    `options` go to Hugging Face's `from_pretrained` (dtype, device_map, ...): it loads into the narrow model.

    Raises `ValueError` if the folder holds no shrunk model, or widths that do not fit its config.
    """
    config = AutoConfig.from_pretrained(folder)
    widths = config.to_dict().get(WIDTHS)
    if widths is None:
        raise ValueError(f"{folder} holds no shrunk model (config.json has no {WIDTHS}): load it with AutoModel")
    if not isinstance(widths, dict):
        raise ValueError(f"{WIDTHS} in {folder}/config.json is {widths!r}, not a width per block: take the folder anew")
    [name] = config.architectures
    check_choice("architectures", name, [known for known in dir(transformers) if known.endswith("ForCausalLM")])
    stock = getattr(transformers, name)

    def build(model: PreTrainedModel, *inputs: Any, **fields: Any) -> None:
        stock.__init__(model, *inputs, **fields)
        with torch.device("cpu"):  # Hugging Face builds the model on the meta device, where indices have no values
            narrow(model, widths)

    narrowed = type(name, (stock,), {"__init__": build, "__module__": stock.__module__})
    model = narrowed.from_pretrained(folder, config=config, **options)  # type: ignore[attr-defined]
    model.__class__ = stock
    return model.eval()
