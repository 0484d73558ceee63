"""What the command line answers: its exit codes, and what a resume refuses."""

import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from helpers import TINY, call, finish, lmnotes_command, log, start, until, words, write_corpus
from test_signals import command_held

from lmnotes.core import CheckpointError
from lmnotes.data.batches import RandomBatches
from lmnotes.models.gpt import GPT
from lmnotes.nn.lm import new_lm
from lmnotes.training.checkpoint import list_checkpoints, read_weights
from lmnotes.training.trainer import TrainConfig, Trainer

RESUME = dict(run="r", out_dir="runs", resume=True)


def command(place, *first, **params):
    "(exit code, what was said) of a command"
    (place / "log").unlink(missing_ok=True)
    code = call(place, lmnotes_command, *first, *words(**params))
    return code, log(place)


def record(place):
    return json.loads((place / "runs/r/run.json").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    "A folder with a finished run and the corpus that it was trained on"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    code, said = command(folder, "train", **TINY)
    assert code == 0, said
    return folder


@pytest.fixture
def again(trained, tmp_path):
    "A copy of it"
    shutil.copytree(trained, tmp_path / "again")
    return tmp_path / "again"


def test_what_is_done_is_0(again):
    assert record(again)["status"] == "done"
    code, said = command(again, "generate", "--run", "runs/r", "--prompt", "wave", "--n", "5")
    assert code == 0 and said.startswith("wave"), said
    code, said = command(again, "evaluate", "--run", "runs/r", "--which", "best", "--by-domain")
    assert code == 0 and "wood" in said and "bpb" in said, said
    code, said = command(again, "prepare", "--out", "prepared", "--data", "corpus", "--tokenizer", "bytes")
    assert code == 0 and (again / "prepared/train.bin").exists(), said


WRONG = {
    "batch_size=3 does not divide into accum=2": dict(batch_size=3),
    "optimizer='adam' is not known; did you mean 'adamw'": dict(optimizer="adam"),
    "nowhere": dict(data="nowhere/at/all"),
    "needs at least": dict(ctx_len=100_000),
    "gtp": dict(arch="gtp"),
    "no_such_thing": dict(model_args="no_such_thing=3"),
    "there is no run here to resume": dict(run="other", resume=True),
    "device='tpu'": dict(device="tpu"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_2(place, message):
    code, said = command(place, "train", **TINY | WRONG[message])
    assert code == 2 and message in said and "Traceback" not in said, said
    assert not (place / "runs/r").exists(), "a run that never began left a folder"


def test_an_unknown_parameter_is_2(place):
    code, said = command(place, "train", "--learning-rate", "1")
    assert code == 2 and "learning-rate" in said and "Traceback" not in said, said


def test_a_run_folder_has_one_owner(place):
    process = start(place, command_held, "before step 8", "train", *words(**TINY))
    until((place / "reached").exists, process)
    for params in (TINY, RESUME):
        code = call(place, lmnotes_command, "train", *words(**params))
        said = log(place).splitlines()[-1]
        assert code == 2, said
        owner = rf"in use by process {process.pid} on {re.escape(os.uname().nodename)} since \d{{4}}-\d\d-\d\dT[\d:]+\+00:00"
        assert re.search(owner, said), said
    (place / "go").touch()
    assert finish(process) == 0, log(place)
    assert record(place)["status"] == "done"


def test_a_killed_owner_holds_nothing(place):
    process = start(place, command_held, "before step 8", "train", *words(**TINY))
    until((place / "reached").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    assert call(place, lmnotes_command, "train", *words(**RESUME)) == 0, log(place)


def diverging(step, *words):
    "The command line with a loss and gradients that are not numbers from a step on"
    as_it_is = Trainer._backward

    def _backward(t, batch):
        out = as_it_is(t, batch)
        if t.step < step:
            return out
        for p in t.lm.parameters():
            p.grad.fill_(math.nan)
        return out | dict(loss=math.nan)

    Trainer._backward = _backward
    return lmnotes_command(*words)


def test_what_diverges_is_3(place):
    code = call(place, diverging, 24, "train", *words(**TINY))
    assert code == 3, log(place)
    assert "step 25: loss nan" in log(place) and "diverged at step 29 of 40" in log(place)
    assert record(place)["status"] == "diverged"
    assert [p.name for p in list_checkpoints(place / "runs/r")][-1] == "step_00000025"
    for folder in list_checkpoints(place / "runs/r"):
        assert all(t.isfinite().all() for t in read_weights(folder).values())
    assert not (place / "runs/r/final").exists()


def short_of_memory(*words):
    "The command line on a device without memory"

    def forward(model, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    GPT.forward = forward
    return lmnotes_command(*words)


def test_what_does_not_fit_is_4(place):
    code = call(place, short_of_memory, "train", *words(**TINY))
    said = log(place).splitlines()[-1]
    assert code == 4 and "2 rows of 16 tokens" in said and "Set accum=4" in said and "2.00 GiB" in said, log(place)
    assert record(place)["status"] == "failed"


IDENTITY = dict(
    arch="bigram",
    ctx_len=32,
    model_args="d_model=32 n_layers=1 n_heads=2",
    tokenizer="chars",
    init_from="elsewhere",
    freeze="head*",
    optimizer="adamw",
)
TRAJECTORY = dict(
    lr=0.01,
    steps=50,
    batch_size=8,
    seed=1,
    sampler="epochs",
    accum=1,
    data="other",
    dtype="bfloat16",
)


@pytest.mark.parametrize("name", IDENTITY)
def test_a_run_stays_what_it_is(again, name):
    code, said = command(again, "train", **RESUME, **{name: IDENTITY[name]}, allow_change=name)
    assert code == 2 and f"this run has {name}=" in said and "cannot change" in said, said


@pytest.mark.parametrize("name", TRAJECTORY)
def test_a_run_stays_on_its_way(again, name):
    code, said = command(again, "train", **RESUME, **{name: TRAJECTORY[name]})
    assert code == 2 and f"this run has {name}=" in said and f"allow_change='{name}'" in said, said


def test_what_may_change(again):
    write_corpus(again / "other", seed=1)
    code, said = command(again, "train", **RESUME, steps=50, lr=0.01, data="other", allow_change="steps lr data")
    assert code == 0, said
    for name in ("steps=50, until now 40", "lr=0.01, until now 0.0", "data='other', until now 'corpus'"):
        assert f"from here on {name}" in said, said
    assert record(again)["step"] == 50 and "from step 40" in said
    code, said = command(again, "train", **RESUME)
    assert code == 0 and "done at step 50 of 50" in said, "what was allowed to change has not become the run's own"


def test_a_misspelt_change(again):
    code, said = command(again, "train", **RESUME, steps=50, allow_change="step")
    assert code == 2 and "did you mean 'steps'" in said, said


def test_one_token_file(again):
    "Its tokenizer is kept beside it, and another one is refused"
    code, said = command(again, "prepare", "--out", "made/corpus.bin", "--data", "corpus", "--tokenizer", "bpe:300")
    assert code == 0 and re.search(r"corpus.bin: .* MiB, compression ratio \d+\.\d\d characters per token", said), said
    small = TINY | dict(run="one", data="made/corpus.bin", steps=2)
    code, said = command(again, "train", **small | dict(tokenizer="bytes"))
    assert code == 2 and "not by tokenizer='bytes'; leave tokenizer out" in said, said
    for tokenizer in ("bpe:300", "bpe:2048"):
        code, said = command(again, "train", **small | dict(tokenizer=tokenizer))
        assert code == 0, said
    assert json.loads((again / "runs/one/run.json").read_bytes())["tokenizer"]["vocab_size"] == 300
    code, said = command(again, "prepare", "--out", "x.bin", "--data", "corpus", "--split", "hash")
    assert code == 2 and "x.bin is one file; give a folder, or leave out split" in said, said


def test_any_bytes(again):
    "Whatever the file is called"
    (again / "noise.bin").write_bytes(bytes(range(256)) * 40)
    code, said = command(again, "train", **TINY | dict(run="noise", data="bytes:noise.bin", steps=2))
    assert code == 0, said
    tokens = json.loads((again / "runs/noise/run.json").read_bytes())["data"]["tokens"]
    assert tokens == dict(train=9216, val=512, test=512)
    code, said = command(again, "train", **TINY | dict(run="none", data="bytes:nothing", steps=2))
    assert code == 2 and "no file: tried" in said, said


def test_the_last_run_writes(again):
    code, said = command(again, "train", **TINY | dict(run="checkpoints", out_dir="", steps=2))
    assert code == 0, said  # A run that is called like a folder here
    code, said = command(again, "generate", "--preset", "text_only", "--n", "5")
    assert code == 0 and said.startswith("Once upon a time"), said
    code, said = command(again, "generate", "--preset", "text-only")
    assert code == 2 and "did you mean 'text_only'?" in said, said


def edit(file):
    "Another letter in a file of the same size and age"
    about = file.stat()
    text = file.read_bytes()
    assert b"wave" in text
    file.write_bytes(text.replace(b"wave", b"wage", 1))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_size == about.st_size


def test_data_that_was_edited(again):
    edit(again / "corpus/sea/all.jsonl")
    code, said = command(again, "train", **RESUME)
    assert code == 2 and "the data has changed" in said and "allow_change='data'" in said, said
    code, said = command(again, "train", **RESUME, allow_change="data")
    assert code == 0, said


def test_a_tokenizer_that_was_exchanged(again):
    code, said = command(again, "train", **TINY | dict(run="other", tokenizer="bpe:300", steps=1))
    assert code == 0, said
    shutil.rmtree(again / "runs/r/tokenizer")
    shutil.copytree(again / "runs/other/tokenizer", again / "runs/r/tokenizer")
    for first, params in ((["train"], RESUME), (["generate"], dict(run="runs/r")), (["evaluate"], dict(run="runs/r"))):
        code, said = command(again, *first, **params)
        assert code == 2 and "put the run's own tokenizer folder back" in said, said


def test_optimizers_of_other_parameters():
    "The same shapes under other names, or in another order"
    batches, cfg = RandomBatches(torch.arange(99).numpy() % 8, 2, 4), TrainConfig(optimizer="adamw", dtype="float32")
    lm = new_lm("gpt", vocab_size=8, ctx_len=4, d_model=8, n_layers=1, n_heads=2)
    state = Trainer(lm, batches, cfg).fit(1).state_dict()
    groups = [g for o in state["optimizers"] for g in o["param_groups"]]
    group = next(g for g in groups if len(g["param_names"]) > 1)
    group["param_names"][:2] = group["param_names"][1::-1]
    with pytest.raises(CheckpointError, match="the saved optimizers move"):
        Trainer(lm, batches, cfg).load_state_dict(state)


def test_a_checkpoint_of_another_run(again):
    "One run's step folder in another's place is whole, but it holds another model"
    code, said = command(
        again, "train", **TINY | dict(run="other", model_args="d_model=32 n_layers=1 n_heads=2", steps=50)
    )
    assert code == 0, said
    shutil.copytree(again / "runs/other/step_00000050", again / "runs/r/step_00000050")
    code, said = command(again, "train", **RESUME, steps=60, allow_change="steps")
    assert code == 2 and "config.json: a model with d_model=32" in said and "another run" in said, said
