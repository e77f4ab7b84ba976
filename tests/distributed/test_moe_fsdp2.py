"""Mixtures whose parameters are sharded by `fully_shard` (FSDP2), block by block, equal whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from test_fsdp2 import whole
from test_moe_ddp import model_of, share
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_methods import METHODS, mixture, told
from monkeyjump.moe import RankUpdate
from tiny import llama, tokens, trainable

pytestmark = pytest.mark.slow

# PEFT's rank allocation reads whole matrices
SHARDED = [name for name in METHODS if name != "moe_adalora"]


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def train(model: nn.Module, batches: list[Tensor], ranks: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, **told(model, ids), num_items_in_batch=torch.tensor(4 * 8)).loss
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: whole(p.detach()).clone() for n, p in trainable(model).items()}


def on_one_rank(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SHARDED:
        model = shard(model_of(name))
        state = train(model, [share(rank, step) for step in range(2)], ranks=2)
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens(2)).logits
        kept = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(f"{folder}/{name}", state_dict=kept)
        found[name] = {"state": state, "logits": logits}
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All methods, one after another, in one pair of processes."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_ranks(on_one_rank, folder, str(folder), timeout=300)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_mixture_equals_a_whole_one(name: str, runs: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = runs
    joined = [torch.cat([share(0, step), share(1, step)]) for step in range(2)]
    alone = train(model_of(name), joined, ranks=1)
    torch.testing.assert_close(first[name]["state"], second[name]["state"], rtol=0, atol=0)
    torch.testing.assert_close(first[name]["state"], alone, rtol=1e-3, atol=2e-5)
    loaded = PeftModel.from_pretrained(llama(), folder / name).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens(2)).logits, first[name]["logits"])


def with_losses(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("moelora", "moe_adalora"):
        with pytest.raises(ValueError) as caught:
            train(shard(mixture(name).train()), [share(rank, 0)], ranks=2)
        found[name] = str(caught.value)
    model = shard(mixture("moe_adalora", orth_reg_weight=0.0).train())
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    with pytest.raises(ValueError) as caught:
        RankUpdate().attach(model, optimizer)
    found["ranks"] = str(caught.value)
    for name in ("moelora", "mola", "mixlora", "more"):
        changes = {"contrastive_weight": 0.0} if name == "moelora" else {}
        found[name, "state"] = train(shard(mixture(name, **changes).train()), [share(rank, 0)], ranks=2)
    return found


def test_losses_over_routers_are_sharded_and_those_over_weights_refused(tmp_path: Path) -> None:
    first, second = run_ranks(with_losses, tmp_path)
    assert "contrastive cannot be sharded by FSDP2: it reads the experts' weights" in first["moelora"]
    assert "set contrastive_weight=0" in first["moelora"]
    assert "orthogonality cannot be sharded by FSDP2" in first["moe_adalora"]
    assert "base='adalora' cannot be sharded by FSDP2" in first["ranks"]
    for name in ("moelora", "mola", "mixlora", "more"):
        torch.testing.assert_close(first[name, "state"], second[name, "state"], rtol=0, atol=0)
