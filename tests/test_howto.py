"""The commands of the quickstart and of the how-to pages work as printed, and their options exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, files_of_page, page_blocks

from lmnotes.apps.cli import COMMANDS, execute_command

PAGES = [ROOT / "docs/start/2_quickstart.md", *sorted((ROOT / "docs/howto").glob("*.md"))]
OPTION = r"(?<![\w-])--[a-z][\w-]*"


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        execute_command([command, "--help"])
    return capsys.readouterr().out


def unknown(text, known):
    "Return the options in a text that a help text names neither as an option nor as a field of the model"
    return [
        option for option in re.findall(OPTION, text) if not re.search(rf"\b{option[2:].replace('-', '[-_]')}\b", known)
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_option_exists(path, capsys):
    known = {command: help_of(command, capsys) for command in COMMANDS}
    lines = [line for kind in ("sh", "text") for block in page_blocks(path, kind) for line in block.splitlines()]
    calls = [
        match.groups() for line in lines if (match := re.search(r"(?:\blmnotes|^python \w+\.py) ([\w-]+)(.*)", line))
    ]
    assert calls and not [call for call in calls if unknown(call[1], known[call[0]])]
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not unknown(prose, " ".join(known.values()))


@pytest.mark.nightly
def test_commands_work_in_the_order_of_the_pages(tmp_path):
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    environ |= dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", MPLBACKEND="agg")
    files = {name: code for path in PAGES for name, code in files_of_page(path).items()}
    for name, code in files.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    programs = [["bash", "-ec", block] for path in PAGES for block in page_blocks(path)]
    examples = [code for path in PAGES for code in page_blocks(path, "python") if code not in files.values()]
    programs += [[sys.executable, "-c", code] for code in examples]
    for program in programs:
        done = subprocess.run(program, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{program[-1]}\n{done.stdout}\n{done.stderr}"
