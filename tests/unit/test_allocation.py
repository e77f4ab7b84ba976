"""Importance against gradients by hand; the rules of allocation: rounding, ties, ranks, budgets."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from monkeyjump.allocation import (
    Importance,
    adaptable_modules,
    allocate_peft,
    mask_importance,
    shuffled,
    taylor_importance,
    uniform_peft,
)
from monkeyjump.allocation.matrices import Matrix
from monkeyjump.allocation.plan import plan_from, ranks_within
from tiny import VOCAB, llama, tokens


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
    return MambaForCausalLM(MambaConfig(**shape, use_cache=False)).eval()


class Pair(nn.Module):
    """Two linear layers whose gradients are known: loss = sum of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(self.first(x)))


def sum_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(batch["x"]).sum()


# ---------------------------------------------------------------------- importance


def test_taylor_is_the_mean_of_weight_times_gradient():
    torch.manual_seed(0)
    model = Pair().train()
    batches = [{"x": torch.randn(1, 3)} for _ in range(3)]
    found = taylor_importance(model, batches, loss=sum_loss)
    w1, w2 = model.first.weight.detach(), model.second.weight.detach()
    first = [(w1 * (w2.T @ batch["x"])).abs().mean() for batch in batches]
    second = [(w2 * (batch["x"] @ w1.T)).abs().mean() for batch in batches]
    assert found.scores == pytest.approx({"first": sum(first).item() / 3, "second": sum(second).item() / 3})
    assert found.method == "taylor"


def test_taylor_leaves_the_model_as_it_was():
    model = llama()
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    before = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
    taylor_importance(model, [{"input_ids": tokens(), "labels": tokens()}])
    assert before == ([(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()])


def test_taylor_ranks_a_module_that_does_nothing_last():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # and gate and up before it get no gradient
    scores = taylor_importance(model, [{"input_ids": tokens(), "labels": tokens()}]).scores
    silent = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {name for name, score in scores.items() if score == 0} == silent


def test_taylor_of_chosen_modules_in_half_precision_and_whatever_the_callers_mode():
    torch.manual_seed(0)
    model = Pair().bfloat16()
    batch = {"x": torch.randn(1, 3).bfloat16()}
    with torch.no_grad():
        found = taylor_importance(model, [batch], ["second"], loss=sum_loss)
    hidden = model.first(batch["x"])
    expected = (model.second.weight.float() * hidden.float()).abs().mean().item()
    assert found.scores == {"second": pytest.approx(expected, rel=1e-6)}


def test_taylor_of_a_module_that_is_not_read_is_zero_and_of_a_broken_loss_an_error():
    class Spare(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    batch = {"x": torch.ones(1, 3)}
    found = taylor_importance(Spare(), [batch], loss=sum_loss).scores
    assert found["spare"] == 0 < found["first"]
    with pytest.raises(ValueError, match="the importance of first is nan"):
        taylor_importance(Pair(), [{"x": torch.full((1, 3), math.nan)}], loss=sum_loss)


def test_importance_of_masks():
    logits = {"a": torch.tensor([[3.0, -1.0], [2.0, 0.0]]), "b": torch.tensor([-4.0, -4.0])}
    assert mask_importance(logits).scores == {"a": 0.5, "b": 0.0}
    assert mask_importance(logits, "mask_logit").scores == {"a": 1.5, "b": 4.0}
    mean = sum(1 / (1 + math.exp(-x)) for x in (3, -1, 2, 0)) / 4
    assert mask_importance(logits, "mask_mean").scores == pytest.approx({"a": mean, "b": 1 / (1 + math.exp(4))})


def test_shuffled_deals_the_same_scores_to_other_modules():
    importance = Importance("taylor", {f"m{i}": float(i) for i in range(20)})
    dealt = shuffled(importance, seed=1)
    assert sorted(dealt.scores.values()) == sorted(importance.scores.values())
    assert dealt.scores != importance.scores
    assert (dealt.method, dealt.scores) == ("shuffled taylor", shuffled(importance, seed=1).scores)
    assert shuffled(importance, seed=2).scores != dealt.scores
    assert shuffled(dealt, seed=2).method == "shuffled taylor"


def test_what_cannot_be_scored_is_said():
    with pytest.raises(ValueError, match="batches is empty"):
        taylor_importance(llama(), [])
    with pytest.raises(ValueError, match="no 'labels'"):
        taylor_importance(llama(), [{"input_ids": tokens()}])
    with pytest.raises(ValueError, match=r"modules names 'lm_hed'.*no linear layer"):
        taylor_importance(llama(), [], modules=["lm_hed"])
    with pytest.raises(ValueError, match="method='mask_men' is not known: did you mean 'mask_mean'"):
        mask_importance({}, "mask_men")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="importance of a is"):
            mask_importance({"a": torch.tensor([value])}, "mask_logit")


# ---------------------------------------------------------------------- which modules


def test_adaptable_are_linear_layers_and_depthwise_convolutions_but_not_the_head():
    names = list(adaptable_modules(mamba()))
    leaves = ["conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"]
    assert names == [f"backbone.layers.{i}.mixer.{leaf}" for i in range(2) for leaf in leaves]
    assert adaptable_modules(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Embedding(3, 3), nn.Linear(3, 2))) == {
        "2": Matrix(2, 3)
    }


