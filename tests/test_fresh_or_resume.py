"""The fresh-or-resume guide: its three acceptance tests, and a test for each known mistake of its scripts."""

import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, lmnotes_command, read_log, run_in_process, state_hash, with_environment

import lmnotes
from lmnotes.core import CheckpointError
from lmnotes.data.batches import Batch
from lmnotes.data.tokenizer import BPETokenizer
from lmnotes.models.gpt2 import save_hf
from lmnotes.nn.blocks import make_causal_attention_fn
from lmnotes.nn.lm import get_arch, new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora
from lmnotes.recipes.fresh_or_resume import _resume_line, from_env
from lmnotes.recipes.fresh_or_resume_config import (
    FIELD_TABLE,
    FUNCTION_TABLE,
    TrainingConfig,
    load_config_fresh_from_env,
    to_run_params,
    warn_of_misspelt_variables,
)
from lmnotes.runs.config import RunConfig
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training import checkpoint
from lmnotes.training.trainer import Trainer

TINY = dict(
    TRAINING_DATA_SOURCE="text.txt",
    BATCH_SIZE="4",
    BLOCK_SIZE="16",
    N_EMBD="16",
    N_HEAD="2",
    N_LAYER="1",
    EVAL_ITERS="2",
    EVAL_INTERVAL="100",
    MAX_NEW_TOKENS="20",
    DEVICE="cpu",
)
GPT2 = {name: value for name, value in TINY.items() if not name.startswith("N_")}
GPT2 |= dict(MODEL_TYPE="gpt2", GPT2_MODEL_NAME="tiny-gpt2")
KEEP = dict(ENABLE_CHECKPOINTS="True")
METHODS = "character", "gpt2", "custom_bpe"
CASES = {f"from_scratch {method}": TINY | dict(TOKENIZATION_METHOD=method) for method in METHODS} | dict(gpt2=GPT2)
CASES |= {f"{name} lora": case | dict(USE_LORA="True", LORA_RANK="4") for name, case in CASES.items()}


def sentences(words, n=600, seed=0):
    "Return lines of words drawn at random"
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(words.split(), k=6)) + "\n" for _ in range(n))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    "Return a folder with two texts of different characters, a small random GPT-2, and a small vocabulary for it"
    folder = tmp_path_factory.mktemp("material")
    (folder / "text.txt").write_text(sentences("wave salt tide foam harbour gull sea"))
    (folder / "other.txt").write_text(sentences("Zürich MOSS fern oak bark owl clearing quartz", seed=1))
    tokenizer = BPETokenizer.train([(folder / "text.txt").read_text()], 300)
    torch.manual_seed(0)
    lm = new_lm("gpt2", vocab_size=tokenizer.vocab_size, n_positions=32, ctx_len=32, d_model=16, n_layers=2, n_heads=2)
    (folder / "tiny-gpt2").mkdir()
    save_hf(lm, folder / "tiny-gpt2")
    for workdir in (folder / "tiny-gpt2", folder / "data/gpt2"):
        tokenizer.save(workdir)
    return folder


@pytest.fixture
def workdir(tmp_path, material, monkeypatch):
    "Return the current folder with the material"
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMNOTES_OUT_DIR", raising=False)
    monkeypatch.delenv("LMNOTES_DATA", raising=False)
    return tmp_path


def enter(variables):
    "Call the entry point and return an exit code, for use in a new process"
    return dict(done=0, interrupted=130)[from_env(variables).status]


def only_run(workdir):
    "Return the folder of the only run"
    (record,) = (workdir / "checkpoints").glob("*/run.json")
    return record.parent


def train_losses(folder):
    "Return {step: training loss} of a run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def bits(folder):
    "Return hashes of the weights and the optimizer state at the end of a run"
    step = folder / (folder / "final").read_text().strip()
    weights = [p for p in sorted(step.iterdir()) if p.suffix == ".safetensors"]
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in weights] + [state_hash_without_reports(step)]


def state_hash_without_reports(step):
    "Return the hash of the optimizer states. The counters also count the evaluation at the end of a session"
    state = torch.load(step / "state.pt", weights_only=True)
    torch.save(dict(optimizers=state["optimizers"], step=state["step"]), step.parent / "state.pt")
    return state_hash(step.parent)


def text_of(folder, pattern):
    "Return the content of the only file that matches `pattern`"
    (path,) = folder.glob(pattern)
    return path.read_text()


# The fresh-or-resume guide's acceptance tests


LONG = {n: pytest.param(n, 200, 300, id=f"{n} 200 + 300", marks=pytest.mark.nightly) for n in CASES}
LONG["from_scratch character"] = pytest.param("from_scratch character", 200, 300)
SHORT = [
    pytest.param(
        n,
        *((100, 150) if n.startswith("gpt2") else (50, 75)),
        id=n,
        marks=[pytest.mark.nightly] * (n in ("gpt2", "from_scratch gpt2 lora")),
    )
    for n in CASES
    if n != "from_scratch character"
]


