"""How costs grow with the step, corpus, context, width, vocabulary and batch, compared with the growth of the work that they need.

A curve is the least CPU time, or the peak memory, at each size. Its slope is that of a line through the upper half of the sizes, with both axes
logarithmic, and so is the slope of the work: matrix products by PyTorch's counter of FLOPs, or bytes that must be read. `--plot FOLDER` draws the
curves, with the work as dashed lines through their last points. `--parts context,batch` measures only these.
"""

from common import interleave, min_cpu, parse_options, report  # isort: skip
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from prepare import write_text

import lmnotes
from lmnotes.data.batches import Batch
from lmnotes.data.prepare import prepare_data
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.runs.compare import count_flops
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import load_data
from lmnotes.runs.run import peak_memory
from lmnotes.training.trainer import TrainConfig, Trainer

HERE = Path(__file__).parent
TOLERANCE = 0.15
SIZES = {  # Part: (label, sizes)
    "step": ("step at which the run resumes", (10, 100, 1_000, 10_000, 100_000)),
    "corpus": ("megabytes of text", (1, 3, 10, 30, 100)),
    "context": ("context, or position of the token", (64, 128, 256, 512, 1024, 2048)),
    "width": ("d_model", (64, 128, 256, 512, 1024)),
    "vocabulary": ("vocabulary", (256, 1024, 4096, 16384, 65536)),
    "batch": ("batch size", (1, 2, 4, 8, 16, 32, 64)),
}
SMALL = dict(step=(10, 20), corpus=(0.1, 0.2), context=(16, 32), width=(32, 64), vocabulary=(64, 128), batch=(1, 2))
TINY = dict(d_model=128, n_layers=4, n_heads=4)


@dataclass
class Curve:
    "Measured cost at each size, and the work that it needs, in any unit"

    part: str  # Key of `SIZES`
    name: str  # What is measured
    unit: str  # Unit of the cost
    cost: dict  # {size: cost}
    work: dict  # {size: work}

    def row(self):
        "Return the row of the table"
        shown = ", ".join(f"{x:,}: {y:.3g}" for x, y in self.cost.items())
        return dict(
            part=self.part,
            curve=self.name,
            unit=self.unit,
            costs=shown,
            theory=slope(self.work),
            slope=slope(self.cost),
        )

    def goal(self):
        "Return the row of the goal"
        theory, measured = slope(self.work), slope(self.cost)
        text = f"{self.part}, {self.name}: slope at most {theory:.2f} + {TOLERANCE}"
        return text, f"{measured:.2f}", measured <= theory + TOLERANCE


