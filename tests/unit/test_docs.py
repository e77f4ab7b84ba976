"""The Python in the docs runs as it stands, and what is generated or linked there is up to date."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel, get_peft_model, mapping
from peft.utils import PeftType
from transformers import TrainingArguments

from monkeyjump import MonkeyJumpConfig, register_routed_methods
from monkeyjump.tuner import registry
from tiny import gates, llama, tokens, trainable

DOCS = Path(__file__).parents[2] / "docs"
TARGETS = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture
def own_method(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names of the first example in own-methods.md, run; afterwards PEFT forgets the method again."""
    tables = [value for name, value in vars(mapping).items() if name.startswith("PEFT_TYPE_TO_")]
    tables += [registry._config_classes, PeftType._member_map_, PeftType._value2member_map_]
    before, names = [dict(table) for table in tables], list(PeftType._member_names_)
    module = ModuleType("own_method")
    monkeypatch.setitem(sys.modules, "own_method", module)  # dataclasses look their module up
    try:
        _run(_examples()[0], vars(module))
        yield vars(module)
    finally:
        for table, entries in zip(tables, before):
            table.clear()
            table.update(entries)
        PeftType._member_names_[:] = names


def _run(code: str, given: dict[str, Any]) -> None:
    exec(compile(code, "own-methods.md", "exec", dont_inherit=True), given)  # without this file's __future__ imports


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / "own-methods.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_own_method_trains_and_reloads(
    own_method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"max_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    own_method |= {
        "base_model": llama(),
        "fresh_base": llama(),
        "data": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(16, 6)],
        "args": TrainingArguments("run", **settings),
    }
    _run(_examples()[1], own_method)
    model, loaded = own_method["model"].eval(), own_method["loaded"].eval()
    assert all(parameter.any() for parameter in trainable(model).values())  # one step from zero
    ids = tokens()
    logits = loaded(ids).logits
    assert torch.equal(logits, model(ids).logits)
    assert not torch.equal(logits, llama()(ids).logits)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_own_method_is_gated(own_method: dict[str, Any], in_place: bool) -> None:
    """Also where its layer adds to the base's output in place: y = W x + m * shift."""
    if in_place:
        code = _examples()[0]
        line = "y = y + self.shift_vector[adapter].to(y.dtype)"
        assert line in code
        code = code.replace(line, line.replace("y = y +", "y +="))
        own_method["ShiftLayer"].forward = _class_of(code, own_method, "ShiftLayer").forward
    model = _random_shifts(get_peft_model(llama(), MonkeyJumpConfig(base="shift", target_modules=TARGETS, **START)))
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda layer, args, out: seen.extend((args[0], out)))
    m = gates(model, input_ids=tokens())[0][..., 1:2]
    x, y = seen
    assert 0 < (m == 0).sum() < m.numel()
    wanted = x.double() @ layer.base_layer.weight.double().T + m.double() * layer.shift_vector["default"].double()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_api_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.text() == generate.PAGE.read_text(encoding="utf-8"), "run `make docs`"


def test_links_and_pictures_are_there() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    for picture in DOCS.glob("*.svg"):
        ElementTree.parse(picture)


def test_registering_again_changes_nothing(own_method: dict[str, Any]) -> None:
    former = registry.config_class("shift")
    register_routed_methods()
    assert registry.config_class("shift") is former
    assert PeftType["MJ_SHIFT"].value == "MJ_SHIFT"


START = {"center_init": "random"}


def _class_of(code: str, given: dict[str, Any], name: str) -> Any:
    """One class of an example, defined anew."""
    body = re.search(rf"^class {name}\b.*?(?=^\S)", code, re.DOTALL | re.MULTILINE)
    assert body is not None
    made = dict(given)
    _run(body[0], made)
    return made[name]


def _random_shifts(model: PeftModel) -> PeftModel:
    torch.manual_seed(5)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter)
    return model.eval()
