"""What the benchmark's figures rest on: counting, order, statistics, candidates that differ only in adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from monkeyjump.bench import figure
from monkeyjump.bench.candidates import build, check_targets, load_base
from monkeyjump.bench.child import settings_from
from monkeyjump.bench.memory import saved_bytes
from monkeyjump.bench.passes import clear_gradients, decode, loss_of, tokens, training_step
from monkeyjump.bench.report import figure2
from monkeyjump.bench.run import above_floor
from monkeyjump.bench.settings import ALL, FIGURE2, Settings, Shape, check
from monkeyjump.bench.timing import Work, interleaved, order_of, ratio, summary
from monkeyjump.methods import METHODS
from monkeyjump.moe import ExpertConfig
from monkeyjump.tasks.errors import InputError
from monkeyjump.tuner.model import routers

TINY = Settings(
    shape=Shape(hidden_size=32, layers=2, heads=4, kv_heads=4, intermediate_size=48, vocab_size=64),
    batch=2,
    length=8,
    memory_batch=2,
    center_tokens=64,
    decode_tokens=2,
)


def test_saved_activations_of_a_linear_chain_by_hand():
    # Linear(4, 6), ReLU, Linear(6, 2) over x [5, 4] in float32: the first layer keeps x, ReLU its output,
    # the second layer its input, which is that output: 5 * 4 * 4 + 5 * 6 * 4 bytes. Weights do not count.
    chain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    assert saved_bytes(chain, lambda: chain(x)) == 80 + 120


def test_saved_activations_count_whole_storages_once_and_no_buffers():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.randn(10, 4))

        def forward(self, wide: torch.Tensor) -> torch.Tensor:
            left, right = wide[:, :4], wide[:, 4:]  # two views of one storage of 10 * 8 * 4 bytes
            return left * right * self.scale

    wide = torch.randn(10, 8, requires_grad=True)
    product, stranger = Product(), Product()
    assert saved_bytes(product, lambda: product(wide)) == 320
    assert saved_bytes(stranger, lambda: product(wide)) == 320 + 160  # the buffer of another model counts


def test_saved_activations_are_those_still_held_at_the_end():
    layer = nn.Linear(4, 4)

    def forward() -> torch.Tensor:
        layer(torch.randn(100, 4))  # a branch that nothing leads back to
        return layer(torch.randn(3, 4))

    assert saved_bytes(layer, forward) == 3 * 4 * 4


def test_order_alternates_every_round():
    assert [order_of(number, ["a", "b", "c"]) for number in (0, 1, 2)] == [list("abc"), list("cba"), list("abc")]


def test_rounds_are_interleaved_and_warm_up_does_not_count():
    ran: list[str] = []
    works = {name: Work(lambda n=name: n, ran.append) for name in "abc"}  # type: ignore[misc]
    rounds: list[None] = []
    seconds = interleaved(works, rounds=3, warmup=1, after_round=lambda: rounds.append(None))
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert len(rounds) == 4


def test_only_the_run_is_timed(monkeypatch: pytest.MonkeyPatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("monkeyjump.bench.timing.time.perf_counter", lambda: clock["now"])

    def passes(seconds: float) -> Iterator[None]:
        clock["now"] += seconds
        yield

    work = Work(lambda: list(passes(100.0)), lambda _: list(passes(0.25)))
    assert interleaved({"a": work}, rounds=2) == {"a": [0.25, 0.25]}


def test_summary_is_median_and_quartiles():
    found = summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.lower, found.median, found.upper) == (2.0, 3.0, 4.0)


def test_ratio_is_taken_within_rounds():
    # medians 2 and 2 would give 1; round by round the ratios are 2, 2, 2, 0.25, 2
    found = ratio([2.0, 4.0, 8.0, 1.0, 2.0], [1.0, 2.0, 4.0, 4.0, 1.0])
    assert found.median == 2.0
    assert found.high == 2.0
    assert found.low == 0.25


def test_ratio_has_the_interval_of_a_median():
    # The median of 101 distinct values: by order statistics (binomial with p = 1/2) the 95 % limits are the
    # 41st and the 61st value; the percentile bootstrap agrees up to one rank.
    values = [1 + number / 100 for number in range(101)]
    found = ratio(values, [1.0] * 101)
    assert found.median == pytest.approx(1.50)
    assert found.low == pytest.approx(1.40, abs=0.011)
    assert found.high == pytest.approx(1.60, abs=0.011)
    assert ratio(values, [1.0] * 101) == found  # a fixed seed


def test_memory_above_the_floor_as_a_share_of_what_peft_adds():
    found = above_floor({"floor": [100, 90, 110], "peft-lora": [180], "mj-lora": [110]})
    assert [row["bytes"] for row in found.values()] == [100, 180, 110]
    assert [row["above_floor"] for row in found.values()] == [0, 80, 10]
    assert [row["to_peft_lora"] for row in found.values()] == [0, 1, 0.125]
    assert "above_floor" not in above_floor({"mj-lora": [5]})["mj-lora"]
    assert "to_peft_lora" not in above_floor({"floor": [5], "peft-lora": [5]})["floor"]


def test_every_candidate_trains_and_decodes_over_the_same_weights():
    base = load_base(TINY)
    ids = tokens(64, 2, 8, 0, "cpu")
    own = {id(parameter) for parameter in base.parameters()}
    losses = set()
    for name in ALL:
        candidate = build(name, base, TINY)
        training_step(candidate, ids).prepare()
        loss = loss_of(candidate.model, ids)
        loss.backward()
        config = candidate.model.peft_config["default"] if candidate.optimizer else None
        adds = "adalora" in name or (isinstance(config, ExpertConfig) and any(t.weight for t in config.terms()))
        losses.add(None if adds or "moe-propulsion" in name else round(float(loss.detach()), 4))
        moved = [p for p in candidate.model.parameters() if p.grad is not None]
        assert bool(moved) == (name != "floor")
        assert not own & {id(p) for p in moved}
        assert own <= {id(p) for p in candidate.model.parameters()}
        moving = name.startswith("mj-") and name != "mj-lora-trainable"
        gathering = [r for r in routers(candidate.model) if r.pending] if moving else []
        assert len(gathering) == (2 if moving else 0)
        clear_gradients(candidate.model)
        assert all(router.pending for router in gathering)  # a cleared gradient is no skipped step here
        work = decode(candidate, ids[:1], 2)
        assert work.run(work.prepare()).shape == (1, 1)
    assert len(losses - {None}) == 1  # adapters start as no change
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_mixtures_have_the_experts_that_are_asked_for():
    base, settings = load_base(TINY), replace(TINY, experts=3, top_k=1, rank=4, dropout=0.1)
    for name in ("moelora", "mixlora", "hydralora", "mola", "moe-adalora", "moe-propulsion"):
        config = build(name, base, settings).model.peft_config["default"]
        assert np.mean(config.expert_counts()) == 3
        assert config.top_k == (None if name == "hydralora" else 1)
        if name != "moe-propulsion":
            assert (config.rank, config.lora_dropout) == (6 if name == "moe-adalora" else 4, 0.1)
    mola = build("mola", base, TINY).model.peft_config["default"]
    assert mola.expert_counts() == [1, 3, 5, 7]
    more = build("more", base, settings).model.peft_config["default"]
    assert (more.r, more.lora_dropout) == (12, 0.1)  # the ranks of 3 experts of 4


def test_the_steps_of_an_optimizer_drive_the_ranks_of_a_mixture():
    candidate = build("moe-adalora", load_base(TINY), TINY)
    ids = tokens(64, 2, 8, 0, "cpu")
    loss_of(candidate.model, ids).backward()
    assert not candidate.model.base_model.rankallocator.ipt
    candidate.optimizer.step()
    assert candidate.model.base_model.rankallocator.ipt  # importance was scored


def test_every_method_of_the_table_is_a_candidate():
    known = {name.removeprefix("peft-") for name in ALL}
    assert known == {"floor", *METHODS}
    assert set(FIGURE2) <= set(ALL)


def test_half_precision_is_the_bases_and_adapters_stay_float32():
    settings = Settings(**{**asdict(TINY), "shape": TINY.shape, "dtype": "bfloat16"})
    base = load_base(settings)
    for name in ("peft-lora", "mj-propulsion"):
        parameters = list(build(name, base, settings).model.parameters())
        assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}


def test_a_config_without_weights_is_enough(tmp_path):
    load_base(TINY).config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        model = load_base(Settings(**{**asdict(TINY), "shape": Shape(), "model": str(name)}))
        assert model.config.hidden_size == 32
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_settings_reach_the_child_unchanged():
    assert settings_from(json.dumps(asdict(TINY))) == TINY


def test_figure2_columns_by_hand():
    record = {
        "settings": {"steps": 600, "accumulation": 2, "candidates": ("floor",)},
        "size": {"floor": {"trainable": 2500, "total": 3_000_000, "model_bytes": 12_000_000, "adapter_bytes": None}},
        "step": {"floor": {"median": 0.5}},
        "inference": {"forward": {"floor": {"median": 0.1}}},
    }
    assert figure2(record)["floor"] == {
        "trainable_k": 2.5,
        "total_m": 3.0,
        "model_mb": 12.0,
        "peak_memory_mb": None,  # not measured
        "it_per_s": 2.0,
        "train_minutes": 10.0,  # 600 * 2 * 0.5 s
        "inference_it_per_s": 10.0,
    }


def test_figure_is_a_picture_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    row: dict[str, float | None] = dict.fromkeys(figure.PANELS)
    assert not figure.draw({"floor": row}, tmp_path / "none.png")
    assert figure.draw({"floor": {**row, "it_per_s": 2.0}, "mj-lora": {**row, "it_per_s": 1.9}}, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "error", "hint"),
    [
        ({"pairs": 1}, "--pairs: 1 is below 2", "from 2 on"),
        ({"memory_batch": 0}, "--memory-batch: 0 is below 1", "from 1 on"),
        ({"top_k": 5}, "--top-k: 5 is more than --experts 4", "4 at most"),
        ({"dropout": 1.0}, "--dropout: 1.0", "[0, 1)"),
        ({"candidates": ("mj-lroa",)}, "--candidates: 'mj-lroa'", "mj-lora"),
        ({"only": ()}, "--only: nothing", "step"),
        ({"only": ("step", "step")}, "'step' is given twice", "once"),
        ({"shape": Shape(hidden_size=30, heads=4)}, "--heads: 4 does not divide --hidden-size 30", "evenly"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict, error: str, hint: str):
    with pytest.raises(InputError) as caught:
        check(Settings(**{**asdict(TINY), "shape": TINY.shape, **change}))
    assert error in str(caught.value)
    assert hint in caught.value.hint


def test_target_that_is_not_there_is_refused_with_a_near_miss():
    with pytest.raises(InputError, match="no linear layer 'q_porj'") as caught:
        check_targets(load_base(TINY), ("k_proj", "q_porj"))
    assert "q_proj" in caught.value.hint
