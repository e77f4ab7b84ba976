"""Mamba layers beside attention, patched: everything these models give equals what Hugging Face's own slow path gives.

The mixers' shared parts are tested in test_patch_mamba.py; here, that each kind's own lines are right.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from monkeyjump.allocation import allocate_peft, attach_peft, taylor_importance
from monkeyjump.mamba import patch_mamba, patched_mamba, unpatch_mamba
from monkeyjump.mamba.patch_mixers import SCANNING
from monkeyjump.mamba.scan.choice import COMPILED
from tiny import position_dependent, routed, tokens, trainable
from tiny_mamba import HYBRIDS, assert_near, assert_same_outcome, hybrid, left_padded_batch, outcome

every = pytest.mark.parametrize("kind", HYBRIDS)
SELECTIVE = ("jamba", "zamba")  # the first Mamba
GREEDY = {"do_sample": False, "eos_token_id": None}


def mixers(model: nn.Module) -> list[nn.Module]:
    classes = {*SCANNING, *SCANNING.values()}
    return [module for module in model.modules() if type(module) in classes]


@every
def test_logits_and_all_gradients(kind: str) -> None:
    """Small, else the gradients of A_log and dt_bias are what is left of sums that nearly cancel."""
    model, batch = hybrid(kind, size=0.03), left_padded_batch()
    stock = outcome(model, batch)
    with patched_mamba(model):
        patched = outcome(model, batch)
    for mixer in mixers(model):
        assert all(p.grad.any() for p in mixer.parameters())
    assert_same_outcome(patched, stock)


@every
def test_unpatching_restores(kind: str) -> None:
    model, batch = hybrid(kind), left_padded_batch()
    classes, stock = [type(mixer) for mixer in mixers(model)], outcome(model, batch)
    assert classes
    assert set(classes) <= set(SCANNING)
    patch_mamba(model)
    assert [type(mixer) for mixer in mixers(model)] == [SCANNING[cls] for cls in classes]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(mixer) for mixer in mixers(twin)] == [SCANNING[cls] for cls in classes]
    unpatch_mamba(model)
    assert [type(mixer) for mixer in mixers(model)] == classes
    assert_same_outcome(outcome(model, batch), stock, 1e-12)


@every
def test_padding_changes_nothing(kind: str) -> None:
    model, batch = patch_mamba(hybrid(kind)), left_padded_batch()
    with torch.no_grad():
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits[1, 13:]
        alone = model(batch["input_ids"][1:2, 13:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@every
def test_generation_with_and_without_cache(kind: str) -> None:
    model, prompt, mask = hybrid(kind), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    asked = {**GREEDY, "max_new_tokens": 8, "attention_mask": mask, "output_scores": True}
    asked["return_dict_in_generate"] = True
    stock = model.generate(prompt, use_cache=False, **asked)  # with a cache some forget their limit on step sizes
    with patched_mamba(model):
        cached, plain = model.generate(prompt, **asked), model.generate(prompt, use_cache=False, **asked)
    for other in (cached, plain):
        assert torch.equal(other.sequences, stock.sequences)
        torch.testing.assert_close(torch.stack(other.scores), torch.stack(stock.scores), rtol=1e-5, atol=1e-5)


@every
def test_a_prompt_in_two_parts(kind: str) -> None:
    model, ids = patch_mamba(hybrid(kind)), tokens(2, 30)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :17], use_cache=True)
        # Bamba counts the second part's positions from 0 where it is not told them
        rest = torch.arange(17, 30)[None]
        second = model(ids[:, 17:], past_key_values=first.past_key_values, position_ids=rest, use_cache=True)
    parts = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["zamba", "falcon_h1"])  # the others' lines are those of pure Mambas
def test_compiled(kind: str) -> None:
    mixer = mixers(patch_mamba(hybrid(kind)))[0]
    x = torch.sin(torch.arange(2 * 11 * 16.0)).view(2, 11, 16)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))


@every
def test_in_bfloat16(kind: str) -> None:
    model, batch = patch_mamba(hybrid(kind)), left_padded_batch()
    mixer, x = mixers(model)[0], torch.sin(torch.arange(2 * 11 * 16.0)).view(2, 11, 16)
    exact = mixer(x).detach()
    half = mixer.bfloat16()(x.bfloat16()).detach()
    assert half.dtype == torch.bfloat16
    assert_near(half, exact, 0.05)
    assert torch.isfinite(model.bfloat16()(**batch).loss)


def test_a_clamped_step_size_is_clamped_with_a_cache_as_well() -> None:
    """The stock mixer forgets its lower limit where it generates token by token."""
    model, ids = hybrid("zamba2", time_step_min=0.5), tokens(2, 12)
    with torch.no_grad():
        for mixer in mixers(model):
            mixer.dt_bias -= 3.0
        stock, whole = in_steps(model, ids), model(ids).logits
        patched = in_steps(patch_mamba(model), ids)
    assert float((stock - whole).abs().max()) > 1e-3
    torch.testing.assert_close(patched, whole, rtol=1e-5, atol=1e-5)


def in_steps(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, token by token."""
    cache, logits = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


