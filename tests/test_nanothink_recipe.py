"""`nbs/recipes/pretrain_expert.ipynb` and `train_mla.ipynb` keep the promises of the NanoThink guide and avoid the mistakes of its code."""

import json
import random
import re
import shutil
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from helpers import (
    lmnotes_command,
    paste_resume_line,
    read_log,
    read_records,
    recipe_parameters,
    run_in_process,
    run_papermill,
    run_ranks,
    run_recipe,
    stop_before_step,
    wait_until,
)

import lmnotes
from lmnotes.data.batches import get_batches
from lmnotes.recipes.nanothink import make_content_fn
from lmnotes.runs.data import load_data
from lmnotes.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_texts")
RECIPES = Path(__file__).parent.parent / "nbs/recipes"
EXPERT, JOIN = RECIPES / "pretrain_expert.ipynb", RECIPES / "train_mla.ipynb"
WORDS = "the sea hill river stone light wind tree cloud moves under over falls rises slowly again and then".split()
SIZE = dict(tokenizer="bytes", d_model=16, n_heads=2, n_layers=1, d_inner=32, max_seq_len=32, dropout=0.0)
QUICK = SIZE | dict(batch_size=16, warmup_steps=2, lr=1e-2, max_epochs=2, log_interval=10)
SMALL = dict(
    d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, max_seq_len=32, memory_chunk=8, dropout=0.0
)
TOGETHER = SMALL | dict(batch_size=8, grad_accum_steps=2, warmup_steps=2, lr=1e-2, max_epochs=2, log_interval=10)


def expert(**params):
    return run_recipe(EXPERT, **QUICK | params)


def join(**params):
    return run_recipe(JOIN, **TOGETHER | params)


