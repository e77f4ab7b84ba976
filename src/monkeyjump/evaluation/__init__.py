"""Evaluation: scoring of closed answers, generation, intervals, tables."""

from monkeyjump.evaluation.choices import choice_scores
from monkeyjump.evaluation.generation import generate_answers
from monkeyjump.evaluation.intervals import Estimate, accuracy, paired_difference
from monkeyjump.evaluation.questions import Question, Questions
from monkeyjump.evaluation.routing import Spread, spread
from monkeyjump.evaluation.scoring import Answers, Correct, answer, tokens_of
from monkeyjump.evaluation.table import accuracy_table, routing_table

__all__ = [
    "Answers",
    "Correct",
    "Estimate",
    "Question",
    "Questions",
    "Spread",
    "accuracy",
    "accuracy_table",
    "answer",
    "choice_scores",
    "generate_answers",
    "paired_difference",
    "routing_table",
    "spread",
    "tokens_of",
]