def slope(values):
    "Return the slope of {size: value} over the upper half of the sizes, both axes logarithmic"
    points = sorted(values.items())[-max(2, -(-len(values) // 2)) :]
    return statistics.linear_regression(*zip(*[(math.log(x), math.log(y)) for x, y in points])).slope


def in_new_process(call):
    "Return the result of a function of this file, called in a new process, from JSON"
    code = f"import growth; print(growth.json.dumps(growth.{call}))"
    env = os.environ | dict(RAYON_NUM_THREADS=os.environ["OMP_NUM_THREADS"])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def quietly(function, *args, **kwargs):
    "Call a function without its output"
    with redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def new_trainer(arch, rows, length, vocab=256, optimizer="muon", **config):
    "Return a trainer on random ids"
    lm = new_lm(arch, vocab_size=vocab, ctx_len=length, dropout=0.0, **config)
    x = torch.randint(vocab, (rows, length))
    return Trainer(lm, [Batch(x, x.roll(-1, 1))] * 1000, TrainConfig(steps=1000, optimizer=optimizer))


def step_curves(part, unit, trainers, units, rounds):
    "Return curves of {name: {size: trainer}}: CPU milliseconds of a step, divided by `units(size)`"
    steps = {(name, x): t.train_step for name, of in trainers.items() for x, t in of.items()}
    clocks = interleave(steps, rounds, warmup=2)
    for name, of in trainers.items():
        cost = {x: 1e3 * min_cpu(clocks[name, x]) / units(x) for x in of}
        yield Curve(part, name, unit, cost, {x: count_flops(t.train_step)[0] / units(x) for x, t in of.items()})


def by_step(sizes, rounds, log_every):
    "Time to resume a run that was trained to each step, to train one more step, evaluate it and save it"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, 40_000)
        small = dict(arch="bigram", data=str(text), tokenizer="bytes", batch_size=1, ctx_len=64, sampler="epochs")
        small |= dict(optimizer="adamw", schedule="constant", log_every=log_every, view=False, out_dir=folder)
        done = {n: n for n in sizes}

        def resume(n):
            done[n] += 1
            quietly(lmnotes.run, run=str(n), steps=done[n], resume=True, out_dir=folder, view=False)

        for n in sizes:
            quietly(lmnotes.run, run=str(n), steps=n, **small)
        clocks = interleave({n: partial(resume, n) for n in sizes}, 2 * rounds)
    yield Curve("step", "resume", "CPU ms", {n: 1e3 * min_cpu(of) for n, of in clocks.items()}, dict.fromkeys(sizes, 1))


def cost_of_preparing(text, out):
    "Return the CPU seconds and the growth of the peak memory in MB, to prepare a text"
    peak, start = peak_memory("cpu"), time.process_time()
    quietly(prepare_data, out, text, "bpe:2048")
    return time.process_time() - start, (peak_memory("cpu") - peak) / 1e6


def by_corpus(sizes, rounds):
    "Time and memory to prepare texts, and time to open what was prepared"
    with tempfile.TemporaryDirectory() as folder:
        costs, openers = {mb: [] for mb in sizes}, {}
        for mb in sizes:
            write_text(Path(folder) / f"{mb}.txt", int(mb * 1e6))
        for i in range(-(-rounds // 3)):
            for mb in sizes:
                call = f"cost_of_preparing({f'{folder}/{mb}.txt'!r}, {f'{folder}/{mb}-{i}'!r})"
                costs[mb].append(in_new_process(call))
                openers[mb] = partial(load_data, RunConfig(data=f"{folder}/{mb}-{i}"), log_fn=None)
        clocks = interleave(openers, rounds)
    seconds, memory = ({mb: min(cost[i] for cost in found) for mb, found in costs.items()} for i in range(2))
    constant = dict.fromkeys(sizes, 1)
    yield Curve("corpus", "prepare, bpe:2048", "CPU s", seconds, {mb: mb for mb in sizes})
    yield Curve("corpus", "open", "CPU s", {mb: min_cpu(of) for mb, of in clocks.items()}, constant)
    yield Curve("corpus", "prepare, peak memory", "MB", memory, constant)


def decode_curves(sizes, rounds, presets, tokens=10):
    "Time of a token by position, for gpt (10.7 M parameters) and ssm (11.4 M)"
    steps, work = {}, {}
    for arch, preset in presets.items():
        lm = new_lm(arch, preset, vocab_size=65, ctx_len=max(sizes)).eval()
        ids, weights = torch.randint(65, (1, max(sizes))), 4 * n_params(lm)
        state = lm.step(ids)[1]
        layer = 8 * lm.cfg.d_model * lm.cfg.n_layers if arch == "gpt" else 0  # Bytes of a position in the cache
        work[arch] = {x: weights + layer * x for x in sizes}

        def decode(x, arch=arch, lm=lm, ids=ids, state=state):
            for _ in range(tokens):
                for cache in state[0] if arch == "gpt" else ():
                    cache.n_seen = x - 1  # The token attends to `x` positions, its own included
                lm.step(ids[:, :1], state)

        steps |= {(arch, x): partial(decode, x) for x in sizes}
    clocks = interleave(steps, 2 * rounds)
    for arch in presets:
        cost = {x: 1e3 * min_cpu(clocks[arch, x]) / tokens for x in sizes}
        yield Curve("context", f"decode, {arch}", "CPU ms / decoded token", cost, work[arch])


def by_context(sizes, rounds, quick):
    "Time per token of training steps with the same number of tokens, and of decoding"
    tokens = max(sizes)
    trainers = {arch: {T: new_trainer(arch, tokens // T, T, preset="tiny") for T in sizes} for arch in ("gpt", "ssm")}
    yield from step_curves("context", "CPU ms / token of a step", trainers, lambda T: tokens, rounds)
    presets = dict.fromkeys(("gpt", "ssm"), "tiny" if quick else "small")
    yield from decode_curves([x for x in sizes if x <= 1024], rounds, presets)


def by_width(sizes, rounds):
    "Time of a step of two layers and 4 x 128 tokens, with both optimizers"
    trainers = {
        optimizer: {
            D: new_trainer("gpt", 4, 128, optimizer=optimizer, d_model=D, n_layers=2, n_heads=max(1, D // 64))
            for D in sizes
        }
        for optimizer in ("adamw", "muon")
    }
    yield from step_curves("width", "CPU ms", trainers, lambda D: 1, rounds)


def memory_of_steps(vocab):
    "Return the growth of the peak memory in MB, in three steps and the building of the model"
    before = peak_memory("cpu")
    trainer = new_trainer("gpt", 4, 64, vocab, **TINY)
    for _ in range(3):
        trainer.train_step()
    return (peak_memory("cpu") - before) / 1e6


def by_vocabulary(sizes, rounds):
    "Time and peak memory of steps of 4 x 64 tokens"
    trainers = {"gpt": {V: new_trainer("gpt", 4, 64, V, **TINY) for V in sizes}}
    for curve in step_curves("vocabulary", "CPU ms", trainers, lambda V: 1, rounds):
        curve.work = {V: V for V in sizes}  # Not only the products are linear in the number of logits
        yield curve
    params = {V: n_params(t.lm) for V, t in trainers["gpt"].items()}
    memory = {V: in_new_process(f"memory_of_steps({V})") for V in sizes}
    yield Curve("vocabulary", "gpt, peak memory", "MB", memory, params)


def by_batch(sizes, rounds):
    "Time per row of steps with rows of 64 tokens"
    trainers = {arch: {B: new_trainer(arch, B, 64, preset="tiny") for B in sizes} for arch in ("gpt", "ssm")}
    yield from step_curves("batch", "CPU ms / row", trainers, lambda B: B, rounds)


def draw(part, curves, path):
    "Draw the curves of a part, one panel for each unit, in colors for light and dark pages"
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    gray, colors = "#7d7d7d", ("#2a7fd4", "#d9660a", "#2e9e5b")
    names = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
    with rc_context(dict.fromkeys(names, gray) | {"font.size": 11, "axes.titlesize": 11, "svg.hashsalt": part}):
        units = list(dict.fromkeys(curve.unit for curve in curves))
        figure = Figure((7, 3.4), layout="constrained")
        figure.suptitle(f"Cost by {part} (dashed: growth of the work)", fontsize=11)
        for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units):
            shown = [curve for curve in curves if curve.unit == unit]
            for curve, color, marker in zip(shown, colors, "os^"):
                x, y = zip(*curve.cost.items())
                axes.plot(x, y, marker=marker, color=color, label=curve.name)
                scale = y[-1] / curve.work[x[-1]]
                axes.plot(x, [scale * curve.work[n] for n in x], "--", color=color)
            axes.set(xscale="log", yscale="log", xlabel=SIZES[part][0], ylabel=unit)
            low, high = (f(y for curve in shown for y in curve.cost.values()) for f in (min, max))
            axes.set_ylim(low / 2, high * 3)
            axes.set_xticks(x, [f"{n:,}" for n in x], rotation=0 if len(units) == 1 else 45)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 40 * low else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
            axes.minorticks_off()
            axes.legend(frameon=False, loc="upper left")
        figure.savefig(path, transparent=True, metadata=dict(Date=None))


def main():
    args = parse_options(
        __doc__,
        rounds=(7, "timed rounds"),
        parts=("", "parts to measure, separated by commas (empty: all)"),
        log=("auto", "log_every of the runs that are resumed"),
        plot=("", "folder for the plots, such as docs/pictures"),
    )
    rounds = 1 if args.quick else args.rounds
    parts = dict(step=partial(by_step, log_every=args.log), corpus=by_corpus, width=by_width, vocabulary=by_vocabulary)
    parts |= dict(context=partial(by_context, quick=args.quick), batch=by_batch)
    curves = []
    for part in [name for name in SIZES if name in (args.parts or ",".join(SIZES)).split(",")]:
        found = list(parts[part]((SMALL[part] if args.quick else SIZES[part][1]), rounds))
        print(part, *(curve.row() for curve in found), sep="\n", flush=True)
        curves += found
        if args.plot:
            draw(part, found, Path(args.plot) / f"growth_{part}.svg")
    goals = [curve.goal() for curve in curves]
    for curve in (curve for curve in curves if curve.name == "decode, gpt"):
        first, last = min(curve.cost), max(curve.cost)
        limit, times = (values[last] / values[first] for values in (curve.work, curve.cost))
        what = f"gpt, 10.7 M: a token at position {last:,} as a multiple of one at {first}"
        goals.append((f"{what} (goal {limit:.2f}, as the weights and the cache)", f"{times:.2f}", times <= limit))
    report(args, [curve.row() for curve in curves], goals)


if __name__ == "__main__":
    main()
