"""Generation: 192 new tokens from a 10.7 M parameter model, with and without the KV cache.

The peer is nanoGPT's loop, which recomputes everything for each token, in float32. lmnotes generates with its KV cache,
in float32 and with bfloat16 weights (`lm.bfloat16()`): generating one token at a time spends most of its time on
reading the weights, and bfloat16 halves their size. The goal applies to the faster of the two. The same model without
the cache shows, in float32, that the cache changes no token. All of them decode greedily.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
from copy import deepcopy

import torch
from nanogpt import NanoGPT

from lmnotes.inference.generation import generate_ids


def fill_zero_weights(lm):
    "Replace zero-initialized weights by random ones, because otherwise the model repeats one letter"
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(std=p.shape[1] ** -0.5)


def uncached(lm, prompt, n):
    "Return `n` greedily decoded ids after `prompt`, recomputing everything for each"
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            x = torch.cat([x, lm(x[:, -lm.cfg.ctx_len :])[:, -1].argmax(-1, keepdim=True)], 1)
    return x[0, len(prompt) :].tolist()


def main():
    args = parse_options(__doc__, rounds=(3, "timed texts of each"))
    rounds = 1 if args.quick else args.rounds
    n, n_layers, n_heads, d_model = (12, 2, 2, 64) if args.quick else (192, 6, 6, 384)
    cfg, data = load_corpus(args.quick, ctx_len=256)
    lm, _, _ = build_parts(cfg, data, n_layers=n_layers, n_heads=n_heads, d_model=d_model)
    fill_zero_weights(lm.eval())
    half = deepcopy(lm).bfloat16()
    peer = NanoGPT(data.tokenizer.vocab_size, 256, n_layers, n_heads, d_model).eval()
    prompt = data.tokens["train"].ids[:16].tolist()

    ways = {
        "nanoGPT, no cache": lambda: peer.generate(torch.tensor([prompt]), n),
        "lmnotes, no cache": lambda: uncached(lm, prompt, n),
        "lmnotes, cache": lambda: generate_ids(lm, [prompt], n, temperature=0)[0],
        "lmnotes, cache, bfloat16": lambda: generate_ids(half, [prompt], n, temperature=0)[0],
        "lmnotes, cache, bfloat16, 16 texts": lambda: generate_ids(half, [prompt] * 16, n, temperature=0)[0],
    }
    same = ways["lmnotes, cache"]() == ways["lmnotes, no cache"]()
    clocks = interleave(ways, rounds, warmup=0)
    seconds = {name: min_cpu(of) / (16 if name.endswith("texts") else 1) for name, of in clocks.items()}
    times = {name: seconds["nanoGPT, no cache"] / s for name, s in seconds.items()}
    rows = [
        {"way": way, **timing_columns(of, "s"), "tok/CPU s": n / seconds[way], "x nanoGPT": times[way]}
        for way, of in clocks.items()
    ]
    best = max(times["lmnotes, cache"], times["lmnotes, cache, bfloat16"])
    report(
        args,
        rows,
        [
            ("at least 10 times as fast as the uncached loop", f"{best:.1f}", best >= 10),
            ("the same tokens with the cache and without", "the same" if same else "different", same),
        ],
    )


if __name__ == "__main__":
    main()
