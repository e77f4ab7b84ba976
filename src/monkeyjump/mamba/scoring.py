"""Perplexity of a saved model on files: what `monkeyjump mamba perplexity` does."""

from __future__ import annotations

from collections.abc import Sequence

from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.perplexity import Perplexity, check_window, perplexity
from monkeyjump.mamba.texts import iterate
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import check_model, load_tokenizer

WINDOW = 1024  # tokens, where the model has no fewer positions


def score(
    model: str, text: Sequence[str], window: int | None, stride: int | None, batch_size: int, join: bool = False
) -> tuple[Perplexity, int, int]:
    """The perplexity, and the window and stride that it was taken with. Documents are read and scored one at a time.

    Args:
        model: folder or Hub id of a causal language model.
        text: see `texts.iterate`.
        window: None: 1024, or as many tokens as the model has positions.
        stride: None: half a window.
        join: the documents are lines of one text.

    Raises:
        InputError: before the model is loaded, for names and numbers that are wrong; text that is not there.
    """
    if window is not None:
        check_window(window, _stride(window, stride))
    documents = iterate(text)
    check_model(model)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    longest = getattr(loaded.config, "max_position_embeddings", None)  # Mamba has none: any length
    if window is None:
        window = min(WINDOW, longest or WINDOW)
        check_window(window, _stride(window, stride))
    elif longest is not None and window > longest:
        raise InputError(f"window = {window}: {model} reads no more than {longest} tokens", hint=f"--window {longest}")
    stride = _stride(window, stride)
    texts = ["".join(documents)] if join else documents
    return perplexity(loaded, tokenizer, texts, window, stride, batch_size), window, stride


def _stride(window: int, given: int | None) -> int:
    return max(window // 2, 1) if given is None else given
