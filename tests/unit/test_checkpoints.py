"""Checkpoints: complete or absent, damaged ones passed over with a word; adapters read back; a full disk."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch

from monkeyjump.training.checkpoints import ASIDE, clear_aside, finish, found_in, latest
from monkeyjump.training.saving import SaveFailed, save_adapter, try_saving
from tiny import llama, routed


def written(folder: Path, step: int) -> Path:
    place = folder / ASIDE / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "weights").write_bytes(bytes(range(step)))
    (place / "training_args.bin").write_bytes(b"pickle")
    return place


def test_finished_ones_are_moved_and_rotated(tmp_path: Path):
    for step in (2, 10, 9):
        finish(written(tmp_path, step), tmp_path, keep=2)
    assert [path.name for path in found_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert latest(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(path.name for path in (tmp_path / "checkpoint-9").iterdir()) == ["manifest.json", "weights"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no manifest", "empty"])
def test_a_damaged_one_is_passed_over_with_a_word(tmp_path: Path, damage: str):
    for step in (5, 6):
        finish(written(tmp_path, step), tmp_path, keep=9)
    newest = tmp_path / "checkpoint-6"
    if damage == "flip":
        (newest / "weights").write_bytes(bytes([9, *range(1, 6)]))
    elif damage == "truncate":
        (newest / "weights").write_bytes(b"")
    elif damage == "missing":
        (newest / "weights").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (tmp_path / "checkpoint-7").mkdir()  # the empty folder that would win in transformers 5.23
        assert len(found_in(tmp_path)) == 3
        newest = tmp_path / "checkpoint-7"
    with pytest.warns(UserWarning, match=f"checkpoint passed over.*{newest.name}"):
        found = latest(tmp_path)
    assert found == tmp_path / ("checkpoint-6" if damage == "empty" else "checkpoint-5")


def test_what_a_kill_left_is_no_checkpoint_and_goes(tmp_path: Path):
    finish(written(tmp_path, 4), tmp_path, keep=2)
    written(tmp_path, 8)
    (tmp_path / ".removed-checkpoint-2").mkdir()
    assert latest(tmp_path) == tmp_path / "checkpoint-4"
    clear_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_saved_adapter_is_read_back(tmp_path: Path):
    model = routed(llama())
    save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "manifest.json").is_file()
    assert try_saving(model, tmp_path) > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_weights_that_are_not_finite_replace_nothing(tmp_path: Path):
    model = routed(llama())
    save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(SaveFailed, match=re.escape("empty or not finite; nothing was replaced")):
        save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("I/O error: os error 27")])
def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path: Path, error: Exception):
    model = routed(llama())
    save_adapter(model, tmp_path / "adapter")

    def write(place: str) -> None:
        (Path(place) / "half").write_bytes(b"x")
        raise error

    with pytest.raises(SaveFailed, match=r"adapter could not be written: no space \(.*MiB free\)"):
        save_adapter(model, tmp_path / "adapter", write)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
