"""Fixtures of the tests of trust"""

import shutil

import pytest


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    "Return the folder of a copy of the runs that a test file has `trained`, which has the place of all runs"
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(tmp_path / "runs"))
    return tmp_path / "runs"
