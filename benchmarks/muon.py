"""Muon: time of a training step compared with AdamW, for the default model and the preset `tiny`.

Both train the same model on the same batches, one step of each in turn, in the dtype that `dtype="auto"` chooses here. To measure
the instruction sets of other CPUs on this one, cap it: `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/muon.py`.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import torch

from lmnotes.core import pick_dtype
from lmnotes.training.trainer import Trainer


def main():
    args = parse_options(__doc__, rounds=(12, "timed steps of each"))
    dtype = pick_dtype("cpu")[0]
    print(f"{torch.backends.cpu.get_cpu_capability()}, {dtype}")
    steps = {}
    for preset in ("", "tiny"):
        for optimizer in ("muon", "adamw"):
            cfg, data = load_corpus(args.quick, preset=preset, optimizer=optimizer, dtype=dtype, steps=1000)
            lm, batches, _ = build_parts(cfg, data)
            steps[preset or "default", optimizer] = Trainer(lm, batches, cfg).train_step
    clocks = interleave(steps, 1 if args.quick else args.rounds)
    best = {name: min_cpu(of) for name, of in clocks.items()}
    ratios = {model: best[model, "muon"] / best[model, "adamw"] for model in ("default", "tiny")}
    rows = [dict(model=model, optimizer=optimizer, **timing_columns(of)) for (model, optimizer), of in clocks.items()]
    bars = [
        (f"a step of the {model} model is at most 1.5 times AdamW's", f"{ratio:.2f}", ratio <= 1.5)
        for model, ratio in ratios.items()
    ]
    report(args, rows, bars)


if __name__ == "__main__":
    main()