def write_domains(workdir, documents=20):
    rng = random.Random(0)
    for domain in ("sea", "hills"):
        folder = workdir / "data" / domain
        folder.mkdir(parents=True)
        lines = [
            dict(text=f"{domain} {' '.join(rng.choices(WORDS, k=20))}", source="test", id=i) for i in range(documents)
        ]
        (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def workdir(tmp_path):
    "Return a folder with two domains"
    write_domains(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(short_texts, tmp_path_factory):
    "Return a folder with three trained experts"
    workdir = tmp_path_factory.mktemp("trained")
    write_domains(workdir)
    for name in ("transformer", "state_space", "diffuser"):
        assert run_in_process(workdir, expert, expert=name) == 0, read_log(workdir)
    return workdir


@pytest.fixture
def experts(trained, tmp_path):
    "Return a copy of the folder with three trained experts"
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def load_checkpoint_file(workdir, name):
    return torch.load(workdir / "checkpoints" / name, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def info(workdir, run):
    return json.loads((workdir / "checkpoints" / run / "run.json").read_bytes())


def test_the_guides_defaults():
    of_experts, of_both = recipe_parameters(EXPERT), recipe_parameters(JOIN)
    shared = dict(d_model=384, max_seq_len=512, n_heads=6, data_dir="data", resume="", device="auto", domains="")
    for name, value in shared.items():
        assert of_experts[name] == of_both[name] == value
    guide = dict(ffn_mult=4, training_steps=100, d_state=16, max_epochs=20, tokenizer="gpt2", grad_clip=1.0, patience=5)
    assert guide.items() <= of_experts.items()
    guide = dict(lr=1e-4, batch_size=16, max_epochs=30, grad_accum_steps=4, entropy_reg=0.01, use_vector_store=False)
    assert guide.items() <= of_both.items()


@pytest.mark.parametrize(
    "name, size", [("transformer", 14_160_768), ("state_space", 5_573_760), ("diffuser", 9_601_152)], ids=lambda v: v
)
def test_parameter_counts_match_the_guide(workdir, name, size):
    "The models have the NanoThink guide's sizes. We only build them, because a dry run would take long"
    from lmnotes.nn.lm import n_params, new_lm

    arch, preset = dict(
        transformer=("gpt", "nanothink"), state_space=("ssm", "nanothink_s6"), diffuser=("diffusion", "nanothink")
    )[name]
    with torch.device("meta"):
        lm = new_lm(arch, preset, vocab_size=50257, ctx_len=512)
    outside = {p for n, p in lm.named_parameters() if n.startswith(("embed.", "head.", "text.head", "text.table"))}
    assert n_params(lm) - sum(p.numel() for p in outside) == size


@pytest.mark.parametrize("way", ["process", pytest.param("papermill", marks=pytest.mark.nightly)])
def test_files_and_their_content(workdir, way):
    if way == "papermill":
        run_papermill(workdir, EXPERT, **QUICK | dict(expert="state_space", max_epochs=5))
    else:
        assert run_in_process(workdir, expert, expert="state_space", max_epochs=5) == 0, read_log(workdir)
    files = sorted(p.name for p in (workdir / "checkpoints").glob("*.pt"))
    assert files == ["state_space_expert.pt", "state_space_expert_epoch5.pt"]
    held = load_checkpoint_file(workdir, "state_space_expert_epoch5.pt")
    assert {"model_state", "optimizer_state", "step", "epoch"} <= set(held) and held["epoch"] == 5
    assert "amp_scaler" not in held
    assert info(workdir, "state_space_expert")["config"]["sampler"] == "domains"


def test_a_snapshot_every_five_epochs(workdir):
    "Snapshots are written after epochs 5 and 10, not 4 and 9, and hold the epoch of their name"
    assert run_in_process(workdir, expert, max_epochs=10, patience=0) == 0, read_log(workdir)
    found = {p.name: load_checkpoint_file(workdir, p.name) for p in (workdir / "checkpoints").glob("*_epoch*.pt")}
    assert {name: held["epoch"] for name, held in found.items()} == {
        f"transformer_expert_epoch{n}.pt": n for n in (5, 10)
    }
    whole = lmnotes.load(workdir / "checkpoints/transformer_expert")
    assert equal(found["transformer_expert_epoch10.pt"]["model_state"], whole.lm.state_dict())
    half = lmnotes.load(workdir / "checkpoints/transformer_expert_epoch5.pt")
    assert half.step == found["transformer_expert_epoch5.pt"]["step"] == whole.step // 2


def test_domains_and_data_dir(workdir):
    (workdir / "data/readme.jsonl").write_text('{"text": "beside the folders"}\n')
    assert run_in_process(workdir, expert, domains="sea", max_epochs=1) == 0, read_log(workdir)
    assert info(workdir, "transformer_expert")["data"]["what"] == "data"
    one = info(workdir, "transformer_expert")["data"]["tokens"]
    shutil.move(workdir / "data", workdir / "mine")
    assert run_in_process(workdir, expert, data_dir="mine", max_epochs=1) == 0, read_log(workdir)
    both = info(workdir, "transformer_expert")["data"]["tokens"]
    assert one["train"] < both["train"]
    assert "the earlier run is now transformer_expert-1" in read_log(workdir)
    aside = torch.load(workdir / "checkpoints/transformer_expert-1/transformer_expert.pt", weights_only=True)
    assert aside["run"]["config"]["domains"] == "sea"  # Files of an earlier run are not overwritten
    assert run_in_process(workdir, expert, data_dir="mine", domains="lake") and "Its domains are hills" in read_log(
        workdir
    )


LONG = dict(max_epochs=5, patience=0, log_interval=1)


@pytest.mark.parametrize("name", ["transformer", "diffuser"])
def test_stopped_and_resumed(experts, tmp_path_factory, name):
    "Ctrl+C writes a file and prints how to resume, and the resumed run ends with the same bits"
    run = f"{name}_expert"
    assert stop_before_step(9, experts, expert, expert=name, **LONG) == 130, read_log(experts)
    held = load_checkpoint_file(experts, f"{run}_interrupted.pt")
    assert held["step"] == 9 < 5 * info(experts, run)["config"]["eval_every"]
    assert paste_resume_line(experts) == 0, read_log(experts)  # All other parameters keep their values
    assert f"Resuming from {run}_interrupted.pt: epoch {held['epoch']}, step {held['step']}" in read_log(experts)
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(experts / "data", whole / "data")
    (whole / "checkpoints").mkdir()
    shutil.copy(experts / "checkpoints/transformer_expert.pt", whole / "checkpoints")
    assert run_in_process(whole, expert, expert=name, **LONG) == 0, read_log(whole)
    a, b = (lmnotes.load(p / "checkpoints" / run) for p in (experts, whole))
    assert a.step == b.step and equal(a.lm.state_dict(), b.lm.state_dict())


def test_resume_takes_the_furthest(workdir):
    assert run_in_process(workdir, expert, max_epochs=5) == 0, read_log(workdir)
    assert run_in_process(workdir, expert, max_epochs=7, resume="True") == 0, read_log(workdir)
    assert run_in_process(workdir, expert, max_epochs=8, resume="True") == 0, read_log(workdir)
    assert re.search(
        r"_epoch5.pt is at step \d+; the run has reached step \d+ and resumes from there", read_log(workdir)
    )
    assert load_checkpoint_file(workdir, "transformer_expert.pt")["epoch"] == 8


def test_resume_from_a_path(workdir, tmp_path_factory):
    "A run resumes from an older state on request, and from a single file in another folder"
    assert run_in_process(workdir, expert, max_epochs=10, patience=0) == 0, read_log(workdir)
    ends = load_checkpoint_file(workdir, "transformer_expert_epoch10.pt")["model_state"]
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(workdir / "data", other / "data")
    (other / "checkpoints").mkdir()
    shutil.copy(workdir / "checkpoints/transformer_expert_epoch5.pt", other / "checkpoints")
    for folder in (workdir, other):
        path = "checkpoints/transformer_expert_epoch5.pt"
        assert run_in_process(folder, expert, max_epochs=10, patience=0, resume=path) == 0, read_log(folder)
        assert equal(load_checkpoint_file(folder, "transformer_expert_epoch10.pt")["model_state"], ends)
    assert "moved that state to transformer_expert-1" in read_log(workdir)
    aside = workdir / "checkpoints/transformer_expert-1"
    assert (aside / "transformer_expert_epoch10.pt").exists() and (aside / "run.json").exists()


def test_resume_from_a_missing_file(workdir):
    assert run_in_process(workdir, expert, resume="checkpoints/transformer_expert.pt")
    assert "there is no such file" in read_log(workdir)
    assert run_in_process(workdir, expert, resume="True")
    assert "there is nothing to resume: no undamaged transformer_expert_interrupted.pt" in read_log(workdir)
    assert not (workdir / "checkpoints/transformer_expert").exists()


def test_a_checkpoint_of_another_expert(experts):
    assert run_in_process(experts, expert, resume="checkpoints/state_space_expert.pt")
    assert "a checkpoint of the run 'state_space_expert', not of 'transformer_expert'" in read_log(experts)
    run = experts / "checkpoints/transformer_expert"
    step = sorted(run.glob("step_*"))[-1]
    assert run_in_process(experts, expert, resume=str(step))
    assert "is a folder. Pass True, or one of the files next to transformer_expert: transformer_expert.pt" in read_log(
        experts
    )


def test_what_is_not_given_is_as_it_was(workdir):
    "A value computed from several parameters uses the run's values for those not given, not the cell's defaults"
    assert run_in_process(workdir, expert, max_epochs=1) == 0, read_log(workdir)
    assert run_in_process(workdir, run_recipe, EXPERT, resume="True", max_epochs=2, lr=1e-3) == 0, read_log(workdir)
    record = info(workdir, "transformer_expert")
    assert record["config"]["batch_size"] == 16 and record["config"]["lr"] == 1e-3 and record["model"]["d_model"] == 16
    recipe = json.loads((workdir / "checkpoints/transformer_expert/recipe.json").read_bytes())
    assert recipe == load_checkpoint_file(workdir, "transformer_expert.pt")["recipe"] and recipe["lr"] == 1e-3
    assert recipe.keys() - {"format"} | {"resume"} == recipe_parameters(EXPERT).keys()
    assert "Resuming from transformer_expert.pt: epoch 1" in read_log(workdir)
    assert "the earlier run is now" not in read_log(workdir)
    assert run_in_process(workdir, run_recipe, EXPERT, resume="True", n_layers=2)
    assert "this run has n_layers=1, not 2, and that cannot change" in read_log(workdir)


def test_two_runs_with_one_name(workdir, tmp_path_factory):
    "Files of another run are skipped. If the path of one is given, the run in the folder is moved"
    assert run_in_process(workdir, expert, max_epochs=5, patience=0) == 0, read_log(workdir)
    first, files = info(workdir, "transformer_expert")["started"], workdir / "checkpoints"
    epoch5 = (files / "transformer_expert_epoch5.pt").read_bytes()
    wait_until(lambda: int(time.time()) > datetime.fromisoformat(first).timestamp() + 1)
    assert run_in_process(workdir, expert, max_epochs=2, seed=1) == 0, read_log(workdir)
    (files / "transformer_expert_epoch5.pt").write_bytes(epoch5)
    assert run_in_process(workdir, run_recipe, EXPERT, resume="True", max_epochs=3) == 0, read_log(workdir)
    assert "transformer_expert_epoch5.pt is skipped: its run started" in read_log(workdir)
    assert info(workdir, "transformer_expert")["config"]["seed"] == 1
    path = "checkpoints/transformer_expert_epoch5.pt"
    assert run_in_process(workdir, run_recipe, EXPERT, resume=path, max_epochs=6) == 0, read_log(workdir)
    assert "moved it to transformer_expert-2, as this run started" in read_log(workdir)
    record = info(workdir, "transformer_expert")
    assert record["started"] == first and record["config"]["seed"] == 42 and record["status"] == "done"
    assert (files / "transformer_expert-2/transformer_expert.pt").exists()


def test_fresh_start_keeps_earlier_files(workdir):
    "Files that an earlier run left are moved, even if its folder is gone"
    assert run_in_process(workdir, expert, max_epochs=1) == 0, read_log(workdir)
    shutil.rmtree(workdir / "checkpoints/transformer_expert")
    assert run_in_process(workdir, expert, max_epochs=1, seed=1) == 0, read_log(workdir)
    assert torch.load(workdir / "checkpoints/transformer_expert-1/transformer_expert.pt", weights_only=True)


def test_damaged_files(experts):
    "`resume=True` uses the previous undamaged file. A damaged expert is an error"
    files = experts / "checkpoints"
    shutil.rmtree(files / "transformer_expert")
    held = load_checkpoint_file(experts, "transformer_expert.pt")
    whole = (files / "transformer_expert.pt").read_bytes()
    held["model_state"]["embed.weight"][0, 0] += 1
    torch.save({**held, "step": held["step"] + 1}, files / "transformer_expert_epoch5.pt")
    assert run_in_process(experts, run_recipe, EXPERT, resume="True", max_epochs=3) == 0, read_log(experts)
    assert "transformer_expert_epoch5.pt: damaged" in read_log(experts)
    assert "Resuming from transformer_expert.pt" in read_log(experts)
    torch.save(held, files / "transformer_expert.pt")
    assert run_in_process(experts, join)
    assert "transformer_expert.pt: damaged (SHA-256 mismatch)" in read_log(experts)
    for content, message in ((b"", "the file is empty"), (whole[:-100], "it is damaged or not a file of torch.save")):
        (files / "transformer_expert.pt").write_bytes(content)
        assert run_in_process(experts, join) and message in read_log(experts)
    torch.save(
        {n: held[n] for n in ("model_state", "optimizer_state", "step", "epoch")}, files / "transformer_expert.pt"
    )
    assert run_in_process(experts, join)
    assert (
        "'counters' is missing. Pass another checkpoint, or start a new run with its weights: lmnotes train"
        in read_log(experts)
    )


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(max_epochs=0), "max_epochs=0, expected a whole number at least 1"),
        (dict(n_heads=0), "n_heads=0, expected a whole number at least 1"),
        (dict(batch_size=-1), "batch_size=-1, expected"),
        (dict(amp_dtype="half"), "amp_dtype='half' is not one of bf16, fp16"),
    ],
    ids=str,
)
def test_invalid_values_are_rejected(trained, params, message):
    assert run_in_process(trained, expert, expert="state_space", **params) and message in read_log(trained)
    assert run_in_process(trained, join, **params) and message in read_log(trained).split("Traceback")[-1]


