"""Perplexity of any causal language model with a sliding window, over text of any length.

    ids       p x1 x2 ... xN            p: the beginning-of-text token, where the tokenizer has one
    window k  inputs ids[k S : k S + W]
    scored    window 0 all its predictions, every later one its last S

So each token is scored once, and each after the first window with more than W - S tokens before it. A text that
fits into one window is scored in one pass. Logits are made for the scored places of one batch of windows only:
memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from monkeyjump.tasks.errors import InputError


@dataclass(frozen=True)
class Perplexity:
    """Sums over the scored tokens; several add up. `nll` is in nats."""

    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(
            self.nll + other.nll, self.tokens + other.tokens, self.bytes + other.bytes, self.words + other.words
        )

    @property
    def per_token(self) -> float:
        """exp of the mean loss: of this tokenizer alone."""
        return math.exp(self.nll / self.tokens)

    @property
    def per_byte(self) -> float:
        """Comparable across tokenizers."""
        return math.exp(self.nll / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nll / self.bytes / math.log(2)

    @property
    def per_word(self) -> float:
        """Words as split at white space: what WikiText results state. Of a long word, infinite."""
        return math.exp(min(self.nll / self.words, 700.0))

    def record(self) -> dict[str, float]:
        return {
            "perplexity": self.per_token,
            "perplexity_per_byte": self.per_byte,
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_word": self.per_word,
            "loss": self.nll / self.tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, texts: str | Iterable[str], window: int = 512, stride: int = 256, batch_size: int = 8
) -> Perplexity:
    """The model's perplexity on each of `texts`, added up. The context of one never comes from another.

    Args:
        texts: one text, or documents, read one at a time.
        window: tokens that the model sees at once.
        stride: new tokens of each further window; `window` itself is fastest, and gives the least context.
        batch_size: windows per forward pass.

    Raises:
        InputError: window or stride out of range, or no token to score.
    """
    check_window(window, stride)
    training = model.training
    model.eval()
    total = Perplexity()
    try:
        for text in [texts] if isinstance(texts, str) else texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            start = tokenizer.bos_token_id
            stream = np.array(ids if start is None else [start, *ids], dtype=np.int64)
            nll = sum(float(part) for part in _losses(model, stream, window, stride, batch_size))
            scored = max(len(stream) - 1, 0)
            total += Perplexity(nll, scored, len(text.encode()), len(text.split()))
    finally:
        model.train(training)
    if not total.tokens:
        raise InputError("the text has no token to score", hint="give a longer text")
    return total


def check_window(window: int, stride: int) -> None:
    if window < 2:
        raise InputError(f"window = {window}: a window has at least 2 tokens")
    if not 1 <= stride <= window:
        raise InputError(f"stride = {stride}: it must be from 1 to the window, {window}")


def _losses(model: Any, ids: np.ndarray, window: int, stride: int, batch_size: int) -> Iterator[Tensor]:
    """Summed loss of each batch of windows. `ids` `[N + 1]`; the first one is not scored."""
    places = len(ids) - 1
    if places < 1:
        return
    yield _loss(model, ids[None, : window + 1], min(window, places))
    starts = np.arange(stride, max(places - window, 0) + stride, stride)
    full = starts[starts + window <= places]
    for group in range(0, len(full), batch_size):
        rows = full[group : group + batch_size, None] + np.arange(window + 1)
        yield _loss(model, ids[rows], stride)
    for start in starts[len(full) :].tolist():  # at most one, shorter than the window
        yield _loss(model, ids[None, start:], places - start - (window - stride))


def _loss(model: Any, ids: np.ndarray, scored: int) -> Tensor:
    """Summed loss of the last `scored` of the tokens `[B, T + 1]`, each predicted from those before it."""
    tokens = torch.from_numpy(ids).to(model.device)
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=scored, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, -scored:].flatten(), reduction="sum").double()


def unigram_perplexity(counts: np.ndarray, tokenizer: Any, texts: Iterable[str]) -> Perplexity:
    """What knowing nothing but how often each token comes gives: add-one smoothed `counts` `[V]` of another text."""
    logs = np.log(counts + 1) - math.log(counts.sum() + len(counts))
    total = Perplexity()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += Perplexity(float(-logs[ids].sum()), len(ids), len(text.encode()), len(text.split()))
    return total
