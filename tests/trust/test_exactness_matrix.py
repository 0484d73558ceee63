"""Every architecture, in float32 and bfloat16, with and without gradient accumulation, on one and two processes, stopped in three ways.

A run is stopped by a hook at a step, then by SIGTERM before a step, then by SIGKILL before a step, and each time resumed in
new processes. It must end in the same bits as a run that was never stopped.
"""

import itertools
import os
import signal

import pytest
from helpers import TINY, differences, read_log, run_before_call, run_ranks, run_results, train

from lmnotes.training.trainer import Trainer

EXPERT = "d_model=16,n_layers=1,n_heads=2,dropout=0.1"
NANOTHINK = (
    f"transformer=gpt,{EXPERT} state_space=ssm,d_model=24,n_layers=1,head_dim=8,d_state=4 "
    f"diffuser=diffusion,block=1,{EXPERT} d_model=16 n_heads=2 head_dim=8 kv_latent_dim=8 rope_dim=4"
)
ARCHITECTURES = {
    "gpt": {},
    "bigram": dict(model_args=""),
    "rnn": dict(model_args="d_model=16 d_hidden=16 n_layers=2 dropout=0.1"),
    "lstm": dict(arch="rnn", model_args="d_model=16 d_hidden=16 cell=lstm"),
    "scratch_gpt": dict(model_args="d_model=16 n_layers=1 n_heads=2"),
    "gpt2": dict(model_args="d_model=16 n_layers=1 n_heads=2 n_positions=16", init_from="random"),
    "bytepatch": dict(tokenizer="bytes", model_args="d_model=16 d_byte=16 n_layers=1 n_heads=2 ngram_rows=64"),
    "streams": dict(model_args="d_model=16 n_layers=1 n_heads=2 dropout=0.1"),
    "agiformer": dict(
        arch="bytepatch", preset="agiformer", tokenizer="bytes", model_args="d_model=16 n_layers=1 n_heads=2"
    ),
    "ssm": dict(model_args="d_model=16 n_layers=2 head_dim=8 d_state=4 dropout=0.1"),
    "nanothink_s6": dict(arch="ssm", preset="nanothink_s6", model_args="d_model=16 d_inner=32 n_layers=1 d_state=4"),
    "diffusion": dict(model_args="d_model=16 n_layers=1 n_heads=2 dropout=0.1 causal_share=0.5"),
    "diffuser": dict(arch="diffusion", preset="nanothink", model_args="d_model=16 n_layers=1 n_heads=2"),
    "nanothink": dict(model_args=NANOTHINK),
    "lora": dict(arch="gpt", lora_rank=2, lora_dropout=0.1, lora_train="embed.*"),
}
DTYPES, ACCUM, PROCESSES = ("float32", "bfloat16"), (1, 2), (1, 2)
LEVELS = list(itertools.product(DTYPES, ACCUM, PROCESSES))
TWO = "gpt", "diffusion", "nanothink"  # On two processes by default, the others on one


def is_default(i, name, dtype, accum, processes):
    "Return True for the case of an architecture that the default run tests. All levels occur in them"
    return (dtype, accum) == (DTYPES[i % 2], ACCUM[i // 2 % 2]) and processes == (2 if name in TWO else 1)


CASES = [
    pytest.param(
        *(case := (name, *levels)),
        marks=[] if is_default(i, *case) else pytest.mark.nightly,
        id=f"{name}-{levels[0]}-accum {levels[1]}-processes {levels[2]}",
    )
    for i, name in enumerate(ARCHITECTURES)
    for levels in LEVELS
]


def train_rank(stop, params):
    "Train as one of several ranks, and stop in one of three ways"
    how, step = stop
    if how != "hook":
        number = signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM
        stops = how == "SIGKILL" or os.environ.get("RANK", "0") == "0"
        run_before_call(
            Trainer, "train_step", lambda t: stops and t.step == step - 1, lambda: os.kill(os.getpid(), number)
        )
    return train(*([step] if how == "hook" and step else []), **params)


def train_ranks(workdir, world, stop=("hook", 0), **params):
    "Train in one or two processes, and return the exit code of the first"
    return run_ranks(workdir, world, train_rank, stop, params)[0]


@pytest.mark.parametrize("name, dtype, accum, processes", CASES)
def test_resume_is_bit_exact(workdir, name, dtype, accum, processes):
    "A run stopped by a hook, by SIGTERM and by SIGKILL, and resumed each time, ends in the same bits"
    case = TINY | dict(arch=name, optimizer="adamw", steps=16, save_every=4) | ARCHITECTURES[name]
    case |= dict(dtype=dtype, accum=accum, arch=ARCHITECTURES[name].get("arch", name))
    if name == "lora":
        base = {n: v for n, v in case.items() if not n.startswith("lora_")}
        assert train_ranks(workdir, 1, **base | dict(run="base", steps=4)) == 0, read_log(workdir)
        case |= dict(init_from="base")
    assert train_ranks(workdir, processes, **case | dict(run="whole")) == 0, read_log(workdir)
    codes = [train_ranks(workdir, processes, ("hook", 3), **case)]
    again = dict(run="r", out_dir="runs", resume=True)
    codes += [train_ranks(workdir, processes, stop, **again) for stop in (("SIGTERM", 7), ("SIGKILL", 14))]
    codes.append(train_ranks(workdir, processes, **again))
    assert codes == [130, 130, -signal.SIGKILL, 0], (codes, read_log(workdir))
    seen = differences(run_results(workdir / "runs/whole"), run_results(workdir / "runs/r"))
    assert not seen, f"these differ: {seen}"
