"""`lmnotes diff` names every difference of two runs, and none between a run and its repetition."""

import json
import shutil

import pytest
from helpers import TINY, lmnotes_command, read_log, run_in_process, train

from lmnotes.core import CheckpointError, read_json, write_json
from lmnotes.inspect.diff import diff


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    "Return a folder with a run, its repetition and runs that differ from it"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    shutil.copytree(corpus, folder / "other_corpus")
    (folder / "other_corpus/sea/all.jsonl").write_text(json.dumps(dict(text="a new sea " * 99)) + "\n")
    for name, params in dict(
        r={}, again={}, faster=dict(lr=0.05, steps=50), data=dict(data="other_corpus"), bpe=dict(tokenizer="bpe:300")
    ).items():
        assert run_in_process(folder, train, **TINY | params | dict(run=name)) == 0, read_log(folder)
    return folder / "runs"


def differing(d, part):
    return {row["name"] for row in d.rows if row["part"] == part}


def test_a_repetition(trained):
    d = diff(trained / "r", trained / "again")
    assert (d.rows, d.first) == ([], None)
    assert "no differences" in repr(d) and "all metrics that both runs logged are equal" in repr(d)


def test_parameters_and_figures(trained):
    d = diff(trained / "r", trained / "faster")
    assert differing(d, "parameter") == {"lr", "steps"}
    assert d.first["step"] == 3 and d.first["name"] == "loss" and d.first["a"] != d.first["b"]
    assert "| parameter | lr | auto | 0.05 |" in d._repr_markdown_()
    assert [row["step"] for row in d.curves.rows] == list(range(5, 51, 5))
    assert d.curves.rows[-1]["r"] == "-" and d.curves.rows[0]["difference"]
    assert len(d.figure().axes) == 2


def test_data_and_tokenizer(trained):
    d = diff(trained / "r", trained / "data")
    assert differing(d, "data") >= {"content", "train"} and differing(d, "parameter") == {"data"}
    d = diff(trained / "r", trained / "bpe")
    assert differing(d, "tokenizer") == {"name", "vocab_size", "fingerprint"}
    assert differing(d, "model") == {"vocab_size", "parameters"}


def test_environment(trained, tmp_path):
    shutil.copytree(trained / "r", tmp_path / "r")
    for path in (tmp_path / "r").glob("step_*/config.json"):
        then = read_json(path)
        write_json(path, then | dict(environment=then["environment"] | dict(threads=8, torch="1.0")))
    d = diff(trained / "r", tmp_path / "r")
    assert differing(d, "environment") == {"threads", "torch"}
    assert len(set(d.labels)) == 2  # Two runs of one name


def test_values_of_a_record_cannot_control_the_terminal_or_the_notebook(trained, tmp_path):
    shutil.copytree(trained / "r", tmp_path / "r")
    record = read_json(tmp_path / "r/run.json")
    record["config"]["prompt"] = "\x1b[2J\x07| <b>"
    record["data"]["what"] = "x\ny\x9b"
    write_json(tmp_path / "r/run.json", record)
    shown = repr(diff(trained / "r", tmp_path / "r"))
    assert not {"\x1b", "\x07", "\x9b"} & set(shown) and "prompt" in shown


def test_a_run_and_itself(trained):
    d = diff(trained / "r", trained / "r")
    assert (d.rows, d.first) == ([], None) and len(set(d.labels)) == 2


def test_the_command(trained):
    folder = trained.parent
    (folder / "log").unlink()
    assert run_in_process(folder, lmnotes_command, "diff", "runs/r", "runs/faster") == 0
    assert "first different metric: step 3, train loss" in read_log(folder)
    assert run_in_process(folder, lmnotes_command, "diff", "runs/r", "runs/none") == 2
    with pytest.raises(CheckpointError, match="there is no run here"):
        diff(folder / "runs/r", folder / "runs/none")
