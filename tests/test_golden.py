"""Every version loads, generates from and resumes the runs of earlier releases.

`golden/<version>/` holds tiny runs, an export and `expected.json`, made by that release with `golden/make.py`. These files never
change. A failure means that users can no longer use their runs: change the code, not the files.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lmnotes

GOLDEN = Path(__file__).parent / "golden"
RELEASES = {path.parent.name: json.loads(path.read_text("utf-8")) for path in sorted(GOLDEN.glob("*/expected.json"))}
TOLERANCE = 1e-3  # Nats per token. Bits differ between CPUs

each_release = pytest.mark.parametrize("release", RELEASES)
each_run = pytest.mark.parametrize(
    "release, name", [(release, n) for release in RELEASES for n in RELEASES[release]["runs"]]
)


@pytest.fixture
def expected(release, name, tmp_path, monkeypatch):
    "Return the values that a run must give. The working directory holds only copies of this run and its text"
    shutil.copytree(GOLDEN / release / "runs" / name, tmp_path / "runs" / name)
    shutil.copytree(GOLDEN / release / "text", tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    for variable in [variable for variable in os.environ if variable.startswith("LMNOTES_")]:
        monkeypatch.delenv(variable)
    return RELEASES[release]["runs"][name]


def test_golden_folders_exist():
    "The golden folders exist, so the other tests have cases"
    assert len(RELEASES["0.1"]["runs"]) == 12


@each_run
def test_a_run_loads_and_generates(release, name, expected):
    r = lmnotes.load(f"runs/{name}", device="cpu")
    assert (r.config.arch, r.step) == (expected["arch"], expected["step"])
    assert r.generate(expected["prompt"], RELEASES[release]["tokens"], temperature=0) == expected["text"]
    assert r.evaluate()["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)


@each_run
def test_a_run_resumes(release, name, expected):
    before = lmnotes.load(f"runs/{name}", device="cpu").metrics
    r = lmnotes.run(resume=True, run=name, out_dir="runs", **expected["resume"])
    assert (r.status, r.step) == ("done", expected["resumed_step"])
    assert r.config.orthogonalization == "newton_schulz"
    # Version 0.1 drew other noise in training, so the loss of a diffusion model differs by less than its standard error
    tolerance = 0.03 if r.config.arch == "diffusion" else TOLERANCE
    assert r.result["last"]["loss"] == pytest.approx(expected["resumed_loss"], abs=tolerance)
    assert before and r.metrics[: len(before)] == before


@each_release
def test_an_export_generates(release, tmp_path):
    "An export generates text with the code that it was exported with"
    folder = shutil.copytree(GOLDEN / release / "export", tmp_path / "export")
    expected = RELEASES[release]["runs"][RELEASES[release]["exported"]]
    options = ["--n", str(RELEASES[release]["tokens"]), "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, str(folder / "generate.py"), expected["prompt"], *options],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected["prompt"] + expected["text"] + "\n"


@each_release
def test_export_files_are_unchanged(release):
    "The files of the golden exports are unchanged by git's line endings and by formatters"
    folder = GOLDEN / release / "export"
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    changed = [
        name for name, sha256 in files.items() if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256
    ]
    assert changed == []


@each_release
def test_the_two_best_tokens_of_a_golden_text_differ(release, monkeypatch):
    "`golden/make.py`, which makes the folders of the next release, measures the same margin with today's code"
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.chdir(GOLDEN / release)
    name = RELEASES[release]["exported"]
    r = lmnotes.load(f"runs/{name}", device="cpu")
    assert make.smallest_margin(r, RELEASES[release]["runs"][name]["prompt"]) > make.MARGIN / 2
