"""Every benchmark runs in quick mode. `python -m benchmarks --check` checks the goals on a quiet machine."""

import multiprocessing
import re
import runpy
import sys
from pathlib import Path

import pytest
from helpers import read_log, run_in_process

HERE = Path(__file__).parent.parent / "benchmarks"
NOT_BENCHMARKS = "__main__.py", "common.py", "nanogpt.py"
SCRIPTS = sorted(path.name for path in HERE.glob("*.py") if path.name not in NOT_BENCHMARKS)


def run_script(path, *args):
    "Run a script as `python path args` does, which can start processes of its own"
    multiprocessing.current_process()._config["daemon"] = False
    sys.path[0], sys.argv = str(path.parent), [str(path), *args]
    runpy.run_path(str(path), run_name="__main__")


SLOW = (
    "busy.py",
    "compiled.py",
    "growth.py",
    "guides.py",
    "memory.py",
    "mixture.py",
    "muon.py",
    "peak_memory.py",
    "prepare.py",
    "ten_minutes.py",
    "time_to_loss.py",
)


@pytest.mark.parametrize("script", [pytest.param(s, marks=[pytest.mark.nightly] * (s in SLOW)) for s in SCRIPTS])
def test_benchmark_runs(script, tmp_path):
    assert run_in_process(tmp_path, run_script, HERE / script, "--quick") == 0, read_log(tmp_path)
    assert "quick run: goals not checked" in read_log(tmp_path)
    assert not re.search("PASS|FAIL", read_log(tmp_path))


def test_number_of_benchmarks():
    assert len(SCRIPTS) == 27
