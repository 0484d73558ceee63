"""Generation: 192 new tokens from a 10.7 M parameter model, with the cache and without.

The peer is nanoGPT's loop, which computes everything again for each token, in float32. lmnotes generates with its cache,
in float32 and with the weights in bfloat16, as `lm.bfloat16()` makes them: one token after another, reading the weights is
most of the work, and there are half as many bytes. The bar is set for the faster of the two; the same model without the
cache shows, in float32, that the cache changes no token. All take the likeliest token.
"""

from common import corpus, figures, finish, interleave, least, options, parts  # isort: skip
from copy import deepcopy

import torch
from nanogpt import NanoGPT

from lmnotes.inference.generation import generate_ids


def speak(lm):
    "Random numbers where new weights are zero, for otherwise every text would be one letter"
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(std=p.shape[1] ** -0.5)


def uncached(lm, prompt, n):
    "The likeliest `n` ids after `prompt`, everything computed again for each"
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            x = torch.cat([x, lm(x[:, -lm.cfg.ctx_len :])[:, -1].argmax(-1, keepdim=True)], 1)
    return x[0, len(prompt) :].tolist()


def main():
    args = options(__doc__, rounds=(3, "timed texts of each"))
    rounds = 1 if args.quick else args.rounds
    n, n_layers, n_heads, d_model = (12, 2, 2, 64) if args.quick else (192, 6, 6, 384)
    cfg, data = corpus(args.quick, ctx_len=256)
    lm, _, _ = parts(cfg, data, n_layers=n_layers, n_heads=n_heads, d_model=d_model)
    speak(lm.eval())
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
    seconds = {name: least(of) / (16 if name.endswith("texts") else 1) for name, of in clocks.items()}
    times = {name: seconds["nanoGPT, no cache"] / s for name, s in seconds.items()}
    rows = [
        {"way": way, **figures(of, "s"), "tok/CPU s": n / seconds[way], "x nanoGPT": times[way]}
        for way, of in clocks.items()
    ]
    best = max(times["lmnotes, cache"], times["lmnotes, cache, bfloat16"])
    finish(
        args,
        rows,
        [
            ("at least 10 times as fast as the uncached loop", f"{best:.1f}", best >= 10),
            ("the same tokens with the cache and without", "the same" if same else "others", same),
        ],
    )


if __name__ == "__main__":
    main()
