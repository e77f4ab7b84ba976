"""Evaluation: scoring of closed answers, intervals, tables."""

from .choices import choice_scores
from .intervals import Estimate, accuracy, paired_difference
from .routing import Spread, spread
from .scoring import Correct, evaluate
from .table import accuracy_table, routing_table

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
