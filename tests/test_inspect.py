"""Inspection of the data, the cost and the trained model of a run, for every architecture."""

from copy import deepcopy
from html.parser import HTMLParser
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.profiler import ProfilerActivity, profile

from lmnotes.data.batches import IGNORE_INDEX, Batch
from lmnotes.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from lmnotes.inspect.attention import attention_maps, plot_attention
from lmnotes.inspect.cost import cost_table, measure_step
from lmnotes.inspect.routing import plot_router_usage, router_usage
from lmnotes.inspect.tokens import show_batch, show_probabilities, show_tokens, token_probabilities, token_text
from lmnotes.nn.lm import archs, get_arch, new_lm
from lmnotes.training.trainer import TrainConfig, Trainer

SMALL = dict(d_model=32, n_layers=2, n_heads=2)
EXPERTS = {
    "transformer": "gpt,d_model=32,n_layers=1,n_heads=2",
    "state_space": "ssm,d_model=32,n_layers=1,d_state=8,head_dim=16",
    "diffuser": "diffusion,d_model=32,n_layers=1,n_heads=2,block=1",
}
TINY = dict(
    bigram={},
    bytepatch=dict(SMALL, patch_size=4, d_byte=32, dropout=0.0),
    diffusion=SMALL,
    gpt=SMALL,
    gpt2=dict(SMALL, n_positions=64),
    nanothink=dict(EXPERTS, d_model=32, n_heads=2, head_dim=16, kv_latent_dim=16, rope_dim=8),
    rnn=dict(d_model=32, n_layers=1),
    scratch_gpt=SMALL,
    ssm=dict(d_model=32, n_layers=2, d_state=8, head_dim=16),
    streams=dict(SMALL, d_ff=64),
)
NO_ATTENTION = {"bigram", "rnn", "ssm"}
TOKENIZER = ByteTokenizer()
TEXT = "the cat sat on the mat. "
AWKWARD = "<b>&amp; \"x\" 'y'</b>\n\t€ naïve 猫\u200b|$$ \udcff"


def new(name, **more):
    torch.manual_seed(0)
    return new_lm(name, **{"vocab_size": 256, "ctx_len": 32, **TINY[name], **more})


def noise(V=256, rows=8, T=32, n=4):
    w = torch.randint(V, (n, rows, T + 1), generator=torch.Generator().manual_seed(1))
    return [Batch(x[:, :-1], x[:, 1:]) for x in w]


def test_all_architectures_are_tested():
    own = {name for name in archs() if get_arch(name).__module__.startswith("lmnotes.")}  # Other tests register more
    assert own - set(TINY) <= {"toy"} and set(TINY) <= own


class Page(HTMLParser):
    "Parser of a page that collects its visible text, its tags and its attributes, and checks that every tag is closed"

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.open, self.attributes = "", set(), [], set()
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_page(look):
    "Check that a page uses only tags and attributes that GitHub and JupyterLab keep"
    page = Page(look._repr_html_())
    assert page.tags <= {"div", "span", "ruby", "rt", "rp", "br", "table", "tr", "td", "th"}
    assert page.attributes <= {"style", "title"} and "rgba" in look._repr_html_()
    return page


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CharTokenizer("abc <"), BPETokenizer.train([AWKWARD * 9], 300)])
def test_any_text_can_be_displayed(tokenizer):
    page = check_page(show_tokens(tokenizer, AWKWARD))
    ids = tokenizer.encode(AWKWARD)
    assert all(token_text(tokenizer, i) in page.text and str(i) in page.text for i in ids)
    assert (
        "\u200b" not in page.text
        and "\udcff" not in page.text
        and "\udcff" not in repr(show_tokens(tokenizer, AWKWARD))
    )
    page.text.encode(), repr(show_tokens(tokenizer, AWKWARD)).encode()


def test_batch_marks_ignored_targets():
    ids = torch.tensor(TOKENIZER.encode(TEXT))
    x, y = ids[None, :-1], ids[None, 1:].clone()
    y[0, 3:5] = IGNORE_INDEX
    look = show_batch(TOKENIZER, Batch(x, y), n=6)
    page = check_page(look)
    assert page.text.count("—") == 3 and "2 positions (—) without" in page.text
    assert len(repr(look).splitlines()) == 8


