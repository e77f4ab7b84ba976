"""Real text as documents: local files and folders, data sets of the Hub, or the texts of the demo's packages.

A document is what stands on its own: a .txt file, a row of .jsonl, an article of a WikiText file, a row of a data
set of the Hub. No document is read across into another in training, nor scored with another's context.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.lines import parse_json_lines, read_lines
from monkeyjump.tasks.origins import HubSource
from monkeyjump.tasks.reading import catalog, read_task
from monkeyjump.tasks.sources import hub_rows, read_source

TEXT_SUFFIXES = (".txt", ".jsonl")
FIELD = "text"
TITLE = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)  # of a WikiText article; its sections have "= ="
FEW = 20  # with fewer documents, each gives its end to the held-out text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Documents:
    """Texts, none of them blank, and where they are from."""

    texts: list[str]
    origin: str

    @property
    def fingerprint(self) -> str:
        """sha256 over the documents in their order."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)


def read_documents(given: Sequence[str], say: Say = lambda text: None) -> Documents:
    """The documents of `given`, or of the demo's packages where nothing is given; an article of WikiText is one.

    Raises:
        InputError: nothing there, nothing in it, or not text.
    """
    if not given:
        return Documents(list(_filled(_demo_texts(say))), "the demo's packages")
    return Documents(list(iterate(given, articles=True)), ", ".join(given))


def iterate(given: Sequence[str], articles: bool = False) -> Iterator[str]:
    """The documents of files, folders and `dataset:config:split` names, one at a time.

    Args:
        articles: a WikiText file gives a document for each article; False: one for the whole file, as its
            perplexity is usually stated.

    Raises:
        InputError: at the call, for a name that leads nowhere; on the way, where nothing is in it, or no text.
    """
    return _iterate([(name, _places(name)) for name in given], articles)


def _iterate(given: list[tuple[str, list[Path]]], articles: bool) -> Iterator[str]:
    for name, files in given:
        rows = itertools.chain.from_iterable(_read_file(file, articles) for file in files) if files else _hub_rows(name)
        empty = True
        for text in _filled(rows):
            empty = False
            yield text
        if empty:
            raise InputError(f"{name}: no text in it", hint="give .txt files, or .jsonl rows with a field 'text'")


def _places(name: str) -> list[Path]:
    """The files that a name stands for; none for a data set of the Hub."""
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES)
        if not files:
            raise InputError(f"{name}: no .txt or .jsonl file in this folder", hint="name the files themselves")
        return files
    if path.is_file():
        return [path]
    parts = name.split(":")
    if len(parts) == 1:
        raise InputError(
            f"{name}: no such file or folder", hint="of the Hub: dataset:config:split, such as deepmind/pg19::test"
        )
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise InputError(
            f"{name}: neither a file nor dataset:config:split",
            hint="an empty config is the default one, such as deepmind/pg19::test",
        )
    return []


def _read_file(path: Path, articles: bool) -> Iterator[str]:
    if path.suffix.lower() == ".jsonl":
        for row in parse_json_lines(read_lines(path), str(path)):
            yield _field(row.values, row.where)
        return
    text = "".join(read_lines(path))
    starts = [match.start() for match in TITLE.finditer(text)] if articles else []
    yield from (text[begin:end] for begin, end in zip([0, *starts], [*starts, len(text)]))


def _field(values: dict[str, Any], where: str) -> str:
    text = values.get(FIELD)
    if not isinstance(text, str):
        raise InputError(
            f"{where}: field '{FIELD}' is {text!r}, not a text", hint=f"fields there: {', '.join(values) or 'none'}"
        )
    return text


def _hub_rows(name: str) -> Iterator[str]:
    """Row by row over the network: a book is never held together with its data set."""
    path, config, split = name.split(":")
    for row in hub_rows(HubSource(kind="hub", id=path, config=config or None), split):
        yield _field(row.values, row.where)


def _demo_texts(say: Say) -> Iterator[str]:
    for path in catalog("demo").values():
        for row in read_source(read_task(path), say).train.scan([FIELD]):
            yield _field(row.values, row.where)


def _filled(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text.strip())


def hold_out(documents: Documents, share: float, seed: int) -> tuple[Documents, Documents]:
    """Training and held-out documents.

    Whole documents, drawn by `seed`, until they hold `share` of the characters; with fewer than 20 documents the
    last lines of each one instead.
    """
    texts = documents.texts
    if len(texts) < FEW:
        cuts = [_cut(text, share) for text in texts]
        train = [text[:cut] for text, cut in zip(texts, cuts)]
        held = [text[cut:] for text, cut in zip(texts, cuts)]
    else:
        wanted = share * sum(map(len, texts))
        order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        sizes = np.cumsum([len(texts[number]) for number in order])
        drawn = set(order[: max(1, int(np.searchsorted(sizes, wanted, side="right")))])
        train = [text for number, text in enumerate(texts) if number not in drawn]
        held = [text for number, text in enumerate(texts) if number in drawn]
    origin = documents.origin
    return Documents(list(_filled(train)), origin), Documents(list(_filled(held)), f"{share:.0%} of {origin}")


def apart(train: Documents, held_out: Documents) -> Documents:
    """The training documents that are not held-out ones as well."""
    held = set(held_out.texts)
    return Documents([text for text in train.texts if text not in held], train.origin)


def first_of(texts: list[str], characters: int) -> list[str]:
    """The beginning of the texts, of so many characters altogether."""
    found = []
    for text in texts:
        found.append(text[:characters])
        characters -= len(text)
        if characters <= 0:
            break
    return found


def _cut(text: str, share: float) -> int:
    """Where the last `share` of a text begins: after a line, or after a word where there is but one line."""
    wanted = len(text) - round(share * len(text))
    line = text.find("\n", wanted)
    if 0 <= line < len(text.rstrip()) - 1:
        return line + 1
    space = text.find(" ", wanted)
    return space if space >= 0 else wanted
