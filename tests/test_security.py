"""The package runs no code that it finds in a file. We check this promise of SECURITY.md in the source code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmnotes"
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "extractall", "system", "popen", "unsafe_load", "full_load"}
PROGRAMS = {"apps/cli.py": {"eval", "exec", "compile"}}  # `lmnotes notebook` runs a program that the user names
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_WORDS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def faults(source):
    "Return the forbidden operations of a source as [(line, reason)]"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [(node.lineno, f"imports {n}") for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        base, _, last = function.rpartition(".")
        words = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        bare = not base or base in ("os", "builtins", "yaml") or last == "extractall"
        if last in FORBIDDEN_CALLS and bare:
            found.append((node.lineno, f"calls {function}"))
        if function == "torch.load" and words.get("weights_only") is not True:
            found.append((node.lineno, "calls torch.load without weights_only=True"))
        if function == "yaml.load":
            found.append((node.lineno, "calls yaml.load; yaml.safe_load makes plain values only"))
        found += [(node.lineno, f"passes {w}={v}") for w, v in FORBIDDEN_WORDS.items() if words.get(w, not v) is v]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_code_from_files(path):
    allowed = {f"calls {name}" for name in PROGRAMS.get(path.relative_to(PACKAGE).as_posix(), ())}
    for line, reason in faults(path.read_text(encoding="utf-8")):
        if reason not in allowed:
            pytest.fail(f"{path.relative_to(PACKAGE)}:{line} {reason}")


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "archive.extractall(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text, Loader=Loader)",
    ],
)
def test_unsafe_code_is_found(source):
    assert faults(source)


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "model.eval()", "re.compile(pattern)"])
def test_safe_code_is_accepted(source):
    assert not faults(source)
