"""The command line: its exit codes, and the changes that it rejects on resume."""

import json
import math
import os
import re
import shutil
import signal

import pytest
import torch
from helpers import (
    TINY,
    command_line_args,
    lmnotes_command,
    read_log,
    run_in_process,
    start_process,
    wait_for_exit,
    wait_until,
    write_corpus,
)
from test_signals import command_held

import lmnotes
from lmnotes.core import CheckpointError
from lmnotes.data.batches import RandomBatches
from lmnotes.models.gpt import GPT
from lmnotes.nn.lm import new_lm
from lmnotes.training.checkpoint import list_checkpoints, read_weights
from lmnotes.training.trainer import TrainConfig, Trainer

RESUME = dict(run="r", out_dir="runs", resume=True)


def command(workdir, *first, **params):
    "Run a command and return (exit code, output)"
    (workdir / "log").unlink(missing_ok=True)
    code = run_in_process(workdir, lmnotes_command, *first, *command_line_args(**params))
    return code, read_log(workdir)


def record(workdir):
    return json.loads((workdir / "runs/r/run.json").read_bytes())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    "Return a folder with a finished run and its corpus"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    code, output = command(folder, "train", **TINY)
    assert code == 0, output
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path):
    "Return a copy of the folder with a finished run"
    shutil.copytree(trained, tmp_path / "again")
    return tmp_path / "again"


def test_exit_code_0_on_success(trained_copy):
    assert record(trained_copy)["status"] == "done"
    code, output = command(trained_copy, "generate", "--run", "runs/r", "--prompt", "wave", "--n", "5")
    assert code == 0 and output.startswith("wave"), output
    code, output = command(trained_copy, "evaluate", "--run", "runs/r", "--which", "best", "--by-domain")
    assert code == 0 and "wood" in output and "bpb" in output, output
    code, output = command(trained_copy, "prepare", "--out", "prepared", "--data", "corpus", "--tokenizer", "bytes")
    assert code == 0 and (trained_copy / "prepared/train.bin").exists(), output


WRONG = {
    "batch_size=3 is not divisible by accum=2": dict(batch_size=3),
    "optimizer='adam', expected muon or adamw; did you mean 'adamw'": dict(optimizer="adam"),
    "nowhere": dict(data="nowhere/at/all"),
    "needs at least": dict(ctx_len=100_000),
    "gtp": dict(arch="gtp"),
    "no_such_thing": dict(model_args="no_such_thing=3"),
    "there is no run here to resume": dict(run="other", resume=True),
    "device='tpu'": dict(device="tpu"),
    "d_model must be of type int. Separate fields by spaces": dict(model_args="d_model=16,n_layers=2"),
    "gives a field twice. Give each once": dict(model_args="d_model=16 n_layers=2 d_model=32"),
    "To choose another folder for the runs, pass out_dir": dict(run="/tmp/x"),
}


@pytest.mark.parametrize("message", WRONG)
def test_exit_code_2_for_invalid_parameters(workdir, message):
    code, output = command(workdir, "train", **TINY | WRONG[message])
    assert code == 2 and message in output and "Traceback" not in output, output
    assert not (workdir / "runs/r").exists(), "a run that never began left a folder"


def test_a_path_that_does_not_exist_is_named_as_given(workdir):
    "A name is looked up among the runs, and a path is not"
    code, output = command(workdir, "generate", "--run", "checkpoints/nope")
    assert code == 2 and "checkpoints/nope: " in output and "checkpoints/checkpoints" not in output, output
    code, output = command(workdir, "generate", "--run", "nope")
    assert code == 2 and "checkpoints/nope: " in output, output


def test_run_takes_only_keywords():
    with pytest.raises(TypeError, match="positional argument"):
        lmnotes.run("x")


def test_evaluate_uses_the_most_recent_run(trained_copy):
    (trained_copy / "runs").rename(trained_copy / "checkpoints")
    code, output = command(trained_copy, "evaluate")
    assert code == 0 and "bpb" in output, output


def test_exit_code_2_for_unknown_parameters(workdir):
    code, output = command(workdir, "train", "--learning-speed", "1")
    assert code == 2 and "learning-speed" in output and "Traceback" not in output, output


def test_a_run_folder_has_one_owner(workdir):
    process = start_process(workdir, command_held, "before step 8", "train", *command_line_args(**TINY))
    wait_until((workdir / "reached").exists, process)
    for params in (TINY, RESUME):
        code = run_in_process(workdir, lmnotes_command, "train", *command_line_args(**params))
        output = read_log(workdir).splitlines()[-1]
        assert code == 2, output
        owner = rf"in use by process {process.pid} on {re.escape(os.uname().nodename)} since \d{{4}}-\d\d-\d\dT[\d:]+\+00:00"
        assert re.search(owner, output), output
    (workdir / "go").touch()
    assert wait_for_exit(process) == 0, read_log(workdir)
    assert record(workdir)["status"] == "done"


