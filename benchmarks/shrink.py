"""How fast a shrunk Mamba is, against the dense one, an order alone and element masks.

    python benchmarks/shrink.py [--rounds 12] [--json FILE]

Width 512, 1,024 inner channels, 2 layers, no head, 2 x 512 tokens, float32, on our scans. All candidates are timed in
every round, in turn forward and backward; a figure is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel

from monkeyjump.bench.timing import Work, interleaved, ratio
from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.selection import select_kept
from monkeyjump.mamba.shrink import shrink

WIDTH, LAYERS, BATCH, LENGTH, VOCABULARY = 512, 2, 2, 512, 256
SHARES = (0.25, 0.5, 0.75)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for mode, make in (("inference", inference), ("training", training)):
        works = {name: make(model, ids) for name, model in candidates().items()}
        seconds = interleaved(works, options.rounds, warmup=2)
        for name in works:
            speed = ratio(seconds["dense"], seconds[name])
            found[f"{mode}: {name}"] = {"ratio": speed.median, "low": speed.low, "high": speed.high}
            least = 1e3 * min(seconds[name])
            print(f"{mode:9} {name:18} {speed.median:5.2f} x [{speed.low:.2f}, {speed.high:.2f}]  least {least:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def candidates() -> dict[str, nn.Module]:
    """Models of the same weights, by what was done to them."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, state_size=16)
    dense = patch_mamba(MambaModel(config))
    models = {"dense": dense, "dense again": copy.deepcopy(dense), "order alone": copy.deepcopy(dense)}
    ChannelOrder("random").update(models["order alone"])
    for kind in ("learned", "baked"):
        models[f"elements, {kind}"] = copy.deepcopy(dense)
        masks = attach_masks(models[f"elements, {kind}"], MaskConfig(kind="element", target_sparsity=0.5))
        masks.target = 0.5
        if kind == "baked":
            masks.remove(bake=True)
    for share in SHARES:
        groups = channel_groups(dense)
        scores = {name: torch.rand(group.units) for name, group in groups.items()}
        kept = select_kept(groups, scores, share, scope="layer")
        models[f"shrunk {share:.0%}"] = shrink(copy.deepcopy(dense), kept)
    return models


def inference(model: nn.Module, ids: Tensor) -> Work:
    model = model.eval()

    def run(_: Any) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).last_hidden_state

    return Work(lambda: None, run)


def training(model: nn.Module, ids: Tensor) -> Work:
    """Forward, backward of all parameters; the optimizer's step is not in it."""
    model = model.train()

    def run(_: Any) -> None:
        model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()

    return Work(lambda: model.zero_grad(set_to_none=True), run)


if __name__ == "__main__":
    main()
