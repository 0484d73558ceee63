"""Every file of a run folder is damaged in every way: a use of the run names the file, or has the result of the undamaged run."""

import ctypes
import json
import random
import shutil
import socket
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial

import pytest
from small_runs import RUNS, SMALL, StopAtOnce, attempt, hash_of, hash_of_weights, trained_runs, trajectory

from lmnotes.core import CheckpointError, DataError, TokenizerError, sha256_file, write_json
from lmnotes.inspect.verify import verify
from lmnotes.runs.folder import fork
from lmnotes.runs.load import load
from lmnotes.runs.monitor import attach
from lmnotes.runs.replay import MISMATCH
from lmnotes.runs.run import run
from lmnotes.training import checkpoint
from lmnotes.training.checkpoint import checkpoint_name, read_state

LIBRARY_ERRORS = CheckpointError, DataError, TokenizerError, ValueError

# Ways to damage a file. Each is a function of (content, random numbers, content of another file)


def flip(data, draw, other):
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def zero_block(data, draw, other):
    at, size = draw.randrange(len(data)), draw.choice([1, 16, 512])
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def truncate(data, draw, other):
    return data[: draw.randrange(len(data))]


def insert(data, draw, other):
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice([1, 8, 64])) + data[at:]


def duplicate(data, draw, other):
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[at:]


def swap(data, draw, other):
    return other


def empty(data, draw, other):
    return b""


def bad_utf8(data, draw, other):
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + data[at:]


def remove_line(data, draw, other):
    lines = data.splitlines(keepends=True)
    del lines[draw.randrange(len(lines))]
    return b"".join(lines)


def repeat_line(data, draw, other):
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    return b"".join([*lines[:at], lines[at], *lines[at:]])


def other_name(data, draw, other):
    names = "step_00000004 step_00000099 ../other . / step_ other \x1b[2J".split()
    return draw.choice([*names, "", "a" * 5000, "step_00000012\0"]).encode() + b"\n"


def other_kind(data, draw, other):
    return draw.choice([b"null", b"[]", b'"text"', b"5", b"NaN", b"{}", b"[" * 9999, b'{"a": 1}', b"true"]) + b"\n"


def entries(value, path=()):
    "Yield the paths of all entries of nested dicts and lists"
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from entries(value[key], (*path, key))


def change_json(data, draw, other):
    "Remove, add or replace one entry of a JSON file, or of one line of it"
    lines = data.splitlines(keepends=True) if data.count(b"\n{") else [data]
    at = draw.randrange(len(lines))
    value = json.loads(lines[at])
    *path, key = draw.choice([*entries(value)])
    inside = value
    for name in path:
        inside = inside[name]
    change = draw.choice(["remove", "add", *["replace"] * 4])
    if change == "remove":
        del inside[key]
    elif change == "add" and isinstance(inside, dict):
        inside["unknown"] = 1
    else:
        new = [None, True, -1, 10**30, 0.5, "text", "", [], {}, [1], float("nan"), float("inf"), f"{inside[key]}x"]
        inside[key] = draw.choice(new)
    lines[at] = json.dumps(value).encode() + b"\n"
    return b"".join(lines)


BYTES = flip, zero_block, truncate, insert, duplicate, swap, empty, bad_utf8
TEXT = remove_line, repeat_line, other_name, other_kind
JSON = remove_line, repeat_line, other_kind, change_json, change_json, change_json


def ways(path):
    "Return the ways to damage a file: functions, and the names of those that need no content"
    text = JSON if path.suffix in (".json", ".jsonl") or path.name == ".owner.json" else ()
    text = text or (TEXT if not path.suffix or path.suffix == ".txt" else ())
    return *BYTES, *text, "folder", "missing"


def damage(path, way, draw, other):
    "Damage a file. Return False if its content is as before"
    data = path.read_bytes()
    if way in ("folder", "missing"):
        path.unlink()
        path.mkdir() if way == "folder" else None
        return True
    new = way(data, draw, other.read_bytes())
    if path.name in checkpoint.POINTERS and new.strip() == data.strip():  # A line end alone has no meaning
        return False
    path.write_bytes(new)
    return path.read_bytes() != data


# Uses of a run. Each returns {name: value} of everything that it finds


def records(folder):
    paths = [folder / name for name in ("metrics.jsonl", "samples.jsonl")]
    found = dict.fromkeys(path.name for path in paths)
    for path in paths:
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            found[path.name] = path.read_bytes()
    return found


