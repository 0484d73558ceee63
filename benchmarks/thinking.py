"""Models of `arch='bytepatch'` with 0, 1, 3 and 5 thinking steps, at equal training steps and at equal CPU time.

We train models of the same size on the same bytes with lmnotes' optimizer. First we time all of them in interleaved turns of a few steps.
Then we train each from scratch for `--steps` steps, and again for the number of steps that costs as much CPU time as training with three
thinking steps. `--design agiformer` uses AGIFORMER's model, reduced, instead of the default. We evaluate on an evenly spread part of the
validation split.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import copy

from lmnotes.data.batches import EvaluationBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.training.trainer import Trainer

DEPTHS = 0, 1, 3, 5


def new_trainer(cfg, data, args, depth, steps):
    "Return the trainer of a new model with `depth` thinking steps"
    own = copy.copy(cfg)
    vars(own).update(arch="bytepatch", preset=args.design, steps=steps)
    shape = dict(d_model=32, n_layers=1, n_heads=2) if args.quick else dict(d_model=128, n_layers=4, n_heads=4)
    lm, batches, _ = build_parts(own, data, thinking_steps=depth, **shape)
    return Trainer(lm, batches, own)


def main():
    args = parse_options(
        __doc__,
        steps=(500, "length of the runs at equal steps"),
        rounds=(6, "timed turns of all models"),
        design=("", "preset, for example agiformer"),
        data=("stdlib", "a corpus, or bytes:PATH for any file"),
    )
    steps, rounds, turn, limit = (4, 1, 2, 2) if args.quick else (args.steps, args.rounds, 5, 200)
    size = dict(tokenizer="bytes", ctx_len=128 if args.quick else 1024, batch_size=4)
    cfg, data = load_corpus(args.quick, **size, **({} if args.quick else dict(data=args.data, split="enwik8")))
    val = EvaluationBatches(data.tokens["val"].ids, 8, cfg.ctx_len).subset(limit)

    def some_steps(trainer):
        return lambda: [trainer.train_step() for _ in range(turn)]

    timed = {depth: some_steps(new_trainer(cfg, data, args, depth, 10_000)) for depth in DEPTHS}
    clocks, rows, done = interleave(timed, rounds), [], {}
    for depth in DEPTHS:
        equal = round(steps * min_cpu(clocks[3]) / min_cpu(clocks[depth]))
        row = dict(thinking=depth, **timing_columns(clocks[depth], calls=turn))
        for name, n in {"equal steps": steps, "equal time": equal}.items():
            if n not in done.get(depth, {}):
                t = new_trainer(cfg, data, args, depth, n).fit()
                result = evaluate(t.lm, val, data.tokenizer.byte_lengths, t.autocast)
                done.setdefault(depth, {})[n] = result
            result = done[depth][n]
            row |= {f"{name}: steps": n, f"{name}: bpb": result["bpb"], f"{name}: ±": result["bpb_stderr"]}
        print(row, flush=True)
        rows.append(row)
    report(args, rows, [])


if __name__ == "__main__":
    main()