def test_missing_experts_are_named(trained):
    assert run_in_process(trained, join, transformer_ckpt="", state_space_ckpt="", diffuser_ckpt="")
    assert "are all empty. Pass at least one expert" in read_log(trained)


def test_processes_take_turns(workdir):
    "Of two processes only the first changes folders"
    assert run_in_process(workdir, expert, max_epochs=5, patience=0) == 0, read_log(workdir)
    shutil.rmtree(workdir / "checkpoints/transformer_expert")
    given = ["expert=transformer", "resume=checkpoints/transformer_expert_epoch5.pt", "max_epochs=6", "device=cpu"]
    words = ["notebook", "--path", EXPERT, "--params", *given]
    before = read_log(workdir)
    assert run_ranks(workdir, 2, lmnotes_command, *words) == [0, 0], read_log(workdir)
    assert read_log(workdir).removeprefix(before).count("Resuming from transformer_expert_epoch5.pt: epoch 5") == 1
    record = info(workdir, "transformer_expert")
    assert record["status"] == "done" and record["step"] == 6 * record["config"]["eval_every"]


def test_half_precision_keeps_its_scaler(workdir, monkeypatch):
    "float16 without a GPU is an error, and a file has `amp_scaler` only if the run scales its loss"
    assert run_in_process(workdir, expert, amp_dtype="fp16")
    assert "amp_dtype='fp16' needs a CUDA device. Use bf16, or use_amp=False" in read_log(workdir)
    assert run_in_process(workdir, expert, use_amp=False, max_epochs=1) == 0, read_log(workdir)
    assert info(workdir, "transformer_expert")["dtype"] == "float32"
    monkeypatch.chdir(workdir)
    folder = workdir / "checkpoints/transformer_expert"
    r = lmnotes.load(folder)
    data = load_data(r.config, r.tokenizer, log_fn=None)
    t = Trainer(r.lm, get_batches(data.tokens["train"], 16, 32, 42, "domains"), r.config)
    assert "amp_scaler" not in make_content_fn(folder)(t, {})
    t.scaler = torch.amp.GradScaler("cpu")
    assert make_content_fn(folder)(t, {})["amp_scaler"]["scale"] > 0


