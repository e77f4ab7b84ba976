"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn
from transformers import TrainingArguments

from monkeyjump.tuner import blocks
from tiny import llama, tokens

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    settings = {"max_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    given = {
        "base_model": llama(),
        "fresh_base": llama(),
        "data": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(16, 6)],
        "args": TrainingArguments("run", **settings),
        "prompt": tokens(1, 4),
    }
    exec(code[1], given)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_commands_are_make_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^|`|PYTHON=\S+ )make ([a-z-]+)", README, re.MULTILINE)
    assert {"demo", "test", "test-all", "help"} <= set(named)
    assert set(named) <= {*targets}


def test_what_it_links_to_is_there() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_example_of_a_registered_block_runs() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None

    class MyBlock(nn.Module):
        def forward(self, padding: object, h: object) -> object:
            return h

    try:
        exec(code[1], {"MyBlock": MyBlock})
        hook = blocks._hooks[MyBlock]
        assert (hook.hidden_states, hook.parameters) == ("h", ("padding", "h"))
    finally:
        blocks._hooks.pop(MyBlock, None)
