"""NanoThink: the tests of a model with frozen experts, of cached expert outputs, and of leaks from the vector store."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, differences, read_log, run_in_process, run_results, train

from lmnotes.data.batches import IGNORE_INDEX, Batch, EpochBatches, PackedBatches
from lmnotes.models.nanothink import NanoThinkConfig
from lmnotes.nn.lm import (
    check_cached_decoding,
    check_causality,
    check_padding_ignored,
    check_state_dict_complete,
    n_params,
    new_lm,
)
from lmnotes.nn.mixture import chunk_keys
from lmnotes.nn.vector_store import VectorStore
from lmnotes.runs.load import load
from lmnotes.training.expert_cache import CachedExpertBatches, DocumentOfChunk, fill_store
from lmnotes.training.trainer import TrainConfig, Trainer

EXPERTS = dict(
    transformer="gpt,d_model=16,n_layers=1,n_heads=2,dropout=0.1",
    state_space="ssm,d_model=24,n_layers=1,head_dim=8,d_state=4,dropout=0.1",
    diffuser="diffusion,block=1,d_model=16,n_layers=1,n_heads=2,dropout=0.1",
)
GUIDE = dict(
    transformer="gpt:nanothink,d_model=16,n_layers=1,n_heads=2,d_ff=48",
    state_space="ssm:nanothink_s6,d_model=16,n_layers=1,d_inner=32,d_state=4",
    diffuser="diffusion:nanothink,block=1,d_model=16,n_layers=1,n_heads=2",
)
SIZE = dict(vocab_size=32, ctx_len=24, d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4)
VARIANTS = [
    dict(fusion=fusion, attention_first=first, kv_latent_dim=latent)
    for fusion, first, latent in itertools.product(("mixture", "hidden"), (False, True), (0, 8))
]
IDS = np.random.default_rng(0).integers(32, size=24 * 33 + 1)


def model(frozen=True, **config):
    "Return a mixture of three experts with random non-zero weights"
    torch.manual_seed(0)
    lm = new_lm("nanothink", **{**SIZE, **EXPERTS, **config})
    for p in lm.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    lm.experts.requires_grad_(not frozen)
    return lm


def batch(rows=3):
    w = torch.from_numpy(IDS[: rows * 24 + 1])
    return Batch(w[:-1].view(rows, 24), w[1:].view(rows, 24))


def trainer(lm, batches, **config):
    return Trainer(lm, batches, TrainConfig(**{**dict(steps=24, dtype="float32", log_every=1000), **config}))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: " ".join(map(str, c.values())))
def test_contract(config, frozen):
    lm = model(frozen, **config)
    for law in (check_state_dict_complete, check_causality, check_cached_decoding, check_padding_ignored):
        law(lm.eval(), batch())


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: " ".join(map(str, c.values())))
def test_cached_decoding_equals_full_forward(config):
    "They agree to 1e-5, in pieces, even past the context window, with the NanoThink guide's experts and with ours"
    for experts in (EXPERTS, GUIDE):
        _cached_is_not_cached(model(**experts, **config).eval(), config["kv_latent_dim"])


def _cached_is_not_cached(lm, latent):
    x = torch.from_numpy(IDS[:80]).view(2, 40)
    with torch.no_grad():
        full, state, at = lm(x), None, 0
        for k in (5, 1, 1, 9, 1, 20, 1, 1, 1):
            logits, state = lm.step(x[:, at : at + k], state)
            at += k
            assert (logits - full[:, at - 1]).abs().max() < 1e-5 * full.abs().max()
    assert state.cache.k.shape[1:] == (1, 24, latent + 4 if latent else 2 * 16)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: " ".join(map(str, c.values())))
def test_begins_as_its_expert(config):
    torch.manual_seed(0)
    lm = new_lm("nanothink", **{**SIZE, **EXPERTS, "default_expert": "state_space", **config}).eval()
    for p in lm.experts.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.1)
    alone = lm.experts["state_space"].loss(batch())["nll"]
    assert abs(lm.loss(batch())["nll"] - alone) / batch().n_targets < 0.02


def test_frozen_experts_do_not_change():
    lm = model()
    before = copy.deepcopy(lm.experts.state_dict())
    trainer(lm, EpochBatches(IDS, 4, 24), steps=3).fit()
    assert lm.training and lm.attention.training and not any(e.training for e in lm.experts.values())
    assert all(torch.equal(t, before[name]) for name, t in lm.experts.state_dict().items())
    lm.experts["diffuser"].requires_grad_(True)
    assert [e.training for e in lm.train().experts.values()] == [False, False, True]


def test_the_loss_and_its_terms():
    "`nll` is the loss of the text alone, and `loss` is the sum of the terms"
    lm = model(dropout=0.0).eval()
    out = lm.loss(batch())
    plain = -lm(batch().x).log_softmax(-1).gather(-1, batch().y[..., None]).sum()
    assert abs(out["nll"] - plain) < 1e-3
    c = lm.cfg
    loss = out["ce"] - c.entropy_reg * out["entropy"] + c.balance_loss * out["balance"] + c.z_loss * out["z"]
    assert abs(out["loss"] - loss) < 1e-6
    assert abs(sum(out[f"weight_{name}"] for name in EXPERTS) - 1) < 1e-5
    for name, expert in lm.experts.items():
        assert abs(out[f"ce_{name}"] - expert.loss(batch())["loss"]) < 1e-5


def test_a_batch_without_targets():
    b = batch()
    for fusion in ("mixture", "hidden"):
        out = model(fusion=fusion).loss(Batch(b.x, torch.full_like(b.y, IGNORE_INDEX)))
        assert out["n"] == 0 and all(torch.as_tensor(v).isfinite().all() for v in out.values())
        out = model(fusion=fusion).loss(Batch(b.x[:0], b.y[:0]))
        assert out["n"] == 0 and out["loss"] == 0


@pytest.mark.parametrize(
    "given",
    [dict(), dict(fusion="hidden"), dict(dtype="bfloat16"), dict(accum=2), dict(budget=30_000), dict(stride=12)],
    ids=str,
)
def test_cached_expert_outputs_equal_computed(given):
    """Three epochs with cached outputs train nearly the same weights as with computed ones.

    They are not bit-identical: computed for the whole batch at once, products may be rounded in another way.
    """
    given = dict(given)
    config = {k: given.pop(k) for k in ("fusion",) if k in given}
    budget, stride = given.pop("budget", 2**30), given.pop("stride", 0)
    uncached, cached = model(**config), model(**config)
    windows = EpochBatches(IDS, 4, 24, stride=stride)
    batches = CachedExpertBatches(cached, windows, budget)
    t = trainer(cached, batches, **given)
    batches.autocast = t.autocast
    trainer(uncached, windows, **given).fit()
    t.fit()
    for p, q in zip(cached.parameters(), uncached.parameters()):
        assert (p - q).norm() <= (0.05 if given.get("dtype") else 1e-3) * q.norm()
    assert batches.bytes <= budget and len(batches.cached_rows) == min(
        windows.order.n, budget // (batches.bytes // len(batches.cached_rows))
    )


def test_cache_budget_does_not_change_bits():
    ends = []
    for budget in (2**30, 30_000, 0):
        lm = model()
        trainer(lm, CachedExpertBatches(lm, EpochBatches(IDS, 4, 24), budget)).fit()
        ends.append(lm)
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_cache_is_rebuilt_after_resume():
    "The cache is not saved, and a resumed run, which fills it from other batches, ends with the same bits"
    windows = EpochBatches(IDS, 4, 24)
    whole, half = model(), model()
    trainer(whole, CachedExpertBatches(whole, windows)).fit()
    t = trainer(half, CachedExpertBatches(half, windows)).fit(11)
    rest = model()
    rest.load_state_dict(half.state_dict())
    u = trainer(rest, CachedExpertBatches(rest, windows))
    u.load_state_dict(copy.deepcopy(t.state_dict()))
    u.fit()
    assert same(rest, whole)


def test_cached_documents_with_padding():
    "Caching works for rows with padding, from the sampler of whole documents"
    windows = PackedBatches(IDS, np.arange(0, len(IDS), 10), 4, 24)
    uncached, cached = model(), model()
    trainer(uncached, windows).fit()
    batches = CachedExpertBatches(cached, windows)
    trainer(cached, batches).fit()
    for p, q in zip(cached.parameters(), uncached.parameters()):
        assert (p - q).norm() <= 1e-3 * q.norm()
    assert batches.steps_per_epoch == windows.steps_per_epoch


def test_each_rank_caches_its_rows():
    windows = EpochBatches(IDS, 4, 24)
    lm = model()
    one = CachedExpertBatches(lm, windows)
    ranks = [CachedExpertBatches(lm, windows, rank=rank, world=2) for rank in (0, 1)]
    for step in range(8):
        for rank, batches in enumerate(ranks):
            mine, his = one[step].rank_slice(rank, 2).extras, batches[step].rank_slice(rank, 2).extras
            assert all(torch.equal(mine[name], his[name]) for name in mine)
    assert len(ranks[0].cached_rows) + len(ranks[1].cached_rows) <= len(one.cached_rows) + 2


def test_uncacheable_models_are_rejected():
    windows = EpochBatches(IDS, 4, 24)
    for lm in (model(frozen=False), model(attention_first=True)):
        with pytest.raises(ValueError, match="caching needs frozen experts"):
            CachedExpertBatches(lm, windows)


MISTAKES = {
    "default_expert='mamba' is not one of transformer, state_space, diffuser": dict(default_expert="mamba"),
    "fusion='sum' is not one of mixture, hidden": dict(fusion="sum"),
    "transformer='gpt,ctx_len=5': .*sets ctx_len": dict(transformer="gpt,ctx_len=5"),
    "transformer='gtp': .*did you mean 'gpt'": dict(transformer="gtp"),
    "transformer='gpt,n_layer=2': .*is not field=value of arch='gpt'": dict(transformer="gpt,n_layer=2"),
    "transformer='rnn': .*has no causal hidden states": dict(transformer="rnn"),
    "diffuser='gpt:nanogpt': .*cannot read past ctx_len": dict(diffuser="gpt:nanogpt"),
    "state_space='ssm,d_state=0': d_state=0, but d_state must be at least 1": dict(state_space="ssm,d_state=0"),
    "default_expert='transformer' is not one of state_space, diffuser": dict(transformer=" "),
    "default_expert='transformer' is not one of the experts, because all three are empty": dict(
        transformer="", state_space="", diffuser=" "
    ),
    "rope_dim=3 must be even": dict(rope_dim=3),
    "rope_dim=0 must be even and at least 2": dict(rope_dim=0),
    "head_dim=7 must be even": dict(kv_latent_dim=0, head_dim=7),
    "n_heads=0, but n_heads must be at least 1": dict(n_heads=0),
    "head_dim=0, but head_dim must be at least 1": dict(head_dim=0),
    "kv_latent_dim=-1, but kv_latent_dim must be at least 0": dict(kv_latent_dim=-1),
    "dropout=1.0, but dropout must be at least 0 and less than 1": dict(dropout=1.0),
    "memory=-1, but memory must be at least 0": dict(memory=-1),
    "max_vectors=0, but max_vectors must be at least 1": dict(max_vectors=0),
    "memory=2 needs a transformer expert": dict(memory=2, attention_first=True),
    "memory_chunk=13 does not fit twice in ctx_len=24": dict(memory=2, memory_chunk=13),
    "memory_chunk=0 does not fit twice .* Use 1 to 12": dict(memory=2, memory_chunk=0),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_invalid_settings_are_named(message):
    with pytest.raises(ValueError, match=message):
        new_lm("nanothink", **{**SIZE, **EXPERTS, **MISTAKES[message]})


def test_parameter_counts_match_the_guide():
    "The transformer has 14,160,768 parameters without embedding and head, attention 590,208 minus a gain of 384"
    with torch.device("meta"):
        lm = new_lm("nanothink", vocab_size=1000, ctx_len=512, kv_latent_dim=0)
    assert n_params(lm.experts["transformer"]) - 1000 * 384 == 14_160_768
    assert n_params(lm.experts["state_space"]) - 1000 * 384 == 5_573_760
    assert n_params(lm.attention) == 590_208 - 384


def test_run_resume_and_generate(workdir):
    "A run that is stopped and resumed by name ends with the same bits, and generates text"
    experts = " ".join(f"{name}={spec}" for name, spec in EXPERTS.items())
    args = f"{experts} d_model=16 n_heads=2 head_dim=8 kv_latent_dim=8 rope_dim=4"
    case = TINY | dict(arch="nanothink", model_args=args, steps=12, eval_every=6, save_every=6, sample_every=0)
    assert run_in_process(workdir, train, **case) == 0, read_log(workdir)
    whole = run_results(workdir / "runs/r")
    assert run_in_process(workdir, train, 5, **case | dict(run="stopped")) == 130, read_log(workdir)
    assert run_in_process(workdir, train, run="stopped", out_dir="runs", resume=True) == 0, read_log(workdir)
    assert not differences(whole, run_results(workdir / "runs/stopped"))
    found = load(workdir / "runs/r")
    assert isinstance(found.lm.cfg, NanoThinkConfig) and found.lm.cfg.diffuser == EXPERTS["diffuser"]
    assert len(found.generate("wave", 20)) > 0


def test_mixture_starts_from_trained_experts(workdir):
    "A mixture starts from the weights of separately trained experts, and does not change them"
    small = TINY | dict(steps=6, accum=1, eval_every=6, save_every=6, sample_every=0)
    specs = dict(transformer=EXPERTS["transformer"], state_space=EXPERTS["state_space"])
    for name, spec in specs.items():
        arch, *args = spec.split(",")
        assert run_in_process(workdir, train, **small | dict(run=name, arch=arch, model_args=" ".join(args))) == 0, (
            read_log(workdir)
        )
    args = " ".join(f"{name}={spec}" for name, spec in {**specs, "diffuser": ""}.items())
    begin = " ".join(f"experts.{name}=runs/{name}" for name in specs)
    second = dict(
        run="two", arch="nanothink", model_args=f"{args} d_model=16 n_heads=2 head_dim=8 kv_latent_dim=8 rope_dim=4"
    )
    assert run_in_process(workdir, train, **small | second | dict(init_from=begin, freeze="experts.*")) == 0, read_log(
        workdir
    )
    lm, alone = load(workdir / "runs/two").lm, {name: load(workdir / "runs" / name).lm for name in specs}
    for name, expert in alone.items():
        assert same(lm.experts[name], expert)
    assert lm.links["transformer"].weight.abs().max() > 0


# The vector store

MEMORY = dict(memory=2, memory_chunk=6)


def model_with_vector_store(doc_starts=None, **config):
    tokens = SimpleNamespace(ids=IDS, doc_starts=doc_starts)
    lm = model(**{**MEMORY, **config})
    lm.store = fill_store(lm, VectorStore(16), tokens)
    return lm, DocumentOfChunk(tokens, lm.cfg)


@pytest.mark.parametrize("latent", [0, 8])
@pytest.mark.parametrize("fusion", ["mixture", "hidden"])
def test_contract_with_a_vector_store(latent, fusion):
    lm, _ = model_with_vector_store(kv_latent_dim=latent, fusion=fusion)
    check_cached_decoding(lm.eval(), batch())
    with torch.no_grad():
        base = lm(batch().x)
        for t in range(24):
            x = batch().x.clone()
            x[:, t] = (x[:, t] + 1) % 32
            assert t == 0 or (lm(x) - base)[:, :t].abs().max() < 1e-5
        lm.store = None
        forgetful = (lm(batch().x) - base).abs().amax((0, 2))
    assert forgetful[:6].max() < 1e-5 and forgetful[6:].max() > 1e-3  # Nothing is retrieved for the first chunk


def test_no_document_retrieves_itself():
    starts = np.arange(0, len(IDS), 31)  # Documents end within chunks and between them
    lm, documents = model_with_vector_store(starts)
    at = np.arange(0, len(IDS) - 24, 24)
    own = documents(at)
    assert own.shape == (len(at), 3)
    for i, window in enumerate(at):
        for j in range(3):
            inside = starts.searchsorted(range(window + 6 * j, window + 6 * j + 13), "right") - 1
            assert own[i, j] == (inside[0] if len(set(inside)) == 1 else -1)
    x = torch.from_numpy(np.stack([IDS[a : a + 24] for a in at]))
    values, found = lm.retrieve(x[:, :-1], own)
    assert torch.equal(found.any(-1), own >= 0)
    keys = chunk_keys(lm.experts["transformer"], x, 6)
    for i, j, k in found.nonzero().tolist():  # Find the entry by its value
        n = ((keys[:, 1:] - values[i, j, k]).abs().amax(-1) < 1e-5).nonzero().tolist()
        assert n and all(own[a, b] not in (own[i, j], -1) for a, b in n)


def test_stored_keys_depend_on_one_document():
    "The keys of a document depend on its chunks alone, not on other text in the same windows"
    lm, _ = model_with_vector_store()
    x = torch.from_numpy(IDS[:24])[None]
    other = torch.cat([(x[:, :12] + 1) % 32, x[:, 12:]], 1)
    a, b = (chunk_keys(lm.experts["transformer"], ids, 6) for ids in (x, other))
    assert torch.equal(a[:, 2:], b[:, 2:]) and (a[:, :2] - b[:, :2]).abs().max() > 0.1


def test_long_document_is_stored_in_blocks():
    "A block has sixteen windows. Its last chunk, whose last target is in the next block, is not stored"
    _, documents = model_with_vector_store()
    at = np.array([0, 24 * 15, 24 * 16, 24 * 15 + 12])
    assert documents(at).tolist() == [[0, 0, 0], [0, 0, -1], [1, 1, 1], [-1, -1, 1]]


def test_store_file_next_to_the_weights(tmp_path, capsys):
    lm, _ = model_with_vector_store()
    lm.store.save(tmp_path / "memory.safetensors")
    other = model(**MEMORY).eval()
    other.load_extra_files(tmp_path / "elsewhere")
    assert other.store is None and "memory.safetensors is missing, so nothing is retrieved" in capsys.readouterr().out
    other.load_extra_files(tmp_path)
    assert not capsys.readouterr().out and other.extra_files == ("memory.safetensors",) and model().extra_files == ()
    assert torch.equal(other(batch().x), lm.eval()(batch().x)) and not any("store" in name for name in lm.state_dict())


def test_training_with_a_vector_store():
    "With and without caching, the bits are the same and `hits` is logged. Training without documents is an error"
    lm, documents = model_with_vector_store(np.arange(0, len(IDS), 100))
    small = copy.deepcopy(lm)
    with pytest.raises(ValueError, match="must not retrieve itself"):
        lm.train().loss(batch())
    with pytest.raises(ValueError, match="retrieval needs the documents of the text"):
        CachedExpertBatches(lm, EpochBatches(IDS, 4, 24))
    t = trainer(lm, CachedExpertBatches(lm, EpochBatches(IDS, 4, 24), documents=documents)).fit()
    trainer(small, CachedExpertBatches(small, EpochBatches(IDS, 4, 24), 0, documents=documents)).fit()
    assert same(lm, small) and 0 < t.last_metrics["hits"] < 1
    lm.store = None
    with pytest.raises(ValueError, match="memory is set, but the store is empty. Call fill_store"):
        lm.train().loss(batch())


@pytest.mark.parametrize("room", [2, 7, 20, 50, 98, 99, 1000])
def test_stored_chunks_are_spread_over_the_text(room):
    lm, documents = model_with_vector_store()
    tokens = SimpleNamespace(ids=IDS, doc_starts=np.arange(0, len(IDS), 8 * 24))  # All documents have the same length
    store = fill_store(lm, VectorStore(16, room), tokens)
    whole = fill_store(lm, VectorStore(16), tokens)
    assert min(room, len(whole)) - 6 < len(store) <= room
    at = sorted((whole._values - v).abs().amax(-1).argmin().item() for v in store._values[: len(store)])
    assert len(set(at)) == len(at) and (room < len(whole) or at == list(range(len(whole))))
    gaps = np.diff([-1, *at, len(whole)])
    assert gaps.max() <= 3 * (len(whole) / len(at) + 3)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: " ".join(map(str, c.values())))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bfloat16_weights(dtype, config):
    "Forward, step and backward work in each dtype, also with a vector store if the configuration allows one"
    for memory in (False, True) if not config["attention_first"] else (False,):
        lm = model(False, **config, **MEMORY if memory else {}).to(dtype).eval()
        if memory:
            lm.store = fill_store(lm, VectorStore(16), SimpleNamespace(ids=IDS, doc_starts=None))
        with torch.no_grad():
            full, state = lm(batch().x), None
            for piece in batch().x.split((7, 1, 16), 1):
                logits, state = lm.step(piece, state)
        assert (logits - full[:, -1]).abs().max() < (1e-5 if dtype == torch.float64 else 0.2) * full.abs().max()
        lm.loss(batch())["loss"].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())
