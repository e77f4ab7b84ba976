"""The example of docs/baselines.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tiny import llama, tokens

PAGE = Path(__file__).parents[2] / "docs" / "baselines.md"


def test_example_trains_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {
        "base_model": llama(),
        "fresh_base": llama(),
        "data": [{"input_ids": row, "labels": row} for row in tokens(4)],
        "args": TrainingArguments(
            "run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        ),
    }
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, given)
    model, loaded = given["model"].eval(), given["loaded"].eval()
    assert model.auxiliary_losses().keys() == {"load_balance", "contrastive"}
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
