"""Links, names and entries in a run folder from someone else cannot redirect a write, a command or a choice."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from small_runs import RUNS, trained_runs

import lmnotes
from lmnotes.apps import cli
from lmnotes.apps.doctor import doctor
from lmnotes.apps.papermill_engine import check_parameters, output_path
from lmnotes.core import CheckpointError, TokenizerError, write_atomic
from lmnotes.data.datasets import get_corpus
from lmnotes.data.prepare import record_batches
from lmnotes.data.tokenizer import BPETokenizer, ByteTokenizer
from lmnotes.data.tokenizer_files import load_tokenizer
from lmnotes.data.tokens import TokenWriter, open_tokens
from lmnotes.nn.lm import new_lm
from lmnotes.parameters import declared, describe_kind, is_switch
from lmnotes.recipes.nanothink_checkpoints import read_checkpoint_file
from lmnotes.runs.config import RunConfig, resolve_config, to_cli_flags
from lmnotes.runs.folder import last_run_name, resume_command
from lmnotes.runs.load import load
from lmnotes.training.checkpoint import find_checkpoint, list_checkpoints, save_checkpoint
from lmnotes.training.saving import remove_temporary_files

ROOT = Path(lmnotes.__file__).parent.parent
SIZES = dict(n_layers=1, d_model=8, n_heads=1, vocab_size=256, ctx_len=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Return the folder of two small runs"
    with trained_runs(tmp_path_factory.mktemp("foreign"), {name: RUNS[name] for name in ("done", "stopped")}) as runs:
        yield runs


def write_tokens(path):
    with TokenWriter(path, 256) as out:
        out.add([1, 2, 3])


def link_temporary_names(folder, target):
    "Make every temporary name that this process can choose for the files of a folder a link"
    for name in ("a.json", "train.bin", "train.bin.json", "train.docs.npy", "last", "step_00000001"):
        (folder / f".{name}.{os.getpid()}.tmp").symlink_to(target)
    (folder / f".{os.getpid()}.tmp").symlink_to(target)


def test_no_write_follows_a_link_with_a_temporary_name(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "foreign"
    victim.write_text("precious")
    folder.mkdir()
    link_temporary_names(folder, victim)
    write_atomic(folder / "a.json", "new")
    write_tokens(folder / "train.bin")
    assert victim.read_text() == "precious" and (folder / "a.json").read_text() == "new"
    assert open_tokens(folder / "train.bin", vocab_size=256).ids.tolist() == [1, 2, 3]


def test_no_folder_is_written_through_a_link_with_a_temporary_name(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "foreign"
    victim.mkdir()
    (victim / "train.bin").write_text("precious")
    folder.mkdir()
    link_temporary_names(folder, victim)
    lm = new_lm("gpt", **SIZES)
    for write in (
        lambda: save_checkpoint(folder, lm, 1),
        lambda: record_batches(lambda b, t: [[1] * t] * b, folder, ByteTokenizer(), 2, 4, 1, 1),
    ):
        try:
            write()
        except (ValueError, OSError):  # The name is taken
            pass
        assert [(p.name, p.read_text()) for p in victim.iterdir()] == [("train.bin", "precious")]


def test_the_name_of_a_run_is_no_name_of_a_checkpoint(runs):
    os.rename(runs / "done", runs / "step_of_someone")
    shutil.copytree(runs / "stopped", runs / "step_5")  # Renamed by hand
    for name in ("step_of_someone", "step_5"):
        assert load(runs / name).folder.name == name
        newest = find_checkpoint(runs / name)
        assert newest.parent.name == name and find_checkpoint(newest) == newest
    (runs / "step_²").mkdir()  # A digit, but not of a number
    assert list_checkpoints(runs) == [runs / "step_5"]


@pytest.mark.parametrize("name", ["step_5", "step_00000010", "日" * 67, "é" * 101, "a/b"])
def test_a_name_that_a_run_cannot_have(tmp_path, name):
    with pytest.raises(ValueError, match="is not a folder name for a run"):
        lmnotes.run(run=name, data="none", out_dir=str(tmp_path))
    assert not any(tmp_path.iterdir())


def notebook_path(**parameters):
    return output_path(ROOT / "nbs/train.ipynb", ROOT, parameters)


@pytest.mark.parametrize("kind", ["link", "broken link", "pipe", "folder", "linked folder"])
def test_papermill_writes_the_notebook_through_no_link(runs, tmp_path, kind):
    target, victim = runs / "done/train.ipynb", tmp_path / "victim"
    if kind == "linked folder":
        os.rename(runs / "done", tmp_path / "done")
        (runs / "done").symlink_to(tmp_path / "done")
    elif "link" in kind:
        target.symlink_to(victim)
        victim.write_text("precious") if kind == "link" else None
    else:
        os.mkfifo(target) if kind == "pipe" else target.mkdir()
    with pytest.raises(ValueError, match="link"):
        notebook_path(run="done", resume="True")


RECORDS = dict(number=b'{"updated": 5}', deep=b"[" * 200_000, text=b"x", list=b"[]", null=b"null", utf16=b"\xff\xfe{")


@pytest.mark.parametrize("kind", [*RECORDS, "folder", "pipe", "hidden", "bad .last", "no run"])
def test_papermill_resumes_the_same_run_as_the_command_line(runs, kind):
    record, last, newer = runs / "stopped/run.json", runs / ".last", runs / "done/run.json"
    newer.write_text(json.dumps(json.loads(newer.read_bytes()) | dict(updated="2999")))
    last.unlink()
    if kind in ("folder", "pipe"):
        record.unlink()
        record.mkdir() if kind == "folder" else os.mkfifo(record)
    elif kind == "hidden":
        os.rename(runs / "stopped", runs / ".trash")
        record = runs / ".trash/run.json"
        record.write_text(json.dumps(json.loads(record.read_bytes()) | dict(updated="9999")))
    elif kind == "bad .last":
        last.write_bytes(b"\xff")
    elif kind == "no run":
        (runs / "empty").mkdir()
        last.write_text("empty")
    else:
        record.write_bytes(RECORDS[kind])
    expected = "stopped" if kind == "number" else "done"
    assert notebook_path(resume="True").parent.name == last_run_name(runs) == expected


def test_doctor_prints_commands_that_delete_damaged_checkpoints_only(runs, tmp_path):
    folder = tmp_path / "my runs/r; echo"
    shutil.copytree(runs / "done", folder)
    for name in ("damaged_step_00000003", "damaged_step_1; touch attacked #", "damaged_step_x", "other"):
        (folder / name).mkdir()
    rows = [row for row in doctor(folder).findings if row["about"].startswith("damaged")]
    assert [row["about"] for row in rows] == ["damaged_step_00000003"]
    subprocess.run(rows[0]["command"], shell=True, cwd=tmp_path, check=True)
    assert not (folder / "damaged_step_00000003").exists() and (folder / "other").exists()


def test_commands_that_are_printed_quote_their_values(tmp_path, monkeypatch):
    monkeypatch.setenv("LMNOTES_COMMAND", "lmnotes train")
    folder = tmp_path / "my runs; touch attacked/-r $(touch attacked)"
    command = shlex.split(resume_command(folder))
    assert command == ["lmnotes", "train", "--resume", f"--run={folder.name}", "--out-dir", str(folder.parent)]
    path = tmp_path / "my weights.pt"
    torch.save(dict(model_state={}), path)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint_file(path)
    assert shlex.split(shlex.split(str(error.value))[-1]) == [str(path)]  # A list of paths, as init_from is
    monkeypatch.setattr("sys.argv", ["/usr/lib/lmnotes/__main__.py"])
    monkeypatch.setattr("sys.executable", "/my python/bin/python")
    assert shlex.split(cli._program()) == ["/my python/bin/python", "-m", "lmnotes"]


TEXTS = ["--max-steps", "--max-steps 9", "-x", "--", "- item", "a b", "", "--prompt=x", "\"'$", "-1"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_never_read_as_a_flag(monkeypatch, text):
    given = {}
    monkeypatch.setattr("lmnotes.runs.run.run", lambda **params: given.update(params))
    monkeypatch.setattr(cli, "_status_to_exit_code", lambda r: 0)
    params = dict(prompt=text, lr=5e-5, steps=3, resume="auto", compile=False)
    assert cli.train_command(to_cli_flags(params)) == 0
    assert {name: vars(resolve_config(given, environ={})[0])[name] for name in params} == params


def test_every_switch_is_a_flag(monkeypatch):
    given = {}
    monkeypatch.setattr("lmnotes.runs.run.run", lambda **params: given.update(params))
    monkeypatch.setattr(cli, "_status_to_exit_code", lambda r: 0)
    switches = {name: p for name, p in declared(RunConfig).items() if is_switch(p.kind)}
    assert {"resume", "compile", "dry_run"} <= set(switches)
    for name, parameter in switches.items():
        for value in (True, False, *(["auto"] if "auto" in describe_kind(parameter.kind) else [])):
            given.clear()
            assert cli.train_command(to_cli_flags({name: value})) == 0
            assert list(given) == [name] and vars(resolve_config(given, environ={})[0])[name] == value, (name, value)


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.jsonl").write_text(json.dumps(dict(text="x" * 3000)))
    for use in (
        lambda: resolve_config(dict(data=f"{name}.txt")),
        lambda: resolve_config({}, environ=dict(LMNOTES_OUT_DIR=name)),
        lambda: get_corpus(tmp_path),  # Its domain
        lambda: check_parameters(ROOT / "nbs/train.ipynb", dict(data=name)),
    ):
        with pytest.raises(ValueError, match=r"caf\\udce9.* is not UTF-8. Rename the file or folder"):
            use()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_resume_ignores_entries_that_no_save_left(tmp_path, kind):
    made = []
    for name in ("", ".", "..", "best", "step_", "run.json") if kind == "folder" else ("best", "step_00000001"):
        made.append(tmp_path / f".{name}.replaced")
        if kind == "link":
            made[-1].symlink_to(tmp_path)
        else:
            made[-1].mkdir() if kind == "folder" else made[-1].touch()
    (tmp_path / ".step_00000002.replaced").mkdir()
    remove_temporary_files(tmp_path)
    assert {*tmp_path.iterdir()} == {*made, tmp_path / "step_00000002"}


@pytest.mark.parametrize("option", [dict(ignore_merges=True), dict(dropout=0.5), dict(end_of_word_suffix="x")])
def test_options_of_a_tokenizer_that_change_its_ids_are_rejected(tmp_path, option):
    BPETokenizer.train(["the cat sat on the mat. " * 9], 270).save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_bytes())
    saved["model"] |= option
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=f"found model BPE with {min(option)}"):
        load_tokenizer(tmp_path)
