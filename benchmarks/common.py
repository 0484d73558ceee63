"""What the benchmarks share: their options, their data, fair timing, and how a result is shown.

Import this before torch: it decides how many threads there are.
"""

# ruff: noqa: E402
import argparse
import os
import statistics
import sys
import time

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

import torch

from lmnotes.core import DataError, versions
from lmnotes.data.batches import EvaluationBatches, get_batches
from lmnotes.inference.evaluation import Table
from lmnotes.nn.lm import new_lm
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import load_data

torch.set_num_threads(THREADS)


def options(
    description,  # Of the script
    **more,  # Further options: name=(default, help)
):  # Namespace with `quick`, `check` and those
    "The command line of a benchmark, after which the machine is described"
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only see that it runs, in seconds; nothing is judged")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    for name, (default, text) in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    args = parser.parse_args()
    about = " ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"{description.splitlines()[0]}\n{about}, {torch.get_num_threads()} of {os.cpu_count()} threads, {load()}",
        flush=True,
    )
    return args


def load():
    "How busy the machine has been in the last minute"
    return f"load {os.getloadavg()[0]:.1f}"


class Clock:
    "Seconds spent inside its `with` blocks: `cpu` of this process, all threads together, and `wall`"

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
    rounds,  # How often each is timed
    warmup=1,  # How often each is called before that
):  # {name: [Clock, …]}
    "Time functions in turn, so that whatever else the machine does falls on all of them alike"
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


def least(clocks):
    "The least CPU seconds of several timings: what is left when nothing disturbs"
    return min(clock.cpu for clock in clocks)


def figures(
    clocks,  # Of one function
    unit="ms",  # s | ms | µs
    calls=1,  # In each timing
):  # Cells of a table
    "Least and median CPU time, and least wall time, of a call"
    scale = {"s": 1, "ms": 1e3, "µs": 1e6}[unit] / calls
    cpu = [scale * clock.cpu for clock in clocks]
    wall = min(scale * clock.wall for clock in clocks)
    return {f"least CPU {unit}": min(cpu), f"median CPU {unit}": statistics.median(cpu), f"least wall {unit}": wall}


def corpus(
    quick,  # Take the embedded corpus, which needs no network
    **config,  # Fields of `RunConfig`
):  # (RunConfig, RunData)
    "tinyshakespeare by characters, 90% to train on; where it cannot be had, the embedded corpus, and that is said"
    cfg = RunConfig(
        **{"tokenizer": "chars", "data": "pydocs" if quick else "tinyshakespeare", "split": "first90", **config}
    )
    try:
        data = load_data(cfg, log_fn=None)
    except DataError as error:
        print(
            f"{error}\nThe embedded corpus takes its place. The bars were set on tinyshakespeare: read ratios, not losses."
        )
        cfg.data = "pydocs"
        data = load_data(cfg, log_fn=None)
    sizes = ", ".join(f"{part} {len(tokens):,}" for part, tokens in data.tokens.items())
    print(f"{cfg.data}: {sizes} characters, {data.tokenizer.vocab_size} different ids")
    return cfg, data


def parts(
    cfg,
    data,  # From `corpus`
    **model,  # Configuration values of the architecture
):  # (a new model, training batches, batches that cover the validation split)
    "What a `Trainer` needs, as `lmnotes.run` makes it"
    torch.manual_seed(cfg.seed)
    size = dict(vocab_size=data.tokenizer.vocab_size, ctx_len=cfg.ctx_len)
    lm = new_lm(cfg.arch, cfg.preset, **size, **{"dropout": 0.0, **model})
    batches = get_batches(data.tokens["train"], cfg.batch_size, cfg.ctx_len, cfg.seed, cfg.sampler)
    return lm, batches, EvaluationBatches(data.tokens["val"].ids, 64, cfg.ctx_len)


def finish(
    args,  # From `options`
    rows,  # Dicts, one for each row of the table
    bars,  # [(what is asked for, the figure found, whether it is met)]
):
    "Show the table and the bars; leave with 1 if one is missed and `--check` was given"
    print(f"\n{Table(rows)}\n")
    if args.quick:
        print("quick run: nothing is judged")
        return
    for bar, found, met in bars:
        print(f"{'PASS' if met else 'FAIL'}  {bar}: {found}")
    print(load())
    if args.check and not all(met for _, _, met in bars):
        sys.exit(1)
