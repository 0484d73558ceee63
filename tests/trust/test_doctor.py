"""`lmnotes doctor` names what is wrong with a run, and the command it prints repairs or continues the run."""

import json
import os
import shlex
import shutil
import signal
import socket
from collections import namedtuple

import pytest
from helpers import (
    TINY,
    lmnotes_command,
    pause_before_step,
    read_log,
    run_in_process,
    start_process,
    train,
    wait_for_exit,
    wait_until,
)

from lmnotes.apps import doctor as module
from lmnotes.apps.doctor import doctor
from lmnotes.core import CheckpointError, read_json, write_json
from lmnotes.inspect.report import inspect_run
from lmnotes.inspect.verify import verify
from lmnotes.runs.folder import fork
from lmnotes.runs.run import run
from lmnotes.runs.setup import environment_changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    "Return a folder with a finished run and an interrupted one"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    assert run_in_process(folder, train, **TINY | dict(keep="all")) == 0, read_log(folder)
    assert run_in_process(folder, train, 17, **TINY | dict(run="stopped")) == 130, read_log(folder)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    "Return a copy of the runs, in the current folder, with commands as on the command line"
    shutil.copytree(trained, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    monkeypatch.setenv("LMNOTES_COMMAND", "lmnotes train")
    (tmp_path / "again/log").unlink()
    return tmp_path / "again/runs"


def problems(path):
    "Return {subject: (detail, command)} of the problems of a run"
    return {row["about"]: (row["detail"], row["command"]) for row in doctor(path).problems}


def follow(runs, command):
    "Run a command that the doctor printed"
    return run_in_process(runs.parent, lmnotes_command, *shlex.split(command)[1:])


def change(path, **values):
    write_json(path, read_json(path) | values)


def test_the_machine():
    facts = doctor().facts
    assert {"torch", "python", "cpu", "threads", "dtype", "GPU", "tokenizers", "runs", "data"} <= set(facts)
    assert "GB free" in facts["runs"] and "torch" in repr(doctor()) and "| torch |" in doctor()._repr_markdown_()


def test_a_finished_run_is_well(runs):
    "`doctor` reports no problem for a finished run"
    report = doctor(runs / "r")
    assert report.problems == [] and {row["state"] for row in report.findings} <= {"ok", "note"}
    assert "done at step 40 of 40" in repr(report)


def test_an_interrupted_run_is_resumed_by_the_printed_command(runs):
    report = doctor(runs / "stopped")
    status = report.findings[0]
    assert report.problems == [] and status["detail"] == "interrupted at step 17 of 40"
    assert follow(runs, status["command"]) == 0, read_log(runs.parent)
    assert read_json(runs / "stopped/run.json")["status"] == "done"


def test_a_killed_run(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("LMNOTES_COMMAND", "lmnotes train")
    process = start_process(workdir, pause_before_step, 25, train, **TINY)
    wait_until((workdir / "reached").exists, process)
    report = doctor("runs/r")  # While it trains
    assert "running at step" in report.findings[0]["detail"] and str(process.pid) in report.findings[0]["detail"]
    assert report.findings[0]["state"] == "note" and not report.findings[0]["command"]
    os.kill(process.pid, signal.SIGKILL)
    wait_for_exit(process)
    report = doctor("runs/r")
    assert report.problems[0]["about"] == "status" and "no process holds the lock" in report.problems[0]["detail"]
    assert "killed at step 20 of 40" in report.problems[0]["detail"]
    assert ".owner.json" in [row["about"] for row in report.findings]
    (workdir / "go").touch()
    assert run_in_process(workdir, lmnotes_command, *shlex.split(report.problems[0]["command"])[1:]) == 0
    assert doctor("runs/r").problems == []


def test_an_owner_on_another_machine(runs):
    owner = dict(pid=1, host=socket.gethostname() + "x", start="2026")
    (runs / "r/.owner.json").write_text(json.dumps(owner))
    assert "another machine" in doctor(runs / "r").findings[0]["detail"]


def test_a_failed_and_a_diverged_run(runs):
    change(runs / "stopped/run.json", status="failed", error="\x1b[2JMemoryError: x")
    detail, command = problems(runs / "stopped")["status"]
    assert "MemoryError" in detail and "\x1b" not in detail
    change(runs / "stopped/run.json", status="diverged")
    detail, command = problems(runs / "stopped")["status"]
    assert "--lr" in command and "--allow-change lr" in command
    assert follow(runs, command) == 0, read_log(runs.parent)


def test_damaged_checkpoints(runs):
    newest = runs / "r/step_00000040/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = problems(runs / "r")
    detail, command = found.pop("step_00000040")
    assert "falls back to an older checkpoint" in detail and not found  # Pointers and records follow from it
    assert follow(runs, command) == 0, read_log(runs.parent)
    assert problems(runs / "r") == {}
    assert any(row["about"].startswith("damaged_step") for row in doctor(runs / "r").findings)
    for path in runs.glob("stopped/step_*/state.pt"):
        path.write_bytes(b"")
    detail, command = problems(runs / "stopped")[f"step_{17:08d}"]
    assert "No checkpoint is whole" in detail and not command


def test_a_damaged_older_checkpoint(runs):
    "The printed command deletes the damaged checkpoint that no resume needs"
    (runs / "r/step_00000020/model.safetensors").write_bytes(b"damaged")
    ((name, (detail, command)),) = problems(runs / "r").items()
    assert name == "step_00000020" and "No resume needs it" in detail
    assert shlex.split(command) == ["rm", "-r", "--", str(runs / "r/step_00000020")]
    shutil.rmtree(runs / "r/step_00000020")
    assert problems(runs / "r") == {}


def test_missing_tokenizer(runs):
    "If the tokenizer is missing, `doctor` does not report the data as the cause"
    shutil.rmtree(runs / "r/tokenizer")
    assert list(problems(runs / "r")) == ["tokenizer"]


def test_missing_checkpoints(runs):
    shutil.rmtree(runs / "r/step_00000040")
    assert {"last", "final"} <= set(problems(runs / "r"))
    for path in runs.glob("stopped/step_*"):
        shutil.rmtree(path)
    assert "checkpoints" in problems(runs / "stopped")


def test_damaged_records(runs):
    path = runs / "stopped/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    detail, command = problems(runs / "stopped")["metrics.jsonl"]
    assert "metrics.jsonl:2 is damaged" in detail and "--resume" in command
    (runs / "r/metrics.jsonl").write_text("")
    detail, command = problems(runs / "r")["metrics.jsonl"]
    assert "no resume writes the lost records again" in detail and not command
    (runs / "r/run.json").write_text("{")
    assert "run.json" in problems(runs / "r")
    (runs / "r/run.json").unlink()
    assert problems(runs / "r")


def test_missing_and_changed_data(runs):
    (runs.parent / "corpus/sea/all.jsonl").write_text('{"text": "another sea"}\n')
    detail, command = problems(runs / "r")["data"]
    assert "the data has changed" in detail and "--allow-change data" in command
    shutil.rmtree(runs.parent / "corpus")
    detail, command = problems(runs / "r")["data"]
    assert "'corpus' is not one of" in detail and "--data PATH" in command and "--allow-change" not in command


def test_named_data_is_not_downloaded(runs):
    record = read_json(runs / "r/run.json")
    record["config"]["data"] = "pydocs+enwik8"
    write_json(runs / "r/run.json", record)
    assert "A resume downloads it" in repr(doctor(runs / "r"))


def test_a_disk_that_is_almost_full(runs, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    detail, command = problems(runs / "r")["disk"]
    assert "almost full" in detail and "--keep 1" in command


def test_another_environment(runs):
    for path in runs.glob("r/step_*/config.json"):
        then = read_json(path)
        change(path, environment=then["environment"] | dict(torch="1.0"))
    (row,) = [row for row in doctor(runs / "r").findings if row["about"] == "environment"]
    assert row["state"] == "note" and "torch 1.0 → " in row["detail"]
    assert environment_changes(then["environment"] | dict(torch="1.0"), "cpu")


def test_left_over_files(runs):
    (runs / "r/.step_00000010.99.tmp").mkdir()
    assert "temporary files" in [row["about"] for row in doctor(runs / "r").findings]


def test_from_another_folder(runs, tmp_path, monkeypatch):
    "`doctor`, `verify`, `fork` and `inspect_run` find the data of a run though its path is relative to another folder, and `doctor` writes nothing"
    shutil.rmtree(runs.parent / "data", ignore_errors=True)
    (tmp_path / "elsewhere/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert doctor(runs / "r").problems == [] and "the same content" in repr(doctor(runs / "r"))
    assert not list((tmp_path / "elsewhere").rglob("*.bin")) and not (runs.parent / "data").exists()
    assert verify(runs / "r", replay=1).exit_code == 0
    name = fork(runs / "stopped", out_dir="forks")
    r = run(run=name, out_dir="forks", resume=True, view=False)
    assert r.status == "done"
    assert len(list(inspect_run(r, "The sea"))) >= 2
    monkeypatch.chdir(runs / "stopped")
    assert fork(".") == "stopped-from-17" and (runs / "stopped-from-17/run.json").exists()


def test_the_command(runs):
    assert run_in_process(runs.parent, lmnotes_command, "doctor") == 0
    assert run_in_process(runs.parent, lmnotes_command, "doctor", "runs/r") == 0, read_log(runs.parent)
    change(runs / "r/run.json", status="running")
    assert run_in_process(runs.parent, lmnotes_command, "doctor", "--run", "runs/r") == 5
    assert "killed at step 40" in read_log(runs.parent)
    assert run_in_process(runs.parent, lmnotes_command, "doctor", "runs/none") == 2
    with pytest.raises(CheckpointError, match="there is no run here"):
        doctor(runs / "none")
