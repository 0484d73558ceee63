"""The notebooks are the source: the package, the README and the saved outputs match them."""

import ast
import base64
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
names = [path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in NOTEBOOKS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=names)


def run(*words, cwd=ROOT):
    "Run a program of this environment"
    done = subprocess.run([str(BIN / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder, ending):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob(f"*{ending}")
        if ".ipynb_checkpoints" not in path.parts
    }


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def marks(cell):
    "Return the names of a cell's `#|` directives, and `eval: false`"
    return set(re.findall(r"^#\|\s*(eval: false|[\w-]+)", cell.source, re.M))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "Return a copy of the project, in which the notebooks were exported and cleaned"
    folder = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*"))
    for start in ROOT.glob("lmnotes/**/__init__.py"):
        target = folder / start.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(start, target)
    run("nbdev_export", cwd=folder)
    run("nbdev_clean", cwd=folder)
    return folder


def test_the_package_is_what_the_notebooks_export(fresh):
    ours, theirs = files(ROOT / "lmnotes", ".py"), files(fresh / "lmnotes", ".py")
    assert ours - theirs == set(), "modules without a notebook; delete them, or write the notebook"
    assert theirs - ours == set(), "notebooks that are not exported; run nbdev_export"
    stale = [name for name in ours if not filecmp.cmp(ROOT / "lmnotes" / name, fresh / "lmnotes" / name, shallow=False)]
    assert stale == [], (
        "modules that differ from their notebook; run nbdev_export (or nbdev_update, if the module was edited)"
    )


def test_notebooks_are_clean(fresh):
    unclean = [
        path.relative_to(ROOT) for path in NOTEBOOKS if path.read_text() != (fresh / path.relative_to(ROOT)).read_text()
    ]
    assert unclean == [], "run nbdev_clean"


def test_cleaning_keeps_the_parameters_tag(fresh):
    "Without the tag, papermill silently puts its parameters where the defaults overwrite them"
    tagged = [
        path.stem
        for path in (fresh / "nbs").rglob("*.ipynb")
        if any("parameters" in cell.metadata.get("tags", []) for cell in code_cells(path))
    ]
    runnable = {"train", "prepare", "generate", "playground"} & {path.stem for path in NOTEBOOKS}
    assert runnable <= set(tagged)


@each_notebook
def test_outputs_are_saved(path):
    "Outputs are saved, so a reader sees them without running anything"
    silent = {"export", "hide", "default_exp", "slow", "cuda", "eval: false"}
    shown = [cell for cell in code_cells(path) if cell.source.strip() and not marks(cell) & silent]
    for cell in code_cells(path):
        errors = [output.evalue for output in cell.outputs if output.output_type == "error"]
        assert errors == [], f"cell {cell.id} shows an error; run the notebook again"
    for cell in shown:
        last = ast.parse(cell.source).body[-1]
        prints = isinstance(last, ast.Expr) and ast.unparse(last).startswith("print(")
        assert cell.outputs or not prints, f"cell {cell.id} prints, but its output is not saved; run the notebook"
    if len(shown) > 2:
        assert any(cell.outputs for cell in shown), "no outputs are saved; run the notebook"


@each_notebook
def test_first_and_last_cells(path):
    cells = nbformat.read(path, 4).cells
    assert re.match(r"# .+\n\n> .+", cells[0].source), "the first cell is `# Title`, an empty line and `> subtitle`"
    exports = [cell for cell in cells if cell.cell_type == "code" and marks(cell) & {"export", "exporti"}]
    if exports:
        assert any("default_exp" in marks(cell) for cell in cells if cell.cell_type == "code")
        assert "nbdev_export()" in cells[-1].source, "the last cell exports the notebook"


@each_notebook
def test_imports_have_cells_of_their_own(path):
    "Building the site executes exactly the cells with imports"
    for cell in code_cells(path):
        if (
            marks(cell) & {"export", "exporti", "eval: false"}
            or "nbdev_export()" in cell.source
            or not cell.source.strip()
        ):
            continue
        tree = ast.parse(cell.source)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not imports or len(imports) == len(tree.body), f"cell {cell.id} holds imports and other code"


@each_notebook
def test_exported_cells_are_short(path):
    "A cell has one idea. A longer cell gives the reason in a comment"
    for cell in code_cells(path):
        if marks(cell) & {"export", "exporti"}:
            lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
            assert len(lines) <= 30 or re.match(r"# Long: .+ .+", lines[0]), (
                f"the cell {cell.id}, {lines[0]!r}, has {len(lines)} lines; split it, or say why after `#| export`: # Long: ..."
            )


NUMBERED = sorted((path for path in NOTEBOOKS if path.name[0].isdigit()), key=lambda path: path.name)
LEARN = [path for path in NUMBERED if path.parent.name == "learn"]
ROAD = [*LEARN, *(path for path in NUMBERED if path not in LEARN)]


@pytest.mark.parametrize("path, after", zip(ROAD, ROAD[1:]), ids=[path.stem for path in ROAD[:-1]])
def test_each_notebook_names_the_next(path, after):
    "The links lead from the first notebook of learn/ through it, and then from 00_core through all numbered notebooks"
    last = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"][-1]
    address = os.path.relpath(after, path.parent)
    wanted = f"Next: [`{after.stem}`]({address}), what it is about."
    assert re.fullmatch(rf"Next: \[`{after.stem}`\]\({address}\), .+\.", last), (
        f"the last text of {path.name} is {wanted!r}"
    )


def test_ruff_is_clean():
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")


def shell_lines(text):
    "The commands in a Markdown text's ```sh blocks, without their comments"
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_is_made_from_the_index():
    code = "import base64, json, readme; print(json.dumps({n: base64.b64encode(c).decode() for n, c in readme.readme().items()}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=True)
    for name, content in json.loads(done.stdout).items():
        assert base64.b64decode(content) == (ROOT / name).read_bytes(), f"{name}: run python docs/readme.py"


def test_the_index_shows_what_the_notebooks_show():
    texts = {
        name: (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8") for name in ("index", "train", "compare")
    }
    pictures = {name: set(re.findall(r'"image/png": "(\w{40,}[^"]*)"', text)) for name, text in texts.items()}
    assert len(pictures["index"]) == 2 and pictures["index"] <= pictures["train"] | pictures["compare"], (
        "run nbs/index.ipynb again"
    )


def test_readme_begins_with_the_two_commands():
    assert shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))[:2] == ["make train", "make test"]


