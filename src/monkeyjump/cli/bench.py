"""`monkeyjump bench`: its options."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monkeyjump.bench.settings import ALL, CANDIDATES, PRESETS, SECTIONS, TARGETS, Settings, Shape, check
from monkeyjump.tasks.errors import InputError

if TYPE_CHECKING:
    from monkeyjump.bench.run import Record
    from monkeyjump.cli.screen import Screen


class DtypeOption(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class PresetOption(str, Enum):
    fig2 = "fig2"


class DeviceOption(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


SHAPE, DEFAULTS = Shape(), Settings()


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hub id, a local folder or a config.json (random weights where it has none). Default: a Llama-like "
            "model with random weights, shaped below."
        ),
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Without --model.")] = SHAPE.hidden_size,
    layers: Annotated[int, typer.Option(help="Without --model.")] = SHAPE.layers,
    heads: Annotated[int, typer.Option(help="Without --model.")] = SHAPE.heads,
    kv_heads: Annotated[
        int | None, typer.Option(help="Without --model; fewer than heads: grouped attention. Default: as many.")
    ] = None,
    intermediate_size: Annotated[int, typer.Option(help="Without --model.")] = SHAPE.intermediate_size,
    vocab_size: Annotated[int, typer.Option(help="Without --model.")] = SHAPE.vocab_size,
    preset: Annotated[
        PresetOption | None,
        typer.Option(
            help="fig2: batch 8, accumulation 2, the methods of the paper's Figure 2; an option given beside it wins."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a training step. Default: 4.")] = None,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = DEFAULTS.length,
    accumulation: Annotated[
        int | None, typer.Option(help="Training steps per optimizer step, for the training minutes. Default: 1.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps that training minutes are for.")] = DEFAULTS.steps,
    dtype: Annotated[DtypeOption, typer.Option(help="Of the base model; adapters are float32.")] = DtypeOption.float32,
    device: Annotated[DeviceOption, typer.Option(help="Where.")] = DeviceOption.cpu,
    rank: Annotated[int, typer.Option(help="r of the low-rank methods.")] = DEFAULTS.rank,
    alpha: Annotated[float, typer.Option(help="Their alpha.")] = DEFAULTS.alpha,
    dropout: Annotated[float, typer.Option(help="On their input.")] = DEFAULTS.dropout,
    targets: Annotated[str, typer.Option(help="Adapted modules, by comma.")] = ",".join(TARGETS),
    experts: Annotated[int, typer.Option(help="Experts of a projection in the mixtures.")] = DEFAULTS.experts,
    top_k: Annotated[int, typer.Option(help="Of them that act on a token; the same for Monkey Jump.")] = DEFAULTS.top_k,
    candidates: Annotated[
        str | None,
        typer.Option(
            help=f"What is compared, by comma: floor, or names of `monkeyjump methods` (PEFT's own as peft-lora and "
            f"peft-adalora); all: all of them. Default: {','.join(CANDIDATES)}."
        ),
    ] = None,
    only: Annotated[str, typer.Option(help="Sections to measure, by comma.")] = ",".join(SECTIONS),
    pairs: Annotated[int, typer.Option(help="Interleaved rounds of every timing.")] = DEFAULTS.pairs,
    warmup: Annotated[int, typer.Option(help="Rounds before them that do not count.")] = DEFAULTS.warmup,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Time AdamW's step within the training step.")] = False,
    input_gradients: Annotated[
        bool,
        typer.Option(
            "--input-gradients", help="Gradients down to the embeddings in all candidates, not only the floor."
        ),
    ] = False,
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one in a round.")] = DEFAULTS.decode_tokens,
    memory_batch: Annotated[
        int | None, typer.Option(help="Rows of the step whose peak memory is measured. Default: 8.")
    ] = None,
    memory_runs: Annotated[int, typer.Option(help="Processes per candidate for that.")] = DEFAULTS.memory_runs,
    center_tokens: Annotated[int, typer.Option(help="States that k-means is timed on.")] = DEFAULTS.center_tokens,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: as it chooses.")] = None,
    seed: Annotated[int, typer.Option(help="Weights and tokens.")] = DEFAULTS.seed,
    output: Annotated[
        Path, typer.Option(help="Where results.json and figure2.png go; older ones there are replaced.")
    ] = Path("runs/bench"),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure what adapters cost in time and memory, side by side with PEFT's own.

    Every round runs each candidate once, in an order that alternates; ratios are taken within a round and
    shown with 95 % intervals. The floor is the frozen model without adapters, gradients flowing through it.
    Sections: step (forward and backward), inference (forward, prefill, decode), saved (bytes kept for the
    backward pass), memory (peak, a process each), size (parameters, files), kmeans (starting the centers).

    Examples:

      monkeyjump bench

      monkeyjump bench --only step,saved --pairs 6

      monkeyjump bench --candidates floor,peft-lora,mj-lora,moelora --only step,saved

      monkeyjump bench --preset fig2 --model ./my-model --dtype bfloat16 --device cuda
    """
    chosen = PRESETS[preset.value] if preset else {}
    settings = Settings(
        model=model,
        shape=Shape(hidden_size, layers, heads, heads if kv_heads is None else kv_heads, intermediate_size, vocab_size),
        batch=_first(batch, chosen.get("batch"), DEFAULTS.batch),
        length=length,
        accumulation=_first(accumulation, chosen.get("accumulation"), DEFAULTS.accumulation),
        dtype=dtype.value,
        device=device.value,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        experts=experts,
        top_k=top_k,
        targets=_list(targets),
        pairs=pairs,
        warmup=warmup,
        optimizer=optimizer,
        input_gradients=input_gradients,
        decode_tokens=decode_tokens,
        memory_batch=_first(memory_batch, chosen.get("memory_batch"), DEFAULTS.memory_batch),
        memory_runs=memory_runs,
        center_tokens=center_tokens,
        steps=steps,
        seed=seed,
        threads=threads,
        candidates=_candidates(candidates) or chosen.get("candidates", CANDIDATES),
        only=_list(only),
    )
    check(settings)
    _check_output(output)
    from monkeyjump.bench.run import run  # as in demo: --help should not wait for torch
    from monkeyjump.cli.screen import Screen

    screen = Screen()
    _show(run(settings, screen), output, screen)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _candidates(text: str | None) -> tuple[str, ...]:
    return ALL if text == "all" else _list(text or "")


def _list(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file", hint="name a folder, which is made if need be")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK):  # found before minutes of measuring
        raise InputError(f"--output: {existing} cannot be written to", hint="name another folder")


def _show(record: Record, output: Path, screen: Screen) -> None:
    from monkeyjump.bench import figure, report

    for table in report.tables(record):
        screen.out.print(table)
        screen.say()
    for line in report.summary_lines(record):
        screen.say(line)
    screen.say(f"Results: {report.write(record, output)}")
    if not figure.can_draw():
        screen.say("No picture: it needs matplotlib (python -m pip install 'monkeyjump[report]')")
    elif figure.draw(report.figure2(record), output / "figure2.png"):
        screen.say(f"Picture: {output / 'figure2.png'}")
