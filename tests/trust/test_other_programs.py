"""Other programs beside a run: one that reads its output, one that writes its data, and one that uses its folder.

Each test makes the other program act at one given moment, so nothing depends on time.
"""

import fcntl
import io
import json
import os
import signal
import socket
import sys
from contextlib import redirect_stdout

import pytest
from helpers import command_line_args, lmnotes_command, read_log, run_in_process, stop_before_step, write_corpus
from small_runs import SMALL

from lmnotes import files
from lmnotes.apps.cli import main
from lmnotes.core import DataError, RunLockedError, read_json, utc_now, write_json
from lmnotes.data.corpus import Corpus
from lmnotes.data.prepare import get_corpus, get_corpus_tokenizer, tokenize_splits, tokenize_to_file
from lmnotes.data.tokenizer import ByteTokenizer
from lmnotes.files import RunLock, is_locked
from lmnotes.runs.folder import move_earlier_run_aside
from lmnotes.runs.load import is_run_alive
from lmnotes.runs.run import run
from lmnotes.training.weights import SaveWeights

TRAIN = "train", *command_line_args(**SMALL)
RESUME = "train", *command_line_args(run="r", out_dir="runs", resume=True)


def main_without_reader(*args):
    "Run the command line with an output that no program reads any more"
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)
    sys.stdout = open(1, "w", closefd=False)
    main([str(arg) for arg in args])


def test_no_reader_of_the_output(workdir):
    "A run trains to its end if the program that reads its output ends, as `head` does"
    assert run_in_process(workdir, main_without_reader, *TRAIN) == 0
    assert read_json(workdir / "runs/r/run.json")["status"] == "done"


def test_a_signal_ends_the_reader_too(workdir):
    "Ctrl+C also ends a program such as `tee` that reads the output. The run saves its state, and resumes"
    assert stop_before_step(7, workdir, main_without_reader, *TRAIN) == 128 + signal.SIGINT
    assert (workdir / "runs/r/interrupted").read_text() == "step_00000007\n"
    assert run_in_process(workdir, main_without_reader, *RESUME) == 0


def test_commands_that_only_print_end_with_their_reader(workdir):
    "Generation and the view of a run in progress stop when no program reads them"
    assert run_in_process(workdir, lmnotes_command, *TRAIN) == 0
    assert run_in_process(workdir, main_without_reader, "generate", "--run", "runs/r", "--n", 10**9) == 0
    record = workdir / "runs/r/run.json"
    write_json(record, read_json(record) | dict(status="running"))
    with RunLock(workdir / "runs/r"):
        assert run_in_process(workdir, main_without_reader, "watch", "--run", "runs/r") == 0


def print_in_ascii(function, *args):
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    return function(*args)


def test_output_that_is_not_utf8(workdir):
    "A run prints the characters that its output cannot encode as escape sequences, and trains to its end"
    assert run_in_process(workdir, print_in_ascii, lmnotes_command, *TRAIN, "--prompt", "é Ω") == 0, read_log(workdir)
    assert r"\xb1" in read_log(workdir) and r"\u03a9" in read_log(workdir)
    assert run_in_process(workdir, print_in_ascii, main, ["train", "--help"]) == 0, read_log(workdir)


@pytest.fixture
def rewritten(tmp_path, monkeypatch):
    "Return the path of a text that another program rewrites, in the same size, after it was hashed and before it is read"
    monkeypatch.chdir(tmp_path)
    path, read = tmp_path / "text.txt", Corpus.documents
    path.write_text("One text, and some more of it.\n" * 40)

    def documents(corpus):
        if "fingerprint" in vars(corpus):
            path.write_text(path.read_text().swapcase())
            monkeypatch.setattr(Corpus, "documents", read)
        return read(corpus)

    monkeypatch.setattr(Corpus, "documents", documents)
    return path