@pytest.mark.parametrize("name, first, more", [*LONG.values(), *SHORT])
def test_fresh_then_resumed(workdir, name, first, more):
    "A run of 200 steps, resumed for 300 more in a new process, has the same losses and bits as a run of 500 steps"
    total = first + more
    case = CASES[name] | KEEP
    assert run_in_process(workdir, enter, case | dict(TRAINING_STEPS=str(total))) == 0, read_log(workdir)
    whole = only_run(workdir).rename(workdir / "whole")
    shutil.rmtree(workdir / "logs")
    assert (
        run_in_process(workdir, enter, case | dict(TRAINING_STEPS=str(first), CHECKPOINT_INTERVAL=str(first))) == 0
    ), read_log(workdir)
    part = only_run(workdir)
    assert json.loads((part / "run.json").read_text())["step"] == first
    (file,) = part.glob(f"checkpoint_*_step{first:06}_*.pt")
    assert all(isinstance(t, torch.Tensor) for t in torch.load(file, weights_only=True).values())
    assert run_in_process(workdir, enter, case | dict(CHECKPOINT_PATH=str(file), RESUME_STEPS=str(more))) == 0, (
        read_log(workdir)
    )
    record = json.loads((part / "run.json").read_text())
    assert (record["status"], record["step"], record["config"]["steps"]) == ("done", total, total)
    printed = text_of(workdir / "logs", "resume_training_log_*.log").splitlines()
    assert printed[0].startswith(f"Resuming from step {first} - Training Log - Started at ")
    reports = [line for line in printed if re.match(rf"step \d+/{total}", line)]
    assert reports[0].startswith(f"step {first}/{total} (40.0%) | val loss") and reports[-1].startswith(
        f"step {total}/{total}"
    )
    assert train_losses(part) == train_losses(whole) and len(train_losses(part)) == total // 25
    assert bits(part) == bits(whole)
    assert load(part).lm.lora is None or "lora" in name


def test_a_fresh_gpt2_learns(workdir):
    "In 200 steps the loss falls below that of the initial weights"
    r = from_env(GPT2 | dict(TRAINING_STEPS="200", LEARNING_RATE="1e-2"))
    losses = train_losses(r.folder)
    assert (r.status, r.step) == ("done", 200) and losses[200] < losses[25] - 0.3
    printed = text_of(workdir / "logs", "training_log_tinygpt2_text_*.log")
    assert printed.startswith("Training Log - Started at ") and "done at step 200 of 200\nQUESTION: " in printed


@pytest.mark.parametrize("method", METHODS)
def test_changed_data_file(workdir, method):
    "A changed file is rejected. Under another name it is a new stage with the same tokenizer and a message"
    case = TINY | KEEP | dict(TOKENIZATION_METHOD=method)
    first = from_env(case | dict(TRAINING_STEPS="10"))
    again = case | dict(CHECKPOINT_PATH=str(first.folder), RESUME_STEPS="10")
    shutil.copy("other.txt", "text.txt")
    with pytest.raises(CheckpointError, match="the data has changed: this run was trained on content"):
        from_env(again)
    assert load(first.folder).step == 10
    second = from_env(again | dict(TRAINING_DATA_SOURCE="other.txt"))
    assert (second.step, second.tokenizer.fingerprint) == (20, first.tokenizer.fingerprint)
    assert second.info["data"]["fingerprint"] != first.info["data"]["fingerprint"]
    printed = "".join(p.read_text() for p in (workdir / "logs").glob("resume_*_other_*"))
    assert "new data from step 10: other.txt (same tokenizer)" in printed


# Mistakes of the fresh-or-resume guide's code, in the order of its list


def test_mistake_01_frozen_layers_stop_the_gradient():
    "With adapters, the gradient of the first step reaches every layer and the embeddings"
    torch.manual_seed(0)
    lm = new_lm("scratch_gpt", vocab_size=40, ctx_len=16, d_model=16, n_layers=3, n_heads=2, dropout=0.0)
    add_lora(lm, LoRAConfig(4, train="embed.* positions.* *norm*"))
    w = torch.randint(40, (4, 17))
    lm.loss(Batch(w[:, :-1], w[:, 1:]))["loss"].backward()
    still = [n for n, p in lm.named_parameters() if p.requires_grad and not n.endswith("lora_A") and not p.grad.any()]
    assert still == []
    assert lm.embed.weight.grad.norm() > 1e-3


