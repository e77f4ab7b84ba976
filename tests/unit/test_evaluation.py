"""Scores against a plain one-by-one computation, intervals against published numbers and simulation."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch
from rich.console import Console
from small_inputs import model, rows, tokenizer, write_task
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from monkeyjump import record_routing
from monkeyjump.evaluation import (
    Question,
    Questions,
    accuracy,
    accuracy_table,
    answer,
    choice_scores,
    generate_answers,
    paired_difference,
    routing_table,
    spread,
)
from monkeyjump.tasks import Collator, Prompts, load_task, read_task
from tiny import routed

COLLATOR = Collator.of(tokenizer())
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12], [5, 4, 3, 9], [20, 21, 22]]


def asked(prompts: list[list[int]], *choices: list[list[int]]) -> list[Question]:
    """One question a prompt; with several lists of choices, they take turns."""
    return [Question({"input_ids": prompt}, choices[n % len(choices)]) for n, prompt in enumerate(prompts)]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=140, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ).eval()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=140, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()


def one_by_one(net, prompt: list[int], choice: list[int]) -> float:
    """Mean log-probability of the choice's tokens, without padding, batching or position picking."""
    ids = torch.tensor([prompt + choice])
    with torch.no_grad():
        log_probs = net(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return sum(log_probs[place, token].item() for place, token in zip(places, choice)) / len(choice)


@pytest.mark.parametrize("make", [model, gpt2, mamba])
@pytest.mark.parametrize(
    "choices", [[[30], [31], [32]], [[30, 31], [30, 32, 33]], [[40], [40, 41]]], ids=["first", "general", "prefix"]
)
def test_scores_equal_the_one_by_one_computation(make, choices):
    net = make()
    found = torch.stack(choice_scores(net, asked(PROMPTS, choices), COLLATOR, batch_size=2))
    expected = torch.tensor([[one_by_one(net, prompt, choice) for choice in choices] for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_first_tokens_alone_count_where_they_differ():
    net = model()
    found = torch.stack(choice_scores(net, asked(PROMPTS, [[30, 31], [32]]), COLLATOR))
    expected = torch.tensor([[one_by_one(net, prompt, [first]) for first in (30, 32)] for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_progress_counts_every_token_once():
    seen: list[int] = []
    choice_scores(model(), asked(PROMPTS, [[30], [31]]), COLLATOR, batch_size=2, advance=seen.append)
    assert len(seen) == 3
    assert sum(seen) == sum(map(len, PROMPTS))


def test_rows_may_have_choices_of_their_own():
    net = model()
    own = ([[30], [31], [32]], [[40, 41], [40, 42]])
    found = choice_scores(net, asked(PROMPTS, *own), COLLATOR, batch_size=3)
    for number, scores in enumerate(found):
        expected = [one_by_one(net, PROMPTS[number], choice) for choice in own[number % 2]]
        assert scores.tolist() == pytest.approx(expected, abs=2e-5)


@pytest.fixture
def films(tmp_path) -> Questions:
    loaded = load_task(read_task(write_task(tmp_path, data=rows(40))), "small")
    return Questions(loaded.task, loaded.test, Prompts(tokenizer()), 0)


def test_answers_are_compared_and_the_mode_is_restored(films):
    net = model()
    net.train()
    (found,) = answer(net, [films], COLLATOR, batch_size=3)
    assert net.training
    net.eval()
    for row in range(len(films)):
        question = films[row]
        scores = [one_by_one(net, question.inputs["input_ids"], choice) for choice in question.choices]
        chosen = question.spoken[scores.index(max(scores))]
        assert (found.chosen[row], found.accepted[row]) == (chosen, question.gold)
        assert found.correct[row] == (chosen == question.gold[0])
    assert found.written == []


@pytest.mark.parametrize("make", [model, gpt2])
def test_written_answers_equal_those_of_one_row_at_a_time(make):
    """Left padding, batch mates and the order of the batches change nothing."""
    net, words = make(), tokenizer()
    found = generate_answers(net, asked(PROMPTS, []), words, COLLATOR, new_tokens=6, batch_size=2)
    for prompt, text in zip(PROMPTS, found):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == words.eos_token_id:
                break
        assert text == words.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("granularity", ["token", "prompt_end", "task"])
def test_routed_models_are_told_prompts_and_tasks(granularity: str):
    """Scores in a padded batch equal those of each row alone, whatever the routing decides on."""
    net = routed(model(), granularity=granularity, target_modules=["q_proj", "k_proj", "v_proj"], shared_modules=[])
    questions = [
        Question({"input_ids": prompt}, [[30, 31], [30, 32]], task_id=n % 2) for n, prompt in enumerate(PROMPTS)
    ]
    together = choice_scores(net.eval(), questions, COLLATOR, batch_size=4)
    alone = [choice_scores(net, [question], COLLATOR)[0] for question in questions]
    for one, other in zip(together, alone):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_wilson_interval():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263 and 0/20."""
    found = accuracy([True] * 81 + [False] * 182)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    found = accuracy([False] * 20)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0, 0.1611)


def pairs(gained: int, lost: int, both: int, neither: int = 0) -> tuple[list[bool], list[bool]]:
    first = [False] * gained + [True] * lost + [True] * both + [False] * neither
    second = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return first, second


def test_equal_pairs_have_an_interval_with_width_around_zero():
    found = paired_difference(*pairs(0, 0, 60))
    assert found.value == 0
    assert found.low == pytest.approx(-1.959964 / 62, abs=1e-6)
    assert found.high == -found.low
    assert found.covers_zero


def test_paired_difference_by_hand():
    """40 gained, 20 lost of 100: center 20/102, half width z * sqrt(61 - 400/102) / 102."""
    found = paired_difference(*pairs(40, 20, 40))
    half = 1.959964 * math.sqrt(61 - 400 / 102) / 102
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 20 / 102 - half, 20 / 102 + half), abs=1e-6)
    assert not found.covers_zero


def test_paired_interval_covers_the_truth_about_as_often_as_it_says():
    draw = random.Random(0)
    hits = 0
    for _ in range(1000):
        kinds = draw.choices("gls", weights=(0.2, 0.1, 0.7), k=60)
        found = paired_difference(*pairs(kinds.count("g"), kinds.count("l"), kinds.count("s")))
        hits += found.low <= 0.1 <= found.high
    assert 0.93 <= hits / 1000 <= 0.98


def test_table_words_presume_no_winner():
    first, second = pairs(40, 20, 40)
    results = {"LoRA": {"a": first, "b": first}, "MJ": {"a": second, "b": first}}
    screen = Console(width=100, file=io.StringIO())
    screen.print(accuracy_table(results, "LoRA", "MJ"))
    text = screen.file.getvalue()
    row = {line.strip("│ ").split(" ")[0]: line for line in text.splitlines()}
    assert "+20.0" in row["a"]
    assert "+0.0" in row["b"]
    assert "all tasks, pooled" in text
    assert text.count("not resolved") == 1  # b only; the pooled difference is clear


def test_spread_shows_collapse_that_averages_hide():
    slots = {"0": ("q", "k"), "1": ("q", "k")}
    collapsed = spread({"0": torch.tensor([10, 0]), "1": torch.tensor([0, 10])}, slots)
    assert collapsed.shares == {"q": 0.5, "k": 0.5}
    assert collapsed.effective == pytest.approx(1.0)
    even = spread({"0": torch.tensor([5, 5]), "1": torch.tensor([5, 5])}, slots)
    assert even.shares == collapsed.shares
    assert even.effective == pytest.approx(2.0)
    assert even.possible == 2
    assert routing_table({"a": even}).row_count == 1


def test_routing_is_recorded_over_the_attended_tokens_of_a_task():
    net = routed(model(), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], shared_modules=["o_proj"], top_k=1)
    with record_routing(net) as record:
        choice_scores(net, asked(PROMPTS, [[30], [31]]), COLLATOR, batch_size=2)
    assert all(count.sum().item() == sum(map(len, PROMPTS)) for count in record.counts.values())
    assert sum(spread(record.counts, record.slots).shares.values()) == pytest.approx(1.0)
