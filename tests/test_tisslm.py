"""`nbs/recipes/tisslm.ipynb` keeps the promises of the TissLM guide and avoids the mistakes of its code."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    differences,
    paste_resume_line,
    printed_text,
    read_log,
    read_records,
    recipe_parameters,
    run_in_process,
    run_papermill,
    run_recipe,
    run_results,
    stop_before_step,
)

import lmnotes
from lmnotes.data.tokenizer_files import load_tokenizer
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import load_data

pytestmark = pytest.mark.usefixtures("short_texts")
NOTEBOOK = Path(__file__).parent.parent / "nbs/recipes/tisslm.ipynb"
NAMES = "embed.weight rnn.weight_ih_l0 rnn.weight_hh_l0 rnn.bias_ih_l0 rnn.bias_hh_l0 fc.weight fc.bias".split()
DEFAULTS = dict(
    CORPUS_PATH="./corpus",
    SAVE_DIR="./training_output",
    VOCAB_SIZE=5000,
    seq_len=128,
    batch_size=32,
    epochs=5,
    lr=1e-3,
    checkpoint_every=1000,
)
SMALL = dict(VOCAB_SIZE=300, seq_len=16, batch_size=8, epochs=2, checkpoint_every=15, stride=4)
QUICK = SMALL | dict(stride=16, epochs=1)


def write_texts(workdir, names=("debugger", "formatstrings", "typesmapping"), size=1000):
    "Write the first part of some of Python's help topics, in the given order"
    from pydoc_data.topics import topics

    (workdir / "corpus").mkdir()
    for name in names:
        (workdir / "corpus" / f"{name}.txt").write_text(topics[name][:size])


@pytest.fixture
def workdir(tmp_path):
    write_texts(tmp_path)
    return tmp_path


def recipe(**params):
    return run_recipe(NOTEBOOK, **params)


def weights(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    "Return True if two files hold bit-identical weights"
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module", params=["process", pytest.param("papermill", marks=pytest.mark.nightly)])
def uninterrupted(request, short_texts, tmp_path_factory):
    "A folder in which the recipe has run without a stop"
    workdir = tmp_path_factory.mktemp("whole")
    write_texts(workdir)
    if request.param == "papermill":
        return run_papermill(workdir, NOTEBOOK, **SMALL)
    assert run_in_process(workdir, recipe, **SMALL) == 0, read_log(workdir)
    return workdir


def steps_of(workdir):
    return json.loads((workdir / "training_output/run.json").read_bytes())["step"]


def test_parameter_names_and_defaults_match_the_guide():
    found = recipe_parameters(NOTEBOOK)
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS
    assert list(found)[: len(DEFAULTS)] == list(DEFAULTS)
    assert found["stride"] == 1 and found["resume"] == ""


def test_the_guides_files(uninterrupted):
    folder, steps = uninterrupted / "training_output", steps_of(uninterrupted)
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}
    multiples = {f"checkpoint_step_{step}.pt" for step in range(15, steps + 1, 15)}
    assert multiples and {path.name for path in folder.glob("*.pt")} == multiples | {"final_model.pt"}
    shapes = [(300, 128), (768, 128), (768, 256), (768,), (768,), (300, 256), (300,)]
    for path in folder.glob("*.pt"):
        assert {name: tuple(w.shape) for name, w in weights(path).items()} == dict(zip(NAMES, shapes))


def test_the_report(uninterrupted):
    text = printed_text(uninterrupted)
    assert "Loaded 3 files from corpus: " in text
    assert "the same as trained: True" in text
    assert f"training_output: done at step {steps_of(uninterrupted)} of {steps_of(uninterrupted)}" in text


def test_a_loss_every_hundred_steps(workdir):
    assert run_in_process(workdir, recipe, **SMALL | dict(stride=2, epochs=1, checkpoint_every=1000)) == 0, read_log(
        workdir
    )
    logged = [r["step"] for r in read_records(workdir / "training_output/metrics.jsonl") if r["split"] == "train"]
    assert logged == [*range(100, steps_of(workdir), 100), steps_of(workdir)] and len(logged) > 1


def test_vocabulary_size_is_as_requested_or_explained(workdir):
    assert run_in_process(workdir, recipe, **QUICK | dict(VOCAB_SIZE=5000)) == 0, read_log(workdir)
    vocabulary = json.loads((workdir / "training_output/tokenizer/vocab.json").read_text())
    assert f"the training text allows only {len(vocabulary)} of 5000 ids" in read_log(workdir)


def test_resume_adds_epochs(workdir):
    assert run_in_process(workdir, recipe, **QUICK) == 0, read_log(workdir)
    assert run_in_process(workdir, recipe, **QUICK | dict(epochs=2, resume=True)) == 0, read_log(workdir)
    assert "changed epochs to 2.0 (was 1.0)" in read_log(workdir)
    assert run_in_process(workdir, recipe, **QUICK | dict(epochs=2, SAVE_DIR="./at_once")) == 0, read_log(workdir)
    assert equal(workdir / "training_output/final_model.pt", workdir / "at_once/final_model.pt")


def test_earlier_run_is_not_overwritten(workdir):
    for seed in (0, 1):
        assert run_in_process(workdir, recipe, **QUICK | dict(seed=seed)) == 0, read_log(workdir)
    assert "the earlier run is now training_output-1" in read_log(workdir)
    assert not equal(workdir / "training_output/final_model.pt", workdir / "training_output-1/final_model.pt")


# Mistakes of the TissLM guide's scripts


def test_mistake_tokenizer_where_the_guide_does_not_look(uninterrupted):
    "The script wrote tokenizer_vocab.json and tokenizer_merges.txt in its own format, beside the TissLM guide's folder"
    from tokenizers import ByteLevelBPETokenizer

    folder = uninterrupted / "training_output/tokenizer"
    theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = "A debugger steps through the source."
    assert theirs.encode(text).ids == load_tokenizer(folder).encode(text).tolist()


def test_mistake_no_resume(workdir, uninterrupted):
    "The script's checkpoints held only weights, so no run could be resumed"
    params = SMALL | dict(checkpoint_every=10)
    assert stop_before_step(13, workdir, recipe, **params) == 130, read_log(workdir)
    assert (workdir / "training_output/checkpoint_step_10.pt").exists()
    assert steps_of(workdir) == 13 < steps_of(uninterrupted)
    assert not (workdir / "training_output/final_model.pt").exists()
    assert paste_resume_line(workdir) == 0, read_log(workdir)
    assert run_in_process(workdir, recipe, **params | dict(SAVE_DIR="./at_once")) == 0, read_log(workdir)
    a, b = workdir / "training_output", workdir / "at_once"
    assert not differences(run_results(a), run_results(b))
    assert sorted(p.name for p in a.glob("*.pt")) == sorted(p.name for p in b.glob("*.pt"))
    assert all(equal(path, b / path.name) for path in a.glob("*.pt"))


def test_mistake_nothing_loads_it(uninterrupted, tmp_path, monkeypatch):
    "Nothing loaded or sampled the script's models, and you had to guess hidden sizes from shapes"
    shutil.copytree(uninterrupted / "training_output", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    r = lmnotes.load("moved")
    assert (r.config.arch, r.lm.cfg.d_hidden) == ("rnn", 256)
    assert len(r.generate("The ", 20, seed=0)) > 10


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(CORPUS_PATH="./nowhere"), ["nowhere"]),
        (dict(CORPUS_PATH="./bare"), ["bare: no .txt files"]),
        (dict(CORPUS_PATH="./empty"), ["the train part of the split first90 is empty"]),
        (dict(CORPUS_PATH="./short"), ["tokens, and seq_len=16 needs at least 17. Use a smaller seq_len or more text"]),
        (dict(VOCAB_SIZE=256), ["256", "257"]),
    ],
)
def test_mistake_words_of_the_loader_instead_of_the_reason(workdir, change, words):
    "With an empty or a short corpus, the script ended with an error of the data loader"
    for name, text in dict(bare=None, empty="", short="Too short a text.").items():
        (workdir / name).mkdir()
        if text is not None:
            (workdir / name / "a.txt").write_text(text)
    assert run_in_process(workdir, recipe, **QUICK | change) == 1
    assert any(all(word in line for word in words) for line in read_log(workdir).splitlines()), read_log(workdir)
    assert not (workdir / "training_output").exists()


def test_mistake_tokenized_again_each_time(workdir):
    "The script tokenized the whole corpus twice, in Python, and did so again in each run"
    for epochs in (1, 2):
        assert run_in_process(workdir, recipe, **QUICK | dict(epochs=epochs)) == 0, read_log(workdir)
    assert read_log(workdir).count("(prepared before)") == 2  # Both splits, in the second run


def test_mistake_no_validation(uninterrupted):
    losses = [r["bpb"] for r in read_records(uninterrupted / "training_output/metrics.jsonl") if r["split"] == "val"]
    assert len(losses) > 5 and losses[-1] < losses[0]


def test_mistake_another_model_each_time(uninterrupted, tmp_path):
    "The script read files in the order of the disk, and seeded nothing"
    write_texts(tmp_path, names=("typesmapping", "formatstrings", "debugger"))
    assert run_in_process(tmp_path, recipe, **SMALL) == 0, read_log(tmp_path)
    assert equal(uninterrupted / "training_output/final_model.pt", tmp_path / "training_output/final_model.pt")


def test_mistake_files_run_into_each_other(workdir, monkeypatch):
    "The script marked the end of a file with no token"
    monkeypatch.chdir(workdir)
    data = load_data(RunConfig(data="corpus", tokenizer="bpe:300"), log_fn=None)
    ids = data.tokens["train"].ids
    assert int((ids == data.tokenizer.eot_id).sum()) >= 2
    assert len(data.tokens["train"].doc_starts) == 3


def test_mistake_each_token_seen_seq_len_times(workdir, uninterrupted):
    "The script started a window at every token, so an epoch had each token seq_len times, with no way to change it"
    assert run_in_process(workdir, recipe, **SMALL | dict(stride=16)) == 0, read_log(workdir)
    assert abs(steps_of(uninterrupted) / steps_of(workdir) - 4) < 0.3


def test_mistake_a_last_batch_of_odd_size(uninterrupted):
    "Every step has the same number of sequences, so a batch can contain two epochs"
    record = json.loads((uninterrupted / "training_output/run.json").read_bytes())
    assert record["tokens"] == record["step"] * SMALL["batch_size"] * SMALL["seq_len"]
