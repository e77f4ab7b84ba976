"""The authors' released code has faults; each that concerns routing has a test here that it is not ours.

The numbers are those of our review of that code (its list of correctness defects, 17 to 37).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from monkeyjump import CenterUpdate, MonkeyJumpConfig, describe_routing, record_routing
from monkeyjump.tuner.model import routers
from tiny import bert, gates, left_padded, llama, routed, tokens, trainable

SEQUENCE_MODES = ["last", "mean", "max", "prompt_end"]
ALL_MODES = ["token", *SEQUENCE_MODES]
ROWS = [tokens(1, 4, seed=1), tokens(1, 9, seed=2)]


def right_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    flipped = left_padded([row.flip(1) for row in rows])
    return {name: value.flip(1) for name, value in flipped.items()}


def labels_of(batch: dict[str, Tensor], prompt: int) -> Tensor:
    """Labels of all real tokens but the first `prompt` of each row."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch["input_ids"].masked_fill((mask == 0) | (mask.cumsum(1) <= prompt), -100)


def gathered(model: PeftModel, *batches: dict[str, Tensor], prompt: int = 2) -> list[Tensor]:
    """Sums and counts of every block after a forward and backward of each batch, before any step."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    CenterUpdate(every=1, until=100).attach(model, optimizer)
    model.train()
    for batch in batches:
        model(**batch, labels=labels_of(batch, prompt)).loss.backward()
    return pending(model)


def pending(model: PeftModel) -> list[Tensor]:
    return [t for r in routers(model) for t in (r.pending["default"].sums, r.pending["default"].counts)]


# ---------------------------------------------------------------------- 17, 18, 19, 21: padding and caches


@pytest.mark.parametrize("granularity", ALL_MODES)
@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("prompt", [0, 2])
def test_padding_never_enters_the_statistics(granularity: str, padded: Callable, prompt: int) -> None:
    """17: pads entered token-mode routing and the moving average."""
    model = routed(llama(), granularity=granularity)
    alone = [gathered(model, {"input_ids": row}, prompt=prompt) for row in ROWS]
    together = gathered(model, padded(ROWS), prompt=prompt)
    for found, *parts in zip(together, *alone):
        torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ALL_MODES)
@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_never_changes_the_decision(granularity: str, padded: Callable, attention: str) -> None:
    """18: with left padding the 'last' token was a pad."""
    model = routed(llama(attn_implementation=attention), granularity=granularity).eval()
    batch = padded(ROWS)
    for block, together in enumerate(gates(model, **batch)):
        for row, ids in enumerate(ROWS):
            real = slice(None) if granularity != "token" else batch["attention_mask"][row].bool()
            alone = gates(model, input_ids=ids)[block][0]
            torch.testing.assert_close(together[row, real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ALL_MODES)
def test_static_cache_routes_like_a_growing_one(granularity: str) -> None:
    """19: with a static cache the mask is 4-D and longer than the tokens; the wrong token was picked."""
    model = routed(llama(), granularity=granularity).eval()
    settings = {**left_padded(ROWS), "max_new_tokens": 5, "do_sample": False, "eos_token_id": 1000}
    found = []
    for kind in ({"cache_implementation": "static"}, {}):
        with record_routing(model) as record:
            generated = model.generate(**settings, **kind)
        found.append((generated.tolist(), {k: v.tolist() for k, v in record.counts.items()}, record.tokens))
    assert found[0] == found[1]


@pytest.mark.parametrize("granularity", SEQUENCE_MODES)
def test_sequence_decision_is_taken_on_the_prompt_and_kept(granularity: str) -> None:
    """21: each generated token was a sequence of its own and routed anew."""
    model = routed(llama(), granularity=granularity).eval()
    ids = tokens(2, 6)
    prompt = gates(model, input_ids=ids, use_cache=True)
    seen = gates_of_generation(model, ids)
    assert len(seen) == 4 * len(prompt)
    for call, found in enumerate(seen):
        assert torch.equal(found, prompt[call % len(prompt)])


def gates_of_generation(model: PeftModel, ids: Tensor) -> list[Tensor]:
    """The gates of every block in each of four forwards of `generate`."""

    class Generation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=1000)

    return gates(Generation(), ids=ids)


# ---------------------------------------------------------------------- 23, 24: checkpointing and the graph


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_routes_as_before_even_if_centers_move(reentrant: bool) -> None:
    """23: the recomputed forward ran without routing, or with moved centers, and counted twice."""
    results = []
    for checkpointing in (False, True):
        model = routed(llama())
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
        CenterUpdate(every=100, until=100).attach(model, optimizer)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model.train()(input_ids=tokens(), labels=tokens()).loss
        for router in routers(model):
            router.set_centers("default", -router.centers["default"])
        loss.backward()
        results.append([loss, *(p.grad for p in trainable(model).values()), *pending(model)])
    assert all(torch.equal(found, expected) for found, expected in zip(results[1], results[0]))


class HostReads(TorchDispatchMode):
    """Counts the values that a computation brings to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("base", ["lora", "lora_fa", "adalora", "propulsion", "ia3"])
