"""`monkeyjump mamba perplexity`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from monkeyjump.cli.mamba.settings import TEXT_HELP
from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen

if TYPE_CHECKING:
    from monkeyjump.mamba.perplexity import Perplexity


def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of `pretrain`, any other, or a Hub id.")],
    text: Annotated[list[str], typer.Argument(metavar="TEXT", help=TEXT_HELP)],
    window: Annotated[
        int | None, typer.Option(help="Tokens that the model sees at once: 1024, or as many as it has positions.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="New tokens of each further window; half a window.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    join: Annotated[
        bool, typer.Option("--join", help="Rows are lines of one text, not documents (WikiText of the Hub).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    debug: Debug = False,
) -> int:
    """Perplexity of a language model on text, with a sliding window.

    Every token is scored once; after the first window each has at least window - stride tokens before it. Memory
    does not grow with the text: books are scored like lines. Documents do not see each other. Per byte (and bits
    per byte) compares models of different tokenizers; WikiText results are stated per word.

    Examples:

      monkeyjump mamba perplexity runs/mamba wikitext-2/test.txt

      monkeyjump mamba perplexity runs/mamba deepmind/pg19::test --window 8192 --stride 4096

      monkeyjump mamba perplexity state-spaces/mamba-130m-hf Salesforce/wikitext:wikitext-2-raw-v1:test --join
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.scoring import score

    quiet()
    found, window, stride = score(model, text, window, stride, batch_size, join)
    if as_json:
        print(json.dumps({"model": model, "text": text, "window": window, "stride": stride, **found.record()}))
    else:
        _show_perplexity(found, Screen())
    return 0


def _show_perplexity(found: Perplexity, screen: Screen) -> None:
    screen.say(f"{found.tokens:,} tokens, {found.bytes:,} bytes, {found.words:,} words")
    screen.say(f"perplexity per token  {found.per_token:.3f}")
    screen.say(f"perplexity per byte   {found.per_byte:.4f}  ({found.bits_per_byte:.4f} bits per byte)")
    screen.say(f"perplexity per word   {found.per_word:.2f}")