def test_mistake_02_targets_are_shifted_twice(material):
    "GPT-2's loss is the cross-entropy of the targets that it is given"
    lm = get_arch("gpt2").pretrained(material / "tiny-gpt2", ctx_len=16).eval()
    w = torch.randint(lm.cfg.vocab_size, (2, 17))
    by_hand = F.cross_entropy(lm(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten())
    assert torch.allclose(lm.loss(Batch(w[:, :-1], w[:, 1:]))["loss"], by_hand, atol=1e-6)


def test_mistake_03_adapters_are_not_in_the_configuration(workdir):
    "A run with LORA_RANK=8 resumes without the variable, and another value is rejected"
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="5", USE_LORA="True", LORA_RANK="8", LORA_ALPHA="8"))
    go_on = TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="5")
    with pytest.raises(ValueError, match="LORA_RANK=4, but the checkpoint was trained with 8"):
        from_env(go_on | dict(LORA_RANK="4"))
    with pytest.raises(ValueError, match="LORA_DROPOUT=0.5, but the checkpoint was trained with 0.0"):
        from_env(go_on | dict(LORA_DROPOUT="0.5"))
    after = from_env(go_on)
    assert (after.lm.lora.rank, after.lm.lora.alpha, after.config.lora_rank) == (8, 8.0, 8)


def test_mistake_04_the_first_batches_come_again(workdir):
    "60 steps and 40 more after a resume give the same bits as 100 steps"
    whole = from_env(TINY | dict(TRAINING_STEPS="100"))
    part = from_env(TINY | KEEP | dict(TRAINING_STEPS="60"))
    part = from_env(TINY | dict(CHECKPOINT_PATH=str(part.folder), RESUME_STEPS="40"))
    assert bits(part.folder) == bits(whole.folder)
    assert part.result["last"]["loss"] == whole.result["last"]["loss"]


def test_resume_after_the_last_step(workdir, monkeypatch, capsys):
    "The command that is printed if a run is interrupted in its last step finishes the run"
    train_step = Trainer.train_step

    def interrupted_step(trainer, *args):
        train_step(trainer, *args)
        trainer.stop = "interrupted" if trainer.step == 5 else ""

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted_step)
        part = from_env(TINY | KEEP | dict(TRAINING_STEPS="5"))
    (command,) = re.findall(r"lmnotes.from_env\((.*)\)", capsys.readouterr().out)
    whole = from_env(TINY | ast.literal_eval(command))
    assert (part.status, whole.status, whole.step) == ("interrupted", "done", 5)


@pytest.mark.parametrize("method", METHODS)
def test_mistake_05_the_tokenizer_is_made_again_from_other_text(workdir, method):
    "The run's own tokenizer encodes the new text, and the loaded run decodes with it"
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="5", TOKENIZATION_METHOD=method))
    new = dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="5", TRAINING_DATA_SOURCE="other.txt")
    after = load(from_env(TINY | new).folder)
    ids = r.tokenizer.encode("salt and tide\n")
    assert after.tokenizer.encode("salt and tide\n").tolist() == ids.tolist()
    assert after.tokenizer.decode(after.tokenizer.encode("wave\nfoam")) == "wave\nfoam"  # No spaces between pieces


def test_mistake_06_checkpoints_only_at_evaluations(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="100", CHECKPOINT_INTERVAL="30", EVAL_INTERVAL="100"))
    steps = sorted(int(re.search(r"step(\d+)", p.name)[1]) for p in r.folder.glob("checkpoint_*.pt"))
    assert steps == [30, 60, 90, 100]
    assert [int(p.name[5:]) for p in checkpoint.list_checkpoints(r.folder)] == [30, 60, 90, 100]


def test_mistake_07_warming_up_is_an_error(workdir):
    "GPT-2 with the default USE_LR_WARMUP=True: the learning rate rises over 50 steps, then stays constant"
    r = from_env(GPT2 | dict(TRAINING_STEPS="75", LEARNING_RATE="1e-3"))
    lr = {m["step"]: m["lr"] for m in r.metrics if m["split"] == "train"}
    assert lr[25] == pytest.approx(0.5e-3) and lr[50] == lr[75] == 1e-3


def test_mistake_08_the_new_rate_is_not_applied(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="25", LEARNING_RATE="1e-3"))
    r = from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="25", LEARNING_RATE="1e-5"))
    assert [m["lr"] for m in r.metrics if m["split"] == "train"] == [1e-3, 1e-5]
    assert r.config.lr == 1e-5


def test_mistake_09_the_loss_at_the_beginning_is_that_at_the_end(workdir):
    "The report starts with the loss of the checkpoint on the checkpoint's own text"
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="50", LEARNING_RATE="1e-2"))
    before = next(m["loss"] for m in r.metrics if m["split"] == "val" and m["step"] == 50)
    case = {name: value for name, value in TINY.items() if name != "TRAINING_DATA_SOURCE"}
    r = from_env(case | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="50"))
    after = next(m["loss"] for m in r.metrics if m["split"] == "val" and m["step"] == 100)
    printed = text_of(workdir / "logs", "resume_training_log_bigram_text_*.log")
    assert f"val loss {before:.4f} at step 50, {after:.4f} at step 100: {after - before:+.4f}" in printed
    assert before - after > 0.05 and r.config.data == "text.txt"