def use_load(folder, which=""):
    r = load(folder, which)
    found = dict(step=r.step, config=trajectory(asdict(r.config)), weights=hash_of_weights(r.lm), metrics=r.metrics)
    return found | dict(tokenizer=r.tokenizer.fingerprint)


def use_resume(folder, name=None, resume=True):
    hook = StopAtOnce()
    r = run(resume=resume, run=folder.name if name is None else name, out_dir=folder.parent, hooks=[hook], view=False)
    found = dict(step=r.step, cfg=trajectory(asdict(r.config)), weights=hash_of_weights(r.lm))
    if not hasattr(hook, "found"):  # It was finished
        found["state"] = hash_of(read_state(r.folder / checkpoint_name(r.step)))
    return {**found, **vars(hook).get("found", {}), **records(r.folder)}


def use_attach(folder):
    view = attach(folder).refresh()
    str(view)
    return dict(metrics=view.metrics, samples=view.samples)


def use_fork(folder):
    new = folder.parent / fork(folder, run="forked")
    files = [p for p in sorted(new.rglob("*")) if p.is_file() and p.name not in ("run.json", "manifest.json")]
    found = {str(p.relative_to(new)): p.read_bytes() for p in files}
    record = json.loads((new / "run.json").read_bytes())
    content = record["data"]["fingerprint"], record["tokenizer"]["fingerprint"]
    return found | dict(config=trajectory(record["config"]), model=record["model"], content=content)


def use_verify(folder):
    report = verify(folder)
    if report.parts(MISMATCH):
        raise CheckpointError(repr(report))
    return {}


USES = {
    "load": use_load,
    "load best": lambda folder: use_load(folder, "best"),
    "load last": lambda folder: use_load(folder, "last"),
    "load ended": lambda folder: use_load(folder, "interrupted" if folder.name == "stopped" else "final"),
    "resume": use_resume,
    "resume auto": partial(use_resume, resume="auto"),
    "attach": use_attach,
    "fork": use_fork,
    "verify": use_verify,
}
OF_THE_LAST_RUN = {
    "load": lambda folder: use_load(""),
    "attach": lambda folder: use_attach(""),
    "resume": lambda folder: use_resume(folder, ""),
}


# The judgement


def is_named(path, folder, text):
    "Return True if a text names a file or, inside a run, its checkpoint or tokenizer"
    part = path.relative_to(folder).parts[0] if folder in path.parents else path.name
    return (
        part in text
        if part.startswith(("step_", "tokenizer", ".", "base"))
        else f"/{part}" in text or f"{part} " in text or f"no '{part}' checkpoint" in text
    )


LOGS = "metrics.jsonl", "samples.jsonl"
COMPARED_BY_MEANING = "run.json", ".owner.json", "manifest.json", "tokenizer.json"  # They have no hash


def checked(path, result):
    "Return a result without the records in a damaged log: `load` and `attach` show them as they are, for `verify` to check"
    return {name: v for name, v in result.items() if path.name not in LOGS or name not in ("metrics", "samples")}


def judge(path, folder, name, whole, found):
    "Return what is wrong with a use of a damaged run (empty: nothing)"
    result, error, text = found
    if error:
        if type(error) not in LIBRARY_ERRORS:
            return f"foreign exception {type(error).__name__}: {error}"
        return "" if is_named(path, folder, f"{error} {text}") else f"not named: {type(error).__name__}: {error}"
    if name == "verify":
        return "" if path.name in COMPARED_BY_MEANING else "not reported"
    if checked(path, result) == checked(path, whole) or is_named(path, folder, text):
        return ""
    return f"silent: {', '.join(n for n in whole | result if whole.get(n) != result.get(n))} differ"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Return the folder of the runs, each with the files of a process that was killed"
    with trained_runs(tmp_path_factory.mktemp("damaged"), RUNS) as runs:
        for name in RUNS:
            owner = dict(pid=2**22 + 1, host=socket.gethostname(), start="2026-01-01T00:00:00+00:00")
            write_json(runs / name / ".owner.json", owner)
        yield runs


def restore(trained, folder):
    "Copy a run again, and remove what a use has added"
    for path in folder.parent.iterdir():
        if path.name not in RUNS and path.name != ".last":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder)
    shutil.copytree(trained / folder.name, folder)


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def counterpart(path, folder, draw):
    "Return another file of the same name, or of the same run"
    same = folder.parent / "other" / path.relative_to(folder)
    return same if draw.random() < 0.6 and same.is_file() else draw.choice([p for p in files_of(folder) if p != path])