@pytest.mark.parametrize("masked", [False, True])
def test_routing_reads_nothing_back_to_the_host(base: str, masked: bool) -> None:
    """24: one `mask.any()` per projection and forward made the host wait."""
    reads = []
    ia3 = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    model = routed(llama(), base=base, **{"ia3": ia3, "adalora": {"total_step": 9}}.get(base, {}))
    CenterUpdate(every=100, until=100).attach(model, torch.optim.SGD(trainable(model).values(), lr=0.0))
    batch = left_padded(ROWS) if masked else {"input_ids": tokens()}
    for counted in (llama().train(), model.train()):
        with HostReads() as mode:
            counted(**batch)
        reads.append(mode.count)
    assert reads[1] == reads[0]
    assert routers(model)[0].pending


# ---------------------------------------------------------------------- 26, 27, 28: the centers' life


def test_centers_are_there_before_the_first_forward_and_load_strictly(tmp_path: Path) -> None:
    """26: routers came with the first forward, so a fresh model refused or dropped saved centers."""
    trained, fresh = routed(llama(), seed=1), routed(llama(), seed=2, center_seed=5)
    assert sum("jump_router.centers" in name for name in fresh.state_dict()) == 2
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(tokens()).logits, trained.eval()(tokens()).logits)


def test_expert_order_decides_which_center_a_slot_takes() -> None:
    """26: which center served which projection was nowhere kept."""
    order = ["v_proj", "q_proj", "k_proj"]
    model = routed(llama(), expert_order=order)
    assert [slot.rpartition(".")[2] for slot in routers(model)[0].slots["default"]] == order


def test_random_centers_are_never_taken_by_accident() -> None:
    """27: random centers were used in silence when nobody had called the k-means."""
    assert MonkeyJumpConfig().center_init == "kmeans"
    model = get_peft_model(llama(), MonkeyJumpConfig()).train()
    with pytest.raises(RuntimeError, match="initialize_centers"):
        model(input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ALL_MODES)
def test_halving_after_a_forward_leaves_the_router_working(dtype: torch.dtype, granularity: str) -> None:
    """28: model.to(bfloat16) after the first forward ended in a dtype error."""
    model = routed(llama(), granularity=granularity).eval()
    before = [m.clone() for m in gates(model, input_ids=tokens())]
    model.to(dtype)
    after = gates(model, input_ids=tokens())
    assert all(m.dtype == torch.float32 for m in after)
    close = [(m - n).abs().max(-1).values < 0.1 for m, n in zip(after, before)]
    assert torch.cat([c.flatten() for c in close]).float().mean() > 0.8


# ---------------------------------------------------------------------- 29: quantized weights


