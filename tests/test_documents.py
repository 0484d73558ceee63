"""Documents begin and end the same way in training, validation and generation, and large texts need little memory."""

import json
import random
import resource
import tempfile

import numpy as np
import pytest
import torch
from helpers import run_in_process

import lmnotes
from lmnotes.data.batches import IGNORE_INDEX, Batch, PackedBatches
from lmnotes.data.prepare import prepare_data
from lmnotes.nn.lm import new_lm
from lmnotes.runs.run import run
from lmnotes.training.trainer import Hook

SMALL = dict(
    model_args="d_model=32 n_layers=1 n_heads=2 dropout=0",
    ctx_len=32,
    batch_size=16,
    steps=120,
    device="cpu",
    dtype="float32",
    out_dir="out",
    log_every=120,
    eval_every=120,
    sample_every=120,
    save_every=120,
    view=False,
)
SAMPLERS = "epochs", "sequential", "domains", "documents"
TOKENIZERS = "bytes", "chars", "bpe:262"
CASES = [("documents", "bytes"), *((s, t) for t in TOKENIZERS for s in SAMPLERS if (s, t) != ("documents", "bytes"))]


def write_documents(folder, n=200):
    "Write two domains of documents that begin with Q"
    draw = random.Random(0)
    for domain in ("one", "two"):
        (folder / "docs" / domain).mkdir(parents=True)
        texts = ["Q" + "".join(draw.choice("abcd") for _ in range(draw.randint(3, 9))) for _ in range(n)]
        lines = [json.dumps(dict(text=text)) + "\n" for text in texts]
        (folder / "docs" / domain / "x.jsonl").write_text("".join(lines))


@pytest.mark.parametrize(
    "sampler, tokenizer", [pytest.param(*case, marks=[pytest.mark.nightly] * (case != CASES[0])) for case in CASES]
)
def test_texts_from_an_empty_prompt_begin_as_documents_do(tmp_path, monkeypatch, sampler, tokenizer):
    "For every sampler and tokenizer, and the validation loss is about the same as with random sequences"
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path)
    bpb = {}
    for name in ("random", sampler):
        r = run(data="docs", tokenizer=tokenizer, run=name, sampler=name, **SMALL)
        texts = r.generate([""] * 20, 12, temperature=1.0)
        assert sum(text.startswith("Q") for text in texts) >= 18, texts
        bpb[name] = r.evaluate()["bpb"]
    assert bpb[sampler] < 1.1 * bpb["random"], bpb


def test_every_token_of_every_document_is_a_target_once_per_epoch():
    draw = np.random.default_rng(0)
    docs = [np.append(draw.integers(1, 50, draw.integers(0, 30)), 0) for _ in range(100)]
    ids, starts = np.concatenate(docs).astype(np.uint16), np.cumsum([0, *map(len, docs)])[:-1]
    batches = PackedBatches(ids, starts, batch_size=1, ctx_len=32, seed=3, start_id=0)
    epochs = [[batches[i] for i in range(e * batches.order.n, (e + 1) * batches.order.n)] for e in range(2)]
    neighbours = []
    for epoch in epochs:
        rows = [(b.x[0], b.y[0]) for b in epoch]
        targets = torch.cat([y[y != IGNORE_INDEX] for _, y in rows])
        assert sorted(targets.tolist()) == sorted(ids.tolist())
        for x, y in rows:  # Each input is the target before it, or the id before a document or a piece
            used = int((y != IGNORE_INDEX).sum())
            assert all(x[i] == y[i - 1] or x[i] == 0 or y[i - 1] == 0 for i in range(1, used))
        neighbours.append({tuple(y.tolist()) for _, y in rows})
    assert len(neighbours[0] & neighbours[1]) < len(neighbours[0]) / 2  # The documents of a row change


class StopAt(Hook):
    "Stop a run after this step"

    def after_step(self, t):
        t.stop = "interrupted" if t.step == 6 else t.stop


def test_runs_of_version_01_resume_with_its_packing(tmp_path, monkeypatch):
    "Its record does not name a packing, in which the first token of a document is no target"
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path, 30)
    short = SMALL | dict(steps=12, eval_every=12, sample_every=12, save_every=6, ctx_len=8, tokenizer="bytes")
    short |= dict(data="docs", sampler="documents")
    whole = run(run="whole", packing="0.1", **short)
    new = run(run="new", **short)
    run(run="old", packing="0.1", hooks=[StopAt()], **short)
    folder = tmp_path / "out/old"
    record = json.loads((folder / "run.json").read_bytes())
    assert record["config"].pop("packing") == "0.1" and record["origins"].pop("packing") == "explicit"
    (folder / "run.json").write_text(json.dumps(record))
    resumed = run(run="old", resume=True, out_dir="out", view=False)
    weights = [r.lm.state_dict() for r in (whole, resumed, new)]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    assert any(not torch.equal(t, weights[2][name]) for name, t in weights[0].items())