def is_longer_log(path, content):
    "Return True if a log has only grown: a stopped run may have records after its last checkpoint"
    return path.name in LOGS and path.is_file() and path.read_bytes().startswith(content)


def results_of_uses(trained, folder):
    "Return {use: result} of an undamaged run"
    whole = {}
    for use, fn in USES.items():
        whole[use], error, text = attempt(fn, folder)
        assert not error, (use, error, text)
        restore(trained, folder)
    return whole


def check_run(trained, runs, name, n_draws, uses):
    "Damage every file of a run in every way, and return (number of cases, problems). `uses` are named, or a number to draw"
    folder, problems, n = runs / name, [], 0
    whole = results_of_uses(trained, folder)
    for path in files_of(folder):
        for i, way in enumerate(ways(path)):
            kind = getattr(way, "__name__", way)
            for number in range(n_draws if kind not in ("empty", "folder", "missing") else 1):
                draw = random.Random(f"{path.relative_to(runs)} {i} {number}")
                for use in uses if isinstance(uses, list) else draw.sample([*USES], uses):
                    draw_again = random.Random(f"{path.relative_to(runs)} {i} {number} {use}")
                    content = path.read_bytes()
                    if not damage(path, way, draw_again, counterpart(path, folder, draw_again)):
                        continue
                    if name == "stopped" and is_longer_log(path, content):
                        restore(trained, folder)
                        continue
                    n += 1
                    content = path.read_bytes()[:200] if path.is_file() else b""
                    if problem := judge(path, folder, use, whole[use], attempt(USES[use], folder)):
                        problems.append(
                            f"{path.relative_to(runs)} {kind} {number}, {use}: {problem} {content if len(problem) < 5 else ''}"
                        )
                    restore(trained, folder)
    return n, problems


@pytest.mark.parametrize("name", ["stopped", "adapted"])
def test_every_file_of_a_run(trained, runs, name):
    "Every file of a run is damaged in every way and used in one way: the damage is named, or the result is that of the undamaged run"
    n, problems = check_run(trained, runs, name, 1, 1)
    assert not problems, "\n".join(problems)
    assert n > 200


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", RUNS)
def test_every_file_of_a_run_in_more_ways(trained, runs, name, use):
    "Each of four times as many damages is named by every use, or the result is that of the undamaged run (over 10,000 cases in all)"
    n, problems = check_run(trained, runs, name, 4, [use])
    assert not problems, "\n".join(problems)
    assert n > 500


@contextmanager
def without_rights_of_root():
    "Let the modes of files hold for this thread, also if it belongs to root"
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # Effective, permitted and inheritable capabilities, in two halves
    assert libc.capget(header, before) == 0
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.parametrize("name", ["stopped", "adapted"])
def test_files_without_permission(trained, runs, name):
    "Each file of a run that this user may not read is named, or the result is that of the whole run"
    folder, problems = runs / name, []
    whole = results_of_uses(trained, folder)
    for path in files_of(folder):
        for use in random.Random(path.name).sample([*USES], 4):
            path.chmod(0)
            with without_rights_of_root():
                with pytest.raises(PermissionError):
                    path.read_bytes()
                found = attempt(USES[use], folder)
            if problem := judge(path, folder, use, whole[use], found):
                problems.append(f"{path.relative_to(runs)} {use}: {problem}")
            restore(trained, folder)
    assert not problems, "\n".join(problems)


def whole_and_damaged(trained, folder, harm, use):
    "Return the results of a use of a run and of the run after a function has harmed it"
    whole = attempt(use, folder)
    restore(trained, folder)
    harm()
    return whole[0], attempt(use, folder)


@pytest.mark.parametrize("left", ["checkpoints", "pointers"])
def test_a_missing_record(trained, runs, left):
    "If run.json is lost, no run starts in its place, and the error names the way to continue"
    folder = runs / "done"
    (folder / "run.json").unlink()
    for path in folder.glob("step_*") if left == "pointers" else [folder / name for name in checkpoint.POINTERS]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = [p for p in files_of(runs) if p.name != ".owner.json"]
    for use in ("resume", "resume auto", "attach"):
        with pytest.raises(CheckpointError, match=r"run\.json: missing, though \d checkpoints are here\. Restore it"):
            USES[use](folder)
    assert [p for p in files_of(runs) if p.name != ".owner.json"] == before
    if left == "checkpoints":
        given = dict(init_from=str(folder), tokenizer=str(folder / "tokenizer"))
        assert run(**SMALL | dict(run="new", out_dir=str(runs), view=False) | given).status == "done"


