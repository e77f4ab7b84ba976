"""A folder with a tiny Mamba, and its command line run in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mamba_inputs import write_base

from monkeyjump.cli import app


@pytest.fixture(scope="session")
def mamba_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def mamba_folder(mamba_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model` and `text.txt`."""
    shutil.copytree(mamba_base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mamba(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Runs `monkeyjump mamba ...`: its exit code and its lines on stdout and stderr."""

    def mamba(*arguments: str) -> tuple[int, list[str]]:
        code = app.run(["mamba", *arguments])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return mamba
