"""A model that lmnotes exports for transformers gives the same logits, ids and texts there."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, lmnotes_command, write_corpus

from lmnotes.data.tokenizer import EOT, BPETokenizer, ByteTokenizer, CharTokenizer
from lmnotes.export.export import export
from lmnotes.export.hub import upload
from lmnotes.export.transformers_format import save_transformers
from lmnotes.models.gpt2 import save_hf
from lmnotes.nn.lm import archs, new_lm
from lmnotes.nn.lora import merge_and_unload
from lmnotes.runs.load import load
from lmnotes.runs.run import run

SHAPE = dict(vocab_size=300, ctx_len=24, d_model=32, n_layers=2, n_heads=2)
NANO = "d_model=16 n_layers=2 n_heads=2"
HARD = [
    "",
    " ",
    "a",
    "  two  spaces\n\n\n and lines \t",
    "naïve 語言 🙂 e\u0301 \u200b\ufeff",
    f"{EOT} {EOT}{EOT}text<|endoftext",
    "don't I'll we've 'tis 's",
    "\x00\x01\x7f\xad\xa0",
    "Ā Ġ Ċ are the characters of BPE files",
    "\ufffd and <unk> are text",
    "x" * 3000,
    "1234567890 3.14 ½ ²",
]


def opened(folder):
    "Return the model and the tokenizer that transformers opens"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def check_same(lm, tokenizer, folder, prompt="The sea "):
    "Check that logits, ids and greedy tokens are equal"
    model, theirs = opened(folder)
    for text in HARD:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text) == ids, text
        if tokenizer.unk_id not in ids:
            assert theirs.decode(ids) == text
    x = torch.randint(tokenizer.vocab_size, (3, lm.cfg.ctx_len), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x).logits, lm.eval()(x)[..., : tokenizer.vocab_size], atol=1e-5, rtol=1e-5)
    ids = torch.tensor([tokenizer.encode(prompt).tolist()])
    n = min(8, lm.cfg.ctx_len - ids.shape[1])
    new = torch.cat([*lm.generate(ids, n, lambda logits: logits[..., : tokenizer.vocab_size].argmax(-1))], 1)[
        0
    ].tolist()
    new = new[: new.index(tokenizer.eot_id) + 1] if tokenizer.eot_id in new else new
    found = model.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found == new and n > 4


def randomized(lm):
    "Give every parameter a random value, biases and norms too"
    torch.manual_seed(1)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return lm.eval()


TEXTS = ["The sea is deep. don't 1234 naïve 語 " * 20, "\ufffd \x00"]
BYTES, CHARS, BPE = ByteTokenizer(), CharTokenizer.train(TEXTS), BPETokenizer.train(iter(TEXTS), 300)
OTHERS = CharTokenizer({*map(chr, range(32, 127)), "\udc80", "\x00"})  # Half of a surrogate pair, no U+FFFD


@pytest.mark.parametrize("tokenizer", [BYTES, CHARS, BPE, OTHERS], ids=["bytes", "chars", "bpe", "surrogates"])
def test_tokenizers(tokenizer, tmp_path):
    lm = randomized(new_lm("gpt", "nanogpt", **SHAPE))
    save_transformers(lm, tokenizer, tmp_path)
    check_same(lm, tokenizer, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        dict(preset="nanogpt", bias=True),
        dict(preset="nanogpt_small", d_ff=40),
        dict(preset="nanogpt", tie=False, dropout=0.2),
        dict(preset="nanogpt", act="relu"),
        dict(preset="nanogpt", act="relu2", n_heads=4),
        dict(norm="layer", pos="learned", qk_norm=False, mix=False, softcap=0.0),
    ],
    ids=["biases", "width", "untied", "relu", "relu2", "without a preset"],
)
def test_gpts_that_are_a_gpt2(fields, tmp_path):
    lm = randomized(new_lm("gpt", **SHAPE | fields))
    save_transformers(lm, BYTES, tmp_path)
    check_same(lm, BYTES, tmp_path)


@pytest.mark.parametrize("tie", [True, False])
def test_gpt2(tie, tmp_path):
    lm = randomized(new_lm("gpt2", **SHAPE | dict(vocab_size=BPE.vocab_size, n_positions=32, tie=tie)))
    save_transformers(lm, BPE, tmp_path)
    check_same(lm, BPE, tmp_path)


@pytest.mark.parametrize("arch", [name for name in archs() if name not in ("gpt", "gpt2")])
def test_other_architectures_are_rejected_in_a_sentence_that_names_the_possible_ones(arch, tmp_path):
    class Named:
        "A model of this architecture"

    Named.arch = arch
    with pytest.raises(
        ValueError, match=r"no architecture '\w+'. It can open gpt2, and gpt with a preset such as nano"
    ):
        save_transformers(Named(), BYTES, tmp_path)


@pytest.mark.parametrize(
    "field", ["norm=rms_gain", "pos=rope", "qk_norm=True", "mix=True", "softcap=15.0", "act=swiglu"]
)
def test_gpts_that_are_no_gpt2_are_rejected(field, tmp_path):
    name, _, value = field.partition("=")
    value = {"True": True, "15.0": 15.0}.get(value, value)
    lm = new_lm("gpt", "nanogpt", **SHAPE | {name: value})
    with pytest.raises(ValueError, match=rf"no GPT with {field}. Train with preset='nanogpt', or export"):
        save_transformers(lm, BYTES, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "corpus")
    return folder


def trained(folder, name, **params):
    return run(
        **TINY | dict(data=str(folder / "corpus"), out_dir=str(folder), run=name, steps=10, sample_every=0) | params
    )


@pytest.fixture(scope="module")
def nano(folder):
    return trained(folder, "nano", preset="nanogpt", model_args=NANO, tokenizer="bpe:300")


def test_the_command_exports_a_run(nano, tmp_path, capsys):
    to = tmp_path / "model"
    assert lmnotes_command("export", "--run", nano.folder, "--to", to, "--format", "transformers") == 0
    check_same(nano.lm, nano.tokenizer, to, prompt="3: ")
    assert not list(to.rglob("*.py"))
    card = (to / "README.md").read_text(encoding="utf-8")
    assert 'library_name: "transformers"' in card and "AutoModelForCausalLM" in card and "generate.py" not in card
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert lmnotes_command("export", "--run", nano.folder, "--to", to, "--format", "transformers") == 0
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    assert upload(to, "me/model", dry_run=True).keys() == before.keys()


def test_the_code_of_the_card_runs(nano, tmp_path, monkeypatch, capsys):
    to = export(nano, tmp_path / "model", format="transformers")
    code = (to / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(to)
    exec(code.replace("max_new_tokens=100", "max_new_tokens=3").replace("Once upon a time", "3: "), {})
    assert capsys.readouterr().out.startswith("3: ")


def test_an_error_of_the_command_names_what_can_be_exported(folder, tmp_path, capsys):
    r = trained(folder, "rnn", arch="rnn", model_args="d_model=16 n_layers=1")
    assert lmnotes_command("export", "--run", r.folder, "--to", tmp_path / "x", "--format", "transformers") == 2
    error = capsys.readouterr().err
    assert "no architecture 'rnn'. It can open gpt2, and gpt with a preset such as nanogpt" in error
    assert error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert lmnotes_command("export", "--run", r.folder, "--to", tmp_path / "x", "--format", "onnx") == 2
    assert "format='onnx' is not one of lmnotes, transformers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nano_lora", "gpt2_lora"])
def test_adapters_are_merged(name, nano, folder, tmp_path):
    source = str(nano.folder)
    if name == "gpt2_lora":
        lm = randomized(new_lm("gpt2", **SHAPE | dict(vocab_size=nano.tokenizer.vocab_size, n_positions=24)))
        save_hf(lm, source := str(tmp_path / "gpt2"))
        nano.tokenizer.save(source)
    params = dict(arch="gpt2") if name == "gpt2_lora" else dict(preset="nanogpt", model_args=NANO)
    params |= dict(init_from=source, lora_rank=2, lr=0.05, optimizer="adamw", tokenizer="bpe:300")
    r = trained(folder, name, **dict(model_args="") | params)
    check_same(merge_and_unload(r.lm), r.tokenizer, export(r, tmp_path / "model", format="transformers"), prompt="3: ")


def test_an_export_of_gpt2_is_a_source_of_initial_weights(folder, tmp_path):
    first = trained(
        folder, "gpt2", arch="gpt2", model_args=NANO + " n_positions=24", init_from="random", tokenizer="bpe:300"
    )
    to = export(first, tmp_path / "model", format="transformers")
    params = {name: value for name, value in TINY.items() if name not in ("tokenizer", "model_args")}
    params |= dict(data=str(folder / "corpus"), out_dir=str(folder), run="again", arch="gpt2", steps=1)
    again = run(**params, init_from=str(to), lr=1e-9, optimizer="adamw")
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name, t in first.lm.state_dict().items():
        torch.testing.assert_close(again.lm.state_dict()[name], t, atol=1e-6, rtol=1e-6)


def test_lmnotes_names_what_it_cannot_load(nano, tmp_path):
    to = export(nano, tmp_path / "model", format="transformers")
    with pytest.raises(ValueError, match="a model for transformers. Open it with AutoModelForCausalLM"):
        load(to)
    assert json.loads((to / "config.json").read_text())["model_type"] == "gpt2" and Path(to, "tokenizer.json").exists()
