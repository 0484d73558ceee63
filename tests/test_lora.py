"""Adapters: exact resume, files that peft reads and writes, and the parameter counts of the fresh-or-resume guide."""

import json
import shutil
import warnings

import pytest
import torch
from helpers import TINY, differences, read_log, run_in_process, run_results, train, write_corpus
from safetensors.torch import load_file, save_file

from lmnotes.core import CheckpointError
from lmnotes.data.batches import Batch
from lmnotes.export.export import export
from lmnotes.models.gpt2 import to_hf
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.nn.lora import (
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_layers,
    merge_adapters,
    merge_and_unload,
    save_adapter,
    unmerge_adapters,
)
from lmnotes.runs.folder import fork
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import list_checkpoints, load_lm, load_weights, model_tensors, read_state
from lmnotes.training.weights import SaveWeights

GPT2 = dict(vocab_size=23, n_positions=16, ctx_len=16, d_model=16, n_layers=2, n_heads=2, dropout=0.0)
GPT = dict(vocab_size=23, ctx_len=16, d_model=16, n_layers=2, n_heads=2, dropout=0.0)
IDS = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(0))


def model(arch="gpt2", **lora):
    "Return a tiny model with random non-zero weights, and non-zero adapters if options are given"
    torch.manual_seed(0)
    lm = new_lm(arch, **(GPT2 if arch == "gpt2" else GPT)).eval()
    for p in lm.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    if lora:
        add_lora(lm, LoRAConfig(**lora))
        for layer in lora_layers(lm).values():
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    return lm.eval()


def peft_base_model(lm):
    "Return the model that peft adapts: transformers' own for gpt2, otherwise the model itself"
    return to_hf(lm) if lm.arch == "gpt2" else lm


def logits(found):
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def peft():
    "Yield the library peft, without its warnings about Conv1D and tied heads"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft")


BESIDE = {"gpt2": "transformer.wpe.* ln_*", "gpt": "embed.*"}


