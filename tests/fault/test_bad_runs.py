"""Ten broken configs and ten broken data files: one sentence with field, value and remedy, exit code 2, no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_inputs import RUN, write_run_inputs

from monkeyjump.cli import app

CONFIGS = {
    "unknown section": (RUN + "trian: {epochs: 2}\n", ["trian", "did you mean 'train'"]),
    "unknown field": (RUN.replace("epochs: 2", "epoch: 2"), ["train.epoch", "2", "did you mean 'epochs'"]),
    "wrong type": (RUN.replace("batch_size: 4", "batch_size: four"), ["train.batch_size", "'four'", "valid integer"]),
    "out of range": (RUN.replace("batch_size: 4", "batch_size: 0"), ["train.batch_size", "0", "greater than"]),
    "unknown method": (RUN.replace("{r: 2", "{base: lroa, r: 2"), ["method", "'lroa'", "did you mean"]),
    "field of no method": (RUN.replace("{r: 2", "{rank: 2"), ["'rank'", "is no field of lora", "it takes"]),
    "unknown target": (RUN.replace("{r: 2", "{target_modules: [q_porj], r: 2"), ["q_porj", "did you mean 'q_proj'"]),
    "no such model": (RUN.replace("path: model", "path: modle"), ["model.path", "'modle'", "config.json"]),
    "unknown task": (RUN.replace("films.yaml, food.yaml", "tweet"), ["unknown task 'tweet'", "'tweets'"]),
    "no task": (RUN.replace("[films.yaml, food.yaml]", "[]"), ["data.tasks", "name at least one task"]),
    "not YAML": ("model: {path: [\n", ["run.yaml", "not YAML", "line"]),
    "half precision without a GPU": (
        RUN.replace("batch_size: 4", "precision: fp16, batch_size: 4"),
        ["train.precision", "'fp16'", "bf16"],
    ),
    "argument out of range": (
        RUN.replace("batch_size: 4", "arguments: {torch_empty_cache_steps: -1}, batch_size: 4"),
        ["torch_empty_cache_steps", "-1", "train.arguments"],
    ),
    "no output": (RUN.replace("output: {folder: out}", ""), ["'output' is missing", "--help"]),
}
ROW = '{"sentence": "film 1 was good", "mark": "positive"}\n'
DATA = {
    "empty": (b"", ["films.jsonl", "no rows", "empty"]),
    "not JSON": (b"{sentence: film\n", ["films.jsonl, row 1", "not JSON", "column 2", "one JSON object"]),
    "a list": (b"[1, 2]\n", ["films.jsonl, row 1", "expected an object, found list"]),
    "half a line at the end": ((ROW * 30).encode()[:-9], ["films.jsonl, row 30", "not JSON"]),
    "another encoding": ('{"sentence": "\u00a3"}'.encode("latin-1"), ["line 1", "0xa3", "save the file as UTF-8"]),
    "missing column": (b'{"sentense": "film", "mark": "positive"}\n', ["row 1", "'sentence'", "'sentense'"]),
    "null": (b'{"sentence": null, "mark": "positive"}\n', ["row 1", "'sentence'", "NoneType"]),
    "list in a cell": (b'{"sentence": ["film"], "mark": "positive"}\n', ["row 1", "'sentence'", "list"]),
    "unknown label": (b'{"sentence": "film", "mark": "postive"}\n', ["row 1", "'postive'", "did you mean 'positive'"]),
    "one label only": ((ROW * 3).encode(), ["films", "too few usable rows"]),
    "all the same": (("\n".join([ROW.strip(), ROW.strip().replace("positive", "negative")])).encode(), ["too few"]),
}


def attempt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MONKEYJUMP_HOME", str(folder / "home"))
    before = sorted(folder.rglob("*"))
    code = app.run(["train", "run.yaml"])
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith(("error: ", "hint: "))]
    assert (code, len([line for line in lines if line.startswith("error: ")])) == (2, 1), lines
    said = " ".join(lines)
    assert not [word for word in words if word not in said], said
    left = [path for path in sorted(folder.rglob("*")) if path not in before and path.is_file()]
    assert not [path for path in left if "home" not in path.parts], left
    assert not (folder / "out").exists()
    assert not [path for path in left if path.suffix == ".part"], left


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_config(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    text, words = CONFIGS[name]
    write_run_inputs(tmp_path, text)
    capsys.readouterr()
    attempt(tmp_path, monkeypatch, capsys, words)


@pytest.mark.parametrize("name", DATA)
def test_a_broken_data_file(tmp_path: Path, monkeypatch, capsys, name: str) -> None:
    content, words = DATA[name]
    write_run_inputs(tmp_path)
    task = tmp_path / "films.yaml"
    task.write_text(task.read_text())
    (tmp_path / "films.jsonl").write_bytes(content)
    capsys.readouterr()
    attempt(tmp_path, monkeypatch, capsys, words)
