"""Checkpoints against full disks and damaged files."""

import json
import random
import re
import resource
import shutil
import signal

import pytest
import torch
from helpers import (
    TINY,
    StopAtSteps,
    command_line_args,
    differences,
    lmnotes_command,
    read_log,
    run_in_process,
    run_results,
)

from lmnotes.core import CheckpointError
from lmnotes.data.batches import RandomBatches
from lmnotes.nn.lm import new_lm
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import (
    latest_checkpoint,
    load_lm,
    save_checkpoint,
    verify_checkpoint,
)
from lmnotes.training.trainer import Hook, TrainConfig, Trainer


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


def test_the_base_weights_of_adapters_need_space_once(tmp_path, monkeypatch):
    "A resume with adapters needs space for them only, because the base weights are there"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("The sea was calm.\n" * 20)
    given = dict(
        data="x.txt", tokenizer="bytes", model_args="d_model=64 n_layers=4 n_heads=2", ctx_len=8, batch_size=2, steps=3
    )
    given |= dict(lora_rank=1, optimizer="adamw", device="cpu", dtype="float32", out_dir="runs", run="r", view=False)
    run(**given, hooks=[StopAtSteps(2)])
    base = (tmp_path / "runs/r/base.safetensors").stat().st_size
    free = shutil.disk_usage(tmp_path)._replace(free=base // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert run(run="r", out_dir="runs", resume=True, view=False).status == "done"
    with pytest.raises(CheckpointError, match="final checkpoint"):
        run(**given | dict(run="new"))


def test_missing_disk_space_is_found_before_writing(two_steps, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    lm = load_lm(run)
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"run/step_00000003: disk full, needs [\d,]+ bytes and has 1,000"):
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
    "On a full disk, training continues without saving, the last good checkpoint and no partial file remains, and a resume is exact"
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
    pattern = r"step_00000040: file too large, needs [\d,]+ bytes, so it could not be written.*untouched"
    assert re.search(pattern, read_log(workdir))
    sizes = {name: (latest_checkpoint(run) / name).stat().st_size for name in FILES}
    assert latest_checkpoint(run).name < "step_00000030" and sizes[file] > size
    assert not list(run.glob(".*.tmp"))
    assert (
        run_in_process(workdir, lmnotes_command, "train", *command_line_args(run="r", out_dir="runs", resume=True)) == 0
    ), read_log(workdir)
    assert not differences(run_results(workdir / "runs/whole"), run_results(run))


class Dashboard(Hook):
    "Sends figures to a server that cannot be reached"

    observes, calls = True, 0

    def after_step(self, t):
        self.calls += 1
        raise ConnectionError("the server does not answer")


@pytest.mark.parametrize("observes", [True, False])
def test_a_hook_that_fails(workdir, uninterrupted_run, capsys, monkeypatch, observes):
    "A hook that observes and fails is called once, and changes nothing. Any other hook that fails ends the run"
    monkeypatch.chdir(workdir)
    hook = Dashboard()
    hook.observes = observes
    given = TINY | dict(out_dir=str(workdir / "runs"), run="observed", view=False, hooks=[hook])
    if not observes:
        with pytest.raises(ConnectionError):
            run(**given)
        return
    r = run(**given)
    assert (r.status, hook.calls) == ("done", 1)
    assert "Dashboard failed and is off from here on: the server does not answer" in capsys.readouterr().out
    assert not differences(run_results(uninterrupted_run), run_results(r.folder))


class ClampWeights(Hook):
    "Keeps the weights small"

    @torch.no_grad()
    def after_step(self, t):
        if t.step == 2:
            for p in t.lm.parameters():
                p.clamp_(-0.1, 0.1)


def test_a_hook_that_changes_the_weights(workdir, monkeypatch):
    "A hook that changes the weights is an error, because a run resumed without it would end in other weights"
    monkeypatch.chdir(workdir)
    with pytest.raises(ValueError, match="step 2: a hook changed the weights, one of .*ClampWeights"):
        run(**TINY | dict(out_dir=str(workdir / "runs"), run="clamped", view=False, hooks=[ClampWeights()]))
