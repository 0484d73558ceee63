"""Fixtures of the process tests"""

import shutil
import sys

import helpers
import pytest
from helpers import STARTED, TINY, train_with_command, write_corpus


@pytest.fixture(autouse=True)
def check_no_processes_left():
    "Kill the processes that a failed test left running"
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture(autouse=True)
def forget_archs_of_tests():
    "Forget the architectures that a test registers"
    yield
    known = vars(sys.modules["lmnotes.nn.lm"])["_ARCHS"] if "lmnotes.nn.lm" in sys.modules else {}
    for name in [name for name, cls in known.items() if not cls.__module__.startswith("lmnotes.")]:
        del known[name]


@pytest.fixture(autouse=True, scope="module")
def short_samples_of_runs():
    "Let the runs of this process generate short samples, as those of new processes do"
    with pytest.MonkeyPatch.context() as m:
        helpers.shorten_samples(m.setattr)
        yield


@pytest.fixture(scope="module")
def short_texts():
    "Let new processes generate short texts, for files whose tests do not check the length of a text"
    helpers.SAMPLE_TOKENS = 8
    yield
    helpers.SAMPLE_TOKENS = 0


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "Return a folder of two small domains"
    folder = tmp_path_factory.mktemp("text") / "corpus"
    write_corpus(folder)
    return folder


@pytest.fixture
def workdir(tmp_path, corpus):
    "Return a temporary folder with the corpus"
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory, corpus):
    "Return the run folder of an uninterrupted run of `TINY`"
    return train_with_command(tmp_path_factory.mktemp("whole"), corpus, **TINY)
