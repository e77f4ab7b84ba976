"""Perplexity of a saved model on files: what `monkeyjump mamba perplexity` does."""

from __future__ import annotations

from collections.abc import Sequence

from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.perplexity import Perplexity, check_window, perplexity
from monkeyjump.mamba.texts import iterate
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import check_model, load_tokenizer


def score(model: str, text: Sequence[str], window: int, stride: int, batch_size: int, join: bool = False) -> Perplexity:
    """Documents are read and scored one at a time.

    Args:
        model: folder or Hub id of a causal language model.
        text: see `texts.iterate`.
        join: the documents are lines of one text.

    Raises:
        InputError: before the model is loaded, for names and numbers that are wrong; text that is not there.
    """
    check_window(window, stride)
    documents = iterate(text)
    check_model(model)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    longest = getattr(loaded.config, "max_position_embeddings", None)  # Mamba has none: any length
    if longest is not None and window > longest:
        raise InputError(f"window = {window}: {model} reads no more than {longest} tokens", hint=f"--window {longest}")
    return perplexity(loaded, tokenizer, ["".join(documents)] if join else documents, window, stride, batch_size)