class PackedLinear(nn.Linear):
    """A linear layer whose weight is stored as bytes, as quantizers store it, and unpacked when used."""

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        packed = cls(linear.in_features, linear.out_features, bias=False)
        packed.scale = float(linear.weight.detach().abs().max()) / 127
        stored = (linear.weight.detach() / packed.scale).round() + 128
        packed.weight = nn.Parameter(stored.to(torch.uint8), requires_grad=False)
        return packed

    def unpacked(self) -> Tensor:
        return (self.weight.float() - 128) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked().to(x.dtype))


def packed_llama() -> nn.Module:
    model = llama()
    for parent in [m for m in model.model.layers.modules() if not isinstance(m, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear.of(child))
    return model


@pytest.mark.parametrize("base", ["lora", "lora_fa", "adalora", "propulsion"])
@pytest.mark.parametrize("slot", ["self_attn.q_proj", "self_attn.o_proj"])
def test_adapters_on_packed_weights_add_what_they_should(base: str, slot: str) -> None:
    """29: on a base stored as integers the shared adapters' part was cast to integers, that is, to zero."""
    own = {"total_step": 9} if base == "adalora" else {"init_weights": False} if base == "propulsion" else {}
    added = []
    for base_model in (packed_llama(), unpacked(packed_llama())):
        model = routed(base_model, base=base, **own).eval()
        layer = model.get_submodule(f"base_model.model.model.layers.0.{slot}")
        layer.register_forward_hook(lambda layer, args, y: added.append(y - layer.get_base_layer()(args[0])))
        model(tokens())
    assert added[0].abs().max() > 1e-3
    torch.testing.assert_close(added[0], added[1], rtol=1e-4, atol=1e-5)


def unpacked(model: nn.Module) -> nn.Module:
    """The same model with plain weights."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight = nn.Parameter(module.unpacked())
            module.__class__ = nn.Linear
    return model


# ---------------------------------------------------------------------- 30, 31: accumulation and schedule


class CentersByStep(TrainerCallback):
    """Notes all centers at the start and after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(torch.stack([r.centers["default"].clone() for r in routers(model)]))

    on_step_end = on_train_begin


def trained(
    folder: Path, batch: int, accumulation: int, update: CenterUpdate, steps: int
) -> tuple[PeftModel, list[Tensor]]:
    model = routed(llama())
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(32, 8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    noted = CentersByStep()
    Trainer(model, arguments, train_dataset=rows, callbacks=[update, noted]).train()
    return model, noted.seen


def test_accumulation_equals_the_larger_batch(tmp_path: Path) -> None:
    """30: the loss was never divided, so that accumulation over 4 gave gradients 4 times as large."""
    small, small_centers = trained(tmp_path, 2, 4, CenterUpdate(every=1, until=2), steps=2)
    large, large_centers = trained(tmp_path, 8, 1, CenterUpdate(every=1, until=2), steps=2)
    torch.testing.assert_close(trainable(small), trainable(large), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(small_centers, large_centers, rtol=1e-4, atol=1e-6)


def test_centers_move_every_second_optimizer_step_until_the_end(tmp_path: Path) -> None:
    """31: updates by optimizer step never came, those by micro-batch came twice per step at accumulation 4."""
    _, seen = trained(tmp_path, 1, 4, CenterUpdate(every=2, until=4), steps=6)
    moved = [not torch.equal(now, then) for then, now in pairwise(seen)]
    assert moved == [False, True, False, True, False, False]


# ---------------------------------------------------------------------- 33, 34, 35, 36, 37


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_routes_by_its_own_centers(copied: Callable) -> None:
    """33: closures of a copied model still led to the original, and it could not be pickled."""
    model = routed(llama(), granularity="last").eval()
    twin, before = copied(model), gates(model, input_ids=tokens())
    for router in routers(model):
        router.set_centers("default", -router.centers["default"])
    assert all(torch.equal(m, n) for m, n in zip(gates(twin, input_ids=tokens()), before))
    assert not torch.equal(gates(model, input_ids=tokens())[0], before[0])
    assert len({id(r.context) for r in (*routers(model), *routers(twin))}) == 2


def test_towers_of_one_class_have_blocks_of_their_own() -> None:
    """34: blocks were found by class name and one counter, so two towers shared one list of indices."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": 64, "eos_token_id": 63, "max_position_embeddings": 16},
        vision_config={**shape, "hidden_size": 48, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = routed(CLIPModel(config).eval(), layers_to_route=[1])
    found = {router.name: router.dim for router in routers(model)}
    assert found == {"text_model.encoder.layers.1": 32, "vision_model.encoder.layers.1": 48}
    inputs = {"input_ids": tokens(2, 6), "pixel_values": torch.randn(2, 3, 8, 8)}
    assert [m.shape for m in gates(model, **inputs)] in ([(2, 6, 3), (2, 5, 3)], [(2, 5, 3), (2, 6, 3)])


def test_modules_of_one_leaf_name_are_all_slots() -> None:
    """34: only the first layer of a name in a block was adapted; a BERT block has three called 'dense'."""
    model = routed(bert(), target_modules=["dense"], shared_modules=[])
    assert routers(model)[0].slots["default"] == (
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )


def test_gpt2_convolutions_are_adapted_and_routed() -> None:
    """34: GPT-2's Conv1D is no nn.Linear and was passed over in silence."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = routed(GPT2LMHeadModel(config), fan_in_fan_out=True).train()
    plan = describe_routing(model)
    assert [(b.routed, b.shared) for b in plan.blocks] == [
        (("attn.c_attn", "mlp.c_fc", "mlp.c_proj"), ("attn.c_proj",))
    ] * 2
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad.any() for parameter in trainable(model).values())


@pytest.mark.parametrize("disabled", [False, True])
def test_keyword_of_the_routing_never_reaches_the_base_model(disabled: bool) -> None:
    """34: a keyword of the routing was taken off only while routing was on."""
    model = routed(llama(), granularity="task").eval()
    given: set[str] = set()
    inner = model.base_model.model.model
    inner.register_forward_pre_hook(lambda inner, args, kwargs: given.update(kwargs), with_kwargs=True)
    with model.disable_adapter() if disabled else nullcontext():
        model(tokens(), task_ids=torch.tensor([0, 1]))
    assert "input_ids" in given
    assert not [name for name in given if "task" in name]


def test_fresh_classification_head_stays_trainable() -> None:
    """35: everything of the base model was frozen, a fresh classifier too."""
    model = routed(bert(), task_type="SEQ_CLS")
    assert [n.rpartition("modules_to_save.default.")[2] for n in trainable(model) if "classifier" in n] == [
        "weight",
        "bias",
    ]


def test_block_routes_however_its_states_are_passed() -> None:
    """36: states passed in another way meant no routing, and plain adapters everywhere, in silence."""
    model = routed(llama()).eval()
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 5, 32)
    positions = model.base_model.model.model.rotary_emb(x, torch.arange(5)[None])
    by_place = block(x, position_embeddings=positions)
    assert torch.equal(block(hidden_states=x, position_embeddings=positions), by_place)
    assert torch.equal(block.forward(x, position_embeddings=positions), by_place)
    router = routers(model)[0]
    router.set_centers("default", -router.centers["default"])
    assert not torch.equal(block(x, position_embeddings=positions), by_place)


def test_weight_decay_pulls_propulsion_to_the_identity() -> None:
    """37: decay pulled z to 0, which switches the projection off, instead of to 1."""
    model = routed(llama(), base="propulsion", init_weights=False)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=1.0)
    for _ in range(60):
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(model.eval()(tokens()).logits, llama()(tokens()).logits, rtol=0, atol=1e-2)
