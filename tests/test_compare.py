"""Comparisons: FLOPs and budgets are correct, a stop changes no number, and new architectures need no edit."""

import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from helpers import (
    ROOT,
    fork_children,
    read_log,
    recipe_parameters,
    run_after_call,
    run_in_process,
    start_process,
    wait_for_exit,
    wait_until,
)

from lmnotes.apps.cli import run_notebook
from lmnotes.core import seed_torch
from lmnotes.data.batches import Batch
from lmnotes.files import JsonlLog
from lmnotes.inspect.comparison import SHARES, comparison_results, comparison_table
from lmnotes.nn.lm import archs, get_arch, new_lm
from lmnotes.runs import compare as comparing
from lmnotes.runs.compare import ArchMeasurement, CompareConfig, Comparison, compare, count_flops
from lmnotes.training.trainer import Trainer

NOTEBOOK, GALLERY = ROOT / "nbs/compare.ipynb", ROOT / "nbs/gallery.ipynb"
TINY = dict(
    archs="gpt rnn",
    data="corpus",
    ctx_len=16,
    batch_size=4,
    budget=6e8,
    seeds=2,
    evals=3,
    model_args="d_model=32 n_layers=1 n_heads=2 d_hidden=32 dropout=0.0",
    out_dir="c",
)
TOY = """
from dataclasses import dataclass
from torch import nn
from lmnotes.nn.lm import LM, LMConfig, arch

@dataclass
class ToyConfig(LMConfig):
    d_model: int = 4

@arch("toy")
class Toy(LM):
    Config, receptive_field = ToyConfig, 1
    def __init__(self, cfg):
        super().__init__(cfg)
        self.embed, self.head = nn.Embedding(cfg.vocab_size, cfg.d_model), nn.Linear(cfg.d_model, cfg.vocab_size)
    def forward(self, x):
        return self.head(self.embed(x))
"""


def compared(forked=True, **params):
    "Compare in the current folder, and return 0 if all runs finished"
    if forked:
        fork_children()
    c = compare(**params)
    print(comparison_table(c))
    return 0 if all(len(c.finished_runs(name)) == c.cfg.seeds for name in c.steps) else 130


def compared_with_toy(**params):
    "Compare with an architecture that a module of the user registers"
    sys.path.insert(0, os.getcwd())
    import toy_model  # noqa: F401

    assert "toy" in archs()
    return compared(forked=False, **params)


def captured_output(function, *args, **kwargs):
    "Return 0 if a call raises ValueError, and print the error"
    fork_children()
    try:
        function(*args, **kwargs)
    except ValueError as e:
        print(e)
        return 0
    return 1


