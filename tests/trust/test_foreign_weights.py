"""Weights, adapters and checkpoints from other people: rejected with an error that names the file, in little memory."""

import hashlib
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from foreign import (
    NIGHT,
    call,
    fuzz,
    mutate_archive,
    mutate_json,
    mutate_safetensors,
    random_safetensors,
    random_tensor,
    random_value,
    saved,
)
from safetensors.torch import load_file, save_file
from test_untrusted_values import expert

from lmnotes.core import CheckpointError
from lmnotes.data.untrusted_files import read_torch_file
from lmnotes.models.gpt2 import GPT2, save_hf
from lmnotes.nn.lm import LM, arch, new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora, load_adapter, save_adapter
from lmnotes.nn.vector_store import VectorStore
from lmnotes.recipes.nanothink_checkpoints import check_content_hash, read_checkpoint_file
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import load_lm, new_lm_from_checkpoint, read_state, save_checkpoint
from lmnotes.training.weights import load_initial_weights, merged_state_dict, save_torch_file

SMALL = dict(vocab_size=32, ctx_len=8, d_model=8, n_layers=1, n_heads=2)


def small_lm():
    torch.manual_seed(0)
    return new_lm("gpt", **SMALL)


def load_into_small_lm(path):
    load_initial_weights(small_lm(), path)


@pytest.fixture(scope="module")
def run_with_a_weight_file(tmp_path_factory):
    "Return the folder of a tiny run beside whose checkpoints there is a file of weights"
    folder = tmp_path_factory.mktemp("weight_file")
    (folder / "x.txt").write_text("The sea was calm.\n" * 20)
    small = dict(
        data=str(folder / "x.txt"),
        arch="gpt",
        tokenizer="bytes",
        ctx_len=8,
        batch_size=2,
        steps=2,
        device="cpu",
        dtype="float32",
    )
    r = run(**small, run="r", out_dir=str(folder), model_args="d_model=8 n_layers=1 n_heads=2", view=False)
    save_torch_file(merged_state_dict(r.lm), r.folder / "weights_step_2.pt")
    return r.folder


MODELS = {  # Entries of run.json, and the message
    "many weights": (dict(d_model=40_000), "has more weights than its file"),
    "many layers": (dict(n_layers=10**9), "has more weights than its file"),
    "a text": (dict(d_model="x"), "d_model is 'x', expected int"),
    "a fraction": (dict(n_layers=1.5), "n_layers is 1.5, expected int"),
    "dropout": (dict(dropout="a"), "dropout is 'a', expected float"),
    "an unknown field": (dict(zzz=1), "has no field 'zzz'"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_file_beside_a_forged_record(name, run_with_a_weight_file, tmp_path):
    "The model in run.json has the limits of the model in a checkpoint"
    folder, (model, message) = shutil.copytree(run_with_a_weight_file, tmp_path / "r"), MODELS[name]
    kind, found = call(load_weight_file, folder)
    assert not kind, found
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | dict(model=record["model"] | model)))
    kind, found = call(load_weight_file, folder)
    assert kind == "CheckpointError" and "run.json" in found and message in found, (kind, found)


def load_weight_file(folder):
    return load(folder / "weights_step_2.pt", device="cpu").step


def weights_with(change):
    weights = dict(small_lm().state_dict())
    weights["embed.weight"] = change(weights["embed.weight"])
    return weights


# Weights in .pt and .safetensors files

