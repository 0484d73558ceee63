"""Mutated files that fail are found, named, and repeated by every later run of the tests."""

import json
import os
import shutil

import foreign
import pytest

from lmnotes.core import DataError


def case_wrong(rng, folder):
    "A reader that fails in three ways"
    number = json.loads((folder / "current").read_text())[1]

    def read():
        if number == 3:
            raise KeyError("x")
        raise DataError("no name" if number == 5 else "a.txt: damaged")

    return "a.txt", read if number != 7 else lambda: os._exit(1)


def test_failures_are_kept_and_repeated(tmp_path, monkeypatch):
    "A foreign exception, a message without the file and a process that ends are failures. Their seeds are repeated first"
    shutil.copy(foreign.FAILURES, tmp_path / "failures.json")
    monkeypatch.setattr(foreign, "FAILURES", tmp_path / "failures.json")
    with pytest.raises(AssertionError, match=r"(?s)KeyError.*the message lacks a\.txt"):
        foreign.fuzz(case_wrong, tmp_path, 7, 4)
    with pytest.raises(AssertionError, match="EOFError"):
        foreign.fuzz(case_wrong, tmp_path, 8, 9)
    known = json.loads(foreign.FAILURES.read_text())["case_wrong"]
    assert known[:2] == [[4, 3], [4, 5]] and [9, 7] in known
    with pytest.raises(AssertionError, match=r"\[4, 3\]"):
        foreign.fuzz(case_wrong, tmp_path, 0, 5)