def numbers(folder):
    "Return {run: its validation results} of a comparison, without times"
    lines = {p.parent.name: p.read_text().splitlines() for p in Path(folder).glob("*/metrics.jsonl")}
    records = {name: [json.loads(line) for line in lines[name]] for name in lines}
    return {name: [(r["step"], r["bpb"]) for r in rs if r["split"] == "val"] for name, rs in records.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    "Return the folder of an uninterrupted comparison"
    workdir = tmp_path_factory.mktemp("compare")
    (workdir / "corpus").symlink_to(corpus)
    assert run_in_process(workdir, compared, **TINY) == 0, read_log(workdir)
    return workdir / "c"


# A transformer of L layers of width D on T positions: for each token six times its weights, and seven products of attention
B, T, D, L, V = 2, 128, 48, 2, 256
TRANSFORMER = B * T * (6 * (12 * L * D**2 + V * D) + 7 * 2 * T * D * L)
# State-space duality in chunks of Q: E channels in H heads, N numbers of state for each
E, N, H, Q = 2 * D, 32, 3, 64
SCAN = 6 * (Q * N + Q * E + 2 * N * E)  # For each token: scores, their weighted sums, and writing and reading the state
SSM = B * T * (6 * (L * (D * (2 * E + 2 * N + H) + E * D) + V * D) + L * SCAN)


@pytest.mark.parametrize(
    "name, by_hand",
    [*((name, TRANSFORMER) for name in ("gpt", "scratch_gpt", "gpt2", "streams")), ("ssm", SSM)],
)
def test_flops_equal_the_count_by_hand(name, by_hand):
    has = get_arch(name).Config.__dataclass_fields__
    shape = dict(d_model=D, n_layers=L, n_heads=2, dropout=0.0, n_positions=T)
    lm = new_lm(name, vocab_size=V, ctx_len=T, **{k: v for k, v in shape.items() if k in has})
    x = torch.randint(V, (B, T))
    products, pointwise = count_flops(lambda: lm.loss(Batch(x, x))["loss"].backward())
    assert products == pytest.approx(by_hand, rel=0.05)
    assert pointwise < 0.1 * products


def test_runs_spend_their_budget(uninterrupted):
    rows = comparison_results(Comparison(uninterrupted))
    assert {row["name"] for row in rows} == {"gpt", "rnn"}
    for row in rows:
        assert row["flops"] == pytest.approx(TINY["budget"], rel=0.02)


def test_budget_of_a_model_with_random_depth(workdir, monkeypatch):
    "The `bytepatch` model takes a random number of thinking steps, and all seeds spend the planned budget"
    monkeypatch.chdir(workdir)
    shape = "d_model=16 n_layers=3 n_heads=2 d_byte=16 ngram_rows=16"
    cfg = CompareConfig("bytepatch", "corpus", ctx_len=64, batch_size=4, model_args=shape, out_dir="c")
    contestant = ArchMeasurement(cfg, "bytepatch")
    planned, _ = contestant.flops_per_step()
    draw = type(contestant.trainer.lm.patches).draw_thinking_steps
    costs = {}
    for depth in range(4):
        monkeypatch.setattr(
            type(contestant.trainer.lm.patches), "draw_thinking_steps", lambda patches, depth=depth: depth
        )
        costs[depth] = sum(count_flops(contestant.trainer.train_step))
    assert 1.03 * costs[1] < costs[2] < costs[3]
    for seed in range(3):
        spent = 0
        for step in range(300):
            seed_torch(seed, step, 0, 0)
            spent += costs[draw(contestant.trainer.lm.patches)]
        assert spent / 300 == pytest.approx(planned, rel=0.02)


def test_seeds_differ_and_runs_are_complete(uninterrupted):
    found = numbers(uninterrupted)
    assert set(found) == {"gpt-0", "gpt-1", "rnn-0", "rnn-1"}
    for name in ("gpt", "rnn"):
        assert found[f"{name}-0"] != found[f"{name}-1"]
        assert len(found[f"{name}-0"]) == 3
    for row in comparison_results(Comparison(uninterrupted)):
        assert row["seeds"] == 2 and row["error"] > 0 and row["bytes_per_s"] > 0 and row["memory"] > 0


def test_architectures_read_the_same_bytes(uninterrupted):
    "Two architectures with the same seed read the same batches"
    a, b = (json.loads((uninterrupted / f"{name}-1/run.json").read_text()) for name in ("gpt", "rnn"))
    same = "data tokenizer ctx_len batch_size seed sampler optimizer lr schedule cooldown".split()
    assert [a["config"][n] for n in same] == [b["config"][n] for n in same]
    assert a["data"]["fingerprint"] == b["data"]["fingerprint"]


def hold_after_each_record():
    "Make a run wait after each of its records until the test creates the file `go`"
    run_after_call(JsonlLog, "append", lambda *args, **record: True, lambda: wait_until(Path("go").exists))


def compared_and_held(**params):
    "Compare, with runs that wait after their first record"
    hold_after_each_record()
    return compared(**params)


def test_resumed_comparison_gives_the_same_numbers(workdir, uninterrupted):
    case, first = TINY | dict(seeds=1), ("gpt-0", "rnn-0")  # Two run at a time
    process = start_process(workdir, compared_and_held, **case)
    wait_until(lambda: all((workdir / "c" / name / "metrics.jsonl").exists() for name in first), process)
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: all("SIGINT" in (workdir / f"c/{name}.log").read_text() for name in first), process)
    (workdir / "go").touch()
    assert wait_for_exit(process) == 130, read_log(workdir)
    assert "The same call resumes" in read_log(workdir)
    records = {p.parent.name: json.loads(p.read_text()) for p in (workdir / "c").glob("*/run.json")}
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(first, "interrupted")
    assert run_in_process(workdir, compared, **case) == 0, read_log(workdir)
    assert numbers(workdir / "c") == {name: numbers(uninterrupted)[name] for name in first}


