"""Metrics by name. `score("rougeL", answers, accepted)`; `register` adds one's own."""

from monkeyjump.evaluation.metrics.answers import check_packages, squad_normal, vqa_normal
from monkeyjump.evaluation.metrics.code import pass_at_k, score_programs
from monkeyjump.evaluation.metrics.scores import (
    Score,
    Statistic,
    known_metrics,
    mean_score,
    register,
    register_whole,
    score,
    whole_difference,
)
from monkeyjump.evaluation.metrics.whole import perplexity

__all__ = [
    "Score",
    "Statistic",
    "check_packages",
    "known_metrics",
    "mean_score",
    "pass_at_k",
    "perplexity",
    "register",
    "register_whole",
    "score",
    "score_programs",
    "squad_normal",
    "vqa_normal",
    "whole_difference",
]
