"""Routed adapters in transformers' own adapter methods, which inject them without a `PeftModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from monkeyjump import CenterUpdate, MonkeyJumpConfig, describe_routing, initialize_centers, routing_inputs
from monkeyjump.tuner.model import routers
from tiny import llama, position_dependent, tokens, trainable

ARGUMENTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "init_lora_weights": False},
    "lora_fa": {"r": 4, "init_lora_weights": False},
    "adalora": {"total_step": 10, "init_r": 3, "target_r": 2},
    "propulsion": {},
    "ia3": {"target_modules": ["q_proj", "k_proj", "v_proj"], "feedforward_modules": []},
}
every_base = pytest.mark.parametrize("base", list(ARGUMENTS))


def config(base: str = "lora", **changes: Any) -> MonkeyJumpConfig:
    return MonkeyJumpConfig(base=base, **{**ARGUMENTS[base], "center_init": "random", **changes})


def with_adapter(base: str = "lora", **changes: Any) -> Any:
    """A transformers model whose routed adapter differs from a fresh one in every element."""
    torch.manual_seed(1)
    model = llama()
    model.add_adapter(config(base, **changes))
    position_dependent(trainable(model).values())
    position_dependent(router.centers["default"] for router in routers(model))
    return model.eval()


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **inputs).logits


@pytest.mark.proves("integration", "transformers add_adapter and load_adapter")
@every_base
def test_saved_adapter_loads_with_its_centers(base: str, tmp_path: Path) -> None:
    model = with_adapter(base)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = llama()
    report = loaded.load_adapter(str(tmp_path))
    assert all(".ranknum." in key for key in report.missing_keys)  # constants, which AdaLoRA never saves
    assert not report.unexpected_keys
    for mine, its in zip(routers(model), routers(loaded)):
        assert torch.equal(its.centers["default"], mine.centers["default"])
        assert not isinstance(its.centers["default"], nn.Parameter)
    assert torch.equal(logits(loaded), expected)
    assert not trainable(loaded)
    as_peft = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(logits(as_peft), expected)
    as_peft.save_pretrained(tmp_path / "peft")
    back = llama()
    back.load_adapter(str(tmp_path / "peft"), adapter_name="another")
    assert torch.equal(logits(back), expected)


def test_centers_fitted_to_data_load_without_a_warning(tmp_path: Path) -> None:
    model = with_adapter(center_init="kmeans")
    for router in routers(model):
        router.centers["default"].zero_()
    initialize_centers(model, [{"input_ids": tokens(4, 12)}], progress=False)
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(logits(loaded.eval()), logits(model))
    loaded.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in trainable(loaded).values())


@every_base
def test_disabled_adapters_leave_the_base_model(base: str) -> None:
    model = with_adapter(base)
    on = logits(model)
    assert not torch.equal(on, logits(llama()))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))
    model.enable_adapters()
    assert torch.equal(logits(model), on)


def test_second_adapter_comes_and_goes() -> None:
    model = with_adapter()
    first = logits(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):  # peft says so to everybody
        model.add_adapter(config(top_k=1, center_seed=7, granularity="last"), "second")
    second = logits(model.eval())
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            assert "second" not in module._all_available_adapter_names()
            assert "second" not in module.__dict__.get("jump_gates", {})
    assert all("second" not in router.slots for router in routers(model))


def test_model_itself_is_described_initialized_and_trained(tmp_path: Path) -> None:
    model = with_adapter(center_init="kmeans")
    assert len(describe_routing(model).blocks) == 2
    result = initialize_centers(model, [{"input_ids": tokens(4, 12)}], progress=False)
    assert set(result.inertia) == {"model.layers.0", "model.layers.1"}
    before = [router.centers["default"].clone() for router in routers(model)]
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, report_to=[], save_strategy="no", dataloader_pin_memory=False
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[CenterUpdate(every=1, until=4)]).train()
    assert all(not torch.equal(router.centers["default"], was) for router, was in zip(routers(model), before))


def test_sequence_decision_on_a_plain_transformers_model() -> None:
    model = with_adapter(granularity="last", temperature=0.1)
    ids = tokens(2, 6)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 65}
    cached = model.generate(input_ids=ids, **settings)
    with routing_inputs(model, prompt_columns=6):
        assert torch.equal(model.generate(input_ids=ids, use_cache=False, **settings), cached)


def test_adalora_without_its_tuner_says_that_no_ranks_move(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter("adalora")
    CenterUpdate().attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1), total_steps=10)
    assert "get_peft_model" in caplog.text
