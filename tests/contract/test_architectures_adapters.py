"""Three architectures, each with four adapters: train, save, generate, checkpoint; and the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from monkeyjump import CenterUpdate, describe_routing
from monkeyjump.tuner.model import routers
from tiny import VOCAB, bert, left_padded, llama, qwen2, routed, tokens, trainable

BUILD: dict[str, Callable[[], nn.Module]] = {"llama": llama, "qwen2": qwen2, "bert": bert}
TASK = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "bert": "SEQ_CLS"}
ADAPTERS = ("lora", "lora_fa", "adalora", "propulsion")

every_architecture = pytest.mark.parametrize("architecture", BUILD)
every_decoder = pytest.mark.parametrize("architecture", ["llama", "qwen2"])
every_adapter = pytest.mark.parametrize("base", ADAPTERS)


def model_of(architecture: str, base: str, **config: Any) -> PeftModel:
    own = {"adalora": {"total_step": 100, "init_r": 4, "target_r": 2}}.get(base, {})
    return routed(BUILD[architecture](), base=base, task_type=TASK[architecture], **{**own, **config})


def batch(architecture: str, rows: int = 4) -> dict[str, Tensor]:
    ids = tokens(rows, 8)
    labels = torch.arange(rows) % 3 if architecture == "bert" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def train(model: PeftModel, data: dict[str, Tensor], steps: int, lr: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    CenterUpdate(every=1, until=steps).attach(model, optimizer)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("architecture", "routes", "shares"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj"], ["o_proj", "gate_proj"]),
        ("qwen2", ["q_proj", "k_proj", "v_proj"], ["o_proj", "gate_proj"]),
        ("bert", ["query", "key", "value"], ["dense"]),
    ],
)
def test_default_targets_are_attention_with_output_and_gate_shared(
    architecture: str, routes: list[str], shares: list[str]
) -> None:
    plan = describe_routing(model_of(architecture, "lora"))
    assert [block.index for block in plan.blocks] == [0, 1]
    for block in plan.blocks:
        assert [slot.rpartition(".")[2] for slot in block.routed] == routes
        assert [slot.rpartition(".")[2] for slot in block.shared] == shares
    assert plan.plain == ()


# ---------------------------------------------------------------------- training, saving, generating


@every_architecture
@every_adapter
def test_repeated_batch_is_learned_while_centers_move(architecture: str, base: str) -> None:
    model = model_of(architecture, base, init_lora_weights=True)
    before = [r.centers["default"].clone() for r in routers(model)]
    losses = train(model, batch(architecture), steps=12)
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(r.centers["default"], c) for r, c in zip(routers(model), before))


@every_architecture
@every_adapter
def test_trained_adapter_loads_bit_for_bit(architecture: str, base: str, tmp_path: Path) -> None:
    model, data = model_of(architecture, base), batch(architecture)
    train(model, data, steps=2)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BUILD[architecture](), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**data).logits, model(**data).logits)
        assert not torch.equal(loaded(**data).logits, BUILD[architecture]()(**data).logits)


@every_adapter
def test_fresh_classifier_trains_and_travels_with_the_adapter(base: str, tmp_path: Path) -> None:
    model = model_of("bert", base)
    fresh = bert().classifier.weight
    train(model, batch("bert"), steps=2)
    trained = model.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(trained, fresh)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, trained)


@every_decoder
@every_adapter
@pytest.mark.parametrize("granularity", ["token", "prompt_end"])
def test_cached_generation_equals_the_uncached(architecture: str, base: str, granularity: str) -> None:
    model = model_of(architecture, base, granularity=granularity).eval()
    rows = left_padded([tokens(1, 4), tokens(1, 7)])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    cached = model.generate(**rows, max_new_tokens=5, **settings)
    if granularity == "token":
        assert torch.equal(model.generate(**rows, max_new_tokens=5, use_cache=False, **settings), cached)
    one_by_one = [
        model.generate(input_ids=r[None, p:], max_new_tokens=5, **settings) for r, p in zip(rows["input_ids"], (3, 0))
    ]
    assert [r[0, -5:].tolist() for r in one_by_one] == cached[:, -5:].tolist()


@every_architecture
@every_adapter
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(architecture: str, base: str, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = model_of(architecture, base).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        loss = model(**batch(architecture)).loss
        loss.backward()
        results.append([loss, *(p.grad for p in trainable(model).values())])
    torch.testing.assert_close(results[1], results[0])


# ---------------------------------------------------------------------- the stock Trainer


class CentersByStep(TrainerCallback):
    """Notes the centers after every optimizer step; stands behind `CenterUpdate`."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(torch.stack([r.centers["default"].clone() for r in routers(model)]))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@every_adapter
def test_stock_trainer_moves_centers_every_step(architecture: str, base: str, tmp_path: Path) -> None:
    model = model_of(architecture, base, **({"total_step": 3} if base == "adalora" else {}))
    start = torch.stack([r.centers["default"].clone() for r in routers(model)])
    rows = [{name: value[i] for name, value in batch(architecture, 12).items()} for i in range(12)]
    noted = CentersByStep()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    result = Trainer(model, arguments, train_dataset=rows, callbacks=[CenterUpdate(every=1, until=1.0), noted]).train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    states = [start, *noted.seen]
    assert len(states) == 4
    assert all(not torch.equal(now, then) for now, then in zip(states[1:], states))
