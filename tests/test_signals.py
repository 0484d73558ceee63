"""A run that is interrupted, terminated or killed at an exact moment resumes to the same bits.

At that moment the process creates a file and waits. The test sends the signal and only then lets the process continue. Each signal
therefore arrives exactly at the intended moment, on a busy machine too.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    pause_process,
    read_log,
    run_after_call,
    run_before_call,
    run_in_process,
    run_results,
    start_process,
    train_with_command,
    wait_for_exit,
    wait_until,
)

from lmnotes import core, files
from lmnotes.data import prepare
from lmnotes.inference import evaluation, generation
from lmnotes.runs import run as run_module
from lmnotes.training import checkpoint, saving, trainer

# Steps 3, 6, ... are logged and evaluated, 5, 10, ... saved, and 15 and 20 sampled
CASE = TINY | dict(steps=20, eval_every=3, save_every=5, sample_every=15)


def half(name):
    "Pause when half of a file of step 15 is written"
    as_it_is = checkpoint._write_file

    def held(path, data):
        if path.name == name and "00000015" in path.parent.name:
            path.write_bytes(data[: len(data) // 2])
            pause_process()
        return as_it_is(path, data)

    checkpoint._write_file = held


def of_step(step, split=None):
    "Return True if a record of this step is appended"
    return lambda metrics, **record: record["step"] == step and record["split"] == split


def renamed(source, target):
    return Path(target).name == "step_00000015"


def pointed(name, step):
    return lambda run, pointer, folder: pointer == name and folder.name == f"step_{step:08d}"


EVALUATE = evaluation.Evaluate
MOMENTS = {
    "while data is prepared": lambda: run_before_call(
        prepare, "_write_token_file", lambda *args: args[4]["part"] == "val"
    ),
    "before the run is recorded": lambda: run_before_call(run_module, "_start_record", lambda *args: True),
    "before the first step": lambda: run_before_call(trainer.Trainer, "train_step", lambda t: t.step == 0),
    "before step 8": lambda: run_before_call(trainer.Trainer, "train_step", lambda t: t.step == 7),
    "between gradient and update": lambda: run_after_call(trainer.Trainer, "_backward", lambda t, batch: t.step == 12),
    "a line in metrics.jsonl": lambda: run_after_call(files.JsonlLog, "append", of_step(9, "train")),
    "an evaluation begins": lambda: run_before_call(EVALUATE, "_evaluate", lambda e, t, b: t.step == 15),
    "an evaluation's second batch": lambda: run_before_call(evaluation, "seed_torch", lambda seed, i: i == 1),
    "an evaluation is recorded": lambda: run_after_call(files.JsonlLog, "append", of_step(12, "val")),
    "a sample begins": lambda: run_before_call(generation, "encode_prompt", lambda *args: True),
    "a sample's first token": lambda: run_after_call(generation.TokenSampler, "_sample", lambda *args: True),
    "a sample is recorded": lambda: run_after_call(files.JsonlLog, "append", of_step(15, "sample")),
    "config.json half written": lambda: half("config.json"),
    "model.safetensors half written": lambda: half("model.safetensors"),
    "state.pt half written": lambda: half("state.pt"),
    "manifest.json half written": lambda: half("manifest.json"),
    "before a checkpoint is renamed": lambda: run_before_call(os, "replace", renamed),
    "after a checkpoint is renamed": lambda: run_after_call(os, "replace", renamed),
    "before `best` points": lambda: run_before_call(saving, "write_pointer", pointed("best", 12)),
    "before `last` points": lambda: run_before_call(saving, "write_pointer", pointed("last", 15)),
    "in the middle of pruning": lambda: run_before_call(
        shutil, "rmtree", lambda path, **how: Path(path).name.startswith(".step") and Path(path).exists()
    ),
    "before the last evaluation": lambda: run_before_call(EVALUATE, "_evaluate", lambda e, t, b: t.step == 20),
    "in the last sample": lambda: run_before_call(files.JsonlLog, "append", of_step(20, "sample")),
    "in the last save": lambda: run_before_call(
        saving, "save_checkpoint", lambda run, lm, step, *args, **about: step == 20
    ),
    "at the end": lambda: run_after_call(saving, "write_pointer", pointed("final", 20)),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def command_held(moment, *command_line_args):
    "Run the command line, and pause it at a moment"
    MOMENTS[moment]()
    return lmnotes_command(*command_line_args)


def command_by_a_clock(moment, *command_line_args):
    "Run the command line with a fake clock: the file `clock` holds the time at which a signal arrives"
    core.time = SimpleNamespace(**{**vars(time), "monotonic": lambda: float(Path("clock").read_text())})
    return command_held(moment, *command_line_args)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    "Return the results of an uninterrupted run"
    return run_results(train_with_command(tmp_path_factory.mktemp("whole"), corpus, **CASE))


@pytest.mark.parametrize("pause, code, step", [(0.99, 143, 13), (1.01, 130, None)])
def test_two_signals(workdir, uninterrupted, pause, code, step):
    "Two signals at about the same time count as one. A later one ends the run within the step"
    (workdir / "clock").write_text("100")
    process = start_process(
        workdir, command_by_a_clock, "between gradient and update", "train", *command_line_args(**CASE)
    )
    wait_until((workdir / "reached").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in read_log(workdir), process)
    (workdir / "clock").write_text(str(100 + pause))
    os.kill(process.pid, signal.SIGINT)
    if step:
        (workdir / "go").touch()
    assert wait_for_exit(process) == code, read_log(workdir)
    assert (workdir / "runs/r/interrupted").exists() == bool(step)
    (workdir / "go").touch()
    assert resume(workdir) == 0, read_log(workdir)
    assert not differences(uninterrupted, run_results(workdir / "runs/r"))


def send(workdir, moment, number):
    "Send a signal at a moment of a run and return the exit code"
    process = start_process(workdir, command_held, moment, "train", *command_line_args(**CASE))
    wait_until((workdir / "reached").exists, process)
    os.kill(process.pid, number)
    if number != signal.SIGKILL:
        (workdir / "go").touch()
    code = wait_for_exit(process)
    (workdir / "go").touch()
    return code


def resume(workdir):
    "Resume the run and return the exit code"
    return run_in_process(workdir, lmnotes_command, "train", *command_line_args(run="r", out_dir="runs", resume=True))


# By default, a moment in each part of a run and of a save. The file operations between them are in tests/trust/test_kills.py
KILLED = (
    "while data is prepared",
    "before the run is recorded",
    "between gradient and update",
    "a line in metrics.jsonl",
)
KILLED += "an evaluation is recorded", "a sample is recorded", "model.safetensors half written"
KILLED += (
    "before a checkpoint is renamed",
    "after a checkpoint is renamed",
    "before `best` points",
    "before `last` points",
)
KILLED += "in the middle of pruning", "in the last sample", "in the last save", "at the end"
STOPPED = "while data is prepared", "before the run is recorded", "before the first step", "between gradient and update"
STOPPED += "an evaluation begins", "an evaluation's second batch", "a sample begins", "a sample's first token"
STOPPED += (
    "model.safetensors half written",
    "in the middle of pruning",
    "before the last evaluation",
    "in the last save",
)
STOPPED += ("at the end",)


def cuts():
    "Return each moment with SIGKILL, and with one of the signals that let a run stop after its step"
    both = [(moment, signal.SIGKILL, KILLED) for moment in MOMENTS]
    both += [(moment, (signal.SIGINT, signal.SIGTERM)[n % 2], STOPPED) for n, moment in enumerate(MOMENTS)]
    return [
        pytest.param(
            moment, number, id=f"{number.name} {moment}", marks=[pytest.mark.nightly] * (moment not in by_default)
        )
        for moment, number, by_default in both
    ]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", pytest.param("SIGXCPU", marks=pytest.mark.nightly)])
def test_signals_that_announce_an_end(workdir, uninterrupted, name):
    "A closed terminal and the limits of a job end a run as SIGTERM does"
    number = signal.Signals[name]
    assert send(workdir, "before step 8", number) == 128 + number, read_log(workdir)
    record = core.read_json(workdir / "runs/r/run.json")
    assert (record["status"], record["signal"], record["step"]) == ("interrupted", name, 8)
    assert resume(workdir) == 0, read_log(workdir)
    assert not differences(uninterrupted, run_results(workdir / "runs/r"))


@pytest.mark.parametrize("moment, number", cuts())
def test_signal_at_each_moment(workdir, uninterrupted, moment, number):
    code = send(workdir, moment, number)
    record = core.read_json(workdir / "runs/r/run.json") if (workdir / "runs/r/run.json").exists() else None
    if moment == "at the end" and number != signal.SIGKILL:  # Too late to interrupt anything
        assert code == 0 and record["status"] == "done"
        return
    assert code == CODES[number], read_log(workdir)
    assert (workdir / "runs/r/final").exists() == (moment == "at the end")
    if number == signal.SIGKILL and record is None:
        assert resume(workdir) == 2 and "there is no run here to resume" in read_log(workdir)
        assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**CASE)) == 0, read_log(workdir)
    else:
        assert record["status"] == ("running" if number == signal.SIGKILL else "interrupted")
        assert resume(workdir) == 0, read_log(workdir)
    assert not differences(uninterrupted, run_results(workdir / "runs/r"))
    assert not list((workdir / "runs/r").glob(".*.tmp"))
