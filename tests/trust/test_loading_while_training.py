"""A run that trains can be loaded at any moment, and of two processes that want one run exactly one gets it."""

import builtins
import fcntl
import io
import itertools
import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    TINY,
    lmnotes_command,
    read_log,
    read_records,
    start_process,
    train,
    wait_for_exit,
    wait_until,
)
from helpers import command_line_args as words

from lmnotes import files as files_module
from lmnotes.apps.doctor import check_files, doctor
from lmnotes.core import CheckpointError, RunLockedError, read_json, write_json
from lmnotes.inspect.diff import diff
from lmnotes.inspect.verify import verify
from lmnotes.runs import folder as folder_module
from lmnotes.runs.config import resolve_config
from lmnotes.runs.folder import fork
from lmnotes.runs.load import load
from lmnotes.runs.replay import MISMATCH, OK
from lmnotes.training.checkpoint import latest_checkpoint, list_checkpoints, write_pointer

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


def test_a_save_while_the_checkpoints_are_listed(two_steps, tmp_path, monkeypatch):
    "A checkpoint that is deleted after it was listed does not make an older one the newest"
    run = shutil.copytree(two_steps / "runs/r", tmp_path / "r")
    last = list_checkpoints(run)[-1]
    hidden, pruned = last.rename(tmp_path / "hidden"), run / "step_00000006"
    pruned.mkdir()
    scan = os.scandir

    def scan_before_a_save(path):
        entries = list(scan(path))
        if pruned.exists():
            pruned.rmdir()
            hidden.rename(last)
        return entries

    monkeypatch.setattr(os, "scandir", scan_before_a_save)
    assert latest_checkpoint(run) == last


def problems_of_uses(folder, n, uses):
    "Fork, verify and check a run up to `n` times, and return what went wrong"
    problems = []
    for i in range(n):
        for use in uses:
            try:
                problems += [f"{use.__name__}: {found}" for found in use(folder, i)]
            except (CheckpointError, OSError) as e:
                problems.append(f"{use.__name__}: {e}")
    return problems


def forked(folder, i):
    "Fork a run, and return the problems of the copy"
    name = fork(folder, f"fork-{i}", folder.parent.parent / "forks")
    report = verify(folder.parent.parent / "forks" / name)
    return report.parts(MISMATCH)


def verified(folder, i):
    report = verify(folder)
    assert report.parts(OK)
    return [row for row in report.rows if row["result"] == MISMATCH]


def checked(folder, i):
    return [*doctor(folder).problems, *(row for row in check_files(folder) if row["about"] == "temporary files")]


def compared(folder, i):
    return [row for row in diff(folder, folder).rows if row["part"] != "result"]


def test_other_uses_never_fail(workdir, monkeypatch):
    "A run that saves at every step and keeps one checkpoint can be forked, verified, checked and compared at any moment"
    monkeypatch.chdir(workdir)
    process = start_process(workdir, lmnotes_command, "train", *words(**FAST))
    wait_until((workdir / "runs/r/best").exists, process)
    assert not problems_of_uses(workdir / "runs/r", 8, (forked, verified, checked, compared))
    assert process.exitcode is None, read_log(workdir)
    process.kill()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, corpus):
    "Return the folder of a run that seems to train in this process and has two checkpoints"
    workdir = tmp_path_factory.mktemp("two")
    (workdir / "corpus").symlink_to(corpus)
    params = FAST | dict(keep=2, eval_every=1000, patience=0)
    assert wait_for_exit(start_process(workdir, train, 5, **params)) == 130, read_log(workdir)
    folder = workdir / "runs/r"
    write_json(folder / "run.json", read_json(folder / "run.json") | dict(status="running"))
    (folder / "interrupted").unlink()
    assert [p.name for p in list_checkpoints(folder)] == ["step_00000004", "step_00000005"]
    return workdir


READS = [(os, "stat"), (os, "scandir"), (os, "listdir"), (os, "open"), (io, "open"), (builtins, "open")]


def run_before_read(monkeypatch, folder, number, act):
    "Patch the functions that read to call `act` before the read with this number in a folder, and return the reads so far"
    reads = []

    def watch(function):
        def read(*args, **kwargs):
            if args and isinstance(args[0], (str, Path)) and f"{args[0]}/".startswith(f"{folder}/"):
                reads.append(args[0])
                if len(reads) == number:
                    act()
            return function(*args, **kwargs)

        return read

    for module, name in READS:
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    return reads


