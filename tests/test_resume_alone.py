"""Each recipe resumes exactly with `resume=True` and what names its run: from another folder, with moved data, and from step 0."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    StopAtSteps,
    differences,
    read_log,
    run_in_process,
    run_recipe,
    run_results,
    stop_before_step,
)

from lmnotes.data.tokenizer import BPETokenizer
from lmnotes.data.tokens import TokenWriter
from lmnotes.inspect.verify import verify
from lmnotes.runs.replay import MISMATCH
from lmnotes.runs.run import run
from lmnotes.runs.setup import build_run
from lmnotes.training.trainer import Hook

pytestmark = pytest.mark.usefixtures("short_texts")
EXPERT = dict(tokenizer="bytes", d_model=16, n_heads=2, n_layers=1, max_seq_len=32, batch_size=4, warmup_steps=2)
EXPERT |= dict(lr=1e-2, max_epochs=2, log_interval=10, device="cpu", use_amp=False)
AGIFORMER = dict(D_MODEL=16, N_LAYERS=1, NUM_HEADS=2, PATCH_SIZE=2, WINDOW_SIZE=8, THINKING_STEPS=1, BATCH_SIZE=2)
AGIFORMER |= dict(
    SEQ_LEN=64, MAX_STEPS=12, WARMUP_STEPS=5, VAL_INTERVAL=6, DEVICE="cpu", DTYPE="float32", FINAL_BATCHES=1
)
TISSLM = dict(VOCAB_SIZE=270, seq_len=16, batch_size=8, epochs=1, checkpoint_every=15, stride=4, lr=0.002)
YAML = "training: {max_steps: 12, batch_size: 4, log_interval: 5, save_interval: 5}\nmodel: {transformer: {num_layers: 1, hidden_dim: 16, "
YAML += "num_attention_heads: 2, ffn_dim: 32, max_position_embeddings: 32}, encoders: {internal_voice: {vocab_size: %d}}}\ndefaults: {device: cpu}\n"
# {recipe: (parameters, names of those that find the run, name of that for the data, its place, run folder)}
RECIPES = {
    "tisslm": (TISSLM | dict(SAVE_DIR="my_model"), ["SAVE_DIR"], "CORPUS_PATH", "corpus", "my_model"),
    "agiformer": (AGIFORMER | dict(run="ap"), ["run"], "DATA", "text.txt", "checkpoints/ap"),
    "text_only": (
        dict(config="small.yaml", save_dir="out/text"),
        ["save_dir"],
        "data",
        "data/my corpus.bin",
        "out/text",
    ),
    "pretrain_expert": (
        EXPERT | dict(expert="transformer"),
        ["expert"],
        "data_dir",
        "domains",
        "checkpoints/transformer_expert",
    ),
}


def sentences(seed, n):
    draw = random.Random(seed)
    return "".join(
        " ".join(draw.choices("wave salt tide foam harbour gull sea".split(), k=7)) + ".\n" for _ in range(n)
    )


def write_material(folder):
    "Write a project and the data of all recipes"
    (folder / "corpus").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "corpus/a.txt").write_text(sentences(0, 60))
    (folder / "text.txt").write_text(sentences(1, 200))
    for domain in ("sea", "hills"):
        (folder / "domains" / domain).mkdir(parents=True)
        rows = [json.dumps(dict(text=line)) + "\n" for line in sentences(domain, 20).splitlines()]
        (folder / "domains" / domain / "all.jsonl").write_text("".join(rows))
    text = sentences(2, 300)
    tokenizer = BPETokenizer.train([text], 300)
    (folder / "data").mkdir()
    with TokenWriter(folder / "data/my corpus.bin", tokenizer.vocab_size, tokenizer.fingerprint, {}) as out:
        out.add(tokenizer.encode(text), n_bytes=len(text))
    tokenizer.save(folder / "data/my corpus.tokenizer")
    (folder / "small.yaml").write_text(YAML % tokenizer.vocab_size)


def train(folder, name, code=0, **params):
    "Run a recipe in a new process, in `folder`"
    assert run_in_process(folder, run_recipe, ROOT / f"nbs/recipes/{name}.ipynb", **params) == code, read_log(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_resume_alone(name, tmp_path):
    "A stopped run resumes with the bits of the uninterrupted one"
    params, identity, data, place, run = RECIPES[name]
    given, alone = params | {data: place}, {n: params[n] for n in identity} | dict(resume=True)
    write_material(tmp_path / "whole")
    train(tmp_path / "whole", name, **given)
    expected = run_results(tmp_path / "whole" / run)

    def stopped(case, step):
        folder = tmp_path / case
        write_material(folder)
        notebook = ROOT / f"nbs/recipes/{name}.ipynb"
        assert stop_before_step(step, folder, run_recipe, notebook, **given) == 130, read_log(folder)
        for file in ("reached", "go"):
            (folder / file).unlink()
        return folder

    def check(folder, case):
        assert not (wrong := differences(expected, run_results(folder / run))), (case, wrong, read_log(folder)[-3000:])

    folder = stopped("stopped", 7)
    shutil.copytree(folder, tmp_path / "ein Weg ü")
    (folder / "elsewhere").mkdir()
    train(folder / "elsewhere", name, **{n: Path(run).name if n == "run" else v for n, v in alone.items()})
    check(folder, "another current folder")
    again = tmp_path / "ein Weg ü"
    (again / "new place").mkdir()
    for file in sorted((again / place).parent.glob(Path(place).stem + "*")):
        shutil.move(file, again / "new place")
    train(again, name, **given | alone | {data: f"new place/{Path(place).name}"})
    check(again, "moved data, and all parameters again")
    train(again, name, **alone)  # Finished
    check(again, "nothing left to train")
    start = stopped("step 0", 1)
    train(start, name, **alone)
    check(start, "step 0")


class RecordRows(Hook):
    "Collects the positions of all rows that a run has seen"

    def __init__(self):
        self.seen, self.steps = [], 0

    def after_step(self, t):
        if t.step > self.steps:
            self.seen += [row.tolist() for row in t.batches[t.step - 1].x]
        self.steps = t.step


@pytest.mark.parametrize("sampler", ["epochs", "sequential", "documents"])
def test_another_batch_size_continues_after_the_rows_seen(tmp_path, monkeypatch, sampler):
    "Each row comes once in an epoch, though the batch size changes in it, and a replay gives the same bits"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for i in range(40):
        (tmp_path / "x" / f"{i}.txt").write_text(f"{i:03} " * (10 + i))
    given = dict(data="x", split="first90", tokenizer="bytes", ctx_len=16, epochs=1, sampler=sampler, run="r")
    given |= dict(
        model_args="d_model=16 n_layers=1 n_heads=2", device="cpu", dtype="float32", out_dir="out", keep="all"
    )
    hook = RecordRows()
    run(**given, batch_size=4, hooks=[hook, StopAtSteps(5)])
    assert hook.steps == 5
    r = run(run="r", out_dir="out", resume=True, batch_size=8, allow_change="batch_size", hooks=[hook])
    n = round(4 * build_run(**given, batch_size=4).batches.steps_per_epoch)
    assert r.status == "done" and r.step == 5 + -(-(n - 20) // 8)
    first = build_run(**given, batch_size=1).batches
    once = sorted(first[i].x[0].tolist() for i in range(n))
    assert sorted(hook.seen[:n]) == once
    assert r.info["changes"][0] | dict(step=5) == dict(step=5, name="batch_size", before=4, after=8)
    assert not verify(r.folder, replay=9).parts(MISMATCH)


def test_another_stride_continues_at_the_same_text(tmp_path, monkeypatch):
    "A run that reads its text in order leaves nothing out, and reads nothing twice"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("".join(f"{i:03} " for i in range(400)))
    given = dict(data="x.txt", tokenizer="bytes", ctx_len=16, batch_size=4, epochs=1, sampler="sequential", run="r")
    given |= dict(model_args="d_model=16 n_layers=1 n_heads=2", device="cpu", dtype="float32", out_dir="out")
    hook = RecordRows()
    run(**given, hooks=[hook, StopAtSteps(5)])
    r = run(run="r", out_dir="out", resume=True, stride=8, allow_change="stride", hooks=[hook])
    ids = build_run(**given).data.tokens["train"].ids
    starts = [*range(0, 320, 16), *range(320, len(ids) - 16, 8)]
    assert hook.seen[: len(starts)] == [ids[i : i + 16].tolist() for i in starts]
    assert r.status == "done" and r.step == 5 + -(-(len(starts) - 20) // 4)
