"""The routed forward against a float64 loop written from the equations: adapter x granularity x similarity."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel
from test_gates import gates_by_hand
from torch import Tensor, nn

from monkeyjump.tuner.block import ROUTER
from tiny import llama, routed, tokens

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
SHARED = ["o_proj", "gate_proj"]
ADAPTERS = {
    "lora": {},
    "lora_fa": {},
    "adalora": {"total_step": 10, "init_r": 3, "target_r": 2},
    "propulsion": {"init_weights": False},
}


def delta(layer: nn.Module, base: str, x: Tensor, wx: Tensor) -> Tensor:
    """What the adapter adds, from the definitions, in float64 (the table of the four adapters)."""
    get = {n: p.detach().double() for n, p in layer.named_parameters()}
    if base == "propulsion":
        return ((1 + get["propulsion_delta.default"]) ** 15 - 1) * wx
    if base == "adalora":
        q, lam, p = (get[f"lora_{x}.default"] for x in "AEB")
        return 16 / (len(q) + 1e-5) * (x @ (q * lam).T @ p.T)
    return 16 / 4 * (x @ get["lora_A.default.weight"].T @ get["lora_B.default.weight"].T)


def representation(h: Tensor, mask: Tensor, labels: Tensor, row: int, t: int, granularity: str) -> Tensor:
    attended = [i for i in range(len(mask[row])) if mask[row, i]]
    if granularity == "token":
        return h[row, t]
    if granularity == "last":
        return h[row, attended[-1]]
    if granularity == "mean":
        return sum(h[row, i] for i in attended) / len(attended)  # type: ignore[return-value]
    if granularity == "max":
        return torch.stack([h[row, i] for i in attended]).amax(0)
    first = next(i for i in range(labels.shape[1]) if labels[row, i] != -100)
    return h[row, first - 1]


def reference_gates(model: PeftModel, index: int, h: Tensor, mask: Tensor, labels: Tensor, config: dict) -> Tensor:
    """`[B, T, E]` float64, token by token."""
    router = model.get_base_model().model.layers[index].get_submodule(ROUTER)
    if config["granularity"] == "task":
        ids = config["task_ids"].tolist()
        return torch.tensor([[[float(e == i % 3) for e in range(3)]] * h.shape[1] for i in ids], dtype=torch.float64)
    centers = router.centers["default"].double().tolist()
    batch, length, _ = h.shape
    rows = [
        [
            gates_by_hand(
                representation(h, mask, labels, b, t, config["granularity"]).tolist(),
                centers,
                config["similarity"],
                config["temperature"],
                config["top_k"],
                config["gate_norm"],
            )
            for t in range(length)
        ]
        for b in range(batch)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def check_layers(model: PeftModel, base: str, config: dict, inputs: dict[str, Tensor]) -> int:
    """Compare every adapted projection's output in a real forward with `W x + m delta(x)`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    blocks, handles = {}, []
    for index, block in enumerate(model.get_base_model().model.layers):
        handles.append(block.register_forward_pre_hook(lambda m, a, i=index: blocks.__setitem__(i, a[0].detach())))
        for name, layer in block.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                hook = lambda m, a, y, key=(index, name): seen.__setitem__(key, (a[0].detach(), y.detach()))  # noqa: E731
                handles.append(layer.register_forward_hook(hook))
    model(**inputs)
    for handle in handles:
        handle.remove()
    for (index, name), (x, y) in seen.items():
        block = model.get_base_model().model.layers[index]
        layer, router = block.get_submodule(name), block.get_submodule(ROUTER)
        x64 = x.double()
        wx = x64 @ layer.get_base_layer().weight.detach().double().T
        gate = torch.ones(*x.shape[:2], 1, dtype=torch.float64)
        if name in router.slots["default"]:
            m = reference_gates(
                model, index, blocks[index].double(), inputs["attention_mask"], inputs["labels"], config
            )
            gate = m[..., router.slots["default"].index(name)].unsqueeze(-1)
        expected = wx + gate * delta(layer, base, x64, wx)
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    return len(seen)


DECISIONS = [
    (granularity, similarity)
    for granularity in ("token", "last", "mean", "max", "prompt_end")
    for similarity in ("cosine", "dot", "euclidean", "l1")
] + [("task", "cosine")]


@pytest.mark.parametrize(("granularity", "similarity"), DECISIONS)
@pytest.mark.parametrize("base", ADAPTERS)
def test_forward_equals_the_equations(base: str, granularity: str, similarity: str) -> None:
    config = {
        "granularity": granularity,
        "similarity": similarity,
        "temperature": 0.3,
        "top_k": 2,
        "gate_norm": "k",
    }
    extra = {"center_init": "random_normalized"}
    model = routed(
        llama(), base=base, target_modules=TARGETS, shared_modules=SHARED, **config, **extra, **ADAPTERS[base]
    ).eval()
    ids = tokens(3, 7)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, :3], mask[2, 5:] = 0, 0  # left and right padding
    labels[:, :4], labels[2, 5:] = -100, -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if granularity == "task":
        config["task_ids"] = inputs["task_ids"] = torch.tensor([0, 2, 4])
    assert check_layers(model, base, config, inputs) == 2 * len(TARGETS)


def test_gate_norm_none_weakens_as_written() -> None:
    """Eq. 4 as written: the chosen gates sum to their softmax mass, below one."""
    assert math.isclose(
        sum(gates_by_hand([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], "cosine", 1, 3, "none")), 1
    )
    config = {
        "granularity": "token",
        "similarity": "cosine",
        "temperature": 1.0,
        "top_k": 1,
        "gate_norm": "none",
    }
    model = routed(llama(), target_modules=TARGETS, shared_modules=SHARED, **config).eval()
    ids = tokens(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert check_layers(model, "lora", config, inputs) == 2 * len(TARGETS)