def test_weights_of_whole_numbers_take_no_adapter():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    assert list(adaptable_modules(model)) == ["0"]


# ---------------------------------------------------------------------- kinds


def test_the_readmes_knobs_are_the_defaults():
    found = {name: field.default for name, field in inspect.signature(allocate_peft).parameters.items()}
    readme = {"peft_application_ratio": 0.3, "importance_threshold": 0.5, "peft_r": 16, "peft_alpha": 32}
    assert readme.items() <= found.items()


def four(**options: object):
    model = nn.Sequential(*(nn.Linear(10, 20) for _ in range(4)))
    return allocate_peft(model, {"0": 1.0, "1": 4.0, "2": 3.0, "3": 2.0}, **options)


def test_most_important_get_lora_then_ia3_then_nothing():
    plan = four(peft_application_ratio=0.75, importance_threshold=0.34)
    assert [(one.name, one.kind, one.rank, one.parameters) for one in plan.modules] == [
        ("1", "lora", 10, 300),  # rank 16 of a [20, 10] matrix would add nothing to rank 10
        ("2", "ia3", 0, 20),
        ("3", "ia3", 0, 20),
        ("0", "frozen", 0, 0),
    ]
    assert (plan.parameters, plan.scale) == (340, 2.0)


@pytest.mark.parametrize(
    ("count", "ratio", "threshold", "lora", "ia3"),
    [
        (4, 0.3, 0.5, 1, 0),  # 1.2 -> 1, half of it -> 1
        (5, 0.5, 0.5, 2, 1),  # 2.5 -> 3, 1.5 -> 2
        (10, 0.3, 0.5, 2, 1),  # the README's knobs
        (10, 0.25, 0.5, 2, 1),  # 2.5 -> 3: to the even neighbour it would be 2
        (20, 0.35, 0.7, 5, 2),  # 7 tuned, 4.9 -> 5; 0.35 * 20 is 6.999... in binary
        (5, 1.0, 0.7, 4, 1),  # 3.5 -> 4; 0.7 * 5 is 3.4999... in binary
        (10, 0.35, 1.0, 4, 0),  # 3.5 -> 4, as binary 3.4999...
        (3, 1.0, 0.0, 0, 3),
        (3, 1.0, 1.0, 3, 0),
    ],
)
def test_rounding(count: int, ratio: float, threshold: float, lora: int, ia3: int):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
    scores = {str(i): float(i) for i in range(count)}
    plan = allocate_peft(model, scores, peft_application_ratio=ratio, importance_threshold=threshold)
    assert (len(plan.of("lora")), len(plan.of("ia3"))) == (lora, ia3)


def test_equal_scores_keep_the_models_order():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    scores = {str(i): 1.0 for i in reversed(range(12))}
    plan = allocate_peft(model, scores, peft_application_ratio=0.5)
    assert [one.name for one in plan.modules] == [str(i) for i in range(12)]


def test_the_log_says_who_gets_what_and_by_which_score():
    plan = allocate_peft(llama(), Importance("taylor", dict.fromkeys(adaptable_modules(llama()), 0.25)), peft_r=2)
    assert plan.lines(show=1) == [
        "Importance: taylor (mean |w * dL/dw| per weight), 14 modules",
        "LoRA: 2 modules, 224 parameters",
        "  model.layers.0.self_attn.q_proj: taylor 0.25, rank 2",
        "  and 1 more layers",
        "IA³: 2 modules, 48 parameters",
        "  model.layers.0.self_attn.v_proj: taylor 0.25",
        "  and 1 more layers",
        "frozen: 10 modules, 0 parameters",
        "  model.layers.0.mlp.gate_proj: taylor 0.25",
        "  and 9 more layers",
    ]
    assert plan_from(plan.as_record()) == plan
    record = plan.as_record()
    record["modules"][0]["kind"] = "lorra"
    with pytest.raises(ValueError, match=r"kind of model.layers.0.self_attn.q_proj='lorra' is not known"):
        plan_from(record)


