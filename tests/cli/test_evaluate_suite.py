"""`monkeyjump evaluate --suite mamba` on rows of our own, instead of the Hub's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_inputs import model, save_model
from suite_rows import suite_task
from test_sandbox import needs_sandbox

from monkeyjump.cli import app
from monkeyjump.tasks import catalog, origins


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in catalog("mamba"):
        suite_task(name, tmp_path / name)
    known = origins.hub_table()
    here = {name: entry.model_copy(update={"id": str(tmp_path / name)}) for name, entry in known.items()}
    monkeypatch.setattr(origins, "hub_table", lambda: here)
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "llama")
    torch.manual_seed(0)
    adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")

    def evaluate(*arguments: str):
        capsys.readouterr()
        code = app.run(["evaluate", "adapter", "--model", "llama", "--limit", "2", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return evaluate


@needs_sandbox
def test_the_suite_with_code(evaluate):
    code, out, err = evaluate("--suite", "mamba", "--allow-code", "--json")
    assert code == 0, err
    found = {task["task"]: set(task["scores"]) for task in json.loads(out)["tasks"]}
    assert found == {
        "cnn_dailymail": {"rougeL", "rouge1", "rouge2"},
        "hotpot_qa": {"exact_match", "f1"},
        "humaneval": {"pass@1"},
    }


def test_without_leave_no_code_runs(evaluate):
    code, out, err = evaluate("--suite", "mamba", "--json")
    assert code == 0, err
    assert [task["task"] for task in json.loads(out)["tasks"]] == ["cnn_dailymail", "hotpot_qa"]
    assert "humaneval is left out: it runs code that the model writes; --allow-code asks for it" in " ".join(
        err.split()
    )
    code, _, err = evaluate("--tasks", "humaneval")
    assert code == 2
    assert "task humaneval runs code that the model writes" in err
    code, _, err = evaluate("--suite", "mambo")
    assert code == 2
    assert "unknown suite 'mambo'" in err
    assert "did you mean 'mamba'" in err
