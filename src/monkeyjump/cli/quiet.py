"""Libraries that report on their own, kept to errors: progress and warnings of a run are shown by us."""

from __future__ import annotations

import warnings

import transformers


def quiet() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by names about to go
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