def test_mistake_10_sampling_with_dropout(workdir):
    "The model is in eval mode afterwards, keeps no graph, and GENERATION_TOP_K=1 gives the most likely tokens"
    r = from_env(TINY | dict(TRAINING_STEPS="20", DROPOUT="0.5", GENERATION_TOP_K="1"))
    assert not r.lm.training and all(p.grad is None for p in r.lm.parameters())
    likeliest = r.generate("", 20, temperature=0)
    assert likeliest in text_of(workdir / "logs", "training_log_*.log")


def test_mistake_11_the_attention_scale_of_the_whole_width():
    "Scores are divided by the root of a head's width"
    lm = new_lm("scratch_gpt", vocab_size=9, ctx_len=8, d_model=16, n_layers=1, n_heads=4).eval()
    a, x = lm.blocks[0].attn, torch.randn(1, 8, 16)
    q, k, v = a.qkv(x).view(1, 8, 3, 4, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 4**0.5).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 8, 16)
    assert torch.allclose(a(x, make_causal_attention_fn())[0], a.out(y), atol=1e-6)


def test_mistake_12_no_best_checkpoint_and_noisy_figures(workdir):
    "Every evaluation uses the same batches, and the best model is kept, even without ENABLE_CHECKPOINTS"
    r = from_env(TINY | dict(TRAINING_STEPS="60", EVAL_INTERVAL="20", LEARNING_RATE="3e-3"))
    figures = {m["step"]: m for m in r.metrics if m["split"] == "val"}
    assert len({m["tokens"] for step, m in figures.items() if 0 < step < 60}) == 1
    assert load(r.folder, "best").step == r.result["best_step"]


@pytest.mark.parametrize("method", ["character", "custom_bpe"])
def test_mistake_13_the_tokenizer_learns_validation_text(workdir, method):
    Path("text.txt").write_text(sentences("wave salt tide") + sentences("quartz", n=20))
    r = from_env(TINY | dict(TRAINING_STEPS="2", TOKENIZATION_METHOD=method))
    known = [r.tokenizer.decode([i]) for i in range(r.tokenizer.vocab_size) if i != r.tokenizer.unk_id]
    assert not any("qu" in token for token in known) and ("q" in known) == (method == "custom_bpe")


def test_mistake_14_an_empty_path_counts_as_one(workdir):
    r = from_env(TINY | dict(TRAINING_STEPS="2", CHECKPOINT_PATH=""))
    assert (r.status, r.step) == ("done", 2)


def test_mistake_15_the_total_is_lost(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="20"))
    r = from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="10"))
    names = [p.name for p in (workdir / "outputs").iterdir()]
    assert r.config.steps == 30 and sorted(re.search(r"_(\d+)_test=false", n)[1] for n in names) == ["20", "30"]


@pytest.mark.parametrize("output", ["True", "false"])
def test_mistake_16_the_log_grows_with_its_square(workdir, output):
    "Each line appears once, with and without an output file"
    case = dict(TRAINING_STEPS="100", CHECKPOINT_INTERVAL="10", ENABLE_OUTPUT_TO_FILE=output)
    from_env(TINY | KEEP | case)
    printed = text_of(workdir / "logs", "training_log_*.log")
    lines = printed.splitlines()
    assert [printed.count(f"step {n}/100 | loss") for n in (25, 50, 75, 100)] == [1] * 4
    assert (workdir / "outputs").exists() == (output == "True")
    if output == "True":
        printed = text_of(workdir / "outputs", "*.txt")
        assert printed.startswith("HYPERPARAMETERS\n================\nmodel_type = from_scratch\n")
        assert f"\n\nOUTPUT\n======\n{lines[0]}\n" in printed and lines[-1] in printed


@pytest.mark.parametrize("lora", ["False", "True"])
def test_mistake_17_gpt2_is_fetched_again_on_resume(workdir, lora):
    "The run resumes after the folder with the weights was removed"
    case = GPT2 | dict(USE_LORA=lora, LORA_RANK="4")
    r = from_env(case | KEEP | dict(TRAINING_STEPS="5"))
    shutil.rmtree(workdir / "tiny-gpt2")
    assert from_env(case | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="5")).step == 10


def test_mistake_18_a_validation_text_shorter_than_a_window(workdir):
    Path("text.txt").write_text(sentences("wave salt tide", n=10)[:200])
    r = from_env(TINY | dict(TRAINING_STEPS="3", BLOCK_SIZE="64"))
    assert r.result["last"]["tokens"] == 19


