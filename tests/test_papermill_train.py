"""`nbs/train.ipynb` under papermill, stopped from outside: the notebook is finished, and the run goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import DEADLINE, TINY, call, differences, left_behind, lmnotes_command, log, until, words

ROOT = Path(__file__).parent.parent
PAPERMILL = str(Path(sys.executable).parent / "papermill")
# What the kernel does before anything else: it arranges that training holds at step 8 until the test lets go.
HOLD = """
import os, pathlib, sys
pathlib.Path("kernel.pid").write_text(str(os.getpid()))
sys.path.insert(0, {tests!r})
from test_signals import MOMENTS
MOMENTS["before step 8"]()
"""
CASE = TINY | dict(sample_every=30)


def parameters(**params):
    "Parameters as the words of papermill's command line"
    return [word for name, value in params.items() for word in ("-p", name, str(value))]


def papermill(place, *words, **environ):
    "Start papermill on this project's own training notebook; what it says goes to a file"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    settings = dict(OMP_NUM_THREADS="1", IPYTHONDIR=str(place / "ipython"), MPLBACKEND="agg")
    with open(place / "log", "ab") as said:
        return subprocess.Popen(
            [PAPERMILL, str(ROOT / "nbs/train.ipynb"), *words, "--no-progress-bar", "--start-timeout", str(DEADLINE)],
            cwd=place,
            env=clean | settings | environ,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    "What the run leaves behind when the command line trains it without a stop"
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").symlink_to(corpus)
    assert call(folder, lmnotes_command, "train", *words(**CASE)) == 0, log(folder)
    return left_behind(folder / "runs/r")


def held(place, *words):
    "Papermill, with training held before step 8"
    startup = place / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00-hold.py").write_text(HOLD.format(tests=str(Path(__file__).parent)))
    process = papermill(place, *words)
    until(lambda: (place / "reached").exists() or process.poll() is not None)
    assert process.poll() is None, log(place)
    return process


def check(place, outputs):
    "The notebook is valid, and every one of its cells has run"
    nb = nbformat.read(place / "runs/r/train.ipynb", 4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert outputs in "".join(output.get("text", "") for cell in code for output in cell.outputs)


def go_on(place, whole):
    "`papermill nbs/train.ipynb -p resume True`, without an output path, ends as the run that was never stopped"
    (place / "go").touch()
    process = papermill(place, *parameters(resume=True, out_dir=place / "runs"))
    assert process.wait(DEADLINE) == 0, log(place)
    assert "lmnotes: the executed notebook goes to runs/r/train.ipynb" in log(place)
    check(place, "r: done at step 40 of 40")
    assert not differences(whole, left_behind(place / "runs/r"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_papermill(place, whole, number):
    process = held(place, *parameters(**CASE | dict(out_dir=place / "runs")))
    process.send_signal(number)
    until(lambda: f"lmnotes: {number.name}, the kernel is asked to finish" in log(place))
    (place / "go").touch()
    assert process.wait(DEADLINE) == 0, log(place)
    assert left_status(place) == ("interrupted", 8)
    check(place, "r: interrupted at step 8 of 40 and saved; go on with resume=True run=r")
    go_on(place, whole)


def left_status(place):
    record = json.loads((place / "runs/r/run.json").read_bytes())
    return record["status"], record["step"]


def test_papermill_and_its_kernel_are_killed(place, whole):
    process = held(place, *parameters(**CASE | dict(out_dir=place / "runs", save_every=5)))
    os.kill(int((place / "kernel.pid").read_text()), signal.SIGKILL)
    process.kill()
    process.wait(DEADLINE)
    assert left_status(place)[0] == "running"
    assert not (place / "runs/r/interrupted").exists() and (place / "runs/r/step_00000005").exists()
    go_on(place, whole)
