"""Every entry of every file of a run has a wrong type or size in turn: each use raises an error of the library, or works."""

import copy
import json
import random
import shutil
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import RUNS, attempt, trained_runs

from lmnotes.apps.doctor import doctor
from lmnotes.core import CheckpointError, DataError, OutOfMemoryError, TokenizerError, sha256_file, write_json
from lmnotes.export.model_card import model_card, public_record
from lmnotes.inspect.diff import diff
from lmnotes.inspect.report import summarize_run
from lmnotes.inspect.verify import verify
from lmnotes.runs.folder import fork, last_run_name
from lmnotes.runs.load import load
from lmnotes.runs.monitor import attach
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import list_checkpoints

LIBRARY_ERRORS = CheckpointError, DataError, TokenizerError, OutOfMemoryError
REMOVED = object()
JSON_VALUES = [
    *(REMOVED, None, True, 5, -1, 2**62, 2**70, 10**400, 1.5, 1e-320, -9e18, 1e400, float("nan")),
    *("x", "", "\0", "0001-01-01T00:00:00", [], {}, [5], [{}], {"a": 5}, [["a", 5]]),
]
STATE_VALUES = [v for v in JSON_VALUES if v != 10**400] + [torch.zeros(3), torch.tensor(float("nan")), (1, 2), {5: {}}]

# The files: for each, a function that returns its content and one that writes it again


def newest(folder):
    return list_checkpoints(folder)[-1]


def reseal(checkpoint_folder):
    "Write a manifest with the hashes that the files have now, as a forger can"
    path = checkpoint_folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        file = checkpoint_folder / name
        manifest["files"][name] = dict(size=file.stat().st_size, sha256=sha256_file(file))
    write_json(path, manifest)


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in (records if isinstance(records, list) else [records])))


def write_plain(path, value):
    path.write_text(json.dumps(value))


def write_config(path, value):
    write_plain(path, value)
    reseal(path.parent)


def write_state(path, value):
    torch.save(value, path)
    reseal(path.parent)


def read_plain(path):
    return json.loads(path.read_bytes())


FILES = {
    "run.json": (lambda folder: folder / "run.json", read_plain, write_plain, JSON_VALUES),
    "metrics.jsonl": (lambda folder: folder / "metrics.jsonl", read_lines, write_lines, JSON_VALUES),
    "samples.jsonl": (lambda folder: folder / "samples.jsonl", read_lines, write_lines, JSON_VALUES),
    "config.json": (lambda folder: newest(folder) / "config.json", read_plain, write_config, JSON_VALUES),
    "state.pt": (lambda folder: newest(folder) / "state.pt", partial(torch.load, weights_only=True), write_state, STATE_VALUES),
}  # fmt: skip


def entries(value, path=()):
    "Yield the paths of all entries of nested dicts and lists"
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, (list, tuple)) else ():
        yield (*path, key)
        yield from entries(value[key], (*path, key))


def changed(content, path, value):
    "Return a copy of nested dicts and lists with another value at a path"
    if not path:
        return value
    new = list(content) if isinstance(content, tuple) else copy.copy(content)
    if len(path) == 1 and value is REMOVED:
        del new[path[0]]
    else:
        new[path[0]] = changed(content[path[0]], path[1:], value)
    return new


# The uses


def use_load(folder):
    r = load(folder, device="cpu")
    repr(summarize_run(r))
    return r.generate("a", 2)


def use_evaluate(folder):
    return load(folder, device="cpu").evaluate()


def use_resume(folder):
    return run(resume=True, run=folder.name, out_dir=str(folder.parent), view=False)


def use_watch(folder):
    view = attach(folder)
    view.alive = True
    return str(view), view.figure()


def use_watch_running(folder):
    view = attach(folder)
    view.info, view.alive = view.info | dict(status="running"), True
    return str(view)


def use_card(folder):
    r = load(folder, device="cpu")
    return model_card(r, r.lm, ["x"]), json.dumps(public_record(r.info))


