"""`MonkeyJumpConfig`: one class per base method, presets, files, and options that all change something."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor

from monkeyjump import PRESETS, CenterUpdate, MonkeyJumpConfig
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable


def test_it_is_also_the_config_of_its_base() -> None:
    config = MonkeyJumpConfig(base="lora", r=4, use_rslora=True, target_modules=["q_proj"])
    assert isinstance(config, MonkeyJumpConfig)
    assert isinstance(config, LoraConfig)
    assert config.peft_type == "MJ_LORA"
    assert (config.r, config.use_rslora, config.target_modules) == (4, True, {"q_proj"})


def test_it_survives_files_pickle_and_replace(tmp_path: Path) -> None:
    config = MonkeyJumpConfig(granularity="task", task_experts={0: ["q_proj"], 3: ["k_proj"]}, top_k=1)
    config.save_pretrained(str(tmp_path))
    for again in (
        PeftConfig.from_pretrained(str(tmp_path)),
        MonkeyJumpConfig.from_pretrained(str(tmp_path)),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(again) is type(config)
        assert again.to_dict() == config.to_dict()
    assert dataclasses.replace(config, top_k=2).top_k == 2
    assert "import monkeyjump" in (tmp_path / "README.md").read_text()


EXPECTED = {  # the spec's table of names, defaults and presets
    "recommended": (8, 16, 0.05, None, "token", 2, "k", 0.0, 0.5, "topk", "sphere"),
    "paper": (2, 5, 0.05, None, "token", 2, "none", 0.0, 0.5, "topk", "raw"),
    "released": (8, 16, 0.0, [], "last", 1, "one", 0.0, 0.9, "top1", "mixed"),
    "readme": (2, 16, 0.0, ["up_proj", "down_proj"], "token", 2, "one", 0.1, 0.9, "top1", "mixed"),
    "ablation": (2, 5, 0.05, [], "token", 2, "none", 0.0, 0.5, "topk", "sphere"),
}
FIELDS = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "shared_modules",
    "granularity",
    "top_k",
    "gate_norm",
    "jitter_noise",
    "ema_momentum",
    "ema_assignment",
    "ema_space",
]


@pytest.mark.parametrize("preset", EXPECTED)
def test_presets_are_the_specs(preset: str) -> None:
    config = MonkeyJumpConfig.from_preset(preset)
    assert tuple(getattr(config, field) for field in FIELDS) == EXPECTED[preset]
    assert (config.similarity, config.temperature, config.center_init) == ("cosine", 1.0, "kmeans")
    assert MonkeyJumpConfig.from_preset(preset, top_k=3).top_k == 3
    assert set(EXPECTED) == set(PRESETS)


def test_the_recommended_preset_is_the_default() -> None:
    assert MonkeyJumpConfig.from_preset("recommended").to_dict() == MonkeyJumpConfig().to_dict()


def test_presets_fit_other_bases() -> None:
    adalora = MonkeyJumpConfig.from_preset("paper", base="adalora", total_step=10)
    assert (adalora.target_r, adalora.init_r, adalora.gate_norm) == (2, 3, "none")
    assert MonkeyJumpConfig.from_preset("paper", base="propulsion").ema_space == "raw"


def test_other_methods_keep_their_own_defaults() -> None:
    assert MonkeyJumpConfig(base="loha").r == 8
    assert MonkeyJumpConfig(base="vera").r == 256
    assert MonkeyJumpConfig(base="adalora", total_step=5).lora_alpha == 16


def centers_after_a_step(**config: object) -> Tensor:
    model = routed(llama(), temperature=0.3, **config).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    CenterUpdate(every=1, until=5).attach(model, optimizer)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, :2] = 0
    torch.manual_seed(0)
    model(ids, attention_mask=mask, labels=ids, task_ids=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    return torch.cat([r.centers.get_buffer("default") for r in routers(model)])


def logits(**config: object) -> Tensor:
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[0, :2] = 0
    model = routed(llama(), **{"temperature": 0.3, **config}).eval()
    return model(ids, attention_mask=mask, task_ids=torch.tensor([0, 1, 2])).logits


SEEN_IN_LOGITS = [
    {"shared_modules": []},
    {"shared_modules": ["q_proj"]},
    {"layers_to_route": [0]},
    {"layers_to_route": 1},
    {"expert_order": ["v_proj", "q_proj"]},
    {"granularity": "last"},
    {"granularity": "mean"},
    {"granularity": "max"},
    {"granularity": "prompt_end"},
    {"granularity": "task"},
    {"granularity": "task", "task_experts": {0: ["q_proj"], 1: ["k_proj", "v_proj"], 2: []}},
    {"similarity": "dot"},
    {"similarity": "euclidean"},
    {"similarity": "l1"},
    {"top_k": 1},
    {"temperature": 1.5},
    {"gate_norm": "one"},
    {"gate_norm": "none"},
    {"center_init": "random_normalized", "similarity": "dot"},
    {"center_init": "trainable", "similarity": "dot"},
    {"center_seed": 1},
    {"num_centers": 2},
]


def test_every_option_that_routes_changes_the_output() -> None:
    default = logits()
    seen = {"default": default}
    for change in SEEN_IN_LOGITS:
        out = logits(**change)
        assert not torch.equal(out, default), change
        seen[str(change)] = out
    same = {frozenset((a, b)) for a in seen for b in seen if a != b and torch.allclose(seen[a], seen[b], atol=1e-6)}
    assert same == {
        # without labels the prompt's end is the last attended token
        frozenset(("{'granularity': 'last'}", "{'granularity': 'prompt_end'}")),
        # a trainable router starts where a random one stays
        frozenset(str({"center_init": kind, "similarity": "dot"}) for kind in ("random_normalized", "trainable")),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"ema_momentum": 0.9},
        {"ema_assignment": "top1"},
        {"ema_space": "raw"},
        {"ema_space": "mixed"},
        {"jitter_noise": 0.9},
    ],
    ids=str,
)
def test_every_option_that_moves_centers_changes_them(change: dict[str, object]) -> None:
    assert not torch.equal(centers_after_a_step(), centers_after_a_step(**change))


def test_jitter_acts_in_training_only() -> None:
    model = routed(llama(), jitter_noise=0.5, temperature=0.1)
    ids = tokens()
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


def test_a_trainable_router_adds_its_centers_and_trains_them() -> None:
    model = routed(llama(), center_init="trainable").train()
    plain = routed(llama(), center_init="random")
    added = sum(p.numel() for p in trainable(model).values()) - sum(p.numel() for p in trainable(plain).values())
    assert added == 2 * 3 * 32
    model(tokens(), labels=tokens()).loss.backward()
    assert all(r.learned_centers["default"].grad.any() for r in routers(model))


def test_no_gradient_passes_the_gates() -> None:
    """Nothing flows into the centers, nor through the gates into the hidden states."""
    model = routed(llama(), temperature=0.3).train()
    block, grads = model.get_base_model().model.layers[1], []
    for fixed in (False, True):
        h = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gates = block.jump_router.route(h, {})
        assert not gates["default"].requires_grad
        kwargs = {"mj_gates": {"default": gates["default"].detach().clone()}} if fixed else {}
        position = model.get_base_model().model.rotary_emb(h, torch.arange(4)[None])
        block(h, position_embeddings=position, **kwargs).sum().backward()
        grads.append(h.grad)
    assert torch.equal(grads[0], grads[1])
    assert not any(r.centers["default"].requires_grad for r in routers(model))


def test_unused_slots_of_a_config_do_not_leak_between_models() -> None:
    config = MonkeyJumpConfig(center_init="random")
    first, second = get_peft_model(llama(), config), get_peft_model(llama(seed=5), config)
    assert routers(first)[0].context is not routers(second)[0].context
