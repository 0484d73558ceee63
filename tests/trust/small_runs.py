"""Tiny runs that are trained, stopped and resumed in this process, and the results of their uses."""

import io
import os
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict

import torch
from helpers import TINY, StopAtSteps, iter_leaves, write_corpus

from lmnotes.core import sha256_bytes
from lmnotes.runs.config import CHANGEABLE_PARAMS
from lmnotes.runs.run import run
from lmnotes.training.trainer import Hook

SMALL = TINY | dict(model_args="d_model=8 n_layers=1 n_heads=1", ctx_len=8, batch_size=2, accum=1, steps=12)
SMALL |= dict(eval_every=4, eval_batches=1, sample_every=6, save_every=4, log_every=2, tokenizer="bpe:270", prompt="a")
RUNS = {
    "done": ((), {}),
    "stopped": ((6,), dict(lr=0.003)),
    "adapted": ((), dict(lora_rank=1, optimizer="adamw", tokenizer="bytes")),
    "other": ((), dict(seed=1, model_args="d_model=8 n_layers=1 n_heads=1 dropout=0.1")),
}


class StopAtOnce(Hook):
    "Hook that notes the state of a resumed run before its first step, and stops it"

    def after_step(self, t):
        self.found = dict(
            step=t.step, cfg=trajectory(asdict(t.cfg)), state=hash_of(t.state_dict()), weights=hash_of_weights(t.lm)
        )
        t.stop = "interrupted"


def trajectory(config):
    "Return the parameters that determine the result of a run"
    return {name: value for name, value in config.items() if name not in CHANGEABLE_PARAMS}


def hash_of(value):
    return sha256_bytes(b"".join(name.encode() + data for name, data in iter_leaves(value)))


def hash_of_weights(lm):
    return hash_of(dict(lm.state_dict()))


def attempt(use, folder):
    "Return (result or None, error or None, printed text) of a use"
    with redirect_stdout(io.StringIO()) as out:
        try:
            return use(folder), None, out.getvalue()
        except Exception as e:
            return None, e, out.getvalue()


@contextmanager
def trained_runs(folder, runs):
    "Train runs, given as {name: (stops, parameters)}, in a folder that is the current one until the end"
    before, fsync = os.getcwd(), os.fsync
    write_corpus(folder / "corpus")
    os.chdir(folder)
    os.fsync = lambda descriptor: None  # Nothing here is about a power cut
    torch.set_num_threads(1)
    try:
        for name, (stops, params) in runs.items():
            with redirect_stdout(io.StringIO()):
                run(hooks=[StopAtSteps(*stops)], view=False, **SMALL | dict(run=name) | params)
        yield folder / "runs"
    finally:
        os.chdir(before)
        os.fsync = fsync
