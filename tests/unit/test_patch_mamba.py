"""Stock Hugging Face models, patched: everything they give equals what their own slow path gives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.mamba.modeling_mamba import MambaMixer

from monkeyjump.mamba import patch_mamba, patched_mamba, unpatch_mamba
from monkeyjump.mamba.patch_mixers import SCANNING, ScanMambaMixer
from tiny import VOCAB, llama, position_dependent, tokens
from tiny_mamba import assert_near, assert_same_outcome, left_padded_batch, outcome

SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"head_dim": 8, "num_heads": 4, "n_groups": 2, "chunk_size": 16, "state_size": 8}
DRAWN = {
    "mamba": (MambaForCausalLM, MambaConfig, {"state_size": 16}),
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig, {"state_size": 8}),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, HEADS),
}
every = pytest.mark.parametrize("kind", DRAWN)


def drawn(kind: str, **changes: object) -> nn.Module:
    model, config, own = DRAWN[kind]
    torch.manual_seed(0)
    made = model(config(**{**SHAPE, **own, **changes})).eval()
    position_dependent(made.parameters(), 0.03)
    return made


@every
def test_logits_and_all_gradients(kind: str) -> None:
    model, batch = drawn(kind), left_padded_batch()
    stock = outcome(model, batch)
    with patched_mamba(model):
        patched = outcome(model, batch)
    assert set(patched[1]) == {n for n, _ in model.named_parameters()}
    assert_same_outcome(patched, stock)


@every
def test_padding_changes_nothing(kind: str) -> None:
    model, batch = patch_mamba(drawn(kind)), left_padded_batch()
    with torch.no_grad():
        padded = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[1, 13:]
        alone = model(batch["input_ids"][1:2, 13:]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@every
@pytest.mark.parametrize("length", [2, 11])
def test_generation(kind: str, length: int) -> None:
    model, prompt = drawn(kind), tokens(2, length)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "output_scores": True}
    asked["return_dict_in_generate"] = True
    stock = model.generate(prompt, **asked)
    with patched_mamba(model):
        cached, plain = model.generate(prompt, **asked), model.generate(prompt, use_cache=False, **asked)
    for other in (cached, plain):
        assert torch.equal(other.sequences, stock.sequences)
        torch.testing.assert_close(torch.stack(other.scores), torch.stack(stock.scores), rtol=1e-5, atol=1e-5)


@every
def test_beams_and_padded_prompts(kind: str) -> None:
    model, prompt, mask = drawn(kind), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "attention_mask": mask, "eos_token_id": None}
    stock = model.generate(prompt, **asked)
    with patched_mamba(model):
        assert torch.equal(model.generate(prompt, **asked), stock)


@every
def test_a_prompt_in_two_parts(kind: str) -> None:
    """The stock Mamba forgets its state here (its kernel takes none); patched, the parts are the whole."""
    model, ids = patch_mamba(drawn(kind)), tokens(2, 30)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :17], use_cache=True)
        second = model(ids[:, 17:], cache_params=first.cache_params, use_cache=True)
    parts = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@every
def test_under_gradient_checkpointing(kind: str) -> None:
    model, batch = patch_mamba(drawn(kind)), left_padded_batch()
    plain = outcome(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_outcome(outcome(model, batch), plain)


@every
def test_in_bfloat16(kind: str) -> None:
    model, batch = drawn(kind), left_padded_batch()
    exact = outcome(patch_mamba(model), batch)
    half = outcome(model.bfloat16(), batch)
    assert_near(half[0], exact[0], 0.05)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in half[1].values())


@every
def test_compiled(kind: str) -> None:
    model, batch = patch_mamba(drawn(kind)), left_padded_batch()
    plain = outcome(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_outcome(outcome(compiled, batch), (plain[0], {f"_orig_mod.{n}": g for n, g in plain[1].items()}))


@every
def test_adapters_on_every_projection_act_and_get_gradients(kind: str) -> None:
    """With the stock forward an adapter on dt_proj is passed by."""
    targets = ["in_proj"] if kind == "mamba2" else ["in_proj", "x_proj", "dt_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model, batch = get_peft_model(patch_mamba(drawn(kind)), config), left_padded_batch()
    adapted = outcome(model, batch)
    assert len(adapted[1]) == 2 * 2 * len(targets)
    assert all(float(g.abs().max()) > 0 for g in adapted[1].values())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, adapted[0], rtol=1e-4, atol=1e-4)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrized_weights_act() -> None:
    model, batch = patch_mamba(drawn("mamba")), left_padded_batch()
    twin, names = copy.deepcopy(model), ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")
    for name in names:
        parametrize.register_parametrization(getattr(model.backbone.layers[0].mixer, name), "weight", Doubled())
        getattr(twin.backbone.layers[0].mixer, name).weight.data *= 2
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits)


def test_widths_are_read_off_the_weights() -> None:
    """One layer with half of its channels, as after shrinking: the config knows nothing of it."""
    model, batch = patch_mamba(drawn("mamba")), left_padded_batch()
    mixer = model.backbone.layers[1].mixer
    kept = torch.arange(0, mixer.intermediate_size, 2)
    gated = copy.deepcopy(model)
    with torch.no_grad():
        gated.backbone.layers[1].mixer.conv1d.weight[1::2] = 0
        gated.backbone.layers[1].mixer.conv1d.bias[1::2] = 0
        both = torch.cat([kept, kept + mixer.intermediate_size])
        for module, name, index, dim in (
            (mixer.in_proj, "weight", both, 0),
            (mixer.conv1d, "weight", kept, 0),
            (mixer.conv1d, "bias", kept, 0),
            (mixer.x_proj, "weight", kept, 1),
            (mixer.dt_proj, "weight", kept, 0),
            (mixer.dt_proj, "bias", kept, 0),
            (mixer, "A_log", kept, 0),
            (mixer, "D", kept, 0),
            (mixer.out_proj, "weight", kept, 1),
        ):
            setattr(module, name, nn.Parameter(getattr(module, name).index_select(dim, index)))
    torch.testing.assert_close(model(**batch).logits, gated(**batch).logits, rtol=1e-5, atol=1e-5)
    asked = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(tokens(), **asked), gated.generate(tokens(), **asked))


def test_patching_is_undone_and_leaves_what_was_patched() -> None:
    model = drawn("mamba")
    kinds = lambda: {type(block.mixer) for block in model.backbone.layers}  # noqa: E731
    assert patch_mamba(model) is model
    assert kinds() == {ScanMambaMixer}
    with patched_mamba(model):
        pass
    assert kinds() == {ScanMambaMixer}
    assert unpatch_mamba(model) is model
    assert kinds() == {MambaMixer}
    with pytest.raises(IndexError), patched_mamba(model):
        model(torch.full((1, 2), VOCAB))
    assert kinds() == {MambaMixer}
    assert unpatch_mamba(model) is model


def test_copies_and_pickles_stay_patched() -> None:
    model, batch = patch_mamba(drawn("mamba")), left_padded_batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.backbone.layers[0].mixer) is ScanMambaMixer
        torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)


def test_a_saved_model_is_a_stock_model(tmp_path) -> None:
    model, batch = patch_mamba(drawn("mamba")), left_padded_batch()
    model.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.backbone.layers[0].mixer) is MambaMixer
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_mamba_is_refused() -> None:
    known = "mamba, falcon_mamba, jamba, zamba, mamba2, bamba, zamba2, nemotron_h, granitemoehybrid, falcon_h1"
    with pytest.raises(ValueError, match=f"model=LlamaForCausalLM has no Mamba mixer .* of the types {known}"):
        patch_mamba(llama())
    assert len(SCANNING) == 10


# ---------------------------------------------------------------------- one number at a time


def test_the_steps_of_mamba2_stay_within_their_limits() -> None:
    """Limits that cut on both sides, so that some steps have no gradient."""
    model, batch = drawn("mamba2"), left_padded_batch()
    steps = []
    hook = model.backbone.layers[0].mixer.in_proj.register_forward_hook(
        lambda _, given, out: steps.append(out[..., -4:])
    )
    stock = outcome(model, batch)
    hook.remove()
    seen = nn.functional.softplus(steps[0] + model.backbone.layers[0].mixer.dt_bias)
    low, high = (seen.detach().quantile(share).item() for share in (0.3, 0.7))
    model = drawn("mamba2", time_step_limit=(low, high))
    limited = outcome(model, batch)
    assert (limited[0] - stock[0]).abs().max() > 1e-4
    with patched_mamba(model):
        assert_same_outcome(outcome(model, batch), limited)


@every
def test_rates_of_decay_are_exponentiated_in_float32(kind: str) -> None:
    model, batch = drawn(kind), left_padded_batch()
    for block in model.backbone.layers:
        block.mixer.A_log.data = block.mixer.A_log.data.bfloat16()
    with torch.no_grad():
        stock = model(**batch).logits
        with patched_mamba(model):
            assert_near(model(**batch).logits, stock)


@every
@pytest.mark.parametrize("bias", [False, True])
def test_without_the_convolutions_bias_and_with_the_projections(kind: str, bias: bool) -> None:
    model, batch = drawn(kind, use_conv_bias=not bias, use_bias=bias), left_padded_batch()
    stock = outcome(model, batch)
    with patched_mamba(model):
        assert_same_outcome(outcome(model, batch), stock)


@every
@pytest.mark.parametrize("patched_first", [True, False])
def test_offloaded_by_accelerate(kind: str, patched_first: bool) -> None:
    """Weights are on the meta device between calls; two parts are the whole, which the stock mixer cannot do."""
    ids, expected = tokens(2, 30), patch_mamba(drawn(kind))
    model = drawn(kind)
    for step in (patch_mamba, lambda one: cpu_offload(one, "cpu"))[:: 1 if patched_first else -1]:
        step(model)
    assert model.backbone.layers[0].mixer.conv1d.weight.is_meta
    with torch.no_grad():
        first = model(ids[:, :17], use_cache=True)
        second = model(ids[:, 17:], cache_params=first.cache_params, use_cache=True)
        whole = expected(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-5, atol=1e-5)