CHANGES = {
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "NaN": lambda t: t * torch.nan,
    "one infinity": lambda t: t.clone().index_fill_(0, torch.tensor([3]), torch.inf),
}
UNUSUAL = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "a conjugate view": lambda t: t.to(torch.complex64).conj(),
    "one value": lambda t: torch.ones(1, 1).expand(32, 8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", CHANGES)
def test_values_that_are_no_weights(name, suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights_with(CHANGES[name]), path)
    with pytest.raises(CheckpointError, match=rf"w\{suffix}: embed\.weight "):
        load_into_small_lm(path)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors(name, tmp_path):
    torch.save(weights_with(UNUSUAL[name]), tmp_path / "w.pt")
    kind, found = call(load_into_small_lm, tmp_path / "w.pt")
    assert kind == "CheckpointError" and "w.pt: cannot be read" in found and "weights_only" not in found, (kind, found)


def test_half_precision_and_views_are_weights(tmp_path):
    for change in (torch.Tensor.half, torch.Tensor.bfloat16, lambda t: t.t().contiguous().t(), torch.nn.Parameter):
        torch.save(weights_with(change), tmp_path / "w.pt")
        load_into_small_lm(tmp_path / "w.pt")


def test_tied_weights_share_their_tensor(tmp_path):
    t = torch.randn(4, 4)
    torch.save(dict(a=t, b=t, c=t.t()), tmp_path / "w.pt")
    read = read_torch_file(tmp_path / "w.pt")
    assert read["a"].data_ptr() == read["b"].data_ptr() == read["c"].data_ptr()


class Runs:
    "A pickle that would run a command"

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_is_not_run_and_no_message_shows_how(tmp_path, monkeypatch):
    "A pickle is not run, and no message shows how to run it"
    monkeypatch.chdir(tmp_path)
    torch.save(dict(w=Runs()), "w.pt")
    for read in (load_into_small_lm, read_checkpoint_file):
        with pytest.raises(CheckpointError, match=r"w\.pt: cannot be read, because it holds __builtin__\.getattr") as e:
            read("w.pt")
        assert "weights_only" not in str(e.value) and "add_safe_globals" not in str(e.value)
    assert not Path("ran").exists()


def test_a_torchscript_program_is_not_loaded(tmp_path):
    torch.save(dict(w=torch.zeros(3)), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/constants.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointError, match=r"w\.pt: cannot be read, because it is a TorchScript program"):
        load_into_small_lm(tmp_path / "w.pt")


def deflate(source, target):
    "Copy a file of torch.save into a compressed archive"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))


def test_a_compressed_file(tmp_path):
    torch.save(dict(w=torch.zeros(1 << 26)), tmp_path / "large.pt")
    deflate(tmp_path / "large.pt", tmp_path / "w.pt")
    (tmp_path / "large.pt").unlink()
    assert (tmp_path / "w.pt").stat().st_size < 10 << 20
    kind, found = call(load_into_small_lm, tmp_path / "w.pt", megabytes=150)
    assert kind == "CheckpointError" and "w.pt: cannot be read, because its archive is compressed" in found


BOMBS = {
    "a byte array": b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R",
    "a tensor": b"ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R",
    "a list in itself": b"]q\0h\0a",
    "a billion lists": b"]q\0" + b"".join(b"](" + bytes([104, i]) * 10 + b"eq" + bytes([i + 1]) for i in range(9)),
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "many values": b"](" + b"N" * 3_000_000 + b"e",
    "an attribute of a dict": b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb",
    "copies of a list of pairs": b"]q\0("
    + b"K\1K\2\x86" * 50_000
    + b"e"
    + b"ccollections\nOrderedDict\nq\1h\0\x85R" * 20_000,
    "copies of a dict": b"}q\0("
    + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(50_000))
    + b"u"
    + b"ccollections\nOrderedDict\n)Rh\0b" * 20_000,
    "a function": b"ctorch._utils\n_rebuild_tensor_v2\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_need_memory(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + BOMBS[name] + b".")
        archive.writestr("w/version", b"3\n")
    kind, found = call(load_into_small_lm, tmp_path / "w.pt")
    assert kind == "CheckpointError" and "w.pt: " in found, (kind, found)


def test_empty_and_missing_files(tmp_path):
    for suffix in (".pt", ".safetensors"):
        with pytest.raises(CheckpointError, match=f"none{suffix}: there is no such file"):
            load_into_small_lm(tmp_path / f"none{suffix}")
        (tmp_path / f"w{suffix}").write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"w{suffix}: cannot be read"):
            load_into_small_lm(tmp_path / f"w{suffix}")
        (tmp_path / f"folder{suffix}").mkdir()
        with pytest.raises(CheckpointError, match=f"folder{suffix}: is a folder"):
            load_into_small_lm(tmp_path / f"folder{suffix}")


