"""Masked diffusion: bound on the likelihood, and a sampler that calls the network only after a change.

We train a model of 0.8 M parameters (preset `tiny`) on tinyshakespeare's characters for 2,000 steps of 12 x 64, with lmnotes' own
optimizer and schedule. We estimate its bound on the whole validation split with 16 passes of independent noise, in the limit of
many steps and for samplers with few steps. Then we generate eight sequences in 1,000 steps: with `generate`, which calls the network
only before a step that fills a masked position, and with the plain loop of this file, which calls it at every step. Both draw the same
random numbers. With `--share 0.5` half of the training rows are trained in blocks of one, and we also print the likelihood of the
same weights as a next-token model.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import torch

from lmnotes.inference.generation import TokenSampler, generate_ids
from lmnotes.models.diffusion import likelihood_bound, row_generators
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer


@torch.no_grad()
def plain(lm, prompts, steps, seed):
    "Sample one sequence per prompt by ancestral sampling, with a network call at each step"
    n_ids, n = lm.cfg.vocab_size, lm.cfg.ctx_len + 1 - len(prompts[0])
    given = torch.tensor(prompts)
    x = torch.cat([given, torch.full((len(given), n), n_ids)], 1)
    pick = TokenSampler(seed=seed).reset(given, range(len(given)))
    chance = row_generators(pick, len(given))
    order = [torch.rand(n, generator=g).argsort().tolist() for g in chance]
    masked = n
    for step in range(steps, 0, -1):
        logits = lm(x)
        while masked > -(-n * (step - 1) // steps):
            at = torch.tensor([given.shape[1] + row[n - masked] for row in order])[:, None]
            drawn = pick(logits.gather(1, at[..., None].expand(-1, -1, n_ids)))
            x.scatter_(1, at, drawn)
            masked -= 1
    return x[:, given.shape[1] :].tolist()


def main():
    args = parse_options(
        __doc__,
        steps=(2000, "training steps"),
        samples=(16, "passes over the validation split"),
        rounds=(3, "timed samples of each sampler"),
        sampling=(1000, "steps of the samplers"),
        share=(0.0, "causal_share: fraction of training rows trained in blocks of one"),
    )
    quick = dict(ctx_len=16, batch_size=4) if args.quick else dict(ctx_len=64, batch_size=12)
    shape = dict(d_model=32, n_layers=1, n_heads=2) if args.quick else {}
    cfg, data = load_corpus(args.quick, arch="diffusion", preset="tiny", steps=4 if args.quick else args.steps, **quick)
    lm, batches, val = build_parts(cfg, data, **shape, causal_share=args.share)
    t = Trainer(lm, batches, cfg)
    t.fit()
    lm.eval()

    val, samples = (val.subset(2), 2) if args.quick else (val, args.samples)
    rows, bounds = [], {}
    for steps in (0, 2, 8) if args.quick else (0, 4, 16, 32):
        found = likelihood_bound(lm, val, samples if not steps else max(2, samples // 4), steps, autocast=t.autocast)
        bounds[steps] = found["loss"]
        name = f"bound, sampling in {steps} steps" if steps else "bound"
        rows.append({"of": name, "parameters": n_params(lm), "nats per character": found["loss"], "±": found["stderr"]})
        print(f"{name}: {found['loss']:.4f} ± {found['stderr']:.4f} nats per character", flush=True)

    if args.share:
        lm.cfg.block = 1
        found = likelihood_bound(lm, val, autocast=t.autocast)["loss"]
        lm.cfg.block = 0
        rows.append({"of": "likelihood in blocks of one", "nats per character": found})
        print(f"in blocks of one: {found:.4f} nats per character", flush=True)

    lm.cfg.sample_steps = steps = 50 if args.quick else args.sampling
    prompts = [[int(i)] for i in data.tokens["val"].ids[:8]]
    texts = {}

    def write(name, function):
        def written():
            texts.setdefault(name, []).append(function())

        return written

    ways = {
        "plain sampler": write("plain", lambda: plain(lm, prompts, steps, seed=1)),
        "sampler that caches predictions": write(
            "kept", lambda: generate_ids(lm, prompts, cfg.ctx_len, temperature=1.0, seed=1)
        ),
    }
    clocks = interleave(ways, 1 if args.quick else args.rounds, warmup=0)
    rows += [{"of": name, **timing_columns(of, "s")} for name, of in clocks.items()]
    ratio = min_cpu(clocks["plain sampler"]) / min_cpu(clocks["sampler that caches predictions"])
    same = texts["plain"] == texts["kept"]
    print(repr(data.tokenizer.decode(texts["kept"][0][0])))
    report(
        args,
        rows,
        [
            ("bound at most 2.15 nats per character", f"{bounds[0]:.4f}", bounds[0] <= 2.15),
            (f"at least 3 times the speed of the plain sampler at {steps:,} steps", f"{ratio:.1f}", ratio >= 3),
            ("the same texts from both", "the same" if same else "different", same),
        ],
    )


if __name__ == "__main__":
    main()