def test_finished_runs_are_reused_and_seeds_are_added(workdir):
    few = TINY | dict(archs="rnn", budget=5e8, seeds=1)
    assert run_in_process(workdir, compared, **few) == 0, read_log(workdir)
    before = (workdir / "c/rnn-0/run.json").stat().st_mtime_ns
    assert run_in_process(workdir, compared, **few | dict(seeds=2)) == 0, read_log(workdir)
    assert (workdir / "c/rnn-0/run.json").stat().st_mtime_ns == before
    assert set(numbers(workdir / "c")) == {"rnn-0", "rnn-1"}
    assert run_in_process(workdir, captured_output, compare, **few | dict(ctx_len=8)) == 0, read_log(workdir)
    assert "started with ctx_len=16, not 8" in read_log(workdir)


def test_an_earlier_comparison_keeps_its_method(workdir):
    "A comparison that did not record the orthogonalization used Newton–Schulz. With another one, it is not continued"
    cfg = asdict(CompareConfig("bigram", out_dir=str(workdir / "c")))
    earlier = {name: value for name, value in cfg.items() if name != "orthogonalization"}
    (workdir / "c").mkdir()
    (workdir / "c/compare.json").write_text(json.dumps(dict(cfg=earlier, cost={}, steps={})))
    assert Comparison(workdir / "c").cfg.orthogonalization == "newton_schulz"
    with pytest.raises(ValueError, match="started with orthogonalization='newton_schulz', not 'polar_express'"):
        compare(**cfg)


def test_user_architecture_can_be_compared(workdir):
    (workdir / "toy_model.py").write_text(TOY)
    assert (
        run_in_process(workdir, compared_with_toy, **TINY | dict(archs="toy rnn", budget=5e8, max_steps=60, seeds=1))
        == 0
    ), read_log(workdir)
    rows = {row["name"]: row for row in comparison_results(Comparison(workdir / "c"))}
    assert rows["toy"]["n_params"] == 256 * 32 * 2 + 256  # It took d_model from the shared model_args
    assert rows["toy"]["bpb"] < 8


SECONDS = {"gpt": 0.004, "rnn": 0.01}  # Per step


def compared_by_a_clock(**params):
    "Compare with a fake clock, on which each step takes the time in `SECONDS` on any machine"
    now, train_step = 0.0, Trainer.train_step

    def timed_step(trainer):
        nonlocal now
        now += SECONDS[trainer.cfg.arch]
        return train_step(trainer)

    def process_time():
        nonlocal now
        now += 1e-6
        return now

    Trainer.train_step = timed_step
    comparing.time = SimpleNamespace(process_time=process_time, sleep=time.sleep)
    comparing._measure_missing = lambda cfg, names, known: comparing.measure_costs(
        cfg, names
    )  # In this process, which has the fake clock
    return compared(**params)


def test_equal_time_budget(workdir):
    case = TINY | dict(compute="seconds", budget=0.5, seeds=1)
    assert run_in_process(workdir, compared_by_a_clock, **case) == 0, read_log(workdir)
    comparison = Comparison(workdir / "c")
    assert comparison.steps == {"gpt": 125, "rnn": 50}
    for row in comparison_results(comparison):
        assert row["whole"] and row["seconds"] == pytest.approx(0.5, rel=0.02)
        assert comparison.record(row["name"], 0)["step"] == comparison.steps[row["name"]]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(archs="gtp"), "did you mean 'gpt'?"),
        (dict(model_args="d_model=x"), "d_model must be of type int"),
        (dict(own_args="gpt: width=3"), "'width=3'"),
        (dict(own_args="gtp: d_model=3"), "did you mean 'gpt'?"),
        (dict(compute="hours"), "compute='hours', expected flops or seconds"),
        (dict(seeds=0), "seeds=0, expected a whole number at least 1"),
    ],
)
def test_errors_are_raised_before_training(workdir, monkeypatch, change, message):
    monkeypatch.chdir(workdir)
    with pytest.raises(ValueError) as e:
        compare(**TINY | change)
    assert message in str(e.value)
    assert not (workdir / "c/compare.json").exists()


