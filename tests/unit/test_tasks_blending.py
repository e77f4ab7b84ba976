"""Mixing: how often each task comes up, that none vanishes, and what training shares with the test rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from small_inputs import tokenizer, write_lines

from monkeyjump.tasks import (
    Collator,
    InputError,
    LoadedTask,
    Mixing,
    Prompts,
    Size,
    blend,
    find_overlap,
    load_task,
    read_task,
)


def load(folder: Path, name: str, count: int, text: str = "film {}", test: int = 4) -> LoadedTask:
    write_lines(folder / f"{name}.jsonl", [{"prompt": text.format(n), "answer": "good"} for n in range(count)])
    path = folder / f"{name}.yaml"
    path.write_text(f"name: {name}\nsource: {{kind: files, train: {name}.jsonl}}\n")
    return load_task(read_task(path), Size(train=None, test=test))


@pytest.fixture
def two(tmp_path: Path) -> list[LoadedTask]:
    return [load(tmp_path, "large", 84, "film {}"), load(tmp_path, "small", 24, "food {}")]


def drawn(tasks, **mixing) -> Counter[str]:
    found = blend(tasks, Prompts(tokenizer()), Mixing(**mixing), seed=1)
    counts = Counter(row["task"] for row in found.train)
    assert counts == found.rows
    assert len(found.train) == sum(counts.values())
    return counts


def test_concatenation_has_every_row_once(two):
    assert drawn(two) == {"large": 80, "small": 20}
    rows = blend(two, Prompts(tokenizer())).train
    assert len({tuple(row["input_ids"]) for row in rows}) == 100
    assert {(row["task"], row["task_ids"]) for row in rows} == {("large", 0), ("small", 1)}


@pytest.mark.parametrize(
    ("mixing", "share"),
    [
        ({"strategy": "temperature", "temperature": 1.0}, 0.2),
        ({"strategy": "temperature", "temperature": 2.0}, 20**0.5 / (20**0.5 + 80**0.5)),
        ({"strategy": "temperature", "temperature": 1000.0}, 0.5),
        ({"strategy": "weights", "weights": {"large": 1.0, "small": 3.0}}, 0.75),
    ],
)
def test_shares_are_as_said(two, mixing, share: float):
    counts = drawn(two, **mixing)
    assert counts["large"] >= 80  # all rows have come up when the pass ends
    assert counts["small"] >= 20
    assert counts["small"] / sum(counts.values()) == pytest.approx(share, abs=0.08)


def test_the_seed_decides_and_first_exhausted_ends_early(two):
    def order(seed: int) -> list[list[int]]:
        mixing = Mixing(strategy="temperature", temperature=2.0, stop="first_exhausted")
        return [row["input_ids"] for row in blend(two, Prompts(tokenizer()), mixing, seed).train]

    assert order(1) == order(1) != order(2)
    assert len(order(1)) < 100


def test_slices_are_rows_too(two):
    rows = blend(two, Prompts(tokenizer())).train
    assert [row["input_ids"] for row in rows[78:82]] == [rows[n]["input_ids"] for n in range(78, 82)]


def test_a_test_row_of_another_task_is_not_trained_on(tmp_path: Path):
    one, other = load(tmp_path, "one", 20), load(tmp_path, "other", 20)  # the same texts
    found = blend([one, other], Prompts(tokenizer()))
    held = {example.key for part in found.tests for example in part}
    shown = {tokenizer().decode(row["input_ids"]) for row in found.train}
    assert not any(f"user {key} " in text for key in held for text in shown)
    assert found.overlap["one"] == len({e.key for e in one.train} & held)
    assert found.overlap["one"] > 0


LONG = "the " * 12  # more words than the task below leaves


@pytest.mark.parametrize(("most", "max_length"), [(10, None), (256, 20)], ids=["text", "row"])
def test_a_text_equal_to_a_test_text_after_cutting_is_not_trained_on(tmp_path: Path, most: int, max_length: int | None):
    """Five texts that differ in their last word alone, which is cut off; and fifteen that differ in the first."""
    texts = [f"{LONG}film {n}" for n in range(5)] + [f"{n} {LONG}film" for n in range(15)]
    data = [{"text": text, "mark": ("good", "bad")[n % 2]} for n, text in enumerate(texts)]
    write_lines(tmp_path / "test.jsonl", data[:1])
    write_lines(tmp_path / "train.jsonl", data[1:])
    path = tmp_path / "films.yaml"
    path.write_text(
        "name: films\nsource: {kind: files, train: train.jsonl, test: test.jsonl}\n"
        "columns: {text: text, label: mark}\ninstruction: 'Review : {text}'\nchoices: [good, bad]\n"
        f"max_text_tokens: {most}\n"
    )
    prompts = Prompts(tokenizer(), max_length)
    loaded = load_task(read_task(path), "all")
    found = blend([loaded], prompts)
    assert found.overlap == {"films": 4}
    (asked,) = [prompts.prompt(loaded.task, example) for example in loaded.test]
    for row in found.train:
        assert row["input_ids"][: sum(label < 0 for label in row["labels"])] != asked
    assert len(found.train) == 15
    (cut,) = {prompts.cut[name] for name in prompts.cut}
    assert cut >= 15  # counted for the rows that were encoded here, not for the comparison


def test_one_name_twice_is_refused(two):
    with pytest.raises(InputError, match="'large' is given twice"):
        blend([two[0], two[0]], Prompts(tokenizer()))


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        ({"strategy": "weights", "weights": {"large": 1.0, "smal": 1.0}}, "no task 'smal'"),
        ({"strategy": "weights", "weights": {"large": 1.0}}, "none is given for small"),
        (
            {"strategy": "weights", "weights": {"large": 1.0, "small": 1e-9}, "stop": "first_exhausted"},
            "task small would get no training row",
        ),
    ],
)
def test_no_task_vanishes_silently(two, mixing, message: str):
    with pytest.raises(InputError, match=message):
        blend(two, Prompts(tokenizer()), Mixing(**mixing))


def test_a_task_whose_rows_are_all_test_rows_is_refused(tmp_path: Path):
    tasks = [load(tmp_path, "one", 20, test=19), load(tmp_path, "other", 20, test=10)]
    with pytest.raises(InputError, match=r"task one would get no training row \(1 left out|task other would get no"):
        blend(tasks, Prompts(tokenizer()))


@pytest.mark.parametrize(
    "wrong", [{"strategy": "weights"}, {"weights": {"a": 1.0}}, {"temperature": 0}, {"strategy": "sizes"}]
)
def test_mixing_that_makes_no_sense(wrong):
    with pytest.raises(ValidationError):
        Mixing(**wrong)


def test_weights_must_be_above_zero():
    with pytest.raises(ValidationError, match="leave a task out"):
        Mixing(strategy="weights", weights={"a": 0.0})


def test_shared_runs_of_words_are_found(tmp_path: Path):
    """A test text that training quotes in part, and one that it does not."""
    quote = " ".join(f"w{n}" for n in range(15))
    write_lines(
        tmp_path / "test.jsonl",
        [{"prompt": f"before {quote} after", "answer": "a"}, {"prompt": "x " * 20, "answer": "a"}],
    )
    write_lines(
        tmp_path / "train.jsonl",
        [{"prompt": f"other {n} " + (quote.upper() if n == 3 else "y " * 20), "answer": "a"} for n in range(6)],
    )
    path = tmp_path / "q.yaml"
    path.write_text("name: q\nsource: {kind: files, train: train.jsonl, test: test.jsonl}\n")
    (found,) = find_overlap([load_task(read_task(path), "all")])
    assert (found.task, found.rows, found.seen, found.by) == ("q", 2, 1, {"q": 1})
    (none,) = find_overlap([load_task(read_task(path), "all")], words=16)
    assert none.seen == 0


def test_the_stock_trainer_reads_rows_as_it_needs_them(two, tmp_path: Path):
    from peft import LoraConfig, get_peft_model
    from small_inputs import model
    from transformers import Trainer, TrainingArguments

    mixture = blend(two, Prompts(tokenizer()), Mixing(strategy="temperature", temperature=2.0))
    net = get_peft_model(model(), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False, save_strategy="no", **settings)
    trainer = Trainer(net, arguments, train_dataset=mixture.train, data_collator=Collator.of(tokenizer()))
    assert 0 < trainer.train().training_loss < 10