@pytest.mark.parametrize("name", sorted(set(TINY) - {"diffusion"}))
@pytest.mark.parametrize("context", ["", "the c"])
def test_token_probabilities_sum_to_the_loss(name, context):
    "The losses of all tokens sum to the loss, with and without a context. Here the id 0 starts a document"
    lm = new(name).train()
    before = deepcopy(lm.state_dict())
    rows = token_probabilities(lm, TOKENIZER, TEXT[5:], context=context)
    assert lm.training and all(torch.equal(before[n], t) for n, t in lm.state_dict().items())
    ids = torch.tensor(TOKENIZER.encode((context or "\0") + TEXT[5:]))[None]
    y = ids[:, 1:].clone()
    y[:, : len(context or "\0") - 1] = IGNORE_INDEX
    with torch.no_grad():
        nll = lm.eval().loss(Batch(ids[:, :-1], y))["nll"].item()
    assert sum(row["nats"] for row in rows) == pytest.approx(nll, rel=1e-4)
    for row in rows:
        assert row["p"] == pytest.approx(dict(row["best"]).get(row["id"], row["p"]), rel=1e-4)
        assert row["rank"] > 5 or row["best"][row["rank"] - 1][1] == pytest.approx(row["p"], rel=1e-3)


def test_texts_longer_than_ctx_len():
    lm = new("gpt", ctx_len=8, pos="learned")
    page = check_page(show_probabilities(lm, TOKENIZER, TEXT, context="<Once>"))
    assert page.text.startswith("24 tokens") and "<Once>│the·cat·sat" in page.text


def test_token_probabilities_of_any_text():
    "Text is never parsed as HTML, and invisible characters are shown"
    look = show_probabilities(new("gpt"), TOKENIZER, AWKWARD, context="<i>\u200b\n", n_least_likely=0)
    page = check_page(look)
    assert "<i>⟨U+200B⟩↵│<b>&amp;·" in page.text and "<i>⟨U+200B⟩↵│<b>&amp;·" in repr(look)
    assert not {"\u200b", "\udcff"} & {*page.text, *repr(look)}


@pytest.mark.parametrize("objective", ["masked", "mse"])
def test_diffusion_has_no_token_probabilities(objective):
    with pytest.raises(ValueError, match="'diffusion' is not causal.*Use `evaluate`"):
        token_probabilities(new("diffusion", objective=objective), TOKENIZER, TEXT)
    assert token_probabilities(new("diffusion", block=1), TOKENIZER, TEXT)


@pytest.mark.parametrize("name", sorted(set(TINY) - NO_ATTENTION))
def test_attention_of_each_layer(name):
    lm, ids = new(name).train(), TOKENIZER.encode(TEXT)
    maps = attention_maps(lm, ids)
    assert lm.training and maps
    for m in maps:
        assert m.ndim == 3 and not m.requires_grad
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:2]))
    figure = plot_attention(maps, [f"${token_text(TOKENIZER, i)}_$" for i in ids], name)
    figure.savefig(BytesIO())
    assert len(figure.axes) == len(maps) * max(len(m) for m in maps) + 1


def test_attention_figure_has_titles_and_readable_labels():
    "Attention between the patches of `bytepatch` has no tokens for its labels"
    words = [f"word {i} is long" for i in range(24)]
    maps = attention_maps(new("bytepatch"), range(24))
    figure = plot_attention(maps[-2:], words, names=["patches", "bytes"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    patches, *_, last = figure.axes[: 2 * max(len(m) for m in maps[-2:])]
    assert patches.get_title() == "patches, head 0" and last.get_title().startswith("bytes")
    assert patches.get_xlabel() == patches.get_ylabel() == "position" and not last.get_xlabel()
    labels = last.get_xticklabels()
    assert [label.get_text() for label in labels][:2] == ["word 0 …", "word 1 …"]
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    assert all(label.get_fontsize() >= 10 for label in labels)
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:]))
    assert last.get_window_extent().height > 2 * max(box.height for box in boxes)


