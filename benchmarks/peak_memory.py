"""Peak memory of training GPT-2's shape (124 M parameters, 50,257 ids) on 4 x 1,024 tokens: lmnotes, nanoGPT's loop and transformers.

Each trains two steps with AdamW in float32, in a new process. We measure the growth of its peak resident memory after the imports.
"""

from common import parse_options, report  # isort: skip
import multiprocessing
import resource
import time

import torch
from nanogpt import NanoGPT

from lmnotes.data.batches import Batch
from lmnotes.nn.lm import new_lm
from lmnotes.training.trainer import TrainConfig, Trainer


def of_lmnotes(x, y, shape):
    lm = new_lm(
        "gpt2", vocab_size=shape["vocab"], n_positions=x.shape[1], ctx_len=x.shape[1], dropout=0.0, **shape["ours"]
    )
    return Trainer(lm, [Batch(x, y)] * 2, TrainConfig(steps=2, optimizer="adamw", dtype="float32")).train_step


def by_loss(model, loss):
    "Return a plain training step"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def of_nanogpt(x, y, shape):
    model = NanoGPT(shape["vocab"], x.shape[1], *shape["peer"])
    return by_loss(model, lambda: model.loss(x, y))


def of_transformers(x, y, shape):
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd = shape["peer"]
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    sizes = dict(n_positions=x.shape[1], n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=shape["vocab"], bos_token_id=0, eos_token_id=0, **sizes, **no_dropout)
    )
    return by_loss(model, lambda: model(input_ids=x, labels=x).loss)


PROGRAMS = {"lmnotes": of_lmnotes, "nanoGPT": of_nanogpt, "transformers": of_transformers}


def measure(name, rows, length, shape, results):
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = torch.randint(shape["vocab"], (rows, length))
    step = PROGRAMS[name](x, x.roll(-1, 1), shape)
    start = time.process_time()
    step()
    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put((1024 * (peak - before), (time.process_time() - start) / 2))


def main():
    args = parse_options(__doc__, rows=(4, "sequences in a batch"))
    small = dict(vocab=500, ours=dict(d_model=64, n_layers=2, n_heads=2), peer=(2, 2, 64))
    large = dict(vocab=50257, ours={}, peer=(12, 12, 768))
    rows, context = [], multiprocessing.get_context("spawn")
    for name in PROGRAMS:
        results = context.SimpleQueue()
        sizes = (args.rows, 64, small) if args.quick else (args.rows, 1024, large)
        process = context.Process(target=measure, args=(name, *sizes, results))
        process.start()
        peak, seconds = results.get()
        process.join()
        rows.append({"program": name, "peak GB": peak / 1e9, "CPU s / step": seconds})
    ours, *others = (row["peak GB"] for row in rows)
    least = min(others)
    report(
        args,
        rows,
        [
            (
                "124 M, 4 x 1,024 tokens: at most the memory of nanoGPT and of transformers",
                f"{ours:.2f} and {least:.2f} GB",
                ours <= least,
            )
        ],
    )


if __name__ == "__main__":
    main()