def make_lines(target, folder):
    "Return the commands that make would run in a fresh clone"
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    environ = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "-n", target, "PYTHON=python3"], cwd=folder, env=environ, capture_output=True, text=True, check=True
    )
    lines = [line.replace(".venv/bin/", "") for line in done.stdout.splitlines()]
    return [line for line in lines if not line.startswith(("echo", "touch"))]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_readme_and_ci_use_the_same_commands(tmp_path):
    lines = shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    start = lines.index("python3 -m venv .venv")
    assert lines[start + 1] == ". .venv/bin/activate"
    train, test = make_lines("train", tmp_path), make_lines("test", tmp_path)
    assert train[0] == test[0] == lines[start]
    assert train[1:] + test[1:] == lines[start + 2 : start + len(train) + len(test)]
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == lines[1]


def test_constraints_are_exact_and_complete():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+(; python_(full_)?version .+)?", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = settings["DEFAULT"]["requirements"] + " " + settings["DEFAULT"]["dev_requirements"]
    assert {re.match(r"[\w-]+", word)[0].lower() for word in wanted.split()} <= pinned
    assert "torch==2.13.0" in lines


def test_notebooks_are_for_the_kernel_of_the_environment():
    for path in NOTEBOOKS:
        kernel = json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"]
        assert kernel == "python3", f"{path.name}: kernel {kernel!r}; papermill finds only python3 everywhere"
