"""Shared code of the benchmarks: options, data, fair timing and the report.

Import this before torch, because it sets the number of threads.
"""

# ruff: noqa: E402
import argparse
import json
import os
import statistics
import sys
import time

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

import torch

from lmnotes.core import DataError, environment, versions
from lmnotes.data.batches import EvaluationBatches, get_batches
from lmnotes.inference.evaluation import Table
from lmnotes.nn.lm import new_lm
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import load_data

torch.set_num_threads(THREADS)


def parse_options(
    description,  # Docstring of the script. Its first line is printed
    **extra,  # Further options: name=(default, help)
):  # Namespace with `quick`, `check` and the further options
    "Parse the command line of a benchmark and print a description of the machine"
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="only check that it runs, in seconds, without judging the result"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    for name, (default, text) in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    args = parser.parse_args()
    machine = " ".join(f"{name} {version}" for name, version in versions().items())
    cpu = "{cpu_model} with {cpu}".format(**environment())
    print(
        f"{description.splitlines()[0]}\n{machine}, {cpu}, {torch.get_num_threads()} of {os.cpu_count()} threads, {machine_load()}",
        flush=True,
    )
    return args


def machine_load():
    "Return the load average of the last minute"
    return f"load {os.getloadavg()[0]:.1f}"


class Clock:
    "Seconds spent inside its `with` blocks: `cpu` for all threads of this process, and `wall`"

    def __init__(self):
        self.cpu, self.wall = 0.0, 0.0

    def __enter__(self):
        self._start = time.process_time(), time.perf_counter()

    def __exit__(self, *exc):
        cpu, wall = self._start
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def interleave(
    functions,  # {name: function of no arguments}
    rounds,  # Timed calls of each function
    warmup=1,  # Untimed calls of each function before that
):  # {name: [Clock, …]}
    "Time functions interleaved, so that background load affects all of them equally"
    for function in functions.values():
        for _ in range(warmup):
            function()
    clocks = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            clock = Clock()
            with clock:
                function()
            clocks[name].append(clock)
    return clocks


def min_cpu(clocks):
    "Return the minimum CPU seconds of several timings, which background load affects least"
    return min(clock.cpu for clock in clocks)


class Ratio(float):
    "A ratio, shown with the quartiles of its values in single rounds"

    def __new__(cls, value, rounds):
        ratio = super().__new__(cls, value)
        ratio.quartiles = statistics.quantiles(rounds, n=4, method="inclusive")[::2] if len(rounds) > 1 else [value] * 2
        return ratio

    def __str__(self):
        return "{:.2f} ({:.2f} to {:.2f})".format(self, *self.quartiles)


def ratio(clocks, a, b):
    "Return the CPU time of `a` as a multiple of that of `b`, by the least times. Interleaved rounds give the spread"
    rounds = [x.cpu / y.cpu for x, y in zip(clocks[a], clocks[b])]
    return Ratio(min_cpu(clocks[a]) / min_cpu(clocks[b]), rounds)


def timing_columns(
    clocks,  # Timings of one function
    unit="ms",  # s | ms | µs
    calls=1,  # Number of calls in each timing
):  # {column title: value}
    "Return the least and median CPU time and the least wall time of a call"
    scale = {"s": 1, "ms": 1e3, "µs": 1e6}[unit] / calls
    cpu = [scale * clock.cpu for clock in clocks]
    wall = min(scale * clock.wall for clock in clocks)
    return {f"least CPU {unit}": min(cpu), f"median CPU {unit}": statistics.median(cpu), f"least wall {unit}": wall}


def load_corpus(
    quick,  # Use the embedded corpus, which needs no network
    **config,  # Fields of `RunConfig`
):  # (RunConfig, RunData)
    "Load tinyshakespeare by characters with 90% for training, or the embedded corpus with a note if it is unavailable"
    cfg = RunConfig(
        **{"tokenizer": "chars", "data": "pydocs" if quick else "tinyshakespeare", "split": "first90", **config}
    )
    try:
        data = load_data(cfg, log_fn=None)
    except DataError as error:
        print(
            f"{error}\nUsing the embedded corpus instead. The goals are for tinyshakespeare: compare ratios, not losses."
        )
        cfg.data = "pydocs"
        data = load_data(cfg, log_fn=None)
    sizes = ", ".join(f"{part} {len(tokens):,}" for part, tokens in data.tokens.items())
    print(f"{cfg.data}: {sizes} characters, {data.tokenizer.vocab_size} different ids")
    return cfg, data


def build_parts(
    cfg,  # `RunConfig`
    data,  # From `load_corpus`
    **model,  # Configuration values of the architecture
):  # (new model, training batches, batches that cover the validation split)
    "Build what a `Trainer` needs, as `lmnotes.run` does"
    torch.manual_seed(cfg.seed)
    size = dict(vocab_size=data.tokenizer.vocab_size, ctx_len=cfg.ctx_len)
    lm = new_lm(cfg.arch, cfg.preset, **size, **{"dropout": 0.0, **model})
    batches = get_batches(data.tokens["train"], cfg.batch_size, cfg.ctx_len, cfg.seed, cfg.sampler)
    return lm, batches, EvaluationBatches(data.tokens["val"].ids, 64, cfg.ctx_len)


def report(
    args,  # From `parse_options`
    rows,  # One dict per row of the table
    goals,  # [(description of the goal, measured value, True if met or None for a figure without goal)]
):
    "Print the table and the goals, and exit with 1 if a goal is missed and `--check` was given"
    print(f"\n{Table(rows)}\n")
    if args.quick:
        print("quick run: goals not checked")
        return
    for goal, value, met in goals:
        print(f"{'    ' if met is None else 'PASS' if met else 'FAIL'}  {goal}: {value}")
    print(machine_load())
    if path := os.environ.get("BENCHMARK_GOALS"):  # Set by `python -m benchmarks`
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps([goal, str(value), met]) + "\n" for goal, value, met in goals)
    if args.check and any(met is False for _, _, met in goals):
        sys.exit(1)