def test_mistake_19_errors_of_saving_are_swallowed(workdir, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_file", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        from_env(TINY | dict(TRAINING_STEPS="3"))


# Folder of a resumed run


def test_an_older_checkpoint_becomes_a_new_run(workdir):
    "The old run does not change, and the new one ends with the same bits"
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="100", CHECKPOINT_INTERVAL="50"))
    before = bits(r.folder)
    step = r.folder / "step_00000050"
    other = from_env(TINY | dict(CHECKPOINT_PATH=str(step), RESUME_STEPS="50"))
    assert other.folder != r.folder and other.folder.parent == r.folder.parent
    assert bits(other.folder) == bits(r.folder) == before


def test_another_checkpoint_dir_becomes_a_new_run_there(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="20"))
    other = from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="5", CHECKPOINT_DIR="elsewhere"))
    assert other.folder.parent == workdir / "elsewhere" and (other.step, load(r.folder).step) == (25, 20)


def test_resuming_a_run_made_without_variables(workdir):
    "The entry point can resume a run made by `lmnotes.run` with its own defaults, and changes only the steps"
    shape = dict(
        model_args="d_model=16 n_heads=2 n_layers=1", ctx_len=16, batch_size=4, device="cpu", out_dir="checkpoints"
    )
    case = dict(arch="scratch_gpt", data="text.txt", tokenizer="bytes", schedule="constant", **shape)
    whole, part = run(steps=20, run="whole", **case), run(steps=10, run="part", **case)
    part = from_env(dict(CHECKPOINT_PATH=str(part.folder), RESUME_STEPS="10", MAX_NEW_TOKENS="5"))
    assert (part.folder.name, part.config.allow_change) == ("part", "steps")
    assert bits(part.folder) == bits(whole.folder)


def test_two_runs_in_one_second_do_not_collide(workdir):
    a, b = (from_env(TINY | dict(TRAINING_STEPS="2")) for _ in range(2))
    assert a.folder != b.folder and (load(a.folder).step, load(b.folder).step) == (2, 2)


def test_unusable_checkpoints_are_rejected(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="4", CHECKPOINT_INTERVAL="2"))
    with pytest.raises(CheckpointError, match="CHECKPOINT_PATH=nowhere: no such run"):
        from_env(TINY | dict(CHECKPOINT_PATH="nowhere"))
    with pytest.raises(CheckpointError, match="no run.json in"):
        from_env(TINY | dict(CHECKPOINT_PATH="text.txt"))
    file = max(r.folder.glob("checkpoint_*.pt"))
    shutil.rmtree(r.folder / "step_00000004")
    with pytest.raises(CheckpointError, match="step_00000004 does not exist. The run has step_0"):
        from_env(TINY | dict(CHECKPOINT_PATH=str(file)))
    with pytest.raises(ValueError, match="MODEL_TYPE=gpt2, but the checkpoint was trained with from_scratch"):
        from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder / "step_00000002"), MODEL_TYPE="gpt2"))


def test_stopped_by_a_signal(workdir, monkeypatch, capsys):
    "The run is saved even without ENABLE_CHECKPOINTS, and resumes to the same bits"
    whole = from_env(TINY | dict(TRAINING_STEPS="50"))
    as_it_is = Trainer.train_step

    def train_step(trainer):
        as_it_is(trainer)
        if trainer.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    part = from_env(TINY | dict(TRAINING_STEPS="50"))
    assert (part.status, part.step) == ("interrupted", 17)
    (line,) = re.findall(r"esume with: (.+)$", capsys.readouterr().out, re.M)
    monkeypatch.setenv("LMNOTES_COMMAND", "lmnotes train")
    shell_line = f"CHECKPOINT_PATH=checkpoints/{part.folder.name} RESUME_STEPS=33 lmnotes from-env"
    assert _resume_line(load_config_fresh_from_env(TINY | dict(TRAINING_STEPS="50")), part.folder, None) == shell_line
    part = eval(line, dict(lmnotes=lmnotes))
    assert bits(part.folder) == bits(whole.folder) and train_losses(part.folder) == train_losses(whole.folder)


# Ways to start the entry point


def environ(workdir, **variables):
    "Return the process's environment with the fresh-or-resume guide's variables and without those of lmnotes"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    return clean | dict(OMP_NUM_THREADS="1", IPYTHONDIR=str(workdir / "ipython"), MPLBACKEND="agg") | TINY | variables


def shell(workdir, *words, **variables):
    "Run a program of this environment, and return its output"
    program = str(Path(sys.executable).parent / words[0])
    printed = subprocess.run(
        [program, *map(str, words[1:])], cwd=workdir, env=environ(workdir, **variables), capture_output=True, text=True
    )
    return printed.returncode, printed.stdout + printed.stderr