class Seen(TorchDispatchMode):
    """The backends of the selective scans that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.monkeyjump.selective_scan.default:
            self.backends.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not COMPILED, reason="the compiled scan is not there")
@pytest.mark.parametrize(("kind", "scans"), [("jamba", 1), ("zamba", 6)])
def test_the_compiled_scan_serves(kind: str, scans: int) -> None:
    model = patch_mamba(hybrid(kind))
    with Seen() as seen, torch.no_grad():
        model(tokens(2, 20))
    assert seen.backends == ["native"] * scans


@pytest.mark.parametrize("kind", ["bamba", "granitemoehybrid"])
def test_packed_sequences_are_refused(kind: str) -> None:
    model, ids = patch_mamba(hybrid(kind)), tokens(1, 8)
    with pytest.raises(ValueError, match=r"seq_idx says that rows hold several sequences.*unpatch_mamba"):
        model(ids, seq_idx=torch.zeros(1, 8, dtype=torch.int32))


# ---------------------------------------------------------------------- what stands on patched mixers


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("jamba", ["in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "v_proj"]),
        ("bamba", ["in_proj", "out_proj", "q_proj", "v_proj"]),
        ("granitemoehybrid", ["in_proj", "out_proj", "q_proj", "v_proj"]),
    ],
)
def test_monkey_jump_routes_mamba_and_attention(kind: str, targets: list[str]) -> None:
    model = routed(patch_mamba(hybrid(kind)), target_modules=targets, shared_modules=[], top_k=2)
    position_dependent(trainable(model).values())
    batch = left_padded_batch()
    model.train()(**batch).loss.backward()
    adapters = trainable(model)
    assert {leaf for name in adapters for leaf in targets if f".{leaf}." in name} == set(targets)
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    asked = {**GREEDY, "max_new_tokens": 6, "attention_mask": batch["attention_mask"]}
    cached = model.eval().generate(input_ids=batch["input_ids"], **asked)
    assert torch.equal(cached, model.generate(input_ids=batch["input_ids"], use_cache=False, **asked))


@every
def test_allocated_adapters_train(kind: str) -> None:
    model, ids = patch_mamba(hybrid(kind)), tokens(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    inside = [name for name, module in model.named_modules() if type(module) in SCANNING.values()]
    scores = taylor_importance(model, [batch]).scores
    scores = {name: score for name, score in scores.items() if name.startswith(tuple(inside))}
    plan = allocate_peft(model, scores, peft_application_ratio=1.0, peft_r=2)
    before = model(ids).logits
    attach_peft(model, plan, batch)
    torch.testing.assert_close(model(ids).logits, before)
    model(**batch).loss.backward()
    assert any("in_proj" in name for name in trainable(model))
    assert all(p.grad is not None for p in trainable(model).values())
