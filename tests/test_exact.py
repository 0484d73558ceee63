"""A run that is stopped anywhere, even many times, writes the same results as an uninterrupted run."""

import itertools
import shutil

import pytest
from helpers import TINY, differences, read_log, run_in_process, run_results, train

from lmnotes import files
from lmnotes.data.batches import EpochBatches, get_batches
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import load_data
from lmnotes.training import trainer
from lmnotes.training.trainer import Trainer

SAMPLERS = "random", "epochs", "domains", "documents"
TOKENIZERS = "bytes", "bpe:300"
CASES = {
    # Each tokenizer and each sampler is tested with both optimizers.
    f"{tokenizer} {sampler}": dict(tokenizer=tokenizer, sampler=sampler, optimizer=("muon", "adamw")[(t + s) % 2])
    for (t, tokenizer), (s, sampler) in itertools.product(enumerate(TOKENIZERS), enumerate(SAMPLERS))
}
CASES["early stop"] = dict(optimizer="adamw", lr=0.1, patience=2, eval_every=4)
# After these steps, a copy of the stopped run is also resumed to the end.
DEFAULT = "bytes random", "bpe:300 documents", "early stop"  # tests/trust/test_kills.py covers the others too
BRANCHES = [(name, 3 if i else 1, range((4, 10, 13)[i], 40, 15)) for i, name in enumerate(DEFAULT)]
BRANCHES += [pytest.param(name, 1, range(40), marks=pytest.mark.nightly) for name in CASES]


def start_run(workdir, case, *stops, run="r"):
    "Start a run and train to its first stop or its end"
    assert run_in_process(workdir, train, *stops, **case | dict(run=run)) == (130 if stops else 0), read_log(workdir)
    return workdir / "runs" / run


def resume(workdir, *stops, run="r", **params):
    "Resume a run in a new process, to its next stop or its end"
    assert run_in_process(workdir, train, *stops, **params, run=run, out_dir="runs", resume=True) == (
        130 if stops else 0
    ), read_log(workdir)
    return workdir / "runs" / run


@pytest.mark.parametrize("name, every, branches", BRANCHES)
def test_stop_and_resume_at_every_step(workdir, name, every, branches):
    "A run stopped after every step or every third, and copies of it that resume to the end, have the results of an uninterrupted run"
    case = TINY | CASES[name]
    whole = run_results(start_run(workdir, case))
    chain = start_run(workdir, case, 1, run="chain")
    for step in range(1, whole["step"], every):
        assert (chain / "interrupted").read_text() == f"step_{step:08d}\n"
        if step in branches:
            shutil.copytree(chain, workdir / "runs/copy")
            seen = differences(whole, run_results(resume(workdir, run="copy")))
            assert not seen, f"after stops up to step {step}, these differ: {seen}"
            shutil.rmtree(workdir / "runs/copy")
        resume(workdir, *([step + every] if step + every < whole["step"] else []), run="chain")
    assert not differences(whole, run_results(chain))


def test_cases_use_their_features(workdir, monkeypatch):
    "In the cases of this file, two epochs end within the run, in the middle of a batch, and early stopping stops the run"
    monkeypatch.chdir(workdir)
    for name, case in CASES.items():
        cfg = RunConfig(**TINY | case)
        tokens = load_data(cfg, log_fn=None).tokens["train"]
        steps_per_epoch = get_batches(tokens, cfg.batch_size, cfg.ctx_len, sampler=cfg.sampler).steps_per_epoch
        if cfg.sampler in ("epochs", "documents"):
            assert 2 * steps_per_epoch < 40 and steps_per_epoch % 1, name
        assert len(tokens.domains) == 2
    whole = run_results(start_run(workdir, TINY | CASES["early stop"]))
    assert whole["status"] == "early_stop" and 20 < whole["step"] < 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    "Return the results of an uninterrupted run of `TINY`"
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").symlink_to(corpus)
    return run_results(start_run(folder, TINY))


@pytest.mark.parametrize("step", [1, 10, 15, pytest.param(23, marks=pytest.mark.nightly), 39])
def test_one_stop_and_resume(workdir, whole, step):
    "A run stopped at the first step, at a checkpoint and evaluation, at a sample, in between, or before the last step resumes to the same results"
    start_run(workdir, TINY, step, run="once")
    assert not differences(whole, run_results(resume(workdir, run="once")))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stop_and_resume_in_bfloat16(workdir, optimizer):
    "In bfloat16, which most machines choose, the resumed run writes the same results"
    case = TINY | dict(dtype="bfloat16", optimizer=optimizer)
    whole = run_results(start_run(workdir, case))
    start_run(workdir, case, 17, run="once")
    assert not differences(whole, run_results(resume(workdir, run="once")))


def test_stop_after_the_last_step(workdir, whole):
    stopped = start_run(workdir, TINY, 40, run="stopped")
    assert (stopped / "interrupted").exists()
    assert not differences(whole, run_results(resume(workdir, run="stopped")))


def _forget(key):
    "Make a resume lose a part of the saved state"

    def load_state_dict(t, state):
        t.step = state["step"]
        if key != "optimizers":
            for opt, saved in zip(t.optimizers, state["optimizers"]):
                opt.load_state_dict(saved)
        if key != "counters":
            t.counters.update(state["counters"])

    Trainer.load_state_dict = load_state_dict


def _one_later(cls, name):
    "Make a function of the step use the next step"
    as_it_is = getattr(cls, name)
    setattr(
        cls, name, lambda first, *rest: as_it_is(*((first, rest[0] + 1) if cls is EpochBatches else (first + 1, *rest)))
    )


ABLATIONS = {
    "nothing": lambda: _forget(""),
    "optimizers": lambda: _forget("optimizers"),
    "counters": lambda: _forget("counters"),
    "batches": lambda: _one_later(EpochBatches, "__getitem__"),
    "learning rate": lambda: _one_later(trainer, "lr_at"),
    "dropout": lambda: setattr(trainer, "derive_seed", lambda *key: 0),
    "metrics": lambda: setattr(
        files.JsonlLog, "truncate_after", lambda metrics, step, **last: metrics.path.unlink(missing_ok=True)
    ),
}


def train_without(what, **params):
    "Train with one guarantee of exactness removed"
    ABLATIONS[what]()
    return train(**params)


EPOCHS = TINY | dict(sampler="epochs")


@pytest.fixture(scope="module")
def epochs(tmp_path_factory, corpus):
    "Return the results of an uninterrupted run over epochs, and a folder in which it is stopped at step 13"
    folder = tmp_path_factory.mktemp("epochs")
    (folder / "corpus").symlink_to(corpus)
    whole = run_results(start_run(folder, EPOCHS))
    start_run(folder, EPOCHS, 13, run="again")
    return whole, folder / "runs/again"


@pytest.mark.parametrize("what", ABLATIONS)
def test_comparison_detects_each_missing_state(workdir, epochs, what):
    "The comparison detects every state that a resume could forget"
    whole, stopped = epochs
    shutil.copytree(stopped, workdir / "runs/again")
    assert run_in_process(workdir, train_without, what, run="again", out_dir="runs", resume=True) == 0, read_log(
        workdir
    )
    seen = differences(whole, run_results(workdir / "runs/again"))
    expected = dict(nothing=[], counters=["metrics"], metrics=["metrics"]).get(what, ["final weights", "metrics"])
    assert set(expected) <= set(seen) and bool(seen) == (what != "nothing"), seen
