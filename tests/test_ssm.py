"""The state-space model: constant cost over thousands of tokens, and other tests that are too slow for its notebook."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmnotes.data.batches import Batch
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.nn.scans import selective_scan, ssd
from lmnotes.training.optim import OptimConfig, make_optimizers

TINY = dict(vocab_size=16, ctx_len=16, d_model=16, n_layers=1, d_state=4, head_dim=8)
NANOTHINK = dict(d_model=16, d_inner=32, n_layers=2, d_state=4)


def numbers(state):
    "Return the number of values in a state, including hidden ones"
    return sum(t.untyped_storage().nbytes() // t.element_size() for past in state for t in (past.conv, past.scan))


class Work(TorchDispatchMode):
    "Count the calls of each operation, and the numbers that it reads and writes"

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.calls[operation] += 1
        self.numbers[operation] += sum(t.numel() for t in tensors)
        return out


@pytest.mark.parametrize("kind", ["ssd", "s6"])
def test_cost_per_token_is_constant_up_to_8000(kind):
    torch.manual_seed(0)
    m = new_lm("ssm", kind=kind, **TINY).eval()
    x, state, sizes, costs = torch.randint(16, (1, 8000)), None, set(), []
    for t in [*range(130), *range(7870, 8000)]:  # Two chunks and more, early and late
        if t == 7870:
            _, state = m.step(x[:, 130:7870], state)
        with Work() as work:
            _, state = m.step(x[:, t : t + 1], state)
        sizes.add(numbers(state))
        costs.append((work.calls, work.numbers))
    assert len(sizes) == 1
    assert sum(costs[1][0].values()) > 20  # The operations were counted
    assert all(cost == costs[1] for cost in costs[1:])  # The first step also creates the empty state


@pytest.mark.parametrize("kind", ["ssd", "s6"])
def test_prefill_equals_8000_single_steps(kind):
    torch.manual_seed(0)
    m = new_lm("ssm", kind=kind, **TINY).eval()
    for p in m.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    x = torch.randint(16, (1, 8000))
    at_once, _ = m.step(x)
    _, state = m.step(x[:, :7900])
    for chunk in (x[:, 7900:7963], *x[:, 7963:].split(1, 1)):
        in_steps, state = m.step(chunk, state)
    assert (at_once - in_steps).abs().max() < 1e-3


@pytest.mark.parametrize("field", ["ctx_len", "d_model", "n_layers", "d_state", "d_conv", "head_dim"])
def test_invalid_values_are_rejected(field):
    for value, change in ((0, {field: 0}), (-1, {"dt_rank": -1}), (-1, {"d_inner": -1})):
        (name,) = change
        with pytest.raises(ValueError, match=f"{name}={value}, but {name} must be at least"):
            new_lm("ssm", **TINY | change)
    with pytest.raises(ValueError, match="dropout=1.0, but dropout must be at least 0 and less than 1"):
        new_lm("ssm", **TINY | dict(dropout=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["ssd", "s6"])
def test_bfloat16_weights(kind, dtype):
    torch.manual_seed(0)
    m = new_lm("ssm", kind=kind, **TINY | dict(dropout=0.0))
    for block in m.blocks:
        torch.nn.init.normal_(block.out_proj.weight, std=0.3)
    torch.nn.init.normal_(m.head.weight, std=0.3)
    w = torch.randint(16, (2, 81))
    with torch.no_grad():
        wanted = m(w)
    m = m.to(dtype)
    with torch.no_grad():
        _, state = m.step(w[:, :50])
        logits, _ = m.step(w[:, 50:], state)
        assert (m(w) - wanted).abs().max() < (1e-4 if dtype == torch.float64 else 0.1) * wanted.abs().max()
        assert (logits - wanted[:, -1]).abs().max() < (1e-4 if dtype == torch.float64 else 0.1) * wanted.abs().max()
    m.loss(Batch(w[:, :-1], w[:, 1:]))["loss"].backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_expert_parameter_count_matches_nanothink():
    with torch.device("meta"):
        m = new_lm("ssm", "nanothink_s6", vocab_size=259)
    assert n_params(m) - n_params(m.embed) == 5_573_760
    assert m.head is None


@pytest.mark.parametrize("config", [TINY, dict(TINY, kind="s6"), NANOTHINK | dict(vocab_size=16, ctx_len=16)])
def test_chunks_equal_the_full_sequence(config):
    preset = "" if "head_dim" in config else "nanothink_s6"
    torch.manual_seed(0)
    m = new_lm("ssm", preset, **config).eval()
    for block in m.blocks:
        torch.nn.init.normal_(block.out_proj.weight, std=0.3)
    x = torch.randint(16, (3, 20))
    h = m.embed_ids(x)
    assert torch.equal(m(x), m.logits(m.hidden_states(h)))
    cache = m.new_cache()
    pieces = torch.cat([m.hidden_states(part, cache) for part in h.split((7, 1, 12), 1)], 1)
    torch.testing.assert_close(pieces, m.hidden_states(h), atol=1e-4, rtol=1e-4)
    moved = h.clone()
    moved[:, 9] += torch.randn(3, 16)
    change = (m.hidden_states(moved) - m.hidden_states(h)).abs().amax((0, 2))
    assert change[:9].max() < 1e-6 < change[9:].min()


@pytest.mark.parametrize("kind", ["ssd", "s6"])
def test_decay_rates_use_adamw_without_weight_decay(kind):
    m = new_lm("ssm", kind=kind, **TINY)
    groups = [group for opt in make_optimizers(m, OptimConfig(weight_decay=0.1)) for group in opt.param_groups]
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert {decay[f"blocks.0.scan.{name}"] for name in ("A_log", "D", "dt_bias", "conv.bias")} == {0.0}


@pytest.mark.parametrize("kind", ["ssd", "s6"])
def test_autocast_changes_only_rounding(kind):
    torch.manual_seed(0)
    m = new_lm("ssm", kind=kind, **TINY | dict(dropout=0.0))
    for block in m.blocks:
        torch.nn.init.normal_(block.out_proj.weight, std=0.3)
    torch.nn.init.normal_(m.head.weight, std=0.3)
    w = torch.randint(16, (4, 41))
    wanted = m.loss(Batch(w[:, :-1], w[:, 1:]))["loss"]
    exact = torch.autograd.grad(wanted, m.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = m.loss(Batch(w[:, :-1], w[:, 1:]))["loss"]
    rounded = torch.autograd.grad(found, m.parameters())
    assert abs(found - wanted) < 0.02
    for (name, _), a, b in zip(m.named_parameters(), rounded, exact):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.1 * b.norm(), f"{name} is off by {((a - b).norm() / b.norm()).item():.2f}"


@pytest.mark.parametrize("scan", [selective_scan, ssd])
def test_scans_ignore_autocast(scan):
    torch.manual_seed(0)
    heads = 8 if scan is selective_scan else 2
    A = -torch.rand(8, 4) if scan is selective_scan else -torch.rand(2)
    x, dt, B, C = torch.randn(2, 30, 8), torch.rand(2, 30, heads), torch.randn(2, 30, 4), torch.randn(2, 30, 4)
    given = [t.requires_grad_() for t in (x, dt, A, B, C)]
    plain = scan(*given)[0]
    wanted = torch.autograd.grad(plain.square().sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        y = scan(*given)[0]
        found = torch.autograd.grad(y.square().sum(), given)
    assert torch.equal(y, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
