"""Diagnostics of thinking models equal a plain computation from logits and latents, and do not change the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY

from lmnotes.data.batches import IGNORE_INDEX, Batch, EvaluationBatches
from lmnotes.inference.evaluation import Table, evaluate
from lmnotes.inspect.parameters import parameter_table
from lmnotes.inspect.thinking import inspect_thinking, plot_thinking, summarize_thinking, thinking_rows, untrained_copy
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.recipes.agiformer import print_system2_diagnostics, system2_diagnostics
from lmnotes.runs.run import run

FACES = dict(
    strong=dict(d_model=16, n_layers=1, n_heads=2, d_byte=16, ngram_rows=64, ctx_len=32),
    guide=dict(d_model=16, n_layers=1, n_heads=2, d_byte=16, window=8, mixer="hybrid", byte_path="gru", ctx_len=32),
)
BYTES = np.frombuffer(b"the cat sat on the mat, and the dog, who knew, did not. " * 8, np.uint8)


@pytest.fixture(params=FACES)
def lm(request):
    "Return a model with thinking steps and random non-zero weights"
    torch.manual_seed(0)
    lm = new_lm("bytepatch", **FACES[request.param], thinking_steps=2)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return lm.eval()


@pytest.fixture
def val():
    return EvaluationBatches(BYTES, 4, 32)


def test_diagnostics_equal_a_plain_computation(lm, val):
    "The diagnostics of one batch equal a plain computation"
    batch = val[0]
    row = thinking_rows(lm, [batch])[2]
    with torch.no_grad():
        (z0, _, l0), (z1, _, l1), (z2, gate, l2) = lm.iter_thinking(batch.x)
    p, q = l2.softmax(-1), l1.softmax(-1)
    nats = [F.cross_entropy(logits.flatten(0, 1), batch.y.flatten()).item() for logits in (l0, l2)]
    expected = dict(
        bpb=nats[1] / math.log(2),
        saved=(nats[0] - nats[1]) / math.log(2),
        kl=(p * (p / q).log()).sum(-1).mean().item(),
        change=(z2 - z1).norm(dim=-1).mean().item(),
        relative=((z2 - z1).norm(dim=-1) / z1.norm(dim=-1)).mean().item(),
        cos_last=F.cosine_similarity(z2 - z1, z1 - z0, dim=-1).mean().item(),
        cos_z=F.cosine_similarity(z2 - z1, z1, dim=-1).mean().item(),
        gate=gate.mean().item(),
    )
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_each_row_equals_an_evaluation_with_that_many_steps(lm, val, steps):
    row = thinking_rows(lm, val, np.full(256, 2), steps=5)[steps]  # As if each id were two bytes long
    lm.cfg.thinking_steps = steps
    full = evaluate(lm, val, np.full(256, 2))
    assert (row["bpb"], row["bpb_stderr"]) == pytest.approx((full["bpb"], full["bpb_stderr"]), rel=1e-4)


def test_padding_does_not_count(lm):
    batch = EvaluationBatches(BYTES, 4, 32)[0]
    y = batch.y.clone()
    y[:, 20:] = IGNORE_INDEX
    rows = thinking_rows(lm, [Batch(batch.x, y)])
    with torch.no_grad():
        *_, (_, _, logits) = lm.iter_thinking(batch.x)
    want = F.cross_entropy(logits[:, :20].flatten(0, 1), y[:, :20].flatten()).item() / math.log(2)
    assert rows[2]["bpb"] == pytest.approx(want, rel=1e-5)


def test_inspection_does_not_change_the_model(lm, val):
    lm.train()
    before = {name: t.clone() for name, t in lm.state_dict().items()}
    generator = torch.get_rng_state()
    untrained_copy(lm)
    assert torch.equal(torch.get_rng_state(), generator)
    inspect_thinking(lm, val, steps=3)
    assert lm.cfg.thinking_steps == 2 and lm.training
    assert all(torch.equal(t, before[name]) for name, t in lm.state_dict().items())
    with pytest.raises(IndexError):
        thinking_rows(lm, [Batch(torch.full((1, 8), 999), torch.zeros(1, 8, dtype=torch.long))], steps=4)
    assert lm.cfg.thinking_steps == 2 and lm.training  # Even after an error


def test_untrained_copy_is_always_included(lm, val):
    rows = inspect_thinking(lm, val.subset(2))
    assert [(r["model"], r["steps"]) for r in rows] == [(m, k) for m in ("trained", "untrained") for k in range(3)]
    assert rows[3]["bpb"] == pytest.approx(8, abs=0.3)
    assert "saved" in repr(Table(rows)) and "bits per byte" in summarize_thinking(rows, 2)
    again = inspect_thinking(lm, val.subset(2))
    assert again == rows


def test_figure_shows_trained_and_untrained(lm, val):
    figure = plot_thinking(inspect_thinking(lm, val.subset(2)), "title")
    assert figure.get_suptitle() == "title"
    for ax in figure.axes:
        assert ax.get_title() and ax.get_ylabel()
        assert len(ax.containers) == 2  # Trained and untrained
    assert all(ax.get_xlabel() == "thinking steps" for ax in figure.axes[3:])


def test_agiformer_diagnostics(lm, capsys):
    x = torch.tensor([list(b"The history of artificial intelligence")])
    found = system2_diagnostics(lm, x)
    with torch.no_grad():
        (z0, _, _), *_, (z, _, _) = lm.iter_thinking(x)
    assert found["magnitude"] == pytest.approx((z - z0).norm(dim=-1).mean().item(), rel=1e-5)
    print_system2_diagnostics(lm, x)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- SYSTEM 2 DIAGNOSTICS ---"
    assert [line[:2] for line in lines[1:4]] == ["1.", "2.", "3."] and "(untrained: SYSTEM 2 IS " in lines[4]


def test_untrained_agiformer_is_already_active():
    "An untrained model is already ACTIVE: its magnitude is 6.87 in the AGIFORMER guide's own implementation"
    torch.manual_seed(0)
    found = system2_diagnostics(
        new_lm("bytepatch", "agiformer"), torch.tensor([list(b"The history of artificial intelligence  ")])
    )
    assert found["verdict"] == "SYSTEM 2 IS ACTIVE" and 5 < found["magnitude"] < 9


def test_diagnostics_of_a_run(workdir):
    args = "d_model=16 n_layers=1 n_heads=2 d_byte=16 ngram_rows=64 thinking_steps=2"
    r = run(
        **TINY | dict(arch="bytepatch", model_args=args, steps=5, data=str(workdir / "corpus"), out_dir=str(workdir))
    )
    rows = inspect_thinking(r.lm, EvaluationBatches(BYTES, 4, 32).subset(2), r.tokenizer.byte_lengths, steps=4)
    assert len(rows) == 10


def test_one_batch_has_no_standard_error(lm, val):
    rows = inspect_thinking(lm, val.subset(1))
    assert not [name for row in rows for name in row if name.endswith("stderr")]
    output = summarize_thinking(rows, 2)
    assert (
        "make no clear difference" in output
        and "one batch, so without a standard error" in output
        and "±" not in output
    )
    plot_thinking(rows)


def test_invalid_inputs_are_rejected(lm, val):
    none = Batch(val[0].x, torch.full_like(val[0].y, IGNORE_INDEX))
    with pytest.raises(ValueError, match="1 batches without a target"):
        thinking_rows(lm, [none])
    assert thinking_rows(lm, [none, val[0]])[2]["bpb"] == pytest.approx(thinking_rows(lm, [val[0]])[2]["bpb"])
    for look in (inspect_thinking, thinking_rows):
        with pytest.raises(ValueError, match="steps=-1, expected 0"):
            look(lm, val, steps=-1)
    with pytest.raises(ValueError, match="ids of shape .32,. given, expected .rows, length."):
        system2_diagnostics(lm, val[0].x[0])
    with pytest.raises(ValueError, match="ids of shape"):
        thinking_rows(lm, [Batch(val[0].x[0], val[0].y[0])])


@pytest.mark.parametrize("steps", [0, 3, -1])
def test_conclusion_without_thinking_steps(lm, val, steps):
    rows = inspect_thinking(lm, val.subset(2))
    with pytest.raises(ValueError, match=f"steps={steps} is not in these rows, which have steps .1, 2."):
        summarize_thinking(rows, steps)
    with pytest.raises(ValueError, match="steps=2 is not in these rows"):
        summarize_thinking(rows[:3], 2)  # Without the untrained copy


def test_models_without_thinking_are_rejected(val):
    for look in (inspect_thinking, thinking_rows, lambda lm, x: system2_diagnostics(lm, val[0].x)):
        with pytest.raises(ValueError, match="arch='gpt' has no thinking steps.*such as bytepatch"):
            look(new_lm("gpt", d_model=16, n_layers=1, n_heads=2), val)


@pytest.mark.parametrize("tie", [True, False])
def test_parameters_are_counted_once(tie):
    lm = new_lm("gpt", vocab_size=50, d_model=16, n_layers=2, n_heads=2, tie=tie)
    rows = {row["part"]: row for row in parameter_table(lm).rows}
    parts = [row["parameters"] for part, row in rows.items() if part not in ("all", "without embeddings")]
    assert rows["all"]["parameters"] == n_params(lm) == sum(parts)
    assert rows["without embeddings"]["parameters"] == n_params(lm) - 800
    assert {n: rows["embed"][n] for n in ("shape", "parameters", "trainable")} == dict(
        shape=(50, 16), parameters=800, trainable=800
    )
    assert ("head" in rows) != tie


def test_nested_modules():
    lm = new_lm("bytepatch", **FACES["strong"])
    parts = {row["part"]: row["parameters"] for row in parameter_table(lm, 2).rows}
    assert parts["patches.thinking"] == n_params(lm.patches.thinking)
    assert sum(parts.values()) - parts["without embeddings"] == 2 * n_params(lm)