def use_while_training(use, workdir, monkeypatch, number):
    "Use a run that saves a step and deletes a checkpoint before the read with this number in it. Return if it came to this"
    run = workdir / "runs/r"
    old, new = run / "step_00000004", run / "step_00000005"
    new.rename(workdir / new.name)
    (run / "last").write_text(f"{old.name}\n")

    def train_a_step():
        (workdir / new.name).rename(new)
        write_pointer(run, "last", new)
        shutil.rmtree(old)

    with folder_module.RunLock(run), monkeypatch.context() as patch:
        patch.chdir(workdir)
        reads = run_before_read(patch, old, number, train_a_step)
        found = use(run, 0)
    assert not found, (number, reads[number - 1], found)
    return len(reads) >= number


@pytest.mark.parametrize("use", [forked, verified, checked, compared])
def test_a_checkpoint_is_deleted_while_it_is_used(tmp_path, two_steps, monkeypatch, use):
    "If training saves a step and deletes the checkpoint that is read, before any read in it, the use finds no problem"
    for number in itertools.count(1):
        workdir = shutil.copytree(two_steps, tmp_path / str(number))
        if not use_while_training(use, workdir, monkeypatch, number):
            break
    assert number > 5


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
    kept = {path for path in old if path.name not in (".lock", ".owner.json")}
    assert all((aside / path).read_bytes() == old[path] for path in kept)
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


N_PROCESSES = 4


def take_folder(number):
    "Take the folder of a new run without a name in the second in which the other processes do"
    folder_module.time = SimpleNamespace(strftime=lambda form: "20260101-000000")
    cfg, _ = resolve_config(dict(out_dir="runs"), environ={})
    meet("at", number)
    folder = folder_module.take_run_folder(cfg)
    with folder_module.locked_run_folder(folder):
        write_json(folder / "run.json", dict(number=number))
        (folder / f"file of {number}").touch()
        meet("taken", number)
    return 0


def meet(moment, number, n=N_PROCESSES):
    Path(f"{moment} {number}").touch()
    wait_until(lambda: all(Path(f"{moment} {i}").exists() for i in range(n)))


def test_processes_in_one_second(workdir):
    "Of four processes that start runs without a name in one second, each owns one"
    processes = [start_process(workdir, take_folder, number) for number in range(N_PROCESSES)]
    assert [wait_for_exit(process) for process in processes] == [0] * N_PROCESSES, read_log(workdir)
    files = list((workdir / "runs").glob("*/file of *"))
    assert len(files) == len({path.parent for path in files}) == N_PROCESSES
    assert all(path.name == f"file of {read_json(path.parent / 'run.json')['number']}" for path in files)


N_SCHEDULES, STARTERS = 100, 3


def delay(draw, module, name):
    "Make a function wait for a random moment before each call"
    original = getattr(module, name)

    def delayed(*args, **kwargs):
        time.sleep(draw.choice([0, 0, 0, 0.0002, 0.001]))
        return original(*args, **kwargs)

    setattr(module, name, delayed)


def try_to_own(number):
    "Try to start each run at the moment at which two other processes do, with random delays between all operations on files"
    draw = random.Random(number)
    for name in "open mkdir rmdir unlink replace rename".split():
        delay(draw, os, name)
    delay(draw, fcntl, "flock")
    fast = SimpleNamespace(monotonic=lambda: 20 * time.monotonic(), sleep=lambda seconds: time.sleep(seconds / 20))
    files_module.time = fast  # A lock is tried for at least one second
    for i in range(N_SCHEDULES):
        folder = Path(f"runs/r{i}")
        meet(f"start {i}", number, STARTERS)
        try:
            with folder_module.locked_run_folder(folder) as lock:
                Path(f"owner {i} {number}").touch()
                if i % 3:
                    folder_module.move_earlier_run_aside(lock, [])
                    write_json(folder / "run.json", dict(number=number))
                meet(f"tried {i}", number, STARTERS)
        except RunLockedError:
            meet(f"tried {i}", number, STARTERS)
    return 0


def test_schedules_of_three_processes(workdir):
    "In 100 random schedules of three processes that start one run, one owns it: a new run, one that ends before it starts, or in place of an old one"
    for i in range(2, N_SCHEDULES, 3):
        (workdir / f"runs/r{i}").mkdir(parents=True)
        (workdir / f"runs/r{i}/run.json").write_text('{"number": "old"}')
    processes = [start_process(workdir, try_to_own, number) for number in range(STARTERS)]
    assert [wait_for_exit(process) for process in processes] == [0] * STARTERS, read_log(workdir)
    for i in range(N_SCHEDULES):
        (owner,) = workdir.glob(f"owner {i} *")
        folders = sorted(p.name for p in (workdir / "runs").glob(f"r{i}*") if p.name in (f"r{i}", f"r{i}-1"))
        assert folders == [[], [f"r{i}"], [f"r{i}", f"r{i}-1"]][i % 3]
        if i % 3:
            assert read_json(workdir / f"runs/r{i}/run.json")["number"] == int(owner.name.split()[-1])
        if i % 3 == 2:
            assert read_json(workdir / f"runs/r{i}-1/run.json")["number"] == "old"
