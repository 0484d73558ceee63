"""The `gpt2` architecture: folders written by transformers, a hub, and files that are damaged or do not fit."""

import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import TINY as TINY_RUN
from helpers import (
    differences,
    read_log,
    read_records,
    replacing_environment,
    run_code_alone,
    run_in_process,
    state_hash,
    train,
)
from safetensors.torch import load_file, save_file

import lmnotes
from lmnotes.data.tokenizer import BPETokenizer
from lmnotes.inference.generation import generate_ids
from lmnotes.models.gpt2 import GPT2, save_hf, to_hf
from lmnotes.nn.lm import new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora, merge_and_unload, save_adapter
from lmnotes.training.checkpoint import load_lm, save_checkpoint

SHAPE = dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
TINY = dict(vocab_size=64, ctx_len=12, n_positions=16, d_model=32, n_layers=2, n_heads=2)
WEIGHTS = "model.safetensors"


def published(folder, tie=True, **shape):
    "Write a random GPT-2 with transformers alone, and return the model"
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**{**SHAPE, **shape}, tie_word_embeddings=tie)).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.1)  # Biases too
    hf.save_pretrained(folder)
    return hf


@pytest.fixture
def source(tmp_path):
    published(tmp_path / "source")
    return tmp_path / "source"


def ids(*shape, seed=0):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def change(path, **values):
    "Change values of a JSON file"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(path, function):
    "Change the tensors of a file"
    tensors = load_file(path)
    save_file(function(tensors), path, dict(format="pt"))


def close(a, b):
    return torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# Folders written by transformers


@pytest.mark.parametrize("tie", [True, False])
def test_logits_and_names_equal_transformers(tmp_path, tie):
    hf = published(tmp_path / "source", tie)
    lm = GPT2.pretrained(str(tmp_path / "source"))
    assert lm.training and lm.cfg.ctx_len == 16 and lm.cfg.tie is tie and lm.cfg.dropout == 0.1
    assert (lm.lm_head.weight is lm.transformer.wte.weight) is tie
    assert {n: t.shape for n, t in lm.state_dict().items()} == {n: t.shape for n, t in hf.state_dict().items()}
    x = ids(3, 16)
    close(lm.eval()(x), hf(x).logits)


def test_other_weight_file_formats(source):
    x, tensors = ids(2, 16), load_file(source / WEIGHTS)
    want = GPT2.pretrained(source).eval()(x)
    buffers = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}  # As in the first published files
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()} | buffers, source / WEIGHTS)
    assert torch.equal(GPT2.pretrained(source).eval()(x), want)
    (source / WEIGHTS).unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    assert torch.equal(GPT2.pretrained(source).eval()(x), want)
    torch.save({n: t.bfloat16() for n, t in tensors.items()}, source / "pytorch_model.bin")
    lm = GPT2.pretrained(source)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    torch.testing.assert_close(lm.eval()(x), want, atol=0.05, rtol=0.05)


