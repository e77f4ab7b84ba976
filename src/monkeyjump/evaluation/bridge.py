"""lm-eval's own tasks, with our loaded model: a thin wrapper, nothing of theirs is copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monkeyjump.evaluation.run import FOLDER, load_adapted, open_finished
from monkeyjump.tasks import InputError
from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.models import load_tokenizer
from monkeyjump.training.folder import write_json
from monkeyjump.training.models import place_of


def run_lm_eval(folder: Path, tasks: Sequence[str], limit: int | None, batch_size: int) -> str:
    """Runs lm-eval's tasks; its table as text. Results go into the run's folder.

    Raises:
        InputError: lm-eval is not installed, or the run routes whole sequences, of which lm-eval does not say
            where the prompt ends.
    """
    config = open_finished(folder)
    granularity = config.method.options.get("granularity", "token")
    if config.method.routed and granularity != "token":
        raise InputError(
            f"--lm-eval: granularity={granularity!r} decides on the prompt, which lm-eval does not mark",
            hint="use --tasks with a task of your own, or a run with granularity=token",
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(
            f"--lm-eval needs the lm-eval package: {error}", hint="python -m pip install 'monkeyjump[eval]'"
        ) from error
    place = place_of(config.model)
    model = load_adapted(config, folder, place)
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(place), batch_size=batch_size)
    found: Any = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)
    write_json(folder / FOLDER / "lm_eval" / "results.json", found["results"])
    table = make_table(found)
    write_in_one_piece(folder / FOLDER / "lm_eval" / "results.md", table)
    return table
