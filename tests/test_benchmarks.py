"""Every benchmark runs in quick mode. `python -m benchmarks --check` checks the goals on a quiet machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "benchmarks"
NOT_BENCHMARKS = "__main__.py", "common.py", "nanogpt.py"
SCRIPTS = sorted(path.name for path in HERE.glob("*.py") if path.name not in NOT_BENCHMARKS)


SLOW = "guides.py", "memory.py", "mixture.py", "ten_minutes.py", "time_to_loss.py"


@pytest.mark.parametrize("script", [pytest.param(s, marks=[pytest.mark.nightly] * (s in SLOW)) for s in SCRIPTS])
def test_benchmark_runs(script):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / script, "--quick"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "quick run: goals not checked" in done.stdout
    assert not re.search("PASS|FAIL", done.stdout)


def test_number_of_benchmarks():
    assert len(SCRIPTS) == 18