def test_the_notebook_under_papermill(workdir):
    "Variables come from the environment, and parameters override them, for a fresh run, and a resumed one under papermill"
    notebook = ROOT / "nbs/recipes/fresh_or_resume.ipynb"
    variables = TINY | dict(TRAINING_STEPS="25", ENABLE_CHECKPOINTS="true")
    words = "notebook", "--path", notebook
    assert run_in_process(workdir, with_environment, variables, lmnotes_command, *words) == 0, read_log(workdir)
    words = "-p", "CHECKPOINT_PATH", only_run(workdir), "-p", "RESUME_STEPS", 25
    code, printed = shell(workdir, "papermill", notebook, "resumed.ipynb", *words, RESUME_STEPS="9")
    assert code == 0, printed
    assert load(only_run(workdir)).step == 50
    cells = nbformat.read(workdir / "resumed.ipynb", 4).cells
    shown = "".join(out.get("text", "") for cell in cells if cell.cell_type == "code" for out in cell.outputs)
    assert shown.startswith("Resuming from step 25 - Training Log - Started at ") and "done at step 50 of 50" in shown


def test_the_command(workdir):
    def command(**variables):
        return run_in_process(workdir, with_environment, TINY | variables, lmnotes_command, "from-env")

    assert command(TRAINING_STEPS="3") == 0 and only_run(workdir).name in read_log(workdir), read_log(workdir)
    (workdir / "log").unlink()
    assert command(USE_LORA="perhaps") == 2
    assert read_log(workdir) == "lmnotes: USE_LORA='perhaps', expected True or False\n"


# The tables


def test_fields_are_complete_and_correct():
    "The table has all of the fresh-or-resume guide's 22 fields, each with a variable, and with a parameter that exists"
    own = [f.name for f in fields(TrainingConfig)]
    assert [row["field"] for row in FIELD_TABLE] == own[:22]
    assert (
        own[:22]
        == (
            "model_type use_lora training_data_source batch_size block_size training_steps start_step learning_rate "
            "n_embd n_head n_layer dropout gpt2_model_name tokenization_method custom_vocab_size "
            "enable_checkpoints checkpoint_interval checkpoint_dir log_dir enable_output_to_file output_dir test_mode"
        ).split()
    )
    parameters = {f.name for f in fields(RunConfig)}
    assert all(row["parameter"] in parameters | {""} and (row["parameter"] or row["note"]) for row in FIELD_TABLE)


CHANGES = dict(
    model_type=dict(MODEL_TYPE="gpt2"),
    use_lora=dict(USE_LORA="True"),
    training_data_source=dict(TRAINING_DATA_SOURCE="other.txt"),
    batch_size=dict(BATCH_SIZE="7"),
    block_size=dict(BLOCK_SIZE="7"),
    training_steps=dict(TRAINING_STEPS="7"),
    learning_rate=dict(LEARNING_RATE="0.5"),
    n_embd=dict(N_EMBD="8"),
    n_head=dict(N_HEAD="1"),
    n_layer=dict(N_LAYER="7"),
    dropout=dict(DROPOUT="0.5"),
    gpt2_model_name=dict(MODEL_TYPE="gpt2", GPT2_MODEL_NAME="gpt2-xl"),
    tokenization_method=dict(TOKENIZATION_METHOD="gpt2"),
    custom_vocab_size=dict(TOKENIZATION_METHOD="custom_bpe", CUSTOM_VOCAB_SIZE="700"),
    enable_checkpoints=dict(ENABLE_CHECKPOINTS="TRUE"),
    checkpoint_interval=dict(ENABLE_CHECKPOINTS="True", CHECKPOINT_INTERVAL="7"),
    checkpoint_dir=dict(CHECKPOINT_DIR="elsewhere"),
)


@pytest.mark.parametrize("row", [row for row in FIELD_TABLE if row["field"] in CHANGES], ids=lambda row: row["field"])
def test_every_variable_has_an_effect(row):
    "Another value of the variable changes the field, and the parameter in the table"
    a, b = load_config_fresh_from_env({}), load_config_fresh_from_env(CHANGES[row["field"]])
    assert vars(a)[row["field"]] != vars(b)[row["field"]]
    assert to_run_params(a).get(row["parameter"]) != to_run_params(b).get(row["parameter"])


def test_functions_of_the_guide_exist():
    for row in FUNCTION_TABLE:
        module, _, name = row["here"].rpartition(".")
        assert hasattr(import_module(module), name), row


# Further cases


