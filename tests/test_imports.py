"""`import lmnotes` loads only what it needs, tested in new processes. `benchmarks/import_time.py` measures the time."""

import json
import subprocess
import sys

import pytest
from helpers import TINY

TOP_LEVEL = """
import json, sys
names = {name.partition(".")[0] for name in sys.modules} - {*sys.stdlib_module_names}
print(json.dumps(sorted(names)))
"""


def loaded(code):
    "Return the top-level modules outside the standard library that a new process has loaded after running `code`"
    done = subprocess.run([sys.executable, "-c", code + TOP_LEVEL], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("module", ["lmnotes", "lmnotes.apps.papermill_engine"])
def test_import_loads_no_other_package(module):
    assert loaded(f"import {module}") - loaded("") == {"lmnotes"}


@pytest.mark.parametrize("use", ["import lmnotes; lmnotes.run", "import lmnotes.apps.cli"])
def test_training_code_imports_only_torch(use):
    assert loaded(use) - loaded("import torch") <= {"lmnotes", "annotated_types"}


def test_training_does_not_import_the_compiler(workdir):
    "torch._dynamo takes as long to import as torch"
    code = f"import sys, lmnotes; lmnotes.run(**{TINY | dict(steps=2)}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=workdir)
    assert done.stdout.splitlines()[-1] == "False"


def test_import_loads_only_the_first_module_of_the_package():
    code = "import json, sys, lmnotes; print(json.dumps([m for m in sys.modules if m.startswith('lmnotes')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["lmnotes"]


@pytest.mark.parametrize(
    "modules", ["lmnotes.apps.papermill_engine, papermill.engines", "papermill.engines, lmnotes.apps.papermill_engine"]
)
def test_papermill_and_its_engine_can_be_imported_in_either_order(modules):
    code = f"import {modules}; print(papermill.engines.papermill_engines.get_engine('lmnotes') is lmnotes.apps.papermill_engine.GracefulEngine)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
