"""The notebooks in nbs/learn are short, keep their files out of the repository, and have exercises whose solutions are tests."""

import base64
import re
import subprocess
import sys

import nbformat
import pytest
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "nbs/learn").glob("*.ipynb"))
SOLUTION = re.compile(
    r'\n\n<details markdown="1"><summary>Solution</summary>\n\n```python\n.+?\n```\n\n.+\n\n</details>$', re.S
)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells_of(path, kind=""):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type.startswith(kind)]


@each_notebook
def test_a_notebook_is_short_and_defines_nothing_for_the_package(path):
    assert 10 <= len(cells_of(path)) - 1 <= 25  # Without the cell that installs lmnotes on Colab
    assert not re.search(r"^#\| *(default_exp|export)", "\n".join(cell.source for cell in cells_of(path, "code")), re.M)


@each_notebook
def test_a_notebook_ends_with_two_exercises_and_their_hidden_solutions(path):
    *exercises, last = [cell.source for cell in cells_of(path)][-3:]
    assert [source.split("\n")[0] for source in exercises] == ["## Exercise 1", "## Exercise 2"]
    assert all(SOLUTION.search(source) for source in exercises)
    assert last.startswith("Next: ")


@each_notebook
def test_files_go_to_a_temporary_folder(path):
    code = "\n".join(cell.source for cell in cells_of(path, "code"))
    assert "lmnotes.run" not in code or "tempfile.mkdtemp()" in code


@each_notebook
def test_pictures_are_small(path):
    outputs = [output for cell in cells_of(path, "code") for output in cell.outputs]
    pictures = [
        base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})
    ]
    assert all(len(picture) < 60_000 for picture in pictures)


def test_solutions_are_tests():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--collect-only", "-p", "no:cacheprovider", "nbs/learn"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for path in NOTEBOOKS:
        for number, cell in enumerate(cells_of(path)):
            if cell.source.startswith("## Exercise"):
                assert f"{path.name}::cell{number}[{cell.source.splitlines()[0].strip('# ')}]" in found
