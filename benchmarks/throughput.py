"""Throughput: training a 10.7 M parameter model (6 layers, 384 wide, context 256, batch 8).

The goals compare models with the same optimizer, AdamW, and the same dtype: lmnotes' trainer, nanoGPT's loop as published, and transformers'
GPT-2 of the same shape. transformers' `Trainer` needs accelerate, which lmnotes does not install. This file therefore
implements its loop (autocast, `loss.backward()`, clipping to 1, fused AdamW, a schedule) without its callbacks and data loader, which would
only slow it down. None has dropout, but for one row, which shows what dropout costs. Where bfloat16 is the faster dtype, lmnotes chooses it, and the table
has it too. See muon.py for the cost of the default optimizer and time_to_loss.py for its gain.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts, ratio  # isort: skip
import torch
from nanogpt import Loop, NanoGPT

from lmnotes.core import pick_dtype
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer


def transformers_step(batches, dtype, vocab_size, ctx_len, n_layers, n_heads, d_model):
    "Return (model, function that runs one training step) as transformers' `Trainer` does"
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(n_positions=ctx_len, n_layer=n_layers, n_head=n_heads, n_embd=d_model)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape, **no_dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 1000)
    batch = batches[0]

    def step():
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=batch.x, labels=batch.x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return model, step


def lmnotes_step(data, cfg, **model):
    "Return (model, function that runs one training step)"
    lm, batches, _ = build_parts(cfg, data, **model)
    return lm, Trainer(lm, batches, cfg).train_step


def main():
    args = parse_options(__doc__, rounds=(8, "timed steps of each"))
    n_layers, n_heads, d_model = (2, 2, 64) if args.quick else (6, 6, 384)
    shape = dict(n_layers=n_layers, n_heads=n_heads, d_model=d_model)
    steps, sizes = {}, {}
    for dtype in dict.fromkeys(["float32", pick_dtype("cpu")[0]]):
        cfg, data = load_corpus(args.quick, ctx_len=256, batch_size=8, steps=1000, optimizer="adamw", dtype=dtype)
        for name, dropout in {"lmnotes": 0.0, "lmnotes, dropout 0.1": 0.1}.items():
            sizes[name, dtype], steps[name, dtype] = lmnotes_step(data, cfg, **shape, dropout=dropout)
        vocab_size, ids = data.tokenizer.vocab_size, data.tokens["train"].ids
        hf = transformers_step(build_parts(cfg, data)[1], dtype, vocab_size, 256, **shape)
        sizes["transformers", dtype], steps["transformers", dtype] = hf
    peer = NanoGPT(vocab_size, 256, n_layers, n_heads, d_model)
    sizes["nanoGPT", "float32"], steps["nanoGPT", "float32"] = peer, Loop(peer, ids, 8, 1000).train_step

    clocks = interleave(steps, 1 if args.quick else args.rounds)
    rows = [
        {
            "training": f"{name}, {dtype}",
            "parameters": n_params(sizes[name, dtype]),
            **timing_columns(of),
            "tok/CPU s": round(8 * 256 / min_cpu(of)),
        }
        for (name, dtype), of in clocks.items()
    ]
    ours, peer = ("lmnotes", "float32"), ("nanoGPT", "float32")
    times = ratio(clocks, peer, ours)
    goals = [("10.7 M, float32: times the speed of nanoGPT (goal 1.2)", times, times >= 1.2)]
    for dtype in dict.fromkeys(dtype for _, dtype in clocks):
        cost = ratio(clocks, ("lmnotes, dropout 0.1", dtype), ("lmnotes", dtype))
        goals.append((f"10.7 M, {dtype}: a step with dropout 0.1 as a multiple (goal 1.12)", cost, cost <= 1.12))
        over = ratio(clocks, ("transformers", dtype), ("lmnotes", dtype))
        goals.append((f"10.7 M, {dtype}: times the speed of transformers", over, None))
    chosen = ratio(clocks, peer, ("lmnotes", pick_dtype("cpu")[0]))
    goals.append(("10.7 M, in the dtype that lmnotes chooses: times the speed of nanoGPT", chosen, None))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