def test_too_small_budget_names_the_minimum(workdir):
    assert run_in_process(workdir, captured_output, compare, **TINY | dict(archs="rnn", budget=1e6)) == 0, read_log(
        workdir
    )
    assert "budget=1e+06 FLOPs is 0." in read_log(workdir) and "Give at least" in read_log(workdir)


def test_a_failed_child_process_is_explained(workdir):
    wrong = TINY | dict(archs="gpt", model_args="d_model=30 n_heads=4")
    process = run_in_process(workdir, compared, forked=False, **wrong)
    assert process == 1
    assert "costs could not be measured: ValueError: d_model=30 is not a multiple of n_heads=4" in read_log(workdir)


def test_the_notebook(workdir, monkeypatch):
    small = TINY | dict(budget=5e8, seeds=1, own_args="")
    assert run_in_process(workdir, notebook, **small) == 0, read_log(workdir)
    assert (workdir / "c/figure.png").stat().st_size > 5000
    assert (workdir / "c/table.md").read_text().startswith("| architecture | bits per byte |")


def notebook(**params):
    "Run the notebook's cells with parameters"
    fork_children()
    names = run_notebook(NOTEBOOK, params)
    return 0 if len(names["c"].finished_runs("gpt")) == 1 else 1


def gallery(folder):
    "Run the cells of the notebook `gallery` with the parameters of a small comparison in a folder, and write its page"
    fork_children()
    names = {}
    for cell in nbformat.read(GALLERY, 4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= TINY | dict(own_args="", out_dir=str(folder))
    page = names["comparison_gallery"](names["c"], names["ideas"], ROOT / "nbs/pictures").html
    Path("page.html").write_text(page)
    return 0


def test_the_gallery_shows_finished_runs_and_trains_missing_ones(workdir, uninterrupted):
    shutil.copytree(uninterrupted, workdir / "c")
    shutil.rmtree(workdir / "c/gpt-1")
    before = (workdir / "c/rnn-0/run.json").stat().st_mtime_ns
    assert run_in_process(workdir, gallery, "c") == 0, read_log(workdir)
    assert (workdir / "c/rnn-0/run.json").stat().st_mtime_ns == before
    assert numbers(workdir / "c") == numbers(uninterrupted)
    page = (workdir / "page.html").read_text()
    assert page.count('class="sample"') == 2 * len(SHARES)
    assert page.count("<img") == 4  # A curve and a diagram of each architecture
    for row in comparison_results(Comparison(uninterrupted)):
        assert f"<b>{row['bpb']:.3f} ± {row['error']:.3f}</b> bits per byte, {row['n_params']:,} parameters" in page


def test_the_gallery_has_an_idea_and_a_diagram_of_each_architecture():
    names = {}
    exec(next(cell.source for cell in nbformat.read(GALLERY, 4).cells if "ideas = " in cell.source), names)
    assert {*names["ideas"]} == {*archs()}
    for name, (notebook, idea) in names["ideas"].items():
        assert f'@arch(\\"{name}\\")' in (ROOT / "nbs" / notebook).read_text(encoding="utf-8")
        assert re.fullmatch(r"[A-Z].+[.]", idea) and (ROOT / f"nbs/pictures/{name}.svg").exists()


def test_notebook_parameters_match_compare():
    cell, defaults = recipe_parameters(NOTEBOOK), asdict(CompareConfig())
    assert list(cell) == list(defaults)
    assert {n for n in cell if cell[n] != defaults[n]} == {"own_args"}
    shown = recipe_parameters(GALLERY)
    assert shown == {n: cell[n] for n in shown}
