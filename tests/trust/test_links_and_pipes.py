"""A run folder from someone else has links, pipes and devices in place of files: no use writes outside the folder, and none waits forever."""

import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from foreign import call
from small_runs import RUNS, attempt, trained_runs
from test_damaged_runs import USES, judge

from lmnotes.apps.doctor import doctor
from lmnotes.apps.papermill_engine import output_path
from lmnotes.core import CheckpointError
from lmnotes.files import RunLock
from lmnotes.inspect.diff import diff
from lmnotes.inspect.verify import verify
from lmnotes.runs.folder import fork, last_run_name
from lmnotes.runs.replay import MISMATCH
from lmnotes.runs.run import run

FILES = "run.json metrics.jsonl samples.jsonl best last interrupted tokenizer/tokenizer.json step_00000006/config.json".split()
FILES += "step_00000006/manifest.json step_00000006/model.safetensors".split()
OTHERS = (
    "metrics.jsonl.damaged samples.jsonl.damaged .lock .owner.json .run.json.1.tmp train.ipynb w.pt tokenizer/x".split()
)
FOLDERS = ["tokenizer", "step_00000006", "exports"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Return the current folder of two runs"
    folder = tmp_path_factory.mktemp("links")
    with trained_runs(folder, {name: RUNS[name] for name in ("stopped", "done")}):
        yield folder


def copy_stopped(place):
    shutil.rmtree(place / "copies", ignore_errors=True)
    return Path(shutil.copytree(place / "runs/stopped", place / "copies/stopped"))


@pytest.fixture
def stopped(place):
    "Return a copy of the stopped run"
    return copy_stopped(place)


def resume(folder):
    return run(resume=True, run=folder.name, out_dir=folder.parent, view=False)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", [*FILES, *OTHERS, *FOLDERS])
@pytest.mark.parametrize("is_dangling", [False, True], ids=["", "dangling"])
def test_a_resume_rejects_a_link(stopped, tmp_path, name, is_dangling):
    "A link at each name of a run is named by the resume, which writes nothing to its target"
    path, target = stopped / name, tmp_path / "yours"
    with open(stopped / "metrics.jsonl", "a") as f:
        f.write("chosen by an attacker\n")
    if not is_dangling and path.exists():
        path.rename(target)
    elif not is_dangling:
        target.mkdir() if name in FOLDERS else target.write_bytes(b"yours")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=f"{path}: is a symbolic link. Replace it by a copy of its file"):
        resume(stopped)
    assert contents(tmp_path) == before


def test_a_link_is_rejected_by_every_writer(place, stopped, tmp_path):
    "Resuming a finished run, starting a new run of the same name, forking, locking and papermill reject the link"
    done, link = place / "runs/done", tmp_path / "link"
    for folder in (stopped, done):
        (folder / "samples.jsonl.damaged").symlink_to(tmp_path / "yours")
    link.symlink_to(tmp_path / "yours")
    try:
        for use in (resume, fork, lambda folder: run(run=folder.name, out_dir=folder.parent, view=False)):
            for folder in (stopped, done):
                with pytest.raises(CheckpointError, match=r"samples.jsonl.damaged: is a symbolic link"):
                    use(folder)
    finally:
        (done / "samples.jsonl.damaged").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "yours")
    with pytest.raises(CheckpointError, match=r"\.lock: is a symbolic link"), RunLock(tmp_path):
        pass
    (stopped / "train.ipynb").symlink_to(tmp_path / "yours")
    notebook = Path(__file__).parents[2] / "nbs/train.ipynb"
    with pytest.raises(ValueError, match=r"train.ipynb: is a link"):
        output_path(notebook, notebook.parents[1], dict(run=stopped.name, resume=True, out_dir=str(stopped.parent)))
    assert not (tmp_path / "yours").exists()


# Pipes and devices


def use_doctor(folder):
    if (checkup := doctor(folder)).problems:
        raise CheckpointError(repr(checkup))


def use_diff(folder):
    repr(diff(folder, folder.parents[1] / "runs/done"))


def use_replay(folder):
    report = verify(folder, replay=9)
    if report.parts(MISMATCH):
        raise CheckpointError(repr(report))


ALL_USES = USES | {"doctor": use_doctor, "diff": use_diff, "replay": use_replay}


def put(path, kind):
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")


def problems_of_uses(place, names, kind):
    "Return what is wrong with the uses of a run that has a pipe or a link to a device as one of its files"
    os.chdir(place)
    torch.set_num_threads(1)
    found = []
    for name, (use, fn) in product(names, ALL_USES.items()):
        folder = copy_stopped(place)
        put(folder / name, kind)
        result, error, text = attempt(fn, folder)
        if error and (problem := judge(folder / name, folder, use, None, (result, error, text))):
            found.append(f"{name}, {use}: {problem}")
    return "\n".join(found)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_use_waits_for_a_pipe_or_a_device(place, kind):
    "Every use of a run with a pipe or a device as one of its files ends, and an error names the file"
    names = [name for name in FILES if not name.startswith("step")]
    names += [".owner.json", "tokenizer/x", "step_00000006/state.pt"]
    assert call(problems_of_uses, place, names, kind, megabytes=600) == ("", "")


def test_papermill_does_not_wait_for_a_pipe(stopped):
    put(stopped / "run.json", "pipe")
    kind, found = call(last_run_name, stopped.parent)
    assert kind == "CheckpointError" and "there is no run" in found
