"""A model of 2 layers with a word tokenizer, and tasks of a few rows, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s> default words here </s>{% endif %}"
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)
WORDS = (
    "default words here good bad fine poor film food was the is it this positive or negative ? "
    "user assistant system Review :"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word; </s> ends a turn and is the padding too, as in many chat models."""
    words = ["<unk>", "<s>", "</s>", *WORDS.split(), *(str(n) for n in range(100))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = template
    return fast


def model(words: int = 140) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path) -> Path:
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count: int = 24) -> list[dict[str, object]]:
    """Alternating labels; a number makes each text its own; three lengths."""
    sides = (("good", "positive"), ("bad", "negative"))
    return [
        {"sentence": f"{'the ' * (n % 3)}film {n} was {sides[n % 2][0]}", "mark": sides[n % 2][1]} for n in range(count)
    ]


def write_lines(path: Path, values: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def write_task(folder: Path, name: str = "films", data: list[dict[str, object]] | None = None, more: str = "") -> Path:
    write_lines(folder / f"{name}.jsonl", rows() if data is None else data)
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\n"
        f"source: {{kind: files, train: {name}.jsonl}}\n"
        "columns: {text: sentence, label: mark}\n"
        'instruction: "Review : {text} is this positive or negative ?"\n'
        "choices: [positive, negative]\n"
        "balanced: true\nsizes: {small: {train: 16, test: 8}}\n" + more,
        encoding="utf-8",
    )
    return path
