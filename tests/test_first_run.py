"""The first run of each guide page works as printed: with its own commands, papermill and nothing added."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = {path.stem: path for path in (ROOT / "docs/guides").glob("*.md")}
QUICK = ["tisslm"]  # The others take longer, so they run with `-m nightly`
NUMBER = r"[+-]?[\d.,:eT+%-]+"


def first_run(page):
    "Return the commands and the lines of the section `First run` of a page"
    section = re.search(r"^## First run\n(.*?)^## ", PAGES[page].read_text(), re.M | re.S)[1]
    commands, lines = re.findall(r"^```(?:bash|text)\n(.*?)^```", section, re.M | re.S)
    return commands, lines.splitlines()


def check_lines(lines, output):
    for line in lines:
        pattern = NUMBER.join(map(re.escape, line.split("#")))
        assert re.search(rf"^{pattern}", output, re.M), f"{line!r} is not in the output:\n{output}"


@pytest.mark.nightly
def test_second_stage(tmp_path):
    "The program of a second stage with another stream works as printed, and the stream lowers the loss"
    run_first(tmp_path, "text_only")
    section = re.search(r"^## A second stage\n(.*?)^## ", PAGES["text_only"].read_text(), re.M | re.S)[1]
    program, lines = re.findall(r"^```(?:python|text)\n(.*?)^```", section, re.M | re.S)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    check_lines(lines.splitlines(), output)
    without, touch = (float(re.search(rf"^{name} touch: (.*)", output, re.M)[1]) for name in ("without", "with"))
    assert touch < without - 0.05


@pytest.mark.parametrize(
    "page", [p if p in QUICK else pytest.param(p, marks=pytest.mark.nightly) for p in sorted(PAGES)]
)
def test_first_run(page, tmp_path):
    check_lines(first_run(page)[1], run_first(tmp_path, page))


def environment():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    return environ | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", MPLBACKEND="agg")


def run_first(tmp_path, page):
    "Run the commands of the section `First run` of a page in a new project, and return what they print"
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    (tmp_path / "data").mkdir()
    commands, words = first_run(page)[0], ["bash", "-ec"]
    done = subprocess.run([*words, commands], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output
