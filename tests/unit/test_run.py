"""A run over the stock Trainer: it learns, is repeatable, reports, and refuses rows without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from small_inputs import model, tokenizer, write_task
from transformers import TrainerCallback, set_seed

from monkeyjump.tasks import Collator, InputError, load_task, mix, read_task
from monkeyjump.training import TrainSettings, train

COLLATOR = Collator.of(tokenizer())


@pytest.fixture
def rows(tmp_path: Path):
    return mix([load_task(read_task(write_task(tmp_path)))], tokenizer()).train


def adapted():
    set_seed(0)
    return get_peft_model(model(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


def masked(row):
    return {**row, "labels": [-100] * len(row["labels"])}


def test_trains_the_adapter_only_and_reports_each_step(rows):
    net, seen = adapted(), []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = TrainSettings(batch_size=4, epochs=3, learning_rate=1e-2)
    result = train(net, rows, COLLATOR, settings, report=seen.append)
    assert [step.number for step in seen] == list(range(1, 13))
    assert result.steps == settings.steps(len(rows)) == 12
    assert result.losses == [step.loss for step in seen]
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    assert result.tokens == 3 * sum(len(row["input_ids"]) for row in rows)  # padding is not counted
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_same_seed_same_losses(rows):
    losses = [train(adapted(), rows, COLLATOR, TrainSettings(batch_size=4, seed=seed)).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_callbacks_are_called(rows):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    count = Count()
    train(adapted(), rows, COLLATOR, TrainSettings(batch_size=4), callbacks=[count])
    assert count.steps == 4


def test_few_masked_rows_go_out_with_a_count(rows):
    many = rows * 2  # 1 of 32 is under one in twenty
    many[5] = masked(many[5])
    result = train(adapted(), many, COLLATOR, TrainSettings(batch_size=16))
    assert result.masked_rows == 1
    assert all(loss > 0 for loss in result.losses)


def test_a_loss_that_is_not_finite_stops_the_run(rows):
    net = adapted()
    net.base_model.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"at step 1 of 2.*lower learning_rate"):
        train(net, rows, COLLATOR, TrainSettings())


@pytest.mark.parametrize("which", [slice(4, 6), slice(None)])
def test_many_masked_rows_are_refused(rows, which):
    rows[which] = [masked(row) for row in rows[which]]
    first = 4 if which.start else 0
    with pytest.raises(InputError, match=rf"of 16 training rows have no supervised token \(first: row {first}\)"):
        train(adapted(), rows, COLLATOR, TrainSettings())


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainSettings(learning_rat=1e-3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TrainSettings(batch_size=0)
