"""Progress in a terminal: `lmnotes train` and `lmnotes watch` redraw it there, print plain lines elsewhere, and change no bit."""

import os
import pty
import re
import select
import subprocess
import sys

import pytest
from helpers import (
    DEADLINE,
    ROOT,
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    read_log,
    run_in_process,
    run_results,
    start_process,
    train,
    wait_for_exit,
    wait_until,
    with_environment,
)
from rich.console import Console

import lmnotes
from lmnotes.runs import terminal
from lmnotes.runs.run import run
from lmnotes.untrusted import EscapedOutput

CASE = TINY | dict(sample_every=10, log_every=2, prompt="The\n")
COLORS = r"\x1b\[[\d;]*[39][0-7][\d;]*m"


class Terminal:
    "A pseudo-terminal of 100 columns, with a command that writes to it"

    def __init__(self, folder, *words, **environ):
        self.ours, self.theirs = pty.openpty()
        self.text = ""
        environ = dict(TERM="xterm-256color", COLUMNS="100", LINES="30") | environ
        output = os.ttyname(self.theirs)
        self.process = start_process(folder, with_environment, environ, lmnotes_command, *words, output=output)

    def read(self):
        "Read what the command has printed"
        while select.select([self.ours], [], [], 0.01)[0]:
            self.text += os.read(self.ours, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
        return self.text

    def has_ended(self):
        self.read()
        return self.process.exitcode is not None and not select.select([self.ours], [], [], 0)[0]

    def close(self):
        os.close(self.ours)
        os.close(self.theirs)


def on_terminal(folder, *words, **environ):
    "Run a command to its end in a terminal, and return what it printed"
    shown = Terminal(folder, *words, **environ)
    wait_until(shown.has_ended)
    shown.close()
    assert wait_for_exit(shown.process) == 0, shown.text
    return shown.text


@pytest.fixture
def train_words(workdir, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return ["train", *command_line_args(**CASE)]


def test_training_shows_a_bar_and_texts_in_a_terminal(workdir, train_words):
    shown = on_terminal(workdir, *train_words)
    assert "40 of 40 steps" in shown and "━" in shown and re.search("[▁▂▃▄▅▆▇█]", shown) and re.search(COLORS, shown)
    assert not re.search(r"^step \d+/40 \|", shown, re.M) and "step 5 | val loss" in shown
    assert "step 10 | sample:\nThe\n" in shown and r"'The\n" not in shown
    assert shown.rstrip().endswith("r: done at step 40 of 40")


def test_a_terminal_changes_no_bit_and_no_file(workdir, train_words):
    on_terminal(workdir, *train_words)
    (workdir / "runs").rename(workdir / "seen")
    assert run_in_process(workdir, lmnotes_command, *train_words) == 0
    assert not differences(run_results(workdir / "seen/r"), run_results(workdir / "runs/r"))


def test_colors_can_be_switched_off(workdir, train_words):
    shown = on_terminal(workdir, *train_words, NO_COLOR="1")
    assert "40 of 40 steps" in shown and not re.search(COLORS, shown)


def test_a_simple_terminal_shows_the_lines_of_a_file(workdir, train_words):
    "The lines are the same apart from the speed and the remaining time"
    shown = on_terminal(workdir, *train_words, TERM="dumb")
    (workdir / "runs").rename(workdir / "earlier")
    (workdir / "log").unlink(missing_ok=True)
    assert run_in_process(workdir, lmnotes_command, *train_words) == 0
    lines = [re.findall(r"^step .*?(?= \| [\d,]+ tok/s|$)", text, re.M) for text in (shown, read_log(workdir))]
    assert "\x1b" not in shown and re.search(r"^step 2/40 \| loss", shown, re.M) and r"step 10 | 'The\n" in shown
    assert lines[0] == lines[1]


def test_an_error_of_the_progress_does_not_end_the_run(workdir, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("the terminal is closed")

    monkeypatch.chdir(workdir)
    monkeypatch.setattr(terminal, "progress_lines", fail)
    console = Console(file=sys.stdout, force_terminal=True)
    monkeypatch.setattr(terminal, "terminal_console", lambda: console)
    with EscapedOutput():
        assert run(**CASE).status == "done"
    assert "ShowProgress failed and is off from here on: the terminal is closed" in capsys.readouterr().out


def test_the_run_ends_normally_if_the_terminal_is_closed(workdir):
    words = command_line_args(**CASE | dict(steps=400, eval_every=100, save_every=100))
    ours, theirs = pty.openpty()
    environ, output = os.environ | dict(PYTHONPATH=str(ROOT), TERM="xterm"), dict(stdout=theirs, stderr=theirs)
    process = subprocess.Popen([sys.executable, "-m", "lmnotes", "train", *words], cwd=workdir, env=environ, **output)
    os.close(theirs)
    shown = b""
    while b"of 400 steps" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(DEADLINE) == 0
    assert lmnotes.attach(workdir / "runs/r").status == "done"


def test_a_program_in_a_terminal_prints_lines(workdir):
    "It may print control codes of its own, which a command would show as text"
    ours, theirs = pty.openpty()
    process = start_process(workdir, train, **CASE, output=os.ttyname(theirs))
    assert wait_for_exit(process) == 0
    assert "step 2/40 | loss" in os.read(ours, 65536).decode("utf-8", "replace")
    os.close(ours)
    os.close(theirs)


def test_watch_uses_the_whole_screen_until_the_run_ends(workdir, train_words):
    words = ["train", *command_line_args(**CASE | dict(steps=100_000, sample_every=3))]
    process, folder = start_process(workdir, lmnotes_command, *words), workdir / "runs/r"
    wait_until(lambda: (folder / "last").exists(), process)
    watching = Terminal(workdir, "watch", "--run", "runs/r", "--seconds", "0.1", LMNOTES_OUT_DIR="runs")
    wait_until(lambda: "running at step" in watching.read() and "sample at step" in watching.text)
    assert "\x1b[?1049h" in watching.text
    process.terminate()
    wait_until(watching.has_ended)
    watching.close()
    assert wait_for_exit(process) == 128 + 15 and wait_for_exit(watching.process) == 0
    screen, _, after = watching.text.partition("\x1b[?1049l")
    assert max(len(re.sub(r"\x1b\[[\d;?]*\w", "", line)) for line in screen.splitlines()) > 90
    assert "interrupted at step" in after and "sample at step" in after
    assert lmnotes.attach(folder).status == "interrupted"


def test_sigterm_ends_watch_and_restores_the_screen(workdir, train_words):
    words = ["train", *command_line_args(**CASE | dict(steps=100_000))]
    process, folder = start_process(workdir, lmnotes_command, *words), workdir / "runs/r"
    wait_until(lambda: (folder / "last").exists(), process)
    watching = Terminal(workdir, "watch", "--run", "runs/r", "--seconds", "0.1", LMNOTES_OUT_DIR="runs")
    wait_until(lambda: "running at step" in watching.read())
    assert "\x1b[?1049h" in watching.text and "\x1b[?25l" in watching.text
    watching.process.terminate()
    wait_until(watching.has_ended)
    watching.close()
    assert wait_for_exit(watching.process) == 128 + 15
    assert watching.text.rindex("\x1b[?1049l") > watching.text.rindex("\x1b[?1049h")
    assert watching.text.rindex("\x1b[?25h") > watching.text.rindex("\x1b[?25l") and "Traceback" not in watching.text
    assert process.exitcode is None and lmnotes.attach(folder).status == "running"
    process.terminate()
    wait_for_exit(process)
