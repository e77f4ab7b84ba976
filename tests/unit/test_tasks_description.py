"""Task files: what is accepted, and what the refusal of a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_inputs import write_task

from monkeyjump.tasks import InputError, catalog, find_task, read_task


def test_catalog_tasks_are_valid_and_named_like_their_files():
    assert {name: read_task(path).name for name, path in catalog().items()} == {n: n for n in catalog()}
    assert set(catalog("demo")) == {"tweets", "amazon", "nyt", "bbc"}


def test_unknown_name_says_the_near_one():
    with pytest.raises(InputError, match="unknown task 'tweet'") as caught:
        find_task("tweet")
    assert "tweets" in caught.value.hint


def test_missing_file_is_named():
    with pytest.raises(InputError, match=r"no such file: gone\.yaml"):
        find_task("gone.yaml")


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("choices:", "choises:"), "unknown field 'choises'", "choices"),
        (("choices: [positive, negative]", "choices: [yes, no]"), "truth values: put them in quotes", ""),
        (("films.jsonl", "film.jsonl"), "no such file: .*film.jsonl", ""),
        (("{text}", "{txt}"), r"instruction uses \['txt'\] but columns gives \['text'\]", ""),
        (("label: mark", "lable: mark"), "columns: name the column that holds the label", ""),
        (("train: 16", "train: 0"), "'sizes.small.train' = 0", ""),
        (("kind: files", "kind: file"), "'source'", ""),
        (("name: films\n", ""), "field 'name' is missing", "catalog"),
        (("name: films", "- name"), "not YAML|expected 'field: value'", ""),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(tmp_path: Path, change, message: str, hint: str):
    path = write_task(tmp_path)
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change, 1))
    with pytest.raises(InputError, match=message) as caught:
        find_task(str(path))
    assert str(path) in str(caught.value)
    assert hint in caught.value.hint


def test_a_band_needs_a_bound(tmp_path: Path):
    path = write_task(tmp_path, more="labels: {positive: {}, negative: {below: 0}}\n")
    with pytest.raises(InputError, match="give above, below or both"):
        read_task(path)
