"""Ten minutes: full-validation loss on tinyshakespeare from scratch within a fixed wall time on two threads.

We first measure the time of a training step, on the model that we then train. From this and the remaining budget
follows the number of steps, so that the learning rate reaches zero just before the time is over. The budget includes
reading the data, measuring, training and the final evaluation of the whole split.
"""

# ruff: noqa: E402
import os
import time

START = time.perf_counter()
os.environ.setdefault("OMP_NUM_THREADS", "2")

from common import load_corpus, report, parse_options, build_parts  # isort: skip

from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Log, Trainer, format_duration

SHAPE = dict(n_layers=6, n_heads=4, d_model=256, dropout=0.1)
SIZE = dict(ctx_len=256, batch_size=16, lr=0.01)


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def plan(
    left,  # Remaining seconds
    step,  # Seconds per step
    evaluation,  # Seconds of the final evaluation
    margin=0.04,  # Fraction of the time in reserve, in case the machine gets slower
):  # Steps
    "Return the number of steps that fit"
    return max(1, int(((1 - margin) * left - evaluation) / step))


def main():
    args = parse_options(__doc__, seconds=(600, "total wall time"), seed=(0, "seed of the run"))
    budget, shape = (20, dict(SHAPE, n_layers=2, d_model=64)) if args.quick else (args.seconds, SHAPE)
    cfg, data = load_corpus(args.quick, **SIZE, seed=args.seed, steps=1000)

    lm, batches, val = build_parts(cfg, data, **shape)
    trial = Trainer(lm, batches, cfg)
    tries = [seconds_of(trial.train_step) for _ in range(3)]
    while sum(tries) < budget / 50:
        tries.append(seconds_of(trial.train_step))
    step = sorted(tries)[len(tries) // 2]
    some = val.subset(1)
    evaluation = seconds_of(lambda: evaluate(lm, some, autocast=trial.autocast)) * len(val)
    cfg.steps = plan(budget - (time.perf_counter() - START), step, evaluation)
    if args.quick:
        cfg.steps = min(cfg.steps, 20)
    print(
        f"{1e3 * step:.0f} ms a step, {evaluation:.1f} s for the evaluation: {cfg.steps:,} steps in the rest of {format_duration(budget)}"
    )

    lm, batches, val = build_parts(cfg, data, **shape)  # From scratch
    trainer = Trainer(lm, batches, cfg, [Log(print_fn=lambda line: print(line, flush=True))])
    trainer.fit()
    result = evaluate(lm, some if args.quick else val, autocast=trainer.autocast)
    took = time.perf_counter() - START
    row = {"parameters": n_params(lm), "steps": cfg.steps, "tokens": trainer.counters["tokens"], "wall s": took}
    report(
        args,
        [row | {"CPU s": time.process_time(), "loss": result["loss"]}],
        [
            ("full-validation loss at most 1.50", f"{result['loss']:.4f}", result["loss"] <= 1.50),
            (f"within {budget} seconds", f"{took:.0f} s", took <= budget),
        ],
    )


if __name__ == "__main__":
    main()
