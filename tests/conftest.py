"""Fixtures of the process tests"""

import shutil

import pytest
from helpers import write_corpus


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
