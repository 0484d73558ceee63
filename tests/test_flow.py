"""Chapters import in one direction only, models import only `nn`, and modules stay small."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmnotes"
TOP = "core", "untrusted", "files", "parameters", "plots"  # Modules at the top level, which all chapters may import
CHAPTERS = "core data nn models training inference runs inspect export recipes apps".split()
NOT_BESIDE = {("training", "models"), ("models", "training")}  # Chapters that do not import each other
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")
MOST_LINES = 450


def module_name(path):
    "Return the name of a module: lmnotes/models/gpt.py -> lmnotes.models.gpt"
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def chapter(name):
    "Return the chapter of a module (`apps` for `lmnotes.__main__`, and `core` for the top level)"
    part = name.split(".")[1] if "." in name else ""
    return "apps" if part == "__main__" else "core" if part in TOP else part


def imports(path, anywhere=True):
    "Return the modules of this package that a file imports, anywhere or only at its top level"
    package = path.relative_to(ROOT).parent.parts
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES and MODULES[name].name != "__init__.py"}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", [name for name in MODULES if chapter(name)])
def test_a_module_imports_its_own_chapter_and_those_above_it(name):
    own = chapter(name)
    for other in IMPORTS[name]:
        above = chapter(other)
        assert CHAPTERS.index(above) <= CHAPTERS.index(own), f"{name} imports {other}, which is in a later chapter"
        assert (own, above) not in NOT_BESIDE, f"{name} imports {other}; {own} and {above} do not know each other"
        assert own != "models" or above == "nn", f"{name} imports {other}; models import nn only"


def test_no_import_is_circular():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circular import: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in IMPORTS[name]:
                visit(other)
            done.add(open_.pop())

    for name in MODULES:
        visit(name)


def test_the_top_level_has_few_modules_beside_the_chapters():
    modules = {"__init__", "__main__", "_modidx", *TOP}
    assert {path.stem for path in PACKAGE.glob("*.py")} == modules
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*CHAPTERS[1:]}


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_a_module_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines; split the notebook along its ideas"


def test_notebooks_are_in_the_folder_of_their_chapter():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if "File to edit: " in text:
            notebook = text.split("File to edit: ")[1].splitlines()[0].rstrip(".").split("nbs/")[1]
            folder, _, file = notebook.rpartition("/")
            assert folder == ("" if chapter(name) == "core" else chapter(name)), f"{name} is written from {notebook}"
            assert file.split("_", 1)[1].removesuffix(".ipynb") in (name.rpartition(".")[2], "main")


def test_the_papermill_engine_loads_nothing_of_the_package():
    "Papermill imports the engine whenever it starts, for other projects too"
    engine = "lmnotes.apps.papermill_engine", "lmnotes.apps.executed_notebooks"
    assert set().union(*(imports(MODULES[name], anywhere=False) for name in engine)) == {engine[1]}
    assert all(path.read_text() == "" for path in PACKAGE.glob("*/__init__.py"))


def test_only_recipes_refer_to_a_guide():
    "Elsewhere, the name of a guide may be only an architecture, a preset or a tokenizer format, which users type"
    names = r"(?i:guide|tiss_?lm|agiformer|nanothink|from_env|fresh_or_resume|text_only)|RESUME_[A-Z]|CHECKPOINT_PATH"
    allowed = r"NanoThink(Config)?\b|[:\"']nanothink|\bnanothink\w*=dict|(such as|\|) nanothink|\bguide=dict"
    allowed += r"|\btext_only=|\bagiformer\w*=\(|\"tisslm\"|\w+\.ipynb"
    for name, path in MODULES.items():
        if chapter(name) not in ("", "recipes"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                found = re.search(names, re.sub(allowed, "", line))
                assert not found, f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_runtime_code_does_not_import_development_tools():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tools = {word.split(".")[0] for word in names} & {"fastcore", "nbdev", "execnb", "pytest", "hypothesis"}
            assert not tools, f"{name} imports {', '.join(tools)}, which only the dev extra installs"


def test_these_tests_see_imports():
    assert len(MODULES) > 50
    assert sum(map(len, IMPORTS.values())) > 200


def test_star_imports_do_not_collide():
    "No two modules that a module imports with `*`, nor it and one of them, export different objects under one name"
    for name, path in MODULES.items():
        seen = {n: importlib.import_module(name) for n in getattr(importlib.import_module(name), "__all__", [])}
        for line in re.findall(r"^from (\.[\w.]*|lmnotes[\w.]*) import \*$", path.read_text(encoding="utf-8"), re.M):
            other = importlib.import_module(line, name.rpartition(".")[0])
            for n in other.__all__:
                first = seen.setdefault(n, other)
                assert getattr(first, n) is getattr(other, n), f"{name}: {n} of {first.__name__} and {other.__name__}"
