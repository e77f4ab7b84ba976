"""Rows: formats, faults named by file and row, balanced and disjoint samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from small_inputs import rows, write_lines, write_task

from monkeyjump.tasks import InputError, LoadedTask, load_task, read_task


def load(path: Path, seed: int = 0) -> LoadedTask:
    return load_task(read_task(path), "small", seed)


def keys(examples) -> list[str]:
    return [example.key for example in examples]


def test_samples_are_balanced_disjoint_and_fixed_by_the_seed(tmp_path: Path):
    skewed = rows(40) + [{"sentence": f"food {n} was good", "mark": "positive"} for n in range(30)]
    path = write_task(tmp_path, data=skewed)
    loaded = load(path)
    assert Counter(e.answer for e in loaded.train) == {0: 8, 1: 8}
    assert Counter(e.answer for e in loaded.test) == {0: 4, 1: 4}
    assert not set(keys(loaded.train)) & set(keys(loaded.test))
    assert keys(load(path).train) == keys(loaded.train)
    assert keys(load(path, seed=1).train) != keys(loaded.train)


def test_a_small_pool_is_shared_out(tmp_path: Path):
    loaded = load(write_task(tmp_path, data=rows(12)))  # 16 + 8 are asked for
    assert (len(loaded.train), len(loaded.test)) == (8, 4)


def test_duplicates_and_contradictions_go_out_with_a_count(tmp_path: Path):
    data = [*rows(24), {"sentence": "Film 0  was GOOD", "mark": "positive"}]
    data.append({"sentence": "film 3 was bad", "mark": "positive"})
    loaded = load(write_task(tmp_path, data=data))
    assert loaded.dropped["duplicate text"] == 1
    assert loaded.dropped["same text, different labels"] == 2
    assert "film 3 was bad" not in keys(loaded.train) + keys(loaded.test)


def test_training_rows_that_are_test_rows_go_out(tmp_path: Path):
    path = write_task(tmp_path, data=rows(24))
    write_lines(tmp_path / "held.jsonl", rows(8))
    path.write_text(path.read_text().replace("films.jsonl}", "films.jsonl, test: held.jsonl}"))
    loaded = load(path)
    assert loaded.dropped["text also in the test rows"] == 8
    assert not set(keys(loaded.train)) & set(keys(loaded.test))
    assert len(loaded.test) == 8


def test_bands_leave_the_middle_out(tmp_path: Path):
    data = [{"sentence": f"film {n}", "mark": mark} for n, mark in enumerate([0.9, -0.9, 0.5, -0.5, 0, "1", -2, 3, -3])]
    more = "labels: {positive: {above: 0.5}, negative: {below: -0.5}}\n"
    loaded = load(write_task(tmp_path, data=data, more=more))
    assert loaded.dropped["label outside every band"] == 3
    right = {"film 0": 0, "film 5": 0, "film 7": 0, "film 1": 1, "film 6": 1, "film 8": 1}
    assert {e.key: e.answer for e in [*loaded.train, *loaded.test]} == right


def test_listed_labels(tmp_path: Path):
    data = [{"sentence": f"film {n}", "mark": n % 2} for n in range(8)]
    loaded = load(write_task(tmp_path, data=data, more='labels: {positive: ["1"], negative: [0]}\n'))
    assert all(int(e.key.split()[1]) % 2 == 1 - e.answer for e in [*loaded.train, *loaded.test])


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_separated_text_with_bom_crlf_and_blank_lines(tmp_path: Path, suffix: str):
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace("films.jsonl", f"films.{suffix}"))
    mark = "," if suffix == "csv" else "\t"
    lines = [mark.join(("sentence", "mark")), "", *(mark.join(map(str, row.values())) for row in rows(8))]
    (tmp_path / f"films.{suffix}").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    loaded = load(path)
    assert len(loaded.train) + len(loaded.test) == 8
    assert {e.key.split()[-1] for e in loaded.train if e.answer == 0} == {"good"}


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_task(tmp_path)
    path.write_text(path.read_text().replace("films.jsonl", "films.parquet"))
    datasets.Dataset.from_list(rows(8)).to_parquet(str(tmp_path / "films.parquet"))
    assert len(load(path).train) + len(load(path).test) == 8


def bad_row(**values: object) -> list[dict[str, object]]:
    data = rows(24)
    data[6] = values
    return data


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (bad_row(sentense="a", mark="positive"), r"row 7: no column 'sentence' \(columns.text", "'sentense'"),
        (bad_row(sentence="a", mark="postive"), r"row 7, field 'mark': 'postive' is no answer", "'positive'"),
        (bad_row(sentence=None, mark="positive"), "row 7, field 'sentence': expected text.*NoneType", "columns"),
        (bad_row(sentence=["a"], mark="positive"), "row 7, field 'sentence': expected text.*list", ""),
        ([], "no rows", "empty"),
        (rows(24)[::2], "too few usable rows for a balanced test sample", "every choice"),
    ],
)
def test_faults_name_file_row_and_field(tmp_path: Path, data, message: str, hint: str):
    with pytest.raises(InputError, match=message) as caught:
        load(write_task(tmp_path, data=data))
    assert "films" in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"sentence": "a", "mark"', "row 25: not JSON: .* at column"),
        (b"[1, 2]", "row 25: expected an object, found list"),
        (b'{"sentence": "\xa3", "mark": "positive"}', "line 25: byte 0xa3 is not UTF-8"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: bytes, message: str):
    path = write_task(tmp_path)
    with (tmp_path / "films.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(InputError, match=message):
        load(path)


def test_a_label_in_bands_must_be_a_number(tmp_path: Path):
    more = "labels: {positive: {above: 0.5}, negative: {below: -0.5}}\n"
    with pytest.raises(InputError, match="row 1, field 'mark': 'positive' is no answer") as caught:
        load(write_task(tmp_path, more=more))
    assert "number" in caught.value.hint
