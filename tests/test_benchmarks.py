"""Every benchmark runs. What they measure is judged elsewhere: on a quiet machine, with `python -m benchmarks --check`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"
NOT_BENCHMARKS = "__main__.py", "common.py", "nanogpt.py"
SCRIPTS = sorted(path.name for path in HERE.glob("*.py") if path.name not in NOT_BENCHMARKS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(script):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / script, "--quick"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "quick run: nothing is judged" in done.stdout
    assert not re.search("PASS|FAIL", done.stdout)


def test_all_are_there():
    assert len(SCRIPTS) == 18
