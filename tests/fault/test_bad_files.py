"""Adapters that do not fit, were damaged or are hostile are refused; nothing of them runs or stays."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tiny import llama, routed, tokens

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter of `llama()`."""
    folder = tmp_path_factory.mktemp("adapter")
    routed(llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def centers_in(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "jump_router.centers" in name)


# ---------------------------------------------------------------------- another base model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, r"is \[4, 32\] in the file and \[4, 64\] in the model"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* belongs to no module of the model"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
    ],
)
@pytest.mark.filterwarnings("ignore:base model. .* holds other weights")  # true as well, and said first
def test_base_of_another_shape_is_refused_tensor_by_tensor(adapter: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        PeftModel.from_pretrained(llama(**changes), adapter)
    assert "does not fit this base model" in str(error.value)
    assert "load it on the model that it was trained on" in str(error.value)
    assert " more; " in str(error.value)  # the first five and a count


def test_bad_adapter_beside_a_good_one_changes_no_weight(adapter: Path, copied: Path) -> None:
    edit(copied, lambda tensors: tensors.pop(centers_in(tensors)))
    model = PeftModel.from_pretrained(llama(), adapter).eval()
    before = model(tokens()).logits
    with pytest.raises(ValueError, match=r"model: model\.layers\.0\.jump_router\.centers is missing; load"):
        model.load_adapter(copied, adapter_name="second")
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: tensors.pop(next(k for k in tensors if "centers" in k)),
            "jump_router.centers.* is missing",
        ),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra belongs to no module"),
    ],
)
def test_missing_and_surplus_tensors_are_named(copied: Path, change: Callable, words: str) -> None:
    edit(copied, change)
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(llama(), copied)


def test_base_with_other_weights_is_warned_of(adapter: Path) -> None:
    with pytest.warns(UserWarning, match="other weights than those that this adapter was trained on; load"):
        PeftModel.from_pretrained(llama(seed=1), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_base_in_another_dtype_is_not_warned_of(adapter: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights.*")
        PeftModel.from_pretrained(llama().to(dtype), adapter)


def test_base_of_a_slightly_trained_copy_is_warned_of(adapter: Path) -> None:
    base = llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter *= 1 + 0.01 * torch.randn_like(parameter)
    with pytest.warns(UserWarning, match="holds other weights"):
        PeftModel.from_pretrained(base, adapter)


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("eighths", range(8))
def test_truncated_file_is_refused_by_name(copied: Path, eighths: int) -> None:
    whole = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(whole[: len(whole) * eighths // 8])
    base = llama()
    with pytest.raises(ValueError, match="copy it again, or train the adapter anew") as error:
        PeftModel.from_pretrained(base, copied)
    assert str(copied / WEIGHTS) in str(error.value)
    assert torch.equal(base(tokens()).logits, llama()(tokens()).logits)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", b"\xff" * 64])
def test_file_of_another_kind_is_refused_by_name(copied: Path, content: bytes) -> None:
    (copied / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        PeftModel.from_pretrained(llama(), copied)


def test_centers_that_are_not_finite_are_refused(copied: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[centers_in(tensors)][0, 0] = float("nan")

    edit(copied, poison)
    with pytest.raises(ValueError, match=r"centers.*(NaN|nan|finite)"):
        PeftModel.from_pretrained(llama(), copied)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_k", 0, "top_k=0"),
        ("granularity", "tokenz", "granularity='tokenz'"),
        ("base", "ia3", "base='ia3'"),
    ],
)
def test_config_file_is_checked_like_a_config(copied: Path, field: str, value: Any, words: str) -> None:
    path = copied / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(llama(), copied)


# ---------------------------------------------------------------------- hostile files


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.sentinel),)


def test_payload_works_when_unpickled(tmp_path: Path) -> None:
    # else the test below would prove nothing
    pickle.loads(pickle.dumps(Payload(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("write", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, about the file before it refuses it
def test_pickled_weights_never_run(copied: Path, write: Callable) -> None:
    (copied / WEIGHTS).unlink()
    write({"weight": Payload(copied / "sentinel")}, copied / "adapter_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, RuntimeError)):
        PeftModel.from_pretrained(llama(), copied)
    assert not (copied / "sentinel").exists()


def test_saving_writes_safetensors_and_text_only(adapter: Path) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]
    assert "import monkeyjump" in (adapter / "README.md").read_text()
