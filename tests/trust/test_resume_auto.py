"""One command that a scheduler repeats starts a run, resumes it as often as needed, and returns when it is finished."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    pause_before_step,
    read_log,
    run_after_call,
    run_before_call,
    run_in_process,
    run_results,
    start_process,
    wait_for_exit,
    wait_until,
)
from small_runs import SMALL

import lmnotes
from lmnotes.apps import cli
from lmnotes.apps.papermill_engine import fill_in_command, protect_report
from lmnotes.core import CheckpointError, read_json, write_json
from lmnotes.recipes.nanothink import checkpoint_hooks
from lmnotes.recipes.nanothink_checkpoints import prepare_resume
from lmnotes.runs import folder as folder_module
from lmnotes.runs import run as run_module
from lmnotes.runs.config import resolve_config, to_cli_flags
from lmnotes.training import checkpoint, trainer

ROOT = Path(__file__).parent.parent.parent
AUTO = command_line_args(**TINY, resume="auto")
# Where the command is killed, one after the other
KILLS = {
    "before the run is recorded": lambda: run_before_call(run_module, "_start_record", lambda *args: True),
    "before the first checkpoint": lambda: run_before_call(trainer.Trainer, "train_step", lambda t: t.step == 8),
    "in the first checkpoint": lambda: run_after_call(
        checkpoint, "_write_file", lambda path, data: "00000010" in str(path)
    ),
    "before step 27": lambda: run_before_call(trainer.Trainer, "train_step", lambda t: t.step == 26),
    "before the run is done": lambda: run_before_call(run_module, "_final_message", lambda t, folder: True),
}


def paused(moment, *words):
    "Run the command line, and pause it at a moment"
    KILLS[moment]()
    return lmnotes_command(*words)


def content(folder):
    "Return {path: (mtime, bytes)} of everything in a folder"
    paths = [folder, *sorted(folder.rglob("*"))]
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else "") for p in paths}


def test_requeued_run_is_bit_identical(workdir, uninterrupted_run):
    "The same command, killed five times, ends with one run and the same bits"
    for moment in KILLS:
        process = start_process(workdir, paused, moment, "train", *AUTO)
        wait_until((workdir / "reached").exists, process)
        process.kill()
        assert wait_for_exit(process) == -signal.SIGKILL
        (workdir / "reached").unlink()
    assert run_in_process(workdir, lmnotes_command, "train", *AUTO) == 0, read_log(workdir)
    assert [path.name for path in (workdir / "runs").glob("[!.]*")] == ["r"]
    assert not differences(run_results(uninterrupted_run), run_results(workdir / "runs/r"))


@pytest.mark.parametrize("resume", [True, "auto"])
@pytest.mark.parametrize("more", [{}, dict(procs=2), dict(keep=1, wait=5)], ids=["alone", "procs", "keep"])
def test_a_finished_run_is_left_alone(workdir, uninterrupted_run, resume, more):
    "Commands for a finished run return at once, and no content or time of its files and folders changes"
    runs = uninterrupted_run.parent
    before = content(runs)
    params = TINY | dict(resume=resume, out_dir=str(runs), data=str(runs.parent / "corpus")) | more
    given = {name: value for name, value in params.items() if name != "data"}  # The run knows its data
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**given)) == 0, read_log(workdir)
    assert "r: done at step 40 of 40, so nothing is left to train" in read_log(workdir)
    assert content(runs) == before


def executed(notebook, **parameters):
    "Return the text of a notebook as papermill writes it for these parameters"
    content = json.loads(Path(notebook).read_bytes())
    content["metadata"]["papermill"] = dict(parameters=parameters)
    return json.dumps(content)


TRAIN, AGIFORMER = ROOT / "nbs/train.ipynb", ROOT / "nbs/recipes/agiformer.ipynb"


@pytest.mark.parametrize("way", ["papermill", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_papermill_and_torchrun_leave_a_finished_run_alone(workdir, uninterrupted_run, way):
    "papermill and torchrun return at once for a finished run, and its report stays as it is"
    runs = shutil.copytree(uninterrupted_run.parent, workdir / "runs")
    given = {name: value for name, value in TINY.items() if name != "data"} | dict(resume="auto", out_dir=str(runs))
    if way == "papermill":
        words = [word for name, value in given.items() for word in ("-p", name, str(value))]
        command = [str(Path(sys.executable).parent / "papermill"), str(ROOT / "nbs/train.ipynb"), *words]
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
        command += ["lmnotes", "train", *command_line_args(**given)]
    (runs / "r/train.ipynb").write_text(executed(TRAIN, **given))
    before = content(runs)
    done = subprocess.run(command, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "r: done at step 40 of 40, so nothing is left to train" in done.stdout
    assert content(runs) == before


# (notebook, parameters of the report, parameters of the command, change of the run, is its report kept without execution)
REPORTS = {
    "resumed": (TRAIN, {}, dict(resume="auto"), {}, True),
    "resumed by a variable": (TRAIN, {}, {}, {}, True),
    "repeated": (TRAIN, dict(seed=0), dict(seed=0, resume="auto"), {}, True),
    "a recipe is repeated": (AGIFORMER, dict(DATA="text"), dict(DATA="text", resume="auto"), {}, True),
    "longer": (TRAIN, {}, dict(resume="auto", steps=42, allow_change="steps"), {}, False),
    "rejected": (TRAIN, {}, dict(resume="auto", seed=5), {}, False),
    "a recipe with another parameter": (AGIFORMER, {}, dict(DATA="text", resume="auto"), {}, False),
    "another run is resumed": (TRAIN, {}, dict(resume="True", run="other"), {}, False),
    "not resumed": (TRAIN, {}, {}, {}, False),
    "damaged record": (TRAIN, {}, dict(resume="auto"), dict(status=5), False),
    "edited notebook": (TRAIN, {}, dict(resume="auto"), {}, False),
}


@pytest.mark.parametrize("case", REPORTS)
def test_papermill_keeps_the_report_of_an_earlier_run(workdir, uninterrupted_run, monkeypatch, case):
    "A command that only resumes a finished run executes nothing. Any other gives the report another name"
    notebook, then, now, change, is_kept = REPORTS[case]
    runs = shutil.copytree(uninterrupted_run.parent, workdir / "runs")
    write_json(runs / "r/run.json", read_json(runs / "r/run.json") | change)
    report = runs / "r/train.ipynb"
    before = executed(notebook, **then)
    if case == "edited notebook":
        before = before.replace("seed: NonNegativeInt = 0", "seed: NonNegativeInt = 1")
    report.write_text(before)
    if case == "resumed by a variable":
        monkeypatch.setenv("LMNOTES_RESUME", "auto")
    done = protect_report(notebook, report, dict(run="r", out_dir=str(runs)) | now)
    found = {path.name: path.read_text() for path in (runs / "r").glob("*.ipynb")}
    assert (bool(done), found) == (is_kept, {"train.ipynb" if is_kept else "train-1.ipynb": before})


def test_the_report_of_a_stopped_run_has_numbered_parts(workdir, uninterrupted_run):
    "Each part of a run that is resumed many times keeps its report"
    runs = shutil.copytree(uninterrupted_run.parent, workdir / "runs")
    write_json(runs / "r/run.json", read_json(runs / "r/run.json") | dict(status="interrupted"))
    (runs / "r/train.ipynb").write_text("{}")
    assert not protect_report(TRAIN, runs / "r/train.ipynb", dict(run="r", out_dir=str(runs), resume="auto"))
    assert [path.name for path in (runs / "r").glob("*.ipynb")] == ["train-1.ipynb"]


def test_a_finished_run_can_be_extended(workdir):
    "With more steps, or a damaged last checkpoint, the same command trains again"
    assert run_in_process(workdir, lmnotes_command, "train", *AUTO) == 0, read_log(workdir)
    whole = run_results(workdir / "runs/r")
    weights = workdir / "runs/r/step_00000040/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run_in_process(workdir, lmnotes_command, "train", *AUTO) == 0, read_log(workdir)
    assert not differences(whole, run_results(workdir / "runs/r"))
    given = command_line_args(**TINY | dict(resume="auto", steps=42))
    assert run_in_process(workdir, lmnotes_command, "train", *given) == 0, read_log(workdir)
    assert read_json(workdir / "runs/r/run.json")["step"] == 42


def test_two_processes_for_one_name(workdir, uninterrupted_run):
    "The second process waits until the first is killed, decides only then, and finishes the run"
    first = start_process(workdir, pause_before_step, 15, lmnotes_command, "train", *AUTO)
    wait_until((workdir / "reached").exists, first)
    assert run_in_process(workdir, lmnotes_command, "train", *AUTO) == 2
    assert "is in use by process" in read_log(workdir) and "the parameter `wait` (seconds)" in read_log(workdir)
    waiting = [start_process(workdir, announce_wait, n, "train", *AUTO, "--wait", "900") for n in range(2)]
    wait_until(lambda: all((workdir / f"waiting {n}").exists() for n in range(2)), first)
    first.kill()
    assert [wait_for_exit(process) for process in waiting] == [0, 0], read_log(workdir)
    assert read_log(workdir).count("so nothing is left to train") == 1  # The last of the three
    assert not differences(run_results(uninterrupted_run), run_results(workdir / "runs/r"))


def announce_wait(number, *words):
    "Run the command line, and create a file when it has found the lock taken"
    run_before_call(time, "sleep", lambda seconds: True, Path(f"waiting {number}").touch)
    return lmnotes_command(*words)


def test_a_signal_ends_the_wait(workdir):
    first = start_process(workdir, pause_before_step, 5, lmnotes_command, "train", *AUTO)
    wait_until((workdir / "reached").exists, first)
    second = start_process(workdir, announce_wait, 0, "train", *AUTO, "--wait", "900")
    wait_until((workdir / "waiting 0").exists, second)
    os.kill(second.pid, signal.SIGTERM)
    assert wait_for_exit(second) == 130 and "Traceback" not in read_log(workdir), read_log(workdir)
    first.kill()


def unnamed(number):
    "Start a run without a name at a fixed time. Wait for the other process after the name is chosen"
    run_after_call(folder_module, "run_folder_name", lambda cfg: True, lambda: meet(number))
    folder_module.time = SimpleNamespace(strftime=lambda form: "20260101-000000")
    params = {name: value for name, value in TINY.items() if name != "run"} | dict(steps=4)
    return lmnotes_command("train", *command_line_args(**params))


def meet(number):
    Path(f"at {number}").touch()
    wait_until(lambda: Path("at 0").exists() and Path("at 1").exists())


def test_two_runs_without_a_name_in_one_second(workdir):
    processes = [start_process(workdir, unnamed, number) for number in range(2)]
    assert [wait_for_exit(process) for process in processes] == [0, 0], read_log(workdir)
    names = sorted(path.parent.name for path in (workdir / "runs").glob("*/run.json"))
    assert names == ["20260101-000000", "20260101-000000-2"]


def test_a_failed_start_leaves_no_folder(workdir):
    params = {name: value for name, value in TINY.items() if name != "run"}
    for more in ({}, dict(procs=2, batch_size=8)):
        given = command_line_args(**params | more | dict(arch="gtp"))
        assert run_in_process(workdir, lmnotes_command, "train", *given) == 2, read_log(workdir)
    assert not list((workdir / "runs").glob("*"))


def parse_slowly(*words):
    "Run the command line, and pause it while it parses its options"
    run_before_call(cli, "parse_options", lambda *args: True)
    return lmnotes_command(*words)


def test_ctrl_c_while_the_command_is_parsed(workdir):
    process = start_process(workdir, parse_slowly, "train", *AUTO)
    wait_until((workdir / "reached").exists, process)
    os.kill(process.pid, signal.SIGINT)
    assert wait_for_exit(process) == 130 and not read_log(workdir)


def test_every_way_to_pass_resume(workdir, monkeypatch):
    "Python, environment, command line and papermill accept the same values"
    values = {True: True, "True": True, "1": True, False: False, "": False, "auto": "auto", "AUTO": "auto"}
    for value, expected in values.items():
        assert resolve_config(dict(resume=value), environ={})[0].resume == expected
        assert resolve_config({}, environ=dict(LMNOTES_RESUME=str(value)))[0].resume == expected
    found = []
    monkeypatch.setattr(run_module, "run", lambda **params: found.append(params) or SimpleNamespace(status="done"))
    ways = {"--resume": True, "--no-resume": False, "--resume auto": "auto", "--resume=auto": "auto"}
    for words, expected in ways.items():
        assert cli.train_command([*words.split(), "--steps", "5"]) == 0
        cfg = resolve_config(found[-1], environ={})[0]
        assert (cfg.resume, cfg.steps) == (expected, 5)
    assert [to_cli_flags(dict(resume=v)) for v in (True, False, "auto")] == [
        ["--resume"],
        ["--no-resume"],
        ["--resume", "auto"],
    ]
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(workdir / "runs"))
    notebook = str(ROOT / "nbs/train.ipynb")
    argv, _ = fill_in_command(["papermill", notebook, "-p", "run", "r", "-p", "resume", "auto"])
    assert argv[2] == str(workdir / "runs/r/train.ipynb")
    assert json.loads(base64.b64decode(argv[argv.index("-b") + 1])) == dict(run="r", resume="auto")
    with pytest.raises(ValueError, match="needs the name of the run. Add `-p run NAME`"):
        fill_in_command(["papermill", notebook, "-p", "resume", "auto"])


def remove_checkpoints(runs):
    "Remove all checkpoints of the run `small`"
    for path in [*runs.glob("small*.pt"), *runs.glob("small/step_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage_checkpoints(runs):
    "Damage all checkpoints in the folder of the run `small`, and remove those next to it"
    for path in runs.glob("small/step_*/model.safetensors"):
        path.write_bytes(b"damaged")
    for path in runs.glob("small*.pt"):
        path.unlink()


def remove_record(runs):
    "Remove the record of the run `small` and the checkpoints next to it"
    for path in [runs / "small/run.json", *runs.glob("small*.pt")]:
        path.unlink()


def start_again(runs):
    "Return the run `small` to the moment before its first checkpoint"
    remove_checkpoints(runs)
    for name in checkpoint.POINTERS:
        (runs / "small" / name).unlink(missing_ok=True)
    write_json(
        runs / "small/run.json", read_json(runs / "small/run.json") | dict(saved=False, status="running", step=0)
    )


def start_before_its_first_hook(runs):
    "Return the run `small` to the moment after its record was written"
    start_again(runs)
    (runs / "small/recipe.json").unlink()


# (what happened to the run, does `auto` resume it, part of the error)
NANOTHINK = {
    "nothing": (lambda runs: None, True, ""),
    "the run folder is lost": (lambda runs: shutil.rmtree(runs / "small"), True, ""),
    "the checkpoints are lost": (remove_checkpoints, True, "none of its step_ folders is here"),
    "the checkpoints are damaged": (damage_checkpoints, True, "model.safetensors"),
    "the record is lost": (remove_record, True, "run.json"),
    "killed before the first checkpoint": (start_again, True, ""),
    "killed before the first step": (start_before_its_first_hook, False, ""),
    "never started": (lambda runs: [remove_checkpoints(runs), shutil.rmtree(runs / "small")], False, ""),
}


@pytest.fixture(scope="module")
def nanothink_run(tmp_path_factory):
    "Return a folder with the finished run `small` of a NanoThink recipe"
    runs = tmp_path_factory.mktemp("nanothink")
    (runs / "corpus.txt").write_text("the cat sat on the mat. " * 40)
    train_small(runs)
    return runs


def train_small(runs, resume=False):
    "Train the run `small` as a NanoThink recipe does"
    if resume:
        params = dict(run="small", out_dir=str(runs), resume=True)
    else:
        params = dict(SMALL, run="small", out_dir=str(runs), data=str(runs / "corpus.txt"), steps=4, batch_size=2)
    return lmnotes.run(hooks=checkpoint_hooks(runs / "small", dict(epochs=10), 2), view=False, **params)


@pytest.mark.parametrize("case", NANOTHINK)
def test_a_nanothink_recipe_never_starts_over(nanothink_run, tmp_path, case, capsys):
    "`resume=auto` of a NanoThink recipe resumes each run that has trained, or raises an error that names what is missing"
    runs = shutil.copytree(nanothink_run, tmp_path / "runs")
    change, resumes, error = NANOTHINK[case]
    change(runs)
    assert prepare_resume(runs / "small", "auto") == resumes
    if error:
        with pytest.raises(CheckpointError, match=re.escape(error)):
            train_small(runs, resume=True)
    elif resumes:
        r = train_small(runs, resume=True)
        assert (r.status, r.step) == ("done", 4)
    assert not list(runs.glob("small-*"))  # Nothing has moved aside
