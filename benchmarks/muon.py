"""Muon: time of a training step compared with AdamW, for the default model, the preset `tiny` and 10.7 M parameters.

All train the same model on the same batches, one step of each in turn, in the dtype that `dtype="auto"` chooses here. Then the sizes of
`COURSES` train from random weights with each optimizer's default learning rate. For every loss that AdamW reaches, averaged over 20
steps, we compare the CPU seconds until then with those that Muon needed.
"""

from common import Clock, load_corpus, timing_columns, report, interleave, ratio, parse_options, build_parts  # isort: skip
import copy

from lmnotes.core import pick_dtype
from lmnotes.training.trainer import Trainer

MODELS = {  # Name: (run parameters, shape, largest ratio to AdamW's step)
    "default": ({}, {}, 1.25),
    "tiny": (dict(preset="tiny"), {}, 1.15),
    "10.7 M, 8 x 256": (dict(batch_size=8, ctx_len=256), dict(n_layers=6, d_model=384, n_heads=6), 1.25),
}

COURSES = {"tiny": 300, "10.7 M, 8 x 256": 100}  # {model: training steps}


def courses(cfg, data, shape, steps):
    "Train with Muon and AdamW, ten steps of each in turn. Return {optimizer: [(CPU seconds so far, loss of 20 steps), ...]}"
    trainers, clocks, losses = {}, {}, {}
    for name in ("muon", "adamw"):
        own = copy.copy(cfg)
        own.optimizer, own.steps = name, steps
        lm, batches, _ = build_parts(own, data, **shape)
        trainers[name], clocks[name], losses[name] = Trainer(lm, batches, own), Clock(), []
    course = {name: [] for name in trainers}
    for t in range(steps):
        for name, trainer in trainers.items() if t % 10 == 0 else ():
            for _ in range(min(10, steps - t)):
                with clocks[name]:
                    trainer.train_step()
                losses[name].append(trainer.last_metrics["loss"])
                course[name].append((clocks[name].cpu, sum(losses[name][-20:]) / len(losses[name][-20:])))
    return course


def slowest_share(course):
    "Return the largest quotient of Muon's and AdamW's CPU seconds until a loss that AdamW has reached"
    reached, best = [], float("inf")
    for seconds, loss in course["adamw"][20:]:
        if loss < best:
            best = loss
            reached.append(next((s for s, other in course["muon"] if other <= loss), float("inf")) / seconds)
    return max(reached)


def main():
    args = parse_options(__doc__, rounds=(12, "timed steps of each"))
    dtype = pick_dtype("cpu")[0]
    print(dtype)
    steps = {}
    for model, (changes, shape, _) in MODELS.items():
        for optimizer in ("muon", "adamw"):
            cfg, data = load_corpus(args.quick, **changes, optimizer=optimizer, dtype=dtype, steps=1000)
            lm, batches, _ = build_parts(cfg, data, **({} if args.quick else shape))
            steps[model, optimizer] = Trainer(lm, batches, cfg).train_step
    clocks = interleave(steps, 1 if args.quick else args.rounds)
    ratios = {model: ratio(clocks, (model, "muon"), (model, "adamw")) for model in MODELS}
    rows = [dict(model=model, optimizer=optimizer, **timing_columns(of)) for (model, optimizer), of in clocks.items()]
    bars = [
        (f"a step of {model} takes at most {bar} times as long as with AdamW", ratios[model], ratios[model] <= bar)
        for model, (_, _, bar) in MODELS.items()
    ]
    for model, n in COURSES.items():
        changes, shape, _ = MODELS[model]
        cfg, data = load_corpus(args.quick, **changes, optimizer="muon", dtype=dtype, steps=n)
        course = courses(cfg, data, {} if args.quick else shape, 30 if args.quick else n)
        if not args.quick:
            share = slowest_share(course)
            bars.append(
                (f"{model}: CPU time to each loss as a share of AdamW's, at most 1", f"{share:.2f}", share <= 1)
            )
    report(args, rows, bars)


if __name__ == "__main__":
    main()