def test_the_diffuser_needs_the_transformer(workdir):
    assert run_in_process(workdir, expert, expert="diffuser")
    assert "Train it first: papermill nbs/recipes/pretrain_expert.ipynb -p expert transformer" in read_log(workdir)


def test_the_diffuser_has_the_transformers_tokens_and_width(workdir):
    assert run_in_process(workdir, expert, tokenizer="chars", max_epochs=1) == 0, read_log(workdir)
    assert run_in_process(workdir, expert, expert="diffuser", tokenizer="bytes")
    assert re.search(
        r"tokenizer='bytes' is not the one that .*transformer_expert.pt was trained with", read_log(workdir)
    )
    assert run_in_process(workdir, expert, expert="diffuser", tokenizer="chars", d_model=32)
    assert "have 16. Pass -p d_model 16" in read_log(workdir)
    free = {n: v for n, v in QUICK.items() if n != "tokenizer"}
    its = info(workdir, "transformer_expert")["tokenizer"]["fingerprint"]
    for name in ("diffuser", "state_space"):
        assert run_in_process(workdir, run_recipe, EXPERT, expert=name, **free | dict(max_epochs=1)) == 0, read_log(
            workdir
        )
        assert info(workdir, f"{name}_expert")["tokenizer"]["fingerprint"] == its
    assert "mse" in read_log(workdir) and "given, but not used by this state_space: " in read_log(workdir)


