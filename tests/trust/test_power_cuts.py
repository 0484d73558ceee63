"""Power cuts and kills at every file operation of a save, of a rewrite, of moving an earlier run aside, and of an export.

We record the file operations. For each operation, we then rebuild the disk as it may be if the power fails right after
it: the disk can lose any data that was not flushed, in many ways. The last completed state must be found in each of these.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from itertools import zip_longest

import pytest
import torch
from disk import Disk, Recorder, build, linux
from helpers import ROOT
from small_runs import trained_runs

from lmnotes import files
from lmnotes.core import CheckpointError, fsync_path, write_atomic, write_json
from lmnotes.data.batches import RandomBatches
from lmnotes.export import export as export_module
from lmnotes.files import JsonlLog, check_logs, exchange_paths, finish_replacing, replace_folder
from lmnotes.nn.lm import new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora
from lmnotes.runs import folder as folder_module
from lmnotes.runs.folder import locked_run_folder, move_earlier_run_aside
from lmnotes.training import saving
from lmnotes.training.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_lm,
    read_checkpoint_config,
    read_pointer,
    read_state,
)
from lmnotes.training.saving import Save, remove_temporary_files
from lmnotes.training.trainer import TrainConfig, Trainer

MODELS = "bigram", "adapters", "bigram, no exchange"
LOGS = "metrics.jsonl", "samples.jsonl"


def no_exchange(a, b):
    "Fail like a file system that cannot exchange two paths"
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(b))


def small_trainer(name):
    lm = new_lm("gpt", vocab_size=8, ctx_len=4, d_model=8, n_layers=1, n_heads=1) if name == "adapters" else None
    lm = add_lora(lm, LoRAConfig(rank=1, targets="qkv")) if lm else new_lm("bigram", vocab_size=8)
    return Trainer(lm, RandomBatches(torch.arange(100).numpy() % 8, 2, 4), TrainConfig(steps=3, dtype="float32"))


@pytest.fixture(scope="module", params=MODELS)
def saves(request, tmp_path_factory):
    """Return (operations, [number of operations until a save is complete], [until its pointers are], [(step, files)])

    There are four saves that keep one checkpoint. The last one writes step 3 again, with other content. Before each save,
    both logs of a run get a record.
    """
    run, t = tmp_path_factory.mktemp("saves"), small_trainer(request.param.split(",")[0])
    done, pointed, written = [], [], []
    as_it_is = saving.save_checkpoint

    def noted(*args, **metadata):
        folder = as_it_is(*args, **metadata)
        done.append(len(recorder.operations))
        written.append((t.step, {p.name: p.read_bytes() for p in folder.iterdir()}))
        return folder

    with pytest.MonkeyPatch.context() as monkeypatch:
        if "no exchange" in request.param:
            monkeypatch.setattr(files, "exchange_paths", no_exchange)
        recorder = Recorder(run, monkeypatch)
        monkeypatch.setattr(saving, "save_checkpoint", noted)
        metrics, samples = logs = [JsonlLog(run / name) for name in LOGS]
        hook = Save(run, keep=1, logs=logs)
        for step in (1, 2, 3, 3):
            t.fit(step)
            metrics.append(step=step, split="train", loss=0.5)
            samples.append(step=step, split="sample", prompt="a", text="b")
            t.counters.update(best_step=step, waits=len(done))
            hook.save(t)
            pointed.append(len(recorder.operations))
    assert [p.name for p in run.glob("step_*")] == ["step_00000003"]
    assert written[2][1]["state.pt"] != written[3][1]["state.pt"]
    return recorder.operations, done, pointed, written


def failures(folder, operations, done, pointed, written, first=1):
    """Yield (number of the operation, operation, error) for every state that does not recover, then the number of states

    The states are those after each operation from the `first` on.
    """
    disk, tried, loaded = Disk(), set(), set()
    for number, operation in enumerate(operations, 1):
        disk.apply(*operation)
        if number < first:
            continue
        saved = sum(n <= number for n in done)  # Completed saves
        pointers = sum(n <= number for n in pointed)
        for state in disk.states():
            key = (saved, pointers, tuple(sorted(state.items())))
            if key in tried:
                continue
            tried.add(key)
            workdir = folder / f"{len(tried)}"
            workdir.mkdir()
            build(workdir, state)
            problem = recovered(workdir, saved, pointers, written, loaded)
            shutil.rmtree(workdir)
            if problem:
                yield number, operation[:2], problem
    yield len(tried)


def recovered(workdir, saved, pointers, written, loaded):
    "Return the problem with the state in a folder, or an empty text. Load each content once, and add it to `loaded`"
    try:
        remove_temporary_files(workdir)
        found = latest_checkpoint(workdir)
    except CheckpointError:
        return "a completed save is lost" if saved else ""
    expected = written[max(0, saved - 1) : saved + 1]  # The last completed save or the next one
    content = {p.name: p.read_bytes() for p in found.iterdir()}
    if (step := int(found.name[5:]), content) not in expected:
        return f"{found.name} is found, and not what was written last"
    if (key := tuple(sorted(content.items()))) not in loaded:
        if read_state(found)["step"] != step or load_lm(workdir, device="cpu") is None:
            return "it does not load"
        loaded.add(key)
    try:
        check_logs(workdir, read_checkpoint_config(found)["logs"])
        if (best := find_checkpoint(workdir, "best")) != found:
            return f"the best checkpoint is {best.name}"
        for name in ("last", "best") if pointers else ():
            if int((named := read_pointer(workdir, name)).name[5:]) < written[pointers - 1][0]:
                return f"{name} names {named.name}"
    except CheckpointError as e:
        return str(e)
    return ""


@linux
def test_power_cut_at_every_operation_of_a_save(saves, tmp_path):
    "After a power cut at any operation of a save, the last completed save or the next one is found, bit for bit, and so is the best checkpoint"
    *wrong, states = failures(tmp_path, *saves)
    assert not wrong, wrong[:5]
    assert states > 2000, states


def without(what, *parts):
    "Return a function that removes the operations `what` whose path contains all `parts` from a record"
    return lambda ops: [op for op in ops if not (op[0] == what and all(part in op[1] for part in parts))]


def pruned_first(operations):
    "Yield operations that delete the first checkpoint as soon as the next one is started"
    moved = next(op[2] for op in operations if op[:2] == ("replace", "step_00000001"))
    late = [op for op in operations if op[:2] == ("replace", "step_00000001") or op[1:] and op[1].startswith(moved)]
    for op in operations:
        if op not in late:
            yield op
        if op[0] == "mkdir" and "00000002" in op[1]:
            yield from late


def exchanged_by_renames(operations):
    "Yield operations that replace a folder by two renames"
    for op in operations:
        if op[0] == "exchange":
            yield "replace", op[2], op[1] + ".old"
            yield "replace", op[1], op[2]
            yield "replace", op[1] + ".old", op[1]
        else:
            yield op


MUTANTS = {
    "does not flush config.json": without("fsync", ".step_", "config.json"),
    "does not flush model.safetensors": without("fsync", ".step_", "model.safetensors"),
    "does not flush state.pt": without("fsync", ".step_", "state.pt"),
    "does not flush manifest.json": without("fsync", ".step_", "manifest.json"),
    "does not flush the names in a checkpoint folder": lambda ops: [
        op for op in ops if not (op[0] == "fsync" and op[1].startswith(".step_") and op[1].endswith(".tmp"))
    ],
    "does not flush the name of a checkpoint folder": lambda ops: [op for op in ops if op[:2] != ("fsync", ".")],
    "does not flush `last`": without("fsync", ".last."),
    "does not flush `best`": without("fsync", ".best."),
    "does not exchange the old and the new folder": without("exchange", ".step_"),
    "renames the folders instead of exchanging them": exchanged_by_renames,
    "does not flush metrics.jsonl": without("fsync", "metrics.jsonl"),
    "does not flush samples.jsonl": without("fsync", "samples.jsonl"),
    "does not rename the new `last`": without("replace", ".last."),
    "does not rename the new `best`": without("replace", ".best."),
    "deletes old checkpoints before the new one is complete": pruned_first,
}


@linux
@pytest.mark.parametrize("saves", ["bigram"], indirect=True)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_measure_against_a_power_cut_is_needed(saves, tmp_path, name):
    "If a measure is removed, some state does not recover, so the test above detects its absence"
    operations, done, pointed, written = saves
    marked = []  # Marks replace the numbers of operations, so that they stay in place when operations are removed
    for number, op in enumerate(operations, 1):
        marked += [op, *[("done",)] * done.count(number), *[("pointed",)] * pointed.count(number)]
    mutated = list(MUTANTS[name](marked))
    assert mutated != marked
    at = {kind: [] for kind in ("done", "pointed")}
    operations = []
    for op in mutated:
        if op[0] in at:
            at[op[0]].append(len(operations))
        else:
            operations.append(op)
    start = next(i for i, (a, b) in enumerate(zip_longest(operations, saves[0]), 1) if a != b)
    first = next(failures(tmp_path, operations, at["done"], at["pointed"], written, start))
    assert isinstance(first, tuple), f"{first} states, and all recover"


def rebuilt_states(folder, operations, first):
    "Yield (number, operation, folder) for each state of the disk after each operation from the `first` on"
    disk = Disk()
    for number, operation in enumerate(operations, 1):
        disk.apply(*operation)
        states = disk.states() if number >= first else ()
        for state in {tuple(sorted(state.items())): state for state in states}.values():
            workdir = folder / "state"
            workdir.mkdir()
            build(workdir, state)
            yield number, operation, workdir
            shutil.rmtree(workdir)


OLD = {"run.json": b'{"status": "old"}\n', "metrics.jsonl": b"old\n", "last": b"step_00000001\n"}
OLD |= {"step_00000001/manifest.json": b"old", "tokenizer/tokenizer.json": b"old"}


def content_of(folder):
    "Return {relative path: content} of the files of a run, without locks and temporary files"
    files = [p for p in folder.rglob("*") if p.is_file() and not p.relative_to(folder).parts[0].startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@linux
def test_power_cut_while_an_earlier_run_moves_aside(tmp_path, monkeypatch):
    "After a power cut while an earlier run moves aside, the earlier run is complete in one folder, and so is the new record"
    runs = tmp_path / "runs"
    runs.mkdir()
    with monkeypatch.context() as patched:
        recorder = Recorder(runs, patched)
        (runs / "r").mkdir()
        for folder in ("step_00000001", "tokenizer"):
            (runs / "r" / folder).mkdir()
        for name, data in OLD.items():
            write_atomic(runs / "r" / name, data)
        write_atomic(runs / "r/report.ipynb", "{}")
        fsync_path(runs)
        begin = len(recorder.operations)
        with locked_run_folder(runs / "r") as lock:
            move_earlier_run_aside(lock, [])
            aside = len(recorder.operations)
            write_json(runs / "r/run.json", dict(status="new"))
            end = len(recorder.operations)
    states = 0
    for number, operation, workdir in rebuilt_states(tmp_path, recorder.operations, begin):
        found = [content_of(folder) for folder in workdir.iterdir() if folder.is_dir()]
        reports = sum(1 for content in found if content.pop("report.ipynb", None) == b"{}")
        whole = [content for content in found if content == OLD]
        assert len(whole) == 1 and reports >= 1, (number, operation, found)
        new = [content for content in found if b"new" in content.get("run.json", b"")]
        if aside < number == end:
            assert new and content_of(workdir / "r").get("run.json", b"").count(b"new"), (operation, found)
        states += 1
    assert states > 800, states


def named_states(operations, ends, temporary):
    """Yield (number of complete writes, operation, state) for the states of the disk after each operation, from the first end on

    Each state comes once for each number of complete writes, without what has a name that matches `temporary`.
    """
    disk, tried = Disk(), set()
    for number, operation in enumerate(operations, 1):
        disk.apply(*operation)
        complete = sum(end <= number for end in ends)
        for state in disk.states() if complete else ():
            state = {path: data for path, data in state.items() if not re.match(temporary, path)}
            if (key := (complete, frozenset(state.items()))) not in tried:
                tried.add(key)
                yield complete, operation[:2], state


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    "Return the folder of a small run with a checkpoint"
    with trained_runs(tmp_path_factory.mktemp("small"), {"r": ((2,), dict(steps=4))}) as runs:
        return runs / "r"


def recorded_exports(run, root, monkeypatch):
    "Return (operations of three exports to `root/model`, number of operations after each, {name: content} of each)"
    some = {name: (ROOT / name).read_bytes() for name in ("lmnotes/core.py", "lmnotes/nn/lm.py", "lmnotes/nn/lora.py")}
    monkeypatch.setattr(export_module, "_collect_sources", lambda lm: (some, set()))
    recorder, ends, versions = Recorder(root, monkeypatch), [], []
    write = recorder.as_writes(export_module._write_files, lambda r, lm, folder, format, state_dict: folder)
    monkeypatch.setattr(export_module, "_write_files", write)
    for name in ("old.pt", "new.pt", "newer.pt"):
        export_module.export(run, root / "model", state_dict=name)
        ends.append(len(recorder.operations))
        versions.append(content_of(root / "model"))
    return recorder.operations, ends, versions


@linux
@pytest.mark.parametrize("exchange", [exchange_paths, pytest.param(no_exchange, marks=pytest.mark.nightly)])
def test_power_cut_while_an_export_is_replaced(small_run, tmp_path, monkeypatch, exchange):
    "After a power cut while an export is replaced, the old or the new export is complete under its name when the next export starts"
    root = tmp_path / "exports"
    root.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(files, "exchange_paths", exchange)
        operations, ends, versions = recorded_exports(small_run, root, patched)
    assert {"lmnotes/nn/lm.py", "tokenizer/tokenizer.json", "old.pt"} < versions[0].keys()
    states, restored = 0, 0
    for complete, operation, state in named_states(operations, ends, r"\.model\.\d+\.tmp"):
        workdir = tmp_path / "state"
        workdir.mkdir()
        build(workdir, state)
        restored += not (workdir / "model").exists()
        finish_replacing(workdir / "model")
        assert content_of(workdir / "model") in versions[complete - 1 : complete + 1], operation
        shutil.rmtree(workdir)
        states += 1
    assert states > (500 if exchange is no_exchange else 4), states
    assert bool(restored) == (exchange is no_exchange)


@linux
def test_power_cut_during_a_fork(small_run, tmp_path, monkeypatch):
    "After a power cut during a fork, its name has the complete copy or does not exist. Once `fork` has returned, the copy exists"
    with monkeypatch.context() as patched:
        recorder = Recorder(tmp_path, patched)
        copy = recorder.as_writes(folder_module._copy_run_at_step, lambda checkpoint, to: to)
        patched.setattr(folder_module, "_copy_run_at_step", copy)
        folder_module.fork(small_run, "new", tmp_path)
    whole = content_of(tmp_path / "new")
    assert {"run.json", "tokenizer.json", "model.safetensors"} < {name.rpartition("/")[2] for name in whole}
    end, found = len(recorder.operations), []
    moved = next(n for n, op in enumerate(recorder.operations, 1) if op[0] == "replace" and op[2] == "new")
    for complete, operation, state in named_states(recorder.operations, [moved, end], r"\.new\.\d+\.tmp"):
        content = {path[4:]: data for path, data in state.items() if path.startswith("new/") and data is not None}
        assert content == whole or (complete == 1 and "new" not in state), operation
        found.append("new" in state)
    assert sorted(found) == [False, True, True]


def test_an_export_finishes_a_killed_one(tmp_path, monkeypatch):
    "An export restores the old folder that a killed export moved away, and removes temporary folders of ended processes only"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old, new = tmp_path / ".model.replaced", tmp_path / f".model.{ended.pid}.tmp"
    other, alive = tmp_path / f".other.{ended.pid}.tmp", tmp_path / f".model.{os.getpid()}.tmp"
    for folder in (old, new, other, alive):
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "config.json").write_text(folder.name)

    def check_target(folder):
        assert (folder / "config.json").read_text() == ".model.replaced"
        assert {p.name for p in tmp_path.iterdir()} == {"model", other.name, alive.name}
        raise ValueError("enough")

    monkeypatch.setattr(export_module, "_check_target", check_target)
    with pytest.raises(ValueError, match="enough"):
        export_module.export("r", tmp_path / "model")


def test_a_leftover_of_a_killed_replacement_does_not_prevent_the_next(tmp_path, monkeypatch):
    "The next replacement deletes an old folder that a killed replacement did not delete"
    monkeypatch.setattr(files, "exchange_paths", no_exchange)
    for name in ("model", ".model.replaced", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content.txt").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/content.txt").read_text() == "new"
