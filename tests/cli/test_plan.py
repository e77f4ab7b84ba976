"""`monkeyjump plan`: what it finds out, and that it fails where a run would silently do nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_inputs import model, rows, save_model, tokenizer, write_task
from transformers import LlamaConfig, MambaConfig, MambaForCausalLM

from monkeyjump.cli import app

RUN = """
model: {path: model}
method: {r: 2}
data: {tasks: [films.yaml, food.yaml], size: small}
train: {batch_size: 4, accumulation: 2, epochs: 3}
output: {folder: out}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_model(tmp_path / "model")
    write_task(tmp_path, "films")
    write_task(tmp_path, "food", [{**row, "sentence": str(row["sentence"]).replace("film", "food")} for row in rows()])
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MONKEYJUMP_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def plan(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command line: its exit code and what it wrote; JSON where asked for."""

    def plan(*arguments: str):
        code = app.run(["plan", "run.yaml", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in arguments and code < 2 else out, err

    return plan


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "home")


def test_the_json_says_what_the_run_would_do(plan, folder: Path):
    before = entries(folder)
    code, found, _ = plan("--json")
    assert code == 0
    # hidden 32, keys and values 16, feed-forward 48: r * (d_in + d_out) of q, k, v, o, gate in two blocks
    assert found["trainable_parameters"] == 2 * 2 * (64 + 48 + 48 + 64 + 80)
    assert found["total_parameters"] == found["trainable_parameters"] + model().num_parameters()
    assert found["routed"] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert found["shared"] == ["self_attn.o_proj", "mlp.gate_proj"]
    assert (found["missed"], found["problems"], found["plain"]) == ([], [], [])
    assert (len(found["blocks"]), found["adapted_modules"]) == (2, 10)
    assert found["rows"]["food"] == {"train": 16, "available": 16, "test": 8, "cut": 0, "dropped": {}}
    assert found["steps"] == 3 * 4
    assert [(sample["task"], sample["pieces"][-1][1]) for sample in found["samples"]] == [
        ("films", True),
        ("food", True),
    ]
    assert found["samples"][0]["pieces"][-1][0] in ("positive </s>", "negative </s>")
    assert "positive or negative ?" in found["samples"][0]["pieces"][0][0]
    assert (found["probe"]["adapters"], found["probe"]["unreached"]) == (10, [])
    assert len(found["experts"]) == 2
    assert all(sum(block["tokens"].values()) > 0 for block in found["experts"])
    assert found["memory"]["measured"]
    assert entries(folder) == before


def test_the_table_is_plain_and_names_everything(plan):
    code, out, _ = plan()
    assert code == 0
    for text in ("parameters train", "routed: self_attn.q_proj", "on every token", "films", "LEARNED", "masked",
                 "Tokens per expert", "10 of 10 adapters", "no problem found"):  # fmt: skip
        assert text in out, text
    assert "\x1b" not in out


def test_a_config_alone_is_enough_for_the_parameters(plan, folder: Path):
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=8).save_pretrained(folder / "eight")
    code, found, _ = plan("--json", "--parameters", "model.path=eight", "--preset", "paper", "method.r=2")
    assert code == 0
    assert found["trainable_parameters"] == 32 * 2 * (8192 + 5120 + 5120 + 8192 + 18432)
    assert found["total_parameters"] > 8e9
    assert found["memory"]["weights"] > 16e9
    assert found["rows"] == {}
    code, found, _ = plan("--json", "model.path=eight/config.json")  # it finds out by itself what it cannot look at
    assert code == 0
    assert "no tokenizer" in found["left_out"][0]


def test_without_weights_the_rows_are_still_counted(plan, folder: Path):
    (folder / "model" / "model.safetensors").unlink()
    code, found, _ = plan("--json")
    assert (code, found["rows"]["films"]["train"], found["probe"]) == (0, 16, None)
    assert "no weights" in found["left_out"][0]


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.target_modules=[q_proj,k_porj]", "k_porj"),
        ("method.shared_modules=[o_prj]", "o_prj"),
        ("method.target_modules=[gate_prj]", "gate_prj"),
        ("method.r=0", "`r` should be a positive integer"),
    ],
)
def test_names_that_match_nothing_are_a_failure(plan, override: str, word: str):
    code, found, _ = plan("--json", override)
    assert code == 1
    assert any(word in problem for problem in found["problems"])
    if "=[" in override:
        assert found["missed"] == [word]


def test_an_adapter_that_the_model_reads_around_is_a_failure(plan, folder: Path):
    """transformers' Mamba takes dt_proj's weight and never calls the module: its adapter has no gradient (F25)."""
    config = MambaConfig(vocab_size=140, hidden_size=32, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(folder / "mamba")
    tokenizer().save_pretrained(folder / "mamba")
    plain = ("--json", "model.path=mamba", "method.routed=false")
    code, found, _ = plan(*plain, "method.target_modules=[in_proj,dt_proj]")
    assert code == 1
    assert len(found["probe"]["unreached"]) == 2
    assert all(name.endswith("dt_proj") for name in found["probe"]["unreached"])
    assert "no gradient reaches 2 of 4 adapters" in found["problems"][0]
    code, found, _ = plan(*plain, "method.target_modules=[in_proj]")
    assert (code, found["problems"]) == (0, [])


def test_rows_that_go_out_are_counted_by_reason(plan, folder: Path):
    write_task(folder, "food", [*rows(24), {"sentence": "film 0 was good", "mark": "negative"}])
    code, found, _ = plan("--json", "data.max_length=23", "data.tasks=[food.yaml]")
    assert code == 0
    dropped = found["rows"]["food"]["dropped"]
    assert dropped["same text, different labels"] == 2
    assert found["rows"]["food"]["train"] == 22 - 8
    assert found["rows"]["food"]["cut"] > 0
    assert max(sample["tokens"] for sample in found["samples"]) <= 23


def test_shares_are_shown(plan):
    code, found, _ = plan("--json", "data.weights={films: 9, food: 1}", "data.cap=8")
    assert code == 0
    assert {row["available"] for row in found["rows"].values()} == {8}
    assert found["rows"]["films"]["train"] > 2 * found["rows"]["food"]["train"] > 0


def test_an_expert_that_no_task_is_sent_to_is_a_failure(plan):
    tasks = ("--json", "train.gradient_checkpointing=true", "method.granularity=task")
    code, found, _ = plan(*tasks)  # three experts, two tasks
    assert code == 1
    assert [name.rsplit(".", 1)[1] for name in found["probe"]["unreached"]] == ["v_proj", "v_proj"]
    code, found, _ = plan(*tasks, "method.task_experts={0: [q_proj], 1: [k_proj, v_proj]}")
    assert (code, found["problems"]) == (0, [])


def test_the_schema_is_printed(plan):
    code, out, _ = plan("--schema")
    assert code == 0
    assert {"model", "method", "data", "train", "output"} <= set(json.loads(out)["properties"])


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("train.learning_rat=1",), "unknown field 'train.learning_rat'", "learning_rate"),
        (("model.path=nowhere",), "model.path: 'nowhere' cannot be read", "config.json"),
        (("data.tasks=[tweet]",), "unknown task 'tweet'", "tweets"),
        (("data.weights={film: 2}",), "weights: no task 'film'", "films"),
        (("data.max_length=3",), "instruction and answer of task films need 19 tokens", "max_length"),
        (("--preset", "papper"), "unknown preset 'papper'", "paper"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(plan, folder: Path, arguments, error: str, hint: str):
    before = entries(folder)
    code, _, err = plan(*arguments)
    lines = err.splitlines()
    assert (code, len(lines)) == (2, 2)
    assert error in lines[0]
    assert hint in lines[1]
    assert entries(folder) == before


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]):
    assert app.run(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("train.learning_rate", "method.top_k", "data.temperature", "--json", "the highest one"):
        assert word in out
