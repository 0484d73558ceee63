"""The `bytepatch` model: it equals a plain AGIFORMER, reads streams of any length, and trains on two processes."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, command_line_args, lmnotes_command, read_log, run_in_process, run_ranks
from test_distributed import figures

from lmnotes.data.batches import Batch
from lmnotes.data.tokenizer import ByteTokenizer
from lmnotes.inference.generation import generate
from lmnotes.nn.lm import check_cached_decoding, check_causality, get_arch, new_lm, parse_model_args
from lmnotes.runs.load import load

PRESETS = "", "agiformer"
TINY_ARGS = "d_model=16 d_byte=16 n_layers=1 n_heads=2 dropout=0.0"
SHAPE = dict(d_model=32, n_layers=2, n_heads=4)
IDS = torch.randint(256, (2, 256), generator=torch.Generator().manual_seed(0))


def model(preset="", **config):
    "Return a tiny model with random non-zero weights"
    torch.manual_seed(0)
    lm = new_lm("bytepatch", preset, **{**SHAPE, "d_byte": 16, "dropout": 0.0, **config}).eval()
    for p in lm.parameters():
        if p.ndim == 2 and not preset:
            torch.nn.init.normal_(p, std=0.2)
    return lm


@pytest.fixture
def reference_models(monkeypatch):
    "Yield the benchmark's plain AGIFORMER model, and ours with the same weights"
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bytepatch

    torch.manual_seed(0)
    peer = bytepatch.GuideModel(**SHAPE, window=40).eval()
    ours = new_lm("bytepatch", "agiformer", **SHAPE, window=40).eval()
    ours.load_state_dict(peer.state_dict())
    yield peer, ours
    for name in ("bytepatch", "common"):
        sys.modules.pop(name)


def test_agiformer_equals_its_plain_implementation(reference_models):
    "With the same weights, both give the same gradients, and the same logits for all bytes of the plain model"
    peer, ours = reference_models
    logits, targets = peer(IDS)
    F.cross_entropy(logits.flatten(0, 2), targets.flatten()).backward()
    own = ours(IDS[:, :-1])[:, 3:]
    F.cross_entropy(own.flatten(0, 1), IDS[:, 4:].flatten()).backward()
    assert (own - logits.flatten(1, 2)).abs().max() < 1e-5
    theirs = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - theirs[name].grad).abs().max() < 1e-5, name


@pytest.mark.parametrize("preset", PRESETS)
def test_streams_longer_than_ctx_len(preset):
    "Streams in pieces of any size work far past `ctx_len`, with borders of patches, windows and blocks anywhere"
    lm = model(preset, ctx_len=8, window=6, **({} if preset else dict(byte_window=7)))
    with torch.no_grad():
        full, state, at = lm(IDS), None, 0
        for k in (1, 2, 3, 1, 1, 1, 7, 40, 5, 1, 1, 100, 4, 4, 8, 1, 1, 1, 1, 73):
            logits, state = lm.step(IDS[:, at : at + k], state)
            at += k
            assert (logits - full[:, at - 1]).abs().max() < 1e-4, at
    assert at == 256


def size(state):
    "Return the number of values in a state"
    layers = state.layers + state.thinking + state.bytes
    tensors = [state.tail, state.pending, state.latent, *(t for c in layers for t in (c.k, c.v, c.sums))]
    return sum(t.numel() for t in tensors if t is not None)


@pytest.mark.parametrize("preset", PRESETS)
def test_state_size_is_constant(preset):
    lm = model(preset, window=6, **({} if preset else dict(byte_window=7)))
    _, state = lm.step(IDS[:1, :100])
    before = size(state)
    _, state = lm.step(IDS[:1].repeat(1, 40), state)
    assert state.n_seen == 100 + 40 * 256 and size(state) == before


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8])
def test_greedy_decoding_equals_forward_at_any_prompt_length(preset, length):
    "Greedy decoding after a prompt of any length equals the most likely bytes of `forward`"
    lm = model(preset)
    new = torch.cat(list(lm.generate(IDS[:, :length], 9, lambda logits: logits.argmax(-1))), 1)
    whole = torch.cat([IDS[:, :length], new], 1)
    with torch.no_grad():
        assert torch.equal(lm(whole[:, :-1])[:, length - 1 :].argmax(-1), new)


@pytest.mark.parametrize("preset", PRESETS)
def test_causality_across_attention_blocks(preset):
    "The text is longer than two windows, so attention works in blocks"
    lm = model(preset, window=4, dropout=0.1, **({} if preset else dict(byte_window=5)))
    check_causality(lm, Batch(IDS[:1, :45], IDS[:1, 1:46]))


@pytest.mark.parametrize("preset", PRESETS)
def test_thinking_steps_can_change_at_inference(preset):
    "Each number of thinking steps gives other logits, and `step` gives the same ones as `forward`"
    lm, answers = model(preset, thinking_steps=3), []
    batch = Batch(IDS[:, :40], IDS[:, 1:41])
    for steps in (0, 1, 3, 5):
        lm.cfg.thinking_steps = steps
        with torch.no_grad():
            *_, (z, gate, logits) = lm.iter_thinking(batch.x)
            answers.append(lm(batch.x))
        assert z.shape == (2, 10, 32) and (gate is None) == (steps == 0)
        assert torch.equal(logits, answers[-1])
        check_cached_decoding(lm, batch)
    for a, b in zip(answers, answers[1:]):
        assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_no_overflow_in_bfloat16(preset):
    "A stream of 10,000 bytes, half of them 0 and half 255, causes no overflow in bfloat16"
    lm = model(preset)
    x = torch.cat([torch.zeros(1, 5000, dtype=torch.long), torch.full((1, 5000), 255)], 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm.loss(Batch(x[:, :-1], x[:, 1:]))["loss"]
        loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in lm.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("preset", ["", *get_arch("bytepatch").presets])
def test_bfloat16_weights(preset, dtype):
    "With weights in another dtype, the model runs, `step` equals `forward`, and logits change little"
    lm = model(preset, window=6)
    with torch.no_grad():
        wide = lm(IDS[:, :40])
        lm.to(dtype)
        full = lm(IDS[:, :40])
        _, state = lm.step(IDS[:, :13])
        for t in range(13, 40):
            logits, state = lm.step(IDS[:, t : t + 1], state)
            assert (logits - full[:, t]).abs().max() < 0.2, t
    assert (full - wide).std() < 0.02 and state.latent.dtype == dtype
    lm.train().loss(Batch(IDS[:, :40], IDS[:, 1:41]))["loss"].backward()


LEAST = dict(window=1, thinking_steps=0, patch_size=1, n_heads=1, ngram_rows=1, d_byte=1, byte_window=1, ngrams=1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [*LEAST, "byte_layers", "n_layers", "d_model"])
def test_too_small_values_are_rejected(preset, name):
    for value in (LEAST.get(name, 0) - 1, -3):
        least = dict(byte_layers=0, n_layers=1, d_model=1).get(name, LEAST.get(name))
        with pytest.raises(ValueError, match=f"{name}={value}, but {name} must be at least {least}"):
            model(preset, **{name: value})


@pytest.mark.parametrize("preset", PRESETS)
def test_smallest_valid_values(preset):
    lm = model(preset, **LEAST | dict(ctx_len=1, n_layers=1, byte_layers=0, **({} if preset else dict(d_byte=2))))
    check_cached_decoding(lm, Batch(IDS[:, :8], IDS[:, 1:9]))


def test_invalid_values_are_rejected():
    for config, output in {
        "ctx_len=3": "ctx_len=3 is shorter than patch_size=4",
        "dropout=1": "at least 0 and less than 1",
        "dropout=-0.1": "at least 0 and less than 1",
        "n_heads=3": "d_model=32 is not a multiple of n_heads=3",
        "n_heads=2 d_byte=6": "a head has 3: choose an even",
    }.items():
        with pytest.raises(ValueError, match=output):
            model(**parse_model_args("bytepatch", config))
    with pytest.raises(ValueError, match="choose an even"):
        model("agiformer", d_model=33, n_heads=3)


@pytest.mark.parametrize("preset", PRESETS)
def test_negative_thinking_steps_are_rejected(preset):
    lm = model(preset)
    lm.cfg.thinking_steps = -2
    for use in (lm, lm.step, lambda x: list(lm.iter_thinking(x))):
        with pytest.raises(ValueError, match="thinking_steps=-2, but thinking_steps must be at least 0"):
            use(IDS)


NIGHTLY = [pytest.param(preset, steps, marks=pytest.mark.nightly) for preset, steps in (("", 2), ("agiformer", 0))]


@pytest.mark.parametrize("preset, steps", [("", 0), ("agiformer", 2), *NIGHTLY])
def test_every_parameter_gets_a_gradient_on_two_processes(workdir, preset, steps):
    "Every parameter gets a gradient on both processes, with and without thinking steps"
    case = TINY | dict(arch="bytepatch", preset=preset, steps=10, log_every=1, patience=0)
    case["model_args"] = f"{TINY_ARGS} thinking_steps={steps}"
    assert run_ranks(workdir, 2, lmnotes_command, "train", *command_line_args(**case)) == [0, 0], read_log(workdir)
    assert len([split for split, _ in figures(workdir, "r") if split == "train"]) == 10


def test_command_line(workdir):
    "Train, save, load with more thinking steps, and continue a prompt of multi-byte characters"
    case = TINY | dict(arch="bytepatch", model_args=TINY_ARGS, steps=10)
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**case)) == 0, read_log(workdir)
    asked = dict(run="runs/r", prompt="a", n=9, dtype="bfloat16")
    assert run_in_process(workdir, lmnotes_command, "generate", *command_line_args(**asked)) == 0, read_log(workdir)
    lm = load(workdir / "runs/r", model_args="thinking_steps=5").lm
    assert lm.cfg.thinking_steps == 5
    text = generate(lm, ByteTokenizer(), "žluťoučký kůň ", 30, seed=1)
    assert isinstance(text, str) and text == generate(lm, ByteTokenizer(), "žluťoučký kůň ", 30, seed=1)
