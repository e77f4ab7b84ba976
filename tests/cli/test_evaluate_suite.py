"""`monkeyjump evaluate --suite mamba` on rows of our own, instead of the Hub's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_inputs import model, save_model, tokenizer
from suite_rows import suite_task
from test_sandbox import needs_sandbox

from monkeyjump.cli import app
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.shrink import shrink
from monkeyjump.tasks import catalog, origins
from tiny_mamba import mamba


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


def test_a_whole_mamba_and_a_shrunk_one_against_it(evaluate, capsys):
    """The folders of `mamba pretrain` and `mamba shrink` are models, without an adapter."""
    for name, kept in (("dense", 32), ("small", 16)):
        whole = mamba(vocab_size=140)
        if kept < 32:
            shrink(whole, {name: torch.arange(kept) for name in channel_groups(whole)})
        whole.save_pretrained(name)
        tokenizer().save_pretrained(name)
    capsys.readouterr()
    asked = ("--suite", "mamba", "--limit", "2", "--json")
    assert app.run(["evaluate", "small", "--against", "dense", *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [task["task"] for task in found["tasks"]] == ["cnn_dailymail", "hotpot_qa"]
    assert {line["task"] for line in found["against"]} == {"cnn_dailymail", "hotpot_qa", "all tasks, pooled"}
    mamba(seed=1, vocab_size=140).save_pretrained("dense")  # another model in the same place
    assert app.run(["evaluate", "dense", *asked]) == 0
    assert "evaluated already" not in capsys.readouterr().err


def test_a_missing_package_is_said_before_an_answer_is_written(evaluate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr("monkeyjump.evaluation.run.answer", lambda *given, **options: pytest.fail("hours of writing"))
    code, _, err = evaluate("--suite", "mamba")
    assert code == 2
    assert "monkeyjump[eval]" in err


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
