"""docs/trust.md has the current lists of changes and mutants, and only results of the whole suite."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import trust_table


def test_the_lists_are_current():
    "Run `python docs/trust_table.py` to update them"
    text = trust_table.PAGE.read_text(encoding="utf-8")
    changes, mutants = trust_table.changes_table(), trust_table.mutants_table()
    assert trust_table.with_tables(text, changes=changes, mutants=mutants) == text


def test_every_mutant_and_every_fault_names_a_test():
    mutants = dict(trust_table.mutants())
    assert len(mutants) > 50
    section = (
        trust_table.PAGE.read_text(encoding="utf-8").partition("## Faults of version 0.1")[2].partition("\n## ")[0]
    )
    faults = re.findall(r"^\| .+ \| `(tests/.+)` \|$", section, re.M)
    assert len(faults) == 20
    for test in {*mutants.values(), *faults}:
        file, _, name = test.partition("::")
        assert callable(getattr(trust_table.tests(Path(file).stem), name.partition("[")[0])), test


def test_a_selection_of_tests_does_not_replace_the_results(tmp_path, monkeypatch):
    page = tmp_path / "trust.md"
    page.write_text(trust_table.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(trust_table, "PAGE", page)
    before, found = page.read_bytes(), {path: dict(test_x=Counter(passed=2)) for path in trust_table.files_of_suite()}
    some = {path: tests for path, tests in found.items() if path != "tests/test_exact.py"}
    assert "not written, because these files did not run: tests/test_exact.py" in trust_table.write_page(some)
    assert "did not run" in trust_table.write_page({}) and page.read_bytes() == before
    assert trust_table.write_page(found) == "trust.md is written"
    assert page.read_text(encoding="utf-8").count("| test_x | 2 passed |") == len(found)


def test_skipped_cases_are_counted():
    reports = [SimpleNamespace(nodeid="tests/test_exact.py::test_x[a]", when="call", outcome="passed")]
    reports.append(SimpleNamespace(nodeid="tests/test_exact.py::test_x[b]", when="setup", outcome="skipped"))
    assert trust_table.verdict(trust_table.results(reports)["tests/test_exact.py"]["test_x"]) == "1 passed, 1 skipped"
    assert trust_table.verdict(Counter(skipped=2)) == "2 skipped"
    assert trust_table.verdict(Counter(passed=1, failed=3)) == "1 passed, 3 FAILED"