USES = {
    "load": use_load,
    "load best": lambda folder: load(folder, "best", device="cpu"),
    "evaluate": use_evaluate,
    "resume": use_resume,
    "fork": lambda folder: fork(folder, run="forked"),
    "watch": use_watch,
    "watch running": use_watch_running,
    "diff": lambda folder: repr(diff(folder, folder.parent / "other")),
    "card": use_card,
    "verify": lambda folder: repr(verify(folder)),
    "doctor": lambda folder: repr(doctor(folder)),
    "last run": lambda folder: last_run_name(folder.parent),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Return the folder of two runs, one of them stopped at a checkpoint"
    names = {name: RUNS[name] for name in ("stopped", "other")}
    with trained_runs(tmp_path_factory.mktemp("types"), names) as runs:
        yield runs


def place_of(error):
    "Return the line of the library that raised an error"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "lmnotes/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def problem_of(use, folder):
    "Return what is wrong with the error of a use (empty: nothing)"
    _, error, _ = attempt(USES[use], folder)
    if not error or type(error) in LIBRARY_ERRORS or (type(error) is ValueError and "=" in str(error)):
        return ""
    return f"{type(error).__name__} in {place_of(error)}: {error}"


def fresh_copy(trained, tmp_path):
    "Return a new copy of the stopped run, beside the other run"
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    shutil.copytree(trained, tmp_path / "runs")
    (tmp_path / "runs/.last").unlink(missing_ok=True)
    return tmp_path / "runs/stopped"


def draw_cases(content, values, draw, n):
    "Return `n` different (path, value) of a file, with the same number for each entry at the top"
    groups = {}
    for path in [(), *entries(content)]:
        groups.setdefault(path[:1], []).extend((path, value) for value in values if path or value is not REMOVED)
    for group in groups.values():
        draw.shuffle(group)
    turns = range(max(map(len, groups.values())))
    return [group[i] for i in turns for group in groups.values() if i < len(group)][:n]


def check_file(trained, tmp_path, name, n, n_uses):
    "Change a file in `n` ways, each with `n_uses` uses. Return (number of cases, problems)"
    draw, count, problems = random.Random(name), 0, {}
    locate, read, write, values = FILES[name]
    content = read(locate(trained / "stopped"))
    for path, value in draw_cases(content, values, draw, n):
        folder = fresh_copy(trained, tmp_path)
        write(locate(folder), changed(content, path, value))
        for use in draw.sample([*USES], n_uses):
            if use in ("resume", "fork"):  # They write
                folder = fresh_copy(trained, tmp_path)
                write(locate(folder), changed(content, path, value))
            count += 1
            if problem := problem_of(use, folder):
                shown = "removed" if value is REMOVED else repr(value)[:60]
                problems.setdefault((use, problem[:100]), f"{use}, {'.'.join(map(str, path))}={shown}: {problem}")
    return count, [*problems.values()]


@pytest.mark.parametrize("name", FILES)
def test_wrong_types(trained, tmp_path, name):
    n, problems = check_file(trained, tmp_path, name, 20, 2)
    assert not problems, "\n".join(problems)
    assert n >= 30


@pytest.mark.parametrize("size", ["ctx_len", "batch_size"])
def test_a_recorded_size_that_needs_much_memory(trained, tmp_path, size):
    "No use allocates memory for a size that the run cannot have been trained with"
    folder, value = fresh_copy(trained, tmp_path), 3_000_000_000
    for name, key in (("config.json", "params"), ("run.json", "config")):
        locate, read, write, _ = FILES[name]
        content = read(locate(folder))
        write(locate(folder), changed(content, (key, size), value))
    for use in ("load", "evaluate", "resume", "watch", "fork"):
        _, error, _ = attempt(USES[use], folder)
        assert type(error) is CheckpointError and "tokens per step" in str(error), use


def test_a_context_window_over_the_data(trained, tmp_path):
    folder = fresh_copy(trained, tmp_path)
    for name, key in (("config.json", "params"), ("run.json", "config")):
        locate, read, write, _ = FILES[name]
        write(locate(folder), changed(read(locate(folder)), (key, "ctx_len"), 1 << 20))
    for use in ("evaluate", "resume"):
        _, error, _ = attempt(USES[use], folder)
        assert type(error) is DataError and "Use a smaller ctx_len" in str(error), (use, error)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FILES)
def test_more_wrong_types(trained, tmp_path, name):
    n, problems = check_file(trained, tmp_path, name, 500, 4)
    assert not problems, "\n".join(problems)
    assert n >= 500
