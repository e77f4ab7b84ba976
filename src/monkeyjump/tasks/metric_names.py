"""The metrics that a task may name. The functions are in `monkeyjump.evaluation.metrics`."""

from __future__ import annotations

KNOWN: dict[str, str] = {
    "accuracy": "share of rows whose answer equals the right one, case and outer blanks aside",
    "exact_match": "share of rows whose answer equals an accepted one after SQuAD's normalization",
    "f1": "mean overlap of words with the best accepted answer (SQuAD)",
    "f1_binary": "F1 of the answer yes, or of the rarest right answer where none is yes",
    "f1_macro": "mean over the answers of each one's F1",
    "matthews": "Matthews correlation of the answers",
    "pearson": "Pearson correlation of the numbers",
    "spearman": "Spearman rank correlation of the numbers",
    "relaxed_accuracy": "accuracy where a number may be 5 % off (ChartQA)",
    "vqa_accuracy": "agreement with ten people, a third a person, mean over leaving each out (VQA v2)",
    "rouge1": "F-measure of single words (ROUGE-1)",
    "rouge2": "F-measure of word pairs (ROUGE-2)",
    "rougeL": "F-measure of the longest common subsequence (ROUGE-L)",
    "pass@1": "share of rows whose program passes its tests, in a sandbox (HumanEval)",
    "perplexity": "exp of the mean negative log-likelihood of a token",
}
