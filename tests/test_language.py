"""Prose, docstrings and messages stay easy to read. `python tests/language.py` lists the cases."""

import language
import pytest

LIMITS = dict(clause=0.3, agentless=0.5, semicolon=3)  # Per 1,000 words, at most
LEAST_YOU = 8  # "you", "we" and "our" per 1,000 words, at least


@pytest.fixture(scope="module")
def counted():
    return language.count(language.all_files())


def listed(cases, name):
    "Return the cases of a kind, one per line"
    return "\n".join(f"{path.relative_to(language.ROOT)}: {text[:120]}" for path, kind, text in cases if kind == name)


@pytest.mark.parametrize("name", LIMITS)
def test_hard_constructions_are_rare(counted, name):
    numbers, cases = counted
    rate = 1000 * numbers[name] / numbers["words"]
    assert rate < LIMITS[name], f"{rate:.2f} per 1,000 words\n{listed(cases, name)}"


def test_the_text_speaks_to_its_reader(counted):
    numbers, _ = counted
    assert 1000 * numbers["you"] / numbers["words"] > LEAST_YOU


@pytest.mark.parametrize("name", ["docstring", "forbidden"])
def test_words_that_do_not_occur(counted, name):
    assert counted[0][name] == 0, listed(counted[1], name)


def test_each_kind_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("What is written is kept here; the run goes on. You see `a; b`.\n")
    numbers, _ = language.count([page])
    assert {name: numbers[name] for name in ("clause", "agentless", "semicolon", "forbidden", "you")} == dict(
        clause=1, agentless=1, semicolon=1, forbidden=1, you=1
    )
