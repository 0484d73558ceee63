"""The notebooks that open in Google Colab link there, and install lmnotes there and nowhere else."""

import re
import sys

import nbformat
import pytest
from helpers import ROOT
from pages import settings

LESSONS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs/learn").glob("*.ipynb"))
NOTEBOOKS = ["nbs/train.ipynb", "nbs/generate.ipynb", *LESSONS]
GIT_URL = settings()["git_url"]
ADDRESS = (
    f"https://colab.research.google.com/{GIT_URL.replace('https://github.com', 'github')}/blob/{settings()['branch']}"
)
LINK = f"\n\n[Open in Colab]({ADDRESS}/%s)\n\n"


def cells(name):
    return nbformat.read(ROOT / name, 4).cells


def install_cell(name):
    "Return the first code cell"
    return next(cell.source for cell in cells(name) if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_begins_with_a_link_to_itself_and_the_shared_install_cell(name):
    assert LINK % name in cells(name)[0].source + "\n\n"
    assert install_cell(name) == install_cell(NOTEBOOKS[0]) and f"git+{GIT_URL}" in install_cell(name)


def test_no_other_notebook_has_the_install_cell():
    others = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("[!.]*.ipynb")} - {*NOTEBOOKS}
    assert others and not [name for name in others if "google.colab" in (ROOT / name).read_text(encoding="utf-8")]


def test_links_of_the_readme_lead_to_these_notebooks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(rf"\({ADDRESS}/(\S+)\)", readme) == NOTEBOOKS


class Shell:
    "Stands for the shell of a kernel, and records the magics that run in it"

    def __init__(self, name):
        self.name, self.magics = name, []

    def __repr__(self):
        return self.name

    def run_line_magic(self, *words):
        self.magics.append(words)


@pytest.mark.parametrize(
    "name, installs",
    [("<google.colab._shell.Shell object>", True), ("<ipykernel.zmqshell.ZMQInteractiveShell object>", False)],
)
def test_the_cell_installs_on_colab_only(name, installs, monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)  # The cell needs none
    shell = Shell(name)
    exec(install_cell(NOTEBOOKS[0]), dict(get_ipython=lambda: shell))
    assert shell.magics == ([("pip", f"install -q git+{GIT_URL}")] if installs else [])


def test_the_cell_does_nothing_outside_of_a_notebook():
    exec(install_cell(NOTEBOOKS[0]), {})
