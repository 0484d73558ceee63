"""Errors of the file system at every file operation of a run: a full disk, a quota, damaged, read-only and forbidden storage.

Training continues where it can, the messages name the path and the reason, and a later resume ends in the same bits. The errors come
from a layer below the library, and from real small file systems where this process may mount them.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faults import CHANGES, fail_from, record_operations
from foreign import NIGHT
from helpers import (
    ROOT,
    command_line_args,
    differences,
    lmnotes_command,
    read_log,
    run_before_call,
    run_in_process,
    run_results,
    train,
)
from small_runs import SMALL
from test_kills import SHORT, prune_first

from lmnotes import files
from lmnotes.core import CheckpointError, read_json, write_json
from lmnotes.data.batches import RandomBatches
from lmnotes.nn.lm import new_lm
from lmnotes.recipes import fresh_or_resume, nanothink
from lmnotes.runs import folder as runs_folder
from lmnotes.runs.compare import RecordPeakMemory
from lmnotes.runs.run import run
from lmnotes.training import checkpoint, saving
from lmnotes.training.checkpoint import list_checkpoints, verify_checkpoint
from lmnotes.training.trainer import Hook, TrainConfig, Trainer
from lmnotes.training.weights import SaveWeights

REASONS = dict(
    ENOSPC="disk full",
    EDQUOT="quota exceeded",
    EIO="Input/output error",
    EACCES="you have no permission",
    EROFS="the file system is read-only",
)
FAULTS = [(name, lasting) for name in REASONS for lasting in (False, True)]
IDS = [f"{name} {'from there on' if lasting else 'once'}" for name, lasting in FAULTS]
KINDS = *CHANGES, "fsync"
FREEING = "remove", "rmdir", "truncate"  # Operations that succeed on a full disk
CASES = 2  # By default, for each fault


def affected(name, operations):
    "Return the operations that can fail with an error"
    return [op for op in operations if name not in ("ENOSPC", "EDQUOT") or op.split()[0] not in FREEING]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus):
    "Return the folder of an unbroken run, its results and its file operations"
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").symlink_to(corpus)
    command = "train", *command_line_args(**SHORT)
    assert run_in_process(folder, record_changes, *command) == 0, read_log(folder)
    return folder, run_results(folder / "runs/r"), (folder / "operations").read_text().splitlines()


def record_changes(*words, kinds=KINDS):
    return record_operations(lmnotes_command, *words, kinds=kinds)


def failing(mutant, *fault):
    "Run the command line with a fault, and with a part of the library replaced by one of `MUTANTS`"
    if mutant:
        MUTANTS[mutant][0]()
    number, name, lasting, kinds, *words = fault
    return fail_from(number, name, lasting, lmnotes_command, *words, kinds=kinds)


def problems_of_report(folder, code, reason):
    "Yield the problems with the exit code and the messages of a run"
    log = read_log(folder)
    last = log.strip().rpartition("\n")[2]
    if "Traceback" in log:
        yield f"a traceback: {last}"
    elif code not in (0, 2):
        yield f"exit code {code}: {last}"
    elif code and not (last.startswith("lmnotes: ") and "runs" in last and reason in last):
        yield f"the last line is {last!r}"
    for text in re.findall(r"step_\d+: ((?:disk full|quota exceeded).*)", log):
        if not re.match(r"disk full, needs [\d,]+ bytes and has [\d,]+|quota exceeded, needs [\d,]+ bytes", text):
            yield f"the sizes are not in {text!r}"
    if "quota exceeded" in log and " free" in log:
        yield "the free space of the disk, not of the quota"
    if re.search(r"step_\d+\.\d+\.tmp.* could not be written", log):
        yield "a temporary name"


def problems_of_run(folder, operations):
    "Yield the problems with a run in which the operation after `operations` has failed: lost steps, checkpoints or counts"
    log, run = read_log(folder), folder / "runs/r"
    if any("metrics.jsonl" in op for op in operations) and "step 12/12" not in log:
        yield "training ended early"
    saved = [op.split("/")[-1] for op in operations if op.startswith("rename r/step_")]
    found = list_checkpoints(run)
    if saved and (not found or found[-1].name < saved[-1]):
        yield f"{saved[-1]} is lost"
    try:
        [verify_checkpoint(checkpoint_folder) for checkpoint_folder in found]
    except CheckpointError as e:
        yield str(e)
    info = read_json(run / "run.json") if (run / "run.json").exists() else {}
    failed = re.findall(r"warning: step (\d+) is not saved: (.+)", log)
    recorded = [(str(save["step"]), save["reason"]) for save in info.get("failed_saves", [])]
    if info.get("status") == "done" and (info["unsaved"], recorded) != (len(failed), failed):
        yield f"run.json has {info['unsaved']} failed saves: {recorded}"


def problems_of_resume(folder, whole):
    "Resume a run without a fault to the end, and yield the differences from an unbroken run"
    if run_in_process(folder, lmnotes_command, "train", *command_line_args(**SHORT, resume="auto")):
        yield f"it does not resume: {read_log(folder)[-500:]}"
    elif found := differences(whole, run_results(folder / "runs/r")):
        yield f"these differ: {found}"
    elif left := list(folder.glob("runs/r/.*.tmp")):
        yield f"these remain: {left}"


def problems(tmp_path, unbroken, name, lasting, number, mutant=""):
    "Return the problems after a fault at an operation of a run"
    whole, results, operations = unbroken
    folder = tmp_path / f"{name}-{lasting}-{number}"
    folder.mkdir()
    (folder / "corpus").symlink_to(whole / "corpus")
    done = affected(name, operations)[: number - 1]
    fault = number, name, lasting, KINDS
    code = run_in_process(folder, failing, mutant, *fault, "train", *command_line_args(**SHORT))
    found = [*problems_of_report(folder, code, REASONS[name]), *problems_of_run(folder, done)]
    found += problems_of_resume(folder, results)
    shutil.rmtree(folder)
    return found and (name, "lasting" if lasting else "once", number, affected(name, operations)[number - 1], found)


def all_problems(tmp_path, unbroken, name, lasting, numbers):
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda number: problems(tmp_path, unbroken, name, lasting, number), numbers)
    return [problem for problem in found if problem]


@pytest.mark.parametrize("name, lasting", FAULTS, ids=IDS)
def test_errors(tmp_path, unbroken, name, lasting):
    "After an error at some operations, training continues, messages name path and reason, and a resume is exact"
    n, i = len(affected(name, unbroken[2])), FAULTS.index((name, lasting))
    numbers = [1 + n * (len(FAULTS) * j + i) // (len(FAULTS) * CASES) for j in range(CASES)]
    assert not all_problems(tmp_path, unbroken, name, lasting, numbers)


@pytest.mark.nightly
@pytest.mark.parametrize("name, lasting", FAULTS, ids=IDS)
def test_errors_at_every_operation(tmp_path, unbroken, name, lasting):
    "After an error at every fourth operation, in four nights at each, training continues, and a resume is exact"
    numbers = range(1 + NIGHT % 4, 1 + len(affected(name, unbroken[2])), 4)
    found = all_problems(tmp_path, unbroken, name, lasting, numbers)
    assert not found, (len(found), len(numbers), found[:5])


def killed_after_a_failed_save(number, *words):
    "Run the command line. A write of step 6 fails, and the process is killed before step 8"
    run_before_call(Trainer, "train_step", lambda t: t.step == 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return fail_from(number, "ENOSPC", False, lmnotes_command, *words)


def test_failed_save_is_recorded_at_once(tmp_path, unbroken):
    "The record of a run that is killed later holds the step, the path and the bytes of each failed save, and a fork does not"
    (tmp_path / "corpus").symlink_to(unbroken[0] / "corpus")
    operations = affected("ENOSPC", unbroken[2])
    number = next(n for n, op in enumerate(operations, 1) if op.startswith("write r/.step_00000006"))
    assert run_in_process(tmp_path, killed_after_a_failed_save, number, "train", *command_line_args(**SHORT)) == -9
    (failed,) = read_json(tmp_path / "runs/r/run.json")["failed_saves"]
    assert failed["step"] == 6
    pattern = r"\S*runs/r/step_00000006: disk full, needs [\d,]+ bytes and has [\d,]+, so it could not be written\..+"
    assert re.fullmatch(pattern, failed["reason"])
    assert not [*problems_of_resume(tmp_path, unbroken[1])]
    assert read_json(tmp_path / "runs/r/run.json")["failed_saves"] == [failed]
    runs_folder.fork(tmp_path / "runs/r", "fork")
    assert "failed_saves" not in read_json(tmp_path / "runs/fork/run.json")


@pytest.mark.parametrize("fails", ["exchange", "rename"])
def test_an_earlier_run_that_cannot_move_aside(tmp_path, monkeypatch, fails):
    "If an earlier run cannot be renamed, it keeps its name, and no empty folder remains"
    folder, replace = tmp_path / "r", os.replace

    def fail(code, source, target):
        raise OSError(code, os.strerror(code), str(target))

    def fail_to_move_the_run(source, target):
        fail(errno.EIO, source, target) if Path(source) == folder else replace(source, target)

    monkeypatch.setattr(
        runs_folder, "exchange_paths", partial(fail, errno.EIO if fails == "exchange" else errno.ENOSYS)
    )
    monkeypatch.setattr(os, "replace", fail_to_move_the_run)
    folder.mkdir()
    write_json(folder / "run.json", {})
    with pytest.raises(OSError), runs_folder.locked_run_folder(folder) as lock:
        runs_folder.move_earlier_run_aside(lock, [])
    assert [p.name for p in tmp_path.iterdir()] == ["r"] and (folder / "run.json").is_file()


SMALL_FILES = {
    "env.json": lambda folder: fresh_or_resume.SaveTrainingConfig(make_dataclass("Config", [])(), folder),
    "recipe.json": lambda folder: nanothink.SaveRecipeParams(folder, dict(lr=0.1)),
    "memory.safetensors": nanothink.SaveVectorStore,
}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_full_disk_when_a_recipe_writes_a_small_file(tmp_path, monkeypatch, capsys, name):
    "If a file of a recipe cannot be written, a single warning names it, and it is written when there is space again"
    store = SimpleNamespace(save=lambda path: write_json(path, {}))
    t = SimpleNamespace(rank=0, step=0, lm=SimpleNamespace(store=store))
    hook = SMALL_FILES[name](tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "replace", full_disk)
        hook.after_step(t)
        hook.after_step(t)
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: {tmp_path / name}: disk full") and not list(tmp_path.iterdir())
    hook.after_step(t)
    assert (tmp_path / name).is_file() and not capsys.readouterr().out


@pytest.mark.parametrize("when", ["step", "best"])
def test_a_full_disk_when_weights_are_saved(tmp_path, monkeypatch, capsys, when):
    "If weights cannot be saved, a warning names them, and the resume at this step saves them with the counters of a save without an error"

    def trainer(state=None):
        lm = new_lm("bigram", vocab_size=8)
        hook = SaveWeights(tmp_path, "w.pt", 2, when=when, make_content=lambda t, _: dict(t.counters))
        t = Trainer(lm, RandomBatches(np.arange(100) % 8, 2, 4), TrainConfig(steps=4, dtype="float32"), [hook])
        t.load_state_dict(state or t.state_dict() | dict(counters=dict(best_step=2)))
        return t

    with monkeypatch.context() as full:
        full.setattr(os, "replace", full_disk)
        state = trainer().fit(2).state_dict()
    assert f"warning: step 2 is not saved: {tmp_path / 'w.pt'}: disk full" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    t = trainer(state).fit(2)
    assert not t.failed_saves and torch.load(tmp_path / "w.pt")["SaveWeights"] == t.counters["SaveWeights"] == 2
    capsys.readouterr()
    trainer(t.state_dict()).fit(2)
    assert not capsys.readouterr().out


def full_disk(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def test_a_full_disk_when_the_peak_memory_is_recorded(tmp_path, monkeypatch):
    "If the peak memory cannot be recorded on a full disk, the error advises to run the comparison again"
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(CheckpointError, match=r"memory.json: disk full, .* Run the comparison again"):
        RecordPeakMemory(tmp_path).at_end(None)


def test_a_full_disk_when_files_of_another_program_move_aside(workdir, monkeypatch):
    "A run does not start if the files of another program in its folder cannot move aside"
    monkeypatch.chdir(workdir)
    old = workdir / "runs/r/metrics.jsonl"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: full_disk(a, b) if Path(a).name == old.name else move(a, b))
    with pytest.raises(CheckpointError, match="disk full, .* so this run cannot start"):
        run(**SHORT)
    assert old.read_bytes() == b"old"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, corpus):
    "Return the folder of a run that was stopped at step 6, and what a resume reads"
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "corpus").symlink_to(corpus)
    assert run_in_process(folder, train, 6, **SHORT) == 130, read_log(folder)
    shutil.copytree(folder / "runs", folder / "kept")
    command = "train", *command_line_args(**SHORT, resume="auto")
    assert run_in_process(folder, record_changes, *command, kinds=("read",)) == 0, read_log(folder)
    return folder, (folder / "operations").read_text().splitlines()


def problems_of_reading(tmp_path, stopped, whole, name, number):
    "Return the problems after a read that fails while a run is resumed"
    source, operations = stopped
    folder = tmp_path / f"{name}-{number}"
    shutil.copytree(source / "kept", folder / "runs")
    (folder / "corpus").symlink_to(source / "corpus")
    fault = number, name, False, ("read",)
    code = run_in_process(folder, failing, "", *fault, "train", *command_line_args(**SHORT, resume="auto"))
    found = [*problems_of_report(folder, code, REASONS[name]), *problems_of_resume(folder, whole)]
    return found and (name, number, operations[number - 1], found)


READS = [*range(1, 80, 20), *(pytest.param(n, marks=pytest.mark.nightly) for n in range(1, 80) if n % 20 != 1)]


@pytest.mark.parametrize("number", READS)
def test_errors_of_reading(tmp_path, unbroken, stopped, number):
    "After a read that fails during a resume, the message names the file and the reason, and the next resume is exact"
    if number > len(stopped[1]):
        pytest.skip(f"a resume reads {len(stopped[1])} times")
    name = ("EIO", "EACCES")[number % 40 > 20]
    assert not problems_of_reading(tmp_path, stopped, unbroken[1], name, number)


def changed_from_outside(change, *words):
    "Run the command line, and change the run folder before step 7"
    run_before_call(Trainer, "train_step", lambda t: t.step == 6, CHANGES_FROM_OUTSIDE[change])
    return lmnotes_command(*words)


CHANGES_FROM_OUTSIDE = {
    "deleted": lambda: shutil.rmtree("runs/r"),
    "renamed": lambda: Path("runs/r").rename("runs/moved"),
}


@pytest.mark.parametrize("change", CHANGES_FROM_OUTSIDE)
def test_run_folder_changes_from_outside(tmp_path, unbroken, change):
    "If the run folder is deleted or renamed, training continues, one line explains it, and the renamed run resumes exactly"
    (tmp_path / "corpus").symlink_to(unbroken[0] / "corpus")
    command = "train", *command_line_args(**SHORT)
    code = run_in_process(tmp_path, changed_from_outside, change, *command)
    assert code == 2 and not [*problems_of_report(tmp_path, code, "there is no such file or folder")], read_log(
        tmp_path
    )
    assert "step 12/12" in read_log(tmp_path) and not (tmp_path / "runs/r").exists()
    if change == "renamed":
        (tmp_path / "runs/moved").rename(tmp_path / "runs/r")
    assert not [*problems_of_resume(tmp_path, unbroken[1])]


@pytest.mark.parametrize("name", ["EROFS", "EACCES"])
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_read_only_folder_of_runs(tmp_path, unbroken, stopped, name, resume):
    "A new and a resumed run in a read-only folder of runs end with one line, and nothing changes"
    (tmp_path / "corpus").symlink_to(unbroken[0] / "corpus")
    (tmp_path / "runs").mkdir()
    if resume:
        shutil.copytree(stopped[0] / "kept", tmp_path / "runs", dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    command = "train", *command_line_args(**SHORT, resume=resume or "auto")
    code = run_in_process(tmp_path, failing, "", 1, name, True, KINDS, *command)
    assert code == 2 and not [*problems_of_report(tmp_path, code, REASONS[name])], read_log(tmp_path)
    assert "step 8" not in read_log(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == before


def mount(options, folder):
    "Mount a small file system in memory, or change it"
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path, unbroken):
    "Return a folder whose `runs` is a file system of its own. Skip if mounting is not allowed here"
    (tmp_path / "corpus").symlink_to(unbroken[0] / "corpus")
    (tmp_path / "runs").mkdir()
    try:
        done = mount("size=1m", tmp_path / "runs")
    except OSError as e:
        pytest.skip(f"there is no mount: {e}")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path / "runs"], check=True)


# Part of the size of an unbroken run that the disk has, or its number of files
SIZES = {"0.3": (0.3, 0), "0.7": (0.7, 0), "0.95": (0.95, 0), "12 files": (9, 12), "25 files": (9, 25)}


@pytest.mark.parametrize("size", SIZES)
def test_small_disk(small_disk, unbroken, size):
    "On a real disk with too little space or too few files, messages name it, and with more space a resume is exact"
    share, n_files = SIZES[size]
    needed = sum(path.stat().st_size for path in (unbroken[0] / "runs").rglob("*") if path.is_file())
    assert not mount(f"remount,size={int(share * needed)},nr_inodes={n_files}", small_disk / "runs").returncode
    code = run_in_process(small_disk, lmnotes_command, "train", *command_line_args(**SHORT))
    assert not [*problems_of_report(small_disk, code, "disk full"), *problems_of_run(small_disk, [])]
    assert "disk full" in read_log(small_disk), read_log(small_disk)
    assert not mount(f"remount,size={9 * needed},nr_inodes=0", small_disk / "runs").returncode
    assert not [*problems_of_resume(small_disk, unbroken[1])]


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_read_only_disk(small_disk, unbroken, stopped, resume):
    "A new and a resumed run on a real read-only disk end with one line, and a later run is exact"
    assert not mount("remount,size=9m", small_disk / "runs").returncode
    if resume:
        shutil.copytree(stopped[0] / "kept", small_disk / "runs", dirs_exist_ok=True)
    assert not mount("remount,ro", small_disk / "runs").returncode
    command = "train", *command_line_args(**SHORT, resume=resume or "auto")
    code = run_in_process(small_disk, lmnotes_command, *command)
    assert code == 2 and not [*problems_of_report(small_disk, code, REASONS["EROFS"])], read_log(small_disk)
    assert not mount("remount,rw", small_disk / "runs").returncode
    assert not [*problems_of_resume(small_disk, unbroken[1])]


def test_output_on_a_full_disk(small_disk, unbroken):
    "A run whose output goes to a file on a full disk trains to its end, with exit code 0 and the same bits"
    output, place = small_disk / "runs/output", small_disk / "elsewhere"
    (small_disk / "runs/filling").write_bytes(bytes(1 << 20))
    program = "from helpers import shorten_samples; from lmnotes.apps.cli import main; shorten_samples(); main()"
    command = [sys.executable, "-c", program, "train", *command_line_args(**SHORT | dict(out_dir=place))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LMNOTES_", "PYTHON"))}
    environ |= dict(PYTHONPATH=str(ROOT / "tests"))
    with open(output, "wb") as f:
        done = subprocess.run(command, cwd=small_disk, env=environ, stdout=f, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and not output.read_bytes(), done.stderr
    assert not differences(unbroken[1], run_results(place / "r"))


def end_at_a_failed_save():
    def after_step(hook, t):
        if t.counters["best_step"] == t.step > 0:
            hook.save(t)

    saving.Save.after_step = after_step


def drop_records():
    real = files.JsonlLog.append

    def append(log, **record):
        real(log, **record)
        log.unwritten.clear()

    files.JsonlLog.append = append


def hide_errors_of_writing():
    real = checkpoint._write_file

    def write(path, data):
        try:
            return real(path, data)
        except OSError:
            return dict(size=len(data), sha256=files.hashlib.sha256(data).hexdigest())

    checkpoint._write_file = write


# {name: (function that replaces a part of the library, start of the operation that fails)}
class CountSteps(Hook):
    "Hook that counts the steps of a run"

    steps = 0

    def after_step(self, t):
        self.steps += 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_log_of_printed_lines_on_a_full_disk(capsys):
    "A run continues without the log of what it prints, with one warning"
    with fresh_or_resume.TeeOutput("/dev/full") as output:
        for i in range(3):
            print(f"line {i}")
    shown = capsys.readouterr().out
    assert output.getvalue() == "line 0\nline 1\nline 2\n"
    assert shown.count("warning: /dev/full ends here") == 1 and all(f"line {i}" in shown for i in range(3))


def test_no_space_for_the_final_checkpoint(workdir):
    "A run without space for its final checkpoint ends before its first step, and its message names it"
    hook, usage = CountSteps(), shutil.disk_usage(workdir)._replace(free=1000)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(workdir)
        patched.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(CheckpointError, match=r"runs/full: disk full, needs .* bytes for its final checkpoint"):
            run(hooks=[hook], view=False, **SMALL | dict(run="full"))
    assert not hook.steps and not list(Path(workdir, "runs/full").glob("*.jsonl"))


MUTANTS = {
    "ends training at a failed save": (end_at_a_failed_save, "write r/.step_00000006"),
    "drops records that were not written": (drop_records, "write r/metrics.jsonl"),
    "hides errors of writing": (hide_errors_of_writing, "write r/.step_00000009"),
    "deletes old checkpoints before it writes the new one": (prune_first, "mkdir r/.step_00000006"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_errors_detect_a_missing_measure(tmp_path, unbroken, mutant):
    "If a measure is removed, an error has another result, so the tests above detect its absence"
    operation = MUTANTS[mutant][1]
    number = next(n for n, op in enumerate(affected("ENOSPC", unbroken[2]), 1) if op.startswith(operation))
    assert problems(tmp_path, unbroken, "ENOSPC", "deletes" in mutant, number, mutant)
