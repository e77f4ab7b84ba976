"""Perplexity: every token once, with the context that is promised, in memory that does not grow."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from monkeyjump.cli import app
from monkeyjump.mamba.perplexity import Perplexity, perplexity, unigram_perplexity
from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer
from monkeyjump.tasks import InputError
from tiny import llama

TEXT = "The cat sat on the mat — and the 第二 dog, it did not. " * 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT * 3], 270, 64)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(vocab_size=270, max_position_embeddings=512)


def reference(model: Any, tokenizer: Any, text: str, window: int, stride: int) -> float:
    """Token by token, as the definition says, one forward pass each. In nats."""
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    total = 0.0
    for place in range(1, len(ids)):
        later = max(0, math.ceil((place - window) / stride))  # windows that must have begun before
        context = ids[later * stride : place]
        assert len(context) == place or len(context) > window - stride
        logits = model(torch.tensor([context])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[place]].item()
    return total


@pytest.mark.parametrize(
    ("window", "stride", "batch"), [(16, 4, 3), (16, 16, 2), (9, 1, 64), (24, 7, 1), (200, 100, 4), (86, 3, 2)]
)
def test_it_is_what_the_definition_says(model, tokenizer, window: int, stride: int, batch: int):
    found = perplexity(model, tokenizer, TEXT, window, stride, batch)
    ids = tokenizer(TEXT)["input_ids"]
    assert (found.tokens, found.bytes, found.words) == (len(ids), len(TEXT.encode()), len(TEXT.split()))
    assert found.nll == pytest.approx(reference(model, tokenizer, TEXT, window, stride), rel=1e-5)


def test_a_text_that_fits_is_scored_in_one_pass(model, tokenizer):
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]])
    loss = model(ids, labels=ids).loss.item()
    found = perplexity(model, tokenizer, TEXT, ids.shape[1] - 1, 1)
    assert found.per_token == pytest.approx(math.exp(loss), rel=1e-5)
    nll = loss * (ids.shape[1] - 1)
    assert found.per_byte == pytest.approx(math.exp(nll / len(TEXT.encode())), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / len(TEXT.encode()) / math.log(2), rel=1e-5)
    assert found.per_word == pytest.approx(math.exp(nll / len(TEXT.split())), rel=1e-4)


def test_mamba_too_and_the_mode_stays(tokenizer):
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=270, hidden_size=16, num_hidden_layers=2)).train()
    found = perplexity(model, tokenizer, TEXT, 20, 8, 2)
    assert model.training
    assert found.nll == pytest.approx(reference(model.eval(), tokenizer, TEXT, 20, 8), rel=1e-5)


def test_documents_are_added_up_and_do_not_see_each_other(model, tokenizer):
    texts = [TEXT, "a", "", TEXT[::-1]]
    alone = [perplexity(model, tokenizer, text, 16, 8) for text in texts if text]
    together = perplexity(model, tokenizer, iter(texts), 16, 8)
    assert together.nll == pytest.approx(sum(one.nll for one in alone), rel=1e-6)
    assert together.tokens == sum(one.tokens for one in alone)


def test_logits_are_made_for_one_batch_of_scored_places_only(model, tokenizer):
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:2].numel()))
    try:
        found = perplexity(model, tokenizer, TEXT * 40, 16, 4, 8)
    finally:
        hook.remove()
    assert found.tokens > 2000
    assert max(sizes) == 8 * 4
    assert sum(sizes) == found.tokens


def test_the_unigram(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    counts = Counter(tokenizer("the cat the dog")["input_ids"])
    expected = sum(math.log((counts[i] + 1) / (sum(counts.values()) + 270)) for i in ids)
    array = np.array([counts[i] for i in range(270)])
    found = unigram_perplexity(array, tokenizer, [TEXT])
    assert found.nll == pytest.approx(-expected)
    assert (found.tokens, found.bytes, found.words) == (len(ids), len(TEXT.encode()), len(TEXT.split()))


def test_dropout_is_off_and_half_precision_is_summed_in_float32(tokenizer):
    torch.manual_seed(0)
    model = llama(vocab_size=270, max_position_embeddings=512, attention_dropout=0.5).train()
    found = perplexity(model, tokenizer, TEXT, 16, 8)
    assert found.nll == pytest.approx(reference(model.eval(), tokenizer, TEXT, 16, 8), rel=1e-5)
    half = perplexity(model.bfloat16(), tokenizer, TEXT, 200, 100)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]
    logs = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = -logs.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert half.nll == pytest.approx(expected, rel=1e-5)


def test_without_a_first_token_the_first_of_the_text_is_not_scored(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    ids = tokenizer(TEXT)["input_ids"]
    found = perplexity(model, bare, TEXT, 400, 400)
    loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert (found.tokens, found.per_token) == (len(ids) - 1, pytest.approx(math.exp(loss), rel=1e-5))


def test_sums_add_up_and_are_recorded():
    both = Perplexity(10.0, 4, 20, 3) + Perplexity(6.0, 4, 12, 5)
    assert both == Perplexity(16.0, 8, 32, 8)
    assert both.record() == pytest.approx(
        {
            "perplexity": math.exp(2), "perplexity_per_byte": math.exp(0.5), "perplexity_per_word": math.exp(2),
            "bits_per_byte": 0.5 / math.log(2), "loss": 2.0, "tokens": 8, "bytes": 32,
        }
    )  # fmt: skip
    assert Perplexity(1e6, 8, 32, 1).per_word == pytest.approx(math.exp(700))  # one long word


@pytest.mark.parametrize(
    ("text", "window", "stride", "words"),
    [
        (TEXT, 1, 1, "window = 1: a window has at least 2 tokens"),
        (TEXT, 16, 0, "stride = 0: it must be from 1 to the window, 16"),
        (TEXT, 16, 17, "stride = 17"),
        ("", 16, 8, "no token to score"),
    ],
)
def test_bad_input(model, tokenizer, text: str, window: int, stride: int, words: str):
    with pytest.raises(InputError, match=words):
        perplexity(model, tokenizer, text, window, stride)


@pytest.fixture
def folder(tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "one.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "hub").mkdir()
    rows = "".join(json.dumps({"text": line}) + "\n" for line in ("first line", "", TEXT))
    (tmp_path / "hub" / "test.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["one.txt"], [TEXT]),
        (["one.txt", "hub"], [TEXT, "first line", TEXT]),
        (["hub::test"], ["first line", TEXT]),
        (["hub::test", "--join"], ["first line" + TEXT]),
    ],
)
def test_the_command(folder: Path, model, tokenizer, capsys, arguments: list[str], texts: list[str]):
    code = app.run(["mamba", "perplexity", "model", *arguments, "--window", "16", "--json"])
    out = capsys.readouterr()
    assert code == 0, out.err
    expected = perplexity(model, tokenizer, texts, 16, 8)
    found = json.loads(out.out)
    assert (found["tokens"], found["stride"]) == (expected.tokens, 8)
    assert found["perplexity"] == pytest.approx(expected.per_token, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "none.txt"], "none.txt: no such file or folder"),
        (["model", "one.txt", "--window", "513"], "window = 513: model reads no more than 512 tokens"),
        (["nothing", "one.txt"], "model: 'nothing' cannot be read"),
        (["model", "hub:test"], "hub:test: neither a file nor dataset:config:split"),
        (["model", "hub::wrong", "--window", "16"], "hub[wrong]: cannot be loaded"),
    ],
)
def test_bad_arguments_of_the_command(folder: Path, capsys, arguments: list[str], words: str):
    assert app.run(["mamba", "perplexity", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in next(line for line in lines if line.startswith("error"))
