"""Metrics by name. `score("rougeL", answers, accepted)`; `register` adds one's own."""

from monkeyjump.evaluation.metrics.answers import squad_normal, vqa_normal
from monkeyjump.evaluation.metrics.code import pass_at_k, score_programs
from monkeyjump.evaluation.metrics.scores import Score, known_metrics, mean_score, register, score, whole_score
from monkeyjump.evaluation.metrics.whole import perplexity

__all__ = [
    "Score",
    "known_metrics",
    "mean_score",
    "pass_at_k",
    "perplexity",
    "register",
    "score",
    "score_programs",
    "squad_normal",
    "vqa_normal",
    "whole_score",
]
