"""MixLoRA, MoRE and MoA against their formulas, in float64 loops, and their own losses, gradients and refusals."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moe_methods import mixture, mixture_config, told
from monkeyjump import routing_inputs
from monkeyjump.moe import MixLoRAConfig, MoAConfig, MoREConfig
from monkeyjump.moe.losses import Decision, load_balance
from monkeyjump.moe.moa_block import BlockAdapters, adapter_weights
from monkeyjump.moe.more import rank_gates, task_contrast
from monkeyjump.moe.tasks import prompt_tokens
from monkeyjump.routing.context import ForwardContext
from tiny import SHAPE, VOCAB, left_padded, llama, tokens, trainable


def exact(name: str, **changes: Any) -> PeftModel:
    """A mixture in float64 throughout."""
    return mixture(name, **changes).double()


def caught(model: nn.Module, path: str, **inputs: Any) -> tuple[Tensor, Tensor]:
    """What a module of the base model got and gave while the model ran."""
    seen: list[Tensor] = []
    module = model.base_model.model.get_submodule(path)
    hook = module.register_forward_hook(lambda m, args, out: seen.extend([args[0], out]))
    with torch.no_grad():
        model(**(inputs or {"input_ids": tokens()}))
    hook.remove()
    return seen[0], seen[1]


def lora(layer: Any, x: Tensor, expert: int = 0) -> Tensor:
    """`s B_n A_n x` of one token."""
    config = layer.configs["default"]
    rank, scale = config.r, config.lora_alpha / config.r
    mine = slice(expert * rank, (expert + 1) * rank)
    return scale * layer.mixture_B["default"][:, mine] @ (layer.mixture_A["default"][mine] @ x)


# ---------------------------------------------------------------------- MixLoRA


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["gate_proj"], ["q_proj", "down_proj"]])
def test_mixlora_is_a_mixture_of_whole_feed_forward_networks(targets: list[str]) -> None:
    model = exact("mixlora", target_modules=targets)
    h, y = caught(model, "model.layers.1.mlp")
    mlp = model.base_model.model.model.layers[1].mlp
    router, rows = mlp.expert_router.mixture_router["default"], []

    def projected(name: str, x: Tensor, expert: int) -> Tensor:
        layer = getattr(mlp, name)
        return layer.base_layer.weight @ x + (lora(layer, x, expert) if name in targets else 0)

    for token in h.flatten(0, 1):
        p = (router @ token).exp() / (router @ token).exp().sum()
        best = sorted(range(4), key=lambda n: -p[n])[:2]
        out = torch.zeros_like(token)
        for n in best:
            inner = nn.functional.silu(projected("gate_proj", token, n)) * projected("up_proj", token, n)
            out += p[n] / sum(p[b] for b in best) * projected("down_proj", inner, n)
        rows.append(out)
    torch.testing.assert_close(y.flatten(0, 1), torch.stack(rows), rtol=1e-9, atol=1e-12)


def test_mixlora_attention_is_plain_lora() -> None:
    model = exact("mixlora")
    x, y = caught(model, "model.layers.0.self_attn.q_proj")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = [layer.base_layer.weight @ token + lora(layer, token) for token in x.flatten(0, 1)]
    torch.testing.assert_close(y.flatten(0, 1), torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_mixlora_takes_the_frozen_products_once() -> None:
    model = mixture("mixlora", target_modules=["gate_proj"])
    mlp, calls = model.base_model.model.model.layers[0].mlp, []
    for name in ("gate_proj", "up_proj"):  # the second has no adapter
        base = getattr(mlp, name).base_layer
        base.register_forward_hook(lambda m, args, out, name=name: calls.append((name, args[0].shape[-2])))
    model(input_ids=tokens(2, 9))
    assert calls == [("gate_proj", 18), ("up_proj", 18)]


def test_mixlora_balances_the_tokens_of_all_routers_together() -> None:
    def decision(p: list[list[float]], chosen: list[list[bool]]) -> Decision:
        return Decision("", str(p), torch.tensor(p), torch.tensor(chosen), None)

    one = decision([[0.6, 0.4]], [[True, False]])
    two = decision([[0.3, 0.7], [0.1, 0.9], [0.2, 0.8]], [[False, True]] * 3)
    (value,) = load_balance([one, two], "model")
    assert value.item() == pytest.approx(2 * (1 / 4 * 0.3 + 3 / 4 * 0.7))
    model = mixture("mixlora", balance_weight=1.0).train()
    with torch.no_grad():
        for router in (layer.mlp.expert_router.mixture_router for layer in model.base_model.model.model.layers):
            router["default"].zero_()
    model(input_ids=tokens(), labels=tokens())
    assert model.auxiliary_losses()["load_balance"].item() == pytest.approx(2.0)  # k where all is uniform


def test_mixlora_expert_without_a_token_still_has_gradients() -> None:
    model = mixture("mixlora", top_k=1, num_experts=8, lora_dropout=0.1).train()
    ids = torch.full((1, 3), 5)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())


def test_mixlora_without_a_network_says_that_it_is_lora(caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(llama(), MixLoRAConfig(target_modules=["q_proj"]))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("this is plain LoRA; target their projections, or take MixLoRAAttentionConfig" in one for one in said)


def opt() -> OPTForCausalLM:
    own = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**own, max_position_embeddings=64, word_embed_proj_dim=32))


def test_mixlora_refuses_a_network_that_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"reaches model.decoder.layers.0.fc1, .* which is the block itself"):
        get_peft_model(opt(), MixLoRAConfig(target_modules=["fc1", "q_proj"]))


def test_two_active_adapters_of_one_network_are_refused() -> None:
    model = mixture("mixlora")
    model.add_adapter("second", mixture_config("mixlora"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active at once in model.layers.0.mlp"):
        model(input_ids=tokens())


# ---------------------------------------------------------------------- MoRE


@pytest.mark.parametrize("rank_scale", ["rank", "tasks"])
def test_more_takes_the_first_ranks_of_each_rows_task(rank_scale: str) -> None:
    model = exact("more", rank_scale=rank_scale, r=4)
    ids = torch.tensor([2, 0, 1])
    x, y = caught(model, "model.layers.1.self_attn.q_proj", input_ids=tokens(3), task_ids=ids)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    table = model.base_model.model.expert_tasks.mixture_tasks["default"]
    taken = set()
    for row, task in enumerate(ids.tolist()):
        logits = layer.mixture_router["default"] @ table[task] + layer.mixture_router_bias["default"]
        rank = int(logits.argmax()) + 1
        taken.add(rank)
        a, b = layer.mixture_A["default"][:rank], layer.mixture_B["default"][:, :rank]
        for token, out in zip(x[row], y[row]):
            delta = 16 / 4 * rank / (4 if rank_scale == "rank" else 3) * (b @ (a @ token))
            torch.testing.assert_close(out, layer.base_layer.weight @ token + delta, rtol=1e-9, atol=1e-12)
    assert len(taken) > 1


def test_tasks_with_names_need_no_number() -> None:
    assert MoREConfig(task_names=["a", "b"]).num_tasks == 2
    assert MoREConfig(task_names=["a", "b"], num_tasks=3).num_tasks == 3


def test_straight_through_gates_are_one_and_train() -> None:
    logits = torch.tensor([[0.0, math.log(3), 0.0], [math.log(8), 0.0, 0.0]], requires_grad=True)
    gates = rank_gates(logits, 3)
    torch.testing.assert_close(gates, torch.tensor([[2 / 3, 2 / 3, 0.0], [1 / 3, 0.0, 0.0]]))
    gates.sum().backward()
    # d p_1 / d u of p = (1/5, 3/5, 1/5) times 2 * 2/3; of p = (8/10, 1/10, 1/10) times 1/3
    first = 4 / 3 * torch.tensor([-3 / 25, 6 / 25, -3 / 25])
    second = 1 / 3 * torch.tensor([16 / 100, -8 / 100, -8 / 100])
    torch.testing.assert_close(logits.grad, torch.stack([first, second]))


def test_more_gates_get_a_gradient_from_the_task_loss_alone() -> None:
    model = mixture("more", contrastive_weight=0.0).train()
    ids = tokens()
    model(input_ids=ids, labels=ids, task_ids=torch.tensor([0, 2])).loss.backward()
    table = model.base_model.model.expert_tasks.mixture_tasks["default"].grad
    assert [bool(row.any()) for row in table] == [True, False, True]
    routers = [p.grad for n, p in trainable(model).items() if "mixture_router" in n]
    assert len(routers) == 28
    assert all(grad.any() for grad in routers)


def test_task_contrast_by_hand() -> None:
    means = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    table = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    first = math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(math.sqrt(0.5) / 0.5))
    second = math.exp(math.sqrt(0.5) / 0.5) / (math.exp(0.0) + math.exp(math.sqrt(0.5) / 0.5))
    value = task_contrast(means, table, torch.tensor([0, 1]), 0.5)
    assert value.item() == pytest.approx(-(math.log(first) + math.log(second)) / 2)


def test_task_contrast_is_that_of_the_prompts_entering_each_block() -> None:
    model = mixture("more", contrastive_weight=1.0).train()
    batch = left_padded([tokens(1, 6), tokens(1, 9)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, :6] = labels[1, :4] = -100  # prompts of columns 3 to 5, and 0 to 3
    entering: list[Tensor] = []
    for block in model.base_model.model.model.layers:
        block.register_forward_pre_hook(lambda m, args: entering.append(args[0].detach()))
    model(**batch, labels=labels, task_ids=torch.tensor([1, 2]))
    table = model.base_model.model.expert_tasks.mixture_tasks["default"]
    expected = [
        task_contrast(torch.stack([h[0, 3:6].mean(0), h[1, :4].mean(0)]), table, torch.tensor([1, 2]), 0.05)
        for h in entering
    ]
    torch.testing.assert_close(model.auxiliary_losses()["task_contrastive"], torch.stack(expected).mean().detach())


def test_prompt_of_a_row_supervised_from_its_first_token_is_that_token() -> None:
    context = ForwardContext()
    labels = torch.tensor([[7, 8, 9], [-100, 8, 9], [-100, -100, -100]])
    with context.inputs(labels=labels):
        found = prompt_tokens(context, 3, 3, torch.device("cpu"))
    assert found.tolist() == [[True, False, False], [True, False, False], [True, True, True]]


def test_task_loss_trains_without_reentrant_checkpoints_and_with_them() -> None:
    found = []
    for reentrant in (None, False, True):
        model = mixture("more", contrastive_weight=1.0)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        ids = tokens()
        model(input_ids=ids, labels=ids, **told(model, ids)).loss.backward()
        found.append({n: p.grad for n, p in trainable(model).items()})
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_unknown_task_is_the_nearest_to_the_mean_of_the_prompt() -> None:
    model, ids = mixture("more"), tokens(2, 7)
    table = model.base_model.model.expert_tasks.mixture_tasks["default"]
    with torch.no_grad():
        h = model.base_model.model.model.embed_tokens(ids).mean(1)
        table[1] = 9 * (h[0] + h[1])  # longest: for both rows the largest product, for the first the largest cosine
        table[2] = 0.5 * h[1]
        table[0] = -h[0] - h[1]
    blocks = model.base_model.model.model.layers
    shown: list[list[int]] = []
    blocks[0].self_attn.register_forward_pre_hook(
        lambda *_: shown.append(blocks[0].jump_router.box.gates["default"].flatten().tolist())
    )
    for given in ({}, {"task_ids": torch.tensor([-1, -1])}, {"task_ids": torch.tensor([0, -1])}):
        model(input_ids=ids, **given)
    assert shown == [[1, 2], [1, 2], [0, 2]]


def test_tasks_are_told_to_generate_and_held_while_it_goes_on() -> None:
    model, ids = mixture("more"), tokens(2, 7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    told_directly = model.generate(input_ids=ids, task_ids=torch.tensor([0, 1]), **settings)
    with routing_inputs(model, task_ids=torch.tensor([0, 1])):
        assert torch.equal(model.generate(input_ids=ids, **settings), told_directly)
    assert not torch.equal(model.generate(input_ids=ids, task_ids=torch.tensor([2, 2]), **settings), told_directly)
    unknown = model.generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **settings), unknown)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"MoRE needs task_ids \[B\] with every training batch"),
        ({"task_ids": torch.tensor([0, -1])}, "task_ids holds -1, but num_tasks=3: use 0 to 2"),
        ({"task_ids": torch.tensor([3, 0])}, "task_ids holds 3, but num_tasks=3"),
        ({"task_ids": torch.tensor([0, 1, 2])}, "task_ids holds 3 ids for a batch of 2 rows"),
    ],
)
def test_bad_task_ids_are_refused_in_training(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture("more").train()(input_ids=tokens(), **given)


# ---------------------------------------------------------------------- MoA


@pytest.mark.parametrize("router", ["linear", "swiglu"])
@pytest.mark.parametrize("variant", ["soft", "learned", "fixed"])
def test_moa_weights_equal_the_formula(variant: str, router: str) -> None:
    more = {} if variant == "soft" else {"threshold": variant}
    model = exact("moa_soft" if variant == "soft" else "moa_sparse", router=router, **more)
    h, _ = caught(model, "model.layers.1")
    own: BlockAdapters = model.base_model.model.model.layers[1].jump_router
    given, seen = own.weights("default", h), set()
    held = {name: getattr(own, name)["default"] for name in own.adapter_layer_names if "default" in getattr(own, name)}
    for token, weights in zip(h.flatten(0, 1), given.flatten(0, 1)):
        z = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        if router == "swiglu":
            both = held["mixture_hidden"] @ z + held["mixture_hidden_bias"]
            first, second = both[: len(both) // 2], both[len(both) // 2 :]
            inner = first / (1 + (-first).exp()) * second
        else:
            inner = z
        w = 1 / (1 + (-(held["mixture_router"] @ inner + held["mixture_router_bias"])).exp())
        if variant == "learned":
            level = held["mixture_threshold"] @ z + held["mixture_threshold_bias"]
            w = (w - 0.5 / (1 + (-level).exp())).clamp_min(0)
        elif variant == "fixed":
            w = torch.where(w >= 0.25, w, 0.0)
        torch.testing.assert_close(weights, w, rtol=1e-9, atol=1e-12)
        seen.add(int((w > 0).sum()))
    assert given.shape[-1] == 7 + 1 + (variant == "soft")


def test_threshold_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(1 / 9), math.log(4)])  # w = 0.5, 0.1, 0.8
    torch.testing.assert_close(adapter_weights(logits, None, True), torch.tensor([0.5, 0.1, 0.8]))
    torch.testing.assert_close(adapter_weights(logits, 0.25, True), torch.tensor([0.5, 0.0, 0.8]))
    torch.testing.assert_close(adapter_weights(logits, 0.25, False), torch.tensor([0.25, 0.0, 0.55]))


def weights_of(model: PeftModel, layer: int) -> Tensor:
    h, _ = caught(model, f"model.layers.{layer}")
    return model.base_model.model.model.layers[layer].jump_router.weights("default", h)


def test_moa_weighs_each_lora() -> None:
    model = exact("moa_soft")
    w = weights_of(model, 1)
    for slot, path in enumerate(["self_attn.q_proj", "self_attn.k_proj"]):
        x, y = caught(model, f"model.layers.1.{path}")
        layer = model.base_model.model.model.layers[1].get_submodule(path)
        pairs = zip(x.flatten(0, 1), w.flatten(0, 1))
        expected = [layer.base_layer.weight @ token + weights[slot] * lora(layer, token) for token, weights in pairs]
        torch.testing.assert_close(y.flatten(0, 1), torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_moa_adds_a_parallel_adapter_to_the_network() -> None:
    model = exact("moa_soft", target_modules=["q_proj"])
    w, (h, y) = weights_of(model, 1), caught(model, "model.layers.1.mlp")
    block = model.base_model.model.model.layers[1]
    held = {name: getattr(block.jump_router, name)["default"] for name in block.jump_router.adapter_layer_names[6:10]}
    for token, out, weights in zip(h.flatten(0, 1), y.flatten(0, 1), w.flatten(0, 1)):
        inner = held["mixture_down"] @ token + held["mixture_down_bias"]
        added = held["mixture_up"] @ (inner / (1 + (-inner).exp())) + held["mixture_up_bias"]
        base = type(block.mlp).forward(block.mlp, token)
        torch.testing.assert_close(out, base + weights[1] * added, rtol=1e-9, atol=1e-12)


def test_moa_prompt_joins_what_o_proj_reads() -> None:
    model = exact("moa_soft")
    w = weights_of(model, 1)
    _, q = caught(model, "model.layers.1.self_attn.q_proj")
    with_prompt, _ = caught(model, "model.layers.1.self_attn.o_proj.base_layer")
    block = model.base_model.model.model.layers[1]
    gate = block.jump_router.mixture_prompt_gate["default"]
    attention, prompt = block.self_attn, block.jump_router.mixture_prompt["default"]
    kept = gate.data.clone()
    gate.data.zero_()
    without, _ = caught(model, "model.layers.1.self_attn.o_proj.base_layer")
    gate.data.copy_(kept)
    keys, values = (prompt @ p.base_layer.weight.T for p in (attention.k_proj, attention.v_proj))  # [3, 2 * 8]
    for row in range(2):
        for t in range(9):
            for head in range(4):
                mine, group = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
                scores = (keys[:, group] @ q[row, t, mine] / math.sqrt(8)).exp()
                out = (scores / scores.sum()) @ values[:, group]
                found = with_prompt[row, t, mine] - without[row, t, mine]
                # the softmax over the prompt is float32
                torch.testing.assert_close(found, w[row, t, 8] * gate[head] * out, rtol=1e-5, atol=1e-8)


def test_moa_starts_within_a_millionth_of_the_base_model() -> None:
    for name in ("moa_soft", "moa_sparse"):
        model = get_peft_model(llama(), mixture_config(name, init_weights=True)).eval()
        torch.testing.assert_close(model(tokens()).logits, llama()(tokens()).logits, rtol=0, atol=1e-6)
        weights = weights_of(model, 0)
        assert 0.1 < weights.mean() < 0.6


def test_moa_router_and_threshold_train() -> None:
    for name in ("moa_soft", "moa_sparse"):
        model = mixture(name).train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        grads = {n: p.grad for n, p in trainable(model).items() if "jump_router" in n}
        assert all(grad.any() for grad in grads.values())
        assert any("threshold" in n for n in grads) == (name == "moa_sparse")
    fixed = mixture("moa_sparse", threshold="fixed")
    assert not any("threshold" in n for n in trainable(fixed))


def test_second_adapter_moves_the_prompt_hooks_to_the_new_layers() -> None:
    model = mixture("moa_soft", target_modules=["up_proj"])
    before = model(tokens()).logits
    model.add_adapter("second", mixture_config("moa_soft", target_modules=["q_proj", "o_proj"]))
    torch.testing.assert_close(model(tokens()).logits, before)
    attention = model.base_model.model.model.layers[0].self_attn
    assert len(attention.q_proj._forward_hooks) == len(attention.o_proj._forward_pre_hooks) == 1
    assert not attention.q_proj.base_layer._forward_hooks
    model.set_adapter("second")
    assert not torch.equal(model(tokens()).logits, before)


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8))


def bart() -> BartForConditionalGeneration:
    own = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return BartForConditionalGeneration(BartConfig(**own, **heads))


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (qwen3, {}, "prompt_length=10 needs one attention .* no norms .* has 0; set prompt_length=0"),
        (opt, {"prompt_length": 0}, "parallel_size=16 needs one feed-forward network .* set parallel_size=0"),
        (
            bart,
            {"prompt_length": 0, "parallel_size": 0},
            r"encoder_attn.k_proj, which reads other tokens than its block",
        ),
        (llama, {"target_modules": ["lm_head"]}, "lm_head, which lies in no block"),
    ],
)
def test_moa_refuses_what_it_cannot_be_put_into(base: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(base(), MoAConfig(**{"target_modules": ["q_proj", "k_proj"], **changes}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoREConfig(), "num_tasks=None is out of range"),
        (lambda: MoREConfig(num_tasks=2, top_k=1), "top_k=1 is set, but MoRE's experts are the ranks"),
        (lambda: MoREConfig(num_tasks=2, rank_scale="r"), "rank_scale='r' is not known"),
        (lambda: MoREConfig(num_tasks=1, task_names=["a", "b"]), "task_names has 2 names, but num_tasks=1; leave"),
        (lambda: MoREConfig(task_names=["a", "a"]), "task_names=.* name each task once"),
        (lambda: MoREConfig(task_names="a"), "task_names='a' is out of range: use a list of strings"),
        (lambda: MoAConfig(num_experts=4), "num_experts=4 is set, but MoA's experts are the adapters"),
        (lambda: MoAConfig(variant="sparse", prompt_length=3), "prompt_length=3 is set, but variant='sparse'"),
        (lambda: MoAConfig(variant="hard"), "variant='hard' is not known"),
        (lambda: MoAConfig(max_threshold=0), "max_threshold=0 is out of range"),
        (lambda: MixLoRAConfig(num_experts=2, top_k=3), "top_k=3 is out of range"),
    ],
)
def test_bad_field_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_projection_called_outside_its_place_is_refused() -> None:
    x = torch.randn(1, 3, 32)
    for name, path, message in (
        ("mixlora", "mlp.up_proj", "outside its feed-forward network"),
        ("more", "mlp.up_proj", "outside its block"),
        ("moa_soft", "mlp.up_proj", "outside its block"),
    ):
        with pytest.raises(RuntimeError, match=message):
            mixture(name).base_model.model.model.layers[0].get_submodule(path)(x)
