"""What stands beside the weights in an adapter's folder, and what is checked when it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

IMPORT_NOTE = """
## Loading

This adapter is routed. PEFT knows its type once `monkeyjump` is imported:

```python
import monkeyjump
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""
PREFIX = "base_model.model."  # PEFT writes it, whether or not the model has it
SAMPLED_TENSORS = 16
SAMPLED_VALUES = 8


def note_import(folder: str | Path) -> None:
    """Write the import that loading needs into the folder's README, once."""
    readme = Path(folder) / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if IMPORT_NOTE not in text:
        readme.write_text(text + IMPORT_NOTE, encoding="utf-8")


def check_weights(folder: str | Path, subfolder: str | None) -> None:
    """Open a local adapter's weights, so that a damaged file is named before any work starts.

    Raises:
        ValueError: the file is truncated or no safetensors file.
    """
    path = Path(folder) / (subfolder or "") / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}); copy it again, or train the adapter anew"
        ) from error


def check_whole(weights: dict[str, Tensor]) -> None:
    """Refuse to write what a sharded model holds of its weights on one rank: an empty or partial file.

    Raises:
        ValueError: a tensor is empty (DeepSpeed ZeRO-3) or a shard (FSDP2).
    """
    for name, tensor in weights.items():
        if not tensor.numel() or isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is only a part of the adapter's weight, because the model is sharded; pass the whole: "
                "save_pretrained(folder, state_dict=accelerator.get_state_dict(model)), called on every rank, or "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
            )


def check_keys(expected: dict[str, Tensor], weights: dict[str, Tensor], known: Iterable[str]) -> None:
    """Refuse weights that do not fit the model, which PEFT would load as far as they do.

    Args:
        expected: what the model would save for this adapter, by name in the file.
        weights: what the file holds.
        known: the names in the model, among them those of what is saved beside the adapter.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to no module; the first five are named.
    """
    expected, weights = _without_prefix(expected), _without_prefix(weights)
    wrong = [f"{k} is missing" for k in expected if k not in weights]
    wrong += [
        f"{k} is {list(v.shape)} in the file and {list(expected[k].shape)} in the model"
        for k, v in weights.items()
        if k in expected and v.shape != expected[k].shape
    ]
    wrong += [f"{k} holds values that are not finite" for k, v in weights.items() if not v.isfinite().all()]
    places = {k.removeprefix(PREFIX) for k in known}
    wrong += [f"{k} belongs to no module of the model" for k in weights if k not in expected and k not in places]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the adapter does not fit this base model: {'; '.join(wrong[:5])}{more}; load it on the model that it "
            "was trained on"
        )


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few sampled weights of the base model, by name: enough to tell one checkpoint from another.

    Numbers and not a hash, so that the same model in another dtype still compares equal.
    """
    weights = _base_weights(model)
    names = sorted(weights)[:: max(1, len(weights) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    sampled = {}
    for name in names:
        flat = weights[name].detach().flatten()
        values = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].tolist()
        sampled[name] = [float(f"{value:.6g}") for value in values]
    return sampled


def check_fingerprint(model: nn.Module, config: Any) -> None:
    """Warn where the base model's weights are not those that the adapter was trained on."""
    weights = _base_weights(model)
    for name, values in (config.base_fingerprint or {}).items():
        if name not in weights:
            continue  # quantized, sharded or renamed: no statement either way
        flat = weights[name].detach().flatten()
        now = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].float().cpu()
        then = torch.tensor(values)
        if now.shape != then.shape or not torch.allclose(now, then, rtol=0.004, atol=1e-4 * float(then.abs().max())):
            warnings.warn(
                f"base model: {name} holds other weights than those that this adapter was trained on; load it on "
                f"{config.base_model_name_or_path or 'the same checkpoint'}",
                stacklevel=2,
            )
            return


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's plain floating-point matrices, under the names that they have without adapters."""
    adapters = tuple(n + "." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        inside = next((a for a in adapters if name.startswith(a)), None)
        if inside is not None and not name.startswith(inside + "base_layer."):
            continue
        if parameter.dim() >= 2 and parameter.is_floating_point() and not parameter.is_meta:
            plain = name.replace(".base_layer", "").removeprefix(PREFIX)
            if type(parameter) is nn.Parameter:  # not a quantized or sharded subclass
                found[plain] = parameter
    return found
