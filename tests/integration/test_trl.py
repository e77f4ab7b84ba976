"""TRL's SFTTrainer and DPOTrainer on routed adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from monkeyjump import CenterUpdate, MonkeyJumpConfig
from monkeyjump.tuner.model import routers
from tiny import VOCAB, gates, llama, routed, trainable

trl = pytest.importorskip("trl")

# trl 1.16 speaks to transformers 5.23 by names that are to change in its next major version
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")

SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 0.05,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "max_length": 32,
}
SEQUENCE = ["last", "mean", "max", "prompt_end"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    built = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def words(count: int, seed: int) -> str:
    numbers = torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{n}" for n in numbers.tolist())


def completions(rows: int = 8) -> Dataset:
    pairs = [{"prompt": words(3 + i % 3, i), "completion": " " + words(4, 50 + i)} for i in range(rows)]
    return Dataset.from_list(pairs)


def preferences(rows: int = 8) -> Dataset:
    rows_ = range(rows)
    texts = [(words(3 + i % 3, i), " " + words(4, 50 + i), " " + words(5, 90 + i)) for i in rows_]
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts])


def sft(model: Any, folder: Path, callbacks: list | None = None, peft_config: Any = None, **changes: Any) -> Any:
    arguments = trl.SFTConfig(str(folder), **{**SETTINGS, **changes})
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=completions(),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def dpo(model: Any, folder: Path, callbacks: list | None = None, peft_config: Any = None, **changes: Any) -> Any:
    arguments = trl.DPOConfig(str(folder), **{**SETTINGS, **changes})
    return trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def config(**changes: Any) -> MonkeyJumpConfig:
    return MonkeyJumpConfig(r=4, lora_dropout=0.0, center_init="random", task_type="CAUSAL_LM", **changes)


def centers(model: Any, adapter: str = "default") -> list[Tensor]:
    return [router.centers[adapter].clone() for router in routers(model)]


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.proves("integration", "TRL SFTTrainer")
@pytest.mark.parametrize("granularity", ["token", "prompt_end"])
def test_sft_trains_adapters_and_centers(granularity: str, tmp_path: Path) -> None:
    trainer = sft(llama(), tmp_path, [CenterUpdate(every=1, until=9)], config(granularity=granularity))
    model = trainer.model
    before = centers(model)
    weights = {n: p.detach().clone() for n, p in trainable(model).items()}
    trainer.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    assert not any(torch.equal(a, b) for a, b in zip(centers(model), before))
    assert all(not torch.equal(p, weights[n]) for n, p in trainable(model).items() if "lora_B" in n)


def test_prompt_end_is_where_the_completion_begins(tmp_path: Path) -> None:
    trainer = sft(llama(), tmp_path, peft_config=config(granularity="prompt_end"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any()  # loss on the completion only
    length = int((batch["labels"][0] != -100).long().argmax())
    found = gates(trainer.model, **batch)[0][:1]
    alone = gates(trainer.model.eval(), input_ids=batch["input_ids"][:1, :length])[0]
    torch.testing.assert_close(found, alone)


PACKINGS: list[dict[str, Any]] = [{"packing": True}, {"padding_free": True, "max_length": None}]


@pytest.mark.parametrize("how", PACKINGS)
def test_sequence_modes_refuse_trl_packing(how: dict, tmp_path: Path) -> None:
    for granularity in SEQUENCE:
        trainer = sft(llama(), tmp_path, peft_config=config(granularity=granularity), **how)
        with pytest.raises(ValueError, match=rf"{granularity!r} takes one sequence per row.*granularity='token'"):
            trainer.train()


@pytest.mark.parametrize("how", PACKINGS)
def test_token_mode_takes_trl_packing(how: dict, tmp_path: Path) -> None:
    """The same rows, packed and padded, have the same loss and leave the same centers."""
    found = []
    for changes in ({}, how):
        settings = {"per_device_train_batch_size": 8, "max_steps": 1, **changes}  # all rows at once
        trainer = sft(llama(), tmp_path, [CenterUpdate(every=1, until=9)], config(), **settings)
        trainer.train()
        found.append((losses(trainer), centers(trainer.model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.proves("integration", "TRL DPOTrainer")
@pytest.mark.parametrize("granularity", ["token", "prompt_end"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_starts_at_its_reference_and_trains(granularity: str, checkpointing: bool, tmp_path: Path) -> None:
    checks = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = dpo(llama(), tmp_path, [CenterUpdate(every=1, until=9)], config(granularity=granularity), **checks)
    before = centers(trainer.model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are one and the same
    assert losses(trainer)[1] != pytest.approx(0.6931, abs=1e-5)
    assert not any(torch.equal(a, b) for a, b in zip(centers(trainer.model), before))


def test_dpo_reference_of_a_trained_adapter_routes_like_it(tmp_path: Path) -> None:
    model = routed(llama(), center_init="kmeans", task_type="CAUSAL_LM", temperature=0.2)
    for number, router in enumerate(routers(model)):
        generator = torch.Generator().manual_seed(number)
        router.set_centers("default", torch.randn(router.centers["default"].shape, generator=generator))
    before = centers(model)
    trainer = dpo(model, tmp_path, [CenterUpdate(every=1, until=9)])
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(centers(model, "ref"), before))
    assert not any(torch.equal(a, b) for a, b in zip(centers(model), before))
