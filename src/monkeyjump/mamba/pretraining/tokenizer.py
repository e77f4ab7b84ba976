"""A byte-level BPE of our own: any text is a sequence of its tokens, and decoding gives the text back."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from monkeyjump.tasks.errors import InputError

END, PAD = "<|endoftext|>", "<|pad|>"  # between documents; beside shorter ones in a batch


def train_tokenizer(texts: Iterable[str], vocab_size: int, context_length: int) -> PreTrainedTokenizerFast:
    """Merges are learned on `texts`.

    Raises:
        InputError: the texts do not give so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise InputError(
            f"vocab_size = {vocab_size}: the text gives no more than {found} tokens",
            hint=f"give more text, or set vocab_size={found}",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",  # a generating model goes on from the last token
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
