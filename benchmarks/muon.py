"""Muon: time of a training step compared with AdamW, for the default model, the preset `tiny` and 10.7 M parameters.

All train the same model on the same batches, one step of each in turn, in the dtype that `dtype="auto"` chooses here.
"""

from common import load_corpus, timing_columns, report, interleave, ratio, parse_options, build_parts  # isort: skip
from lmnotes.core import pick_dtype
from lmnotes.training.trainer import Trainer

MODELS = {  # Name: (run parameters, shape, largest ratio to AdamW's step)
    "default": ({}, {}, 1.25),
    "tiny": (dict(preset="tiny"), {}, 1.15),
    "10.7 M, 8 x 256": (dict(batch_size=8, ctx_len=256), dict(n_layers=6, d_model=384, n_heads=6), 1.25),
}


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
    report(args, rows, bars)


if __name__ == "__main__":
    main()
