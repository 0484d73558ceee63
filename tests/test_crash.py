"""Checkpoints against power cuts, full disks and damaged files.

We record the file operations of three saves. For each operation, we then rebuild the disk as it may be if the power
fails right after it: the disk can lose any data that was not flushed, in many ways. The newest checkpoint must be found
in each of these states.
"""

import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal

import pytest
import torch
from helpers import TINY, command_line_args, differences, lmnotes_command, read_log, run_in_process, run_results

from lmnotes import core
from lmnotes.core import CheckpointError
from lmnotes.data.batches import RandomBatches
from lmnotes.nn.lm import new_lm
from lmnotes.training import checkpoint
from lmnotes.training.checkpoint import (
    Save,
    find_checkpoint,
    latest_checkpoint,
    load_lm,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from lmnotes.training.trainer import TrainConfig, Trainer

STEPS = 1, 2, 3
ROOT_FOLDER = 0


class Recorder:
    "Record every file operation in a folder as (what, path, ...), with paths relative to the folder"

    def __init__(self, folder, monkeypatch):
        self.folder, self.operations = folder, []
        self.real = dict(
            open=open, replace=os.replace, fsync=os.fsync, unlink=os.unlink, rmdir=os.rmdir, mkdir=os.mkdir
        )
        for module in (core, checkpoint):
            monkeypatch.setattr(module, "open", self.open, raising=False)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)
        monkeypatch.setattr(pathlib.Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok))
        monkeypatch.setattr(pathlib.Path, "mkdir", lambda path: self.mkdir(path))

    def note(self, what, path, *rest):
        self.operations.append((what, os.path.relpath(path, self.folder), *rest))

    def open(self, path, mode="r", **how):
        if "w" not in mode:
            return self.real["open"](path, mode, **how)
        self.note("create", path)
        file = self.real["open"](path, mode, buffering=0)
        recorder = self

        class File:
            def write(self, data):
                recorder.note("write", path, bytes(data))
                return file.write(data)

            def flush(self):
                pass

            def fileno(self):
                return file.fileno()

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                file.close()

        return File()

    def replace(self, source, target):
        self.real["replace"](source, target)
        self.note("replace", source, os.path.relpath(target, self.folder))

    def fsync(self, descriptor):
        self.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def mkdir(self, path):
        self.real["mkdir"](path)
        self.note("mkdir", path)

    def unlink(self, path, missing_ok=False):
        if path.exists() or not missing_ok:
            self.real["unlink"](path)
            self.note("remove", path)

    def rmtree(self, folder, ignore_errors=False):
        if not os.path.exists(folder) and ignore_errors:
            return
        for name in sorted(os.listdir(folder)):
            self.unlink(pathlib.Path(folder, name))
        self.real["rmdir"](folder)
        self.note("remove", folder)


class Disk:
    "Folders and files, as a process sees them now and as they may be after a power cut"

    def __init__(self):
        self.seen = {ROOT_FOLDER: {}}  # {folder: {name: file or folder}}
        self.kept = {ROOT_FOLDER: {}}  # The flushed part of it
        self.pending = []  # Name changes that were not flushed, in order, each as [(folder, name, file or None)]
        self.data, self.flushed = {}, {}  # {file: content}
        self.number = itertools.count(1)

    def find(self, path):
        at = ROOT_FOLDER
        for name in [] if path == "." else path.split("/"):
            at = self.seen[at][name]
        return at

    def entry(self, path):
        folder, _, name = path.rpartition("/")
        return self.find(folder or "."), name

    def change(self, *changes):
        _change(self.seen, changes)
        self.pending.append(changes)

    def apply(self, what, path, *rest):
        "Apply one recorded operation"
        if what == "mkdir":
            self.change((*self.entry(path), new := next(self.number)))
            self.seen[new], self.kept[new] = {}, {}
        elif what == "create":
            folder, name = self.entry(path)
            if name not in self.seen[folder]:
                self.change((folder, name, next(self.number)))
            self.data[self.find(path)] = b""
        elif what == "write":
            self.data[self.find(path)] += rest[0]
        elif what == "replace":
            self.change((*self.entry(path), None), (*self.entry(rest[0]), self.find(path)))
        elif what == "remove":
            self.change((*self.entry(path), None))
        elif what == "fsync":
            self.flush(self.find(path))

    def flush(self, node):
        if node in self.data:
            self.flushed[node] = self.data[node]
            return
        self.kept[node] = dict(self.seen[node])
        self.pending = [changes for changes in self.pending if not any(folder == node for folder, _, _ in changes)]

    def states(self):
        "Yield every {path: content, or None for a folder} that may be on the disk after a power cut now"
        for kept in itertools.product((True, False), repeat=len(self.pending)):
            names = {folder: dict(entries) for folder, entries in self.kept.items()}
            for changes in itertools.compress(self.pending, kept):
                _change(names, changes)
            for spoil in SPOIL:
                found = {
                    f: d if self.flushed.get(f) == d else spoil(self.flushed.get(f, b""), d)
                    for f, d in self.data.items()
                }
                yield dict(_paths(names, found))


