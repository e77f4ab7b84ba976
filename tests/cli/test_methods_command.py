"""`monkeyjump methods`, and the registry behind it against the marks of the tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from monkeyjump.cli.app import run
from monkeyjump.methods import METHODS
from monkeyjump.proven import KINDS, proven, write
from monkeyjump.tuner.methods import NOT_ROUTABLE
from monkeyjump.tuner.registry import routable
from proofs import registry_of, whole_files

pytest_plugins = ["pytester"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_registry_holds_what_the_tests_prove(request: pytest.FixtureRequest) -> None:
    """Compared over the test files that this session has collected whole: all of them, mostly."""
    files = whole_files(request.config)
    registry = proven()
    listed = {
        kind: {name: kept for name, tests in registry[kind].items() if (kept := [t for t in tests if t in files])}
        for kind in KINDS
    }
    assert listed == registry_of(files), "the registry is out of date: run `make proven`"


def test_registry_names_no_test_file_that_is_gone(request: pytest.FixtureRequest) -> None:
    named = {file for names in proven().values() for files in names.values() for file in files}
    assert [file for file in sorted(named) if not (request.config.rootpath / file).exists()] == []


def test_every_routable_method_is_proven() -> None:
    assert sorted(proven()["method"]) == routable()


def test_routed_lists_what_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--routed")
    registry = proven()
    assert f"architectures ({len(registry['architecture'])})\n  " in text
    for names in registry.values():
        assert all(f"\n  {name}\n" in text + "\n" for name in names)
    found = json.loads(printed(capsys, "--routed", "--json"))
    assert list(found.values()) == [registry[kind] for kind in ("method", "architecture", "integration")]


def test_bare_lists_routable_methods_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    assert all(f"\n  {name}\n" in text for name in routable())
    assert all(f"\n  {name.lower()}: {reason}\n" in text for name, reason in NOT_ROUTABLE.items())
    found = json.loads(printed(capsys, "--json"))
    assert found["routable"] == routable()
    assert found["refused"] == {name.lower(): reason for name, reason in NOT_ROUTABLE.items()}


def test_every_method_has_its_formulas_and_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    found = json.loads(printed(capsys, "--json"))["methods"]
    assert list(found) == list(METHODS)
    for row in found.values():
        assert all(row[key] for key in ("trains", "routing", "losses", "source", "sure", "adapters", "router"))
    counts = text[text.index("Trainable parameters") : text.index("Table 4 of the paper, corrected")]
    cells = [[cell.strip() for cell in line.split("│")] for line in counts.splitlines() if "│" in line]
    rows = {name: row for _, name, *row, _ in cells}
    assert rows["moelora"] == ["Σ [N r (i + o)]", "Σ [N i]", "1,425,408", "1,425K"]
    assert rows["mj-adalora"] == ["Σ [r (i + o) + r]", "0", "270,528", "271K"]


def test_tables_say_where_the_paper_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    for remark in {remark for row in METHODS.values() for remark in row.remarks}:
        assert f"\n  {remark} (" in text
    for number in ("364K", "902K"):
        assert f"{number} in Figure 2" in text
    moe = METHODS["moe-lora"]
    assert f"│ {moe.cost.router} ({moe.paper.router})" in text


def test_written_registry_reads_back(tmp_path: Path) -> None:
    registry = {"architecture": {"Ö, 2": ["tests/a.py"], "b": ["tests/a.py", "tests/b.py"]}, "method": {}}
    write(registry, tmp_path / "proven.json")
    assert json.loads((tmp_path / "proven.json").read_text(encoding="utf-8")) == registry


# of its own: the warnings that are errors here are errors in there
MARKERS = """
[pytest]
markers = proves(kind, name)
"""

SUITE = """
import pytest

@pytest.mark.proves("integration", "nothing")
def test_skipped():
    pytest.skip("not here")

def test_plain():
    pytest.skip("not here")
"""


def test_skipped_proof_fails(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from proofs import pytest_itemcollected, pytest_runtest_makereport")
    pytester.makeini(MARKERS)
    pytester.makepyfile(SUITE)
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(failed=1, skipped=1)


def test_unknown_kind_is_refused(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from proofs import pytest_itemcollected")
    pytester.makeini(MARKERS)
    pytester.makepyfile(SUITE.replace("integration", "integrations"))
    result = pytester.runpytest("-p", "no:cacheprovider")
    result.stderr.fnmatch_lines(["*must be a kind of architecture, method, integration*"])
