"""From a YAML file, a preset and dotted overrides to a checked `RunConfig`; and what is said where they are wrong.

Later ones win: the preset, the file, the overrides. Every problem is reported, not the first one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.reading import read_mapping
from monkeyjump.training.adapters import adapter_fields, check_method, routed_unless_told
from monkeyjump.training.config import SECTIONS, Centers, Method, RunConfig
from monkeyjump.training.presets import find_preset
from monkeyjump.training.problems import explain


def read_run(path: Path, overrides: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """A run's file, checked.

    Args:
        overrides: `section.field=value` each.
        preset: of `presets.py`; None: the one that the file names under `preset`, or none.

    Raises:
        InputError: one sentence for every problem, with field, value and remedy.
    """
    raw = _merged(_load(path), overrides, str(path))
    return validate(raw, path.parent, str(path), preset)


def validate(raw: dict[str, Any], folder: Path, where: str, preset: str | None = None) -> RunConfig:
    """A run from plain values; relative paths in it are relative to `folder`. Raises InputError."""
    named = raw.pop("preset", None) if isinstance(raw, dict) else None
    chosen = preset or named
    if chosen is not None:
        base = find_preset(str(chosen), _base_of(raw))
        raw = OmegaConf.to_container(OmegaConf.merge(base, raw))  # type: ignore[assignment]
    try:
        return RunConfig.model_validate(raw, context={"folder": folder})
    except ValidationError as error:
        problems = explain(error, _fields_beside)
        problems += _method_problems(raw, [details["loc"] for details in error.errors()])
    hints = list(dict.fromkeys(hint for _, hint in problems if hint))
    raise InputError(f"{where}: {'; '.join(text for text, _ in problems)}", hint="; ".join(hints))


def write_run(config: RunConfig) -> str:
    """The YAML of a checked config, every field written out."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}", hint="give the YAML file of a run; examples/ has some")
    return read_mapping(path, "sections", hint=f"sections: {', '.join(SECTIONS)}")


def _merged(raw: dict[str, Any], overrides: Sequence[str], where: str) -> dict[str, Any]:
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key.strip():
            raise InputError(
                f"override '{override}': expected section.field=value", hint="for example train.learning_rate=1e-4"
            )
    try:
        return OmegaConf.to_container(  # type: ignore[return-value]
            OmegaConf.merge(raw, OmegaConf.from_dotlist(list(overrides))), resolve=True
        )
    except Exception as error:  # OmegaConf's and the YAML parser's
        raise InputError(f"{where}: overrides do not fit: {' '.join(str(error).split())}") from None


def _base_of(raw: dict[str, Any]) -> str:
    method = raw.get("method")
    return str(method.get("base", "lora")) if isinstance(method, dict) else "lora"


def _method_problems(raw: dict[str, Any], locations: list[tuple[int | str, ...]]) -> list[tuple[str, str]]:
    """What pydantic does not get to look at where a field inside `method` is wrong already."""
    method = raw.get("method")
    if not isinstance(method, dict) or not any(place[0] == "method" and len(place) > 1 for place in locations):
        return []
    options = {name: value for name, value in method.items() if name not in Method.model_fields}
    fields = {name: method.get(name, Method.model_fields[name].default) for name in ("base", "preset")}
    fields["routed"] = method.get("routed", routed_unless_told(str(fields["base"])))
    try:
        check_method(str(fields["base"]), bool(fields["routed"]), str(fields["preset"]), options)
    except (TypeError, ValueError) as error:
        return [(f"method: {error}", "")]
    return []


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    """The names that could stand where an unknown one was found."""
    if len(location) < 2:
        return [*SECTIONS, "preset"]
    if location[-2] == "centers":
        return list(Centers.model_fields)
    return list(SECTIONS[str(location[0])].model_fields)


def describe_fields(base: str = "lora") -> list[tuple[str, str, str, str]]:
    """(section.field, type, default, help) of everything that a run's file may say."""
    found = []
    for section, model in SECTIONS.items():
        found += _describe(section, model)
        if section == "method":
            extra = {
                n: f for n, f in adapter_fields(base, routed_unless_told(base)).items() if n not in Method.model_fields
            }
            found += [(f"method.{n}", "", _short(default), text) for n, (default, text) in extra.items()]
    return found


def _describe(section: str, model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    found = []
    for name, field in model.model_fields.items():
        if field.annotation is Centers:
            found += _describe(f"{section}.{name}", Centers)
        else:
            default = "required" if field.is_required() else _short(field.default)
            found.append((f"{section}.{name}", _type(field.annotation), default, field.description or ""))
    return found


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else None
    return (text or str(annotation)).replace("typing.", "").replace("pathlib._local.", "").replace("pathlib.", "")


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
