"""Texts and evaluations of a trained run: stop strings, unknown characters, one default temperature, and no side effects."""

import inspect
import warnings
from copy import deepcopy

import pytest
import torch
from helpers import ROOT, lmnotes_command, read_log, recipe_parameters, run_in_process

import lmnotes
from lmnotes.data.tokenizer import ByteTokenizer
from lmnotes.export.export import GENERATE_SCRIPT
from lmnotes.inference.generation import GenerateConfig, TokenSampler, generate, generate_ids
from lmnotes.inference.quantization import Int8Linear, quantize
from lmnotes.models.gpt import GPT
from lmnotes.nn.lm import LM, LMConfig, new_lm


class Recital(LM):
    "A model that generates one text again and again, and counts its steps"

    def __init__(self, *texts):
        super().__init__(LMConfig(256, 16))
        self.texts, self.calls = texts, 0
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def step(self, x, state=None):
        self.calls += 1
        at = state or 0
        logits = torch.full((len(x), 256), -1e4)
        for row, text in zip(logits, self.texts):
            row[text[at % len(text)]] = 0
        return logits, at + 1


@pytest.mark.parametrize("stop", ["\n", ["", "\n", "w"], "lo\n"])
def test_texts_of_a_list_end_at_a_stop_string_like_a_single_text(stop):
    lm, tok = Recital(b"hello\nworld ", b"a\nb hello\nworl"), ByteTokenizer()
    texts = generate(lm, tok, ["x", "y"], 1000, stop)
    assert lm.calls <= 20
    assert texts == [generate(Recital(text), tok, "x", 1000, stop) for text in lm.texts]
    assert texts[0] == ("hel" if stop == "lo\n" else "hello")


def test_infinite_logits_and_any_temperature_in_a_batch():
    "A row with overflowing or infinite logits samples its most likely token, and the rows beside it do not change"
    rows = torch.tensor([[0.0, 40.0, 3.0, -2.0], [0.0, torch.inf, 1.0, 2.0], [-torch.inf, 3e38, -3e38, 1.0]])

    def sample(logits, **settings):
        return TokenSampler(**settings).reset(torch.zeros(len(logits), 1).long())(logits).tolist()

    for temperature in (0, 5e-324, 1e-45, 1e-38, 1e-20, 1e-3):
        for more in ({}, dict(top_k=2), dict(top_p=0.5), dict(min_p=0.1), dict(repetition_penalty=2.0)):
            assert sample(rows, temperature=temperature, **more) == [1, 1, 1], (temperature, more)
    usual = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    assert sample(torch.cat([usual, torch.full((1, 50), torch.inf)]))[:8] == sample(usual)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="NaN or all minus infinity"):
            sample(torch.full((1, 4), -torch.inf), temperature=temperature)


