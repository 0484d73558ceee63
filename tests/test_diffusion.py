"""Diffusion: bound and sampler are exact with the true conditionals, samplers agree with plain loops, and runs resume exactly."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, command_line_args, differences, lmnotes_command, read_log, run_in_process, run_results, train

from lmnotes.data.batches import IGNORE_INDEX, Batch
from lmnotes.data.tokenizer import ByteTokenizer
from lmnotes.inference.generation import TokenSampler, generate, generate_ids
from lmnotes.models.diffusion import (
    Diffusion,
    DiffusionConfig,
    MaskedObjective,
    fill,
    generate_blocks,
    infill,
    likelihood_bound,
    row_generators,
)
from lmnotes.nn.lm import new_lm
from lmnotes.runs.load import load
from lmnotes.runs.run import run
from lmnotes.training.weights import load_submodule

SMALL = dict(vocab_size=12, ctx_len=13, d_model=32, n_layers=2, n_heads=2, dropout=0.0)
FORMS = dict(
    whole={},
    confident=dict(sampler="confidence", sample_steps=4),
    parts=dict(sample_block=4),
    blocks=dict(block=3),
    next=dict(block=1),
    mse=dict(objective="mse"),
    mse_next=dict(objective="mse", block=1),
)
V, T = 2, 4
ALL = torch.cartesian_prod(*[torch.arange(V)] * (T + 1))  # Every text of five ids
JOINT = torch.rand(len(ALL), generator=torch.Generator().manual_seed(3)) ** 4 + 0.01
JOINT = JOINT / JOINT.sum()
TEXTS = JOINT.multinomial(400, replacement=True, generator=torch.Generator().manual_seed(0))  # With their frequency


def model(**config):
    "Return a tiny model with random non-zero weights"
    torch.manual_seed(0)
    lm = new_lm("diffusion", **{**SMALL, **config}).eval()
    for p in lm.parameters():
        if p.ndim == 2 and not p.any():
            torch.nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
    return lm


def conditionals(ids):
    "(B,T+1) ids, some of them `V` (hidden) -> (B,T+1,V) logarithms of the true probability of each id at each position"
    fits = ((ids[:, None] == ALL) | (ids[:, None] == V)).all(-1) * JOINT
    found = torch.stack([fits @ (ALL == v).float() for v in range(V)], -1)
    return (found / found.sum(-1, keepdim=True)).log()


class KnownText(MaskedObjective):
    def embed_ids(self, ids):
        return F.one_hot(ids, V + 1).float()

    def logits(self, h):
        return h


class Known(Diffusion):
    "Model that returns the true probability of every text"

    def __init__(self, **config):
        super().__init__(DiffusionConfig(vocab_size=V, ctx_len=T, d_model=4, n_layers=1, n_heads=1, **config))
        self.text = KnownText(self.cfg)

    def _full_states(self, h, real, hidden, t):
        return conditionals(h.argmax(-1))

    def _block_states(self, clean, noisy, at, block, past=None, real=None):
        clean, noisy = clean.argmax(-1), noisy.argmax(-1)
        states = []
        for start in range(1, T + 1, block):
            own = noisy[:, start - 1 : start - 1 + block]
            ids = F.pad(torch.cat([clean[:, :start], own], 1), (0, T + 1 - start - own.shape[1]), value=V)
            states.append(conditionals(ids)[:, start : start + own.shape[1]])
        return torch.cat(states, 1)


def bound(lm, samples=300, **how):
    ids = ALL[TEXTS]
    return likelihood_bound(lm, [Batch(ids[:, :-1], ids[:, 1:])], samples, **how)


def true_nll():
    "Return the mean nats per id of the last four ids given the first"
    first = torch.stack([JOINT[ALL[:, 0] == v].sum() for v in range(V)])
    return -(JOINT.log() - first.log()[ALL[:, 0]])[TEXTS].mean().item() / T


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_bound_is_exact_with_the_true_conditionals(block):
    found = bound(Known(block=block))
    assert abs(found["loss"] - true_nll()) < 4 * found["stderr"] + 1e-6
    assert found["stderr"] < 0.01 * true_nll()


def test_fewer_steps_give_a_looser_bound():
    "Even with the true conditionals, because ids revealed in one step do not depend on each other"
    bounds = [bound(Known(), steps=steps)["loss"] for steps in (1, 2, 4, 100)]
    assert bounds[0] > bounds[1] > bounds[2] == bounds[3]
    assert bounds[0] > 1.02 * true_nll()


def sampled_distribution(steps, rows=6000, seed=0):
    "Return the sampled and the true probability of each text after a first id 0"
    lm = Known(sample_steps=steps)
    ids = torch.tensor(generate_ids(lm, [[0]] * rows, T, temperature=1.0, seed=seed))
    number = (ids * V ** torch.arange(T - 1, -1, -1)).sum(1)
    wanted = JOINT[: V**T] / JOINT[: V**T].sum()
    return number.bincount(minlength=V**T) / rows, wanted


@pytest.mark.parametrize("steps", [0, 4, 1000])
def test_ancestral_sampling_is_unbiased(steps):
    found, wanted = sampled_distribution(steps)
    assert (found - wanted).abs().sum() / 2 < 0.03


def test_one_step_sampling_is_biased():
    found, wanted = sampled_distribution(1)
    assert (found - wanted).abs().sum() / 2 > 0.1


@torch.no_grad()
def plain_sampler(lm, prompt, steps, seed, row):
    "Sample one window of one row, with a call of the network at each step"
    n = lm.cfg.ctx_len + 1 - len(prompt)
    x = torch.tensor([prompt + [lm.cfg.vocab_size] * n])
    pick = TokenSampler(temperature=1.0, seed=seed).reset(x, [row])
    order = torch.rand(n, generator=row_generators(pick, 1)[0]).argsort().tolist()
    for step in range(steps, 0, -1):
        logits = lm(x)
        due = range(n - -(-n * step // steps), n - -(-n * (step - 1) // steps))
        for at in (len(prompt) + order[i] for i in due):
            x[0, at] = pick(logits[:, at])[0]
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("steps", [3, 13, 1000])
def test_cached_sampler_equals_plain_sampler(steps):
    lm, prompts = model(sample_steps=steps), [[3, 1], [7, 2], [3, 1]]
    n, calls, network = 12, [], lm.trunk.forward
    lm.trunk.forward = lambda *args: calls.append(args) or network(*args)
    texts = generate_ids(lm, prompts, n, temperature=1.0, seed=5)
    steps = max(1, steps * n // 13)  # In proportion to the new positions
    assert len(calls) == min(steps, n)
    lm.trunk.forward = network
    assert texts == [plain_sampler(lm, prompt, steps, 5, row) for row, prompt in enumerate(prompts)]
    assert texts[0] != texts[2]  # Rows draw independently


@pytest.mark.parametrize("name", FORMS)
def test_generated_rows_depend_only_on_their_seed(name):
    lm, prompts = model(**FORMS[name]), [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    for n in (1, 9, 40):
        texts = generate_ids(lm, prompts, n, temperature=1.0, seed=2)
        assert [len(text) for text in texts] == [n] * 3 and texts == generate_ids(
            lm, prompts, n, temperature=1.0, seed=2
        )
        assert texts[0] == generate_ids(lm, prompts[:1], n, temperature=1.0, seed=2)[0]
    assert texts != generate_ids(lm, prompts, n, temperature=1.0, seed=3)
    for length in (1, 13, 14, 15, 60):
        (text,) = generate_ids(lm, [list(range(12)) * 5][:length], 20, temperature=0.0)
        assert len(text) == 20 and max(text) < 12


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bfloat16_weights(name, dtype):
    lm, batch = model(**FORMS[name]).to(dtype), torch.randint(12, (2, 14))
    batch = Batch(batch[:, :-1], batch[:, 1:])
    assert len(generate_ids(lm, [[1, 2]], 30, seed=1)[0]) == 30
    lm.train().loss(batch)["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())


@torch.no_grad()
def test_block_sampling_with_cache_equals_full_recomputation():
    lm, x = model(block=3, sampler="confidence"), torch.randint(12, (2, 4))
    new = torch.cat(list(generate_blocks(lm, x, 9, lambda logits: logits.argmax(-1))), 1)
    whole = x
    for _ in range(3):
        block = torch.full((2, 3), 12)
        for _ in range(3):
            at = torch.arange(whole.shape[1], whole.shape[1] + 3)
            logits = lm.logits(lm._block_states(lm.embed_ids(whole), lm.embed_ids(block), at, 3))
            certain = logits.log_softmax(-1).amax(-1).masked_fill(block < 12, -torch.inf).argmax(-1, keepdim=True)
            block.scatter_(1, certain, logits.argmax(-1).gather(1, certain))
        whole = torch.cat([whole, block], 1)
    assert torch.equal(new, whole[:, 4:])


@pytest.mark.parametrize("name", FORMS)
def test_repetition_penalty_uses_only_the_text(name):
    lm, x = model(**FORMS[name], vocab_size=100), torch.tensor([[5, 6]])
    pick = TokenSampler(seed=1, repetition_penalty=1.5).reset(x)
    new = torch.cat(list(lm.generate(x, 20, pick)), 1)
    assert set(pick.seen[0].nonzero()[:, 0].tolist()) == {5, 6, *new[0].tolist()}


def test_repetition_penalty_ignores_masked_positions():
    lm, x = model(vocab_size=100), torch.tensor([[5, 100, 7, 100]])
    pick = TokenSampler(seed=1, repetition_penalty=1.5).reset(x)
    done = fill(lm, x, pick)
    assert set(pick.seen[0].nonzero()[:, 0].tolist()) == set(done[0].tolist())


def test_an_error_restores_training_mode():
    lm, x = model().train(), torch.tensor([[5, 12, 7]])

    def fails(logits):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fill(lm, x, fails)
    with pytest.raises(IndexError):
        likelihood_bound(lm, [Batch(torch.full((1, 2), 99), torch.full((1, 2), 99))])
    assert lm.training


def test_given_tokens_are_kept():
    lm, left, right = model(), torch.randint(12, (2, 5)), torch.randint(12, (2, 4))
    pick = TokenSampler(seed=1).reset(left)
    assert infill(lm, left, right, 3, pick).shape == (2, 3)
    assert infill(lm, left.repeat(1, 9), right.repeat(1, 9), 6, pick).shape == (2, 6)  # The ends nearest to the gap
    text = torch.randint(12, (2, 14))
    holes = text.scatter(1, 1 + torch.rand(2, 13).argsort(1)[:, :5], 12)
    done = fill(lm, holes, TokenSampler(seed=1).reset(holes))
    assert torch.equal(done[holes < 12], text[holes < 12]) and done.max() < 12
    full = torch.randint(12, (1, 9))
    assert torch.equal(fill(lm, full, pick), full)


def nats(lm, x, y):
    torch.manual_seed(0)
    with torch.no_grad():
        out = lm.loss(Batch(x, y))
    return out["nll"].item(), int(out["n"])


def test_ignored_targets_are_given_context():
    "An ignored target is visible as context and has no loss, and tokens after the last target are invisible"
    x, y = torch.randint(12, (1, 13)), torch.randint(12, (1, 13))
    x[:, 1:] = y[:, :-1]
    y[0, 2] = IGNORE_INDEX
    other, y_short, other_end = x.clone(), y.clone(), x.clone()
    other[0, 3] = (x[0, 3] + 1) % 12
    y_short[0, 6:] = IGNORE_INDEX
    other_end[0, 7:] = (x[0, 7:] + 1) % 12
    for block in (0, 1, 4):
        lm = model(block=block)
        assert nats(lm, x, y)[1] == 12 and nats(lm, x, y) != nats(lm, other, y), block
        assert abs(nats(lm, x, y_short)[0] - nats(lm, other_end, y_short)[0]) < 1e-4, block


@pytest.mark.parametrize("objective", ["masked", "mse"])
@torch.no_grad()
def test_texts_longer_than_ctx_len(objective):
    "Blocks of one work past `ctx_len`, in chunks of any size, with `step` and with cached states"
    lm, x = model(block=1, objective=objective), torch.randint(12, (2, 40))
    full, state, cache, at = lm(x), None, lm.new_cache(), 0
    for k in (5, 1, 1, 9, 1, 20, 1, 1, 1):
        logits, state = lm.step(x[:, at : at + k], state)
        states = lm.hidden_states(lm.embed_ids(x[:, at : at + k]), cache)
        at += k
        assert (logits - full[:, at - 1]).abs().max() < 1e-4
        assert (lm.logits(states) - full[:, at - k : at]).abs().max() < 1e-4


REFUSED = {
    "block=-1": dict(block=-1),
    "block=2 must be 0 .whole window. or 1 .next token. with objective='mse'": dict(block=2, objective="mse"),
    "causal_share=2.0 must be from 0 to 1": dict(causal_share=2.0),
    "sampler='best' is not one of ancestral, confidence": dict(sampler="best"),
    "schedule='sqrt' is not one of cosine, linear": dict(schedule="sqrt"),
    "inference_steps=200 must be from 1 to training_steps=100": dict(inference_steps=200),
    "eval_samples=0, but eval_samples must be at least 1": dict(eval_samples=0),
    "sample_steps=-1, but sample_steps must be at least 0": dict(sample_steps=-1),
    "signal_scale=-1.0 must not be negative": dict(signal_scale=-1.0),
    "sample_block=-1, but sample_block must be at least 0": dict(sample_block=-1),
    "n_layers=0, but n_layers must be at least 1": dict(n_layers=0),
    "dropout=1.0, but dropout must be at least 0 and less than 1": dict(dropout=1.0),
    "d_model=32 is not a multiple of n_heads=3": dict(n_heads=3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_values_are_rejected(message):
    with pytest.raises(ValueError, match=message):
        model(**REFUSED[message])


def test_invalid_calls_are_rejected():
    whole, mse, blocks = model(), model(objective="mse"), model(block=3)
    ids = torch.randint(12, (1, 5))
    for use, message in (
        (lambda: whole.step(ids), "block=0 predicts no next token. Use generate, or block=1"),
        (lambda: mse(ids), "objective='mse' denoises embeddings, so ids have no logits"),
        (lambda: likelihood_bound(mse, []), "no likelihood for whole windows"),
        (lambda: fill(blocks, ids, None), "block=3 ignores ids after a block"),
        (lambda: fill(whole, ids.repeat(1, 9), None), "45 positions exceed the window of 14"),
        (lambda: fill(whole, ids[:, :0], None), "has no given id"),
        (lambda: infill(whole, ids, ids, -1, None), "n=-1 ids do not fit"),
        (lambda: likelihood_bound(whole, [Batch(ids, ids)], samples=0), "samples=0 must be at least 1"),
        (lambda: likelihood_bound(whole, [Batch(ids, ids)], steps=-1), "steps=-1 at least 0"),
        (lambda: likelihood_bound(whole, []), "the batches contain no target"),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_embedding_from_a_transformer_stays_frozen(tmp_path):
    "The embedding is loaded from the transformer, and not trained"
    workdir = tmp_path
    encoder = run(
        arch="gpt", model_args="d_model=32 n_layers=1 n_heads=2", data="pydocs", steps=1, batch_size=2, ctx_len=16,
        tokenizer="bytes", device="cpu", sample_every=0, eval_batches=1, out_dir=str(workdir), run="encoder",
    )  # fmt: skip
    lm = model(objective="mse", vocab_size=encoder.lm.cfg.vocab_size)
    load_submodule(lm, "text.table", workdir / "encoder", "embed")
    before = encoder.lm.embed.weight.detach().clone()
    assert torch.equal(lm.text.table.weight, before) and not lm.text.table.weight.requires_grad
    opt = torch.optim.AdamW(lm.parameters(), lr=0.1, weight_decay=0.1)
    ids = torch.randint(12, (2, 14))
    lm.train().loss(Batch(ids[:, :-1], ids[:, 1:]))["loss"].backward()
    opt.step()
    assert torch.equal(lm.text.table.weight, before)


@pytest.mark.parametrize("name", FORMS)
def test_a_batch_without_rows(name):
    none = torch.zeros(0, 13, dtype=torch.long)
    out = model(**FORMS[name]).loss(Batch(none, none))
    assert out["loss"] == 0 and all(torch.as_tensor(v).isfinite() for v in out.values())


RUNS = dict(
    masked="d_model=16 n_layers=1 n_heads=2 dropout=0.1 eval_samples=2 causal_share=0.3",
    blocks="d_model=16 n_layers=1 n_heads=2 dropout=0.1 block=5",
    mse="d_model=16 n_layers=1 n_heads=2 dropout=0.1 objective=mse inference_steps=3 causal_share=0.3",
)


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_bit_identical(workdir, name):
    case = TINY | dict(arch="diffusion", model_args=RUNS[name], steps=20)
    assert run_in_process(workdir, train, **case) == 0, read_log(workdir)
    whole = run_results(workdir / "runs/r")
    assert run_in_process(workdir, train, 7, **case | dict(run="stopped")) == 130, read_log(workdir)
    assert run_in_process(workdir, train, **dict(run="stopped", out_dir="runs", resume=True)) == 0, read_log(workdir)
    assert not differences(whole, run_results(workdir / "runs/stopped"))


def test_command_line(workdir):
    "A bound is marked, the Gaussian objective has no perplexity, and one run is evaluated in both ways"
    case = TINY | dict(arch="diffusion", model_args=RUNS["masked"], steps=10)
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**case)) == 0, read_log(workdir)
    assert "≤" in read_log(workdir)
    asked = dict(run="runs/r", prompt="a", n=9, dtype="bfloat16")
    assert run_in_process(workdir, lmnotes_command, "generate", *command_line_args(**asked)) == 0, read_log(workdir)
    lm = load(workdir / "runs/r", model_args="block=1 sampler=confidence").lm
    assert lm.causal and not lm.nll_is_upper_bound and lm.cfg.sampler == "confidence"
    assert len(generate(lm, ByteTokenizer(), "wave", 30, seed=1)) > 0
    (workdir / "log").write_text("")
    assert (
        run_in_process(
            workdir, lmnotes_command, "train", *command_line_args(**case | dict(model_args=RUNS["mse"], run="mse"))
        )
        == 0
    )
    assert "ppl" not in read_log(workdir) and "bpb" not in read_log(workdir)
    lines = [json.loads(line) for line in (workdir / "runs/mse/metrics.jsonl").read_text().splitlines()]
    assert not any("ppl" in line or "bpb" in line for line in lines) and "rounding" in lines[0]
