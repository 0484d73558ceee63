"""A run that trains can be loaded at any moment, and of two processes that want one run exactly one gets it."""

import json
import os
from pathlib import Path

import pytest
from helpers import TINY, lmnotes_command, read_log, read_records, start_process, train, wait_for_exit, wait_until
from helpers import command_line_args as words

from lmnotes.core import read_json
from lmnotes.inspect.verify import verify
from lmnotes.runs import folder as folder_module
from lmnotes.runs.load import load
from lmnotes.training.checkpoint import list_checkpoints

FAST = TINY | dict(model_args="d_model=8 n_layers=1 n_heads=1", ctx_len=8, batch_size=2, accum=1, patience=0)
FAST |= dict(keep=1, save_every=1, eval_every=1, eval_batches=1, steps=100_000, sample_every=100_000, log_every=1000)
N_LOADS = 120


def load_until(folder, n):
    "Load a run `n` times and more, until 20 different steps were seen, and return {which: steps}"
    seen = {"": [], "best": [], "last": []}
    while len(seen[""]) + len(seen["best"]) + len(seen["last"]) < n or len(set(seen[""])) < 20:
        for which, steps in seen.items():
            r = load(folder, which)
            assert r.tokenizer.fingerprint == r.info["tokenizer"]["fingerprint"]
            steps.append(r.step)
    return seen


@pytest.mark.parametrize("n", [N_LOADS, pytest.param(20 * N_LOADS, marks=pytest.mark.nightly)])
def test_loading_never_fails(workdir, n):
    "At least 120 loads of a run that saves at every step and keeps one checkpoint, also of the best one, all succeed"
    process = start_process(workdir, lmnotes_command, "train", *words(**FAST))
    folder = workdir / "runs/r"
    wait_until((folder / "best").exists, process)
    seen = load_until(folder, n)
    assert process.exitcode is None, read_log(workdir)
    process.kill()
    assert all(steps == sorted(steps) for steps in seen.values()), "An older checkpoint than before"
    assert sum(map(len, seen.values())) >= n and len(set(seen[""])) >= 20


def at_one_moment(number, name, *args):
    "Run the command line, and wait for the other process before it takes the run folder"
    original = folder_module.RunLock._acquire

    def acquire(lock):
        Path(f"at {number}").touch()
        wait_until(lambda: Path("at 0").exists() and Path("at 1").exists())
        return original(lock)

    folder_module.RunLock._acquire = acquire
    return lmnotes_command(*args)


def race(workdir, *args):
    "Run a command in two processes at one moment, and return their exit codes"
    processes = [start_process(workdir, at_one_moment, number, "r", *args) for number in range(2)]
    return sorted(wait_for_exit(process) for process in processes)


def check_one_owner(workdir, codes):
    "Check that one process trained the run to its end, and that the other one was rejected or came later"
    assert codes in ([0, 2], [0, 0]), read_log(workdir)
    if codes == [0, 2]:
        assert "is in use by process" in read_log(workdir)
    assert verify(workdir / "runs/r").exit_code == 0


SHORT = TINY | dict(steps=20)


@pytest.mark.parametrize("repeat", range(3))
def test_two_processes_for_a_new_name(workdir, repeat):
    "Of two processes that start a run of one new name, one owns it. The other is rejected, or moves the finished run aside"
    codes = race(workdir, "train", *words(**SHORT))
    check_one_owner(workdir, codes)
    names = sorted(p.name for p in (workdir / "runs").glob("[!.]*"))
    assert names == (["r"] if codes == [0, 2] else ["r", "r-1"])


@pytest.mark.parametrize("repeat", range(3))
def test_two_processes_move_an_old_run_aside(workdir, repeat):
    "Of two processes that replace an old run, one moves it aside, with all of its files"
    assert wait_for_exit(start_process(workdir, train, **SHORT | dict(seed=5))) == 0
    (workdir / "runs/r/notes.txt").write_text("mine")
    old = {p.relative_to(workdir / "runs/r"): p.read_bytes() for p in (workdir / "runs/r").rglob("*") if p.is_file()}
    codes = race(workdir, "train", *words(**SHORT))
    check_one_owner(workdir, codes)
    (aside,) = [p for p in (workdir / "runs").glob("r-*") if read_json(p / "run.json")["config"]["seed"] == 5]
    kept = {path for path in old if path.name not in (".lock", ".owner.json", "notes.txt")}
    assert all((aside / path).read_bytes() == old[path] for path in kept)
    assert (workdir / "runs/r/notes.txt").read_text() == "mine"
    assert len(list((workdir / "runs").glob("[!.]*"))) == (2 if codes == [0, 2] else 3)


@pytest.mark.parametrize("repeat", range(3))
def test_two_processes_resume_one_run(workdir, repeat):
    "Of two processes that resume one run, one trains it, and no record is lost or written twice"
    assert wait_for_exit(start_process(workdir, train, 10, **SHORT)) == 130
    codes = race(workdir, "train", "--resume", "--run", "r", "--out-dir", "runs")
    check_one_owner(workdir, codes)
    steps = [(r["split"], r["step"]) for r in read_records(workdir / "runs/r/metrics.jsonl")]
    train_steps = [step for split, step in steps if split == "train"]
    assert train_steps == sorted(set(train_steps)) and train_steps[-1] == 20
    assert json.loads((workdir / "runs/r/run.json").read_bytes())["status"] == "done"
    assert list_checkpoints(workdir / "runs/r")[-1].name == "step_00000020"
    assert [p.name for p in (workdir / "runs").glob("[!.]*")] == ["r"] and os.path.exists(workdir / "runs/r/final")
