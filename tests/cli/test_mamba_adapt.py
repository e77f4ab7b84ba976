"""`monkeyjump mamba adapt` and `shrink`: smaller models that score as they say, and going on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from monkeyjump.allocation import load_peft, merge_peft
from monkeyjump.cli import app
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.order import ChannelOrder, fold
from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer

ANIMALS = ("cat", "dog", "hen", "fox", "eel")
SMALL = {
    "context_length": 24, "batch_size": 4, "learning_rate": 0.02, "log_every": 1, "save_every": 4,
    "evaluate_every": 6, "keep": 9, "calibration_batches": 2, "peft_r": 2, "peft_alpha": 4,
    "peft_application_ratio": 0.5, "scan_update_frequency": 3, "target_sparsity": 0.5,
}  # fmt: skip
FAST = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a random Mamba with a tokenizer of that text."""
    folder = tmp_path_factory.mktemp("base")
    lines = (f"The {ANIMALS[n % 5]} number {n} likes the {ANIMALS[(n + 1) % 5]}.\n" for n in range(200))
    text = "".join(lines)
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 300, 24)
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    MambaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mamba(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line in this process: its exit code and its lines on stdout and stderr."""

    def mamba(*arguments: str):
        code = app.run(["mamba", *arguments])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return mamba


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in lines]


def test_interrupted_and_resumed_equals_uninterrupted_and_the_parts_belong_together(mamba, folder: Path):
    code, lines = mamba(
        "adapt", "model", "text.txt", "--output", "out", "--steps", "10", "--set", "order_method=correlation", *FAST
    )
    assert code == 0, lines
    said = "\n".join(lines)
    for words in ("correlation matrix (32, 32), path cost", "LoRA: ", "IA³: ", "trainable parameters: "):
        assert words in said
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


def test_base_order_and_adapter_of_the_folder_give_its_model(mamba, folder: Path):
    """The order was folded anew in training, so that the adapter belongs to the last one."""
    arguments = ("--steps", "7", "--set", "scan_update_frequency=3", "--no-masks")
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", *FAST, *arguments)
    assert code == 0, lines
    order, base, ids = ChannelOrder.load("out/order"), load_model("model"), torch.arange(20)[None]
    assert order.updates == 3
    before = base(input_ids=ids).logits
    fold(base, order.orders)
    load_peft(base, "out/adapter")
    merge_peft(base)
    with torch.no_grad():
        found, expected = load_model("out")(input_ids=ids).logits, base(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-3


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
