"""What moves the centers: gathered once per micro-batch, over all micro-batches, and by Eq. 6."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monkeyjump import CenterUpdate
from monkeyjump.routing.ema import CenterStatistics, moved_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable


def centers_of(model: object) -> Tensor:
    return torch.cat([r.centers["default"] for r in routers(model)])


def block_states(model: object, inputs: dict[str, Tensor]) -> Tensor:
    """Hidden states entering the second block: `[B, T, d]`."""
    seen = []
    block = model.get_base_model().model.layers[1]
    hook = block.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    gates = []
    look = block.register_forward_pre_hook(lambda m, a, k: gates.append(k["mj_gates"]["default"]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove(), look.remove()
    return seen[0], gates[0]


@pytest.mark.parametrize("space", ["sphere", "raw", "mixed"])
@pytest.mark.parametrize("assignment", ["topk", "top1"])
def test_an_update_equals_equation_6(assignment: str, space: str) -> None:
    model = routed(llama(), ema_assignment=assignment, ema_space=space, ema_momentum=0.7, temperature=0.3).train()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    states, gates = block_states(model, inputs)
    router = routers(model)[1]
    before = router.centers["default"].double()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    CenterUpdate(every=1, until=5).attach(model, optimizer)
    model(**inputs, labels=ids).loss.backward()
    optimizer.step()
    for e in range(3):
        mine = []
        for b in range(2):
            for t in range(6):
                order = gates[b, t].argmax().item() if assignment == "top1" else None
                if mask[b, t] and (gates[b, t, e] > 0 if order is None else order == e):
                    mine.append(states[b, t].double())
        unit = [h / h.norm() for h in mine] if space == "sphere" else mine
        start = before[e] if space == "raw" else before[e] / before[e].norm()
        moved = 0.7 * start + 0.3 * sum(unit) / len(unit) if mine else before[e]
        expected = moved if space == "raw" or not mine else moved / moved.norm()
        torch.testing.assert_close(router.centers["default"][e].double(), expected, atol=1e-6, rtol=1e-5)


def test_a_center_without_tokens_stays() -> None:
    centers = torch.nn.functional.normalize(torch.randn(2, 4), dim=-1)
    statistics = CenterStatistics(torch.stack([torch.ones(4), torch.zeros(4)]), torch.tensor([2.0, 0.0]))
    moved = moved_centers(centers, statistics, 0.5, "sphere")
    assert torch.equal(moved[1], centers[1])
    assert not torch.allclose(moved[0], centers[0])


def test_accumulation_equals_the_joined_batch() -> None:
    """Four micro-batches of b, one step: the centers of one batch of 4 b."""
    results = []
    for parts in (1, 4):
        model = routed(llama(), temperature=0.3).train()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        CenterUpdate(every=1, until=5).attach(model, optimizer)
        ids = tokens(8, 6)
        losses = [model(part, labels=part).loss / parts for part in ids.chunk(parts)]
        sum(losses).backward()
        optimizer.step()
        results.append((sum(losses).item(), centers_of(model), list(trainable(model).values())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-5)
    for one, four in zip(results[0][2], results[1][2]):
        torch.testing.assert_close(one, four, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["token", "mean", "prompt_end"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gathers_once_and_routes_alike(reentrant: bool, granularity: str) -> None:
    """Also with two forwards before one backward, and with centers that move in between."""
    results = []
    for checkpointing in (False, True):
        model = routed(llama(), granularity=granularity, temperature=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        CenterUpdate(every=1, until=5).attach(model, optimizer)
        first, second = tokens(2, 6), tokens(3, 5, seed=4)
        labels = first.clone()
        labels[:, :3] = -100
        loss = model(first, labels=labels, use_cache=False).loss
        for router in routers(model):  # the recomputation must not see this
            router.set_centers("default", router.centers["default"].flip(0))
        loss = loss + model(second, labels=second, use_cache=False).loss
        loss.backward()
        counts = [r.pending["default"].counts.clone() for r in routers(model)]
        grads = [p.grad.clone() for n, p in trainable(model).items() if p.grad is not None and "lora" in n]
        optimizer.step()
        results.append((loss.item(), counts, grads, centers_of(model)))
    (loss, counts, grads, centers), (loss_c, counts_c, grads_c, centers_c) = results
    assert loss == pytest.approx(loss_c, rel=1e-6)
    for a, b in zip(counts, counts_c):
        assert torch.equal(a, b)
    assert len(grads) == len(grads_c) > 0
    for a, b in zip(grads, grads_c):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(centers, centers_c, atol=1e-6, rtol=1e-5)


def test_evaluation_generation_and_unattached_training_gather_nothing() -> None:
    model = routed(llama())
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert not any(r.pending for r in routers(model))
    CenterUpdate(every=1, until=5).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    with torch.no_grad():
        model(tokens())
    model.eval()
    model(tokens())
    model.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False)
    assert not any(r.pending for r in routers(model))


def test_fewer_centers_are_shared_by_slot_number() -> None:
    """Adapter e takes center e mod C; a token counts once for a center, and no center is dead."""
    model = routed(llama(), num_centers=2, top_k=2).train()
    router = routers(model)[0]
    assert router.centers["default"].shape[0] == 2
    CenterUpdate(every=1, until=5).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    states, gates = block_states(model, {"input_ids": tokens(2, 6)})
    router = routers(model)[1]
    model(tokens(2, 6), labels=tokens(2, 6))
    chosen = gates > 0
    expected = torch.stack([(chosen[..., 0] | chosen[..., 2]).sum(), chosen[..., 1].sum()]).float()
    assert torch.equal(router.pending["default"].counts, expected)
    logits = states @ torch.nn.functional.normalize(router.centers["default"], dim=-1).T
    first_wins = logits[..., 0] > logits[..., 1]
    assert torch.equal(chosen[..., 0] & chosen[..., 2], first_wins)


@pytest.mark.parametrize("granularity", ["last", "mean", "max"])
def test_a_row_without_attended_tokens_counts_for_nothing(granularity: str) -> None:
    model = routed(llama(), granularity=granularity, top_k=1).train()
    CenterUpdate(every=1, until=5).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    model(tokens(2, 6), attention_mask=mask)
    assert all(r.pending["default"].counts.sum() == 1 for r in routers(model))


def test_prompt_end_in_training_never_guesses_the_prompt() -> None:
    model = routed(llama(), granularity="prompt_end").train()
    with pytest.raises(ValueError, match=r"no labels in training.*label_smoothing_factor.*mj_prompt_lengths"):
        model(tokens())
    model(tokens(), mj_prompt_lengths=torch.tensor([3, 4]))
    with torch.no_grad():
        model(tokens())
