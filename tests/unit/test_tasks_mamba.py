"""CNN/DailyMail, HotpotQA and HumanEval on rows in their data sets' layout; pass@k; the 164 real problems."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from small_inputs import tokenizer
from suite_rows import ROWS, layout, suite_task
from test_sandbox import needs_sandbox

from monkeyjump.evaluation.metrics import pass_at_k, score, score_programs
from monkeyjump.evaluation.metrics.code import program_of
from monkeyjump.evaluation.sandbox import allow_code, check_tasks
from monkeyjump.tasks import InputError, Prompts, Size, catalog, load_task, read_task

PROBLEMS = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"


def judge(n: int = 3) -> dict[str, str]:
    row = layout("humaneval")[1](n)
    return {"prompt": row["prompt"], "tests": row["test"], "entry": row["entry_point"]}


def accepted(n: int = 3) -> tuple[str, str]:
    return layout("humaneval")[1](n)["canonical_solution"], json.dumps(judge(n))


# ---------------------------------------------------------------------- descriptions


@pytest.mark.parametrize("name", sorted(catalog("mamba")))
def test_task(name: str, tmp_path: Path):
    task = suite_task(name, tmp_path)
    loaded = load_task(task, Size(train=6, test=4))
    assert (len(loaded.train), len(loaded.test)) == (0 if task.tests_only else 6, 4)
    example = loaded.test[0]
    shown = Prompts(tokenizer()).turns(task, example)[-1]["content"]
    assert all(text in shown for text in example.fields.values())
    row = Prompts(tokenizer()).encode(task, 3, example)
    supervised = [label for label in row["labels"] if label >= 0]
    assert supervised[-1] == tokenizer().eos_token_id
    tests = list(loaded.test)
    for metric in {task.metric, *task.also} - {"pass@1"}:
        found = score(metric, [one.gold[0] for one in tests], [one.gold for one in tests])
        assert found.value == pytest.approx(1.0), metric


def test_hotpots_paragraphs_are_joined(tmp_path: Path):
    example = load_task(suite_task("hotpot_qa", tmp_path), Size(train=6, test=4)).test[0]
    number = example.fields["question"].rstrip("?").split()[-1]
    assert example.fields["context"] == f"Town {number} is old. It has a river.\nRiver {number} is long."
    assert example.gold == (f"River {number}",)


def test_a_cell_that_is_no_list_of_texts_is_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"a": [["x"], 3], "b": "y"}\n')
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: t\nsource: {kind: files, train: rows.jsonl}\ncolumns: {a: a, label: b}\njoined: [a]\n"
        'instruction: "{a}"\nanswer: text\nmetric: f1\n'
    )
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1, field 'a': expected a list of texts, or of lists"):
        load_task(read_task(path))
    path.write_text(path.read_text().replace("joined: [a]", "joined: [c]"))
    with pytest.raises(InputError, match=r"joined: \['c'\] are no fields"):
        read_task(path)


def test_all_rows_of_humaneval_are_test_rows_and_it_goes_on_after_the_prompt(tmp_path: Path):
    task = suite_task("humaneval", tmp_path)
    loaded = load_task(task, "full")
    assert (len(loaded.train), len(loaded.test)) == (0, ROWS)
    example = loaded.test[0]
    n = int(example.fields["prompt"].split("add_")[1].split("(")[0])
    assert example.gold[0] == f"\n    result = x + {n}\n    return result"
    assert json.loads(example.gold[1]) == judge(n)
    plain = Prompts(tokenizer(template=None))
    assert plain.pieces(plain.turns(task, example), task) == [(judge(n)["prompt"].strip(), False)]
    with pytest.raises(InputError, match="metric pass@1, answer: text and code"):
        read_task(changed(tmp_path, "code: {prompt: prompt, tests: test, entry: entry_point}\n"))


def changed(folder: Path, without: str) -> Path:
    text = catalog("mamba")["humaneval"].read_text()
    assert without in text
    path = folder / "changed.yaml"
    path.write_text(text.replace(without, ""))
    return path


# ---------------------------------------------------------------------- programs and pass@k

BODY = "    result = x + 3\n    return result"


@needs_sandbox
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (BODY, True),
        (BODY.strip(), True),  # as generated answers come, without outer blanks
        ("result = x + 3\nreturn result", True),  # without any indentation
        (f"{BODY}\n\ndef add_3(x):\n    return 0\nprint(add_3(y))", True),  # what follows is cut off
        (f"{BODY}\n\nprint(undefined)", True),
        (f"Here it is:\n```python\ndef add_3(x):\n{BODY}\n```\nIt adds 3.", True),
        (f"```\ndef helper(x):\n{BODY}\n\ndef add_3(x):\n    return helper(x)\n```", True),
        ("    return math.floor(x) + 3", True),  # the prompt's import
        ("```python\ndef add_3(x):\n    return math.floor(x) + 3\n```", True),
        ("    return x + 4", False),
        ("    return 4", False),  # right for one of two tests
        ("", False),
        ("    pass", False),
        ("    import os\n    os._exit(0)", False),
        ("    raise SystemExit(0)", False),
        ("    return x + ", False),
        ("    return x + 3\n\nimport sys\nsys.exit(0)", False),
    ],
)
def test_one_answer(answer: str, right: bool):
    with allow_code():
        assert score("pass@1", [answer], [accepted()]).value == right, program_of(judge(), answer)


def test_the_estimator_is_the_share_of_subsets_with_a_right_one():
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # 3 of the 10 pairs hold no right one
    assert pass_at_k(5, 4, 2) == 1
    assert pass_at_k(5, 0, 5) == 0
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples of each problem, found 2"):
        pass_at_k(2, 1, 3)


@needs_sandbox
def test_several_samples_of_each_problem():
    samples = [["    return x + 3", "    return 0", "    return 1"], ["    return x"] * 3]
    with allow_code():
        found = score_programs(samples, [accepted(), accepted()], k=2)
    assert found.rows == pytest.approx((2 / 3, 0.0))


def test_nothing_runs_unasked(tmp_path: Path):
    with pytest.raises(InputError, match="pass@1 runs code that the model writes"):
        score("pass@1", ["    return x + 3"], [accepted()])
    with pytest.raises(InputError, match="task humaneval runs code that the model writes"):
        check_tasks([suite_task("humaneval", tmp_path)])
    check_tasks([suite_task("hotpot_qa", tmp_path)])


@needs_sandbox
@pytest.mark.slow
@pytest.mark.skipif(not PROBLEMS.is_file(), reason="the 164 problems are not part of the project")
def test_the_authors_solutions_pass_all_of_the_real_problems():
    with gzip.open(PROBLEMS, "rt") as file:
        rows = [json.loads(line) for line in file]
    columns = {"prompt": "prompt", "tests": "test", "entry": "entry_point"}
    judges = [json.dumps({name: row[column] for name, column in columns.items()}) for row in rows]
    right = [(row["canonical_solution"], judge) for row, judge in zip(rows, judges)]
    with allow_code():
        assert sum(score("pass@1", [row["canonical_solution"].strip() for row in rows], right).rows) == 164
        assert sum(score("pass@1", ["    pass"] * 164, right).rows) == 0
