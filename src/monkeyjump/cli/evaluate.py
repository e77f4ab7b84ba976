"""`monkeyjump evaluate`: its options, and its tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError, near_miss

if TYPE_CHECKING:
    from monkeyjump.evaluation.comparison import Line
    from monkeyjump.evaluation.results import TaskResult
    from monkeyjump.training.subject import Subject

BASE = "base"

Tasks = Annotated[
    list[str] | None,
    typer.Option(help="Names or YAML files; repeat for several. Default: the run's own; only a run has any."),
]
BaseModel = Annotated[
    str | None, typer.Option("--model", help="Base model of an adapter alone. Default: the one that its config names.")
]


def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, of an adapter, of a model, or of runs METHOD-seedN.")
    ],
    tasks: Tasks = None,
    suite: Annotated[
        str | None, typer.Option(help="A suite of tasks: mamba (CNN/DailyMail, HotpotQA, HumanEval).")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes (pass@1), in a sandbox.")
    ] = False,
    model: BaseModel = None,
    against: Annotated[
        str | None,
        typer.Option(help="Paired differences against another run or adapter, 'base' (the untouched model), a METHOD."),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model write closed answers, too.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many test rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm-eval instead, such as arc_easy,piqa.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
    debug: Debug = False,
) -> int:
    """Score a run on its test rows, with intervals, and against other runs on the same rows.

    Closed answers are weighed by log-likelihood (and, with --generate, written as well); free answers are
    written. Numbers, answers and rows go into RUN/evaluation. What was evaluated already is not done again.
    A folder of runs gives one table over seeds for each method. An adapter without effect is refused.
    A folder that save_pretrained wrote is enough, with --tasks or --suite: an adapter's, or a whole model's such as
    `mamba pretrain`, `adapt` and `shrink` make.

    Examples:

      monkeyjump evaluate runs/mine --against base

      monkeyjump evaluate runs/sweep

      monkeyjump evaluate runs/mine --tasks boolq --tasks my-task.yaml --generate

      monkeyjump evaluate my-adapter --model ./llama --tasks boolq

      monkeyjump evaluate runs/mamba-adapted --against runs/mamba --suite mamba --allow-code
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.evaluation.sandbox import allow_code as allowing
    from monkeyjump.training.folder import is_run
    from monkeyjump.training.subject import is_subject

    quiet()
    screen = Screen()
    if model is not None and is_run(run):
        raise InputError(f"--model: the run in {run} has its own", hint="leave --model out")
    if lm_eval is not None:
        from monkeyjump.evaluation.bridge import run_lm_eval
        from monkeyjump.training.subject import open_subject

        subject = open_subject(run, model, lm_eval.split(","))
        screen.say(run_lm_eval(subject, lm_eval.split(","), limit, batch_size))
        return 0
    show = _Show(screen, as_json, markdown)
    names = (*(tasks or ()), *(_suite(suite, allow_code, screen) if suite else ()))
    asked = _Asked(names, model, limit, batch_size, generate)
    with allowing(allow_code):
        if is_subject(run):
            _one(run, against, asked, show)
        else:
            _many(run, against, asked, show)
    return 0


def _suite(name: str, allow_code: bool, screen: Screen) -> list[str]:
    """The tasks of a suite, those that run code only where that is allowed."""
    from monkeyjump.tasks.listing import mamba_suite

    if name != "mamba":
        raise InputError(f"--suite: unknown suite '{name}'", hint=near_miss(name, ["mamba"], "suites"))
    found = mamba_suite()
    for task in found:
        if task.code is not None and not allow_code:
            screen.note(f"{task.name} is left out: it runs code that the model writes; --allow-code asks for it")
    return [task.name for task in found if allow_code or task.code is None]