def test_older_checkpoint_with_variables(workdir):
    "Variables apply to an older checkpoint, even if the run was resumed since with them or another text"
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="10", LEARNING_RATE="1e-3"))
    changed = dict(LEARNING_RATE="1e-5", BATCH_SIZE="8", TRAINING_DATA_SOURCE="other.txt")
    from_env(TINY | changed | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="10"))
    step = str(r.folder / "step_00000010")
    fork = from_env(TINY | changed | dict(CHECKPOINT_PATH=step, RESUME_STEPS="5"))
    assert (fork.config.lr, fork.config.batch_size, fork.config.data) == (1e-5, 8, "other.txt")
    case = {name: value for name, value in TINY.items() if name not in changed}
    as_then = from_env(case | dict(CHECKPOINT_PATH=step, RESUME_STEPS="5"))
    assert (as_then.config.lr, as_then.config.batch_size, as_then.config.data) == (1e-3, 4, "text.txt")


def test_existing_checkpoints_are_kept(workdir):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="30", CHECKPOINT_INTERVAL="10"))
    from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="20", ENABLE_CHECKPOINTS="False"))
    assert {"step_00000010", "step_00000020", "step_00000030", "step_00000050"} <= {p.name for p in r.folder.iterdir()}


def test_run_name_that_contains_a_step(workdir):
    shutil.copy("text.txt", "mystep3.txt")
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="4", TRAINING_DATA_SOURCE="mystep3.txt"))
    (file,) = r.folder.glob("*.pt")
    for n, path in enumerate((r.folder, file, r.folder / "last", r.folder / "best")):
        case = TINY | dict(TRAINING_DATA_SOURCE="mystep3.txt", CHECKPOINT_PATH=str(path), RESUME_STEPS=str(n + 1))
        assert from_env(case).step > 4


def test_runs_in_one_second_have_separate_logs(workdir, monkeypatch):
    monkeypatch.setattr("lmnotes.recipes.fresh_or_resume.timestamp", lambda: "01012026_000000")
    runs = [from_env(TINY | dict(TRAINING_STEPS="2")) for _ in range(3)]
    assert len(list((workdir / "logs").iterdir())) == len(list((workdir / "outputs").iterdir())) == 3
    for r in runs:
        at = r.folder.name.partition("01012026")[2]
        assert r.folder.name + ":" in text_of(workdir / "logs", f"*01012026{at}.log")


def test_first_loss_of_a_session_is_the_loss_of_the_checkpoint(workdir):
    "A checkpoint without an evaluation is evaluated. Losses on different texts are not compared"
    r = from_env(
        TINY | KEEP | dict(TRAINING_STEPS="90", CHECKPOINT_INTERVAL="30", EVAL_INTERVAL="50", LEARNING_RATE="1e-2")
    )
    step = str(r.folder / "step_00000060")
    from_env(TINY | dict(CHECKPOINT_PATH=step, RESUME_STEPS="20"))
    printed = text_of(workdir / "logs", "resume_*.log")
    assert re.search(r"step 60/80 .*val loss [\d.]+ \(step 60\)", printed) and "at step 60, " in printed
    shutil.rmtree("logs")
    from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="5", TRAINING_DATA_SOURCE="other.txt"))
    assert re.search(
        r"\(step 90\) \| net loss change since the beginning: \+0.0000", text_of(workdir / "logs", "resume_*.log")
    )


def test_failed_saves_during_training_are_reported(workdir, monkeypatch):
    "A failed save is reported, counted and named in the last line, and the next save is tried"
    write = checkpoint._write_file

    def sometimes_full(path, data):
        if "step_00000010" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", sometimes_full)
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="20", CHECKPOINT_INTERVAL="10"))
    assert r.info["unsaved"] == 1 and r.status == "done"
    assert "1 saves failed during training" in text_of(workdir / "logs", "*.log")


def test_a_run_that_diverges_leaves_its_output(workdir):
    r = from_env(TINY | dict(TRAINING_STEPS="40", LEARNING_RATE="1000", N_EMBD="16", BLOCK_SIZE="16") | KEEP)
    assert r.status in ("diverged", "done") and list((workdir / "outputs").iterdir())


@pytest.mark.parametrize(
    "given, printed",
    [
        (dict(LORA_RANK="4"), "LORA_RANK=4 is not used: USE_LORA is False"),
        (dict(GPT2_MODEL_NAME="nope"), "GPT2_MODEL_NAME=nope is not used: MODEL_TYPE is from_scratch"),
        (dict(CUSTOM_VOCAB_SIZE="500"), "CUSTOM_VOCAB_SIZE=500 is not used: TOKENIZATION_METHOD is not custom_bpe"),
        (dict(CHECKPOINT_INTERVAL="5"), "CHECKPOINT_INTERVAL=5 is not used: ENABLE_CHECKPOINTS is False"),
        (dict(MODEL_TYPE="gpt2", N_EMBD="8"), "N_EMBD=8 is not used: GPT-2's shape"),
    ],
    ids=str,
)
def test_unused_variables_are_named(given, printed, capsys):
    load_config_fresh_from_env(given)
    assert printed in capsys.readouterr().out


