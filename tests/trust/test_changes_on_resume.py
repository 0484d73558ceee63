"""Every change between two starts of a run is rejected by name, recorded, or without effect on the bits."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import StopAtSteps
from small_runs import SMALL, StopAtOnce, attempt, hash_of, hash_of_weights, trained_runs
from test_verify import reseal

from lmnotes import core
from lmnotes.core import CheckpointError, environment, read_json, write_json
from lmnotes.data.prepare import prepare_data
from lmnotes.runs import setup
from lmnotes.runs.config import CHANGEABLE_PARAMS, FIXED_PARAMS, RunConfig
from lmnotes.runs.folder import fork, last_run_name
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training import saving
from lmnotes.training.checkpoint import find_checkpoint, list_checkpoints, read_state
from lmnotes.training.trainer import Hook

GPT = "d_model=8 n_layers=1 n_heads=1"
ONE = dict(keep=1, eval_every=12)  # A single checkpoint folder
RUNS = {
    "r": ((6,), dict(**ONE)),
    "seed": ((6,), dict(**ONE, seed=1)),
    "larger": ((6,), dict(**ONE, model_args="d_model=16 n_layers=1 n_heads=1")),
    "rnn": ((6,), dict(**ONE, arch="rnn", model_args="d_model=8 d_hidden=8")),
    "bytes": ((6,), dict(**ONE, tokenizer="bytes")),
    "adapted": ((6,), dict(**ONE, lora_rank=1, optimizer="adamw")),
    "adapted other": ((6,), dict(**ONE, lora_rank=1, optimizer="adamw", seed=1, run="adapted_other")),
    "tokens": ((6,), dict(**ONE, data="prepared", tokenizer="bpe:2048")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Return a folder with runs that were stopped at step 6 of 12, their text and prepared tokens"
    folder = tmp_path_factory.mktemp("changes")
    with trained_runs(folder, {name: case for name, case in RUNS.items() if name != "tokens"}):
        for size in (270, 280):
            prepare_data(f"prepared{size}", "corpus", f"bpe:{size}")
        shutil.copytree("prepared270", "prepared")
        run(hooks=[], view=False, **SMALL | ONE | dict(run="whole"))
        run(hooks=[StopAtSteps(6)], view=False, **SMALL | RUNS["tokens"][1] | dict(run="tokens"))
        yield folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    "Return a copy of the folder, which is the current one"
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def resume(name="r", **params):
    return run(**dict(resume=True, run=name, out_dir="runs", view=False) | params)


def result(r):
    "Return the hashes of the weights and of the optimizer at the end of a run"
    state = read_state(find_checkpoint(r.folder, "last"))
    counters = {name: v for name, v in state["counters"].items() if name in ("tokens", "best", "best_step", "sums")}
    return r.step, hash_of_weights(r.lm), hash_of([state["optimizers"], counters])


@pytest.fixture(scope="module")
def uninterrupted(trained):
    "Return the result of the run that was not stopped"
    return result(load(trained / "runs/whole"))


def again(trained, name="r"):
    "Restore a run in the current folder"
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    shutil.copytree(trained / "runs" / name, f"runs/{name}")


# Parameters

OTHER = dict(
    arch="rnn", preset="small", model_args="d_model=16 n_layers=1 n_heads=1", data="prepared270", domains="sea", recursive=True,
    weights="sea=2 wood=1", text_key="body", token_dtype="uint32",
    split="first90", tokenizer="bytes", ctx_len=4, batch_size=4, sampler="epochs", epochs=0.5, stride=2, packing="0.1", optimizer="adamw",
    orthogonalization="newton_schulz",
    lr=0.5, min_lr=0.01, steps=10, warmup=0.5, schedule="linear", cooldown=0.1, weight_decay=0.5, betas="0.5 0.9", clip=0.1,
    accum=2, dtype="bfloat16", compile=True, seed=5, eval_every=3, eval_batches=2, patience=5, init_from="runs/seed",
    freeze="embed*", lora_rank=2, lora_alpha=3.0, lora_dropout=0.5, lora_targets="qkv", lora_train="embed*",
    log_every=5, device="auto", threads=1, sample_every=4, prompt="sea", save_every=3, keep="all", keep_every=5, wait=1.0,
)  # fmt: skip
ELSEWHERE = dict(
    run="names the run", resume="is what this test is about", out_dir="names the place", data_dir="in the right combinations",
    procs="in the environment", dry_run="trains no run", allow_change="with each parameter",
)  # fmt: skip
NAMES = [f.name for f in fields(RunConfig) if f.name not in ELSEWHERE]


def test_the_table_has_every_parameter():
    "The tables of changed values and of exceptions cover every parameter of a run"
    assert {*OTHER, *ELSEWHERE} == {f.name for f in fields(RunConfig)}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] * (n == "compile")) for n in NAMES])
def test_a_changed_parameter(place, uninterrupted, name, capsys):
    "A parameter given with another value on resume is rejected by name, recorded with allow_change, or without effect"
    changed = {name: OTHER[name]}
    if name in CHANGEABLE_PARAMS:
        assert result(resume(**changed)) == uninterrupted
        return
    shown = "d_model" if name == "model_args" else name
    with pytest.raises(CheckpointError, match=f"this run has {shown}="):
        resume(**changed)
    if name in FIXED_PARAMS:
        with pytest.raises(CheckpointError, match=f"this run has {shown}=.* cannot change"):
            resume(**changed, allow_change=name)
        return
    more = (
        dict(allow_change=f"{name} data")
        if name in ("data", "domains", "split", "recursive", "text_key")
        else dict(allow_change=name)
    )
    if name == "stride":
        changed, more = changed | dict(sampler="epochs"), dict(allow_change="stride sampler")
    if name == "weights":
        changed, more = changed | dict(sampler="domains"), dict(allow_change="weights sampler")
    if name == "text_key":
        for path in Path("corpus").glob("*/*.jsonl"):
            path.write_text(path.read_text().replace('"text"', '"body"'))
    _, error, text = attempt(lambda _: resume(**changed, **more), None)
    if name == "compile":  # Not every machine has a compiler
        return
    assert not error, (error, text)
    assert f"changed {name} to " in text
    changes = read_json("runs/r/run.json")["changes"]
    assert [(c["name"], c["after"], c["step"]) for c in changes if c["name"] == name] == [(name, OTHER[name], 6)]


def test_longer_training(place):
    "More steps or epochs need no `allow_change`, and are recorded"
    r = resume(steps=14)
    assert r.step == 14 and [(c["name"], c["after"]) for c in r.info["changes"]] == [("steps", 14)]


# Places and spellings


def moved(to):
    "Move the text of the run to another place"
    Path(to).parent.mkdir(parents=True, exist_ok=True)
    shutil.move("corpus", to)
    return to


PLACES = {  # {case: () -> parameters}
    "the same": lambda: dict(data="corpus"),
    "spelled in another way": lambda: dict(data="./runs/../corpus/"),
    "absolute": lambda: dict(data=str(Path("corpus").resolve())),
    "moved": lambda: dict(data=moved("there/other name")),
    "moved to a name with blanks": lambda: dict(data=moved("ein Weg ü/corpus")),
    "another current folder": lambda: (Path("cwd").mkdir(), os.chdir("cwd")) and dict(out_dir="../runs"),
    "some model_args again": lambda: dict(n_layer=1),
    "model_args in another order": lambda: dict(model_args="n_heads=1 n_layers=1 d_model=8"),
    "all that the run was given": lambda: SMALL | ONE | dict(run="r", steps=12),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_or_spelling(place, uninterrupted, case):
    "Data with the same content at another place, and values given again, resume with the bits of the uninterrupted run"
    params = PLACES[case]()
    r = resume(**params)
    assert result(r) == uninterrupted and r.evaluate()["loss"] == r.result["last"]["loss"]
    assert resume(**{"out_dir": params.get("out_dir", "runs")}).step == 12 and load(r.folder).evaluate()


# run.json, changed by hand


def another(value):
    "Return a value of the same type"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value}x" if isinstance(value, str) else value


def set_param(name, value, info):
    info["config"][name] = value


def remove_param(name, info):
    del info["config"][name]


def rejected_or_without_effect(trained, uninterrupted, change, name):
    "Return what is wrong after a change of run.json (empty: nothing)"
    again(trained)
    info = read_json("runs/r/run.json")
    change(info)
    write_json("runs/r/run.json", info)
    r, error, text = attempt(lambda _: resume(), None)
    if error:
        known = isinstance(error, ValueError) and "run.json" in f"{error} {text}"
        return "" if known and name in str(error) else f"{name}: {error!r}"
    return "" if result(r) == uninterrupted else f"{name}: other bits, {text}"


def test_each_parameter_in_run_json(place, trained, uninterrupted):
    "A value of the configuration in run.json that was changed by hand is rejected by name, or without effect"
    problems = []
    for name in [*NAMES, "procs", "data_dir"]:
        values = [OTHER.get(name, another(getattr(RunConfig, name)))]
        for value in [*values, another(values[0])]:
            problems.append(rejected_or_without_effect(trained, uninterrupted, partial(set_param, name, value), name))
    assert not [p for p in problems if p], "\n".join(filter(None, problems))


def test_each_missing_parameter_in_run_json(place, trained, uninterrupted):
    "A parameter removed from run.json is rejected by name, or has its default in the run"
    problems = []
    for name in NAMES:
        problems.append(rejected_or_without_effect(trained, uninterrupted, partial(remove_param, name), name))
    assert not [p for p in problems if p], "\n".join(filter(None, problems))


def other_entries(value, path=()):
    "Yield the paths of the numbers and texts of run.json that are not in its configuration"
    for key, inner in value.items():
        if isinstance(inner, dict) and key != "config":
            yield from other_entries(inner, (*path, key))
        elif not isinstance(inner, (dict, list)):
            yield (*path, key)


@pytest.mark.nightly
def test_each_other_entry_of_run_json(place, trained, uninterrupted):
    "Every other number and text in run.json that was changed by hand is rejected by name, or without effect"
    problems, n = [], 0
    for *path, key in [*other_entries(read_json("runs/r/run.json"))]:

        def change(info):
            for name in path:  # noqa: B023
                info = info[name]
            info[key] = another(info[key]) if info[key] is not None else 1  # noqa: B023

        n += 1
        name = {"fingerprint": path[-1] if path else "", "ids": "token ids"}.get(key, key)
        problems.append(rejected_or_without_effect(trained, uninterrupted, change, name))
    assert n > 40 and not [p for p in problems if p], "\n".join(filter(None, problems))


# Environment


@pytest.mark.parametrize("name", environment())
def test_another_environment(place, monkeypatch, name):
    "Each condition of the environment, such as processor, threads, precision, version or device, is printed if it has changed"
    before = read_json(list_checkpoints("runs/r")[-1] / "config.json")["environment"][name]
    monkeypatch.setattr(setup, "environment", lambda *args: environment(*args) | {name: "another"})
    _, error, text = attempt(lambda _: resume(), None)
    assert not error and f"bits may differ from here on: {name} {before} → another\n" in text


def test_two_threads(place):
    "A resume with two threads instead of one prints the change"
    torch.set_num_threads(2)
    try:
        _, error, text = attempt(lambda _: resume(), None)
    finally:
        torch.set_num_threads(1)
    assert not error and "bits may differ from here on: threads 1 → 2\n" in text


def test_another_cpu(place):
    "A resume on a processor without vector instructions prints the change"
    env = os.environ | dict(ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "lmnotes", "train", "--resume", "--run", "r", "--out-dir", "runs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX"):
        assert "bits may differ from here on: cpu " in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("switch", ["MKL_CBWR", "ATEN_CPU_CAPABILITY"])
def test_a_resume_that_saved_nothing(place, switch):
    "The environment is that of the checkpoint, and not that of a later start that was killed before it saved anything"
    value, name = ("default", "cpu") if switch == "ATEN_CPU_CAPABILITY" else ("COMPATIBLE", switch)
    first = resume_elsewhere({switch: value}, "kill")
    assert resume_elsewhere({}, "kill") == ""
    assert first == resume_elsewhere({switch: value})
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX") or name == switch:
        assert first.startswith(f"bits may differ from here on: {name} ") and first.count("→") == 1


def resume_elsewhere(env, *kill):
    "Resume in a process with other environment variables, which can be killed before it saves. Return the line on bits"
    code = """if True:
        import os, sys
        from lmnotes.apps.cli import execute_command
        from lmnotes.training.trainer import Trainer
        if "kill" in sys.argv:
            Trainer.train_step = lambda t: (sys.stdout.flush(), os._exit(9))
        sys.exit(execute_command("train --resume --run r --out-dir runs".split()))"""
    env = os.environ | dict(OMP_NUM_THREADS="1") | env
    done = subprocess.run([sys.executable, "-c", code, *kill], env=env, capture_output=True, text=True)
    assert done.returncode == (9 if kill else 0), done.stderr
    return next((line for line in done.stdout.splitlines() if line.startswith("bits may differ")), "")


def test_the_same_environment(place, uninterrupted):
    "A resume in the same environment prints no change, and ends with the bits of the uninterrupted run"
    r, error, text = attempt(lambda _: resume(), None)
    assert not error and "bits may differ" not in text and result(r) == uninterrupted


# Combinations of data, tokenizer and checkpoints


def step(name="r"):
    return next(Path("runs", name).glob("step_*"))


def put_step(other, name="r"):
    target = step(name)
    shutil.rmtree(target)
    shutil.copytree(step(other), target)


def edit_text(old=b"wave", new=b"wove"):
    path = Path("corpus/sea/all.jsonl")
    times = path.stat().st_mtime
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    os.utime(path, (times, times))


def put_tokenizer(other):
    shutil.rmtree("runs/r/tokenizer")
    shutil.copytree(other, "runs/r/tokenizer")


def put_tokens(size):
    shutil.rmtree("prepared")
    shutil.copytree(f"prepared{size}", "prepared")


def change_json(path, **values):
    write_json(path, read_json(path) | values)


def newer_checkpoint():
    change_json(step() / "config.json", format=3)
    reseal(step())


def use_another_version_of_the_tokenizers_library():
    "Let the run have token ids that this version does not give"
    change_json("runs/r/run.json", data=read_json("runs/r/run.json")["data"] | dict(ids="0" * 64))


WRONG = {  # {case: (change, parameters, part of the message)}
    "text edited at the same size": (edit_text, {}, "the data has changed"),
    "text removed": (lambda: os.remove("corpus/sea/all.jsonl"), {}, "the data has changed"),
    "text added": (lambda: shutil.copy("corpus/sea/all.jsonl", "corpus/sea/more.jsonl"), {}, "the data has changed"),
    "no text": (lambda: shutil.rmtree("corpus"), {}, "If it has moved, resume the run with data='PATH': the same content needs no allow_change"),
    "other data": (lambda: None, dict(data="prepared270"), "this run has data="),
    "tokenizer of bytes": (lambda: put_tokenizer("runs/bytes/tokenizer"), {}, "is not the tokenizer of the run"),
    "tokenizer of another size": (lambda: put_tokenizer("prepared280/tokenizer"), {}, "is not the tokenizer of the run"),
    "other token ids": (use_another_version_of_the_tokenizers_library, {}, "the token ids of corpus have changed"),
    "no tokenizer": (lambda: shutil.rmtree("runs/r/tokenizer"), {}, "tokenizer: there is no such file or folder"),
    "another tokenizer given": (lambda: None, dict(tokenizer="bytes"), "this run has tokenizer="),
    "step of another seed": (lambda: put_step("seed"), {}, "run.json has seed=0, but step_00000006 was saved with 1"),
    "step of another size": (lambda: put_step("larger"), {}, "run.json has model_args="),
    "step of another architecture": (lambda: put_step("rnn"), {}, "run.json has arch='gpt'"),
    "step of another tokenizer": (lambda: put_step("bytes"), {}, "run.json has tokenizer="),
    "step of an adapter": (lambda: put_step("adapted"), {}, "base.safetensors: the base weights of the adapter are missing"),
    "renamed step": (lambda: step().rename("runs/r/step_00000005"), {}, "belongs to step_00000006"),
    "record of another run": (lambda: shutil.copy("runs/seed/run.json", "runs/r"), {}, "run.json has seed=1"),
    "record of another architecture": (lambda: shutil.copy("runs/rnn/run.json", "runs/r"), {}, "run.json has arch='rnn'"),
    "weights of another run": (lambda: shutil.copy(step("seed") / "model.safetensors", step()), {}, "model.safetensors: damaged"),
    "state of another run": (lambda: shutil.copy(step("seed") / "state.pt", step()), {}, "state.pt: damaged"),
    "configuration of another run": (lambda: shutil.copy(step("seed") / "config.json", step()), {}, "config.json: damaged"),
    "other base weights": (
        lambda: shutil.copy("runs/adapted_other/base.safetensors", "runs/adapted"), dict(name="adapted"), "not the base weights of"),
    "no base weights": (lambda: os.remove("runs/adapted/base.safetensors"), dict(name="adapted"), "base weights of the adapter are missing"),
    "adapter of other base weights": (lambda: put_step("adapted_other", "adapted"), dict(name="adapted"), "not the base weights of"),
    "tokens of another tokenizer": (lambda: put_tokens(280), dict(name="tokens"), "tokenizer"),
    "no checkpoint": (lambda: shutil.rmtree(step()), {}, "none of its step_ folders is here"),
    "no such run": (lambda: None, dict(name="x"), "there is no run here to resume"),
    "newer record": (lambda: change_json("runs/r/run.json", format=3), {}, "format 3 is not supported. This version reads formats 1 to 2. Update"),
    "newer checkpoint": (newer_checkpoint, {}, "format 3 is not supported. This version reads formats 1 to 2. Update"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_combination(place, case):
    "A run with data, a tokenizer or a checkpoint that is not its own is rejected by name, and nothing is written"
    change, params, message = WRONG[case]
    change()
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file() and p.name != ".lock"}
    _, error, text = attempt(lambda _: resume(**params), None)
    assert isinstance(error, ValueError) and message in f"{error} {text}", (error, text)
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_an_edited_log(place):
    "A record that a checkpoint counts and that was edited is named when the run is resumed"
    for name, old, new in (
        ("metrics.jsonl", b'"loss": ', b'"loss": 1'),
        ("samples.jsonl", b'"text": "', b'"text": "x'),
    ):
        path = place / "runs/r" / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new, 1))
        _, error, text = attempt(lambda _: resume(hooks=[StopAtOnce()]), None)
        assert not error and f"{name}: damaged, its first " in text, (error, text)
        path.write_bytes(whole)


def shuffle_times():
    draw = random.Random(0)
    for path in Path().rglob("*"):
        os.utime(path, (draw.randrange(2**31),) * 2)


def clear_caches():
    for path in [p for p in Path("corpus").rglob(".*") if p.exists()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def leave_lock():
    write_json("runs/r/.owner.json", dict(pid=2**22 + 1, host="elsewhere", start="2020"))


def to_another_folder(name="elsewhere"):
    Path(name).mkdir()
    shutil.move("runs/r", f"{name}/r")


RIGHT = {  # {case: (change, parameters)}
    "untouched": (lambda: None, {}),
    "shuffled times": (shuffle_times, {}),
    "renamed": (lambda: os.rename("runs/r", "runs/new"), dict(name="new")),
    "moved": (to_another_folder, dict(out_dir="elsewhere")),
    "moved to a name with blanks": (lambda: to_another_folder("ein Weg ü"), dict(out_dir="ein Weg ü")),
    "copied": (lambda: shutil.copytree("runs/r", "runs/copy"), dict(name="copy")),
    "behind a link": (lambda: os.symlink("r", "runs/link"), dict(name="link")),
    "in a linked folder": (lambda: os.symlink("runs", "linked"), dict(out_dir="linked")),
    "another current folder": (lambda: (Path("cwd").mkdir(), os.chdir("cwd")), dict(out_dir="../runs", data_dir="..")),
    "moved text": (lambda: (Path("d").mkdir(), shutil.move("corpus", "d")), dict(data_dir="d")),
    "without caches": (clear_caches, {}),
    "without copies of the vocabulary": (lambda: [p.unlink() for p in Path("runs/r/tokenizer").glob("[vm]*")], {}),
    "without pointers": (lambda: [Path("runs/r", p).unlink(missing_ok=True) for p in ("best", "last", "interrupted")], {}),
    "without the last name": (lambda: os.remove("runs/.last"), {}),
    "with the lock of a dead process": (leave_lock, {}),
    "forked": (lambda: fork("runs/r", "fork"), dict(name="fork")),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_a_right_combination(place, uninterrupted, case):
    "A run that was moved, copied, linked or touched is resumed with the bits of the uninterrupted run"
    change, params = RIGHT[case]
    change()
    assert result(resume(**params)) == uninterrupted


@pytest.mark.parametrize("value", [3, 0, "1", None, [], 1.5, {}])
def test_another_format(place, value):
    "A run.json or config.json of another format is rejected with the advice to update"
    change_json("runs/r/run.json", format=value)
    for use in (resume, lambda: load("runs/r"), lambda: fork("runs/r")):
        with pytest.raises(CheckpointError, match=r"run.json: format .* Update lmnotes"):
            use()
    change_json("runs/r/run.json", format=1)
    change_json(step() / "config.json", format=value)
    reseal(step())
    for use in (resume, lambda: load("runs/r"), lambda: fork("runs/r")):
        with pytest.raises(CheckpointError, match=r"config.json: format .* Update lmnotes"):
            use()


# Recorded changes


def changed_and_killed(**params):
    "Resume the run with changed parameters, and end before it saves. Return run.json"
    with pytest.raises(SystemExit):
        resume(hooks=[KillAt(7)], allow_change=" ".join(params), **params)
    return read_json("runs/r/run.json")


def edit_value(info):
    info["config"]["lr"] = 0.05


def edit_before(info):
    info["changes"][-1]["before"] = 0.02


def remove_change(info):
    del info["changes"][0]


@pytest.mark.parametrize("edit", [edit_value, edit_before, remove_change])
@pytest.mark.parametrize("use", [resume, lambda: load("runs/r"), lambda: fork("runs/r", "fork")])
def test_recorded_changes_are_a_chain(place, edit, use):
    "A value in run.json that its recorded changes do not lead to is rejected by name"
    changed_and_killed(lr=0.003)
    info = changed_and_killed(lr=0.004)
    assert [(c["before"], c["after"]) for c in info["changes"]][1:] == [(0.003, 0.004)]
    edit(info)
    write_json("runs/r/run.json", info)
    with pytest.raises(CheckpointError, match=r"run\.json has lr=.* was saved with"):
        use()


@pytest.mark.parametrize("changes", [None, "lr", {}, [5], [{}], [dict(step="6", name="lr", before=0.0, after=0.1)], [dict(step=6, name=["lr"], before=0.0, after=0.1)]])  # fmt: skip
def test_damaged_changes(place, changes):
    "Changes of another type are rejected by name"
    change_json("runs/r/run.json", changes=changes)
    for use in (resume, lambda: load("runs/r"), lambda: fork("runs/r", "fork")):
        with pytest.raises(CheckpointError, match=r"run\.json: damaged, or not such a file of a run: changes"):
            use()


def test_an_edited_value_that_is_allowed(place):
    "A value that was edited, and is allowed, becomes a recorded change, so the next resume accepts it"
    info = changed_and_killed(lr=0.003)
    edit_value(info)
    write_json("runs/r/run.json", info)
    with pytest.raises(SystemExit):
        resume(hooks=[KillAt(7)], allow_change="lr")
    assert [c["after"] for c in read_json("runs/r/run.json")["changes"]] == [0.003, 0.05]
    assert resume().status == "done"


def test_a_fork_has_the_changes_until_its_step(place):
    "Forks before, at and after changes have the changes that lead to their values, and can be resumed and forked"
    resume(lr=0.003, allow_change="lr", hooks=[StopAtSteps(8)], keep="all")
    resume(lr=0.004, clip=0.5, allow_change="lr clip", keep="all")
    for number, changes in {6: [], 8: [("lr", 0.003)], 12: [("lr", 0.003), ("lr", 0.004), ("clip", 0.5)]}.items():
        name = fork(f"runs/r/step_{number:08d}", f"from{number}")
        info = read_json(f"runs/{name}/run.json")
        assert [(c["name"], c["after"]) for c in info["changes"]] == changes
        assert fork(f"runs/{name}", f"again{number}") and load(f"runs/{name}").step == number
        assert resume(name, steps=14, allow_change="steps").step == 14


# Runs without checkpoints


class KillAt(Hook):
    "Hook that raises an error at a step, as if the process was killed there"

    def __init__(self, step):
        self.step = step

    def after_step(self, t):
        if t.step == self.step:
            raise SystemExit


def killed_at(step, **params):
    "Train a new run until it is killed, and return its folder, whose record has the status of a killed run"
    with pytest.raises(SystemExit):
        run(hooks=[KillAt(step)], view=False, **SMALL | ONE | dict(run="killed") | params)
    change_json("runs/killed/run.json", status="running", step=0)
    return Path("runs/killed")


@pytest.mark.parametrize("ending", ["killed", "resumed and killed", "failed", "diverged"])
def test_a_run_that_has_saved_never_starts_over(place, ending):
    "Without its checkpoints and pointers, a run that has saved is not started over, and its records stay"
    folder = killed_at(7)
    if ending == "resumed and killed":  # In a version that did not note the first save
        change_json(folder / "run.json", step=4, saved=False)
    elif ending != "killed":
        change_json(folder / "run.json", status=ending, step=7)
    for path in [*folder.glob("step_*"), folder / "last", folder / "best"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    records = (folder / "metrics.jsonl").read_bytes()
    for value in (True, "auto"):
        with pytest.raises(CheckpointError, match="none of its step_ folders is here"):
            resume("killed", resume=value)
    assert records and (folder / "metrics.jsonl").read_bytes() == records


@pytest.mark.parametrize("status", ["running", "failed", "diverged"])
def test_a_run_that_has_not_saved_starts_over(place, uninterrupted, status):
    "A run that ended before its first save starts over by itself, with the bits of the uninterrupted run"
    folder = killed_at(3)
    change_json(folder / "run.json", status=status, step=3 if status != "running" else 0)
    assert result(resume("killed", resume="auto")) == uninterrupted


def test_complete_checkpoints_with_temporary_names(place, uninterrupted, capsys):
    "A complete checkpoint with a temporary name is named again, and one that is not complete is removed"
    folder = Path("runs/r")
    shutil.copytree(step(), folder / ".step_00000004.77.tmp")
    (folder / ".step_00000004.77.tmp/state.pt").write_bytes(b"")
    step().rename(folder / ".step_00000006.77.tmp")
    for name in ("last", "best", "interrupted"):
        (folder / name).unlink(missing_ok=True)
    assert result(resume()) == uninterrupted
    assert ".step_00000006.77.tmp is a complete checkpoint, and is step_00000006 again" in capsys.readouterr().out
    assert not list(folder.glob(".*.tmp")) and not list(folder.glob("step_00000004"))


@pytest.mark.parametrize("params", [{}, dict(lora_rank=1, optimizer="adamw")], ids=["weights", "base of adapters"])
def test_replaced_initial_weights(place, params):
    "If a run starts over, and the run that it started from was replaced, it is rejected, and nothing is written"
    shutil.copytree("runs/seed", "runs/base")
    folder = killed_at(3, init_from="base", **params)
    shutil.rmtree("runs/base")
    shutil.copytree("runs/whole", "runs/base")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", ".owner.json")}
    with pytest.raises(CheckpointError, match="the initial weights have changed.* init_from='base' has "):
        resume("killed")
    assert {p: p.read_bytes() for p in before} == before
    shutil.rmtree("runs/base")
    shutil.copytree("runs/seed", "runs/base")
    assert resume("killed").status == "done"


def test_the_best_checkpoint_of_an_early_stop(place, monkeypatch, capsys):
    "If the best step could not be saved, the last line names the step that `which='best'` loads"
    as_it_is, best = saving.save_checkpoint, []

    def save(folder, lm, step, state, **metadata):
        if step == state["counters"]["best_step"] and best:
            raise CheckpointError("disk full")
        best.append(step)
        return as_it_is(folder, lm, step, state, **metadata)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    params = dict(run="early", patience=1, eval_every=1, steps=200, lr=0.05, save_every=100, keep="all")
    r = run(view=False, **SMALL | params)
    saved = int(find_checkpoint(r.folder, "best").name[5:])
    assert r.status == "early_stop" and saved < r.result["best_step"]
    assert f"The best checkpoint is from step {saved:,} (which='best')" in capsys.readouterr().out


# The clock


CLOCKS = "clock set back", "another time zone", "other times of the files"


@pytest.mark.parametrize("case", CLOCKS)
def test_the_clock_chooses_nothing(place, uninterrupted, monkeypatch, case):
    "With the clock set back, another time zone or other file times, the same checkpoints and runs are chosen"
    found = lambda: [find_checkpoint("runs/whole", which).name for which in ("", "best", "last", "final")]  # noqa: E731
    before = found(), last_run_name("runs")
    if case == "clock set back":
        monkeypatch.setattr(core, "utc_now", lambda: "1990-01-01T00:00:00+00:00")
        monkeypatch.setattr(time, "time", lambda: 0.0)
    elif case == "another time zone":
        monkeypatch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
    else:
        shuffle_times()
    try:
        assert (found(), last_run_name("runs")) == before
        assert result(resume()) == uninterrupted
        assert last_run_name("runs") == "r" and load("runs/r").step == 12
        assert json.loads(Path("runs/r/run.json").read_bytes())["status"] == "done"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_change_without_steps_left_is_an_error(place):
    "A finished run records no change that would have no effect"
    with pytest.raises(ValueError, match="the run has ended at step 12, so lr=0.5 has no effect. Increase steps too"):
        resume(name="whole", lr=0.5, allow_change="lr")