# Checkpoints


def seal(folder):
    "Write a manifest that fits the files of a checkpoint folder, as anybody can"
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    entries = {p.name: dict(size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in files}
    (folder / "manifest.json").write_text(json.dumps(dict(step=1, files=entries)))


def save_small(folder, lora=False):
    "Save the checkpoint of a small model, and return its folder"
    lm = small_lm()
    state = dict(step=1, optimizers=[dict(state={0: dict(exp_avg=torch.zeros(4))}, param_groups=[])], scaler={})
    state["counters"] = dict(tokens=0, bad=0, best=math.inf, best_step=0, waits=0, sums={})
    Path(folder).mkdir(parents=True, exist_ok=True)
    return save_checkpoint(folder, add_lora(lm, LoRAConfig(rank=2)) if lora else lm, 1, state)


def with_config(folder, **changes):
    saved_config = json.loads((folder / "config.json").read_text())
    saved_config["config"] |= changes
    (folder / "config.json").write_text(json.dumps(saved_config))
    seal(folder)


def load_all(folder):
    load_lm(folder)
    read_state(folder)


def test_a_checkpoint_is_loaded(tmp_path):
    for lora in (False, True):
        load_all(save_small(tmp_path / str(lora), lora))


DECLARED = {
    "width": dict(d_model=10**7),
    "layers": dict(n_layers=10**9),
    "vocabulary": dict(vocab_size=10**9),
    "feed-forward width": dict(d_ff=10**12),
    "positions": dict(pos="learned", ctx_len=10**9),
    "2**62": dict(d_model=2**62),
    "10**30": dict(n_layers=10**30),
    "text": dict(d_model="8"),
    "a list": dict(n_heads=[2]),
    "NaN": dict(dropout=float("nan")),
    "a negative width": dict(d_model=-8),
    "an unknown norm": dict(norm="__import__('os')"),
    "an unknown field": dict(code="print()"),
}


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("lora", [False, True], ids=["model", "adapter"])
def test_a_declared_size_is_compared_with_the_weights(name, lora, tmp_path):
    folder = save_small(tmp_path, lora)
    with_config(folder, **DECLARED[name])
    kind, found = call(load_lm, folder)
    assert kind == "CheckpointError" and "config.json: " in found, (kind, found)


def test_a_declared_rank_is_compared_with_the_weights(tmp_path):
    folder = save_small(tmp_path, lora=True)
    saved_config = json.loads((folder / "config.json").read_text())
    for rank in (10**9, "2", 0, None):
        saved_config["lora"]["rank"] = rank
        (folder / "config.json").write_text(json.dumps(saved_config))
        seal(folder)
        kind, found = call(load_lm, folder)
        assert kind == "CheckpointError" and "config.json: " in found, (kind, found)


def test_invalid_model_args_are_no_fault_of_the_checkpoint(tmp_path):
    "An error for invalid `model_args` does not report the checkpoint as damaged"
    folder = save_small(tmp_path)
    with pytest.raises(ValueError, match="n_heads") as e:
        new_lm_from_checkpoint(folder, "n_heads=3")
    assert not isinstance(e.value, CheckpointError)


def test_a_model_that_needs_real_values_is_loaded(tmp_path):
    @arch("needs_real_values")
    class NeedsRealValues(LM):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.table = torch.nn.Embedding(cfg.vocab_size, cfg.vocab_size)
            assert self.table.weight.abs().max().item() > 0

    save_checkpoint(tmp_path, new_lm("needs_real_values"), 1)
    assert load_lm(tmp_path).arch == "needs_real_values"


def test_a_build_does_not_change_random_numbers(tmp_path):
    folder = save_small(tmp_path)
    torch.manual_seed(1)
    new_lm("gpt", **SMALL)
    expected = torch.rand(3)
    torch.manual_seed(1)
    new_lm_from_checkpoint(folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", CHANGES)
def test_values_in_a_checkpoint(name, tmp_path):
    folder = save_small(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"embed.weight": CHANGES[name](tensors["embed.weight"])}, path)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"step_00000001: embed\.weight "):
        load_lm(folder)


