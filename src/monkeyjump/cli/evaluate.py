"""`monkeyjump evaluate`: its options, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError, near_miss

if TYPE_CHECKING:
    from monkeyjump.evaluation.comparison import Line
    from monkeyjump.evaluation.results import TaskResult

BASE = "base"


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a folder of runs METHOD-seedN.")],
    tasks: Annotated[
        list[str] | None, typer.Option(help="Other tasks than the run's own: names or YAML files; repeat for several.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Paired differences against another run, 'base' (the untouched model), or a METHOD."),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model write closed answers, too.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many test rows of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm-eval instead, such as arc_easy,piqa.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The comparison as a Markdown table.")] = False,
    debug: Debug = False,
) -> int:
    """Score a run on its test rows, with intervals, and against other runs on the same rows.

    Closed answers are weighed by log-likelihood (and, with --generate, written as well); free answers are
    written. Numbers, answers and rows go into RUN/evaluation. What was evaluated already is not done again.
    A folder of runs gives one table over seeds for each method. An adapter without effect is refused.

    Examples:

      monkeyjump evaluate runs/mine --against base

      monkeyjump evaluate runs/sweep

      monkeyjump evaluate runs/mine --tasks boolq --tasks my-task.yaml --generate
    """
    from monkeyjump.cli.quiet import quiet

    quiet()
    screen = Screen()
    if lm_eval is not None:
        from monkeyjump.evaluation.bridge import run_lm_eval

        screen.say(run_lm_eval(run, lm_eval.split(","), limit, batch_size))
        return 0
    show = _Show(screen, as_json, markdown)
    asked = (tuple(tasks or ()), limit, batch_size, generate)
    if (run / "config.yaml").is_file():
        _one(run, against, asked, show)
    else:
        _many(run, against, asked, show)
    return 0


Asked = tuple[tuple[str, ...], int | None, int, bool]


class _Show:
    """Tables on the screen, Markdown, or everything as one JSON object at the end."""

    def __init__(self, screen: Screen, as_json: bool, markdown: bool) -> None:
        self.screen, self.as_json, self.markdown = screen, as_json, markdown

    def scores(self, results: list[TaskResult], title: str) -> None:
        from monkeyjump.evaluation.table import score_table

        if not self.as_json and not self.markdown:
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
            print(json.dumps(record, indent=1))


def _one(run: Path, against: str | None, asked: Asked, show: _Show) -> None:
    from monkeyjump.evaluation.comparison import compare
    from monkeyjump.evaluation.results import record_of
    from monkeyjump.evaluation.run import evaluate_run

    tasks, limit, size, write = asked
    other = _other(run, against)
    results = evaluate_run(run, show.screen, tasks, limit, size, write)
    record = {"tasks": [record_of(one) for one in results]}
    show.scores(results, str(run))
    if against is not None:
        first = evaluate_run(other, show.screen, tasks, limit, size, write, base=against == BASE)
        lines = compare(first, results)
        show.lines(lines, against, run.name)
        record["against"] = [vars(line) | {"difference": vars(line.difference)} for line in lines]
    show.record(record)


def _other(run: Path, against: str | None) -> Path:
    if against in (None, BASE):
        return run
    assert against is not None
    if not (Path(against) / "config.yaml").is_file():
        raise InputError(f"--against: {against} is not the folder of a run", hint="or write base: the untouched model")
    return Path(against)


def _many(folder: Path, against: str | None, asked: Asked, show: _Show) -> None:
    from monkeyjump.evaluation.comparison import compare_over_seeds, groups_of
    from monkeyjump.evaluation.run import evaluate_run

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="give what output.folder of a run says")
    groups = groups_of(folder)
    reference = against or min(groups, key=lambda name: (name.startswith("mj-"), name))
    if reference not in groups:
        raise InputError(
            f"--against: no method '{reference}' in {folder}", hint=near_miss(reference, groups, "methods")
        )
    tasks, limit, size, write = asked
    results = {
        name: {seed: evaluate_run(run, show.screen, tasks, limit, size, write) for seed, run in runs.items()}
        for name, runs in groups.items()
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
