"""Models that accelerate has dispatched: its hooks replace the forward of blocks and bring offloaded weights back.

Plain LoRA is the measure: what it cannot do on such a model (train offloaded weights) is not asked of routed LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel
from torch import Tensor, nn

from monkeyjump import CenterUpdate, initialize_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

IDS = tokens()
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
BASES = ["lora", "lora_fa", "adalora", "propulsion"]


def dispatched(model: Any, folder: Path, second_block: str, prefix: str = "") -> Any:
    device_map = {prefix + part: second_block if part.endswith(".1") else "cpu" for part in PARTS}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapter_in(folder: Path, base: str, **changes: Any) -> Tensor:
    """Save an adapter; what it computes."""
    changes |= {"total_step": 10} if base == "adalora" else {}
    model = routed(llama(), base=base, temperature=0.2, task_type="CAUSAL_LM", **changes).eval()
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.proves("integration", "accelerate: device_map with offload to disk")
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_adapter_loads_onto_an_offloaded_model(base: str, low_memory: bool, tmp_path: Path) -> None:
    expected = adapter_in(tmp_path / "adapter", base)
    offloaded = dispatched(llama(), tmp_path / "weights", "disk")
    assert any(p.is_meta for p in offloaded.parameters())
    model = PeftModel.from_pretrained(offloaded, tmp_path / "adapter", low_cpu_mem_usage=low_memory).eval()
    torch.testing.assert_close(logits(model), expected)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 65}
    plain = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(model.generate(input_ids=IDS, **settings), plain.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize("granularity", ["token", "last"])
@pytest.mark.parametrize("base", ["lora", "lora_fa"])
def test_model_with_adapter_is_offloaded(base: str, granularity: str, tmp_path: Path) -> None:
    expected = adapter_in(tmp_path / "adapter", base, granularity=granularity)
    for offload in (
        lambda model: dispatched(model, tmp_path / "weights", "disk", "base_model.model."),
        lambda model: cpu_offload(model, "cpu"),
    ):
        model = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
        offload(model)
        assert any(p.is_meta for p in model.parameters())
        torch.testing.assert_close(logits(model), expected)
        assert not any(r.centers["default"].is_meta for r in routers(model))


def trained(model: nn.Module) -> list[Tensor]:
    schedule = CenterUpdate(every=9, until=9)
    schedule.attach(model, torch.optim.SGD(trainable(model).values(), lr=0.0), total_steps=10)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return [*(p.grad for p in trainable(model).values()), *(r.pending["default"].sums for r in routers(model))]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_training_under_hooks_is_training(base: str, checkpointing: bool, tmp_path: Path) -> None:
    settings = {"base": base, "temperature": 0.2, **({"total_step": 10} if base == "adalora" else {})}
    model = routed(dispatched(llama(), tmp_path, "cpu"), **settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.testing.assert_close(trained(model), trained(routed(llama(), **settings)))


def test_hooks_and_routers_come_and_go_in_any_order(tmp_path: Path) -> None:
    base = dispatched(llama(), tmp_path, "cpu")
    remove_hook_from_submodules(base)  # leaves every module a forward of its own
    model = routed(base, center_init="kmeans")
    initialize_centers(model, [{"input_ids": tokens(4, 12)}], progress=False)
    expected = logits(model)
    under_hooks = dispatched(model, tmp_path, "cpu", "base_model.model.")
    torch.testing.assert_close(logits(under_hooks), expected)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(logits(model), expected)
    assert torch.equal(logits(model.unload()), logits(llama()))
