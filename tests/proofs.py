"""The registry of what is proven, kept in step with the marks of the tests.

`@pytest.mark.proves(kind, name)` says of a test that it proves an architecture, a PEFT method or an
integration. The installed package has no tests, so the marks are written to `monkeyjump/proven.json`
(`make proven`), and a test fails where the two differ. A proof cannot be skipped: that would prove
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from monkeyjump.proven import KINDS, PROVEN, Registry, write

COLLECTED = pytest.StashKey[dict[str, set[tuple[str, str]]]]()  # by test file: (kind, name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-proven", action="store_true", help="write monkeyjump/proven.json from the marks")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Also for tests that -m or -k deselect later."""
    files = item.config.stash.setdefault(COLLECTED, {})
    marks = files.setdefault(item.nodeid.partition("::")[0], set())
    for mark in item.iter_markers("proves"):
        if len(mark.args) != 2 or mark.args[0] not in KINDS:
            raise pytest.UsageError(f"{item.nodeid}: proves{mark.args} must be a kind of {', '.join(KINDS)} and a name")
        marks.add(mark.args)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--write-proven"):
        write(registry_of(session.config.stash[COLLECTED]), PROVEN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[Any]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("proves"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is marked as a proof and was skipped: {report.longrepr}"
    return report


def registry_of(files: dict[str, set[tuple[str, str]]]) -> Registry:
    """Kind, then name, then the test files that prove it."""
    registry: Registry = {kind: {} for kind in KINDS}
    for file in sorted(files):
        for kind, name in sorted(files[file]):
            registry[kind].setdefault(name, []).append(file)
    return {kind: dict(sorted(names.items())) for kind, names in registry.items()}


def whole_files(config: pytest.Config) -> dict[str, set[tuple[str, str]]]:
    """Marks of the test files that this session has collected from beginning to end."""
    partly = {argument.partition("::")[0] for argument in config.args if "::" in argument}
    files = config.stash[COLLECTED]
    return {file: marks for file, marks in files.items() if not any(p.endswith(file) for p in partly)}
