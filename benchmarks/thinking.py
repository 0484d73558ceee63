"""What steps of thinking are worth to `arch='bytepatch'`: 0, 1, 3 and 5 of them, at equal steps and at equal CPU time.

Models of the same size train on the same bytes with lmnotes' optimizer. First all train in turns of a few steps, which are timed; then
each trains from the start for `--steps` steps, and once more for as many as cost what those of three steps of thinking cost.
`--design agiformer` is the guide's model, reduced; without it, the default. Judged on a part of the validation split, spread evenly.
"""

from common import corpus, figures, finish, interleave, least, options, parts  # isort: skip
import copy

from lmnotes.data.batches import EvaluationBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.training.trainer import Trainer

DEPTHS = 0, 1, 3, 5


def new_trainer(cfg, data, args, depth, steps):
    "A model of so many steps of thinking, and what trains it"
    own = copy.copy(cfg)
    vars(own).update(arch="bytepatch", preset=args.design, steps=steps)
    shape = dict(d_model=32, n_layers=1, n_heads=2) if args.quick else dict(d_model=128, n_layers=4, n_heads=4)
    lm, batches, _ = parts(own, data, thinking_steps=depth, **shape)
    return Trainer(lm, batches, own)


def main():
    args = options(
        __doc__,
        steps=(500, "length of the runs at equal steps"),
        rounds=(6, "turns in which all are timed"),
        design=("", "preset: agiformer for the guide's"),
        data=("stdlib", "a corpus, or bytes:PATH for any file"),
    )
    steps, rounds, turn, limit = (4, 1, 2, 2) if args.quick else (args.steps, args.rounds, 5, 200)
    size = dict(tokenizer="bytes", ctx_len=128 if args.quick else 1024, batch_size=4)
    cfg, data = corpus(args.quick, **size, **({} if args.quick else dict(data=args.data, split="enwik8")))
    val = EvaluationBatches(data.tokens["val"].ids, 8, cfg.ctx_len).subset(limit)

    def some_steps(trainer):
        return lambda: [trainer.train_step() for _ in range(turn)]

    timed = {depth: some_steps(new_trainer(cfg, data, args, depth, 10_000)) for depth in DEPTHS}
    clocks, rows, done = interleave(timed, rounds), [], {}
    for depth in DEPTHS:
        equal = round(steps * least(clocks[3]) / least(clocks[depth]))
        row = dict(thinking=depth, **figures(clocks[depth], calls=turn))
        for name, n in {"equal steps": steps, "equal time": equal}.items():
            if n not in done.get(depth, {}):
                t = new_trainer(cfg, data, args, depth, n).fit()
                result = evaluate(t.lm, val, data.tokenizer.byte_lengths, t.autocast)
                done.setdefault(depth, {})[n] = result
            result = done[depth][n]
            row |= {f"{name}: steps": n, f"{name}: bpb": result["bpb"], f"{name}: ±": result["bpb_stderr"]}
        print(row, flush=True)
        rows.append(row)
    finish(args, rows, [])


if __name__ == "__main__":
    main()
