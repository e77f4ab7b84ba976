"""The contract of DeepSpeed ZeRO-3, imitated: a module's parameters hold data only while the module is called.

DeepSpeed itself needs a GPU and is not run here. It puts a hook before and one after every module's forward,
which gather and release the parameters that the module owns; this does the same with plain hooks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tiny import llama, routed, tokens


def partition(model: nn.Module) -> None:
    """Empty every parameter outside its module's call."""

    def gather(module: nn.Module, args: tuple) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.ds_tensor

    def release(module: nn.Module, args: tuple, output: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.ds_tensor = parameter.data
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, (), None)


@pytest.mark.parametrize("base", ["lora", "lora_fa"])
def test_no_parameter_is_read_outside_its_module(base: str) -> None:
    model = routed(llama(), base=base)
    with torch.no_grad():
        whole = model(tokens()).logits
        partition(model)
        torch.testing.assert_close(model(tokens()).logits, whole, atol=1e-5, rtol=1e-5)


def test_an_empty_adapter_is_not_written(tmp_path: Path) -> None:
    """F08: PEFT wrote a file of 40 bytes."""
    model = routed(llama())
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    partition(model)
    with pytest.raises(ValueError, match=r"is only a part of the adapter's weight.*state_dict="):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.save_pretrained(tmp_path, state_dict=whole)
