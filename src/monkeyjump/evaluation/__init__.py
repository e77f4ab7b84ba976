"""Evaluation: scoring of closed answers, intervals, tables."""

from monkeyjump.evaluation.choices import choice_scores
from monkeyjump.evaluation.intervals import Estimate, accuracy, paired_difference
from monkeyjump.evaluation.routing import Spread, spread
from monkeyjump.evaluation.scoring import Correct, evaluate
from monkeyjump.evaluation.table import accuracy_table, routing_table

__all__ = [
    "Correct",
    "Estimate",
    "Spread",
    "accuracy",
    "accuracy_table",
    "choice_scores",
    "evaluate",
    "paired_difference",
    "routing_table",
    "spread",
]
