"""What the command says before any of its commands."""

from __future__ import annotations

import pytest

import monkeyjump
from monkeyjump.cli import app


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"monkeyjump {monkeyjump.__version__}\n"


def test_without_arguments_it_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "evaluate", "mamba", "methods"))