def test_the_diffuser_stands_on_its_embeddings(experts):
    "The diffuser's embeddings are the transformer's and stay unchanged, and its loss gives no perplexity"
    table = load_checkpoint_file(experts, "diffuser_expert.pt")["model_state"]["text.table.weight"]
    assert torch.equal(table, load_checkpoint_file(experts, "transformer_expert.pt")["model_state"]["embed.weight"])
    metrics = read_records(experts / "checkpoints/diffuser_expert/metrics.jsonl")
    assert not any({"ppl", "bpb"} & set(record) for record in metrics)
    assert all({"mse", "rounding"} <= set(record) for record in metrics if record["split"] == "train")


def test_early_stopping(workdir):
    assert run_in_process(workdir, expert, lr=1e-30, patience=2, max_epochs=20) == 0, read_log(workdir)
    assert info(workdir, "transformer_expert")["status"] == "early_stop"
    assert "Using the best checkpoint by validation loss (step " in read_log(workdir)
    step = info(workdir, "transformer_expert")["step"]
    assert run_in_process(workdir, run_recipe, EXPERT, resume="True") == 0, read_log(workdir)
    assert "had stopped early, after patience=2" in read_log(workdir)
    assert info(workdir, "transformer_expert")["step"] == step


def test_together(experts):
    "Experts do not change, the first loss is that of the best expert, and the last one is lower"
    assert run_in_process(experts, join, max_epochs=4, log_interval=1) == 0, read_log(experts)
    held = load_checkpoint_file(experts, "nanothink_mla.pt")
    for name in ("transformer", "state_space", "diffuser"):
        own = load_checkpoint_file(experts, f"{name}_expert.pt")["model_state"]
        assert equal(
            own,
            {
                n.removeprefix(f"experts.{name}."): t
                for n, t in held["model_state"].items()
                if n.startswith(f"experts.{name}.")
            },
        )
    single = {
        name: load_checkpoint_file(experts, f"{name}_expert.pt")["counters"]["best"]
        for name in ("transformer", "state_space")
    }
    assert info(experts, "nanothink_mla")["model"]["default_expert"] == min(single, key=single.get)
    first = next(r for r in read_records(experts / "checkpoints/nanothink_mla/metrics.jsonl") if r["split"] == "train")
    start = info(experts, "nanothink_mla")["model"]["default_expert"]
    assert abs(first["ce"] - first[f"ce_{start}"]) < 0.02
    assert held["counters"]["best"] < min(single.values())
    assert all({"entropy", "balance", "z", "weight_diffuser"} <= set(r) for r in [first])


