"""Metrics against published examples, libraries and hand-made numbers; intervals against simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from monkeyjump.evaluation.metrics import (
    known_metrics,
    mean_score,
    perplexity,
    register,
    score,
    squad_normal,
    whole_difference,
)
from monkeyjump.tasks import InputError
from monkeyjump.tasks.metric_names import KNOWN


def one(name: str, answer: str, *right: str) -> float:
    return score(name, [answer], [right]).value


def test_every_named_metric_is_there_and_scores_gold_as_one():
    assert set(known_metrics()) | {"perplexity"} == set(KNOWN)
    answers = ["yes of course", "a red car and a dog", "3.5 %"] * 5
    numbers = ["0.5", "3.5", "1.5", "4.0", "2.5"] * 3
    for name in known_metrics().keys() - {"pass@1"}:  # whose answers are programs: test_tasks_mamba.py
        given = numbers if name in ("pearson", "spearman") else answers
        assert score(name, given, [[text] for text in given]).value == pytest.approx(1.0), name


@pytest.mark.parametrize(
    ("name", "answer", "right", "expected"),
    [
        ("accuracy", " Positive ", ["positive"], 1.0),
        ("accuracy", "positive.", ["positive"], 0.0),
        ("exact_match", "The Eiffel Tower!", ["eiffel tower"], 1.0),
        ("exact_match", "tower", ["eiffel tower", "the tower"], 1.0),
        ("f1", "the cat sat", ["a cat sat down"], 2 * 2 / (2 + 3)),
        ("f1", "dog", ["cat"], 0.0),
        ("f1", "yes it is", ["yes"], 0.0),  # HotpotQA's own script: yes and no are right as a whole
        ("f1", "Yes.", ["yes"], 1.0),
        ("relaxed_accuracy", "104", ["100"], 1.0),
        ("relaxed_accuracy", "106", ["100"], 0.0),
        ("relaxed_accuracy", "-95", ["-100"], 1.0),
        ("relaxed_accuracy", "12.5%", ["0.125"], 1.0),
        ("relaxed_accuracy", "0", ["0"], 1.0),
        ("relaxed_accuracy", "Blue", ["blue"], 1.0),
        ("relaxed_accuracy", "nan", ["100"], 0.0),
        ("vqa_accuracy", "Two dogs", ["2 dogs"] * 3 + ["cat"] * 7, (3 * 2 / 3 + 7) / 10),
        ("vqa_accuracy", "cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("vqa_accuracy", "cat", ["cat"] + ["dog"] * 9, 9 * (1 / 3) / 10),
        ("vqa_accuracy", "the 1,000.5", ["1000.5"], 1.0),
        ("rouge1", "the cat was found under the bed", ["the cat was under the bed"], 2 * 1 * (6 / 7) / (1 + 6 / 7)),
        ("rouge2", "the cat was found under the bed", ["the cat was under the bed"], 2 * 0.8 * (4 / 6) / (0.8 + 4 / 6)),
        ("rougeL", "police kill the gunman", ["police killed the gunman"], 1.0),  # stemmed
        ("rougeL", "the gunman kill police", ["police killed the gunman"], 0.5),  # Lin 2004: the same words, turned
        ("rouge1", "the gunman kill police", ["police killed the gunman"], 1.0),
        ("rouge2", "the gunman kill police", ["police killed the gunman"], 1 / 3),
        ("rougeL", "a dog", ["cats", "a dog"], 1.0),
        ("accuracy", "b", ["a", "b"], 1.0),
        ("f1", "dog", ["cat", "dog"], 1.0),
        ("f1", "dog dog", ["dog dog cat"], 2 * 2 / 5),  # as often as it is there
        ("f1", "the", ["a"], 1.0),  # nothing but articles on both sides
        ("f1", "the", ["dog"], 0.0),
        ("exact_match", "A.B.", ["ab"], 1.0),  # punctuation goes before articles
        ("relaxed_accuracy", "105.2", ["100"], 0.0),  # 5 % of the right number
        ("relaxed_accuracy", "1,200", ["3", "1200"], 1.0),
        ("relaxed_accuracy", "0.0", ["0"], 0.0),  # of 0 there is no share: equal text or nothing
        ("vqa_accuracy", "A dog.", ["the dog"], 1.0),  # a condensed set: one answer is enough
    ],
)
def test_one_row(name: str, answer: str, right: list[str], expected: float):
    assert one(name, answer, *right) == pytest.approx(expected)


def test_classes_agree_with_scikit_learn():
    draw = random.Random(1)
    right = [draw.choice(["yes", "no", "no"]) for _ in range(60)]
    given = [text if draw.random() < 0.7 else draw.choice(["yes", "no", "maybe"]) for text in right]
    accepted = [[text] for text in right]
    assert score("matthews", given, accepted).value == pytest.approx(sklearn.matthews_corrcoef(right, given))
    one_class = sklearn.f1_score(right, given, labels=["yes"], average="macro")
    assert score("f1_binary", given, accepted).value == pytest.approx(one_class)
    macro = sklearn.f1_score(right, given, labels=["yes", "no"], average="macro")
    assert score("f1_macro", given, accepted).value == pytest.approx(macro)


def test_correlations_agree_with_scipy_and_read_numbers_in_text():
    draw = np.random.default_rng(0)
    right = draw.uniform(0, 5, 80)
    given = right + draw.normal(0, 1, 80)
    answers, accepted = [f"about {value:.6f}" for value in given], [[f"{value:.6f}"] for value in right]
    found = score("pearson", answers, accepted)
    assert found.value == pytest.approx(stats.pearsonr(given, right).statistic, abs=1e-6)
    limits = stats.pearsonr(given, right).confidence_interval()
    assert (found.low, found.high) == pytest.approx((limits.low, limits.high), abs=0.03)  # Fisher's interval
    assert score("spearman", answers, accepted).value == pytest.approx(stats.spearmanr(given, right).statistic)
    assert found.unread == 0


def test_answers_that_are_no_numbers_are_counted_and_do_not_help():
    answers, accepted = ["1.0", "no idea", "3.0", "2.0"], [["1.0"], ["0.0"], ["3.0"], ["2.0"]]
    found = score("spearman", answers, accepted)
    assert found.unread == 1
    assert found.value < 1
    assert score("spearman", ["?"] * 4, accepted).value == 0
    mean = score("pearson", answers, accepted).value
    assert mean == pytest.approx(stats.pearsonr([1, 2, 3, 2], [1, 0, 3, 2]).statistic)
    assert score("matthews", ["yes"] * 4, [["yes"], ["no"], ["no"], ["yes"]]).value == 0


def test_a_share_has_wilsons_interval_and_every_row():
    found = score("accuracy", ["a"] * 81 + ["b"] * 182, [["a"]] * 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)  # Newcombe 1998, table I
    assert found.standard_error == pytest.approx(math.sqrt(found.value * (1 - found.value) / 262))
    assert sum(found.rows) == 81


def test_another_mean_has_the_normal_interval_within_its_range():
    rows = [0.2, 0.5, 0.5, 0.9]
    found, error = mean_score(rows), np.std(rows, ddof=1) / 2
    assert (found.value, found.standard_error) == pytest.approx((0.525, error))
    assert (found.low, found.high) == pytest.approx((0.525 - 1.959964 * error, 0.525 + 1.959964 * error))
    edge = mean_score([1.0, 1.0, 0.9])
    assert edge.low < edge.value < edge.high == 1.0
    assert mean_score([0.0, 0.0, 0.1]).low == 0.0


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(name: str):
    draw, truth, hits = random.Random(0), 0.6, 0
    rounds = 150 if name == "f1" else 60  # a bootstrap each
    for _ in range(rounds):
        right = [draw.choice(["yes", "no"]) for _ in range(80)]
        if name == "f1":
            given = [draw.choice(["x y", "x z w u"]) for _ in right]  # 1.0 or 2 * 1 / (4 + ...)
            accepted = [["x y"]] * 80
            truth = 0.5 * 1.0 + 0.5 * (2 * 1 / 6)
        else:
            given = [text if draw.random() < 0.8 else {"yes": "no", "no": "yes"}[text] for text in right]
            accepted = [[text] for text in right]
        found = score(name, given, accepted)
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / rounds <= 0.99


def answers_of_two(draw: np.random.Generator, rows: int = 80) -> tuple[list[str], list[str], list[list[str]]]:
    """Two models whose errors have most in common, and the right numbers."""
    right = draw.normal(0, 1, rows)
    common = right + draw.normal(0, 1, rows)
    first, second = (common + draw.normal(0, 0.3, rows) for _ in range(2))
    return [str(x) for x in first], [str(x) for x in second], [[str(x)] for x in right]


@pytest.mark.parametrize(("name", "function"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_the_paired_interval_of_a_correlation_is_scipys(name: str, function):
    first, second, accepted = answers_of_two(np.random.default_rng(3))
    found = whole_difference(name, first, second, accepted)
    columns = [np.array(x, float) for x in (first, second, [row[0] for row in accepted])]
    expected = stats.bootstrap(
        columns, lambda a, b, c: function(b, c).statistic - function(a, c).statistic, paired=True, vectorized=False,
        n_resamples=1000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(function(columns[1], columns[2]).statistic
                                        - function(columns[0], columns[2]).statistic)  # fmt: skip
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    each = [score(name, given, accepted).standard_error for given in (first, second)]
    assert found.high - found.low < 0.7 * 2 * 1.96 * math.hypot(*each)  # what runs have in common cancels


@pytest.mark.parametrize("name", ["matthews", "f1_binary", "f1_macro"])
def test_the_paired_interval_of_classes(name: str):
    """Against an own resampling of the rows through scikit-learn."""
    draw = random.Random(2)
    right = [draw.choice(["yes", "no"]) for _ in range(60)]
    common = [text if draw.random() < 0.8 else {"yes": "no", "no": "yes"}[text] for text in right]
    first, second = ([t if draw.random() < 0.9 else draw.choice(["yes", "no"]) for t in common] for _ in range(2))

    def value(given: list[str], rows: list[int]) -> float:
        kept, said = [right[row] for row in rows], [given[row] for row in rows]
        if name == "matthews":
            return float(sklearn.matthews_corrcoef(kept, said))
        labels = ["yes"] if name == "f1_binary" else ["yes", "no"]
        return float(sklearn.f1_score(kept, said, labels=labels, average="macro", zero_division=0))

    found = whole_difference(name, first, second, [[text] for text in right])
    assert found.value == pytest.approx(value(second, list(range(60))) - value(first, list(range(60))))
    rows = [draw.choices(range(60), k=60) for _ in range(200)]
    low, high = np.quantile([value(second, one) - value(first, one) for one in rows], (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.04)


def test_equal_runs_differ_by_nothing():
    answers, _, accepted = answers_of_two(np.random.default_rng(1))
    found = whole_difference("spearman", answers, answers, accepted)
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.slow
def test_the_paired_interval_covers_the_truth_about_as_often_as_it_says():
    """Both models are equally good: a difference of 0."""
    draw, hits = np.random.default_rng(0), 0
    for _ in range(60):
        found = whole_difference("pearson", *answers_of_two(draw, 60))
        hits += found.covers_zero
    assert 0.86 <= hits / 60 <= 1.0


def test_perplexity_is_of_tokens_not_of_documents():
    found = perplexity([10.0, 40.0], [10, 20])
    assert found.value == pytest.approx(math.exp(50 / 30))
    assert found.low < found.value < found.high
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sizes = draw.integers(20, 200, 60)
        losses = sizes * draw.normal(2.0, 0.3, 60)
        again = perplexity(losses.tolist(), sizes.tolist())
        hits += again.low <= math.exp(2.0) <= again.high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_metric_of_ones_own():
    try:

        @register("first_letter", "share of answers whose first letter is right")
        def first_letter(answers, accepted):
            return mean_score([a[:1] == right[0][:1] for a, right in zip(answers, accepted)])

        with pytest.raises(InputError, match="runs cannot be paired"):
            whole_difference("first_letter", ["a"], ["a"], [["a"]])
        assert score("first_letter", ["abc", "x"], [["axe"], ["y"]]).value == 0.5
    finally:
        KNOWN.pop("first_letter")


def test_what_cannot_be_scored_is_said():
    with pytest.raises(InputError, match="metric 'acuracy' is not known") as caught:
        score("acuracy", ["a"], [["a"]])
    assert "accuracy" in caught.value.hint
    with pytest.raises(InputError, match="no rows"):
        score("accuracy", [], [])
    with pytest.raises(InputError, match="without an accepted answer"):
        score("f1", ["a"], [[]])
    with pytest.raises(ValueError, match="2 answers for 1 rows"):
        score("f1", ["a", "b"], [["a"]])


def test_normalization_keeps_words_that_begin_like_an_article():
    assert squad_normal("An Anthem, a theory") == "anthem theory"