@pytest.mark.parametrize("name", sorted(NO_ATTENTION))
def test_models_without_attention(name):
    with pytest.raises(ValueError, match=f"arch='{name}' has no attention"):
        attention_maps(new(name), TOKENIZER.encode(TEXT))


def test_the_router_of_nanothink():
    lm = new("nanothink")
    ids = np.frombuffer((TEXT * 20 + "0123456789" * 30).encode(), np.uint8)
    tokens = SimpleNamespace(ids=ids, domains=dict(prose=(0, 480), numbers=(480, 780), empty=(780, 781)))
    table = router_usage(lm, tokens)
    assert table.names == ["domain", "transformer", "state_space", "diffuser"]
    assert len(table.rows) == 2
    for row, (start, stop) in zip(table.rows, tokens.domains.values()):
        assert sum(row[name] for name in table.names[1:]) == pytest.approx(1)
        x = torch.tensor(ids[start : stop - 1].astype(np.int64))
        with torch.no_grad():
            pieces = torch.cat([lm.eval().router_weights(part[None])[0] for part in x.split(32)])
        assert [row[name] for name in table.names[1:]] == pytest.approx(pieces.mean(0).tolist(), rel=1e-4)
    plot_router_usage(table).savefig(BytesIO())


def peak(trainer):
    "Return the peak bytes that a step allocates, as reported by torch's allocator"
    trainer.fit(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.fit(2)
    events = sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    return int(np.cumsum([e.nbytes() for e in events]).max())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", TINY)
def test_memory_estimate_equals_the_allocator(name, optimizer):
    "The estimate is the weights and optimizer states, which exist before a step, plus the step's own peak"
    lm, cfg = new(name), TrainConfig(steps=4, optimizer=optimizer, dtype="float32")
    before, random = deepcopy(lm.state_dict()), torch.get_rng_state()
    cost = measure_step(lm, noise(), cfg, seconds=0.0)
    assert all(torch.equal(before[n], t) for n, t in lm.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in lm.parameters())
    trainer = Trainer(lm, noise(), cfg)
    found = peak(trainer)
    states = {type(o).__name__: sum(t.nbytes for s in o.state.values() for t in s.values()) for o in trainer.optimizers}
    assert cost["optimizers"] == states
    assert cost["peak"] == pytest.approx(cost["weights"] + sum(states.values()) + found, rel=0.03)
    assert cost["activations"] <= found


def test_activations_grow_with_the_rows_and_shrink_with_accumulation():
    def kept(rows, accum=1):
        cfg = TrainConfig(steps=4, accum=accum, dtype="float32")
        return measure_step(new("gpt"), noise(rows=rows), cfg, seconds=0.0)["activations"]

    assert kept(8) == pytest.approx(2 * kept(4), rel=0.01) and kept(8, accum=2) == kept(4)


def test_frozen_weights_have_no_gradient_memory():
    lm = new("gpt")
    lm.blocks.requires_grad_(False)
    cost = measure_step(lm, noise(), TrainConfig(steps=4), seconds=0.0)
    assert cost["gradients"] == 4 * 2 * 256 * 32 == sum(cost["optimizers"].values()) // 2 - 4
    assert cost["weights"] == 4 * sum(p.numel() for p in lm.parameters())


class Late(type(new_lm("bigram"))):
    "Bigram model whose first two losses are NaN, as with float16, whose loss scale is too large at first"

    calls = 0

    def loss(self, batch):
        self.calls += 1
        out = super().loss(batch)
        return dict(out, loss=out["loss"] * float("nan")) if self.calls < 3 else out


def test_skipped_steps_are_not_timed():
    cost = measure_step(Late(new("bigram").cfg), noise(n=9), TrainConfig(steps=9, dtype="float32"), seconds=0.0)
    assert cost["optimizers"] == dict(AdamW=2 * 4 * 256**2 + 4)


def test_estimate_is_readable():
    text = repr(cost_table(new("gpt"), noise(), TrainConfig(steps=7_200_000, accum=2), seconds=0.0))
    assert "4 × 32 tokens" in text and "7,200,000 steps" in text and "tokens a second" in text
