"""Papermill from the command line: without an output path, and stopped by a signal."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from helpers import DEADLINE, wait_until

from lmnotes.apps.papermill_engine import ONE_VALUE, TWO_VALUES

ROOT = Path(__file__).parent.parent
PAPERMILL = str(Path(sys.executable).parent / "papermill")

PARAMETERS = """
run = ""
resume = False
mode = "quick"
"""

TRAIN = """
import os, pathlib, signal, time
heard = []
if mode == "listens":
    signal.signal(signal.SIGINT, lambda *args: heard.append("SIGINT"))
if mode == "ignores":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
note = pathlib.Path("kernel.pid")
end = time.time() + 900
while mode != "quick" and not heard and time.time() < end:
    try:
        note.exists() or note.write_text(str(os.getpid()))
        time.sleep(0.02)
    except KeyboardInterrupt:
        if pathlib.Path("interrupted").exists():
            raise
        pathlib.Path("interrupted").touch()
"""

REPORT = """
import json
print(json.dumps(dict(heard=heard, resume=resume, run=os.environ.get("LMNOTES_RUN"))))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    "Return a small project with two runs, the second of which is the last"
    monkeypatch.delenv("LMNOTES_OUT_DIR", raising=False)
    monkeypatch.delenv("LMNOTES_RUN", raising=False)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(TRAIN),
        nbformat.v4.new_code_cell(REPORT),
    ]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (tmp_path / "nbs").mkdir()
    for path in ("nbs/train.ipynb", "elsewhere.ipynb"):
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / path)
    for name, hour in (("one", 10), ("two", 11)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        record = dict(updated=f"2026-01-01T{hour}:00:00+00:00")
        (tmp_path / "checkpoints" / name / "run.json").write_text(json.dumps(record))
    return tmp_path


def papermill(project, *words, **options):
    "Start papermill in the project's folder, or in another"
    options = dict(cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    return subprocess.Popen([PAPERMILL, *words, "--start-timeout", str(DEADLINE)], **options)


def exit_code_and_output(process):
    "Return the exit code and the output"
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def report(notebook):
    "Return the output of the last cell"
    nb = nbformat.read(notebook, 4)
    nbformat.validate(nb)
    return json.loads(nb.cells[-1].outputs[0].text)


def on_a_terminal(project, *words):
    "Run papermill with a terminal as its input and output"
    ours, theirs = pty.openpty()
    process = papermill(project, *words, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = bytearray()

    def read():
        try:
            while chunk := os.read(ours, 4096):
                printed.extend(chunk)
        except OSError:  # The other end has been closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process.wait(timeout=DEADLINE)
    reader.join()
    os.close(ours)
    return process.returncode, printed.decode()


def redirected(project, *words):
    "Run papermill with its output in a file, as in a batch job"
    with open(project / "log", "wb") as log:
        code, _, _ = exit_code_and_output(papermill(project, *words, stdout=log, stderr=log))
    return code, (project / "log").read_text()


def piped(project, *words):
    "Run papermill with a pipe as its input, as in a container"
    code, out, err = exit_code_and_output(papermill(project, *words, stdin=subprocess.PIPE))
    return code, out + err


@pytest.mark.parametrize("way", [on_a_terminal, redirected, pytest.param(piped, marks=pytest.mark.nightly)])
def test_resume_without_an_output_path(project, way):
    source = (project / "nbs/train.ipynb").read_bytes()
    code, printed = way(project, "nbs/train.ipynb", "-p", "resume", "True")
    assert code == 0, printed
    assert "lmnotes: the executed notebook goes to checkpoints/two/train.ipynb" in printed
    assert report(project / "checkpoints/two/train.ipynb") == dict(heard=[], resume=True, run="two")
    assert (project / "nbs/train.ipynb").read_bytes() == source


def test_resume_uses_the_last_run(project):
    (project / "checkpoints/.last").write_text("one\n")
    code, out, err = exit_code_and_output(
        papermill(project, "train.ipynb", "-p", "resume", "True", cwd=project / "nbs")
    )
    assert code == 0, err
    assert report(project / "checkpoints/one/train.ipynb")["run"] == "one"


def test_given_output_path_is_used(project):
    (project / "checkpoints/first").mkdir()
    code, out, err = exit_code_and_output(papermill(project, "nbs/train.ipynb", "checkpoints/first/train.ipynb"))
    assert code == 0, err
    assert report(project / "checkpoints/first/train.ipynb")["run"] == "first"
    code, out, err = exit_code_and_output(papermill(project, "nbs/train.ipynb", "copy.ipynb"))
    assert code == 0, err
    assert report(project / "copy.ipynb")["run"] is None
    assert sorted(path.name for path in (project / "checkpoints").iterdir()) == ["first", "one", "two"]


def test_nothing_to_resume(project):
    shutil.rmtree(project / "checkpoints")
    code, out, err = exit_code_and_output(papermill(project, "nbs/train.ipynb", "-p", "resume", "True"))
    assert code == 1
    assert "there is no run. Train one (without -p resume)" in err


def test_other_notebooks_are_unchanged(project):
    code, out, err = exit_code_and_output(papermill(project, "elsewhere.ipynb"))
    assert code == 0, err
    assert json.loads(out)["metadata"]["papermill"]["output_path"] == "-"
    code, printed = on_a_terminal(project, "elsewhere.ipynb")
    assert code == 2
    assert "Missing argument 'OUTPUT_PATH'" in printed


def training(project, mode):
    "Start papermill, and yield when its training cell is running"
    process = papermill(project, "nbs/train.ipynb", "-p", "run", "mine", "-p", "mode", mode, "--no-progress-bar")
    noted = project / "kernel.pid"
    wait_until(lambda: (noted.is_file() and noted.read_text()) or process.poll() is not None)
    assert process.poll() is None, exit_code_and_output(process)
    return process


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_first_signal_lets_the_notebook_finish(project, number):
    "The signal is forwarded as SIGINT, and the run has the given name"
    process = training(project, "listens")
    process.send_signal(number)
    code, out, err = exit_code_and_output(process)
    assert code == 0, err
    assert f"lmnotes: {number.name}, the kernel finishes its step" in err
    assert report(project / "checkpoints/mine/train.ipynb") == dict(heard=["SIGINT"], resume=False, run="mine")


def test_a_second_signal_interrupts_the_cell(project):
    process = training(project, "deaf")
    process.send_signal(signal.SIGTERM)
    wait_until((project / "interrupted").exists)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, out, err = exit_code_and_output(process)
    assert code == 1
    nb = nbformat.read(project / "checkpoints/mine/train.ipynb", 4)
    assert any(output.get("ename") == "KeyboardInterrupt" for cell in nb.cells for output in cell.get("outputs", []))


def test_a_third_signal_kills(project):
    process = training(project, "ignores")
    kernel = int((project / "kernel.pid").read_text())
    heard = b""
    for words in (b"finishes its step", b"is interrupted", b"is killed"):
        process.send_signal(signal.SIGINT)
        while words not in heard:
            more = os.read(process.stderr.fileno(), 4096)
            assert more, f"papermill has ended: {heard.decode()}"
            heard += more
    code, out, err = exit_code_and_output(process)
    assert code == 138
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


NOTES = """
import json, os
print("step 1/2 | loss 4.1 | 3s left")
get_ipython().kernel.log.error("KeyboardInterrupt caught in kernel.")  # As ipykernel does between cells
if mode == "fails":
    raise ValueError("no such data")
os.makedirs("checkpoints/mine", exist_ok=True)
with open(os.environ["LMNOTES_NOTE"], "w") as file:
    results, commands = ["mine: sample at step 2:", "The \x1b[2J end"], ["lmnotes generate --run mine", "lmnotes evaluate"]
    json.dump(dict(folder=os.path.abspath("checkpoints/mine"), results=results, next=commands), file)
"""


END = """
mine: sample at step 2:
The ⟨U+001B⟩[2J end
lmnotes: the executed notebook is now checkpoints/mine/own.ipynb
lmnotes: next:
lmnotes generate --run mine
lmnotes evaluate
"""


def test_lines_reports_and_next_commands(project):
    "The terminal shows the printed lines, the results and the next commands, and no report is overwritten"
    parameters = 'mode = "quick"  # quick | fails, as mode=quick'
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell(NOTES),
    ]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project / "nbs/own.ipynb")
    for mode in ("quick", "fails", "quick"):
        code, out, err = exit_code_and_output(papermill(project, "nbs/own.ipynb", "-p", "mode", mode))
        assert code == (mode == "fails") and "step 1/2 | loss 4.1 | 3s left\n" in out, err
        assert "[IPKernelApp]" not in err and "Unable to parse" not in err and "unknown parameter" not in err
        assert mode == "fails" or err.endswith(END)
    found = sorted(str(path.relative_to(project / "checkpoints")) for path in project.glob("checkpoints/*/*.ipynb"))
    assert found == ["mine/own-1.ipynb", "mine/own.ipynb", "notebooks/own-1.ipynb"]
    code, out, err = exit_code_and_output(papermill(project, "nbs/own.ipynb", "--prepare-only"))
    assert code == 0 and (project / "checkpoints/mine/own.ipynb").exists()


def test_engine_knows_papermills_options():
    from papermill.cli import papermill as command

    options = [option for option in command.params if not getattr(option, "is_flag", True)]
    assert {name for option in options if option.nargs == 2 for name in option.opts} == TWO_VALUES
    assert {name for option in options if option.nargs == 1 for name in option.opts} == ONE_VALUE