@pytest.mark.parametrize("beside", [False, True], ids=["adapters alone", "with others"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt"])
def test_peft_loads_our_adapters(tmp_path, peft, arch, beside):
    lm = model(arch, rank=3, alpha=5.0, train=BESIDE[arch] if beside else "")
    if beside:
        for name, p in lm.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.data += 0.1
    save_adapter(lm, tmp_path)
    loaded = peft.PeftModel.from_pretrained(peft_base_model(model(arch)), tmp_path).eval()
    torch.testing.assert_close(logits(loaded(IDS)), lm(IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch, targets", [("gpt2", ["c_attn", "c_fc", "lm_head"]), ("gpt", ["qkv", "down"])])
def test_we_load_peft_adapters(tmp_path, peft, arch, targets):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    made = peft.get_peft_model(peft_base_model(model(arch)), config).eval()
    made.save_pretrained(tmp_path)
    lm = load_adapter(model(arch), tmp_path).eval()
    torch.testing.assert_close(lm(IDS), logits(made(IDS)), atol=1e-5, rtol=0)
    assert {name.rpartition(".")[2] for name in lora_layers(lm)} == set(targets)


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"], ["wte", "lm_head"]], ids="-".join)
@pytest.mark.parametrize("tying", [False, True], ids=["copies", "tied"])
def test_we_load_embeddings_and_heads_that_peft_saved(tmp_path, peft, saved, tying):
    "PEFT trains a copy of a saved embedding or head, and the other one keeps the weight of the base model"
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], modules_to_save=saved, ensure_weight_tying=tying)
    made = peft.get_peft_model(peft_base_model(model()), config).eval()
    torch.manual_seed(1)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    made.save_pretrained(tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(peft_base_model(model()), tmp_path).eval()(IDS))
    lm = load_adapter(model(), tmp_path).eval()
    torch.testing.assert_close(lm(IDS), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(merge_and_unload(lm).eval()(IDS), expected, atol=1e-4, rtol=0)


def test_our_adapters_in_a_tied_model_and_peft(tmp_path, peft, capsys):
    "PEFT's merge is right unless you adapt a tied head, which we warn of, and a trained embedding stays tied"
    for lora in (dict(targets="c_attn c_fc"), dict(targets="c_attn", train="*wte*"), {}, dict(targets="*")):
        lm = model(rank=3, **lora)
        lm.transformer.wte.weight.data += 0.1 * ("train" in lora)
        save_adapter(lm, tmp_path)
        loaded = peft.PeftModel.from_pretrained(peft_base_model(model()), tmp_path).eval()
        torch.testing.assert_close(logits(loaded(IDS)), lm(IDS), atol=1e-5, rtol=0)
        torch.testing.assert_close(load_adapter(model(), tmp_path).eval()(IDS), lm(IDS), atol=1e-5, rtol=0)
        said = capsys.readouterr().out
        assert ("lm_head is tied to the embedding" in said) == (lora == dict(targets="*"))
        if lora != dict(targets="*"):
            torch.testing.assert_close(logits(loaded.merge_and_unload()(IDS)), lm(IDS), atol=1e-3, rtol=0)


def test_other_base_model_is_rejected(tmp_path, peft):
    "peft saves the base weights of an adapted head, so other base weights are detected there"
    made = peft.get_peft_model(peft_base_model(model()), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    made.save_pretrained(tmp_path)
    other = model()
    other.transformer.wte.weight.data += 1
    with pytest.raises(CheckpointError, match="made for other weights"):
        load_adapter(other, tmp_path)


def test_parameter_counts_match_the_fresh_or_resume_guide():
    "Adapters of rank r on GPT-2 have 198,481 · r parameters: four layers in each of twelve blocks, and the head"
    for rank in (8, 16):
        with torch.device("meta"):
            lm = add_lora(new_lm("gpt2"), LoRAConfig(rank=rank, targets="*"))
        assert len(lora_layers(lm)) == 49
        assert n_params(lm, trainable=True) == 198_481 * rank
        assert n_params(lm) == 124_439_808 + 198_481 * rank


@pytest.mark.parametrize("arch", ["gpt2", "gpt", "scratch_gpt", "rnn"])
def test_adapters_start_at_zero_and_every_layer_learns(arch):
    torch.manual_seed(0)
    lm = new_lm(arch, **(GPT2 if arch == "gpt2" else dict(vocab_size=23, ctx_len=16))).eval()
    for p in lm.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        before = lm(IDS)
        add_lora(lm, LoRAConfig(rank=4))
        torch.testing.assert_close(lm(IDS), before, atol=1e-5, rtol=0)  # torch runs a frozen GRU with another kernel
    lm.loss(Batch(IDS[:, :-1], IDS[:, 1:]))["loss"].backward()
    for name, layer in lora_layers(lm).items():
        assert layer.lora_B.grad.norm() > 0, name
        assert layer.weight.grad is None, name


@pytest.mark.parametrize("arch", ["gpt2", "gpt", "scratch_gpt", "rnn"])
def test_merge_unmerge_and_to_plain(arch):
    if arch in ("scratch_gpt", "rnn"):
        torch.manual_seed(0)
        lm = add_lora(new_lm(arch, vocab_size=23, ctx_len=16), LoRAConfig(rank=2)).eval()
        for layer in lora_layers(lm).values():
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    else:
        lm = model(arch, rank=2)
    before = lm(IDS)
    torch.testing.assert_close(merge_adapters(lm)(IDS), before, atol=1e-4, rtol=0)
    assert torch.equal(unmerge_adapters(lm)(IDS), before)
    plain = merge_and_unload(lm)
    torch.testing.assert_close(plain.eval()(IDS), before, atol=1e-4, rtol=0)
    again = new_lm(arch, **vars(plain.cfg)).eval()
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(IDS), plain(IDS))


def test_merging_a_tied_head_keeps_the_embedding():
    lm = model(rank=2, targets="lm_head")
    embedding = lm.transformer.wte.weight.clone()
    merge_adapters(lm)(IDS)
    plain = merge_and_unload(lm)
    assert torch.equal(lm.transformer.wte.weight, embedding) and torch.equal(plain.transformer.wte.weight, embedding)
    assert lm.cfg.tie and not plain.cfg.tie


LORA = dict(lora_rank=2, lora_dropout=0.2, init_from="runs/base")


@pytest.fixture(scope="module")
def base_run_folder(tmp_path_factory):
    "Return a folder with a corpus and a trained run to adapt"
    folder = tmp_path_factory.mktemp("lora")
    write_corpus(folder / "corpus")
    assert run_in_process(folder, train, **{**TINY, "run": "base", "steps": 20, "patience": 0}) == 0, read_log(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(base_run_folder):
    assert run_in_process(base_run_folder, train, **TINY | LORA) == 0, read_log(base_run_folder)
    return run_results(base_run_folder / "runs/r")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bit_identical(tmp_path, base_run_folder, optimizer):
    "A run with dropout in its adapters, stopped at many steps, ends with the same bits, and writes the base file once"
    shutil.copytree(base_run_folder / "corpus", tmp_path / "corpus")
    shutil.copytree(base_run_folder / "runs/base", tmp_path / "runs/base")
    params = TINY | LORA | dict(optimizer=optimizer)
    assert run_in_process(tmp_path, train, **params | dict(run="whole")) == 0, read_log(tmp_path)
    stops = 3, 11, 12, 27
    for i, step in enumerate(stops):
        assert run_in_process(tmp_path, train, step, **params | dict(resume=i > 0)) == 130, read_log(tmp_path)
        shutil.rmtree(tmp_path / "runs/base", ignore_errors=True)  # The run has a copy of its base weights
    base = (tmp_path / "runs/r/base.safetensors").stat().st_mtime_ns
    assert run_in_process(tmp_path, train, **params | dict(resume=True)) == 0, read_log(tmp_path)
    assert differences(run_results(tmp_path / "runs/whole"), run_results(tmp_path / "runs/r")) == []
    assert (tmp_path / "runs/r/base.safetensors").stat().st_mtime_ns == base


def test_a_step_folder_is_an_adapter_of_peft(base_run_folder, uninterrupted, peft):
    "A checkpoint is a small adapter, which peft opens on the base model of the run"
    run = base_run_folder / "runs/r"
    step = list_checkpoints(run)[-1]
    assert not (step / "model.safetensors").exists()
    lm, base = load_lm(step), load_lm(base_run_folder / "runs/base")
    ids = IDS % 23
    loaded = peft.PeftModel.from_pretrained(base, step).eval()
    torch.testing.assert_close(loaded(ids), lm(ids), atol=1e-5, rtol=0)
    config = json.loads((step / "config.json").read_text())
    assert config["lora"]["rank"] == 2
    names = {n for o in read_state(step)["optimizers"] for g in o["param_groups"] for n in g["param_names"]}
    assert names and all("lora_" in n for n in names)


def test_run_with_adapters_can_be_adapted_again(base_run_folder, uninterrupted):
    "init_from accepts a run with adapters too, and merges them into the weights"
    lm = load_lm(base_run_folder / "runs/r")
    plain = merge_and_unload(lm)
    code = run_in_process(
        base_run_folder, train, **TINY | dict(run="on", init_from="runs/r", steps=1, lr=1e-12, patience=0)
    )
    assert code == 0, read_log(base_run_folder)
    on = model_tensors(load_lm(base_run_folder / "runs/on"))
    for name, t in model_tensors(plain).items():
        torch.testing.assert_close(on[name], t, atol=1e-4, rtol=0, msg=name)


def test_lora_hyperparameters_are_fixed(base_run_folder, uninterrupted):
    "Another rank or alpha on resume is an error with its name, and a resume without them works"
    code = run_in_process(base_run_folder, train, **TINY | dict(resume=True, lora_rank=4))
    assert code == 1 and "lora_rank=2, not 4" in read_log(base_run_folder)
    code = run_in_process(base_run_folder, train, **TINY | dict(resume=True, lora_alpha=1.0))
    assert code == 1 and "lora_alpha='auto', not 1.0" in read_log(base_run_folder)
    assert run_in_process(base_run_folder, train, **TINY | dict(resume=True)) == 0, read_log(base_run_folder)


def test_missing_base_weights_are_named(base_run_folder, uninterrupted, tmp_path):
    "A checkpoint without the base weights is an error with a hint"
    (tmp_path / "r").mkdir()
    step = list_checkpoints(base_run_folder / "runs/r")[-1]
    shutil.copytree(step, tmp_path / "r" / step.name)
    with pytest.raises(CheckpointError, match="Copy the whole run folder"):
        load_lm(tmp_path / "r" / step.name)


def test_freeze_with_adapters(base_run_folder):
    "freeze can freeze adapters, but does not make other weights trainable"
    code = run_in_process(base_run_folder, train, **TINY | LORA | dict(run="frozen", freeze="head.*", steps=2))
    assert code == 0, read_log(base_run_folder)
    state = read_state(list_checkpoints(base_run_folder / "runs/frozen")[-1])
    names = {n for o in state["optimizers"] for g in o["param_groups"] for n in g["param_names"]}
    assert names and all("lora_" in n and not n.startswith("head") for n in names)


def test_trainable_biases_learn_in_bfloat16():
    "Only frozen tensors may use the cached bfloat16 copy"
    lm = model(rank=2, train="c_fc.bias")
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.train().loss(Batch(IDS[:, :-1], IDS[:, 1:]))["loss"]
    loss.backward()
    assert lm.transformer.h[0].mlp.c_fc.bias.grad.norm() > 0
    assert lm.transformer.h[0].mlp.c_fc.weight.grad is None


def test_changed_base_weight_is_cast_again():
    lm = model(rank=2)
    layer = lm.transformer.h[0].mlp.c_fc
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = lm(IDS)
    with torch.no_grad():
        layer.bias += 5
    with torch.autocast("cpu", torch.bfloat16):
        after = lm(IDS)
        lm.train().loss(Batch(IDS[:, :-1], IDS[:, 1:]))["loss"].backward()  # Training uses the cast made above
    assert not torch.equal(before, after)


@pytest.mark.parametrize("damage", ["no lora_B", "no rank", "shape"])
def test_incomplete_adapter_is_rejected_without_changes(tmp_path, damage):
    save_adapter(model(rank=2), tmp_path)
    tensors, path = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    name = next(n for n in tensors if "lora_B" in n)
    if damage == "no lora_B":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        about = json.loads(path.read_text())
        del about["r"]
        path.write_text(json.dumps(about))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    lm = model()
    with pytest.raises(CheckpointError, match="needs|needed"):
        load_adapter(lm, tmp_path)
    assert lm.lora is None and not lora_layers(lm)


def test_a_merged_model_can_be_cast():
    lm = merge_adapters(model(rank=2))
    torch.testing.assert_close(lm.to(torch.bfloat16)(IDS).float(), model(rank=2)(IDS), atol=0.3, rtol=0.1)


def test_untied_head_is_rejected_by_a_tied_model():
    "Merging an adapter into the head unties it from the embedding"
    with pytest.raises(CheckpointError, match="tie=False"):
        load_weights(model(), merge_and_unload(model(rank=2, targets="lm_head")).state_dict())


def test_lora_options_without_a_rank_are_rejected(base_run_folder):
    assert run_in_process(base_run_folder, train, **TINY | dict(run="idle", lora_targets="qkv")) == 1
    assert "needs adapters. Add lora_rank=" in read_log(base_run_folder)
    assert not (base_run_folder / "runs/idle").exists()


def test_failed_start_leaves_no_base_weights(tmp_path, base_run_folder):
    "A run without a checkpoint starts again from the base run, unless that has changed meanwhile"
    shutil.copytree(base_run_folder / "corpus", tmp_path / "corpus")
    shutil.copytree(base_run_folder / "runs/base", tmp_path / "runs/base")
    assert run_in_process(tmp_path, train, 1, **TINY | LORA) == 130
    run = tmp_path / "runs/r"
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    for name in ("last", "interrupted"):
        (run / name).unlink()
    record = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(
        json.dumps(record | dict(status="failed", saved=False))
    )  # Before its first checkpoint
    code = run_in_process(
        tmp_path, train, **{**TINY, "run": "base", "steps": 25, "patience": 0, "resume": True, "allow_change": "steps"}
    )
    assert code == 0, read_log(tmp_path)
    assert run_in_process(tmp_path, train, **TINY | LORA | dict(resume=True)) != 0
    assert "the initial weights have changed" in read_log(tmp_path)
    shutil.rmtree(tmp_path / "runs/base")
    shutil.copytree(base_run_folder / "runs/base", tmp_path / "runs/base")
    assert run_in_process(tmp_path, train, **TINY | LORA | dict(resume=True)) == 0, read_log(tmp_path)
    assert "is not saved" not in read_log(tmp_path)
    assert load_lm(run).lora.rank == 2


def test_fork_copies_the_run_at_its_step(base_run_folder, uninterrupted, monkeypatch):
    "A fork has the record, metrics and best checkpoint of its step, and a fork that fails leaves no files"
    monkeypatch.chdir(base_run_folder)
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(base_run_folder / "runs"))
    assert (
        run_in_process(base_run_folder, train, **TINY | LORA | dict(run="many", keep="all", save_every=5, lr=0.3)) == 0
    ), read_log(base_run_folder)
    name = fork(base_run_folder / "runs/many/step_00000020")
    r = load(name)
    assert (r.status, r.step, r.result) == ("interrupted", 20, {})
    assert max(m["step"] for m in r.metrics) == 20
    best = read_state(base_run_folder / "runs/many/step_00000020")["counters"]["best_step"]
    assert load(name, "best").step == best
    with pytest.raises(ValueError, match="is not a folder name"):
        fork("many", run="../out")
    (base_run_folder / "runs/many/step_00000020/state.pt").unlink()
    with pytest.raises(CheckpointError, match="state.pt: missing"):
        fork(base_run_folder / "runs/many/step_00000020", run="half")
    assert not list((base_run_folder / "runs").glob(".*.tmp")) and not (base_run_folder / "runs/half").exists()


def test_second_run_moves_the_whole_folder_of_the_first(tmp_path):
    "A second run of the same name moves all files in the folder of the first run aside, also those of its hooks and your own"
    write_corpus(tmp_path / "corpus")
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/thesis.tex").write_text("mine")
    params = TINY | dict(steps=2)
    for _ in range(2):
        assert run_in_process(tmp_path, train_with_weights, **params) == 0, read_log(tmp_path)
    moved = {p.name for p in (tmp_path / "runs/r-1").iterdir()}
    assert {"run.json", "tokenizer", "step_00000002", "weights_2.pt", "thesis.tex"} <= moved


def train_with_weights(**params):
    run(hooks=[SaveWeights("runs/r", "weights_{step}.pt")], **params)
    return 0


def test_fewer_steps_than_done_are_rejected(base_run_folder, uninterrupted):
    code = run_in_process(base_run_folder, train, **TINY | dict(resume=True, steps=5, allow_change="steps"))
    assert code == 1 and "the run is already at step 40, past its end at step 5. Increase" in read_log(base_run_folder)


# Weights come with their architecture and sizes


SOURCES = {
    "gpt": dict(model_args="d_model=16 n_layers=3 n_heads=2"),
    "nanogpt": dict(preset="nanogpt", model_args="d_model=16 n_layers=1 n_heads=2"),
    "rnn": dict(arch="rnn", model_args="d_model=16 cell=lstm"),
    "ssm": dict(arch="ssm", model_args="d_model=16 n_layers=1 head_dim=8"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_new_run_takes_architecture_and_sizes_from_its_initial_weights(workdir, monkeypatch, name):
    monkeypatch.chdir(workdir)
    source = run(**TINY | dict(steps=4, run="source") | SOURCES[name])
    lm = export(source, "exported") and source.lm
    few = {n: v for n, v in TINY.items() if n not in ("model_args", "ctx_len", "tokenizer")} | dict(steps=4)
    for number, path in enumerate(("source", "exported", f"runs/source/{list_checkpoints(source.folder)[-1].name}")):
        tuned = run(**few | dict(run=f"tuned{number}", init_from=path, lora_rank=2))
        assert tuned.config.arch == lm.arch and tuned.lm.cfg == lm.cfg and tuned.lm.lora.rank == 2
        assert tuned.tokenizer.fingerprint == source.tokenizer.fingerprint


def test_given_values_take_precedence_over_those_of_the_initial_weights(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    run(**TINY | dict(steps=4, run="source"))
    tuned = run(**TINY | dict(steps=4, init_from="source", model_args="dropout=0.3 softcap=0", ctx_len=8))
    assert (tuned.lm.cfg.d_model, tuned.lm.cfg.dropout, tuned.lm.cfg.softcap, tuned.lm.cfg.ctx_len) == (16, 0.3, 0.0, 8)
    with pytest.raises(CheckpointError, match="tensors"):
        run(**TINY | dict(steps=4, run="other", init_from="source", arch="rnn", model_args="d_model=16"))
