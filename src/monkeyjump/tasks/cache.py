"""Where downloaded and converted files are kept, and how a file or folder is written in one piece."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from monkeyjump.tasks.errors import InputError

MANIFEST = "manifest.json"


def home() -> Path:
    """The cache folder: MONKEYJUMP_HOME, else ~/.cache/monkeyjump."""
    return Path(os.environ.get("MONKEYJUMP_HOME") or Path.home() / ".cache" / "monkeyjump")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Raises InputError unless the file has the expected sha256."""
    found = sha256_of(path)
    if found != expected:
        raise InputError(
            f"{path}: damaged file: sha256 is {found}, expected {expected}",
            hint="delete this file and run the command again; it is then downloaded anew",
        )


@contextlib.contextmanager
def folder_in_one_piece(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place only when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    old = aside.with_name(f"{aside.name}-old")
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rename(old)  # a rename cannot replace a folder that is not empty
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_in_one_piece(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_manifest(folder: Path) -> None:
    """Records the sha256 of every file in `folder` and below it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    sums = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def verify_manifest(folder: Path) -> None:
    """Raises InputError unless every file that the manifest lists is there unchanged."""
    for name, expected in json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing", hint=f"delete {folder} and run the command again")
        verify(folder / name, expected)
