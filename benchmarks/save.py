"""Saving: a durable, hashed checkpoint against a plain `torch.save` of the same tensors.

Both write the weights and optimizer state of a model with AdamW, in float32. The durable checkpoint is checked for non-finite
numbers, hashed with SHA-256, flushed to disk and renamed into place. We measure wall time, because CPU time does not include the disk.
The plain save is timed without flushing, as it is normally used. Sizes: 0.8 M parameters (10 MB) and 10.7 M (128 MB).
"""

from common import load_corpus, report, interleave, parse_options, build_parts  # isort: skip
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from lmnotes.nn.lm import n_params
from lmnotes.training.checkpoint import save_checkpoint
from lmnotes.training.trainer import Trainer


def measure(
    shape,  # Configuration values of the model
    folder,  # Empty folder to write to
    rounds,  # Timed saves of each kind
    quick,  # Use the embedded corpus
):  # (row of the table, True if the goal is met)
    "Measure both saves of one model"
    cfg, data = load_corpus(quick, ctx_len=64, batch_size=2, steps=10, optimizer="adamw")
    lm, batches, _ = build_parts(cfg, data, **shape)
    trainer = Trainer(lm, batches, cfg).fit(1)

    def plain():
        torch.save((lm.state_dict(), trainer.state_dict()), folder / "plain.pt")

    def durable():
        save_checkpoint(folder, lm, trainer.step, trainer.state_dict())

    def remove_durable():
        shutil.rmtree(folder / "step_00000001", ignore_errors=True)

    clocks = interleave({"plain": plain, "durable": durable, "": remove_durable}, rounds)
    wall = {name: min(clock.wall for clock in of) for name, of in clocks.items()}
    median = {name: statistics.median(clock.wall for clock in of) for name, of in clocks.items()}
    size = (folder / "plain.pt").stat().st_size
    extra, allowed = wall["durable"] - wall["plain"], 0.015 + 1.5 * size / 1e9
    row = {
        "parameters": n_params(lm),
        "MB": size / 1e6,
        "plain ms": 1e3 * wall["plain"],
        "durable ms": 1e3 * wall["durable"],
    }
    row |= {"median durable ms": 1e3 * median["durable"], "more ms": 1e3 * extra, "allowed ms": 1e3 * allowed}
    return row, extra <= allowed


def main():
    args = parse_options(__doc__, rounds=(7, "timed saves of each"))
    shapes = [dict(n_layers=2, d_model=32)] if args.quick else [dict(), dict(n_layers=6, n_heads=6, d_model=384)]
    rows, bars = [], []
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:  # On disk: /tmp may be in memory
            row, met = measure(shape, Path(folder), 1 if args.quick else args.rounds, args.quick)
        rows.append(row)
        bar = f"{row['MB']:.0f} MB: at most 15 ms + 1.5 s/GB more than a plain save"
        bars.append((bar, f"{row['more ms']:.0f} of {row['allowed ms']:.0f} ms", met))
    report(args, rows, bars)


if __name__ == "__main__":
    main()
