"""Batches and calls that routing cannot serve are refused; what it can serve is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from monkeyjump import CenterUpdate, routing_inputs
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

SEQUENCE_MODES = ["last", "mean", "max", "prompt_end"]
every_sequence_mode = pytest.mark.parametrize("granularity", SEQUENCE_MODES)
REMEDY = r"call initialize_centers\(model, data\) first, or set center_init='random'"


def still_works(model: PeftModel, expected: Tensor, **inputs: Any) -> None:
    """After a refusal the model is as before: no frame, gate or statistic is left over."""
    assert torch.equal(model(tokens(), **inputs).logits, expected)
    for router in routers(model):
        assert router.box.gates is None
        assert not router.context.frames


# ---------------------------------------------------------------------- centers


@pytest.mark.parametrize("center_init", ["kmeans", "random_tokens"])
def test_training_before_initialize_centers_raises(center_init: str) -> None:
    model = routed(llama(), center_init=center_init).train()
    words = f"center_init='{center_init}': the centers of .*layers.0.*{REMEDY}"
    with pytest.raises(RuntimeError, match=words):
        model(input_ids=tokens(), labels=tokens())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_inference_before_initialize_centers_warns_once() -> None:
    model = routed(llama(), center_init="kmeans").eval()
    with pytest.warns(UserWarning, match=f"'default' routes with centers never initialized; {REMEDY}"):
        first = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, first)  # a second warning would be an error
    assert first.isfinite().all()


@pytest.mark.parametrize("center_init", ["random", "random_normalized", "trainable"])
def test_random_centers_train_at_once(center_init: str) -> None:
    model = routed(llama(), center_init=center_init).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()


# ---------------------------------------------------------------------- task ids and prompt ends


def test_task_mode_without_task_ids_is_refused() -> None:
    model = routed(llama(), granularity="task").eval()
    good = model(tokens(), task_ids=torch.tensor([0, 1])).logits
    words = r"granularity='task' needs task_ids \[B\].*remove_unused_columns=False"
    with pytest.raises(ValueError, match=words):
        model(tokens())
    still_works(model, good, task_ids=torch.tensor([0, 1]))


def test_task_id_that_maps_to_nothing_is_refused() -> None:
    experts = {0: ["q_proj"], 3: ["k_proj"]}
    model = routed(llama(), granularity="task", task_experts=experts).eval()
    with pytest.raises(ValueError, match=r"task_ids holds 1, which .* does not map: it has \[0, 3\]"):
        model(tokens(), task_ids=torch.tensor([0, 1]))


def test_task_ids_of_another_length_are_refused() -> None:
    model = routed(llama(), granularity="task").eval()
    with pytest.raises(ValueError, match="task_ids holds 3 ids for a batch of 2 rows; pass one per row"):
        model(tokens(), task_ids=torch.tensor([0, 1, 2]))


def test_prompt_end_with_every_label_masked_is_refused() -> None:
    model = routed(llama(), granularity="prompt_end").eval()
    good = model(tokens()).logits
    labels = tokens().clone()
    labels[1] = -100
    with pytest.raises(ValueError, match=r"'prompt_end': every label of row 1 .*mj_prompt_lengths"):
        model(input_ids=tokens(), labels=labels)
    still_works(model, good)


@pytest.mark.parametrize("lengths", [[3], [3, 4, 5], [0, 4], [3, 40]])
def test_prompt_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    model = routed(llama(), granularity="prompt_end").eval()
    with (
        pytest.raises(ValueError, match="prompt_lengths"),
        routing_inputs(model, prompt_lengths=torch.tensor(lengths)),
    ):
        model(tokens())


# ---------------------------------------------------------------------- masks, packed rows, chunks


@every_sequence_mode
def test_attention_mask_of_a_wrong_length_is_refused(granularity: str) -> None:
    model = routed(llama(), granularity=granularity).eval()
    with pytest.raises((ValueError, RuntimeError), match=r"attention_mask|mask|size"):
        model(tokens(), attention_mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\) .* 2 rows and 9 tokens"):
        block_with_mask(model, torch.ones(2, 5))


def block_with_mask(model: PeftModel, mask: Tensor) -> None:
    """Ask a router about a mask that the base model would itself have stumbled over."""
    router = routers(model)[0]
    with router.context.inputs(mask=mask):
        router.route(torch.randn(2, 9, 32), {})


def packed(model: PeftModel) -> Tensor:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    return model(tokens(), position_ids=positions).logits


def in_chunks(model: PeftModel) -> Tensor:
    start = model(tokens()[:, :4], use_cache=True)
    return model(tokens()[:, 4:], past_key_values=start.past_key_values).logits


@every_sequence_mode
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (packed, r"rows are packed .*unpack them, or use granularity='token'"),
        (in_chunks, r"use granularity='token'"),
    ],
)
def test_sequence_modes_refuse_packed_rows_and_chunks(granularity: str, call: Any, words: str) -> None:
    model = routed(llama(), granularity=granularity).eval()
    good = model(tokens()).logits
    with pytest.raises(ValueError, match=words):
        call(model)
    still_works(model, good)


def test_token_mode_takes_packed_rows_and_chunks() -> None:
    model = routed(llama()).eval()
    assert packed(model).isfinite().all()
    torch.testing.assert_close(in_chunks(model), model(tokens()).logits[:, 4:])


@every_sequence_mode
def test_foreign_cache_without_a_decision_is_refused(granularity: str) -> None:
    model = routed(llama(), granularity=granularity).eval()
    with model.disable_adapter():
        cache = model(tokens()[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 tokens without a decision; start with an empty"):
        model(tokens()[:, 4:5], past_key_values=cache)


# ---------------------------------------------------------------------- layers outside their block


def test_routed_layer_outside_its_block_is_refused() -> None:
    model = routed(llama()).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.q_proj was called outside .*shared_modules"):
        layer(torch.randn(2, 9, 32))


def test_routed_layer_with_other_tokens_than_its_block_is_refused() -> None:
    model = routed(llama()).eval()
    router, layer = routers(model)[0], model.base_model.model.model.layers[0].self_attn.q_proj
    router.box.gates = {"default": torch.ones(2, 9, 3)}
    with pytest.raises(RuntimeError, match=r"shape \(2, 5, 32\), but its block routed 2 rows of 9 tokens"):
        layer(torch.randn(2, 5, 32))


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("ema_space", ["sphere", "raw", "mixed"])
def test_states_that_are_not_finite_never_reach_the_centers(ema_space: str) -> None:
    model = routed(llama(), ema_space=ema_space)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    CenterUpdate(every=1, until=10).attach(model, optimizer)
    model.train()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(tokens()[0, 3])] = float("nan")
    model(input_ids=tokens(), labels=tokens())
    optimizer.step()
    assert all(router.centers["default"].isfinite().all() for router in routers(model))