def test_weights_in_several_files(tmp_path):
    hf = published(tmp_path / "whole")
    hf.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    close(GPT2.pretrained(tmp_path / "source").eval()(ids(2, 9)), hf(ids(2, 9)).logits)
    shard = sorted((tmp_path / "source").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        GPT2.pretrained(tmp_path / "source")


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_opens_saved_models(tmp_path, tie):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lm = new_lm("gpt2", **TINY, tie=tie).eval()
    save_hf(lm, tmp_path / "ours")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(hf).__name__ == "GPT2LMHeadModel" and hf.config.activation_function == "gelu_new"
    close(hf(ids(2, 16)).logits, lm(ids(2, 16)))
    assert (hf.lm_head.weight is hf.transformer.wte.weight) is tie
    again = GPT2.pretrained(tmp_path / "ours", ctx_len=12)
    assert again.cfg == lm.cfg
    assert all(torch.equal(t, lm.state_dict()[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize("tie", [True, False])
def test_checkpoint_loads_without_the_source(source, tmp_path, tie):
    shutil.rmtree(source)
    published(source, tie)
    lm = GPT2.pretrained(source, vocab_size=60, ctx_len=8, dropout=0.3)
    save_checkpoint(tmp_path, lm, 1)
    shutil.rmtree(source)
    again = load_lm(tmp_path)
    assert again.cfg == lm.cfg and again.cfg.vocab_size == 60 and again.cfg.dropout == 0.3
    assert torch.equal(again(ids(2, 8) % 60), lm.eval()(ids(2, 8) % 60))


@pytest.mark.parametrize("tie", [True, False])
def test_padding_tokens_of_the_vocabulary_are_dropped(tmp_path, tie):
    hf = published(tmp_path / "source", tie)
    lm = GPT2.pretrained(tmp_path / "source", vocab_size=50).eval()
    assert lm.cfg.vocab_size == 50 and lm.cfg.tie is tie
    assert (lm.lm_head.weight is lm.transformer.wte.weight) is tie
    close(lm(ids(2, 9) % 50), hf(ids(2, 9) % 50).logits[..., :50])
    save_hf(lm, tmp_path / "ours")
    assert GPT2.pretrained(tmp_path / "ours").cfg == GPT2.pretrained(tmp_path / "source", vocab_size=50).cfg


# The loss


def test_targets_are_shifted_once(source):
    "The loss equals that of transformers on the whole window, which shifts the targets once"
    from transformers import GPT2LMHeadModel

    from lmnotes.data.batches import IGNORE_INDEX, Batch

    lm, hf, window = GPT2.pretrained(source).eval(), GPT2LMHeadModel.from_pretrained(source), ids(4, 16)
    batch = Batch(window[:, :-1], window[:, 1:].clone())
    by_hand = -hf(batch.x).logits.log_softmax(-1).gather(-1, batch.y[..., None])[..., 0]
    out = lm.loss(batch)
    close(out["loss"], by_hand.mean())
    close(out["loss"], hf(window, labels=window).loss)
    assert abs(out["loss"] - hf(batch.x, labels=batch.y).loss) > 1e-3
    batch.y[0, 3:] = IGNORE_INDEX
    close(lm.loss(batch)["loss"], by_hand[batch.y != IGNORE_INDEX].mean())


def test_generation_uses_eval_mode_without_gradients(source):
    lm = GPT2.pretrained(source, dropout=0.5)
    assert not torch.equal(lm(ids(1, 9)), lm(ids(1, 9)))
    a, b = (generate_ids(lm.train(), [[1, 2, 3], [4, 5]], 30, temperature=0) for _ in range(2))
    assert a == b == generate_ids(lm.eval(), [[1, 2, 3], [4, 5]], 30, temperature=0)
    assert not lm.step(ids(1, 9))[0].requires_grad
    assert lm.transformer.gradient_checkpointing is False


def test_cached_steps_equal_transformers(source):
    hf, lm, x = to_hf(GPT2.pretrained(source)).eval(), GPT2.pretrained(source).eval(), ids(3, 16)
    state, cache = None, None
    with torch.no_grad():
        for part in x.split([5, 1, 1, 4, 1, 3, 1], 1):
            logits, state = lm.step(part, state)
            out = hf(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            close(logits, out.logits[:, -1])
        logits, state = lm.step(x[:, :1], state)
        close(logits, hf(torch.cat([x[:, 1:], x[:, :1]], 1)).logits[:, -1])


# Files and parameters that do not fit


@pytest.mark.parametrize("given", [72, 201, 50257])
def test_other_vocabulary_is_rejected(tmp_path, given):
    published(tmp_path, vocab_size=200)
    assert GPT2.pretrained(tmp_path, vocab_size=73).cfg.vocab_size == 73
    with pytest.raises(ValueError, match=f"the tokenizer has {given} tokens, but .* with 200"):
        GPT2.pretrained(tmp_path, vocab_size=given)


def test_vocabulary_mismatch_names_the_tokenizer(tmp_path):
    published(tmp_path, vocab_size=50257, n_embd=2, n_head=1, n_layer=1)
    with pytest.raises(ValueError, match="tokenizer='gpt2'"):
        GPT2.pretrained(tmp_path, vocab_size=2048)


def test_ctx_len_beyond_the_positions_is_rejected(source):
    with pytest.raises(ValueError, match="ctx_len=17 is more than the n_positions=16"):
        GPT2.pretrained(source, ctx_len=17)
    with pytest.raises(ValueError, match="17 positions given, and n_positions=16"):
        GPT2.pretrained(source)(ids(1, 17))


@pytest.mark.parametrize("name, value", dict(d_model=16, n_layers=3, n_heads=4, n_positions=32, tie=False).items())
def test_other_shape_than_the_source_is_rejected(source, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}.*Leave it out"):
        GPT2.pretrained(source, **{name: value})


def test_different_dropout_values_are_rejected(source):
    change(source / "config.json", attn_pdrop=0.2)
    with pytest.raises(ValueError, match=r"are \(0.1, 0.2, 0.1\), not one value. Set dropout"):
        GPT2.pretrained(source)
    hf = to_hf(GPT2.pretrained(source, dropout=0.3))
    assert {m.p for m in hf.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_unknown_value_is_rejected(source):
    with pytest.raises(ValueError, match="no configuration field 'layers'"):
        GPT2.pretrained(source, layers=2)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(model_type="llama"), "model_type is 'llama'"),
        (dict(model_type=None), "model_type is None"),
        (dict(activation_function="relu"), "activation_function is 'relu'"),
        (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        (dict(scale_attn_weights=False), "scale_attn_weights is False"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
        (dict(reorder_and_upcast_attn=True), "reorder_and_upcast_attn is True"),
        (dict(add_cross_attention=True), "add_cross_attention is True"),
        (dict(n_inner=100), "n_inner is 100"),
        (dict(n_layer="two"), "config.json cannot be read"),
        (dict(n_layer=3), "12 tensors are missing: transformer.h.2"),
        (dict(n_layer=1), r"\d+ tensors are not GPT-2's: transformer.h.1"),
        (dict(vocab_size=65), "tensors have another shape: .*wte"),
        (dict(tie_word_embeddings=False), "1 tensors are missing: lm_head.weight"),
    ],
)
def test_configuration_of_another_model_is_rejected(source, values, message):
    change(source / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        GPT2.pretrained(source)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path):
    torch.save(dict(weight=print), path.with_name("pytorch_model.bin"))
    path.unlink()


DAMAGE = {
    "cut": (cut, "model.safetensors cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "model.safetensors cannot be read"),
    "garbage": (lambda path: path.write_bytes(bytes(100)), "model.safetensors cannot be read"),
    "not there": (lambda path: path.unlink(), "no file named model.safetensors"),
    "code in a pickle": (pickled, "pytorch_model.bin cannot be read"),
    "config cut": (lambda path: cut(path.with_name("config.json")), "config.json cannot be read"),
    "config a list": (lambda path: path.with_name("config.json").write_text("[]"), "config.json cannot be read"),
    "no config": (lambda path: path.with_name("config.json").unlink(), "config.json: no such file"),
    "one missing": (
        lambda path: rewrite(path, lambda ts: {n: t for n, t in ts.items() if n != "transformer.h.1.attn.c_attn.bias"}),
        "model.safetensors: 1 tensors are missing: transformer.h.1.attn.c_attn.bias",
    ),
    "one more": (
        lambda path: rewrite(path, lambda ts: ts | {"extra\x1b[2J": torch.ones(1)}),
        r"model.safetensors: 1 tensors are not GPT-2's: extra\\x1b\[2J",
    ),
    "a head of its own": (
        lambda path: rewrite(path, lambda ts: ts | {"lm_head.weight": torch.ones(64, 32)}),
        "model.safetensors: lm_head is not the embedding",
    ),
    "not numbers": (
        lambda path: rewrite(path, lambda ts: ts | {"transformer.ln_f.bias": torch.full((32,), torch.nan)}),
        "model.safetensors: 1 tensors hold NaN or infinity: transformer.ln_f.bias",
    ),
    "an adapter": (
        lambda path: path.with_name("adapter_config.json").write_text("{}"),
        "adapter_config.json: this folder holds an adapter",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_rejected_by_name(source, what, capfd):
    damage, message = DAMAGE[what]
    damage(source / WEIGHTS)
    with pytest.raises(ValueError, match=message) as caught:
        GPT2.pretrained(source)
    assert str(source) in str(caught.value)
    assert capfd.readouterr().err == ""  # Our message is enough: transformers' own table is not printed


# Adapters


def adapted(source, **more):
    "Return a GPT-2 with non-zero adapters on all layers"
    torch.manual_seed(2)
    lm = add_lora(GPT2.pretrained(source), LoRAConfig(rank=3, alpha=5, **more))
    for name, p in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return lm.eval()


def test_merged_adapters_untie_the_head(source, tmp_path):
    lm, x = adapted(source, targets="*"), ids(2, 9)
    with pytest.raises(ValueError, match="merge_and_unload"):
        to_hf(lm)
    plain = merge_and_unload(lm)
    assert lm.cfg.tie and not plain.cfg.tie
    close(plain(x), lm(x))
    save_hf(plain, tmp_path / "merged")
    again = GPT2.pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(x), plain(x)) and not again.cfg.tie


def test_peft_opens_the_adapters_on_transformers_model(source, tmp_path):
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    lm, x = adapted(source), ids(2, 9)
    save_adapter(lm, tmp_path / "adapter")
    base = GPT2LMHeadModel.from_pretrained(source)
    assert not torch.allclose(base(x).logits, lm(x), atol=1e-2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close(model(x).logits, lm(x))
    close(model.merge_and_unload()(x).logits, lm(x))


# Runs


def final_checkpoint(folder):
    "Return {name: hash or content} of a run's last checkpoint, with or without adapters, and of its metrics"
    checkpoint_folder = folder / (folder / "final").read_text().strip()
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in checkpoint_folder.glob("*.safetensors")}
    assert files
    return dict(
        files,
        step=checkpoint_folder.name,
        state=state_hash(checkpoint_folder),
        metrics=read_records(folder / "metrics.jsonl"),
    )


RUN = dict({n: v for n, v in TINY_RUN.items() if n != "model_args"}, arch="gpt2", init_from="source", steps=16)


@pytest.mark.parametrize("more", [dict(), dict(lora_rank=2, lora_dropout=0.1)], ids=["all of it", "adapters"])
def test_resumed_run_is_bit_identical_and_needs_no_source(workdir, more):
    published(workdir / "source", vocab_size=320)  # 64 more ids than there are bytes
    assert run_in_process(workdir, train, **RUN | more | dict(run="unbroken")) == 0, read_log(workdir)
    assert run_in_process(workdir, train, 7, **RUN | more) == 130, read_log(workdir)
    shutil.rmtree(workdir / "source")
    assert run_in_process(workdir, train, 13, resume=True, run="r", out_dir="runs") == 130, read_log(workdir)
    assert run_in_process(workdir, train, resume=True, run="r", out_dir="runs") == 0, read_log(workdir)
    assert differences(final_checkpoint(workdir / "runs/unbroken"), final_checkpoint(workdir / "runs/r")) == []


def test_run_starts_from_the_published_weights(workdir):
    published(workdir / "source", vocab_size=256)
    assert run_in_process(workdir, train, 1, **RUN, model_args="dropout=0", optimizer="adamw") == 130, read_log(workdir)
    lm, its = load_lm(workdir / "runs/r"), GPT2.pretrained(workdir / "source", ctx_len=16, dropout=0.0)
    assert lm.cfg == its.cfg
    far = max((a - b).abs().max().item() for a, b in zip(lm.parameters(), its.parameters()))
    assert 0 < far < 0.01  # One step of AdamW


def test_a_run_from_random_weights_needs_no_files(workdir):
    shape = "d_model=16 n_layers=1 n_heads=2 n_positions=16"
    params = RUN | dict(init_from="random", model_args=shape, steps=3)
    assert run_in_process(workdir, train, **params) == 0, read_log(workdir)
    assert load_lm(workdir / "runs/r").cfg.vocab_size == 256


def test_other_tokenizer_is_rejected(workdir):
    published(workdir / "source", vocab_size=64)
    assert run_in_process(workdir, train, **RUN) == 1
    assert "the tokenizer has 256 tokens" in read_log(workdir)


# Names


LIBRARIES = "lmnotes", "huggingface_hub", "transformers"  # They read the variables when they are imported


def fresh(code, home, **environment):
    "Run code in a new process with a separate cache, and return its output"
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "TRANSFORMERS_", "LMNOTES_"))}
    clean |= dict(HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    home.mkdir(exist_ok=True)
    code = "import sys; sys.stdout = open('printed', 'w', buffering=1)\n" + code
    given = clean | environment, run_code_alone, code
    assert run_in_process(home, replacing_environment, *given, packages=LIBRARIES) == 0, read_log(home)[-2000:]
    return (home / "printed").read_text()


def test_importing_the_module_does_not_load_transformers(tmp_path):
    code = "import sys; from lmnotes.nn.lm import *; print(archs(), 'gpt2' in archs(), 'transformers' in sys.modules)"
    assert fresh(code, tmp_path).strip().endswith("True False")


OPEN = """
from lmnotes.models.gpt2 import GPT2
for name in {names!r}:
    try:
        lm = GPT2.pretrained(name, vocab_size=64, ctx_len=8)
        print("logits", lm.eval()(lm.lm_head.weight.new_zeros(1, 8).long()).sum().item())
    except ValueError as error:
        print(error)
"""


def test_failed_download_by_name(tmp_path):
    output = fresh(OPEN.format(names=["gpt2"]), tmp_path, HF_HUB_OFFLINE="1")
    for part in ("gpt2 cannot be downloaded", "in a folder and pass that folder as init_from", "init_from='random'"):
        assert part in output


class Hub(BaseHTTPRequestHandler):
    "A minimal hub that serves the files of one repository, gpt2"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/gpt2/resolve/main/")
        path = self.server.folder / name
        self.server.asked.append((self.command, self.path))
        found = "/" not in name and path.is_file()
        data = path.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        if not found:
            repo = self.path.startswith("/gpt2/")
            self.send_header("X-Error-Code", "EntryNotFound" if repo else "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(source):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = source, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_is_downloaded_once_and_then_found_offline(hub, source, tmp_path):
    endpoint = dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_address[1]}")
    logits = GPT2.pretrained(source).eval()(torch.zeros(1, 8, dtype=torch.long)).sum().item()
    output, unknown = fresh(OPEN.format(names=["gpt2", "gpt3"]), tmp_path / "home", **endpoint).splitlines()
    assert output.startswith("logits") and float(output.split()[1]) == pytest.approx(logits, abs=1e-4)
    assert "gpt3 cannot be downloaded" in unknown and "init_from='random'" in unknown
    assert ("GET", "/gpt2/resolve/main/model.safetensors") in hub.asked
    assert fresh(OPEN.format(names=["gpt2"]), tmp_path / "home", HF_HUB_OFFLINE="1") == output + "\n"


def test_interrupted_download(hub, source, tmp_path):
    cut(source / WEIGHTS)
    output = fresh(
        OPEN.format(names=["gpt2"]), tmp_path / "home", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_address[1]}"
    )
    assert "gpt2" in output and "logits" not in output


def test_a_gpt2_with_an_added_pad_token(tmp_path, monkeypatch, capsys):
    "Its tokenizer and its embedding have one id more than the tokenizer that it grew from"
    from transformers import GPT2Tokenizer

    monkeypatch.chdir(tmp_path)
    text = "The quick brown fox jumps over the lazy dog, and sits down to write a letter home.\n" * 60
    (tmp_path / "x.txt").write_text(text)
    BPETokenizer.train([text], 300).save("plain")
    theirs = GPT2Tokenizer.from_pretrained("plain")
    size = len(theirs)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    published("tuned", vocab_size=size + 1, n_positions=32)
    theirs.save_pretrained("tuned")
    given = dict(data="x.txt", arch="gpt2", init_from="tuned", ctx_len=32, batch_size=2, steps=1, lr=1e-4)
    given |= dict(model_args="dropout=0", device="cpu", dtype="float32", out_dir="out")
    runs = [lmnotes.run(run=name, tokenizer=name, **given) for name in ("plain", "tuned")]
    assert "ignored the special tokens [PAD]" in capsys.readouterr().out
    assert all(r.lm.cfg.vocab_size == size == r.tokenizer.vocab_size for r in runs)
    assert state_hash(runs[0].folder / "step_00000001") == state_hash(runs[1].folder / "step_00000001")
