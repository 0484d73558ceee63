"""The flow runs one way: a module imports only modules with lower numbers, and nothing in the spine knows a model."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lmnotes"
MODELS_MAY_IMPORT = {"lmnotes.lm", "lmnotes.layers", "lmnotes.lora", "lmnotes.memory", "lmnotes.blocks"}
KNOW_THE_WHOLE_CHAIN = {
    *("lmnotes.setup", "lmnotes.text_config", "lmnotes.runs", "lmnotes.phases", "lmnotes.export", "lmnotes.cli"),
    *("lmnotes.view", "lmnotes.compare", "lmnotes.card", "lmnotes.engine", "lmnotes.__main__"),
}


def module_name(path):
    "lmnotes/models/gpt.py -> lmnotes.models.gpt"
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def notebook_of(path):
    "The notebook that a module is written from, by its second line"
    found = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8"))
    return found and found[1]


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if notebook_of(path)}
NUMBERS = {
    name: int(re.match(r"\d+", notebook_of(path))[0])
    for name, path in MODULES.items()
    if not name.startswith("lmnotes.models.")
}


def imports(path):
    "Every module of this package that a file imports, anywhere in it"
    package = module_name(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_module_imports_only_lower_numbers(name):
    for other in imports(MODULES[name]):
        if name in KNOW_THE_WHOLE_CHAIN and other.startswith("lmnotes.models."):
            continue
        assert other in NUMBERS, (
            f"{name} imports {other}; nothing in the spine knows a model, it asks lm.new_lm by name"
        )
        assert NUMBERS[other] < NUMBERS[name], f"{name} ({NUMBERS[name]}) imports {other} ({NUMBERS[other]})"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NUMBERS])
def test_a_model_imports_only_lm_and_layers(name):
    others = imports(MODULES[name]) - MODELS_MAY_IMPORT
    assert not others, (
        f"{name} imports {', '.join(sorted(others))}; a model knows {', '.join(sorted(MODELS_MAY_IMPORT))}"
    )


def test_only_the_last_modules_know_the_whole_chain():
    for name in NUMBERS.keys() - KNOW_THE_WHOLE_CHAIN:
        above = imports(MODULES[name]) & KNOW_THE_WHOLE_CHAIN
        assert not above, f"{name} imports {', '.join(above)}"


def test_the_engine_stands_alone():
    "Papermill imports it at every start, also for other projects"
    assert imports(MODULES["lmnotes.engine"]) == set()


def test_runtime_code_does_not_import_the_workshop():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tools = {word.split(".")[0] for word in names} & {"fastcore", "nbdev", "execnb", "pytest", "hypothesis"}
            assert not tools, f"{name} imports {', '.join(tools)}, which only the dev extra installs"


def test_these_tests_see_imports():
    assert len(NUMBERS) > 5
    assert sum(len(imports(path)) for path in MODULES.values()) > 10
