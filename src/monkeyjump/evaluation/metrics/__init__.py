"""Metrics by name. `score("rougeL", answers, accepted)`; `register` adds one's own."""

from monkeyjump.evaluation.metrics.answers import squad_normal, vqa_normal
from monkeyjump.evaluation.metrics.scores import Score, known_metrics, mean_score, register, score, whole_score
from monkeyjump.evaluation.metrics.whole import perplexity

__all__ = [
    "Score",
    "known_metrics",
    "mean_score",
    "perplexity",
    "register",
    "score",
    "squad_normal",
    "vqa_normal",
    "whole_score",
]
