"""Tokens: what is supervised, what is cut, what is padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_inputs import TEMPLATE, model, tokenizer, write_lines, write_task

from monkeyjump.evaluation import Questions, choice_scores
from monkeyjump.tasks import Collator, Example, InputError, Prompts, load_task, read_task
from monkeyjump.tasks.prompts import with_prefix

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
    monkeypatch.setattr(Prompts, "_answer", lambda self, task, text: [])
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


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_an_answer_prefix_belongs_to_the_prompt(tmp_path: Path, template: str | None):
    """In training it is read and not learned; in evaluation choices follow it."""
    words = tokenizer(template)
    prefix = "the good is"
    plain, prefixed = (
        load_task(read_task(write_task(tmp_path, f"films{n}", more=f"answer_prefix: {text!r}\n")))
        for n, text in enumerate(("", prefix))
    )
    prompts = Prompts(words)
    example = prefixed.train[0]
    asked, bare = (prompts.prompt(loaded.task, example) for loaded in (prefixed, plain))
    assert asked == [*bare, *words(prefix, add_special_tokens=False).input_ids]
    row = prompts.encode(prefixed.task, 0, example)
    answer = [*words(example.gold[0], add_special_tokens=False).input_ids, words.eos_token_id]
    assert row["input_ids"] == asked + answer
    assert row["labels"] == [-100] * len(asked) + answer
    question = Questions(prefixed.task, prefixed.test, prompts, 0)[0]
    assert question.inputs["input_ids"] == prompts.prompt(prefixed.task, prefixed.test[0])
    net = model()
    (scores,) = choice_scores(net, [question], Collator.of(words))
    with torch.no_grad():
        logits = net(input_ids=torch.tensor([question.inputs["input_ids"]])).logits[0, -1].log_softmax(-1)
    said = [words(text, add_special_tokens=False).input_ids for text in question.spoken]
    torch.testing.assert_close(scores, logits[[tokens[0] for tokens in said]])


def test_a_prefix_after_a_header_that_ends_a_line():
    assert with_prefix("assistant\n", "The correct output is") == "assistant\nThe correct output is"
    assert with_prefix("Answer:", "The correct output is") == "Answer: The correct output is"


def test_a_chat_takes_no_prefix(tmp_path: Path):
    write_lines(tmp_path / "chats.jsonl", [{"chat": []}])
    path = tmp_path / "chats.yaml"
    path.write_text(
        "name: c\nsource: {kind: files, train: chats.jsonl}\nmessages: chat\nanswer: text\nanswer_prefix: x\n"
    )
    with pytest.raises(InputError, match="leave out answer_prefix"):
        read_task(path)
