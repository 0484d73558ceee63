"""A view of a run that goes on in another process: what it shows is what the run has written, and the run does not know of it."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    DEADLINE,
    ROOT,
    TINY,
    call,
    differences,
    finish,
    held_before_step,
    left_behind,
    lmnotes_command,
    start,
    train,
    until,
    words,
)

import lmnotes
from lmnotes.core import CheckpointError
from lmnotes.training.trainer import JsonlLog

CASE = TINY | dict(steps=60, sample_every=10)


def last_step(folder):
    "Of the last whole line of metrics.jsonl"
    whole = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else 0


def train_in_step(**params):
    "Train; after each record of the training, wait until the test has seen it"

    def append(metrics, **record):
        original(metrics, **record)
        if record["split"] == "train":
            until(Path(f"seen {record['step']}").exists)

    original, JsonlLog.append = JsonlLog.append, append
    return train(**params)


def test_a_view_shows_the_last_record_and_changes_no_bit(place, corpus, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (alone / "corpus").symlink_to(corpus)
    assert call(alone, train, **CASE) == 0
    process, folder = start(place, train_in_step, **CASE), place / "runs" / "r"
    until(lambda: (folder / "metrics.jsonl").exists(), process)
    seen, view = set(), lmnotes.attach(folder)
    while process.is_alive():
        before = last_step(folder)
        view.refresh()
        assert before <= view.step <= last_step(folder)
        seen.add((view.status, view.step))
        if len(seen) % 5 == 0:
            view._repr_mimebundle_()
        (place / f"seen {view.step}").touch()
    assert finish(process) == 0
    assert {("running", step) for step in range(3, 61, 3)} <= seen
    view.refresh()
    assert (view.status, view.step, view.left) == ("done", last_step(folder), 0.0)
    assert view.samples[-1]["step"] == 60 and {r["prompt"] for r in view.samples} == {view.samples[0]["prompt"]}
    assert not differences(left_behind(alone / "runs" / "r"), left_behind(folder))


def test_a_killed_run_is_seen_to_be_gone_and_comes_back(place):
    process, folder = start(place, train, **CASE | dict(steps=100_000)), place / "runs" / "r"
    until(lambda: (folder / "last").exists(), process)
    view = lmnotes.attach(folder)
    assert view.status == "running" and view.left > 0
    process.kill()
    finish(process)
    assert view.refresh().status == "killed" and "go on with resume=True run=r" in str(view)
    view.follow()  # It does not wait for what will not come
    resumed = dict(out_dir="runs", resume=True, allow_change="steps", steps=last_step(folder) + 5)
    assert call(place, train, **resumed) == 0
    assert view.refresh().status == "done" and view.step == resumed["steps"]


def steps_in(text):
    "The steps that a view has shown"
    return [int(n.replace(",", "")) for n in re.findall(r"at step ([\d,]+) of 100,000", text)]


def test_in_a_terminal_it_is_written_in_its_place(place):
    process = start(place, lmnotes_command, "train", *words(**CASE | dict(steps=100_000)))
    until(lambda: (place / "runs" / "r" / "last").exists(), process)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lmnotes", "watch", "--run", "runs/r", "--seconds", "0.1"]
    watching = subprocess.Popen(
        command, cwd=place, stdout=theirs, stderr=theirs, env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    os.close(theirs)
    text, stopped = "", False
    try:
        while watching.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    text += os.read(ours, 10_000).decode(errors="replace")
                except OSError:  # The other end is closed
                    break
            if not stopped and len(set(steps_in(text))) > 1:
                process.terminate()
                stopped = True
    finally:
        os.close(ours)
        watching.kill()
    assert stopped and finish(process) == 128 + 15
    assert steps_in(text) == sorted(steps_in(text)) and "\x1b[J" in text
    assert "r: gpt on corpus | running at step" in text and "r: gpt on corpus | interrupted at step" in text


def test_the_end_is_shown_however_seldom_one_looks(place, capsys):
    process = start(place, held_before_step, 20, train, **CASE | dict(steps=300))
    until((place / "reached").exists, process)
    view = lmnotes.attach(place / "runs" / "r")
    assert view.status == "running"
    (place / "go").touch()
    view.follow(seconds=1.5)
    assert finish(process) == 0
    assert view.status == "done" and "done at step 300 of 300" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("way", ["papermill", "torchrun"])
def test_a_run_elsewhere_is_seen_while_it_goes_on(place, way):
    params = CASE | dict(steps=100_000, out_dir=str(place / "runs"), data=str(place / "corpus"))
    given = [word for name, value in params.items() for word in ("-p", name, str(value))]
    lines = dict(
        papermill=[
            str(Path(sys.executable).parent / "papermill"),
            str(ROOT / "nbs/train.ipynb"),
            "report.ipynb",
            *given,
            "--start-timeout",
            str(DEADLINE),
        ],
        torchrun=[sys.executable, "-m", "lmnotes", "train", *words(**params, procs=2)],
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    environ |= dict(PYTHONPATH=str(ROOT), IPYTHONDIR=str(place / "ipython"))
    with open(place / "said", "w") as said:
        process = subprocess.Popen(
            lines[way], cwd=place, env=environ, stdout=said, stderr=said, stdin=subprocess.DEVNULL
        )
    folder = place / "runs" / "r"
    try:
        until(lambda: process.poll() is not None or (folder / "last").exists())
        assert process.poll() is None, (place / "said").read_text()
        view = lmnotes.attach(folder)
        first = view.step
        until(lambda: view.refresh().step > first)
        assert view.status == "running" and view.left > 0
        process.terminate()
        process.wait(DEADLINE)
        assert view.refresh().status == "interrupted" and view.step == last_step(folder)
    finally:
        process.kill()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no run here to look at; there are none"):
        lmnotes.attach(tmp_path / "other")
