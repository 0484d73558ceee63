"""Fixtures of the process tests"""

import shutil

import pytest
from helpers import STARTED, write_corpus


@pytest.fixture(autouse=True)
def nothing_left_running():
    "A test that fails leaves no process behind"
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "A folder of two small domains"
    folder = tmp_path_factory.mktemp("text") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture
def place(tmp_path, corpus):
    "A folder to work in, with the corpus"
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path
