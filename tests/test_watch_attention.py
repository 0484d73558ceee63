"""Every model with attention can record its attention weights, and stores nothing otherwise."""

from contextlib import nullcontext

import pytest
import torch

from lmnotes.nn.attention import record_attention
from lmnotes.nn.lm import new_lm

SMALL = dict(vocab_size=20, ctx_len=12, d_model=16, n_layers=2, n_heads=2)
PART = "d_model=16,n_layers=1"
CASES = {
    "gpt": (dict(SMALL), 2),
    "gpt nanogpt": (dict(SMALL), 2),
    "scratch_gpt": (dict(SMALL), 2),
    "gpt2": (dict(SMALL), 2),
    "streams": (dict(SMALL), 2),
    "diffusion": (dict(SMALL, block=1), 4),  # One call for the clean stream, one for the noisy one
    "bytepatch": (dict(SMALL, vocab_size=256, d_byte=16, byte_layers=1, thinking_steps=1), 2 + 2 + 1),
    "bytepatch agiformer": (dict(SMALL, vocab_size=256, d_byte=16), 2),
    "nanothink": (
        dict(
            **dict(vocab_size=20, ctx_len=12, d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4),
            **dict(transformer=f"gpt,{PART},n_heads=2", state_space=f"ssm,{PART},head_dim=8", diffuser=""),
        ),
        2,
    ),
}


def build_tiny_model(name):
    torch.manual_seed(0)
    config, calls = CASES[name]
    return new_lm(*name.split(), **config).eval(), calls


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_attention_call_is_recorded(name, dtype):
    lm, calls = build_tiny_model(name)
    x = torch.randint(20, (3, 12))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = lm(x)
        with record_attention() as weights:
            assert torch.equal(lm(x), before)
        n = len(weights)
        lm(x)
    assert len(weights) == n == calls
    for w in weights:
        B, H, T, S = w.shape
        assert (B, H, w.dtype) == (3, 2, torch.float32) and T <= 12
        assert torch.allclose(w.sum(-1), torch.ones(B, H, T), atol=1e-5)
        if S == T:
            assert not w.triu(1).any()


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("diffusion", "bytepatch"))])
def test_cached_steps_attend_like_the_full_forward(name):
    "A step's weights equal the newest row of forward's. Blocks and patches make other calls, so they are left out"
    lm, _ = build_tiny_model(name)
    x = torch.randint(20, (1, 6))
    with record_attention() as whole, torch.no_grad():
        lm(x)
    state = None
    for t in range(6):
        with record_attention() as now:
            _, state = lm.step(x[:, t : t + 1], state)
        for a, b in zip(whole, now):
            assert torch.allclose(a[:, :, t : t + 1, : t + 1], b, atol=1e-5)


@pytest.mark.parametrize("name", ["rnn", "ssm", "bigram"])
def test_models_without_attention_record_nothing(name):
    lm = new_lm(name, vocab_size=20, ctx_len=12)
    with record_attention() as weights, torch.no_grad():
        lm(torch.randint(20, (1, 12)))
    assert weights == []


def test_recording_attention_does_not_change_training():
    "The recorded weights are not part of the graph, and dropout draws the same numbers"
    x, losses = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1)), []
    for watched in (False, True):
        lm, _ = build_tiny_model("gpt")
        torch.manual_seed(2)
        with record_attention() if watched else nullcontext([]) as weights:
            lm.train()(x).square().sum().backward()
        assert len(weights) == 2 * watched and not any(w.requires_grad for w in weights)
        losses.append(lm.embed.weight.grad)
    assert torch.equal(*losses)
