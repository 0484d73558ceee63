"""The README's examples run unchanged in a project that contains only its notebooks."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import lmnotes_command, read_log, run_in_process

from lmnotes.runs.config import RunConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^lmnotes (?:train|watch|evaluate|generate) .*", README, re.M)
OF_FIRST = [line for line in LINES if "--run first" in line]  # They need the run of `make train`
SHELL = [line for line in LINES if line not in OF_FIRST]
COMMANDS = re.findall(r"^papermill .*", README, re.M)
(FIRST_RUN,) = [line for line in COMMANDS if "checkpoints/first" in line]
# The commands give no size of the model and of the batch
DEFAULT = dict(LMNOTES_BATCH_SIZE="2")
SMALL = DEFAULT | dict(LMNOTES_MODEL_ARGS="d_model=32 n_layers=1 n_heads=2")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copy(ROOT / "README.md", folder)
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "nbs/train.ipynb", folder / "nbs")
    return folder


def run(command, project, **variables):
    "Run a command line with this environment's programs first, as after `. .venv/bin/activate`"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")} | variables
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    done = subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def shown(notebook):
    "Return the outputs of a notebook's cells as one text, and the kinds of outputs"
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    return text, {kind for output in outputs for kind in output.get("data", {})}


SHORT, WHOLE = SMALL | dict(LMNOTES_STEPS="40"), dict(LMNOTES_STEPS="500")


@pytest.mark.parametrize("size", [SHORT, pytest.param(WHOLE, marks=pytest.mark.nightly)], ids=["short", "whole"])
def test_the_first_run(project, size):
    "The first run's report has a curve and no error"
    shutil.rmtree(project / "checkpoints", ignore_errors=True)
    run(["bash", "-c", FIRST_RUN], project, **size)
    text, kinds = shown(project / "checkpoints/first/train.ipynb")
    assert "image/png" in kinds
    assert text
    assert (project / "checkpoints/first/run.json").is_file()
    texts = [run(["bash", "-c", line], project, **size).stdout for line in OF_FIRST]
    assert len(texts) == 2 and texts[0].startswith("The") and "bpb" in texts[1]


def test_the_last_run_is_resumed(project):
    done = run(["bash", "-c", "papermill nbs/train.ipynb -p resume True"], project)
    assert "papermill nbs/train.ipynb -p resume True" in COMMANDS
    assert "checkpoints/first/train.ipynb" in done.stderr


def command_with(variables, *words):
    "Run the command line with environment variables"
    os.environ.update(variables)
    return lmnotes_command(*words)


def run_forked(line, project, **variables):
    "Run a command of lmnotes in a forked process, which saves the imports, and return its output"
    (project / "log").unlink(missing_ok=True)
    assert run_in_process(project, command_with, variables, *shlex.split(line)[1:]) == 0, read_log(project)
    return read_log(project)


def run_in_shell(line, project, **variables):
    return run(["bash", "-c", line], project, **variables).stdout


@pytest.mark.parametrize(
    "size, run_others",
    [(SMALL, run_forked), pytest.param(DEFAULT, run_in_shell, marks=pytest.mark.nightly)],
    ids=["small", "default"],
)
def test_the_shell(project, size, run_others):
    "The shell commands run one after the other"
    first, *others = SHELL
    printed = [run_in_shell(first, project, **size)] + [run_others(line, project, **size) for line in others]
    assert "done at step 50 of 50" in printed[0]
    assert f"small: gpt on {RunConfig.data} | done at step 50 of 50" in printed[1]
    assert "bpb" in printed[2]
    assert printed[3].startswith("The")


@pytest.mark.parametrize("size", [SMALL, pytest.param(DEFAULT, marks=pytest.mark.nightly)], ids=["small", "default"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_script(project, example, size):
    assert len(example.strip().splitlines()) < 10
    run([sys.executable, "-c", example], project, **size)
    assert (project / "checkpoints/mine/run.json").is_file()


def test_the_figures_of_the_first_screen_are_the_measured_ones():
    trust, results = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("trust", "results"))
    cases, passed = re.search(r"^([\d,]+) cases: (\d+) passed", trust, re.M).groups()
    assert f"{int(passed):,} of {cases} cases" in README
    (row,) = [line for line in results.splitlines() if "nanoGPT's CPU seconds" in line and "time_to_loss" in line]
    least = min(float(times) for times in re.findall(r" 1/([\d.]+) ", row.partition("|")[2].partition("|")[2]))
    assert f"{int(least * 10) / 10} times less" in README
    bits = re.findall(r"^\| \w+ \| (?:≤ )?(\d\.\d+) ±", README, re.M)
    assert len(bits) == 10 and f"{min(bits)} to {max(bits)}" in README
