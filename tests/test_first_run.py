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


@pytest.mark.parametrize(
    "page", [p if p in QUICK else pytest.param(p, marks=pytest.mark.nightly) for p in sorted(PAGES)]
)
def test_first_run(page, tmp_path):
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    (tmp_path / "data").mkdir()
    commands, lines = first_run(page)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    environ |= dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", MPLBACKEND="agg")
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environ, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for line in lines:
        pattern = NUMBER.join(map(re.escape, line.split("#")))
        assert re.search(rf"^{pattern}", output, re.M), f"{line!r} is not in the output:\n{output}"
