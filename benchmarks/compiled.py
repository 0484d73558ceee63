"""torch.compile: time to compile a training step, and what it saves, at 10.7 M parameters and in the preset `tiny`.

The optimizer is AdamW, as in throughput.py. The time to compile is that of the first two steps, with an empty cache of compiled code.
`compile="auto"` uses these figures: `COMPILE_SECONDS` and `COMPILE_GAIN` of `lmnotes.training.trainer`.
"""

from common import Clock, load_corpus, timing_columns, report, interleave, parse_options, ratio  # isort: skip
import os
import tempfile

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()

from nanogpt import Loop, NanoGPT
from throughput import lmnotes_step

from lmnotes.core import pick_dtype

SHAPES = {
    "10.7 M": (dict(n_layers=6, n_heads=6, d_model=384), dict(ctx_len=256, batch_size=8)),
    "tiny": (dict(n_layers=4, n_heads=4, d_model=128), dict(ctx_len=64, batch_size=12)),
}


def main():
    args = parse_options(__doc__, rounds=(8, "timed steps of each"))
    shapes = {"tiny": SHAPES["tiny"]} if args.quick else SHAPES
    rows, goals = [], []
    for name, (shape, sizes) in shapes.items():
        steps = {}
        for dtype in dict.fromkeys(["float32", pick_dtype("cpu")[0]]):
            for compiled in (False, True):
                settings = dict(sizes, steps=1000, optimizer="adamw", dtype=dtype, compile=compiled)
                cfg, data = load_corpus(args.quick, **settings)
                _, step = lmnotes_step(data, cfg, **shape)
                with (first := Clock()):
                    step()
                    step()
                steps[dtype, compiled] = step
                if compiled:
                    rows.append(
                        {"step": f"{name}, {dtype}, the first two, compiled", "least wall ms": 1e3 * first.wall}
                    )
        peer = NanoGPT(
            data.tokenizer.vocab_size, sizes["ctx_len"], shape["n_layers"], shape["n_heads"], shape["d_model"]
        )
        steps["nanoGPT"] = Loop(peer, data.tokens["train"].ids, sizes["batch_size"], 1000).train_step
        clocks = interleave(steps, 1 if args.quick else args.rounds)
        for key, of in clocks.items():
            title = key if key == "nanoGPT" else f"{key[0]}, {'compiled' if key[1] else 'eager'}"
            rows.append({"step": f"{name}, {title}", **timing_columns(of)})
        for dtype in dict.fromkeys(key[0] for key in clocks if key != "nanoGPT"):
            gain = ratio(clocks, (dtype, False), (dtype, True))
            goals.append((f"{name}, {dtype}: compiled, times the speed of the eager step", gain, None))
            times, goal = ratio(clocks, "nanoGPT", (dtype, True)), (name, dtype) == ("10.7 M", "float32")
            title = f"{name}, {dtype}, compiled: times the speed of nanoGPT{' (goal 1.35)' * goal}"
            goals.append((title, times, times >= 1.35 if goal else None))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
