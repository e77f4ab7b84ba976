"""`monkeyjump mamba adapt` and `shrink`: smaller models that score as they say, and going on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mamba_inputs import FAST, metrics, result, write_base
from peft import PeftModel
from transformers import AutoModelForCausalLM

from monkeyjump.allocation import load_peft, merge_peft
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.order import ChannelOrder, fold


@pytest.fixture
def folder(mamba_folder: Path) -> Path:
    return mamba_folder


@pytest.mark.parametrize("method", ["correlation", "importance"])
def test_interrupted_and_resumed_equals_uninterrupted_and_the_parts_belong_together(mamba, folder: Path, method: str):
    code, lines = mamba(
        "adapt", "model", "text.txt", "--output", "out", "--steps", "10", "--set", f"order_method={method}", *FAST
    )
    assert code == 0, lines
    said = "\n".join(lines)
    for words in ("LoRA: ", "IA³: ", "trainable parameters: ", "cross-entropy ", "average sparsity 0.500, target 0.5"):
        assert words in said
    assert ("correlation matrix (32, 32), path cost" in said) == (method == "correlation")
    found = result(folder / "out")
    assert found["units"] == 32  # of 2 layers of 32
    model = load_model(folder / "out")
    assert model.num_parameters() == found["parameters"] < found["parameters_before"]
    assert sum(group.units for group in channel_groups(model).values()) == 32
    code, lines = mamba("perplexity", "out", "text.txt", "--window", "24", "--json")
    assert code == 0, lines

    moved = folder / "elsewhere"
    shutil.copytree(folder / "out", moved)
    for name in ("model.safetensors", "config.json", "result.json"):
        (moved / name).unlink()
    shutil.rmtree(moved / "checkpoints" / "checkpoint-8")
    shutil.rmtree(moved / "checkpoints" / "checkpoint-10", ignore_errors=True)
    code, lines = mamba("adapt", "--output", "elsewhere", "--resume")
    assert code == 0, lines
    assert "going on after step 4 of 10" in lines
    for name in ("model.safetensors", "adapter/adapters.safetensors", "order/scan_order.npy"):
        assert (moved / name).read_bytes() == (folder / "out" / name).read_bytes(), name
    assert metrics(moved) == metrics(folder / "out")
    same = ("held_out", "units_by_block", "efficiency")
    assert all(result(moved)[name] == found[name] for name in same)


def test_the_base_as_it_was_given_and_the_adapter_of_the_folder_give_its_model(mamba, folder: Path):
    """The order was folded anew in training: what is saved beside the model is as if it never had been."""
    arguments = ("--steps", "7", "--set", "scan_update_frequency=3", "--no-masks")
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", *FAST, *arguments)
    assert code == 0, lines
    assert "step 6: channel order measured and folded in again" in lines
    order, base, ids = ChannelOrder.load("out/order"), load_model("model"), torch.arange(20)[None]
    assert order.updates == 3
    assert any((one != torch.arange(len(one))).any() for one in order.orders.values())
    before = base(input_ids=ids).logits
    load_peft(base, "out/adapter")  # a warning, hence an error, if the fingerprint were that of the ordered base
    merge_peft(base)
    with torch.no_grad():
        made, expected = load_model("out"), base(input_ids=ids).logits
        assert (made(input_ids=ids).logits - expected).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-3
    fold(base, order.orders)
    for name, found in made.named_parameters():
        torch.testing.assert_close(found, base.get_parameter(name), rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_peft_format_loads_into_peft_and_gives_the_model(mamba, folder: Path, kind: str):
    write_base(folder, kind)
    same = ("--steps", "5", "--no-masks", *FAST, "--set", "importance_threshold=0.5", "--set", "learning_rate=0.1")
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", *same, "--peft-format")
    assert code == 0, lines
    kinds = [path.name for path in (folder / "out" / "peft").iterdir()]
    assert "lora" in kinds
    assert sorted(f"peft/{name}" for name in kinds) == sorted(result(folder / "out")["peft"])
    model, ids = AutoModelForCausalLM.from_pretrained("model"), torch.arange(20)[None]  # Hugging Face's own mixers
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for name in ("lora", "ia3"):
            if name in kinds:
                model = PeftModel.from_pretrained(model, f"out/peft/{name}").merge_and_unload()
        found, expected = model(input_ids=ids).logits, load_model("out")(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-3


def test_what_peft_cannot_hold_is_listed_and_no_part_of_it_is_written(mamba, folder: Path):
    same = ("--steps", "1", "--no-masks", *FAST, "--set", "peft_application_ratio=1")
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", *same)
    assert code == 0, lines
    refused = result(folder / "out")["peft_refused"]
    assert {name.rpartition(".")[2] for name in refused} == {"conv1d", "dt_proj", "out_proj"}
    said = " ".join(" ".join(lines).split())  # lines are wrapped
    assert f"peft/ is not written: PEFT's format cannot hold {len(refused)} of 10 adapters" in said
    assert all(f"{name}: {reason}" in said for name, reason in refused.items())
    assert not (folder / "out" / "peft").exists()
    assert (folder / "out" / "adapter" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    "off",
    [["--no-masks"], ["--no-adapters", "--no-order"], ["--no-order", "--no-masks"]],
)
def test_pillars_are_switched_off_apart(mamba, folder: Path, off: list[str]):
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "2", *off, *FAST)
    assert code == 0, lines
    found, facts = result(folder / "out"), json.loads((folder / "out" / "run.json").read_text())
    assert (folder / "out" / "order").exists() == ("--no-order" not in off)
    assert (folder / "out" / "adapter").exists() == ("--no-adapters" not in off)
    assert ("sparsity" in found) == ("--no-masks" not in off)
    whole = facts["trainable_parameters"] == facts["parameters"]
    assert whole == ("--no-adapters" in off)
    if "--no-masks" in off:
        assert found["parameters"] == found["parameters_before"]


@pytest.mark.parametrize("extra", [(), ("--repair",), ("--order", "importance", "--block", "8")])
def test_shrink_writes_what_it_says(mamba, folder: Path, extra: tuple[str, ...]):
    code, lines = mamba("shrink", "model", "--text", "text.txt", "--output", "half", *extra)
    assert code == 0, lines
    found = result(folder / "half")
    assert sum(found["units_by_block"].values()) == 32
    assert load_model(folder / "half").num_parameters() == found["parameters"] < found["parameters_before"]
    assert found["repaired"] == ("--repair" in extra)
    assert (folder / "half" / "order").exists() == ("--order" in extra)
    assert mamba("shrink", "half", "--text", "text.txt", "--output", "quarter")[0] == 0
    assert sum(result(folder / "quarter")["units_by_block"].values()) == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adapt", "model"], "MODEL and TEXT are missing"),
        (["adapt", "none", "text.txt"], "model: 'none' cannot be read"),
        (["adapt", "model", "none.txt"], "none.txt: no such file or folder"),
        (["adapt", "model", "text.txt", "--set", "d_model=8"], "--set d_model=8: unknown field 'd_model'"),
        (["adapt", "model", "text.txt", "--set", "order_method=tour"], "order_method"),
        (["adapt", "model", "text.txt", "--set", "peft_application_ratio=0.01"], "peft_application_ratio=0.01"),
        (["shrink", "model", "--text", "text.txt", "--sparsity", "1"], "--sparsity = 1.0"),
        (["shrink", "model", "--text", "text.txt", "--order", "tour"], "--order"),
        (["shrink", "model", "--text", "text.txt", "--block", "7"], "block=7 does not divide"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing_behind(mamba, folder: Path, arguments: list[str], words: str):
    before = sorted(folder.rglob("*"))
    code, lines = mamba(*arguments, "--output", "deep/er", *(["--steps", "1"] if arguments[0] == "adapt" else []))
    assert code == 2, lines
    assert words in next(line for line in lines if line.startswith("error"))
    assert sorted(folder.rglob("*")) == before
