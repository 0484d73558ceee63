"""Type checkers see the parameters of `run`, `load` and `generate`, and the return type of every public function."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import lmnotes

r = lmnotes.run(arch="gpt", steps=10, lr=0.01, hooks=[], view=False)
r = lmnotes.load("first", which="best")
print("The " + r.generate("The ", n=20, temperature=0.7))
print(len(r.generate(["a", "b"], 5)), r.evaluate()["loss"], r.step, r.status)
print(lmnotes.generate(r.lm, r.tokenizer, "The ", n=5, top_k=3) + "!")
for piece in lmnotes.stream(r.lm, r.tokenizer, "The "):
    print(piece.upper())
lmnotes.attach(lmnotes.fork("first")).follow()
"""
MISTAKES = {
    "lmnotes.run(stpes=10)": 'No parameter named "stpes"',
    'lmnotes.run(steps="many")': 'cannot be assigned to parameter "steps"',
    "print(r.satus)": 'Cannot access attribute "satus"',
    'lmnotes.load(pth="first")': 'No parameter named "pth"',
    'print(r.generate("The ") + 1)': 'Operator "+" not supported',
    'r.generate("The ", temperatur=1.0)': 'No parameter named "temperatur"',
}


@pytest.mark.skipif(not shutil.which("pyright"), reason="pyright is not installed")
def test_pyright_finds_the_mistakes(tmp_path):
    (tmp_path / "user.py").write_text(SCRIPT + "\n".join(MISTAKES))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(dict(extraPaths=[str(ROOT)])))
    command = ["pyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    first = SCRIPT.count("\n") + 1
    found = {int(line): text for line, text in re.findall(r"user\.py:(\d+):\d+ - error: (.*(?:\n    .*)*)", output)}
    assert set(found) == set(range(first, first + len(MISTAKES))), output
    for number, words in enumerate(MISTAKES.values(), first):
        assert words in found[number], output


def test_help_shows_the_parameters():
    import inspect

    import lmnotes

    shown = inspect.signature(lmnotes.run).parameters
    assert shown["steps"].default == 500 and {"recipe", "hooks", "view", "lora_rank"} <= set(shown)
    assert {"n", "temperature", "top_p", "seed"} <= set(inspect.signature(lmnotes.generate).parameters)
    assert (ROOT / "lmnotes/py.typed").exists()


def public_functions(node, prefix=""):
    "Yield (name, definition) of every public function and method in a module or class, also inside `if` and `try`"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from public_functions(child, prefix)


def without_return_type(code, name):
    "Return (number of public functions and methods in a module, names of those without a return annotation)"
    found = [(f"{name}.{function}", node.returns) for function, node in public_functions(ast.parse(code))]
    return len(found), [function for function, returns in found if returns is None]


def test_missing_return_types_are_found():
    code = (
        "def f() -> int: ...\ndef g(): ...\ndef _h(): ...\nclass A:\n    def __init__(self): ...\n    def m(self): ..."
    )
    assert without_return_type(code, "module") == (3, ["module.g", "module.A.m"])


def test_public_functions_have_return_types():
    modules = sorted(path for path in (ROOT / "lmnotes").rglob("*.py") if path.name != "_modidx.py")
    checked = [without_return_type(path.read_text(encoding="utf-8"), path.stem) for path in modules]
    assert sum(count for count, _ in checked) > 600
    assert [function for _, missing in checked for function in missing] == []
