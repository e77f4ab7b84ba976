"""Pretraining in pieces: documents, the held-out part, tokenizer, windows, settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from monkeyjump.mamba.presets import PRESETS, pretraining_config, training_config
from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer
from monkeyjump.mamba.text_runs.trainer import WindowTrainer, training_arguments
from monkeyjump.mamba.text_runs.windows import Windows, collate, encode
from monkeyjump.mamba.texts import Documents, hold_out, iterate, read_documents
from monkeyjump.tasks import InputError

WIKI = " \n = One = \n \n text of one \n = = Part = = \n more \n = Two = \n \n text of two \n"


def test_documents_are_files_rows_and_articles(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffä plain text", encoding="utf-8")
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "row 1", "n": 1}\n\n{"text": " "}\n{"text": "row 3"}\n')
    (tmp_path / "deep" / "c.TXT").write_text(WIKI)
    (tmp_path / "ignored.csv").write_text("x")
    one, two = WIKI[2 : WIKI.index(" = Two")], WIKI[WIKI.index(" = Two") :]
    found = read_documents([str(tmp_path)])
    assert found.texts == ["ä plain text", "row 1", "row 3", one, two]
    assert list(iterate([str(tmp_path / "deep" / "c.TXT")])) == [WIKI]
    assert found.bytes == sum(len(text.encode()) for text in found.texts)
    other = Documents([*found.texts[:-2], one + two], "")
    assert found.fingerprint == read_documents([str(tmp_path)]).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", " \n", "empty.txt: no text in it"),
        ("rows.jsonl", '{"body": "x"}', "rows.jsonl, row 1: field 'text' is None, not a text"),
        ("rows.jsonl", "{", "rows.jsonl, row 1: not JSON"),
        ("bad.txt", b"ok\n\xff", "bad.txt, line 2: byte 0xff is not UTF-8"),
        ("folder/x.csv", "x", "folder: no .txt or .jsonl file in this folder"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: str | bytes, words: str):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_documents([str(path.parent if name.startswith("folder") else path)])
    assert words in str(caught.value)


def test_of_many_documents_whole_ones_are_held_out():
    texts = [f"document {n} " + "x" * (n % 7) for n in range(200)]
    train, held = hold_out(Documents(texts, "here"), 0.1, seed=1)
    assert sorted(train.texts + held.texts) == sorted(texts)
    assert sum(map(len, held.texts)) == pytest.approx(0.1 * sum(map(len, texts)), rel=0.1)
    assert hold_out(Documents(texts, "here"), 0.1, seed=1)[1].texts == held.texts
    assert hold_out(Documents(texts, "here"), 0.1, seed=2)[1].texts != held.texts


@pytest.mark.parametrize("text", ["".join(f"line {n}\n" for n in range(300)), " ".join("word" for _ in range(500))])
def test_of_few_documents_the_ends_are_held_out(text: str):
    train, held = hold_out(Documents([text, text], "here"), 0.1, seed=0)
    assert [a + b for a, b in zip(train.texts, held.texts)] == [text, text]
    assert len(held.texts[0]) == pytest.approx(0.1 * len(text), abs=10)
    assert train.texts[0].endswith(("\n", "word"))


def test_the_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(["the cat and the dog and the cat"] * 3, 265, 64)
    assert len(tokenizer) == 265
    text = "  the cat —\n\n\t第二 \U0001f63a \x00 <|endo"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("the cat")["input_ids"] != [*b"the cat"]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id} == {0}
    assert tokenizer.pad_token_id == 1


def test_more_tokens_than_the_text_gives_are_refused():
    with pytest.raises(InputError, match=r"vocab_size = 400: the text gives no more than 2\d\d tokens") as caught:
        train_tokenizer(["the cat"], 400, 64)
    assert "vocab_size=2" in caught.value.hint


def test_the_stream_has_an_end_around_each_document():
    tokenizer = train_tokenizer(["ab ab"] * 3, 260, 64)
    first, second = (tokenizer(text)["input_ids"] for text in ("ab", "ab c"))
    assert encode(tokenizer, ["ab", "ab c"]).tolist() == [0, *first, 0, *second, 0]


def test_an_epoch_predicts_each_token_of_its_part_once():
    stream = np.arange(100, dtype=np.int32)
    windows = Windows(stream, 10, 3 * 10, seed=5)
    assert windows.per_epoch == 10
    first_tokens = set()
    for epoch in range(3):
        items = [windows[epoch * 10 + n] for n in range(10)]
        predicted = sorted(label for item in items for label in item["labels"].tolist()[1:])
        assert predicted == list(range(predicted[0], predicted[0] + 90))
        assert all(torch.equal(item["labels"][1:], item["input_ids"][1:]) for item in items)
        assert all(item["labels"][0] == -100 for item in items)
        first_tokens.add(predicted[0])
    assert len(first_tokens) > 1  # another offset each time
    again = Windows(stream, 10, 30, seed=5)
    assert all(torch.equal(again[n]["input_ids"], windows[n]["input_ids"]) for n in (29, 3, 15))
    assert windows.where(0) == f"tokens {windows.start(0)} to {windows.start(0) + 9} of the text"


@pytest.mark.parametrize("tokens", [10, 11, 19, 20])
def test_a_short_stream_gives_what_it_has(tokens: int):
    windows = Windows(np.arange(tokens), 10, 4, seed=0)
    assert windows.per_epoch == 1
    assert all(len(windows[n]["input_ids"]) == 10 for n in range(4))


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="context_length = 10: the training text has only 9 tokens"):
        Windows(np.arange(9), 10, 4, seed=0)


def test_the_trainer_reads_the_windows_in_their_order_and_decays_matrices_alone(tmp_path: Path):
    settings = pretraining_config(batch_size=2, context_length=10, max_steps=3)
    windows = Windows(np.arange(100) % 60, 10, 6, seed=0)
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1))
    arguments = training_arguments(settings, 3, tmp_path)
    trainer = WindowTrainer(model=model, args=arguments, train_dataset=windows, data_collator=collate)
    rows = [batch["row_ids"].tolist() for batch in trainer.get_train_dataloader()]
    assert rows == [[0, 1], [2, 3], [4, 5]]
    kept = {name.rpartition("backbone.")[2] for name, _ in model.named_parameters()}
    kept -= {name.rpartition("backbone.")[2] for name in trainer.get_decay_parameter_names(model)}
    assert kept == {
        "layers.0.norm.weight", "layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.conv1d.bias",
        "layers.0.mixer.dt_proj.bias", "norm_f.weight",
    }  # fmt: skip


def test_the_readmes_names_and_values():
    found = training_config("mamba-readme").model_dump()
    readme = {
        "d_model": 256, "n_layers": 4, "vocab_size": 1000, "batch_size": 16, "learning_rate": 1e-4, "num_epochs": 10,
        "importance_threshold": 0.5, "peft_application_ratio": 0.3, "peft_r": 16, "peft_alpha": 32,
        "masking_tau": 0.5, "target_sparsity": 0.3, "sparsity_weight": 1e-5, "scan_update_frequency": 1000,
    }  # fmt: skip
    assert {name: found[name] for name in readme} == readme


@pytest.mark.parametrize("preset", PRESETS)
def test_a_length_takes_the_place_of_the_presets(preset: str):
    lengths = [
        (c.num_epochs, c.minutes, c.max_steps)
        for c in (pretraining_config(preset, **{name: 3}) for name in ("num_epochs", "minutes", "max_steps"))
    ]
    assert lengths == [(3, None, None), (None, 3, None), (None, None, 3)]


@pytest.mark.parametrize(
    ("preset", "changes", "words", "hint"),
    [
        ("laptp", {}, "unknown preset 'laptp'", "'laptop'"),
        ("laptop", {"learning_rat": 1}, "unknown field 'learning_rat' = 1", "'learning_rate'"),
        ("laptop", {"peft_r": 8}, "unknown field 'peft_r'", ""),  # of a later command
        ("laptop", {"d_model": 0}, "d_model = 0: input should be greater", ""),
        ("laptop", {"seed": True}, "seed = True: a number is needed", ""),
        ("laptop", {"scheduler": "cosin"}, "did you mean 'cosine'", ""),
        ("laptop", {"minutes": 1, "max_steps": 2}, "minutes and max_steps set: say how long with exactly one", ""),
    ],
)
def test_wrong_settings(preset: str, changes: dict, words: str, hint: str):
    with pytest.raises(InputError) as caught:
        pretraining_config(preset, **changes)
    assert words in str(caught.value)
    assert hint in caught.value.hint
