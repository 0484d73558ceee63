"""Muon: the default optimizer's training step beside AdamW's, for the default model and the preset `tiny`.

Both train the same model on the same batches, one step of each in turn, in the dtype that `dtype="auto"` chooses here. To see
other CPUs' instruction sets on this one, cap it: `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/muon.py`.
"""

from common import corpus, figures, finish, interleave, least, options, parts  # isort: skip
import torch

from lmnotes.core import pick_dtype
from lmnotes.training.trainer import Trainer


def main():
    args = options(__doc__, rounds=(12, "timed steps of each"))
    dtype = pick_dtype("cpu")[0]
    print(f"{torch.backends.cpu.get_cpu_capability()}, {dtype}")
    steps = {}
    for preset in ("", "tiny"):
        for optimizer in ("muon", "adamw"):
            cfg, data = corpus(args.quick, preset=preset, optimizer=optimizer, dtype=dtype, steps=1000)
            lm, batches, _ = parts(cfg, data)
            steps[preset or "default", optimizer] = Trainer(lm, batches, cfg).train_step
    clocks = interleave(steps, 1 if args.quick else args.rounds)
    best = {name: least(of) for name, of in clocks.items()}
    ratios = {model: best[model, "muon"] / best[model, "adamw"] for model in ("default", "tiny")}
    rows = [dict(model=model, optimizer=optimizer, **figures(of)) for (model, optimizer), of in clocks.items()]
    bars = [
        (f"a step of the {model} model is at most 1.5 times AdamW's", f"{ratio:.2f}", ratio <= 1.5)
        for model, ratio in ratios.items()
    ]
    finish(args, rows, bars)


if __name__ == "__main__":
    main()
