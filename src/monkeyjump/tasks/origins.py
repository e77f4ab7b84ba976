"""Where a task's rows come from, as a task file says it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, field_validator

ROW_SUFFIXES = ("jsonl", "csv", "tsv", "parquet")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PackageSource(Strict):
    """Files inside a pinned Python package (see `packages.py`); train and test rows are drawn from them."""

    kind: Literal["package"]
    package: str
    archive: str | None = Field(default=None, description="pattern of an archive inside the package")
    files: str = Field(description="pattern of the member files")
    format: Literal["tsv", "text"] = Field(description="text: one row a file, columns text and folder")
    header: list[str] = Field(default=[], description="column names of a tsv without a header line")
    undecodable: Literal["strict", "replace"] = Field(default="strict", description="bytes that are not UTF-8")


class HubSource(Strict):
    """A data set on the Hugging Face Hub, or a local folder in the same layout."""

    kind: Literal["hub"]
    id: str = Field(description="owner/name, a local folder, or a short name of hub.yaml")
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = Field(default="validation", description="null: test rows are taken from train")
    revision: str | None = None
    stream: int | None = Field(
        default=None, ge=1, description="read only so many rows of each split over the network, instead of all"
    )


class FileSource(Strict):
    """Local files, or folders of files of one format; the suffix tells the format.

    A folder of images holds one sub-folder a class: columns image and label.
    """

    kind: Literal["files"]
    train: Path
    test: Path | None = Field(default=None, description="null: test rows are taken from train")

    @field_validator("train", "test")
    @classmethod
    def _exists(cls, path: Path | None, info: Any) -> Path | None:
        if path is None:
            return None
        path = (info.context or {}).get("folder", Path()) / path
        if path.is_dir():
            row_files(path)
        elif not path.is_file():
            raise ValueError(f"no such file: {path}")
        elif suffix_of(path) not in ROW_SUFFIXES:
            raise ValueError(f"the suffix must be one of {', '.join(ROW_SUFFIXES)}")
        return path


Source = PackageSource | HubSource | FileSource


def suffix_of(path: Path) -> str:
    return path.suffix.lstrip(".").lower()


def row_files(path: Path) -> list[Path]:
    """The files a path stands for: itself, or a folder's files of one format. Raises ValueError."""
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if suffix_of(file) in ROW_SUFFIXES]
    formats = sorted({suffix_of(file) for file in found})
    if len(formats) > 1:
        raise ValueError(f"{path} mixes {', '.join(formats)} files: keep one format, or name one file")
    if found:
        return found
    images = [file for file in sorted(path.rglob("*")) if suffix_of(file) in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"no {', '.join(ROW_SUFFIXES)} or image file in {path}")
    return images


class HubEntry(Strict):
    """An entry of hub.yaml. `columns`: where the names of the columns are from."""

    id: str
    revision: str | None = None
    columns: Literal["card", "code", "memory"]
    loaded: Literal["yes", "no"] = "no"
    note: str = ""


def hub_table() -> dict[str, HubEntry]:
    """Short name -> entry. All Hub ids of the catalog are in this one file."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(str(files(__package__) / "hub.yaml")))
    return {name: HubEntry.model_validate(entry) for name, entry in raw.items()}


def resolve(source: HubSource) -> tuple[str, str | None]:
    """Hub id and revision of a source, looked up in hub.yaml where it is a short name."""
    entry = hub_table().get(source.id)
    if entry is None:
        return source.id, source.revision
    return entry.id, source.revision or entry.revision
