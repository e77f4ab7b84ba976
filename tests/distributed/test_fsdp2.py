"""Two processes with parameters sharded by `fully_shard` (FSDP2) equal one process with whole ones.

In a plain loop: accelerate silently runs DDP where it is asked for FSDP on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from ranks import run_ranks
from test_ddp import STEPS, compare_runs, model_of, shares, state_of, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from monkeyjump.tuner.block import RoutedBlock
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

pytestmark = [pytest.mark.slow, pytest.mark.proves("integration", "FSDP2, 2 processes")]


def shard(model: nn.Module, each_adapter: bool) -> None:
    """Each block by itself, as everybody does; each trained layer by itself, too, as PEFT's policy for LoRA says."""
    mesh = init_device_mesh("cpu", (2,))
    if each_adapter:
        wraps = fsdp_auto_wrap_policy(model).keywords["policies"][0].keywords["lambda_fn"]
        for module in [m for m in model.modules() if wraps(m)]:
            fully_shard(module, mesh=mesh)
    for block in [m for m in model.modules() if isinstance(m, RoutedBlock)]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert not any(isinstance(c, DTensor) for r in routers(model) for c in r.centers.values())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_one_rank(rank: int, name: str, each_adapter: bool, checkpointing: bool, folder: str) -> dict[str, Any]:
    model = model_of(name)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    shard(model, each_adapter)
    run = train(model, [shares(step)[rank] for step in range(STEPS)], [4] * STEPS, ranks=2)
    run["grads"] = [{n: whole(g) for n, g in grads.items()} for grads in run["grads"]]
    run["state"] = {n: whole(v) for n, v in run["state"].items()}
    with torch.no_grad():
        run["logits"] = model.eval()(tokens(2)).logits
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return run


def compare(name: str, folder: Path, each_adapter: bool = False, checkpointing: bool = False) -> None:
    joined = [torch.cat(shares(step)) for step in range(STEPS)]
    alone = train(model_of(name), joined, [4] * STEPS, ranks=1)
    saved = folder / "saved"
    runs = run_ranks(on_one_rank, folder, name, each_adapter, checkpointing, str(saved))
    compare_runs(runs, alone)
    loaded = PeftModel.from_pretrained(llama(), saved)
    for key, value in state_of(loaded).items():
        assert torch.equal(value, runs[0]["state"][key])
    assert {n: v.shape for n, v in trainable(loaded).items()} == {}
    with torch.no_grad():
        # adapters sharded one by one take PEFT's products, the whole ones the fused update: equal up to rounding
        exact = {} if each_adapter else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(loaded(tokens(2)).logits, runs[0]["logits"], **exact)


@pytest.mark.parametrize("name", ["lora", "lora_fa", "propulsion"])
def test_sharded_equals_whole(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


def test_adapters_sharded_one_by_one(tmp_path: Path) -> None:
    compare("lora", tmp_path, each_adapter=True)


def test_with_gradient_checkpointing(tmp_path: Path) -> None:
    compare("lora", tmp_path, checkpointing=True)


def in_half_precision(rank: int) -> dict[str, Any]:
    """A bfloat16 base with float32 adapters, in one group of parameters."""
    model = routed(llama().to(torch.bfloat16), task_type="CAUSAL_LM", top_k=1).train()
    start = state_of(model)
    shard(model, each_adapter=False)
    run = train(model, [shares(step)[rank] for step in range(STEPS)], [4] * STEPS, ranks=2)
    return {"start": start, "state": {n: whole(v) for n, v in run["state"].items()}, "losses": run["losses"]}


def test_a_base_in_half_precision_keeps_adapters_and_centers_in_float32(tmp_path: Path) -> None:
    first, second = run_ranks(in_half_precision, tmp_path)
    for name, value in first["state"].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, second["state"][name])
        assert not torch.equal(value, first["start"][name])
    total = first["losses"] + second["losses"]
    assert total.isfinite().all()


def refused(rank: int, folder: str) -> list[str]:
    messages = []
    for name, call in (("lora", lambda m: m.save_pretrained(folder)), ("adalora", lambda m: train(m, [], [], 2))):
        model = model_of(name)
        shard(model, each_adapter=False)
        with pytest.raises(ValueError) as caught:
            call(model)
        messages.append(str(caught.value))
    return messages


def test_what_cannot_work_sharded_is_refused(tmp_path: Path) -> None:
    saving, adalora = run_ranks(refused, tmp_path, str(tmp_path / "saved"))[0]
    assert "pass the whole: save_pretrained(folder, state_dict=" in saving
    assert not (tmp_path / "saved" / "adapter_model.safetensors").exists()
    assert "base='adalora' cannot be sharded" in adalora