@pytest.mark.parametrize("arch", ["gpt", "ssm"])
def test_separate_documents_do_not_see_each_other(arch):
    "The loss of a batch is the sum of the losses of its documents, each alone in a batch"
    ids, starts = np.array([*range(1, 9), 0, 3, 4, 0, 9, 8, 7, 6, 5, 0]), [0, 9, 12]
    torch.manual_seed(0)
    small = dict(d_model=16, n_layers=1, dropout=0.0, **({} if arch == "ssm" else dict(n_heads=2)))
    lm = new_lm(arch, vocab_size=10, ctx_len=12, **small).eval()
    whole = PackedBatches(ids, starts, 3, 12, start_id=0, separate=True)[0]
    assert sorted(row[row != IGNORE_INDEX].tolist() for row in whole.y) == sorted(
        part.tolist() for part in np.split(ids, starts[1:])
    )
    with torch.no_grad():
        alone = [
            lm.loss(Batch(x[None, :n], y[None, :n])) for x, y in zip(whole.x, whole.y) if (n := int((y >= 0).sum()))
        ]
        together = lm.loss(whole)
    assert together["n"] == sum(a["n"] for a in alone) == len(ids)
    assert torch.allclose(together["nll"], sum(a["nll"] for a in alone), rtol=1e-5)


def test_separate_documents_are_validated_separately(tmp_path, monkeypatch):
    "The validation loss of a run with separate documents is that of each document alone, also by domain"
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path, 20)
    given = SMALL | dict(steps=6, eval_every=6, sample_every=6, ctx_len=12, batch_size=4, tokenizer="bytes", run="r")
    r = run(data="docs", sampler="documents", packing="separate", **given)
    val, start = r._tokens_to_evaluate("", "")["val"], torch.tensor([r.tokenizer.eot_id])
    losses, n = [], 0
    for first, end in zip(val.doc_starts, [*val.doc_starts[1:], len(val.ids)]):
        y = torch.from_numpy(val.ids[first:end].astype(np.int64))
        with torch.no_grad():
            losses.append(r.lm.loss(Batch(torch.cat([start, y[:-1]])[None], y[None]))["nll"].item())
        n += len(y)
    found = [r.evaluate(), r.metrics[-1]]
    assert all(abs(m["loss"] - sum(losses) / n) < 1e-4 for m in found) and found[0]["tokens"] == n == len(val.ids)
    parts = r.evaluate(by_domain=True)
    assert sum(m["tokens"] * m["loss"] for m in parts.values()) == pytest.approx(sum(losses), rel=1e-4)


def test_unknown_characters_cost_their_bytes(tmp_path, monkeypatch):
    "A model whose tokenizer does not know the characters of the validation text is not better than one of bytes"
    monkeypatch.chdir(tmp_path)
    val = "日本語のテキスト " * 80
    (tmp_path / "x.txt").write_text(("the cat sat on the mat. " * 300)[: 9 * len(val)] + val, encoding="utf-8")
    small = dict(SMALL, ctx_len=16, batch_size=8, steps=5, arch="bigram", model_args="", eval_batches=2, eval_every=2)
    found = {}
    for tokenizer in ("chars", "bytes"):
        r = run(run=tokenizer, data="x.txt", tokenizer=tokenizer, **small)
        found[tokenizer] = r.evaluate()
        assert r.result["last"].get("unknown_chars") == found[tokenizer].get("unknown_chars")
    for result in found.values():
        assert abs(result["bytes"] - len(val.encode())) <= 3  # Without the first character
    assert abs(found["chars"]["unknown_chars"] - 8 * 80) <= 1 and "unknown_chars" not in found["bytes"]
    assert 0.9 * found["bytes"]["bpb"] < found["chars"]["bpb"] < 1.3 * found["bytes"]["bpb"]


LINE = "The quick brown fox, having jumped over {} lazy dogs, sat down to write a very ordinary letter home."
TEXTS = dict(
    crlf=lambda n: LINE.format(n) + "\r\n",
    blank=lambda n: LINE.format(n) + "\n\n",
    indented=lambda n: "\t  " + LINE.format(n) + "\n",
    one_line=lambda n: LINE.format(n) + " ",
    spaceless=lambda n: LINE.format(n).replace(" ", ""),
    ideographs=lambda n: "我们今天去海边看日出，天气很好。",
)


def prepare_within(megabytes, *args):
    "Prepare a text, and return 1 if the peak memory of this process has grown by more than this"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare_data(*args)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"grown by {growth:.0f} MB")
    return int(growth > megabytes)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.nightly] * (k != "crlf")) for k in TEXTS])
def test_memory_does_not_depend_on_newlines(tmp_path, kind):
    text = "".join(map(TEXTS[kind], range(60_000)))
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert run_in_process(tmp_path, prepare_within, 250, "out", "x.txt", "bpe:300") == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize("repeated", ["a", "ab1", "日", "\N{GRINNING FACE}", "\n", " \n\t"])
def test_a_text_without_words(tmp_path, monkeypatch, repeated):
    "Bytes and characters are read as usual. A BPE needs words, and says so before any work"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text(repeated * 1_500_000, encoding="utf-8", newline="")
    for tokenizer in ("bytes", "chars"):
        tokens = prepare_data(tempfile.mkdtemp(dir=tmp_path), "x.txt", tokenizer)
        assert sum(part.n_bytes for part in tokens.values()) == 1_500_000 * len(repeated.encode())
    with pytest.raises(lmnotes.core.DataError, match="characters without the start of a word .* use tokenizer='bytes'"):
        prepare_data(tempfile.mkdtemp(dir=tmp_path), "x.txt", "bpe:300")
