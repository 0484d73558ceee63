"""Batches: cost of making one, as a share of a training step of the 0.8 M parameter model.

Each step makes one batch of 12 x 64 characters from the memory-mapped token file: random sequences (lmnotes' default),
sequences in epochs, or nanoGPT's stack of slices. All run on one thread.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
from itertools import count

from nanogpt import CPU_BATCH, CPU_RECIPE, Loop, NanoGPT

from lmnotes.data.batches import get_batches
from lmnotes.training.trainer import Trainer


def main():
    args = parse_options(__doc__, rounds=(20, "timed rounds of each"))
    rounds, many = (2, 5) if args.quick else (args.rounds, 200)
    cfg, data = load_corpus(
        args.quick, ctx_len=CPU_RECIPE["block_size"], batch_size=CPU_BATCH, steps=10**6, preset="tiny"
    )
    lm, _, _ = build_parts(cfg, data)
    train = data.tokens["train"]
    sources = {
        f"lmnotes, {name}": get_batches(train, CPU_BATCH, cfg.ctx_len, sampler=name) for name in ("random", "epochs")
    }
    peer = Loop(NanoGPT(data.tokenizer.vocab_size, **CPU_RECIPE), train.ids, CPU_BATCH, 1)
    steps = count()

    def drawn(source):
        "Return a function that makes `many` batches of successive steps"
        return lambda: [source[next(steps)] for _ in range(many)]

    drawing = {name: drawn(source) for name, source in sources.items()}
    drawing["nanoGPT, slices"] = lambda: [peer.batch() for _ in range(many)]
    clocks = interleave(drawing, rounds)
    step = interleave({"step": Trainer(lm, sources["lmnotes, random"], cfg).train_step}, rounds, warmup=3)["step"]
    part = {name: min_cpu(of) / many / min_cpu(step) for name, of in clocks.items()}
    rows = [
        {"batches": name, **timing_columns(of, "µs", many), "share of a step": f"{part[name]:.2%}"}
        for name, of in clocks.items()
    ]
    rows.append({"batches": "(a whole training step)", **timing_columns(step, "µs")})
    worst = max(part[name] for name in sources)
    report(args, rows, [("at most 1% of a step", f"{worst:.2%}", worst <= 0.01)])


if __name__ == "__main__":
    main()
