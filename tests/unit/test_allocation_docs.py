"""The Python in docs/mamba/allocation.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_allocation_attach import batch, mamba

PAGE = Path(__file__).parents[2] / "docs" / "mamba" / "allocation.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    first, arms, routing = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"model": mamba(), "batches": [batch(), batch(7)]}
    exec(first, names)
    assert "LoRA: 2 modules" in capsys.readouterr().out
    assert (tmp_path / "adapters" / "allocation.json").is_file()
    exec(arms, names)
    assert {name: plan.parameters <= names["budget"] for name, plan in names["arms"].items()}["hybrid"]
    exec(routing, names)
    assert "mixer.dt_proj" in names["routed"].base_model.model.backbone.layers[0].jump_router.slots["default"]
