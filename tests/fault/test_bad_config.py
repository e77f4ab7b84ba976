"""Bad settings are refused with field, value and remedy, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from monkeyjump import CenterUpdate, MonkeyJumpConfig
from monkeyjump.tuner.model import routers
from tiny import bert, by_message, llama, routed, tokens


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    """Every word occurs in the message."""
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


# ---------------------------------------------------------------------- the config by itself

BAD_FIELDS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"topk": 2}, TypeError, ["'topk'", "value 2", "did you mean 'top_k'"]),
    ({"lora_alfa": 4}, TypeError, ["'lora_alfa'", "did you mean 'lora_alpha'"]),
    ({"granularity": "tokens"}, ValueError, ["granularity='tokens'", "did you mean 'token'", "prompt_end"]),
    ({"similarity": "cosin"}, ValueError, ["similarity='cosin'", "did you mean 'cosine'"]),
    ({"gate_norm": "sum"}, ValueError, ["gate_norm='sum'", "choose one of"]),
    ({"center_init": "k-means"}, ValueError, ["center_init='k-means'", "did you mean 'kmeans'"]),
    ({"ema_assignment": "top2"}, ValueError, ["ema_assignment='top2'", "did you mean 'topk' or 'top1'"]),
    ({"ema_space": "flat"}, ValueError, ["ema_space='flat'", "sphere, raw, mixed"]),
    ({"top_k": 0}, ValueError, ["top_k=0", "at least 1"]),
    ({"top_k": -3}, ValueError, ["top_k=-3", "at least 1"]),
    ({"temperature": 0.0}, ValueError, ["temperature=0.0", "above 0"]),
    ({"temperature": float("nan")}, ValueError, ["temperature=nan", "above 0"]),
    ({"ema_momentum": 1.5}, ValueError, ["ema_momentum=1.5", "[0, 1]"]),
    ({"jitter_noise": 1.0}, ValueError, ["jitter_noise=1.0", "[0, 1)"]),
    ({"num_centers": 0}, ValueError, ["num_centers=0", "at least 1"]),
    ({"similarity": "dot", "ema_space": "sphere"}, ValueError, ["ema_space='sphere'", "needs 'raw'"]),
    ({"task_experts": {0: ["q_proj"]}}, ValueError, ["task_experts", "granularity='task'"]),
    ({"expert_order": "targets"}, ValueError, ["expert_order='targets'", "target_modules as a list"]),
    ({"init_lora_weights": "pissa"}, ValueError, ["init_lora_weights='pissa'", "use one of"]),
    ({"base": "loar"}, ValueError, ["base='loar'", "did you mean 'lora'"]),
    ({"base": "prompt_tuning"}, ValueError, ["base='prompt_tuning'", "prompt tokens", "choose one of"]),
]


@pytest.mark.parametrize(("fields", "kind", "words"), by_message(BAD_FIELDS))
def test_bad_field_is_refused_by_name(fields: dict, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        MonkeyJumpConfig(**fields)
    says(error, *words)


@pytest.mark.parametrize("field", ["top_k", "temperature", "ema_momentum", "jitter_noise", "num_centers"])
@pytest.mark.parametrize("value", ["2", [2], True])
def test_value_of_another_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        MonkeyJumpConfig(**{field: value})
    says(error, f"{field}={value!r}")


@pytest.mark.parametrize("top_k", [1.5, 2.0])
def test_fractional_top_k_is_refused(top_k: float) -> None:
    with pytest.raises(ValueError) as error:
        MonkeyJumpConfig(top_k=top_k)
    says(error, f"top_k={top_k}", "at least 1")


def test_unknown_preset_shows_the_near_miss() -> None:
    with pytest.raises(ValueError) as error:
        MonkeyJumpConfig.from_preset("papers")
    says(error, "preset='papers'", "did you mean 'paper'")


# ---------------------------------------------------------------------- the config against a model

BAD_NAMES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"target_modules": ["q_proj", "k_porj"]},
        ["target_modules names 'k_porj'", "did you mean 'k_proj'", "there are", "gate_proj"],
    ),
    ({"target_modules": ["nothing"]}, ["target_modules names 'nothing'", "there are", "q_proj"]),
    ({"target_modules": r".*\.query"}, ["target_modules='.*", "as a regex matches no module", "whole paths"]),
    (
        {"target_modules": ["q_proj", "k_proj"], "shared_modules": ["v_proj"]},
        ["shared_modules names 'v_proj'", "only targeted modules"],
    ),
    (
        {"target_modules": ["q_proj", "k_proj"], "shared_modules": ["q_porj"]},
        ["shared_modules names 'q_porj'", "did you mean 'q_proj'"],
    ),
    (
        {"target_modules": ["q_proj", "k_proj"], "shared_modules": ["q_proj", "k_proj"]},
        ["no module is routed", "target_modules=", "shared_modules=['k_proj', 'q_proj']", "share fewer"],
    ),
    ({"target_modules": ["q_proj"], "layers_to_route": [7]}, ["layers_to_route names 7", "are [0, 1]"]),
    ({"target_modules": ["lm_head"]}, ["no module is routed", "lm_head", "inside the model's blocks"]),
    (
        {"target_modules": ["q_proj", "k_proj"], "expert_order": ["k_proj", "qproj"]},
        ["expert_order names 'qproj'", "did you mean 'q_proj'"],
    ),
    (
        {"target_modules": ["q_proj", "k_proj"], "granularity": "task", "task_experts": {0: ["kproj"]}},
        ["task_experts[0] names 'kproj'", "did you mean 'k_proj'"],
    ),
]


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize(("fields", "words"), by_message(BAD_NAMES))
def test_bad_name_is_refused_before_the_model_is_touched(fields: dict, words: list[str]) -> None:
    model = llama()
    before, logits = structure(model), model(tokens()).logits
    with pytest.raises(ValueError) as error:
        get_peft_model(model, MonkeyJumpConfig(center_init="random", **fields))
    says(error, *words)
    assert structure(model) == before
    assert torch.equal(model(tokens()).logits, logits)
    assert not any(hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    assert all(parameter.requires_grad for parameter in model.parameters())
    routed(model)(tokens())  # and a good config still works


def test_bad_second_adapter_leaves_the_first_as_it_was() -> None:
    model = routed(llama()).eval()
    before, logits = structure(model), model(tokens()).logits
    with pytest.raises(ValueError, match="shared_modules names 'nothing'"):
        model.add_adapter("second", MonkeyJumpConfig(center_init="random", shared_modules=["nothing"]))
    assert structure(model) == before
    assert torch.equal(model(tokens()).logits, logits)
    assert list(model.peft_config) == ["default"]


def test_architecture_without_default_targets_lists_its_modules() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mix": nn.Linear(4, 4)})])})
    with pytest.raises(ValueError) as error:
        get_peft_model(model, MonkeyJumpConfig())
    says(error, "target_modules=None", "mix")


# ---------------------------------------------------------------------- the schedule

BAD_SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every=0"),
    ({"every": -1}, "every=-1"),
    ({"every": 1.5}, "every=1.5"),
    ({"every": True}, "every=True"),
    ({"until": 1.5}, "until=1.5"),
    ({"until": 0.0}, "until=0.0"),
    ({"until": -1}, "until=-1"),
    ({"until": True}, "until=True"),
    ({"until": float("nan")}, "until=nan"),
    ({"until": "all"}, "until='all'"),
]


@pytest.mark.parametrize(("arguments", "words"), by_message(BAD_SCHEDULES))
def test_bad_schedule_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        CenterUpdate(**arguments)
    says(error, words, "out of range: use")


def test_share_of_the_steps_needs_their_number() -> None:
    model = routed(llama())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError) as error:
        CenterUpdate(until=0.5).attach(model, optimizer)
    says(error, "until=0.5", "total_steps=")
    assert not any(router.gathering.get("default") for router in routers(model))
    assert not optimizer._optimizer_step_post_hooks


def test_schedule_without_a_routed_adapter_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"no routed adapter; make one with get_peft_model"):
        CenterUpdate(until=1).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_rank_schedule_of_another_length_is_refused() -> None:
    model = routed(llama(), base="adalora", total_step=10, init_r=4, target_r=2, r=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"total_step=10 .* 20 optimizer steps; set total_step=20"):
        CenterUpdate().attach(model, optimizer, total_steps=20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"granularity": "task", "task_experts": {"nli": ["q_proj"]}}, ["task_experts=", "map task ids (integers)"]),
        ({"granularity": "task", "task_experts": {0: "q_proj"}}, ["task_experts[0]='q_proj'", "list of names"]),
        ({"granularity": "task", "task_experts": {0: ["o_proj"]}}, ["task_experts[0]", "only routed modules"]),
        ({"shared_modules": "o_proj"}, ["shared_modules='o_proj', as a regex", "['o_proj']"]),
        ({"expert_order": "k_proj"}, ["expert_order='k_proj'", "list of names, or 'targets'"]),
        ({"layers_to_route": "all"}, ["layers_to_route='all'", "block numbers from 0, or None"]),
        ({"layers_to_route": [-1]}, ["layers_to_route=[-1]", "block numbers from 0"]),
        ({"layers_to_route": [0, 99]}, ["layers_to_route names 99", "are [0, 1]"]),
        ({"base": "propulsion", "degree": "a"}, ["degree='a'", "integer of at least 1"]),
        ({"base": "propulsion", "target_parameters": ["w"]}, ["target_parameters=['w']", "use target_modules"]),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_name_field_value_and_remedy(change: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        routed(llama(), **change)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_the_callers_config_keeps_its_own_words() -> None:
    config = MonkeyJumpConfig(center_init="random")
    get_peft_model(llama(), config)
    assert config.target_modules is None
    get_peft_model(bert(), config)  # with defaults of its own
