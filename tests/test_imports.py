"""`import lmnotes` loads only what it needs, tested in new processes. `benchmarks/import_time.py` measures the time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

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
    assert loaded(use) - loaded("import torch") == {"lmnotes", "annotated_types"}


USES = """
import os, sys, traceback, lmnotes
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._dynamo":
            traceback.print_stack()
            os._exit(1)
sys.meta_path.insert(0, Forbid())
from test_exactness_matrix import ARCHITECTURES
given = dict(data="corpus", tokenizer="bytes", ctx_len=16, steps=1, batch_size=2, eval_batches=1, device="cpu", out_dir="runs")
for name, params in ARCHITECTURES.items():
    if name not in ("lora", "gpt2"):
        lmnotes.run(**given | dict(arch=name, run=name, view=False) | params)
        if name not in ("ssm", "nanothink", "nanothink_s6"):
            lmnotes.load(f"runs/{name}").generate("a", 3)
lmnotes.run(**given | dict(run="lora", init_from="gpt", lora_rank=2, view=False))
lmnotes.load("runs/lora").evaluate()
assert not lmnotes.verify("runs/gpt", replay=1).exit_code
lmnotes.run(run="gpt", resume=True, out_dir="runs", steps=2, view=False)
"""


def test_no_use_of_a_model_imports_the_compiler(workdir):
    "torch._dynamo takes as long to import as torch, so only `gpt2`, which is a model of transformers, and loading of state-space models import it"
    path = os.pathsep.join([str(TESTS), str(TESTS / "trust")])
    done = subprocess.run(
        [sys.executable, "-c", USES],
        capture_output=True,
        text=True,
        cwd=workdir,
        env=os.environ | dict(PYTHONPATH=path),
    )
    assert not done.returncode, done.stderr


BUSY, QUIET = "6.1 3.2 1.0 9/99 1234", "0.1 0.2 0.3 1/99 1234"


@pytest.mark.parametrize(
    "load, before, policy",
    [
        ([BUSY], "", "passive"),
        ([QUIET], "", "None"),
        (["?"], "", "None"),
        ([BUSY], "import torch", "None"),
        ([BUSY, QUIET], "", "None"),  # Programs that have just been started run for a moment only
    ],
)
def test_waiting_threads_sleep_on_a_busy_machine(load, before, policy):
    "If other programs use the cores, and torch is not loaded yet, importing lmnotes sets the wait policy of OpenMP"
    lines = [
        "import os, pathlib",
        before,
        f"looks = {load!r}",
        "pathlib.Path.read_text = lambda path: looks.pop(0) if len(looks) > 1 else looks[0]",
        "os.cpu_count = lambda: 4",
    ]
    lines.append("import lmnotes; print(os.environ.get('OMP_WAIT_POLICY'))")
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == policy, done.stderr


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