def test_state_with_code_names_the_file(tmp_path):
    folder = save_small(tmp_path)
    torch.save(dict(step=Runs()), folder / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read") as e:
        read_state(folder)
    assert "weights_only" not in str(e.value)


# GPT-2 in the layout of Hugging Face


def gpt2_folder(folder, **changes):
    "Write a small GPT-2 whose config.json has other values"
    save_hf(new_lm("gpt2", vocab_size=32, ctx_len=8, n_positions=8, d_model=8, n_layers=1, n_heads=2), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DECLARED_GPT2 = {
    "width and layers": dict(n_embd=10**6, n_layer=10**4, n_head=1),
    "layers": dict(n_layer=10**8),
    "layers of width 1": dict(n_layer=10**8, n_embd=1, n_head=1),
    "the other name of the layers": dict(num_hidden_layers=10**8, n_layer=10**8),
    "positions": dict(n_positions=10**9),
    "vocabulary": dict(vocab_size=10**9),
    "a negative width": dict(n_embd=-8, n_layer=10**8),
}


@pytest.mark.parametrize("name", DECLARED_GPT2)
def test_a_declared_size_of_gpt2_is_compared_with_the_files(name, tmp_path):
    gpt2_folder(tmp_path, **DECLARED_GPT2[name])
    kind, found = call(GPT2.pretrained, tmp_path)
    expected = "d_model=-8" if "negative" in name else "config.json: declares more weights than the files"
    assert kind == "ValueError" and expected in found, (kind, found)


def test_gpt2_with_many_labels_is_loaded(tmp_path):
    "A GPT-2 whose configuration declares a billion labels loads without a table of them, which GPT-2 does not use"
    gpt2_folder(tmp_path, num_labels=10**9)
    assert call(GPT2.pretrained, tmp_path)[0] == ""


def test_gpt2_with_a_pipe(tmp_path):
    gpt2_folder(tmp_path)
    os.mkfifo(tmp_path / "generation_config.json.new")
    (tmp_path / "generation_config.json.new").replace(tmp_path / "generation_config.json")
    kind, found = call(GPT2.pretrained, tmp_path)
    assert kind == "ValueError" and "generation_config.json: is a device, a pipe or a broken link" in found


# Adapters


def adapter_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ADAPTERS = dict(rank=dict(r="2"), no_rank=dict(r=0), half=dict(r=2.5), scale=dict(lora_alpha=float("inf")))
ADAPTERS |= dict(text=dict(lora_alpha=[1]), dropout=dict(lora_dropout=1.0), nothing=dict(lora_dropout=None))
ADAPTERS |= dict(huge=dict(lora_alpha=10**400), kind=dict(peft_type=[]), bias=dict(bias=["x"] * 1000))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_configs(name, tmp_path):
    save_adapter(add_lora(small_lm(), LoRAConfig(rank=2)), tmp_path)
    adapter_config(tmp_path, **ADAPTERS[name])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: ") as e:
        load_adapter(small_lm(), tmp_path)
    assert len(str(e.value)) < 500 + len(str(tmp_path))


def test_an_adapter_config_that_is_no_object(tmp_path):
    save_adapter(add_lora(small_lm(), LoRAConfig(rank=2)), tmp_path)
    for text in ("[]", "1", '"LORA"', "null"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
            load_adapter(small_lm(), tmp_path)


# Mutated files


def case_pt_weights(rng, folder):
    weights = dict(small_lm().state_dict())
    if rng.random() < 0.4:
        weights[rng.choice([*weights, "extra"])] = random_tensor(rng)
    obj = rng.choice([weights, weights, {"model_state_dict": weights, "step": 1}, {"model_state": weights}, [weights]])
    data = saved(obj)
    (folder / "w.pt").write_bytes(mutate_archive(rng, data) if rng.random() < 0.8 else data)
    return "w.pt", lambda: load_into_small_lm(folder / "w.pt")


def case_safetensors(rng, folder):
    weights = small_lm().state_dict()
    data = random_safetensors(rng, weights)
    (folder / "w.safetensors").write_bytes(mutate_safetensors(rng, data) if rng.random() < 0.7 else data)
    return "w.safetensors", lambda: load_into_small_lm(folder / "w.safetensors")


def copy_checkpoint(folder, lora):
    "Return a fresh copy of a checkpoint, which is made in the first call"
    made = folder / f"made_{lora}"
    if not made.exists():
        save_small(made, lora)
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(made, folder / "run")
    return folder / "run" / "step_00000001"


def case_config(rng, folder):
    step = copy_checkpoint(folder, rng.random() < 0.3)
    path = step / "config.json"
    path.write_text(mutate_json(rng, json.loads(path.read_text())))
    seal(step)
    return "step_00000001", lambda: load_all(step)


def case_checkpoint(rng, folder):
    step = copy_checkpoint(folder, rng.random() < 0.3)
    path = rng.choice([p for p in step.iterdir() if p.suffix in (".pt", ".safetensors")])
    mutate = mutate_archive if path.suffix == ".pt" else mutate_safetensors
    path.write_bytes(mutate(rng, path.read_bytes()))
    seal(step)
    return "step_00000001", lambda: load_all(step)


def case_manifest(rng, folder):
    step = copy_checkpoint(folder, rng.random() < 0.3)
    path = step / "manifest.json"
    path.write_text(mutate_json(rng, json.loads(path.read_text())))
    return "step_00000001", lambda: load_all(step)


def case_adapter(rng, folder):
    if not (folder / "made").exists():
        save_adapter(add_lora(small_lm(), LoRAConfig(rank=2)), folder / "made")
    shutil.copytree(folder / "made", folder / "adapter", dirs_exist_ok=True)
    path = folder / "adapter" / rng.choice(["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"])
    if path.suffix == ".json":
        path.write_text(mutate_json(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(mutate_safetensors(rng, path.read_bytes()))
    return "adapter", lambda: load_adapter(small_lm(), folder / "adapter")


def case_expert(rng, folder):
    content = expert()
    if rng.random() < 0.5:
        name = rng.choice(list(content))
        content[name] = rng.choice([random_value(rng), random_tensor(rng), {"a": random_tensor(rng)}])
    data = saved(content)
    (folder / "x.pt").write_bytes(mutate_archive(rng, data) if rng.random() < 0.7 else data)
    return "x.pt", lambda: check_content_hash(read_checkpoint_file(folder / "x.pt"), "x.pt")


def case_vector_store(rng, folder):
    torch.manual_seed(0)
    store = VectorStore(4, 8)
    store.add(torch.randn(6, 4), groups=torch.arange(6))
    data = store.save(folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(mutate_safetensors(rng, data))
    return "x.safetensors", lambda: VectorStore.load(folder / "x.safetensors").search(torch.randn(2, 4))


def case_gpt2(rng, folder):
    if not (folder / "made").exists():
        save_hf(
            new_lm("gpt2", vocab_size=32, ctx_len=8, d_model=8, n_layers=1, n_heads=2, n_positions=8), folder / "made"
        )
    shutil.copytree(folder / "made", folder / "gpt2", dirs_exist_ok=True)
    path = folder / "gpt2" / rng.choice(["config.json", "model.safetensors"])
    if path.suffix == ".json":
        path.write_text(mutate_json(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(mutate_safetensors(rng, path.read_bytes()))
    return "gpt2", lambda: GPT2.pretrained(folder / "gpt2", vocab_size=32)


CASES = [case_pt_weights, case_safetensors, case_config, case_checkpoint, case_manifest, case_adapter]
CASES += [case_expert, case_vector_store, case_gpt2]
ERRORS = {case_gpt2: (ValueError,)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__[5:])
def test_mutated_files(case, tmp_path):
    "Each of 100 mutated files of each format, and of those that failed in an earlier night, loads or raises an error that names it"
    fuzz(case, tmp_path, 100, seed=0, allowed=ERRORS.get(case, (CheckpointError,)))


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__[5:])
def test_ten_thousand_mutated_files(case, tmp_path):
    "The same for ten thousand mutated files of each format, with another seed each night"
    fuzz(case, tmp_path, 10_000, seed=NIGHT, allowed=ERRORS.get(case, (CheckpointError,)))
