"""The table of all results of the suite of trust, printed at the end of a run of tests and written to docs/trust.md.

`pytest tests/trust --trust-table` writes it, and `pytest -m "nightly or not nightly" tests/trust --trust-table` with the long tests.
"""

import ast
import platform
import re
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/trust.md"
ALSO = "tests/test_exact.py", "tests/test_signals.py", "tests/test_crash.py", "tests/test_distributed.py"
ALSO += "tests/test_golden.py", "tests/test_security.py"
START, END = "<!-- results -->", "<!-- end of results -->"


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
    n = sum(counts.values())
    if counts["failed"]:
        return f"{counts['failed']} of {n} FAILED"
    return f"skipped ({n})" if counts["skipped"] == n else f"{n - counts['skipped']} passed"


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
    cases = sum(sum(counts.values()) for tests in found.values() for counts in tests.values())
    lines = [f"{cases:,} cases, torch {torch.__version__}, Python {platform.python_version()}, CPU with {cpu}.", ""]
    for path, tests in sorted(found.items()):
        title, texts = summaries(path)
        lines += [f"### {title}", "", f"`{path}`", "", "| Check | Result |", "|---|---|"]
        rows = [(texts.get(test, test).replace("|", "\\|"), verdict(counts)) for test, counts in sorted(tests.items())]
        lines += [f"| {text} | {result} |" for text, result in rows] + [""]
    return "\n".join(lines)


def write_page(found):
    "Replace the table in docs/trust.md"
    text = PAGE.read_text(encoding="utf-8")
    new = f"{START}\n\n{markdown_table(found)}\n{END}"
    PAGE.write_text(re.sub(f"{START}.*{END}", lambda m: new, text, flags=re.S), encoding="utf-8")