def test_a_folder_in_place_of_the_owner(runs):
    "An error names a folder in place of .owner.json, and frees the lock. Without the folder the run resumes"
    owner = runs / "stopped/.owner.json"
    owner.unlink()
    owner.mkdir()
    for use in ("resume", "resume auto"):
        with pytest.raises(CheckpointError, match=r"\.owner\.json: is a folder, expected a file\. Remove it"):
            USES[use](runs / "stopped")
    owner.rmdir()
    assert USES["resume"](runs / "stopped")


HARMS = {
    "missing": lambda newest, older, other: shutil.rmtree(newest),
    "empty": lambda newest, older, other: (shutil.rmtree(newest), newest.mkdir()),
    "a file": lambda newest, older, other: (shutil.rmtree(newest), newest.write_bytes(b"step")),
    "of another run": lambda newest, older, other: (shutil.rmtree(newest), shutil.copytree(other, newest)),
    "an older step": lambda newest, older, other: (shutil.rmtree(newest), shutil.copytree(older, newest)),
    "exchanged": lambda newest, older, other: exchange(newest, older),
    "a step of the future": lambda newest, older, other: shutil.copytree(newest, newest.with_name("step_00000099")),
    "a dead link": lambda newest, older, other: (shutil.rmtree(newest), newest.symlink_to("nowhere")),
}


def exchange(a, b):
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


@pytest.mark.parametrize("harm", HARMS)
def test_step_folders(trained, runs, harm):
    "A checkpoint folder that is missing, empty, exchanged or of another run is named by every use"
    for name in ("done", "stopped"):
        folder, problems = runs / name, []
        older, newest = sorted(folder.glob("step_*"))[-2:]
        parts = newest, older, runs / "other/step_00000012"
        for use, fn in USES.items():
            whole, found = whole_and_damaged(trained, folder, partial(HARMS[harm], *parts), fn)
            changed = [newest, older, newest.with_name("step_00000099"), folder / "run.json"]
            verdicts = [judge(path, folder, use, whole, found) for path in changed]
            if all(verdicts):
                problems.append(f"{name}, {use}: {verdicts[0]}")
            restore(trained, folder)
        assert not problems, "\n".join(problems)


@pytest.mark.parametrize("which", ["", "best"])
def test_load_hashes_each_file_once(runs, monkeypatch, which):
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    load(runs / "done", which)
    assert len(hashed) == len(set(hashed)) and {path.name for path in hashed} >= {"model.safetensors", "state.pt"}


LAST = {
    "bad UTF-8": b"\xff\xfe", "another text": b"nothing", "empty": b"", "outside": b"../runs/done", "control": b"\x1b[2J\n",
    "long": b"a" * 9999, "zeros": bytes(9), "lines": b"done\nother\n", "parent": b"..\n", "absolute": b"/\n",
}  # fmt: skip


@pytest.mark.parametrize("harm", [*LAST, "folder", "missing"])
def test_the_name_of_the_last_run(trained, runs, harm):
    "A damaged .last is named, and a missing one is replaced by the time of the last update"
    last, folder, problems = runs / ".last", runs / "other", []
    for use, fn in OF_THE_LAST_RUN.items():
        for path in runs.glob("*/run.json"):
            record = json.loads(path.read_bytes())
            write_json(path, record | dict(updated=f"2026-01-0{2 if path.parent == folder else 1}"))
        last.write_text("other\n")
        whole, error, _ = attempt(fn, folder)
        assert not error, error
        last.write_text("other\n")
        if harm in LAST:
            last.write_bytes(LAST[harm])
        else:
            last.unlink()
            last.mkdir() if harm == "folder" else None
        result, error, text = attempt(fn, folder)
        if error and (type(error) not in LIBRARY_ERRORS or str(last) not in str(error)):
            problems.append(f"{use}: {error!r}")
        if not error and (result != whole or (harm != "missing" and str(last) not in text)):
            problems.append(f"{use}: silent {text}")
        shutil.rmtree(last) if last.is_dir() else last.unlink(missing_ok=True)
    assert not problems, problems