# ---------------------------------------------------------------------- budgets


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(1, 3000),
)
def test_a_budget_is_kept_and_used_up(shapes: list[tuple[int, int]], budget: int):
    matrices = [Matrix(*shape) for shape in shapes]
    costs = [sum(shape) for shape in shapes]
    if budget < sum(costs):
        with pytest.raises(ValueError, match=f"budget={budget} is less than the {sum(costs)} parameters"):
            ranks_within(matrices, budget, budget)
        return
    ranks = ranks_within(matrices, budget, budget)
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs))
    steps = [cost for rank, cost, matrix in zip(ranks, costs, matrices) if rank < matrix.full_rank]
    assert all(1 <= rank <= matrix.full_rank for rank, matrix in zip(ranks, matrices))
    assert left >= 0
    assert all(left < step for step in steps)


def test_ranks_grow_together_then_in_order_of_importance():
    assert ranks_within([Matrix(10, 10)] * 3, 20 * 7 + 19, 0) == [3, 2, 2]
    assert ranks_within([Matrix(30, 30), Matrix(10, 10)], 80 * 2 + 40, 0) == [2, 4]  # the rest pays for the small one
    assert ranks_within([Matrix(30, 2), Matrix(10, 10)], 32 * 2 + 20 * 9, 0) == [2, 9]  # full rank is enough


def test_every_baseline_keeps_the_hybrids_budget():
    model = mamba()
    scores = taylor_importance(model, [{"input_ids": tokens(), "labels": tokens()}])
    budget = allocate_peft(model, scores, peft_application_ratio=0.5, peft_r=8).parameters
    plans = [
        allocate_peft(model, scores, peft_application_ratio=0.5, budget=budget),
        allocate_peft(model, shuffled(scores, 0), peft_application_ratio=0.5, budget=budget),
        uniform_peft(model, "lora", budget=budget),
        uniform_peft(model, "lora", only=("x_proj", "dt_proj"), budget=budget),
    ]
    for plan in plans:
        lora = plan.of("lora")
        full = {name: matrix.full_rank for name, matrix in adaptable_modules(model).items()}
        step = min((one.parameters // one.rank for one in lora if one.rank < full[one.name]), default=math.inf)
        assert budget - step < plan.parameters <= budget
        assert plan.scale == 2.0
    assert {one.name.rpartition(".")[2] for one in plans[3].of("lora")} == {"x_proj", "dt_proj"}
    assert len(plans[3].of("frozen")) == 6
    assert [one.kind for one in plans[3].modules] == ["lora"] * 4 + ["frozen"] * 6
    assert uniform_peft(model, "ia3").parameters == sum(m.d_out for m in adaptable_modules(model).values())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"peft_application_ratio": 0.1},
            "ratio=0.1 of 4 modules is none; raise it to at least 0.125",
        ),
        ({"peft_application_ratio": 0.0}, "peft_application_ratio=0.0 must be above 0"),
        ({"peft_application_ratio": 1.5}, "peft_application_ratio=1.5 must be above 0 and at most 1"),
        ({"importance_threshold": -0.1}, "importance_threshold=-0.1 must be from 0 to 1"),
        ({"peft_r": 0}, "peft_r=0 must be a whole number from 1"),
        ({"peft_r": 2.5}, "peft_r=2.5 must be a whole number"),
        ({"peft_alpha": 0}, "peft_alpha=0 must be above 0"),
        ({"peft_alpha": math.inf}, "peft_alpha=inf must be above 0 and finite"),
        ({"budget": 10}, "budget=10 is less than the 30 parameters"),
        ({"importance_threshold": 0.0, "budget": 10}, "budget=10 is less than the 20 parameters"),
    ],
)
def test_options_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        four(**options)


def test_scores_that_do_not_fit_the_model():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="scores names '1', which is no linear layer"):
        allocate_peft(model, {"1": 0.0})
    with pytest.raises(ValueError, match="scores is empty"):
        allocate_peft(model, {})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"scores\['0'\] is {value}"):
            allocate_peft(model, {"0": value})
    with pytest.raises(ValueError, match="kind='frozen' is not known"):
        uniform_peft(model, "frozen")
    with pytest.raises(ValueError, match=r"only names 'xproj'.*did you mean 'x_proj'"):
        uniform_peft(mamba(), "lora", only=["xproj"])
