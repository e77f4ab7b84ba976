"""What routing promises on every architecture, on a tiny random model with its default targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME, Architecture, each, loss_of, output_of, routed, row, untouched
from peft import LoraConfig, PeftModel, get_peft_model
from test_gates import gates_by_hand
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump import CenterUpdate, describe_routing, record_routing
from monkeyjump.tuner.model import routers
from tiny import gates, trainable

# ---------------------------------------------------------------------- targets and parameters


@each()
def test_default_targets_are_the_attention_with_its_output_shared(architecture: Architecture) -> None:
    plan = describe_routing(untouched(architecture))
    assert plan.blocks[-1].routed == architecture.routed
    assert plan.blocks[-1].shared == architecture.shared
    assert plan.plain == ()


@each()
def test_trainable_parameters_are_those_of_plain_lora(architecture: Architecture) -> None:
    model = untouched(architecture)
    config = model.peft_config["default"]
    same = {name: getattr(config, name) for name in ("r", "target_modules", "task_type", "fan_in_fan_out")}
    plain = get_peft_model(architecture.build(), LoraConfig(**same))
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(plain).items()}


# ---------------------------------------------------------------------- forward


@each()
def test_untouched_adapters_change_nothing(architecture: Architecture) -> None:
    batch = architecture.batch()
    with torch.no_grad():
        expected = output_of(architecture.build(), batch)
        assert torch.equal(output_of(untouched(architecture).eval(), batch), expected)
        assert not torch.allclose(output_of(routed(architecture), batch), expected, atol=1e-3)


@each()
def test_gates_differ_among_tokens(architecture: Architecture) -> None:
    model = routed(architecture, top_k=2)
    found = gates(model, **architecture.batch())
    assert len(found) >= len(routers(model))
    for m in found:
        assert m.shape[1] > 1
        assert (m.amax((0, 1)) - m.amin((0, 1)) > 1e-3).any()
        assert torch.equal((m > 0).sum(-1), torch.full(m.shape[:2], 2))


@each(lambda a: a.padded)
def test_padding_changes_no_gate(architecture: Architecture) -> None:
    model, batch = routed(architecture, top_k=2), architecture.batch()
    decoder = {"decoder_input_ids": batch["labels"]} if architecture.encoder_decoder else {}
    together = gates(model, **{k: v for k, v in batch.items() if k != "labels"}, **decoder)
    with record_routing(model) as of_all:
        model(**batch)
    counts = {name: torch.zeros_like(count) for name, count in of_all.counts.items()}
    for index, mask in enumerate(batch["attention_mask"].bool()):
        own = row(batch, index) | {name: value[index : index + 1] for name, value in decoder.items()}
        for m, of_row in zip(together, gates(model, **own), strict=True):
            mine = m[index][mask] if m.shape[1] == len(mask) else m[index]  # a decoder's own tokens have no padding
            torch.testing.assert_close(mine, of_row[0], atol=1e-4, rtol=1e-3)
        with record_routing(model) as record:
            model(**own)
        counts = {name: count + record.counts[name] for name, count in counts.items()}
    if not architecture.encoder_decoder:  # with labels its decoder runs on other tokens
        assert {n: c.tolist() for n, c in counts.items()} == {n: c.tolist() for n, c in of_all.counts.items()}


@each()
@pytest.mark.parametrize("granularity", ["last", "mean"])
def test_a_sequence_can_decide_as_a_whole(architecture: Architecture, granularity: str) -> None:
    model = routed(architecture, granularity=granularity)
    assert all(m.shape[1] == 1 for m in gates(model, **architecture.batch()))
    model.train()
    loss_of(model, architecture.batch()).backward()
    assert all(p.grad is not None for p in trainable(model).values())


class Captured:
    """What one block and one of its projections were given and gave, in the last call of each."""

    def __init__(self, model: nn.Module, slot: str) -> None:
        self.router = routers(model)[-1]
        self.block = model.get_submodule(f"base_model.model.{self.router.name}")
        self.layer = self.block.get_submodule(slot)
        self.block.register_forward_pre_hook(self.enter, with_kwargs=True)
        self.layer.register_forward_hook(self.leave)

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.hidden = hidden.detach()

    def leave(self, layer: nn.Module, args: tuple, y: Tensor) -> None:
        self.x, self.y = args[0].detach(), y.detach()


def swin_order(m: Tensor, height: int, size: int, shift: int) -> Tensor:
    """Gates `[B, H*W, E]` as a shifted layer's windows see the tokens, token by token."""
    batch, _, experts = m.shape
    across = -(-height // size)
    padded, windows = across * size, []
    for b in range(batch):
        for top in range(across):
            for left in range(across):
                rows = []
                for i in range(size):
                    for j in range(size):
                        y, x = (top * size + i + shift) % padded, (left * size + j + shift) % padded
                        inside = y < height and x < height
                        rows.append(m[b, y * height + x] if inside else torch.zeros(experts, dtype=m.dtype))
                windows.append(torch.stack(rows))
    return torch.stack(windows)


@each()
def test_a_routed_projection_equals_the_equations(architecture: Architecture) -> None:
    """`W x + b + m * (alpha / r) B A x` in float64, gates token by token from the hidden states."""
    model, slot = routed(architecture, top_k=2), architecture.routed[0]
    seen = Captured(model, slot)
    with torch.no_grad():
        output_of(model, architecture.batch())
    centers = seen.router.centers["default"].double().tolist()
    number = seen.router.slots["default"].index(slot)
    hand = [
        [gates_by_hand(token.tolist(), centers, "cosine", 0.3, 2, "k") for token in tokens]
        for tokens in seen.hidden.double()
    ]
    m = torch.tensor(hand, dtype=torch.float64)
    if architecture.name == "Swin":
        m = swin_order(m, height=6, size=5, shift=2)
    base, x = seen.layer.get_base_layer(), seen.x.double()
    weight = base.weight.detach().double()
    plain = x @ (weight if isinstance(base, Conv1D) else weight.T)
    plain = plain if base.bias is None else plain + base.bias.detach().double()
    a, b = (getattr(seen.layer, f"lora_{n}")["default"].weight.detach().double() for n in "AB")
    delta = seen.layer.scaling["default"] * (x @ a.T @ b.T)
    assert delta.abs().max() > 1e-3
    gate = m[..., number].reshape(*x.shape[:-1], 1)
    torch.testing.assert_close(seen.y.double(), plain + gate * delta, atol=2e-5, rtol=2e-4)


# ---------------------------------------------------------------------- training


def step(model: PeftModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Loss, gradients and gathered statistics of one micro-batch."""
    CenterUpdate(every=100, until=100).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.0))
    model.train()
    torch.manual_seed(7)  # the same dropout
    loss = loss_of(model, batch)
    loss.backward()
    pending = [router.pending["default"] for router in routers(model)]
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    return loss.detach(), gradients, [t for s in pending for t in (s.sums, s.counts)]


# Swin's stages are checkpointed around its layers: inside, torch warns of inputs without gradients
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@each()
def test_a_step_reaches_every_adapter_also_with_checkpointing(architecture: Architecture) -> None:
    results = []
    for reentrant in (None, False, True):
        model, batch = routed(architecture, top_k=8), architecture.batch()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if architecture.name == "Swin":  # transformers' switch fails on its embeddings, which return a tuple
                batch["pixel_values"].requires_grad_()
            else:
                model.enable_input_require_grads()
        results.append(step(model, batch))
    _, gradients, _ = results[0]
    assert gradients.keys() == trainable(model).keys()
    assert all(gradient.any() for gradient in gradients.values())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@each()
def test_saved_adapter_loads_bit_for_bit(architecture: Architecture, tmp_path: Path) -> None:
    model, batch = routed(architecture), architecture.batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(output_of(loaded, batch), output_of(model, batch))
    assert [r.slots for r in routers(loaded)] == [r.slots for r in routers(model)]


@each(lambda a: a.generates)
def test_generation_with_a_cache_equals_the_one_without(architecture: Architecture) -> None:
    model, batch = routed(architecture, top_k=2), architecture.batch()
    del batch["labels"]
    if not architecture.encoder_decoder:  # a decoder's prompts are padded on the left
        lengths = batch["attention_mask"].sum(-1).tolist()
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([v.roll(len(v) - n) for v, n in zip(batch[name], lengths)])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-3)


def test_every_architecture_has_a_name_of_its_own() -> None:
    assert len(BY_NAME) == 22