def test_joint_training_stopped_and_resumed(experts, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(experts, whole, dirs_exist_ok=True)
    assert stop_before_step(9, experts, join, use_vector_store=True, **LONG) == 130, read_log(experts)
    (experts / "checkpoints/nanothink_mla/memory.safetensors").write_bytes(b"of another store")
    assert paste_resume_line(experts) == 0, read_log(experts)  # Others keep their values
    assert re.search(r"\| hits \d\.\d\d", read_log(experts).split("Resuming from")[1])
    assert run_in_process(whole, join, use_vector_store=True, **LONG) == 0, read_log(whole)
    a, b = (lmnotes.load(p / "checkpoints/nanothink_mla") for p in (experts, whole))
    assert a.step == b.step and equal(a.lm.state_dict(), b.lm.state_dict())
    assert len(a.lm.store) == len(b.lm.store) > 0
    recipe = json.loads((experts / "checkpoints/nanothink_mla/recipe.json").read_bytes())
    assert recipe.keys() - {"format"} | {"resume"} == recipe_parameters(JOIN).keys()
    for changed in (dict(use_vector_store=False), dict(d_model=32)):
        assert run_in_process(experts, run_recipe, JOIN, resume="True", **changed)
        (name,) = changed
        assert re.search(rf"this run has {name}=\w+, not \w+, and that cannot change", read_log(experts))


def test_the_vector_store_changes_the_run(experts):
    assert run_in_process(experts, join, log_interval=1) == 0, read_log(experts)
    assert run_in_process(experts, join, use_vector_store=True, max_vectors=50, log_interval=1) == 0, read_log(experts)
    assert re.search(r"vector store: [1-9][\d,]* vectors", read_log(experts)) and re.search(
        r"\| hits \d\.\d\d", read_log(experts)
    )
    with_store, without = (experts / "checkpoints" / run for run in ("nanothink_mla", "nanothink_mla-1"))
    assert (with_store / "memory.safetensors").exists() and not (without / "memory.safetensors").exists()
    a, b = (read_records(folder / "metrics.jsonl")[-2]["entropy"] for folder in (with_store, without))
    assert a != b
    assert info(experts, "nanothink_mla")["model"]["max_vectors"] == 50 >= len(lmnotes.load(with_store).lm.store)
    r = lmnotes.load(with_store)  # The loaded run has its vector store
    assert len(r.lm.store) > 0 and r.generate("sea", 20, seed=1)


def test_an_expert_is_missing(experts):
    (experts / "checkpoints/state_space_expert.pt").unlink()
    assert run_in_process(experts, join)
    assert "state_space_expert.pt does not exist. Train that expert first" in read_log(experts)
    assert run_in_process(experts, join, state_space_ckpt="") == 0, read_log(experts)
    assert info(experts, "nanothink_mla")["model"]["state_space"] == ""
    assert "was trained on other data" not in read_log(experts)
    assert run_in_process(experts, join, state_space_ckpt="", domains="sea") == 0, read_log(experts)
    assert "warning: transformer_expert.pt was trained on other data or domains" in read_log(experts)


def test_experts_with_different_tokenizers_are_rejected(experts):
    shutil.rmtree(experts / "checkpoints/state_space_expert")
    assert run_in_process(experts, expert, expert="state_space", tokenizer="chars") == 0, read_log(experts)
    assert run_in_process(experts, join)
    assert re.search(r"state_space_expert.pt was trained with the tokenizer chars", read_log(experts))
    assert "Train them with the same one: -p tokenizer bytes\n" in read_log(experts)


def test_strong_experts(workdir):
    assert run_in_process(workdir, expert, expert="diffuser", strong=True) == 0, read_log(workdir)
    record = info(workdir, "diffuser_expert")
    assert record["model"]["objective"] == "masked" and record["config"]["optimizer"] == "muon"
    assert record["config"]["weight_decay"] == 0.0
    assert run_in_process(workdir, expert, expert="state_space", strong=True, weight_decay=0.1, max_epochs=1) == 0, (
        read_log(workdir)
    )
    assert info(workdir, "state_space_expert")["config"]["weight_decay"] == 0.1
    assert "given, but not used by this state_space: " in read_log(workdir)
    assert record["result"]["last"]["bound"]
