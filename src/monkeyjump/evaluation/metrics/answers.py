"""Metrics of free answers and of choices, each a mean over rows."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from monkeyjump.evaluation.metrics.scores import Accepted, Answers, Score, mean_score, normal_text, register
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.metric_names import KNOWN

TOLERANCE = 0.05
VERDICTS = (["yes"], ["no"], ["noanswer"])  # right or wrong as a whole (Yang et al., 2018, HotpotQA)


def squad_normal(text: str) -> str:
    """SQuAD's normalization: no case, punctuation or articles, single blanks (Rajpurkar et al., 2016)."""
    bare = "".join(letter for letter in text.casefold() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@register("accuracy", KNOWN["accuracy"])
def accuracy(answers: Answers, accepted: Accepted) -> Score:
    return mean_score([normal_text(a) in map(normal_text, right) for a, right in zip(answers, accepted)])


@register("exact_match", KNOWN["exact_match"])
def exact_match(answers: Answers, accepted: Accepted) -> Score:
    return mean_score([squad_normal(a) in map(squad_normal, right) for a, right in zip(answers, accepted)])


@register("f1", KNOWN["f1"])
def f1(answers: Answers, accepted: Accepted) -> Score:
    return mean_score([max(_overlap(a, b) for b in right) for a, right in zip(answers, accepted)])


def _overlap(answer: str, right: str) -> float:
    first, second = squad_normal(answer).split(), squad_normal(right).split()
    if not first or not second or first in VERDICTS or second in VERDICTS:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second))


@register("relaxed_accuracy", KNOWN["relaxed_accuracy"])
def relaxed_accuracy(answers: Answers, accepted: Accepted) -> Score:
    """Masry et al., 2022: a number may be off by 5 % of the right one, anything else must be equal."""
    return mean_score([any(_close(a, b) for b in right) for a, right in zip(answers, accepted)])


def _close(answer: str, right: str) -> bool:
    found, wanted = _chart_number(answer), _chart_number(right)
    if found is None or wanted is None or wanted == 0:
        return normal_text(answer) == normal_text(right)
    return abs(found - wanted) <= TOLERANCE * abs(wanted)


def _chart_number(text: str) -> float | None:
    """12, 1,200 or 12 % (as 0.12)."""
    bare = text.strip().replace(",", "")
    try:
        value = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_VQA_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


def vqa_normal(text: str) -> str:
    """The VQA evaluation's normalization, without its list of contractions: case, punctuation, digits, articles."""
    bare = re.sub(r"(?<=\d),(?=\d)", "", text.casefold())
    bare = re.sub(r"(?<!\d)\.|\.(?!\d)", "", bare)  # a period stays inside a number only
    bare = re.sub(r"[;/\[\]\"{}()=+\\_<>@`,?!-]", " ", bare)
    words = [_VQA_WORDS.get(word, word) for word in bare.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@register("vqa_accuracy", KNOWN["vqa_accuracy"])
def vqa_accuracy(answers: Answers, accepted: Accepted) -> Score:
    """Goyal et al., 2017: min(1, people who said it / 3), averaged over leaving each person out.

    With fewer than four accepted answers (a data set that has been condensed) one of them is enough.
    """
    return mean_score(
        [_agreement(vqa_normal(a), [vqa_normal(b) for b in right]) for a, right in zip(answers, accepted)]
    )


def _agreement(answer: str, people: Sequence[str]) -> float:
    said = people.count(answer)
    if len(people) < 4:
        return float(said > 0)
    leaving = [min(1.0, (said - (person == answer)) / 3) for person in people]
    return sum(leaving) / len(leaving)


def check_packages(metrics: Iterable[str]) -> None:
    """Raises InputError where a metric needs a package that is not there: to be asked before answers are written."""
    if any(name.startswith("rouge") for name in metrics):
        _rouge_scorer("rougeL")


def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError(
            f"ROUGE needs the rouge-score package: {error}", hint="python -m pip install 'monkeyjump[eval]'"
        ) from error
    return RougeScorer([kind], use_stemmer=True)


def _rouge(kind: str, answers: Answers, accepted: Accepted) -> Score:
    scorer = _rouge_scorer(kind)
    return mean_score([max(scorer.score(b, a)[kind].fmeasure for b in right) for a, right in zip(answers, accepted)])


@register("rouge1", KNOWN["rouge1"])
def rouge1(answers: Answers, accepted: Accepted) -> Score:
    return _rouge("rouge1", answers, accepted)


@register("rouge2", KNOWN["rouge2"])
def rouge2(answers: Answers, accepted: Accepted) -> Score:
    return _rouge("rouge2", answers, accepted)


@register("rougeL", KNOWN["rougeL"])
def rouge_l(answers: Answers, accepted: Accepted) -> Score:
    return _rouge("rougeL", answers, accepted)