def test_a_killed_process_releases_its_run(workdir):
    process = start_process(workdir, command_held, "before step 8", "train", *command_line_args(**TINY))
    wait_until((workdir / "reached").exists, process)
    os.kill(process.pid, signal.SIGKILL)
    assert wait_for_exit(process) == -signal.SIGKILL
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**RESUME)) == 0, read_log(workdir)


def train_diverging(step, *command_line_args):
    "Run the command line with a NaN loss and gradients from a step on"
    as_it_is = Trainer._backward

    def _backward(t, batch):
        out = as_it_is(t, batch)
        if t.step < step:
            return out
        for p in t.lm.parameters():
            p.grad.fill_(math.nan)
        return out | dict(loss=math.nan)

    Trainer._backward = _backward
    return lmnotes_command(*command_line_args)


def test_exit_code_3_for_divergence(workdir):
    code = run_in_process(workdir, train_diverging, 24, "train", *command_line_args(**TINY))
    assert code == 3, read_log(workdir)
    assert "step 25 is skipped: loss nan" in read_log(workdir) and "diverged at step 29 of 40" in read_log(workdir)
    assert record(workdir)["status"] == "diverged"
    assert [p.name for p in list_checkpoints(workdir / "runs/r")][-1] == "step_00000025"
    for folder in list_checkpoints(workdir / "runs/r"):
        assert all(t.isfinite().all() for t in read_weights(folder).values())
    assert not (workdir / "runs/r/final").exists()


def train_without_memory(*command_line_args):
    "Run the command line on a device without memory"

    def forward(model, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    GPT.forward = forward
    return lmnotes_command(*command_line_args)


def test_exit_code_4_for_out_of_memory(workdir):
    code = run_in_process(workdir, train_without_memory, "train", *command_line_args(**TINY))
    output = read_log(workdir).splitlines()[-1]
    assert (
        code == 4 and "micro-batches of 2 x 16 tokens" in output and "Set accum=4" in output and "2.00 GiB" in output
    ), read_log(workdir)
    assert record(workdir)["status"] == "failed"


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
    steps=30,
    batch_size=8,
    seed=1,
    sampler="epochs",
    accum=1,
    data="other",
    dtype="bfloat16",
)


@pytest.mark.parametrize("name", IDENTITY)
def test_fixed_parameters_cannot_change(trained_copy, name):
    code, output = command(trained_copy, "train", **RESUME, **{name: IDENTITY[name]}, allow_change=name)
    shown = "d_model=16, not 32" if name == "model_args" else f"{name}="
    assert code == 2 and f"this run has {shown}" in output and "cannot change" in output, output


@pytest.mark.parametrize("name", TRAJECTORY)
def test_other_parameters_need_allow_change(trained_copy, name):
    write_corpus(trained_copy / "other", seed=1)
    code, output = command(trained_copy, "train", **RESUME, **{name: TRAJECTORY[name]})
    assert code == 2 and f"this run has {name}=" in output and f"--allow-change {name}" in output, output


def test_changeable_parameters(trained_copy):
    write_corpus(trained_copy / "other", seed=1)
    code, output = command(
        trained_copy, "train", **RESUME, steps=50, lr=0.01, data="other", allow_change="steps lr data"
    )
    assert code == 0, output
    for name in ("steps to 50 (was 40)", "lr to 0.01 (was 'auto')", "data to 'other' (was 'corpus')"):
        assert f"changed {name}" in output, output
    assert record(trained_copy)["step"] == 50 and "from step 40" in output
    code, output = command(trained_copy, "train", **RESUME)
    assert code == 0 and "done at step 50 of 50" in output, "what was allowed to change has not become the run's own"


def test_misspelled_allow_change(trained_copy):
    code, output = command(trained_copy, "train", **RESUME, steps=50, allow_change="step")
    assert code == 2 and "did you mean 'steps'" in output, output


