"""Tokens: what is supervised, what is cut, what is padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_inputs import tokenizer, write_task

from monkeyjump.tasks import Collator, Example, InputError, Prompts, read_task

LONG = Example({"text": " ".join(["film"] * 50)}, answer=1, where="a row")


def words(ids: list[int]) -> str:
    return tokenizer().decode([i for i in ids if i >= 0])


@pytest.fixture
def task(tmp_path: Path):
    return read_task(write_task(tmp_path, more="max_text_tokens: 3\n"))


def test_only_answer_and_end_are_supervised_and_only_the_text_is_cut(task):
    prompts = Prompts(tokenizer())
    row = prompts.encode(task, 3, LONG)
    expected = "user Review : film film film is this positive or negative ?"
    assert expected in words(row["input_ids"])
    assert words(row["labels"]) == "negative </s>"
    assert row["input_ids"][-2:] == row["labels"][-2:]
    assert set(row["labels"][:-2]) == {-100}
    assert row["task_ids"] == 3
    assert prompts.cut == {"films": 1}


def test_the_default_system_message_is_left_out(task):
    assert "default" not in words(Prompts(tokenizer()).prompt(task, LONG))


def test_templates_that_refuse_a_system_turn(task):
    check = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    refusing = check + "user {{ messages[0]['content'] }}"
    assert words(Prompts(tokenizer(refusing)).prompt(task, LONG)).startswith("user Review")


def test_without_chat_template(task):
    prompt = Prompts(tokenizer(None)).prompt(task, LONG)
    assert words(prompt).startswith("Review : film film film is")


def test_an_answer_without_tokens_is_refused(task, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Prompts, "_answer", lambda self, text: [])
    with pytest.raises(InputError, match="a row: answer 'negative' of task films has no tokens"):
        Prompts(tokenizer()).encode(task, 0, LONG)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_position_not_by_id(side):
    """The end token and the padding share id 2: the end stays supervised and attended."""
    short = {"input_ids": [7, 2], "attention_mask": [1, 1], "labels": [-100, 2], "task_ids": 1}
    long = {"input_ids": [7, 8, 9, 2], "attention_mask": [1] * 4, "labels": [-100, -100, 9, 2], "task_ids": 0}
    batch = Collator.of(tokenizer(), side=side, with_task_ids=True)([short, long])
    own = slice(2, 4) if side == "left" else slice(0, 2)
    pad = slice(0, 2) if side == "left" else slice(2, 4)
    assert batch["input_ids"][0, own].tolist() == [7, 2]
    assert batch["labels"][0, own].tolist() == [-100, 2]
    assert batch["attention_mask"][0, own].tolist() == [1, 1]
    assert batch["attention_mask"][0, pad].tolist() == [0, 0]
    assert batch["labels"][0, pad].tolist() == [-100, -100]
    assert torch.equal(batch["task_ids"], torch.tensor([1, 0]))