@pytest.mark.parametrize(
    "settings",
    [dict(n=-1), dict(seed=-1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(top_p=0.0)],
)
def test_settings_out_of_range_are_named(settings):
    (name,) = settings
    for call in (generate, lambda *args, **given: list(lmnotes.stream(*args, **given))):
        with pytest.raises(ValueError, match=f"{name}="):
            call(Recital(b"ab"), ByteTokenizer(), "x", **settings)
    with pytest.raises(ValueError, match=f"{name}="):
        generate_ids(Recital(b"ab"), [[1]], **dict(n=4) | settings)


def test_there_is_one_default_temperature():
    parameters = recipe_parameters(ROOT / "nbs/generate.ipynb")
    defaults = {inspect.signature(f).parameters["temperature"].default for f in (lmnotes.generate, lmnotes.stream)}
    assert {*defaults, TokenSampler.temperature, parameters["temperature"]} == {GenerateConfig.temperature}
    assert "dict(type=float, default=GenerateConfig.temperature)" in GENERATE_SCRIPT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run in a folder of its own, with a character tokenizer"
    folder = tmp_path_factory.mktemp("generation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "x.txt").write_text("the cat sat on -the mat.\n" * 200)
        (folder / "other.txt").write_text("the mat sat on the cat.\n" * 200)
        small = dict(ctx_len=16, batch_size=2, steps=2, arch="bigram", device="cpu", dtype="float32")
        yield lmnotes.run(run="a", data="x.txt", tokenizer="chars", out_dir="checkpoints", **small)


def test_unknown_characters_of_a_prompt_are_named(trained):
    with pytest.warns(UserWarning, match="chars has no id for '日本' in the prompt"):
        trained.generate(["the", "日本t"], 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained.generate(["the", ""], 5)


def test_evaluation_leaves_nothing_behind(trained):
    "Neither the random state nor, for other data, a copy of the tokens"
    before = sorted(trained.folder.parent.parent.rglob("*"))
    for data in ("", "other.txt"):
        torch.manual_seed(1)
        expected = torch.get_rng_state()
        trained.evaluate(data=data)
        assert torch.equal(torch.get_rng_state(), expected)
    assert sorted(trained.folder.parent.parent.rglob("*")) == before


def test_stop_strings_and_dashes_on_the_command_line(trained):
    folder = trained.folder.parent.parent
    for words, prompt, stop in (
        (["--prompt", "-t", "--stop", r"\n", "--stop-strings", "at"], "-t", ["\n", "at"]),
        (["--prompt=-the", "--stop", "-", "--max-new-tokens", "50"], "-the", "-"),
    ):
        if "--stop-strings" in words:  # One option under two names
            assert run_in_process(folder, lmnotes_command, "generate", *words) == 2
            assert "stop and stop_strings are the same parameter" in read_log(folder)
            words = ["--stop" if word == "--stop-strings" else word for word in words]
        assert run_in_process(folder, lmnotes_command, "generate", *words) == 0, read_log(folder)
        n = 50 if "50" in words else 200
        assert read_log(folder).endswith(prompt + trained.generate(prompt, n, stop=stop) + "\n")


WIDE = dict(d_model=64, n_layers=2, n_heads=2)
QUANTIZED = {  # {architecture: its configuration}
    "gpt": WIDE,
    "gpt2": dict(WIDE, n_positions=16),
    "scratch_gpt": WIDE,
    "rnn": dict(d_model=64),
    "bytepatch": WIDE,
    "ssm": dict(d_model=64, n_layers=2, head_dim=32, d_state=4),
    "streams": WIDE,
    "diffusion": dict(WIDE, block=1),
    "nanothink": dict(
        transformer="gpt,d_model=64,n_layers=1,n_heads=2",
        diffuser="diffusion,block=1,d_model=64,n_layers=1,n_heads=2",
        **dict(d_model=64, n_heads=2, head_dim=32, kv_latent_dim=64, rope_dim=16),
    ),
}


@pytest.mark.parametrize("arch", QUANTIZED)
def test_int8_weights_of_every_architecture(arch):
    "A quantized model writes text, and its logits are close to those of its weights in float32"
    torch.manual_seed(0)
    lm = new_lm(arch, vocab_size=256, ctx_len=16, **QUANTIZED[arch]).eval()
    for i, p in enumerate(lm.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    x = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    small = quantize(deepcopy(lm))
    layers = [m for m in small.modules() if isinstance(m, Int8Linear)]
    assert layers and sum(type(m) is torch.nn.Linear for m in small.modules()) < len(layers)
    with torch.no_grad():
        torch.manual_seed(1)
        logits = lm(x)
        torch.manual_seed(1)
        found = small(x)
    assert (found - logits).norm() < 0.05 * logits.norm()
    assert len(generate_ids(small, x.tolist(), 20, temperature=0)[1]) == 20


class NinesGPT(GPT):
    "A GPT with its own `generate`"

    def generate(self, x, n, sample_fn):
        yield from (torch.full((len(x), 1), 9) for _ in range(n))


class UncachedGPT(GPT):
    "A GPT with its own `step`, whose state is the ids"

    step = LM.step


class SineGPT(GPT):
    "A GPT with its own positions, for a `start` that is a number"

    def embed_ids(self, x, start=0):
        return self.embed(x) + torch.arange(start, start + x.shape[1]).sin()[:, None]


@pytest.mark.parametrize("cls", [NinesGPT, UncachedGPT, SineGPT])
def test_a_subclass_that_overrides_a_method_of_generation_reads_prompts_of_different_lengths_with_it(cls):
    torch.manual_seed(0)
    lm = cls(GPT.Config(vocab_size=32, ctx_len=16, d_model=16, n_layers=1, n_heads=2))
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.3)
    prompts = [[1, 2, 3], [4] * 9, [5]]
    alone = [generate_ids(lm, [p], 5, temperature=0)[0] for p in prompts]
    assert generate_ids(lm, prompts, 5, temperature=0) == alone
