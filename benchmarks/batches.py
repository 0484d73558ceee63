"""Batches: cost of making one, as a share of a training step of the 0.8 M parameter model, for every sampler and for 1, 10 and 1,000 million tokens.

Each step makes one batch of 12 x 64 tokens from a memory-mapped file, whose ids are all zero, with four domains and documents of 500 tokens on average.
The peer is nanoGPT's stack of slices. All run on one thread.
"""

from common import timing_columns, report, interleave, min_cpu, parse_options, load_corpus, build_parts  # isort: skip
import tempfile
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from nanogpt import CPU_BATCH, CPU_RECIPE, Loop, NanoGPT

from lmnotes.data.batches import SAMPLERS, get_batches
from lmnotes.training.trainer import Trainer


def tokens_of(path, n):
    "Return `n` ids, in a file without blocks on the disk, with domains and starts of documents"
    with open(path, "wb") as f:
        f.truncate(2 * n)
    cuts = [0, n // 10, n // 2, n * 9 // 10, n]
    starts = np.sort(np.random.default_rng(0).choice(n, n // 500, replace=False))
    domains = {f"d{i}": span for i, span in enumerate(zip(cuts, cuts[1:]))}
    return SimpleNamespace(ids=np.memmap(path, np.uint16, "r"), domains=domains, doc_starts=starts)


def main():
    args = parse_options(__doc__, rounds=(10, "timed rounds of each"))
    rounds, many, T = (2, 5, 64) if args.quick else (args.rounds, 200, CPU_RECIPE["block_size"])
    cfg, data = load_corpus(args.quick, ctx_len=T, batch_size=CPU_BATCH, steps=10**6, preset="tiny")
    lm, source, _ = build_parts(cfg, data)
    step = interleave({"step": Trainer(lm, source, cfg).train_step}, rounds, warmup=3)["step"]
    rows, worst, steps = [], 0.0, count()
    with tempfile.TemporaryDirectory() as folder:
        for millions in (0.1,) if args.quick else (1, 10, 1000):
            tokens, drawing, seconds = tokens_of(Path(folder) / "ids.bin", int(millions * 1e6)), {}, {}
            for sampler in SAMPLERS[1:]:
                start = time.process_time()
                batches = get_batches(tokens, CPU_BATCH, T, sampler=sampler, start_id=0)
                batches[0]
                seconds[sampler] = time.process_time() - start
                drawing[sampler] = lambda batches=batches: [batches[next(steps)] for _ in range(many)]
            peer = Loop(NanoGPT(64, **CPU_RECIPE), tokens.ids, CPU_BATCH, 1)
            drawing["nanoGPT, slices"] = lambda peer=peer: [peer.batch() for _ in range(many)]
            for name, of in interleave(drawing, rounds).items():
                share = min_cpu(of) / many / min_cpu(step)
                worst = max(worst, share if name in SAMPLERS else 0.0)
                row = {"million tokens": millions, "sampler": name, **timing_columns(of, "µs", many)}
                rows.append(row | {"share of a step": f"{share:.2%}", "s to the first": seconds.get(name, 0.0)})
    report(args, rows, [("every sampler takes at most 1% of a step", f"{worst:.2%}", worst <= 0.01)])


if __name__ == "__main__":
    main()
