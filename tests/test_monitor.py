"""A view of a run in another process shows the records that the run has written, and does not affect the run."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    DEADLINE,
    ROOT,
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    pause_before_step,
    run_in_process,
    run_results,
    start_process,
    train,
    wait_for_exit,
    wait_until,
)

import lmnotes
from lmnotes.core import CheckpointError
from lmnotes.files import JsonlLog

CASE = TINY | dict(steps=60, sample_every=10)


def last_step(folder):
    "Return the step of the last complete line of metrics.jsonl"
    whole = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else 0


def train_in_step(**params):
    "Train, and after each training record wait until the test has seen it"

    def append(metrics, **record):
        original(metrics, **record)
        if record["split"] == "train":
            wait_until(Path(f"seen {record['step']}").exists)

    original, JsonlLog.append = JsonlLog.append, append
    return train(**params)


def test_view_shows_the_last_record_and_changes_no_bit(workdir, corpus, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (alone / "corpus").symlink_to(corpus)
    assert run_in_process(alone, train, **CASE) == 0
    process, folder = start_process(workdir, train_in_step, **CASE), workdir / "runs" / "r"
    wait_until(lambda: (folder / "metrics.jsonl").exists(), process)
    seen, view = set(), lmnotes.attach(folder)
    while process.is_alive():
        before = last_step(folder)
        view.refresh()
        assert before <= view.step <= last_step(folder)
        if (view.status, view.step) in seen:
            time.sleep(0.01)
            continue
        seen.add((view.status, view.step))
        if len(seen) % 5 == 0:
            view._repr_mimebundle_()
        (workdir / f"seen {view.step}").touch()
    assert wait_for_exit(process) == 0
    assert {("running", step) for step in range(3, 61, 3)} <= seen
    view.refresh()
    assert (view.status, view.step, view.seconds_left) == ("done", last_step(folder), 0.0)
    assert view.samples[-1]["step"] == 60 and {r["prompt"] for r in view.samples} == {view.samples[0]["prompt"]}
    assert not differences(run_results(alone / "runs" / "r"), run_results(folder))


def test_killed_run_is_reported_and_resumes(workdir):
    process, folder = start_process(workdir, train, **CASE | dict(steps=100_000)), workdir / "runs" / "r"
    wait_until(lambda: (folder / "last").exists(), process)
    view = lmnotes.attach(folder)
    assert view.status == "running" and view.seconds_left > 0
    process.kill()
    wait_for_exit(process)
    assert view.refresh().status == "killed" and "resume with: lmnotes.run(resume=True, run='r'" in str(view)
    view.follow()  # The run was killed, so it does not wait
    resumed = dict(out_dir="runs", resume=True, allow_change="steps", steps=last_step(folder) + 5)
    assert run_in_process(workdir, train, **resumed) == 0
    assert view.refresh().status == "done" and view.step == resumed["steps"]


def steps_in(text):
    "Return the steps that a view has shown"
    return [int(n.replace(",", "")) for n in re.findall(r"at step ([\d,]+) of 100,000", text)]


def test_terminal_view_updates_in_place(workdir):
    process = start_process(workdir, lmnotes_command, "train", *command_line_args(**CASE | dict(steps=100_000)))
    wait_until(lambda: (workdir / "runs" / "r" / "last").exists(), process)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lmnotes", "watch", "--run", "runs/r", "--seconds", "0.1"]
    watching = subprocess.Popen(
        command, cwd=workdir, stdout=theirs, stderr=theirs, env=os.environ | dict(PYTHONPATH=str(ROOT))
    )
    os.close(theirs)
    text, stopped = "", False
    try:
        while watching.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    text += os.read(ours, 10_000).decode(errors="replace")
                except OSError:  # The other end has been closed
                    break
            if not stopped and len(set(steps_in(text))) > 1:
                process.terminate()
                stopped = True
    finally:
        os.close(ours)
        watching.kill()
    assert stopped and wait_for_exit(process) == 128 + 15
    assert steps_in(text) == sorted(steps_in(text)) and "r: gpt on corpus" in text
    assert "running at step" in text and "interrupted at step" in text


def test_final_state_is_shown_with_slow_polling(workdir, capsys):
    process = start_process(workdir, pause_before_step, 20, train, **CASE)
    wait_until((workdir / "reached").exists, process)
    view = lmnotes.attach(workdir / "runs" / "r")
    assert view.status == "running"
    (workdir / "go").touch()
    view.follow(seconds=1.5)
    assert wait_for_exit(process) == 0
    assert view.status == "done" and "done at step 60 of 60" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("way", [pytest.param("papermill", marks=pytest.mark.nightly), "torchrun"])
def test_run_in_another_process_is_followed(workdir, way):
    params = CASE | dict(steps=100_000, out_dir=str(workdir / "runs"), data=str(workdir / "corpus"))
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
        torchrun=[sys.executable, "-m", "lmnotes", "train", *command_line_args(**params, procs=2)],
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    environ |= dict(PYTHONPATH=str(ROOT), IPYTHONDIR=str(workdir / "ipython"))
    with open(workdir / "output", "w") as output:
        process = subprocess.Popen(
            lines[way], cwd=workdir, env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    folder = workdir / "runs" / "r"
    try:
        wait_until(lambda: process.poll() is not None or (folder / "last").exists())
        assert process.poll() is None, (workdir / "output").read_text()
        view = lmnotes.attach(folder)
        first = view.step
        wait_until(lambda: view.refresh().step > first)
        assert view.status == "running" and view.seconds_left > 0
        process.terminate()
        process.wait(DEADLINE)
        assert view.refresh().status == "interrupted" and view.step == last_step(folder)
    finally:
        process.kill()


def test_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(CheckpointError, match="no run here to show; there are none"):
        lmnotes.attach(tmp_path / "other")
