"""The tables of docs/trust.md: changes between two starts, removed measures, and the results of all tests of the suite of trust.

`python docs/trust_table.py` writes the first two, which are lists in the tests. `pytest tests --trust-table` also writes the
results, and `pytest -m "nightly or not nightly" tests --trust-table` those with the long tests.
"""

import ast
import platform
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/trust.md"
ALSO = "tests/test_exact.py", "tests/test_signals.py", "tests/test_crash.py", "tests/test_distributed.py"
ALSO += "tests/test_golden.py", "tests/test_security.py", "tests/test_accumulation.py"
ALSO += "tests/test_papermill.py", "tests/test_papermill_train.py"
# The tests that a missing measure makes fail, for the lists of mutants that do not name a test for each
MUTANT_TESTS = {
    "test_mutants": "",
    "test_power_cuts": "test_power_cut_at_every_operation_of_a_save",
    "test_kills": "test_kills",
    "test_disk_errors": "test_errors",
}


def is_in_suite(path):
    "Return True for the path of a test file that belongs to the suite"
    return path.startswith("tests/trust/") or path in ALSO


def summaries(path):
    "Return (summary of a test file, {name of a test: summary}) from the docstrings"
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    texts = {node.name: ast.get_docstring(node) or node.name[5:].replace("_", " ").capitalize() for node in tests}
    return first_line(ast.get_docstring(tree) or path), {name: first_line(text) for name, text in texts.items()}


def first_line(text):
    return text.partition("\n")[0].rstrip(".")


def results(reports):
    "Return {file: {test: Counter of outcomes}} of the suite, from pytest's reports"
    found = {}
    for report in reports:
        path, _, rest = report.nodeid.partition("::")
        if is_in_suite(path) and (report.when == "call" or report.outcome != "passed"):
            test = rest.partition("[")[0]
            found.setdefault(path, {}).setdefault(test, Counter())[report.outcome] += 1
    return found


def verdict(counts):
    "Describe the outcomes of a test"
    kinds = dict(passed="passed", skipped="skipped", failed="FAILED")
    return ", ".join(f"{counts[kind]} {text}" for kind, text in kinds.items() if counts[kind])


def summary_lines(found):
    "Return the lines of the table for a terminal, a line for each file"
    lines = []
    for path, tests in sorted(found.items()):
        total = sum(tests.values(), Counter())
        lines.append(f"{path:<38} {len(tests):>4} tests {sum(total.values()):>6} cases  {verdict(total)}")
    return lines


def markdown_table(found):
    "Return the table in Markdown, a row for each test"
    cpu = torch.backends.cpu.get_cpu_capability()
    counts = sum((sum(tests.values(), Counter()) for tests in found.values()), Counter())
    lines = [
        f"{counts.total():,} cases: {verdict(counts)}. torch {torch.__version__}, Python {platform.python_version()}, CPU with {cpu}.",
        "",
    ]
    for path, tests in sorted(found.items()):
        title, texts = summaries(path)
        lines += [f"### {title}", "", f"`{path}`", "", "| Check | Result |", "|---|---|"]
        rows = [(texts.get(test, test).replace("|", "\\|"), verdict(counts)) for test, counts in sorted(tests.items())]
        lines += [f"| {text} | {result} |" for text, result in rows] + [""]
    return "\n".join(lines)


def tests(name):
    "Import a test file of tests/trust"
    sys.path[:0] = [str(folder) for folder in (ROOT / "tests/trust", ROOT / "tests") if str(folder) not in sys.path]
    return import_module(name)


def table(heading, rows):
    "Return a table in Markdown"
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (heading, *cells)]
    return "\n".join([lines[0], "|" + "---|" * len(heading), *lines[1:]])


def changes_table():
    "Return the table of all changes between two starts of a run that tests/trust/test_changes_on_resume.py makes"
    t = tests("test_changes_on_resume")
    groups = {"No effect on the bits": t.CHANGEABLE_PARAMS, "An error that names it": t.FIXED_PARAMS}
    free = [name for name in t.NAMES if not any(name in names for names in groups.values())]
    allowed = "An error that names it, unless you add `allow_change`. Then the run records the change"
    groups[f"{allowed}. More `steps` or `epochs` need no `allow_change`"] = free
    rows = []
    for text, names in groups.items():
        rows += [("Parameter " + ", ".join(f"`{name}`" for name in t.NAMES if name in names), text)]
    conditions = ", ".join(f"`{name}`" for name in t.environment())
    rows += [(f"Environment: {conditions}", "The run prints that bits may differ")]
    rows += [(sentence(case), "The same checkpoints and bits") for case in t.CLOCKS]
    rows += [(sentence(case), "The same bits") for case in t.RIGHT]
    rows += [(sentence(case), f"An error with `{message}`") for case, (_, _, message) in t.WRONG.items()]
    return table(("Change between stop and resume", "Result"), rows)


def sentence(text):
    "Return a text with a capital letter, unless it begins with the name of a file or function"
    return text[0].upper() + text[1:] if text.split()[0].isalpha() else text


def mutants():
    "Yield (change to the library, test that then fails)"
    for name, test in MUTANT_TESTS.items():
        for mutant, row in tests(name).MUTANTS.items():
            yield mutant, f"{name}.py::{test}" if test else f"{row[-1].__module__}.py::{row[-1].__name__}"


def mutants_table():
    "Return the table of all changes to the library and the tests that then fail"
    rows = [(sentence(mutant), f"`tests/trust/{test}`") for mutant, test in mutants()]
    return table(("Change to the library", "Test that fails"), rows)


def files_of_suite():
    "Return the paths of all test files of the suite"
    return sorted([*(f"tests/trust/{p.name}" for p in (ROOT / "tests/trust").glob("test_*.py")), *ALSO])


def with_tables(text, **tables):
    "Return the text of the page with tables between their marks, such as <!-- results --> and <!-- end of results -->"
    for name, content in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        new = f"{start}\n\n{content.rstrip()}\n\n{end}"
        text, n = re.subn(f"{start}.*{end}", lambda m: new, text, flags=re.S)  # noqa: B023
        assert n == 1, f"{PAGE} has {n} tables of {name}"
    return text


def write_page(found=None):
    "Replace the tables in docs/trust.md, with the results if all files of the suite ran. Return a line about it"
    if found is not None and (missing := [path for path in files_of_suite() if path not in found]):
        return f"{PAGE.name} is not written, because these files did not run: {', '.join(missing)}"
    tables = dict(changes=changes_table(), mutants=mutants_table()) | (
        dict(results=markdown_table(found)) if found else {}
    )
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), **tables), encoding="utf-8")
    return f"{PAGE.name} is written"


if __name__ == "__main__":
    print(write_page())
