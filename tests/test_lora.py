"""Adapters: exact on resume, files that peft reads and writes, and the counts of the guide's system."""

import json
import shutil
import warnings

import pytest
import torch
from helpers import TINY, call, differences, left_behind, log, train, write_corpus
from safetensors.torch import load_file, save_file

from lmnotes.core import CheckpointError
from lmnotes.data.batches import Batch
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
    "A tiny model with weights as if trained, and adapters that say something"
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


def theirs(lm):
    "The model that peft adapts: transformers' own for gpt2, the bare model otherwise"
    return to_hf(lm) if lm.arch == "gpt2" else lm


def logits(found):
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def peft():
    "The library peft, without its warnings about Conv1D and tied heads"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft")


BESIDE = {"gpt2": "transformer.wpe.* ln_*", "gpt": "embed.*"}


@pytest.mark.parametrize("beside", [False, True], ids=["adapters alone", "with others"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt"])
def test_peft_loads_ours(tmp_path, peft, arch, beside):
    lm = model(arch, rank=3, alpha=5.0, train=BESIDE[arch] if beside else "")
    if beside:
        for name, p in lm.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.data += 0.1
    save_adapter(lm, tmp_path)
    loaded = peft.PeftModel.from_pretrained(theirs(model(arch)), tmp_path).eval()
    torch.testing.assert_close(logits(loaded(IDS)), lm(IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch, targets", [("gpt2", ["c_attn", "c_fc", "lm_head"]), ("gpt", ["qkv", "down"])])
def test_ours_loads_pefts(tmp_path, peft, arch, targets):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    made = peft.get_peft_model(theirs(model(arch)), config).eval()
    made.save_pretrained(tmp_path)
    lm = load_adapter(model(arch), tmp_path).eval()
    torch.testing.assert_close(lm(IDS), logits(made(IDS)), atol=1e-5, rtol=0)
    assert {name.rpartition(".")[2] for name in lora_layers(lm)} == set(targets)


def test_another_base_is_refused(tmp_path, peft):
    "peft repeats the base of an adapted head, so there it can be seen"
    made = peft.get_peft_model(theirs(model()), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    made.save_pretrained(tmp_path)
    other = model()
    other.transformer.wte.weight.data += 1
    with pytest.raises(CheckpointError, match="made for other weights"):
        load_adapter(other, tmp_path)


def test_the_counts_of_the_guides_system():
    "198,481 · r on GPT-2: four layers in each of twelve blocks, and the head"
    for rank in (8, 16):
        with torch.device("meta"):
            lm = add_lora(new_lm("gpt2"), LoRAConfig(rank=rank))
        assert len(lora_layers(lm)) == 49
        assert n_params(lm, trainable=True) == 198_481 * rank
        assert n_params(lm) == 124_439_808 + 198_481 * rank


@pytest.mark.parametrize("arch", ["gpt2", "gpt", "scratch_gpt", "rnn"])
def test_zero_at_first_and_every_layer_learns(arch):
    torch.manual_seed(0)
    lm = new_lm(arch, **(GPT2 if arch == "gpt2" else dict(vocab_size=23, ctx_len=16))).eval()
    for p in lm.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        before = lm(IDS)
        add_lora(lm, LoRAConfig(rank=4))
        torch.testing.assert_close(lm(IDS), before, atol=1e-5, rtol=0)  # torch runs a frozen GRU by another kernel
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


def test_a_tied_head_merges_without_touching_the_embedding():
    lm = model(rank=2, targets="lm_head")
    embedding = lm.transformer.wte.weight.clone()
    merge_adapters(lm)(IDS)
    plain = merge_and_unload(lm)
    assert torch.equal(lm.transformer.wte.weight, embedding) and torch.equal(plain.transformer.wte.weight, embedding)
    assert lm.cfg.tie and not plain.cfg.tie


LORA = dict(lora_rank=2, lora_dropout=0.2, init_from="runs/base")


@pytest.fixture(scope="module")
def based(tmp_path_factory):
    "A folder with a corpus and a trained run to adapt"
    folder = tmp_path_factory.mktemp("lora")
    write_corpus(folder / "corpus")
    assert call(folder, train, **{**TINY, "run": "base", "steps": 20, "patience": 0}) == 0, log(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(based):
    assert call(based, train, **TINY | LORA) == 0, log(based)
    return left_behind(based / "runs/r")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resumed_exactly(tmp_path, based, optimizer):
    "Stopped at many steps, with dropout in the adapters, the same bits; the base file is written once"
    shutil.copytree(based / "corpus", tmp_path / "corpus")
    shutil.copytree(based / "runs/base", tmp_path / "runs/base")
    params = TINY | LORA | dict(optimizer=optimizer)
    assert call(tmp_path, train, **params | dict(run="whole")) == 0, log(tmp_path)
    stops = 3, 11, 12, 27
    for i, step in enumerate(stops):
        assert call(tmp_path, train, step, **params | dict(resume=i > 0)) == 130, log(tmp_path)
        shutil.rmtree(tmp_path / "runs/base", ignore_errors=True)  # What it began with is in its own folder
    base = (tmp_path / "runs/r/base.safetensors").stat().st_mtime_ns
    assert call(tmp_path, train, **params | dict(resume=True)) == 0, log(tmp_path)
    assert differences(left_behind(tmp_path / "runs/whole"), left_behind(tmp_path / "runs/r")) == []
    assert (tmp_path / "runs/r/base.safetensors").stat().st_mtime_ns == base


def test_a_step_folder_is_an_adapter_of_peft(based, unbroken, peft):
    "Small, and peft opens it on the model that the run began with"
    run = based / "runs/r"
    step = list_checkpoints(run)[-1]
    assert not (step / "model.safetensors").exists()
    lm, base = load_lm(step), load_lm(based / "runs/base")
    ids = IDS % 23
    loaded = peft.PeftModel.from_pretrained(base, step).eval()
    torch.testing.assert_close(loaded(ids), lm(ids), atol=1e-5, rtol=0)
    config = json.loads((step / "config.json").read_text())
    assert config["lora"]["rank"] == 2
    names = {n for o in read_state(step)["optimizers"] for g in o["param_groups"] for n in g["param_names"]}
    assert names and all("lora_" in n for n in names)


def test_a_trained_run_can_be_adapted_and_goes_on_plain(based, unbroken):
    "init_from takes a run with adapters too: they become part of the weights"
    lm = load_lm(based / "runs/r")
    plain = merge_and_unload(lm)
    code = call(based, train, **TINY | dict(run="on", init_from="runs/r", steps=1, lr=1e-12, patience=0))
    assert code == 0, log(based)
    on = model_tensors(load_lm(based / "runs/on"))
    for name, t in model_tensors(plain).items():
        torch.testing.assert_close(on[name], t, atol=1e-4, rtol=0, msg=name)


def test_hyperparameters_are_the_runs_own(based, unbroken):
    "Another rank or alpha on resume is refused by name, and leaving them out is enough"
    code = call(based, train, **TINY | dict(resume=True, lora_rank=4))
    assert code == 1 and "lora_rank=2, not 4" in log(based)
    code = call(based, train, **TINY | dict(resume=True, lora_alpha=1.0))
    assert code == 1 and "lora_alpha=0.0, not 1.0" in log(based)
    assert call(based, train, **TINY | dict(resume=True)) == 0, log(based)


def test_the_base_is_missed(based, unbroken, tmp_path):
    "A step folder alone is not the model, and that is said"
    (tmp_path / "r").mkdir()
    step = list_checkpoints(based / "runs/r")[-1]
    shutil.copytree(step, tmp_path / "r" / step.name)
    with pytest.raises(CheckpointError, match="copy the whole run folder"):
        load_lm(tmp_path / "r" / step.name)


def test_freezing_leaves_the_base_still(based):
    "freeze with adapters takes away, and gives nothing back"
    code = call(based, train, **TINY | LORA | dict(run="frozen", freeze="head.*", steps=2))
    assert code == 0, log(based)
    state = read_state(list_checkpoints(based / "runs/frozen")[-1])
    names = {n for o in state["optimizers"] for g in o["param_groups"] for n in g["param_names"]}
    assert names and all("lora_" in n and not n.startswith("head") for n in names)


def test_biases_trained_beside_learn_in_bfloat16():
    "Only what is kept still may come from the kept cast"
    lm = model(rank=2, train="c_fc.bias")
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.train().loss(Batch(IDS[:, :-1], IDS[:, 1:]))["loss"]
    loss.backward()
    assert lm.transformer.h[0].mlp.c_fc.bias.grad.norm() > 0
    assert lm.transformer.h[0].mlp.c_fc.weight.grad is None


def test_a_changed_weight_is_cast_again():
    lm = model(rank=2)
    layer = lm.transformer.h[0].mlp.c_fc
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = lm(IDS)
    with torch.no_grad():
        layer.bias += 5
    with torch.autocast("cpu", torch.bfloat16):
        after = lm(IDS)
        lm.train().loss(Batch(IDS[:, :-1], IDS[:, 1:]))["loss"].backward()  # The cast made above serves training
    assert not torch.equal(before, after)


@pytest.mark.parametrize("damage", ["no lora_B", "no rank", "shape"])
def test_half_an_adapter_is_refused_and_changes_nothing(tmp_path, damage):
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


def test_two_tensors_for_one_are_refused():
    "A head that was adapted has left the embedding it was tied to"
    with pytest.raises(CheckpointError, match="tie=False"):
        load_weights(model(), merge_and_unload(model(rank=2, targets="lm_head")).state_dict())


def test_adapting_without_a_rank_is_refused(based):
    assert call(based, train, **TINY | dict(run="idle", lora_targets="qkv")) == 1
    assert "give lora_rank too" in log(based)
    assert not (based / "runs/idle").exists()


def test_a_beginning_that_came_to_nothing(tmp_path, based):
    "Killed before the first checkpoint, and what it began with has changed since: it begins again with what is there now"
    shutil.copytree(based / "corpus", tmp_path / "corpus")
    shutil.copytree(based / "runs/base", tmp_path / "runs/base")
    assert call(tmp_path, train, 1, **TINY | LORA) == 130
    run = tmp_path / "runs/r"
    for folder in list_checkpoints(run):
        shutil.rmtree(folder)
    code = call(
        tmp_path, train, **{**TINY, "run": "base", "steps": 25, "patience": 0, "resume": True, "allow_change": "steps"}
    )
    assert code == 0, log(tmp_path)
    assert call(tmp_path, train, **TINY | LORA | dict(resume=True)) == 0, log(tmp_path)
    assert "is not saved" not in log(tmp_path)
    assert load_lm(run).lora.rank == 2


def test_a_fork_is_the_run_as_it_was(based, unbroken, monkeypatch):
    "Its record, figures and best checkpoint are those of its step; what stopped midway leaves nothing"
    monkeypatch.chdir(based)
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(based / "runs"))
    assert call(based, train, **TINY | LORA | dict(run="many", keep=0, save_every=5, lr=0.3)) == 0, log(based)
    name = fork(based / "runs/many/step_00000020")
    r = load(name)
    assert (r.status, r.step, r.result) == ("interrupted", 20, {})
    assert max(m["step"] for m in r.metrics) == 20
    best = read_state(based / "runs/many/step_00000020")["counters"]["best_step"]
    assert load(name, "best").step == best
    with pytest.raises(ValueError, match="not the name of a folder"):
        fork("many", run="../out")
    (based / "runs/many/step_00000020/state.pt").unlink()
    with pytest.raises(CheckpointError, match="not there"):
        fork(based / "runs/many/step_00000020", run="half")
    assert not list((based / "runs").glob(".*.tmp")) and not (based / "runs/half").exists()


def test_what_is_not_the_runs_stays_where_it_is(tmp_path):
    "A second run of the name moves the first one's files, and those of its hooks"
    write_corpus(tmp_path / "runs/r/corpus")
    (tmp_path / "runs/r/thesis.tex").write_text("mine")
    params = TINY | dict(data="runs/r/corpus", steps=2)
    for _ in range(2):
        assert call(tmp_path, train_with_weights, **params) == 0, log(tmp_path)
    assert (tmp_path / "runs/r/thesis.tex").exists() and (tmp_path / "runs/r/corpus/sea").exists()
    moved = {p.name for p in (tmp_path / "runs/r-1").iterdir()}
    assert {"run.json", "tokenizer", "step_00000002", "weights_2.pt"} <= moved


def train_with_weights(**params):
    run(hooks=[SaveWeights("runs/r", "weights_{step}.pt")], **params)
    return 0


def test_fewer_steps_than_are_done(based, unbroken):
    code = call(based, train, **TINY | dict(resume=True, steps=5, allow_change="steps"))
    assert code == 1 and "is at step 40 already" in log(based)
