"""Cases of public reports, each a script that exits with 0 if it is resolved. They lie next to the project, and are skipped without it."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

CASES = sorted((ROOT.parent / "shared/cases").glob("*.py"))
NAMES = {  # Of version 0.1, in which the scripts are written: now
    r"lmnotes\.checkpoint import init_from": "lmnotes.training.weights import load_initial_weights as init_from",
    r"lmnotes\.lm\b": "lmnotes.nn.lm",
    r"lmnotes\.lora\b": "lmnotes.nn.lora",
    r"lmnotes\.tokenizer\b": "lmnotes.data.tokenizer",
    r"lmnotes\.corpus\b": "lmnotes.data.datasets",
    r"lmnotes\.runs import prepare_data": "lmnotes.data.prepare import prepare_data",
    r"lmnotes\.generation import Picker": "lmnotes.inference.generation import TokenSampler as Picker",
    r"lmnotes\.generation\b": "lmnotes.inference.generation",
    r"lmnotes\.export import": "lmnotes.export.export import",
    r"lmnotes\.core import RunLock\b": "lmnotes.files import RunLock",
    r"lmnotes\.trainer\b": "lmnotes.training.trainer",
    r"\)\.start\(": ").reset(",
}


@pytest.mark.nightly
@pytest.mark.parametrize("path", CASES or [pytest.param(None, marks=pytest.mark.skip(reason="needs ../shared/cases"))])
def test_reported_case(path, tmp_path):
    source = path.read_text(encoding="utf-8")
    for old, new in NAMES.items():
        source = re.sub(old, new, source)
    (tmp_path / path.name).write_text(source, encoding="utf-8")
    environment = os.environ | dict(TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, path.name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
