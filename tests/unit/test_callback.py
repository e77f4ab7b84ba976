"""The schedule of `CenterUpdate`: when centers move, what counts as a step, what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from monkeyjump import PRESETS, CenterUpdate
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable


def centers_of(model: object) -> Tensor:
    return torch.cat([r.centers["default"] for r in routers(model)]).clone()


def steps_that_move(update: CenterUpdate, steps: int, total_steps: int | None = None) -> list[int]:
    model = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    update.attach(model, optimizer, total_steps=total_steps)
    moved = []
    for step in range(1, steps + 1):
        before = centers_of(model)
        model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        if not torch.equal(before, centers_of(model)):
            moved.append(step)
    assert not any(r.pending or r.gathered for r in routers(model)) or update.completed < (update.last or steps + 1)
    return moved


@pytest.mark.parametrize(
    ("every", "until", "moves"),
    [
        (1, 3, [1, 2, 3]),
        (2, 5, [2, 4]),
        (3, 100, [3, 6]),
        (1, 0, []),
        (2, 0.5, [2]),
        (1, 1.0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_centers_move_every_so_many_steps_until_a_step(every: int, until: int | float, moves: list[int]) -> None:
    assert steps_that_move(CenterUpdate(every=every, until=until), 6, total_steps=6) == moves


def test_a_skipped_step_does_not_count_and_leaves_nothing() -> None:
    model = routed(llama()).train()
    reference = routed(llama()).train()
    for candidate, skips in ((model, True), (reference, False)):
        optimizer = torch.optim.SGD(trainable(candidate).values(), lr=0.0)
        update = CenterUpdate(every=2, until=10).attach(candidate, optimizer)
        candidate(tokens(seed=1), labels=tokens(seed=1))
        optimizer.step()
        if skips:
            candidate(tokens(seed=7), labels=tokens(seed=7))
            update.skip()
        candidate(tokens(seed=2), labels=tokens(seed=2))
        optimizer.step()
        assert update.completed == 2
    assert torch.equal(centers_of(model), centers_of(reference))


def test_the_trainer_reports_a_skipped_step_through_the_optimizer() -> None:
    class Skipped:
        step_was_skipped = True

    model = routed(llama()).train()
    update = CenterUpdate(every=1, until=10).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.0))
    before = centers_of(model)
    model(tokens(), labels=tokens())
    update.on_step_end(None, None, None, optimizer=Skipped())
    assert update.completed == 0
    assert torch.equal(before, centers_of(model))
    assert not any(r.pending for r in routers(model))


def test_accelerates_optimizer_is_looked_through() -> None:
    from accelerate import Accelerator

    model = routed(llama()).train()
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD(trainable(model).values(), lr=0.1))
    update = CenterUpdate(every=1, until=10).attach(model, optimizer)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert update.completed == 1


def run(model: object, update: CenterUpdate, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("carrier", ["adapter file", "state dict"])
def test_resuming_between_two_updates_equals_going_on(carrier: str, tmp_path: Path) -> None:
    whole = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(whole).values(), lr=0.1)
    update = CenterUpdate(every=2, until=10).attach(whole, optimizer)
    run(whole, update, optimizer, range(3))  # one update behind it, half of the next one gathered
    whole.save_pretrained(tmp_path)
    state = update.state_dict()
    run(whole, update, optimizer, range(3, 6))

    part = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    optimizer = torch.optim.SGD(trainable(part).values(), lr=0.1)
    if carrier == "state dict":
        for router in routers(part):
            router.gathered.clear(), router.steps.clear()
    done = 3 if carrier == "adapter file" else 0
    update = CenterUpdate(every=2, until=10).attach(part, optimizer, completed=done)
    if carrier == "state dict":
        update.load_state_dict(state)
    assert update.completed == 3
    run(part, update, optimizer, range(3, 6))
    assert torch.equal(centers_of(part), centers_of(whole))
    for one, other in zip(trainable(part).values(), trainable(whole).values()):
        assert torch.equal(one, other)


def test_a_finished_run_leaves_no_training_state_in_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    update = CenterUpdate(every=2, until=3).attach(model, optimizer)
    for step, expected in ((1, True), (2, True), (3, False)):
        run(model, update, optimizer, range(step, step + 1))
        model.save_pretrained(tmp_path)
        assert any("training_state" in key for key in load_file(tmp_path / "adapter_model.safetensors")) is expected


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_a_schedule(preset: str) -> None:
    update = CenterUpdate.from_preset(preset)
    assert {"every": update.every, "until": update.until} == PRESETS[preset].center_update


def test_a_step_that_a_scaler_skipped_leaves_nothing_in_a_plain_loop() -> None:
    model = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    update = CenterUpdate(every=1, until=10).attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = centers_of(model)
    scaler.scale(model(tokens(), labels=tokens()).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert update.completed == 0
    assert not any(r.pending or r.gathered for r in routers(model))
    assert torch.equal(before, centers_of(model))


def test_another_schedule_takes_over(caplog: pytest.LogCaptureFixture) -> None:
    model = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    first = CenterUpdate(every=1, until=10).attach(model, optimizer)
    second = CenterUpdate(every=1, until=10).attach(model, optimizer)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert (first.completed, second.completed) == (0, 1)
    assert any("takes over" in r.getMessage() for r in caplog.records)
    second.attach(model, optimizer)  # again, for another run
    optimizer.step()
    assert second.completed == 1
    second.detach()
    optimizer.step()
    assert second.completed == 1
    assert "zero_grad" not in vars(optimizer)


def test_an_adapter_switched_on_later_gathers_as_well() -> None:
    model = routed(llama()).train()
    model.add_adapter("second", model.peft_config["default"])
    CenterUpdate(every=1, until=10).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    model.set_adapter("second")
    model(tokens(), labels=tokens())
    assert all(set(r.pending) == {"second"} for r in routers(model))


def test_a_schedule_that_never_moves_a_center_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = routed(llama())
    CenterUpdate(every=10, until=5).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    assert any("never moves a center" in r.getMessage() for r in caplog.records)


def test_a_copy_made_in_training_is_in_nobodys_training(tmp_path: Path) -> None:
    import copy

    from safetensors.torch import load_file

    model = routed(llama()).train()
    CenterUpdate(every=5, until=10).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    model(tokens(), labels=tokens())
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert not any("training_state" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert all(r.pending for r in routers(model))


@pytest.mark.parametrize("place", ["before forward", "before backward", "after step"])
def test_it_does_not_matter_where_a_loop_clears_its_gradients(place: str) -> None:
    results = []
    for where in (place, "after step"):
        model = routed(llama()).train()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        CenterUpdate(every=2, until=10).attach(model, optimizer)
        for step in range(4):
            if where == "before forward":
                optimizer.zero_grad()
            loss = model(tokens(seed=step), labels=tokens(seed=step)).loss
            if where == "before backward":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if where == "after step":
                optimizer.zero_grad()
        results.append(centers_of(model))
    assert torch.equal(*results)


def test_an_optimizer_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    routed(llama()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"no parameter that trains.*is_trainable=True"):
        CenterUpdate(until=5).attach(frozen, torch.optim.SGD(frozen.parameters(), lr=0.1))
