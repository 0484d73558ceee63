"""Batches: what it costs to make one, as a part of a training step of the 0.8 M parameter model.

Batches of 12 x 64 characters from the memory-mapped token file, one for each step: random windows (lmnotes' default),
windows in epochs, and nanoGPT's stack of slices. One thread.
"""

from common import corpus, figures, finish, interleave, least, options, parts  # isort: skip
from itertools import count

from nanogpt import CPU_BATCH, CPU_RECIPE, Loop, NanoGPT

from lmnotes.data.batches import get_batches
from lmnotes.training.trainer import Trainer


def main():
    args = options(__doc__, rounds=(20, "timed rounds of each"))
    rounds, many = (2, 5) if args.quick else (args.rounds, 200)
    cfg, data = corpus(args.quick, ctx_len=CPU_RECIPE["block_size"], batch_size=CPU_BATCH, steps=10**6, preset="tiny")
    lm, _, _ = parts(cfg, data)
    train = data.tokens["train"]
    sources = {
        f"lmnotes, {name}": get_batches(train, CPU_BATCH, cfg.ctx_len, sampler=name) for name in ("random", "epochs")
    }
    peer = Loop(NanoGPT(data.tokenizer.vocab_size, **CPU_RECIPE), train.ids, CPU_BATCH, 1)
    steps = count()

    def drawn(source):
        "A function that makes `many` batches of successive steps"
        return lambda: [source[next(steps)] for _ in range(many)]

    drawing = {name: drawn(source) for name, source in sources.items()}
    drawing["nanoGPT, slices"] = lambda: [peer.batch() for _ in range(many)]
    clocks = interleave(drawing, rounds)
    step = interleave({"step": Trainer(lm, sources["lmnotes, random"], cfg).train_step}, rounds, warmup=3)["step"]
    part = {name: least(of) / many / least(step) for name, of in clocks.items()}
    rows = [
        {"batches": name, **figures(of, "µs", many), "part of a step": f"{part[name]:.2%}"}
        for name, of in clocks.items()
    ]
    rows.append({"batches": "(a whole training step)", **figures(step, "µs")})
    worst = max(part[name] for name in sources)
    finish(args, rows, [("at most 1% of a step", f"{worst:.2%}", worst <= 0.01)])


if __name__ == "__main__":
    main()