@pytest.mark.parametrize("read", ["splits", "one file", "bpe:270", "bpe", "chars"])
def test_a_text_changes_while_it_is_read(rewritten, tmp_path, read):
    "Tokens of another text than the one that was hashed are discarded, and so is a tokenizer that was trained on it"
    corpus = get_corpus(str(rewritten))
    if read == "one file":
        assert corpus.fingerprint
    uses = {
        "splits": lambda: tokenize_splits(corpus, ByteTokenizer(), tmp_path / "tokens"),
        "one file": lambda: tokenize_to_file(corpus, ByteTokenizer(), tmp_path / "tokens/all.bin"),
    }
    with pytest.raises(DataError, match="text: the text changed while it was read"):
        uses.get(read, lambda: get_corpus_tokenizer(corpus, read, "auto"))()
    assert not list(tmp_path.rglob("*.bin*"))
    corpus = get_corpus(str(rewritten))
    tokens = tokenize_splits(corpus, get_corpus_tokenizer(corpus, "bytes", "auto"), tmp_path / "tokens")
    assert bytes(tokens["train"].ids[:10].tolist()) == b"oNE TEXT, "


def test_all_files_of_an_earlier_run_move_aside(tmp_path, monkeypatch):
    "An earlier run keeps all files that its hooks, its model and you wrote. Only the report of the new run moves back"
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    small = SMALL | dict(view=False, steps=4, patience=0)
    old, new = tmp_path / "runs/r-1", tmp_path / "runs/r"
    with redirect_stdout(io.StringIO()):
        run(hooks=[SaveWeights(new, "best_model.pt", when="stop")], **small)
        weights = (new / "best_model.pt").read_bytes()
        for name in ("memory.safetensors", "notes.txt", "report.ipynb"):
            (new / name).write_text("{}")
        monkeypatch.setenv("LMNOTES_REPORT", str(new / "report.ipynb"))
        run(**small | dict(seed=1))
        again = dict(resume=True, run="r", out_dir="runs", steps=6, allow_change="steps", view=False)
        run(hooks=[SaveWeights(new, "best_model.pt", when="stop")], **again)
    assert (old / "best_model.pt").read_bytes() == weights != (new / "best_model.pt").read_bytes()
    assert (old / "notes.txt").exists() and (old / "memory.safetensors").exists()
    assert (new / "report.ipynb").exists() and not (old / "report.ipynb").exists()
    assert not (new / "notes.txt").exists() and not (new / "memory.safetensors").exists()


def test_a_process_id_that_is_used_again(tmp_path):
    "A run is alive while its lock is held, even if the process that another program has now is the one in .owner.json"
    write_json(tmp_path / ".owner.json", dict(pid=os.getpid(), host=socket.gethostname(), start=utc_now()))
    assert is_run_alive(tmp_path) is False
    with RunLock(tmp_path):
        assert is_run_alive(tmp_path) is True
        write_json(tmp_path / ".owner.json", dict(pid=1, host="elsewhere", start=utc_now()))
        assert is_run_alive(tmp_path) is True
    write_json(tmp_path / ".owner.json", dict(pid=os.getpid(), host="elsewhere", start=utc_now()))
    assert is_run_alive(tmp_path) is None and is_locked(tmp_path) is False


def test_a_run_starts_while_its_lock_is_tested(tmp_path, monkeypatch):
    "A process that tests the lock of a folder at the wrong moment does not keep a run from starting"
    with open(tmp_path / ".lock", "w") as test:
        fcntl.flock(test, fcntl.LOCK_SH)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: fcntl.flock(test, fcntl.LOCK_UN))
        with RunLock(tmp_path):
            assert is_locked(tmp_path)


def test_a_folder_that_moves_while_a_process_locks_it(tmp_path, monkeypatch):
    "A process that waits for a run does not take the lock of the folder that is moved aside at this moment"
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text("{}")
    real = fcntl.flock
    with RunLock(tmp_path / "r") as owner:

        def move_before(fd, how):
            if how & fcntl.LOCK_EX:
                monkeypatch.setattr(fcntl, "flock", real)
                move_earlier_run_aside(owner, [])
            return real(fd, how)

        monkeypatch.setattr(fcntl, "flock", move_before)
        with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()}"):
            RunLock(tmp_path / "r").__enter__()
        assert is_locked(tmp_path / "r") and not is_locked(tmp_path / "r-1")
    assert json.loads((tmp_path / "r-1/run.json").read_text()) == {} and not is_locked(tmp_path / "r")
