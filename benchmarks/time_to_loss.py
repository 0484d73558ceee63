"""Time to loss: `preset='tiny'` against nanoGPT's CPU recipe (0.8 M parameters, 2,000 steps of 12 x 64 characters).

Both train on the same number of tokens, in turns of 50 steps, and we evaluate them on the whole validation split. Only the training
steps are timed: CPU seconds of this process, on one thread. nanoGPT computes in float32, as its recipe specifies, and lmnotes in the dtype
that it chooses here. Neither has dropout. Apart from size and dropout, the preset has the defaults of `gpt`.
"""

from common import Clock, load_corpus, report, parse_options, build_parts  # isort: skip
import torch
from nanogpt import CPU_BATCH, CPU_RECIPE, CPU_STEPS, Loop, NanoGPT, full_loss

from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer


def main():
    args = parse_options(
        __doc__,
        steps=(CPU_STEPS, "length of both runs"),
        every=(50, "steps between evaluations"),
        seed=(0, "seed of both runs"),
    )
    steps, every = (20, 10) if args.quick else (args.steps, args.every)
    size = dict(ctx_len=CPU_RECIPE["block_size"], batch_size=CPU_BATCH)
    cfg, data = load_corpus(args.quick, steps=steps, preset="tiny", seed=args.seed, **size)
    lm, batches, val = build_parts(cfg, data)
    ours = Trainer(lm, batches, cfg)

    torch.manual_seed(args.seed)
    peer = Loop(NanoGPT(data.tokenizer.vocab_size, **CPU_RECIPE), data.tokens["train"].ids, CPU_BATCH, steps)
    judged = val.subset(2 if args.quick else 0)

    clocks, curve, draws = dict(peer=Clock(), ours=Clock()), [], torch.get_rng_state()
    for step in range(every, steps + 1, every):
        torch.set_rng_state(draws)  # The trainer reseeds torch at each step, so nanoGPT gets its own random state back
        with clocks["peer"]:
            peer.run(step)
        draws = torch.get_rng_state()
        with clocks["ours"]:
            ours.fit(step)
        loss = evaluate(lm, judged, autocast=ours.autocast)["loss"]
        curve.append((step, clocks["ours"].cpu, loss))
        if len(curve) % 8 == 0:
            print(
                f"step {step}: lmnotes {loss:.4f} after {clocks['ours'].cpu:.1f} CPU s, nanoGPT at {clocks['peer'].cpu:.1f} CPU s",
                flush=True,
            )

    target = full_loss(peer.model, judged)
    reached = next((point for point in curve if point[2] <= target), None)
    rows = [
        dict(
            model="nanoGPT",
            parameters=n_params(peer.model),
            steps=steps,
            CPU_s=clocks["peer"].cpu,
            wall_s=clocks["peer"].wall,
            loss=target,
        ),
        dict(
            model="lmnotes",
            parameters=n_params(lm),
            steps=steps,
            CPU_s=clocks["ours"].cpu,
            wall_s=clocks["ours"].wall,
            loss=curve[-1][2],
        ),
    ]
    if reached:
        rows.append(
            dict(
                model="lmnotes, at nanoGPT's loss",
                parameters=n_params(lm),
                steps=reached[0],
                CPU_s=reached[1],
                loss=reached[2],
            )
        )
    ratio = clocks["peer"].cpu / reached[1] if reached else 0.0
    report(
        args,
        rows,
        [
            ("nanoGPT's final loss in at most 1/5 of its CPU seconds", f"1/{ratio:.2f}", ratio >= 5),
            ("loss at most 1.60 on the same tokens", f"{curve[-1][2]:.4f}", curve[-1][2] <= 1.60),
        ],
    )


if __name__ == "__main__":
    main()
