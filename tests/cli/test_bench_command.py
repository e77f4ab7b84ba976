"""`monkeyjump bench` as a person runs it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from monkeyjump.bench.settings import ALL, CANDIDATES, FIGURE2, SECTIONS
from monkeyjump.cli import app

SHAPE = "--hidden-size 32 --layers 2 --heads 4 --intermediate-size 48 --vocab-size 64 --length 8"
SMALL = f"{SHAPE} --memory-batch 1 --center-tokens 64 --decode-tokens 2 --threads 1 --pairs 2 --warmup 1"
NAMES = ["floor", "peft-lora", "mj-lora"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict]:
    folder = tmp_path_factory.mktemp("bench")
    line = ["bench", *SMALL.split(), "--preset", "fig2", "--batch", "2", "--candidates", ",".join(NAMES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    finished = subprocess.run(
        [sys.executable, "-m", "monkeyjump", *line, "--output", "out"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished, json.loads((folder / "out" / "results.json").read_text())


def test_results_have_every_section_and_every_raw_time(done):
    _, record = done
    assert set(record) == {"machine", "settings", "figure2", *SECTIONS}
    timed = [record["step"], *record["inference"].values()]
    assert len(timed) == 4
    for section in timed:
        assert list(section) == NAMES
        assert all(len(row["seconds"]) == 2 for row in section.values())
        for name, key in (("floor", "to_floor"), ("peft-lora", "to_peft_lora"), ("mj-lora", "to_mj_lora")):
            assert section[name][key]["median"] == 1
            other = NAMES[NAMES.index(name) - 1]
            assert section[other][key]["median"] == pytest.approx(
                statistics.median(a / b for a, b in zip(section[other]["seconds"], section[name]["seconds"]))
            )
    for section in ("saved", "memory"):
        assert record[section]["peft-lora"]["to_peft_lora"] == 1
        assert record[section]["floor"]["above_floor"] == 0
    assert record["size"]["mj-lora"]["trainable"] == record["size"]["peft-lora"]["trainable"] > 0
    assert record["size"]["floor"]["adapter_bytes"] is None
    assert record["kmeans"]["blocks"] == 2
    assert all(value is not None for row in record["figure2"].values() for value in row.values())


def test_preset_gives_what_is_not_given(done, tmp_path: Path):
    settings = done[1]["settings"]
    assert (settings["batch"], settings["accumulation"]) == (2, 2)
    for arguments, candidates in ((["--preset", "fig2"], FIGURE2), (["--candidates", "all"], ALL), ([], CANDIDATES)):
        line = [*f"bench {SHAPE} --only size --experts 3 --top-k 1 --output {tmp_path}".split(), *arguments]
        assert app.run(line) == 0
        record = json.loads((tmp_path / "results.json").read_text())
        assert list(record["size"]) == list(candidates)
        assert (record["settings"]["experts"], record["settings"]["top_k"]) == (3, 1)


def test_machine_is_described(done):
    found = done[1]["machine"]
    assert found["command"][:2] == ["monkeyjump", "bench"]
    assert found["threads"] == 1
    assert {"cpu", "cores", "torch", "transformers", "peft"} <= set(found)


def test_output_is_plain_and_progress_apart(done):
    finished, _ = done
    assert "Training step, 2 x 8 tokens" in finished.stdout
    assert "training step: 100 %" in finished.stderr
    assert "100 %" not in finished.stdout
    assert "\x1b" not in finished.stdout + finished.stderr


@pytest.mark.slow
def test_every_method_is_measured_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = "--only step,saved,size --candidates all --input-gradients --dropout 0.1 --optimizer"
    assert app.run(["bench", *SMALL.split(), *options.split(), "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    for section in ("step", "saved", "size"):
        assert list(record[section]) == list(ALL)
    assert all(row["above_floor"] > 0 for name, row in record["saved"].items() if name != "floor")
    printed = capsys.readouterr().out
    for name in ALL:  # a row in each of the three tables
        assert sum(line.split()[1:2] == [name] for line in printed.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("--candidates", "floor,mj-lor"), "--candidates: 'mj-lor' is not known", "mj-lora"),
        (("--only", "stpe"), "--only: 'stpe' is not known", "step"),
        (("--targets", "q_proj,k_porj", *SHAPE.split()), "no linear layer 'k_porj'", "k_proj"),
        (("--targets", "lm_head", *SHAPE.split()), "mj-lora cannot be built", "--targets"),
        (("--model", "nowhere"), "--model: 'nowhere' cannot be read", "config.json"),
        (("--pairs", "1"), "--pairs: 1 is below 2", "from 2 on"),
        (("--output", "file"), "--output: file is a file", "folder"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(
    arguments: tuple[str, ...],
    error: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code = app.run(["bench", *arguments])
    first, second = capsys.readouterr().err.splitlines()
    assert code == 2
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second


def test_sections_not_asked_for_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = f"bench {SHAPE} --only saved,size --candidates floor,mj-lora --output {tmp_path}"
    assert app.run(line.split()) == 0
    assert set(json.loads((tmp_path / "results.json").read_text())) == {
        "machine", "settings", "figure2", "saved", "size"
    }  # fmt: skip
    assert "Training step" not in capsys.readouterr().out
