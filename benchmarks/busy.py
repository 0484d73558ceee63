"""Training on a busy machine: how much of their fair share threads get beside three busy processes for each core.

The system gives each busy thread an equal share of the cores. Threads that train wait for each other after every parallel
loop. A waiting thread that does not sleep uses up its share, and the other thread waits for a core meanwhile.
"""

from common import parse_options, report  # isort: skip
import os
import subprocess
import sys

from lmnotes.core import usable_cores

POLICIES = {
    "chosen by load": {},
    "spin (torch's default)": dict(OMP_WAIT_POLICY="", GOMP_SPINCOUNT="300000"),
    "sleep at once": dict(OMP_WAIT_POLICY="passive"),
}
TRAIN = """
import lmnotes, time
from lmnotes.data.batches import RandomBatches
from lmnotes.nn.lm import new_lm
from lmnotes.training.trainer import TrainConfig, Trainer
import numpy as np, sys
lm = new_lm("gpt", "", vocab_size=256, ctx_len=64, d_model=128, n_layers=4, n_heads=4)
ids = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
trainer = Trainer(lm, RandomBatches(ids, 12, 64), TrainConfig(steps=1_000_000, dtype="float32")).fit(until=3)
start, first = time.perf_counter(), trainer.step
while time.perf_counter() - start < float(sys.argv[1]):
    trainer.fit(until=trainer.step + 1)
print((trainer.step - first) * 12 * 64 / (time.perf_counter() - start))
"""


def tokens_per_second(seconds, **environ):
    "Train a small model in a new process with two threads, and return the tokens per second"
    known = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", TRAIN, str(seconds)]
    return float(subprocess.run(command, env=known | environ, check=True, capture_output=True, text=True).stdout)


def main():
    args = parse_options(__doc__, seconds=(15.0, "seconds of each measurement"))
    seconds, cores = 0.5 if args.quick else args.seconds, usable_cores()
    quiet = {name: tokens_per_second(seconds, **env) for name, env in POLICIES.items()}
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(1 if args.quick else 3 * cores)
    ]
    try:
        busy = {name: tokens_per_second(seconds, **env) for name, env in POLICIES.items()}
    finally:
        for other in others:
            other.kill()
            other.wait()
    share = cores / (cores + len(others))  # Of a core, for each of as many threads as cores
    rows = [
        {
            "waiting threads": n,
            "quiet tok/s": quiet[n],
            "busy tok/s": busy[n],
            "of fair share": busy[n] / quiet[n] / share,
        }
        for n in POLICIES
    ]
    got = busy["chosen by load"] / max(quiet.values()) / share
    kept = quiet["chosen by load"] / max(quiet.values())
    report(
        args,
        rows,
        [
            ("busy: at least 60% of the fair share of the fastest policy", f"{got:.0%}", got >= 0.6),
            ("quiet: at least 90% of the fastest policy", f"{kept:.0%}", kept >= 0.9),
        ],
    )


if __name__ == "__main__":
    main()
