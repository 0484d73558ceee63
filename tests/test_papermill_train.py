"""`nbs/train.ipynb` under papermill, stopped from outside: the notebook is completed, and the run resumes to the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from helpers import (
    DEADLINE,
    TINY,
    differences,
    read_log,
    run_results,
    train_with_command,
    wait_until,
)

ROOT = Path(__file__).parent.parent
PAPERMILL = str(Path(sys.executable).parent / "papermill")
# Startup code of the kernel: training pauses before a step until the test creates a file.
HOLD = """
import os, pathlib, sys
pathlib.Path("kernel.pid").write_text(str(os.getpid()))
sys.path.insert(0, {tests!r})
from helpers import run_before_call, shorten_samples
from lmnotes.training.trainer import Trainer
shorten_samples()
run_before_call(Trainer, "train_step", lambda trainer: trainer.step == {step} - 1)
"""
CASE = TINY | dict(sample_every=30)


def parameters(**params):
    "Return parameters as words of papermill's command line"
    return [word for name, value in params.items() for word in ("-p", name, str(value))]


def papermill(workdir, *command_line_args, **environ):
    "Start papermill on this project's own training notebook, with its output in a file"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    settings = dict(OMP_NUM_THREADS="1", IPYTHONDIR=str(workdir / "ipython"), MPLBACKEND="agg")
    with open(workdir / "log", "ab") as stdout_text:
        return subprocess.Popen(
            [
                PAPERMILL,
                str(ROOT / "nbs/train.ipynb"),
                *command_line_args,
                "--no-progress-bar",
                "--start-timeout",
                str(DEADLINE),
            ],
            cwd=workdir,
            env=clean | settings | environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout_text,
            stderr=stdout_text,
        )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    "Return the results of an uninterrupted run of the command line"
    return run_results(train_with_command(tmp_path_factory.mktemp("whole"), corpus, **CASE))


def start_paused(workdir, step, *command_line_args):
    "Start papermill and wait until training pauses before this step"
    startup = workdir / "ipython/profile_default/startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-hold.py").write_text(HOLD.format(tests=str(Path(__file__).parent), step=step))
    for name in ("reached", "go"):
        (workdir / name).unlink(missing_ok=True)
    process = papermill(workdir, *command_line_args)
    wait_until(lambda: (workdir / "reached").exists() or process.poll() is not None)
    assert process.poll() is None, read_log(workdir)
    return process


def check(workdir, outputs):
    "Check that the notebook is valid and that all its cells have run"
    nb = nbformat.read(workdir / "runs/r/train.ipynb", 4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert outputs in "".join(output.get("text", "") for cell in code for output in cell.outputs)


def resume_and_compare(workdir, uninterrupted):
    "Check that `papermill nbs/train.ipynb -p resume True` without an output path gives the uninterrupted run's results"
    (workdir / "go").touch()
    process = papermill(workdir, *parameters(resume=True, out_dir=workdir / "runs"))
    assert process.wait(DEADLINE) == 0, read_log(workdir)
    assert "lmnotes: the executed notebook goes to runs/r/train.ipynb" in read_log(workdir)
    check(workdir, "r: done at step 40 of 40")
    assert not differences(uninterrupted, run_results(workdir / "runs/r"))


def paste_resume_line(workdir):
    "Run the line that the executed notebook prints, as a shell does"
    nb = nbformat.read(workdir / "runs/r/train.ipynb", 4)
    printed = "".join(output.get("text", "") for cell in nb.cells for output in cell.get("outputs", []))
    line = re.search(r"Resume with: (papermill .+)", printed)[1]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    environ |= dict(PATH=f"{Path(PAPERMILL).parent}:{environ['PATH']}", IPYTHONDIR=str(workdir / "ipython"))
    subprocess.run(line, shell=True, cwd=workdir, env=environ, check=True)
    check(workdir, "r: done at step 40 of 40")


def check_interrupted(workdir, process, step):
    "Let training continue, and check that papermill completes the notebook of a run that is interrupted at this step"
    (workdir / "go").touch()
    assert process.wait(DEADLINE) == 0, read_log(workdir)
    assert left_status(workdir) == ("interrupted", step)
    check(workdir, f"r: interrupted at step {step} of 40 and saved. Resume with: papermill ")


def signal_papermill(workdir, process, number, step):
    "Send a signal to papermill, which forwards it to the kernel"
    process.send_signal(number)
    wait_until(lambda: f"lmnotes: {number.name}, the kernel finishes its step" in read_log(workdir))
    check_interrupted(workdir, process, step)


def left_status(workdir):
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    return record["status"], record["step"]


def test_a_run_is_interrupted_and_killed(workdir, uninterrupted):
    """A signal to papermill or to its kernel stops the run after its step, and the notebook continues. Then both are killed

    Each time, the same run is resumed.
    """
    resume = parameters(resume=True, out_dir=workdir / "runs")
    process = start_paused(workdir, 8, *parameters(**CASE | dict(out_dir=workdir / "runs")))
    signal_papermill(workdir, process, signal.SIGTERM, 8)
    process = start_paused(workdir, 14, *resume)
    os.kill(int((workdir / "kernel.pid").read_text()), signal.SIGTERM)
    check_interrupted(workdir, process, 14)
    process = start_paused(workdir, 24, *resume)
    os.kill(int((workdir / "kernel.pid").read_text()), signal.SIGKILL)
    process.kill()
    process.wait(DEADLINE)
    assert left_status(workdir)[0] == "running"
    assert not (workdir / "runs/r/interrupted").exists() and (workdir / "runs/r/step_00000020").exists()
    resume_and_compare(workdir, uninterrupted)


@pytest.mark.nightly
def test_the_printed_line_resumes(workdir, uninterrupted):
    process = start_paused(workdir, 8, *parameters(**CASE | dict(out_dir=workdir / "runs")))
    signal_papermill(workdir, process, signal.SIGINT, 8)
    paste_resume_line(workdir)
    assert not differences(uninterrupted, run_results(workdir / "runs/r"))


@pytest.mark.nightly
@pytest.mark.parametrize("pause", [0, 1.2])
@pytest.mark.parametrize("target", ["papermill", "kernel"])
def test_two_signals(workdir, uninterrupted, target, pause):
    """Two signals to papermill or to its kernel at once, or one after the other, leave a run that resumes exactly

    The second of two signals more than a second apart interrupts the training cell. The notebook then ends with an error.
    """
    process = start_paused(workdir, 13, *parameters(**CASE | dict(out_dir=workdir / "runs")))
    kernel = int((workdir / "kernel.pid").read_text())
    pid, logged = (process.pid, "the kernel finishes its step") if target == "papermill" else (kernel, "")
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: logged in read_log(workdir))
    time.sleep(pause)
    os.kill(pid, signal.SIGINT)
    if not pause:
        (workdir / "go").touch()
    process.wait(DEADLINE)
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)
    nbformat.validate(nbformat.read(workdir / "runs/r/train.ipynb", 4))
    assert left_status(workdir)[0] == ("failed" if pause else "interrupted"), read_log(workdir)
    resume_and_compare(workdir, uninterrupted)