@dataclass(frozen=True)
class _Asked:
    """The options that say what is computed."""

    tasks: tuple[str, ...]
    model: str | None
    limit: int | None
    batch_size: int
    write: bool

    def results(self, folder: Path, screen: Screen, base: bool = False) -> list[TaskResult]:
        from monkeyjump.evaluation.run import evaluate

        return evaluate(self.subject(folder), screen, self.limit, self.batch_size, self.write, base)

    def subject(self, folder: Path) -> Subject:
        from monkeyjump.training.subject import open_subject

        return open_subject(folder, self.model, self.tasks)


class _Show:
    """Tables on the screen, Markdown, or everything as one JSON object at the end."""

    def __init__(self, screen: Screen, as_json: bool, markdown: bool) -> None:
        self.screen, self.as_json, self.markdown = screen, as_json, markdown

    def scores(self, results: list[TaskResult], title: str) -> None:
        from monkeyjump.evaluation.table import score_markdown, score_table

        if self.markdown:
            self.screen.say(score_markdown(results))
        elif not self.as_json:
            self.screen.out.print(score_table(results, title))

    def lines(self, lines: list[Line], first: str, second: str) -> None:
        from monkeyjump.evaluation.comparison import as_markdown
        from monkeyjump.evaluation.table import comparison_table

        if self.markdown:
            self.screen.say(as_markdown(lines, first, second))
        elif not self.as_json:
            self.screen.out.print(comparison_table(lines, first, second))

    def record(self, record: dict) -> None:
        if self.as_json:
            from monkeyjump.training.folder import to_json

            print(to_json(record))


def _one(run: Path, against: str | None, asked: _Asked, show: _Show) -> None:
    from monkeyjump.evaluation.comparison import compare
    from monkeyjump.evaluation.results import record_of
    from monkeyjump.evaluation.run import check_base
    from monkeyjump.training.subject import is_adapter

    other = _other(run, against)
    if against == BASE:
        check_base(asked.subject(run))  # before the folder itself is evaluated
    results = asked.results(run, show.screen)
    record = {"tasks": [record_of(one) for one in results]}
    if against is None:
        show.scores(results, str(run))
    else:
        if not is_adapter(other):  # --model is for adapters alone
            asked = replace(asked, model=None)
        first = asked.results(other, show.screen, base=against == BASE)
        lines = compare(first, results)
        show.lines(lines, against, run.name)
        record["against"] = [vars(line) | {"difference": vars(line.difference)} for line in lines]
    show.record(record)


def _other(run: Path, against: str | None) -> Path:
    if against in (None, BASE):
        return run
    from monkeyjump.training.subject import is_subject

    assert against is not None
    if not is_subject(Path(against)):
        raise InputError(
            f"--against: {against} is not the folder of a run, adapter or model",
            hint="or write base: the untouched model",
        )
    return Path(against)


def _many(folder: Path, against: str | None, asked: _Asked, show: _Show) -> None:
    from monkeyjump.evaluation.comparison import compare_over_seeds, groups_of

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="give what output.folder of a run says")
    groups = groups_of(folder)
    reference = against or min(groups, key=lambda name: (name.startswith("mj-"), name))
    if reference not in groups:
        raise InputError(
            f"--against: no method '{reference}' in {folder}", hint=near_miss(reference, groups, "methods")
        )
    results = {
        name: {seed: asked.results(run, show.screen) for seed, run in runs.items()} for name, runs in groups.items()
    }
    record = {}
    for name, by_seed in results.items():
        if name == reference:
            continue
        seeds = sorted(by_seed.keys() & results[reference].keys())
        if not seeds:
            raise InputError(
                f"{folder}: {name} and {reference} have no seed in common", hint="train both with the same"
            )
        lines = compare_over_seeds([(results[reference][seed], by_seed[seed]) for seed in seeds])
        show.lines(lines, reference, name)
        record[name] = [vars(line) | {"difference": vars(line.difference)} for line in lines]
    if not record:
        for seed, one in results[reference].items():
            show.scores(one, f"{reference}, seed {seed}")
    if not show.as_json and not show.markdown and record:
        show.screen.say(
            "Means over the seeds, each pair on the same rows; intervals are Student's over the seeds and say what "
            "another seed would give on these rows."
        )
    show.record({"reference": reference, "differences": record})