def test_one_token_file(trained_copy):
    "The tokenizer is stored next to the token file, and another one is rejected"
    code, output = command(
        trained_copy, "prepare", "--out", "made/corpus.bin", "--data", "corpus", "--tokenizer", "bpe:300"
    )
    assert code == 0 and re.search(r"corpus.bin: .* MiB, compression ratio \d+\.\d\d characters per token", output), (
        output
    )
    small = TINY | dict(run="one", data="made/corpus.bin", steps=2)
    code, output = command(trained_copy, "train", **small | dict(tokenizer="bytes"))
    assert code == 2 and "not by tokenizer='bytes'. Leave out --tokenizer" in output, output
    for tokenizer in ("bpe:300", "bpe:2048"):
        code, output = command(trained_copy, "train", **small | dict(tokenizer=tokenizer))
        assert code == 0, output
    assert json.loads((trained_copy / "runs/one/run.json").read_bytes())["tokenizer"]["vocab_size"] == 300
    code, output = command(trained_copy, "prepare", "--out", "x.bin", "--data", "corpus", "--split", "hash")
    assert code == 2 and "x.bin is one file. Name a folder, or omit split" in output, output


def test_any_file_as_bytes(trained_copy):
    "Any file can be read as bytes, under any name"
    (trained_copy / "noise.bin").write_bytes(bytes(range(256)) * 40)
    code, output = command(trained_copy, "train", **TINY | dict(run="noise", data="bytes:noise.bin", steps=2))
    assert code == 0, output
    tokens = json.loads((trained_copy / "runs/noise/run.json").read_bytes())["data"]["tokens"]
    assert tokens == dict(train=9216, val=512, test=512)
    code, output = command(trained_copy, "train", **TINY | dict(run="none", data="bytes:nothing", steps=2))
    assert code == 2 and "no file: tried" in output, output


def test_generate_uses_the_last_run(trained_copy):
    code, output = command(trained_copy, "train", **TINY | dict(run="checkpoints", out_dir="", steps=2))
    assert code == 0, output  # A run with the name of a folder here
    code, output = command(trained_copy, "generate", "--preset", "text_only", "--n", "5")
    assert code == 0 and output.startswith("Once upon a time"), output
    code, output = command(trained_copy, "generate", "--preset", "text-only")
    assert code == 2 and "did you mean 'text_only'?" in output, output


def edit(file):
    "Change a letter in a file without changing its size or time"
    about = file.stat()
    text = file.read_bytes()
    assert b"wave" in text
    file.write_bytes(text.replace(b"wave", b"wage", 1))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert file.stat().st_size == about.st_size


def test_edited_data_is_rejected_on_resume(trained_copy):
    edit(trained_copy / "corpus/sea/all.jsonl")
    more = RESUME | dict(steps=50)  # A finished run would need no data
    code, output = command(trained_copy, "train", **more, allow_change="steps")
    assert code == 2 and "the data has changed" in output and "--allow-change data" in output, output
    code, output = command(trained_copy, "train", **more, allow_change="steps data")
    assert code == 0, output


def test_replaced_tokenizer_is_rejected(trained_copy):
    code, output = command(trained_copy, "train", **TINY | dict(run="other", tokenizer="bpe:300", steps=1))
    assert code == 0, output
    shutil.rmtree(trained_copy / "runs/r/tokenizer")
    shutil.copytree(trained_copy / "runs/other/tokenizer", trained_copy / "runs/r/tokenizer")
    for first, params in ((["train"], RESUME), (["generate"], dict(run="runs/r")), (["evaluate"], dict(run="runs/r"))):
        code, output = command(trained_copy, *first, **params)
        assert code == 2 and "Restore the tokenizer folder of the run" in output, output


def test_optimizer_state_of_other_parameters_is_rejected():
    "The same shapes under other names, or in another order"
    batches, cfg = RandomBatches(torch.arange(99).numpy() % 8, 2, 4), TrainConfig(optimizer="adamw", dtype="float32")
    lm = new_lm("gpt", vocab_size=8, ctx_len=4, d_model=8, n_layers=1, n_heads=2)
    state = Trainer(lm, batches, cfg).fit(1).state_dict()
    groups = [g for o in state["optimizers"] for g in o["param_groups"]]
    group = next(g for g in groups if len(g["param_names"]) > 1)
    group["param_names"][:2] = group["param_names"][1::-1]
    with pytest.raises(CheckpointError, match="the saved optimizers have"):
        Trainer(lm, batches, cfg).load_state_dict(state)


def test_checkpoint_of_another_run_is_rejected(trained_copy):
    "A checkpoint of another run is intact but holds another model"
    code, output = command(
        trained_copy, "train", **TINY | dict(run="other", model_args="d_model=32 n_layers=1 n_heads=2", steps=50)
    )
    assert code == 0, output
    shutil.copytree(trained_copy / "runs/other/step_00000050", trained_copy / "runs/r/step_00000050")
    code, output = command(trained_copy, "train", **RESUME, steps=60, allow_change="steps")
    assert code == 2 and "step_00000050 was saved with" in output and "d_model=32" in output, output
    assert "another run" in output, output
