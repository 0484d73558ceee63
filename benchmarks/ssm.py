"""A state-space model against the decoder: `arch='ssm'` and `arch='gpt'`, preset `tiny` of both, at most 0.81 M parameters.

Both train with the same recipe on the same 2,000 batches of 12 x 64 characters, interleaved in turns of a few steps, so background load
affects both equally. Only the training steps are timed: CPU seconds of this process, on one thread. We evaluate both on the whole
validation split. Then the state-space model generates: a token after 8,000 others must cost as much as the first one.
"""

from common import Clock, load_corpus, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import copy

import torch

from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer


@torch.no_grad()
def cost_of_a_token(lm, history, tokens=20, rounds=50):
    "Return the least CPU milliseconds of a token without history and of one after `history` tokens"
    lm.eval()
    ids = torch.randint(lm.cfg.vocab_size, (1, history))
    states = {"first": lm.step(ids[:, :1])[1], "last": lm.step(ids)[1]}

    def generate(name):
        state = states[name]
        for _ in range(tokens):
            _, state = lm.step(ids[:, :1], state)

    clocks = interleave({name: lambda name=name: generate(name) for name in states}, rounds)
    return {name: 1e3 * min_cpu(of) / tokens for name, of in clocks.items()}


def main():
    args = parse_options(
        __doc__,
        steps=(2000, "length of both runs"),
        turn=(25, "steps at a time"),
        seed=(0, "seed of both runs"),
        preset=("tiny", "preset of ssm"),
    )
    steps, turn = (8, 4) if args.quick else (args.steps, args.turn)
    cfg, data = load_corpus(args.quick, steps=steps, preset="tiny", seed=args.seed, ctx_len=64, batch_size=12)
    runs, clocks = {}, {}
    for arch in ("gpt", "ssm"):
        own = copy.copy(cfg)
        own.arch, own.preset = arch, "tiny" if arch == "gpt" else args.preset
        lm, batches, val = build_parts(own, data)
        runs[arch], clocks[arch] = Trainer(lm, batches, own), Clock()
    quietest = dict.fromkeys(runs, float("inf"))
    for step in range(turn, steps + 1, turn):
        for arch, trainer in runs.items():
            before = clocks[arch].cpu
            with clocks[arch]:
                trainer.fit(step)
            quietest[arch] = min(quietest[arch], clocks[arch].cpu - before)
        if step % 500 == 0:
            print(f"step {step}: {', '.join(f'{arch} {c.cpu:.1f} CPU s' for arch, c in clocks.items())}", flush=True)

    judged = val.subset(2 if args.quick else 0)
    rows = []
    for arch, trainer in runs.items():
        loss = evaluate(trainer.lm, judged, autocast=trainer.autocast)["loss"]
        row = dict(model=arch, parameters=n_params(trainer.lm), steps=steps, CPU_s=clocks[arch].cpu, loss=loss)
        rows.append(row | {"least CPU ms / step": 1e3 * quietest[arch] / turn})
    gpt, ssm = rows
    ratio, least_ratio = ssm["CPU_s"] / gpt["CPU_s"], quietest["ssm"] / quietest["gpt"]
    token = cost_of_a_token(runs["ssm"].lm, 100 if args.quick else 8000, rounds=1 if args.quick else 50)
    report(
        args,
        rows,
        [
            ("at most 0.81 M parameters", f"{ssm['parameters']:,}", ssm["parameters"] <= 810_000),
            ("loss at most the decoder's", f"{ssm['loss'] - gpt['loss']:+.4f}", ssm["loss"] <= gpt["loss"]),
            (
                "at most 1.5 times the decoder's CPU seconds",
                f"{ratio:.2f} in total, {least_ratio:.2f} for the fastest turns",
                ratio <= 1.5,
            ),
            (
                "a token after 8,000 costs at most 1.2 times the first one",
                f"{token['first']:.3f} and {token['last']:.3f} CPU ms",
                token["last"] <= 1.2 * token["first"],
            ),
        ],
    )


if __name__ == "__main__":
    main()
