"""`import lmnotes` is quick and loads nothing heavy; measured in fresh processes, in turn."""

import json
import subprocess
import sys

import pytest

HEAVY = ["transformers", "tokenizers", "matplotlib", "faiss", "papermill", "tyro", "nbdev", "fastcore", "IPython"]

MEASURE = """
import json, sys, time
start = time.perf_counter()
import {module}
print(json.dumps(dict(seconds=time.perf_counter() - start, modules=[m for m in {heavy} if m in sys.modules])))
"""


def fresh(module):
    "Seconds to import a module in a new process, and which heavy ones came with it"
    code = MEASURE.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light():
    assert fresh("lmnotes")["modules"] == []
    assert fresh("lmnotes.engine")["modules"] == []


def test_import_costs_little_more_than_torch():
    torch, lmnotes = [], []
    for _ in range(3):
        torch.append(fresh("torch")["seconds"])
        lmnotes.append(fresh("lmnotes")["seconds"])
    assert min(lmnotes) <= min(torch) + 0.5, f"import lmnotes {min(lmnotes):.2f} s, import torch {min(torch):.2f} s"


@pytest.mark.parametrize("modules", ["lmnotes.engine, papermill.engines", "papermill.engines, lmnotes.engine"])
def test_papermill_and_its_engine_can_be_imported_in_either_order(modules):
    code = f"import {modules}; print(papermill.engines.papermill_engines.get_engine('lmnotes') is lmnotes.engine.GracefulEngine)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
