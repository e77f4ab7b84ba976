"""`monkeyjump tasks`: list, show, validate, and how it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_inputs import rows, write_task

from monkeyjump.cli import app
from monkeyjump.tasks import catalog


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def attempt(*arguments: str) -> tuple[int, str, list[str]]:
        code = app.run(["tasks", *arguments])
        done = capsys.readouterr()
        return code, done.out, done.err.splitlines()

    return attempt


def test_list_has_every_task(attempt):
    code, out, _ = attempt()
    assert code == 0
    assert not set(catalog()) - set(out.replace("│", " ").split())


def test_show_renders_a_row_of_ones_own_task(attempt, tmp_path: Path):
    write_task(tmp_path)
    code, out, _ = attempt("films.yaml")
    assert code == 0
    assert "one of 2 (positive, negative)" in out
    assert "Review : " in out
    assert "films.jsonl, row" in out
    assert "  -> " in out


def test_show_does_not_go_to_the_network(attempt):
    code, out, _ = attempt("flowers102")
    assert code == 0
    assert "one of 102 (pink primrose" in out
    assert "--fetch" in out


def test_validate_checks_description_and_rows(attempt, tmp_path: Path):
    write_task(tmp_path)
    code, out, _ = attempt("validate", "films.yaml")
    assert code == 0
    assert "films.yaml: right: 20 training rows, 4 test rows" in out


def test_validate_says_everything_that_is_wrong(attempt, tmp_path: Path):
    write_task(tmp_path, "food", [*rows(), {"sentence": "a", "mark": "fine"}])
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace("choices:", "choises:").replace("train: 16", "train: 0"))
    code, _, lines = attempt("validate", "films.yaml", "food.yaml", "gone.yaml")
    assert (code, len(lines)) == (2, 2)
    for part in (
        "'choises'",
        "sizes.small.train' = 0",
        "food.jsonl, row 25, field 'mark': 'fine'",
        "gone.yaml: no such",
    ):
        assert part in lines[0]
    assert "choices" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("bolq",), "unknown task 'bolq'", "boolq"),
        (("validate",), "no file given", "my-task.yaml"),
        (("mine.yaml",), "no such file: mine.yaml", "catalog"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(attempt, arguments, error: str, hint: str):
    code, _, lines = attempt(*arguments)
    assert (code, len(lines)) == (2, 2)
    assert error in lines[0]
    assert hint in lines[1]
