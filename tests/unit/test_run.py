"""The fit of a run over the stock Trainer: it learns, is repeatable, reports, and refuses rows without labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from small_inputs import model, tokenizer, write_task
from transformers import TrainerCallback, set_seed

from monkeyjump.tasks import Collator, InputError, Prompts, blend, load_task, read_task
from monkeyjump.training import Fitted, Watch, fit
from monkeyjump.training.config import Centers, Train
from monkeyjump.training.data import RunCollator, TrainingSet, check_rows

COLLATOR = RunCollator(Collator.of(tokenizer()))


@pytest.fixture
def rows(tmp_path: Path) -> TrainingSet:
    return TrainingSet(blend([load_task(read_task(write_task(tmp_path)))], Prompts(tokenizer())))


@pytest.fixture
def train(rows: TrainingSet, tmp_path: Path):
    def train(net, settings: Train, watch: Watch | None = None) -> Fitted:
        return fit(net, rows, COLLATOR, settings, Centers(), ["films"], tmp_path / "work", watch)

    return train


def every_step(**settings: object) -> Train:
    return Train(batch_size=4, log_every=1, **settings)


def adapted():
    set_seed(0)
    return get_peft_model(model(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


def test_trains_the_adapter_only_and_reports_each_step(rows, train):
    net, seen = adapted(), []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = train(net, every_step(epochs=3, learning_rate=1e-2), Watch(report=seen.append))
    steps = [step for step in seen if "loss" in step.metrics]
    assert [step.number for step in steps] == list(range(1, 13))
    assert result.steps == 12
    assert result.losses == [step.loss for step in steps]
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    assert result.tokens == 3 * sum(len(rows[i]["input_ids"]) for i in range(len(rows)))  # padding is not counted
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_same_seed_same_losses(train):
    losses = [train(adapted(), every_step(seed=seed)).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_callbacks_are_called(train):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    count = Count()
    train(adapted(), every_step(), Watch(callbacks=[count]))
    assert count.steps == 4


def test_losses_that_are_not_finite_stop_the_run(train):
    net = adapted()
    net.base_model.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"lower train\.learning_rate"):
        train(net, every_step())


class Masked:
    """Rows of which some have no supervised token."""

    def __init__(self, rows: TrainingSet, masked: set[int], times: int = 1) -> None:
        self.rows, self.masked, self.times = rows, masked, times

    def __len__(self) -> int:
        return self.times * len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index % len(self.rows)]
        return {**row, "labels": [-100] * len(row["labels"])} if index in self.masked else row

    def where(self, index: int) -> str:
        return f"row {index}"


def test_few_rows_without_a_label_are_no_reason_to_stop(rows):
    checked = check_rows(Masked(rows, {5}, times=2), most=100)  # 1 of 32 is under one in twenty
    assert checked.rows == 32
    assert checked.supervised == sum(sum(label >= 0 for label in Masked(rows, {5}, 2)[i]["labels"]) for i in range(32))


@pytest.mark.parametrize("which", [range(4, 6), range(16)])
def test_many_rows_without_a_label_are_refused(rows, which):
    with pytest.raises(InputError, match=rf"row {which[0]}: no supervised token, as in {len(which)} of 16 rows"):
        check_rows(Masked(rows, set(which)), most=100)


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError, match="learning_rat"):
        Train(learning_rat=1e-3)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Train(batch_size=0)