# Possible contents of a file that was not flushed, computed from its flushed and its written content.
SPOIL = [
    lambda flushed, written: written,
    lambda flushed, written: flushed,
    lambda flushed, written: written[: len(written) // 2],
    lambda flushed, written: written[:-1],
    lambda flushed, written: bytes(len(written)),
    lambda flushed, written: written[: len(written) // 2] + bytes(len(written) - len(written) // 2),
]


def _change(names, changes):
    for folder, name, node in changes:
        if node is None:
            names[folder].pop(name, None)
        else:
            names[folder][name] = node


def _paths(names, found, folder=ROOT_FOLDER, prefix=""):
    for name, node in names[folder].items():
        if node in names:
            yield prefix + name, None
            yield from _paths(names, found, node, f"{prefix}{name}/")
        else:
            yield prefix + name, found[node]


def build(folder, state):
    "Write a state of the disk into an empty folder"
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    "Return (operations of three saves that keep one, {step: operations to its checkpoint}, {step: to its pointers})"
    run = tmp_path_factory.mktemp("saves")
    lm = new_lm("bigram", vocab_size=8)
    t = Trainer(lm, RandomBatches(torch.arange(100).numpy() % 8, 2, 4), TrainConfig(steps=3, dtype="float32"))
    done, pointed = {}, {}
    as_it_is = checkpoint.save_checkpoint

    def noted(*args, **about):
        folder = as_it_is(*args, **about)
        done[t.step] = len(recorder.operations)
        return folder

    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = Recorder(run, monkeypatch)
        monkeypatch.setattr(checkpoint, "save_checkpoint", noted)
        hook = Save(run, keep=1)
        for step in STEPS:
            t.fit(step)
            hook.save(t, "last", "best")
            pointed[step] = len(recorder.operations)
    assert [p.name for p in run.glob("step_*")] == ["step_00000003"]
    return recorder.operations, done, pointed


def whole_files(operations):
    "Return {step: {file name: content}} as the saves wrote it"
    files = {}
    for what, path, *rest in operations:
        if what == "write" and path.startswith(".step_"):
            files.setdefault(int(path[6:14]), {})[path.split("/")[1]] = rest[0]
    return files


def failures(folder, operations, done, pointed, files):
    "Yield (number of the operation, operation, error) for every state that does not recover, then the number of states"
    disk, tried = Disk(), set()
    for number, operation in enumerate(operations, 1):
        disk.apply(*operation)
        least = max((step for step in STEPS if done[step] <= number), default=0)
        at_pointers = max((step for step in STEPS if pointed[step] <= number), default=0)
        for state in disk.states():
            key = (least, at_pointers, tuple(sorted(state.items())))
            if key in tried:
                continue
            tried.add(key)
            workdir = folder / f"{len(tried)}"
            workdir.mkdir()
            build(workdir, state)
            wrong = recovered(workdir, least, at_pointers, files)
            shutil.rmtree(workdir)
            if wrong:
                yield number, operation[:2], wrong
    yield len(tried)


def recovered(workdir, least, at_pointers, files):
    "Return the problem with the state in a folder, or an empty text"
    try:
        found = latest_checkpoint(workdir)
    except CheckpointError:
        return "a completed save is lost" if least else ""
    step = int(found.name[5:])
    if step not in (least, least + 1):
        return f"step {step} is found where step {least} was saved"
    for name, content in files[step].items():
        if (found / name).read_bytes() != content:
            return f"{name} is not what was written"
    if read_state(found)["step"] != step or load_lm(workdir, device="cpu") is None:
        return "it does not load"
    for pointer in ("last", "best") if at_pointers else ():
        try:
            named = int(find_checkpoint(workdir, pointer).name[5:])
        except CheckpointError as e:
            return f"{pointer}: {e}"
        if named < at_pointers:
            return f"{pointer} names step {named} where it was set to {at_pointers}"
    return ""


linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are named through /proc")


@linux
def test_power_cut_at_every_operation(saves, tmp_path):
    "The last completed save or the next one is found, bit for bit, and the pointers name a completed save"
    operations, done, pointed = saves
    *wrong, states = failures(tmp_path, operations, done, pointed, whole_files(operations))
    assert not wrong, wrong[:5]
    assert states > 500, states


def without(what, *parts):
    "Return a function that removes the operations `what` whose path contains all `parts` from a record"
    return lambda ops: [op for op in ops if not (op[0] == what and all(part in op[1] for part in parts))]


def pruned_first(operations):
    "Yield operations that delete the previous checkpoint as soon as the next one is started"
    late = [op for op in operations if op[0] == "remove" and op[1].startswith("step_")]
    for op in operations:
        if op not in late:
            yield op
        if op == ("mkdir", next(o[1] for o in operations if o[0] == "mkdir" and "00000002" in o[1])):
            yield from [o for o in late if "00000001" in o[1]]


MUTANTS = {
    "config.json is not flushed": without("fsync", ".step_", "config.json"),
    "model.safetensors is not flushed": without("fsync", ".step_", "model.safetensors"),
    "state.pt is not flushed": without("fsync", ".step_", "state.pt"),
    "manifest.json is not flushed": without("fsync", ".step_", "manifest.json"),
    "the names in the folder are not flushed": lambda ops: [
        op for op in ops if not (op[0] == "fsync" and op[1].startswith(".step_") and op[1].endswith(".tmp"))
    ],
    "the folder's name is not flushed": lambda ops: [op for op in ops if op[:2] != ("fsync", ".")],
    "`last` is not flushed": without("fsync", ".last."),
    "`best` is not flushed": without("fsync", ".best."),
    "the folder is not renamed": without("replace", ".step_"),
    "`last` is not renamed": without("replace", ".last."),
    "`best` is not renamed": without("replace", ".best."),
    "pruned before the next is there": pruned_first,
}


@linux
@pytest.mark.parametrize("name", MUTANTS)
def test_every_crash_safety_measure_is_needed(saves, tmp_path, name):
    "Without the measure, some state does not recover, so the test above would detect its absence"
    operations, done, pointed = saves
    # Marks in the record replace the numbers of operations, so that they stay in place when operations are removed.
    marked = []
    for number, op in enumerate(operations, 1):
        marked.append(op)
        marked += [("mark", f"done {s}") for s in STEPS if done[s] == number]
        marked += [("mark", f"pointed {s}") for s in STEPS if pointed[s] == number]
    mutated = list(MUTANTS[name](marked))
    assert mutated != marked
    operations, at = [], {}
    for op in mutated:
        if op[0] == "mark":
            at[op[1]] = len(operations)
        else:
            operations.append(op)
    done, pointed = ({s: at[f"{what} {s}"] for s in STEPS} for what in ("done", "pointed"))
    first = next(failures(tmp_path, operations, done, pointed, whole_files(saves[0])))
    assert isinstance(first, tuple), f"{first} states, and all recover"


def damaged(data, other, draw):
    "Return (kind of damage, content of the damaged file)"
    at = draw.randrange(len(data))
    some = data[at : at + draw.randint(1, 64)]
    kinds = {
        "a bit is flipped": data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        "a block is zero": data[:at] + bytes(len(some)) + data[at + len(some) :],
        "it is cut": data[:at],
        "something is put in": data[:at] + draw.randbytes(draw.randint(1, 64)) + data[at:],
        "something comes twice": data[:at] + some + data[at:],
        "something is taken out": data[:at] + data[at + len(some) :],
        "it is empty": b"",
        "it is another file": other,
    }
    return draw.choice(list(kinds.items()))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    "Return a run folder with checkpoints of steps 1 and 2"
    run = tmp_path_factory.mktemp("run")
    t = Trainer(
        new_lm("bigram", vocab_size=8), RandomBatches(torch.arange(100).numpy() % 8, 2, 4), TrainConfig(dtype="float32")
    )
    for step in (1, 2):
        t.fit(step)
        save_checkpoint(run, t.lm, t.step, t.state_dict())
    return run


FILES = "config.json", "model.safetensors", "state.pt", "manifest.json"


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(two_steps, tmp_path, name, capsys):
    "The error names a damaged file, which is never parsed, and the previous checkpoint is found"
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    file = run / "step_00000002" / name
    data, other = file.read_bytes(), (run / "step_00000002" / FILES[FILES.index(name) - 1]).read_bytes()
    draw = random.Random(name)
    for _ in range(150):
        what, content = damaged(data, other, draw)
        file.write_bytes(content)
        if content == data or (name == "manifest.json" and same_manifest(content, data)):
            verify_checkpoint(file.parent)
            continue
        with pytest.raises(CheckpointError) as raised:
            verify_checkpoint(file.parent)
        assert name in str(raised.value) or name == "manifest.json", (what, raised.value)
        assert latest_checkpoint(run).name == "step_00000001", what
        assert "step_00000002" in capsys.readouterr().out


def same_manifest(content, data):
    "Return True if two manifests are equivalent, for example apart from spaces"
    try:
        return json.loads(content)["files"] == json.loads(data)["files"]
    except (ValueError, KeyError, TypeError):
        return False


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(two_steps, tmp_path, name):
    "The error names a file that is missing, or is a folder"
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    (run / "step_00000002" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(run / "step_00000002")
    if name != "manifest.json":
        (run / "step_00000002" / name).mkdir()
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(run / "step_00000002")
    assert latest_checkpoint(run).name == "step_00000001"


def test_all_checkpoints_damaged(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    for file in (tmp_path / "run").glob("step_*/state.pt"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path / "run")


def test_missing_disk_space_is_found_before_writing(two_steps, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    lm = load_lm(run)
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"disk full: .*run needs .* MB .* and has 0\.0 MB free"):
        save_checkpoint(run, lm, 3)
    assert sorted(p.name for p in run.iterdir()) == ["step_00000001", "step_00000002"]


def train_on_a_full_disk(size, *command_line_args):
    "Run the command line on a disk that is full from step 29 on: no file can grow beyond a size"
    as_it_is = Trainer.train_step

    def train_step(t):
        as_it_is(t)
        if t.step == 29:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    Trainer.train_step = train_step
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return lmnotes_command(*command_line_args)


@pytest.mark.parametrize("file, size", [("model.safetensors", 20_000), ("state.pt", 60_000)])
def test_training_continues_on_a_full_disk(workdir, file, size):
    "Training continues without saving, the last good checkpoint stays, no partial file does, and a resume is exact"
    case = TINY | dict(optimizer="adamw")
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**case | dict(run="whole"))) == 0, (
        read_log(workdir)
    )
    assert run_in_process(workdir, train_on_a_full_disk, size, "train", *command_line_args(**case)) == 2, read_log(
        workdir
    )
    run = workdir / "runs/r"
    assert "step 30 is not saved" in read_log(workdir) and "step 40/40" in read_log(workdir)
    assert read_log(workdir).splitlines()[-1].startswith("lmnotes: ")
    assert "step_00000040 could not be written: disk full. Earlier checkpoints are untouched" in read_log(workdir)
    sizes = {name: (latest_checkpoint(run) / name).stat().st_size for name in FILES}
    assert latest_checkpoint(run).name < "step_00000030" and sizes[file] > size
    assert not list(run.glob(".*.tmp"))
    assert (
        run_in_process(workdir, lmnotes_command, "train", *command_line_args(run="r", out_dir="runs", resume=True)) == 0
    ), read_log(workdir)
    assert not differences(run_results(workdir / "runs/whole"), run_results(run))
