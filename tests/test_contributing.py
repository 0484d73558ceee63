"""CONTRIBUTING's recipe for a new architecture, followed to the letter in a copy of the project."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPE = PAGE[PAGE.index("## Add an architecture") : PAGE.index("## Fix a bug")]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", RECIPE, flags=re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
NOTEBOOK = re.search(r"`(nbs/models/99_\w+\.ipynb)`", RECIPE)[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "Return a copy of the project's sources in a separate folder"
    folder = tmp_path_factory.mktemp("project") / "lmnotes"
    folder.mkdir()
    for name in ("settings.ini", "setup.py", "conftest.py", "pytest.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "lmnotes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


def run(copy, line):
    "Run a command line of the page in the copy, with the package of the copy"
    words = shlex.split(line)
    words = [sys.executable, "-m", *words] if words[0] in ("lmnotes", "pytest") else words
    words[0] = str(BIN / words[0]) if (BIN / words[0]).exists() else words[0]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LMNOTES_", "PYTEST_"))}
    environ |= dict(PYTHONPATH=str(copy), PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return subprocess.run(words, cwd=copy, env=environ, capture_output=True, text=True)


def files(copy):
    "Return {file: content} of the notebooks and the package"
    found = (p for name in ("nbs", "lmnotes") for p in (copy / name).rglob("*") if p.suffix in (".py", ".ipynb"))
    return {p.relative_to(copy).as_posix(): p.read_bytes() for p in found if "__pycache__" not in p.parts}


@pytest.mark.nightly
def test_new_architecture_needs_one_notebook(copy):
    assert run(copy, "nbdev_export").returncode == 0
    before = files(copy)
    make = dict(markdown=nbformat.v4.new_markdown_cell, python=nbformat.v4.new_code_cell)
    cells = [make[kind](text.strip("\n")) for kind, text in BLOCKS if kind in make]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), copy / NOTEBOOK)
    back = COMMANDS.index(next(line for line in COMMANDS if line.startswith("rm ")))
    output = []
    for line in COMMANDS[:back]:
        done = run(copy, line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        output.append(done.stdout)
    changed = {name for name, content in files(copy).items() if before.get(name) != content}
    assert changed == {NOTEBOOK, "lmnotes/models/window.py", "lmnotes/_modidx.py"}
    text = "\n".join(output)
    assert re.search(r"\b\d+ passed", text) and "toy: done at step 30 of 30" in text
    assert (copy / "checkpoints" / "toy" / "final").exists() and (copy / "toy_model" / "model.safetensors").exists()
    for line in COMMANDS[back:]:
        assert run(copy, line).returncode == 0
    assert files(copy) == before
    gone = run(copy, "lmnotes train --arch window --steps 2")
    assert gone.returncode == 2 and "window" in gone.stderr


@pytest.fixture
def clone(tmp_path):
    "Return a git repository of a few notebooks, with the hooks that CONTRIBUTING installs and a separate home folder"
    assert "nbdev_install_hooks" in PAGE
    folder = tmp_path / "clone"
    (folder / "nbs/nn").mkdir(parents=True)
    for name in ("settings.ini", ".gitattributes", ".gitconfig", "nbs/nn/20_lm.ipynb", "nbs/train.ipynb"):
        shutil.copy(ROOT / name, folder / name)
    environ = os.environ | dict(
        HOME=str(tmp_path), PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", GIT_CONFIG_NOSYSTEM="1"
    )
    environ |= {
        f"GIT_{who}_{what}": f"{who}@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }

    def git(*words):
        return subprocess.run(["git", *words], cwd=folder, env=environ, capture_output=True, text=True)

    assert git("init", "-q", "-b", "main").returncode == 0
    git("add", "-A")
    assert git("commit", "-qm", "first").returncode == 0
    subprocess.run(["nbdev_install_hooks"], cwd=folder, env=environ, check=True, capture_output=True)
    return folder, git, tmp_path / ".jupyter" / "jupyter_server_config.py"


def test_a_notebook_is_clean_when_it_is_saved(clone):
    folder, git, config = clone
    path = folder / "nbs" / "train.ipynb"
    notebook = nbformat.read(path, 4)
    for n, cell in enumerate(notebook.cells):
        cell.metadata["scrolled"] = True
        if cell.cell_type == "code":
            cell.execution_count = n
    model = dict(type="notebook", content=notebook)
    code = "import json, sys, types\nc = types.SimpleNamespace(ContentsManager=types.SimpleNamespace())\n"
    code += "exec(open(sys.argv[1]).read())\nmodel = json.load(sys.stdin)\n"
    code += "c.ContentsManager.pre_save_hook(model=model, path=sys.argv[2], contents_manager=None)\njson.dump(model, sys.stdout)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), str(path)],
        cwd=folder,
        input=json.dumps(model),
        capture_output=True,
        text=True,
        check=True,
    )
    saved = json.loads(done.stdout)["content"]
    assert all(cell.get("execution_count") is None for cell in saved["cells"])
    assert [c["metadata"] for c in saved["cells"] if c["metadata"]] == [dict(tags=["parameters"])]


def test_merge_conflict_in_a_cell_gives_a_valid_notebook(clone):
    folder, git, config = clone
    path = folder / "nbs/nn/20_lm.ipynb"
    for branch, words in dict(theirs="print('theirs')", main="print('ours')").items():
        assert git("checkout", "-q", *(["-b"] if branch == "theirs" else []), branch).returncode == 0
        notebook = nbformat.read(path, 4)
        next(cell for cell in notebook.cells if cell.cell_type == "code").source += f"\n{words}"
        nbformat.write(notebook, path)
        assert git("commit", "-qam", branch).returncode == 0
    git("merge", "theirs")
    sources = "\n".join(cell.source for cell in nbformat.read(path, 4).cells)
    assert "print('ours')" in sources and "print('theirs')" in sources
