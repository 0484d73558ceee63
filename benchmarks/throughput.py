"""Throughput: training a 10.7 M parameter model (6 layers, 384 wide, context 256, batch 8).

The goal compares models with the same optimizer, AdamW: lmnotes' trainer, nanoGPT's loop in float32 as published, and transformers'
GPT-2 of the same shape in bfloat16. transformers' `Trainer` needs accelerate, which lmnotes does not install. This file therefore
implements its loop (autocast, `loss.backward()`, clipping to 1, fused AdamW, a schedule) without its callbacks and data loader, which would
only slow it down. None has dropout. The table also shows Muon, lmnotes' default, which costs a fixed extra time per step. See
time_to_loss.py for its gain in loss.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import torch
from nanogpt import Loop, NanoGPT

from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer


def transformers_step(batches, vocab_size, ctx_len, n_layers, n_heads, d_model):
    "Return (model, function that runs one training step) as transformers' `Trainer` does with bf16=True"
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = dict(n_positions=ctx_len, n_layer=n_layers, n_head=n_heads, n_embd=d_model)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape, **no_dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 1000)
    batch = batches[0]

    def step():
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
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
    rounds = 1 if args.quick else args.rounds
    n_layers, n_heads, d_model = (2, 2, 64) if args.quick else (6, 6, 384)
    size = dict(ctx_len=256, batch_size=8, steps=1000)
    shape = dict(n_layers=n_layers, n_heads=n_heads, d_model=d_model)
    cfg, data = load_corpus(args.quick, **size, optimizer="adamw")
    vocab_size, ids = data.tokenizer.vocab_size, data.tokens["train"].ids

    lm, adamw = lmnotes_step(data, cfg, **shape, dropout=0.0)
    _, muon = lmnotes_step(data, load_corpus(args.quick, **size)[0], **shape, dropout=0.0)
    peer = NanoGPT(vocab_size, 256, n_layers, n_heads, d_model)
    hf, hf_step = transformers_step(build_parts(cfg, data)[1], vocab_size, 256, **shape)

    peer_name, hf_name = "nanoGPT, float32", "transformers, bfloat16"
    dtype = str(Trainer(lm, [], cfg).dtype).removeprefix("torch.")
    ours, with_muon = f"lmnotes, {dtype}", f"lmnotes, {dtype}, Muon"
    steps = {peer_name: Loop(peer, ids, 8, 1000).train_step, hf_name: hf_step, ours: adamw, with_muon: muon}
    sizes = {peer_name: peer, hf_name: hf, ours: lm, with_muon: lm}
    clocks = interleave(steps, rounds)
    best = {name: min_cpu(of) for name, of in clocks.items()}
    speed = {name: best[peer_name] / seconds for name, seconds in best.items()}
    tokens = {name: round(8 * 256 / seconds) for name, seconds in best.items()}
    rows = [
        {
            "training": name,
            "parameters": n_params(sizes[name]),
            **timing_columns(of),
            "tok/CPU s": tokens[name],
            "x nanoGPT": speed[name],
        }
        for name, of in clocks.items()
    ]
    over_hf = best[hf_name] / best[ours]
    report(
        args,
        rows,
        [
            ("at least 2.5 times nanoGPT's tokens per CPU second", f"{speed[ours]:.2f}", speed[ours] >= 2.5),
            ("at least 1.2 times those of transformers in bfloat16", f"{over_hf:.2f}", over_hf >= 1.2),
        ],
    )


if __name__ == "__main__":
    main()