def test_unused_variables_on_resume_are_named(workdir, capsys):
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="4"))
    from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="2", TRAINING_STEPS="77", LORA_RANK="3"))
    printed = capsys.readouterr().out
    assert "TRAINING_STEPS=77 is not used: RESUME_STEPS sets" in printed and "LORA_RANK=3 is not used" in printed


@pytest.mark.parametrize(
    "given",
    [
        "CUSTOM_VOCAB_SIZE=0",
        "LORA_ALPHA=0",
        "LORA_ALPHA=nan",
        "LEARNING_RATE=inf",
        "LEARNING_RATE=0",
        "MAX_NEW_TOKENS=-1",
    ]
    + ["GENERATION_TEMPERATURE=-1", "GENERATION_TOP_K=-3", "DROPOUT=nan", "DROPOUT=1", "BATCH_SIZE=0"],
)
def test_invalid_numbers_are_rejected(given):
    name, _, value = given.partition("=")
    with pytest.raises(ValueError, match=f"{name}=.*, expected .*a (whole )?number (at least|above)"):
        load_config_fresh_from_env({name: value})


def test_resume_steps_without_a_checkpoint(workdir):
    with pytest.raises(ValueError, match="RESUME_STEPS needs CHECKPOINT_PATH, which is not set"):
        from_env(TINY | dict(RESUME_STEPS="300"))
    r = from_env(TINY | KEEP | dict(TRAINING_STEPS="2"))
    with pytest.raises(ValueError, match="RESUME_STEPS='-1', expected a whole number at least 0"):
        from_env(TINY | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="-1"))


@pytest.mark.parametrize("name", ["CHECKPOINT_DIR", "LOG_DIR", "OUTPUT_DIR"])
def test_folder_that_is_a_file_is_rejected_before_training(workdir, name):
    with pytest.raises(ValueError, match=f"{name}=text.txt is not a writable folder"):
        from_env(TINY | dict(TRAINING_STEPS="2") | {name: "text.txt"})


def test_other_spellings_of_a_folder(workdir):
    r = from_env(GPT2 | KEEP | dict(TRAINING_STEPS="2"))
    for name in ("./tiny-gpt2", "tiny-gpt2/", str(workdir / "tiny-gpt2")):
        from_env(GPT2 | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="1", GPT2_MODEL_NAME=name))
    again = from_env(
        GPT2
        | dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="1", CHECKPOINT_DIR="../" + workdir.name + "/checkpoints")
    )
    assert again.folder == r.folder


def test_settings_of_a_fresh_run_are_kept(workdir):
    "A resume keeps folders, generation settings and the shape in the output file, unless the environment sets them"
    told = dict(LOG_DIR="mylogs", OUTPUT_DIR="myout", GENERATION_TOP_K="3", MAX_NEW_TOKENS="7", TEST_MODE="True")
    case = {name: value for name, value in GPT2.items() if name != "MAX_NEW_TOKENS"}
    r = from_env(case | KEEP | told | dict(TRAINING_STEPS="2"))
    from_env(dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="2", DEVICE="cpu"))
    assert not (workdir / "logs").exists() and len(list((workdir / "mylogs").iterdir())) == 2
    later = max((workdir / "myout").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    values = dict(line.split(" = ") for line in later.read_text().splitlines() if " = " in line)
    assert (values["test_mode"], values["max_new_tokens"], values["generation_top_k"]) == ("True", "7", "3")
    assert (values["n_embd"], values["n_layer"], values["output_dir"]) == ("16", "2", "myout")


def test_a_text_without_line_breaks_can_begin(workdir):
    "The vocabulary has no line break, so generation starts without one"
    Path("text.txt").write_text("wave salt tide foam " * 300)
    r = from_env(TINY | dict(TRAINING_STEPS="2", TOKENIZATION_METHOD="character"))
    assert r.info["data"]["start"] == "" and len(r.generate("", 5)) <= 5


def test_misspelt_variables_are_named(capsys):
    warn_of_misspelt_variables(
        dict(TRAINING_STEP="20", BATCHSIZE="4", LOG_DIR="x", PATH="/bin", HOME="/root", LANG="C")
    )
    assert capsys.readouterr().out == (
        "$BATCHSIZE is not used; did you mean BATCH_SIZE?\n$TRAINING_STEP is not used; did you mean TRAINING_STEPS?\n"
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(N_HEAD="5", N_EMBD="32"), "N_EMBD=32 is not a multiple of N_HEAD=5"),
        (dict(TRAINING_DATA_SOURCE="nowhere.txt"), "TRAINING_DATA_SOURCE='nowhere.txt' is not one of"),
    ],
    ids=str,
)
def test_messages_name_the_variables(workdir, monkeypatch, given, message):
    monkeypatch.chdir(workdir)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_env(dict(TEST_MODE="True", DEVICE="cpu") | given)
