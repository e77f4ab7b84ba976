"""Runs over pictures and videos from local files, from the command line: plan, train, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_inputs import tokenizer, write_lines
from small_vision import vision_model, write_processor
from suite_rows import picture

from monkeyjump.cli import app

RUN = """
model: {path: model}
method: {r: 2, target_modules: '.*language_model.*\\.(q_proj|k_proj|v_proj|o_proj)', centers: {max_tokens: 200}}
data: {tasks: [TASKS], size: all}
train: {batch_size: 2, epochs: 1, learning_rate: 1e-2, log_every: 1, save_every: 100, routing_every: 2}
output: {folder: out}
"""
SIDES = ("good film", "good food")  # the same first word: each choice of a row is run with its pictures
AS_EXAMPLES = ("model.dtype=bfloat16", "train.precision=bf16", "train.gradient_checkpointing=true")


def images(folder: Path) -> str:
    """12 pictures of two sizes, so of different numbers of tiles."""
    for n in range(12):
        picture(n, (40, 30) if n % 2 else (30, 60)).save(folder / f"{n}.png")
    return _task(folder, "images", "media: {kind: image, column: file}", lambda n: f"{n}.png")


def clips(folder: Path) -> str:
    """12 folders of 6 frames, of which 3 are read."""
    for n in range(12):
        (folder / f"clip{n}").mkdir()
        for m in range(6):
            picture(10 * n + m).save(folder / f"clip{n}" / f"{m:03}.png")
    return _task(folder, "clips", "media: {kind: video, column: file, frames: 3}", lambda n: f"clip{n}")


def texts(folder: Path) -> str:
    return _task(folder, "texts", "", str)


def _task(folder: Path, name: str, media: str, cell) -> str:
    rows = [{"question": f"{name} {n} is it ?", "answer": SIDES[n % 2], "file": cell(n)} for n in range(12)]
    write_lines(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_text(
        f"name: {name}\nsource: {{kind: files, train: {name}.jsonl}}\n{media}\n"
        "columns: {question: question, label: answer}\ninstruction: '{question}'\nchoices: [good film, good food]\n"
    )
    return f"{name}.yaml"


@pytest.mark.parametrize(
    ("kinds", "more"),
    [((images,), ()), ((clips,), ()), ((images, clips, texts), AS_EXAMPLES)],
    ids=["pictures", "videos", "pictures-videos-texts"],
)
def test_plan_train_and_evaluate(kinds, more, tmp_path: Path, monkeypatch, capsys):
    vision_model(_words()).save_pretrained(tmp_path / "model")
    write_processor(tmp_path / "model")
    names = [make(tmp_path) for make in kinds]
    (tmp_path / "run.yaml").write_text(RUN.replace("TASKS", ", ".join(names)))
    monkeypatch.chdir(tmp_path)

    assert app.run(["plan", "run.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["problems"] == []
    assert plan["routed"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert plan["probe"]["unreached"] == []

    assert app.run(["train", "run.yaml", *more]) == 0
    losses = json.loads((tmp_path / "out/result.json").read_text())["losses"]
    assert len(losses) == plan["steps"]
    capsys.readouterr()
    assert app.run(["evaluate", "out", "--generate", "--against", "base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f"{one['task']}.yaml" for one in found["tasks"]] == names
    for one in found["tasks"]:
        assert set(one["answers"]) <= set(SIDES)
        assert len(one["written_answers"]) == len(one["answers"]) > 0


def _words():
    words = tokenizer(None)
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return words
