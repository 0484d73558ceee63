"""A run that is interrupted, terminated or killed at an observed moment goes on to the same bits.

At its moment the process says so and holds still. Then the signal is sent, and only after it is on its way may the process go on; so each
signal arrives exactly where the test says, however busy the machine is.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    TINY,
    after,
    before,
    call,
    differences,
    finish,
    hold,
    left_behind,
    lmnotes_command,
    log,
    start,
    until,
    words,
)

from lmnotes import core
from lmnotes.data import prepare
from lmnotes.inference import evaluation, generation
from lmnotes.runs import run as run_module
from lmnotes.training import checkpoint, trainer


def half(name):
    "Hold when half of a file of step 20 is written"
    as_it_is = checkpoint._write_file

    def held(path, data):
        if path.name == name and "00000020" in path.parent.name:
            path.write_bytes(data[: len(data) // 2])
            hold()
        return as_it_is(path, data)

    checkpoint._write_file = held


def of_step(step, split=None):
    "Is a record of this step appended?"
    return lambda metrics, **record: record["step"] == step and record["split"] == split


def renamed(source, target):
    return Path(target).name == "step_00000020"


def pointed(name, step):
    return lambda run, pointer, folder: pointer == name and folder.name == f"step_{step:08d}"


EVALUATE = evaluation.Evaluate
MOMENTS = {
    "while data is prepared": lambda: before(prepare, "_write_token_file", lambda *args: args[4]["part"] == "val"),
    "before the run is recorded": lambda: before(run_module, "_start_record", lambda *args: True),
    "before the first step": lambda: before(trainer.Trainer, "train_step", lambda t: t.step == 0),
    "before step 8": lambda: before(trainer.Trainer, "train_step", lambda t: t.step == 7),
    "between gradient and update": lambda: after(trainer.Trainer, "_backward", lambda t, batch: t.step == 12),
    "a line in metrics.jsonl": lambda: after(trainer.JsonlLog, "append", of_step(21, "train")),
    "an evaluation begins": lambda: before(EVALUATE, "_evaluate", lambda e, t, b: t.step == 20),
    "an evaluation's second batch": lambda: before(evaluation, "seed_torch", lambda seed, i: i == 1),
    "an evaluation is recorded": lambda: after(trainer.JsonlLog, "append", of_step(25, "val")),
    "a sample begins": lambda: before(generation, "encode_prompt", lambda *args: True),
    "a sample's first token": lambda: after(generation.TokenSampler, "_sample", lambda *args: True),
    "a sample is recorded": lambda: after(trainer.JsonlLog, "append", of_step(30, "sample")),
    "config.json half written": lambda: half("config.json"),
    "model.safetensors half written": lambda: half("model.safetensors"),
    "state.pt half written": lambda: half("state.pt"),
    "manifest.json half written": lambda: half("manifest.json"),
    "before a checkpoint is renamed": lambda: before(os, "replace", renamed),
    "after a checkpoint is renamed": lambda: after(os, "replace", renamed),
    "before `best` points": lambda: before(checkpoint, "write_pointer", pointed("best", 25)),
    "before `last` points": lambda: before(checkpoint, "write_pointer", pointed("last", 30)),
    "in the middle of pruning": lambda: before(
        checkpoint.shutil, "rmtree", lambda path, **how: Path(path).name[0] == "s"
    ),
    "before the last evaluation": lambda: before(EVALUATE, "_evaluate", lambda e, t, b: t.step == 40),
    "in the last sample": lambda: before(trainer.JsonlLog, "append", of_step(40, "sample")),
    "in the last save": lambda: before(checkpoint, "save_checkpoint", lambda run, lm, step, *args, **about: step == 40),
    "at the end": lambda: after(checkpoint, "write_pointer", pointed("final", 40)),
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def command_held(moment, *words):
    "Run the command line, held at a moment"
    MOMENTS[moment]()
    return lmnotes_command(*words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    "What the run leaves behind when nothing happens to it"
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").symlink_to(corpus)
    assert call(folder, lmnotes_command, "train", *words(**TINY)) == 0, log(folder)
    return left_behind(folder / "runs/r")


def command_by_a_clock(moment, *words):
    "The same, where the file `clock` holds the time at which a signal arrives"
    core.time = SimpleNamespace(monotonic=lambda: float(Path("clock").read_text()))
    return command_held(moment, *words)


@pytest.mark.parametrize("pause, code, step", [(0.99, 143, 13), (1.01, 130, None)])
def test_two_signals(place, whole, pause, code, step):
    "At about the same time they are one, as from a terminal and a cluster; later, the second ends the run within the step"
    (place / "clock").write_text("100")
    process = start(place, command_by_a_clock, "between gradient and update", "train", *words(**TINY))
    until((place / "reached").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: "SIGTERM" in log(place), process)
    (place / "clock").write_text(str(100 + pause))
    os.kill(process.pid, signal.SIGINT)
    if step:
        (place / "go").touch()
    assert finish(process) == code, log(place)
    assert (place / "runs/r/interrupted").exists() == bool(step)
    (place / "go").touch()
    assert resume(place) == 0, log(place)
    assert not differences(whole, left_behind(place / "runs/r"))


def send(place, moment, number):
    "The exit code of a run that got a signal at its moment"
    process = start(place, command_held, moment, "train", *words(**TINY))
    until((place / "reached").exists, process)
    os.kill(process.pid, number)
    if number != signal.SIGKILL:
        (place / "go").touch()
    code = finish(process)
    (place / "go").touch()
    return code


def resume(place):
    "The exit code of the command that goes on with the run"
    return call(place, lmnotes_command, "train", *words(run="r", out_dir="runs", resume=True))


CUTS = [(moment, signal.SIGKILL) for moment in MOMENTS]
CUTS += [(moment, (signal.SIGINT, signal.SIGTERM)[n % 2]) for n, moment in enumerate(MOMENTS)]


@pytest.mark.parametrize("moment, number", CUTS, ids=[f"{number.name} {moment}" for moment, number in CUTS])
def test_a_signal_at_a_moment(place, whole, moment, number):
    code = send(place, moment, number)
    record = core.read_json(place / "runs/r/run.json") if (place / "runs/r/run.json").exists() else None
    if moment == "at the end" and number != signal.SIGKILL:  # Too late to interrupt anything
        assert code == 0 and record["status"] == "done"
        return
    assert code == CODES[number], log(place)
    assert (place / "runs/r/final").exists() == (moment == "at the end")
    if number == signal.SIGKILL and record is None:
        assert resume(place) == 2 and "there is no run here to resume" in log(place)
        assert call(place, lmnotes_command, "train", *words(**TINY)) == 0, log(place)
    else:
        assert record["status"] == ("running" if number == signal.SIGKILL else "interrupted")
        assert resume(place) == 0, log(place)
    assert not differences(whole, left_behind(place / "runs/r")), differences(whole, left_behind(place / "runs/r"))
    assert not list((place / "runs/r").glob(".*.tmp"))
