"""Time to nanoGPT's loss: nanoGPT's CPU recipe (0.8 M parameters, 2,000 steps of 12 x 64 characters), and the same size here.

`gpt` with preset `tiny` has its defaults, apart from the number of steps: its whole schedule fits into `--steps`, which we chose on tinyshakespeare with
seed 0. `--texts "pydocs stdlib"` checks this choice on two others. Both models train on one thread, in turns, and only training is timed: CPU seconds of this process.
nanoGPT computes in float32, as its recipe specifies, and lmnotes in the dtype that it chooses here. The losses are those of the whole validation split.
"""

from common import Clock, Ratio, load_corpus, report, parse_options, build_parts  # isort: skip
import torch
from nanogpt import CPU_BATCH, CPU_RECIPE, CPU_STEPS, Loop, NanoGPT, full_loss

from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer

TURNS = 40


def train_both(quick, text, steps, peer_steps, seed):
    "Return {model: (model, steps, clocks of the turns, loss)} after training both on a text"
    size = dict(ctx_len=CPU_RECIPE["block_size"], batch_size=CPU_BATCH)
    cfg, data = load_corpus(quick, steps=steps, preset="tiny", seed=seed, data="pydocs" if quick else text, **size)
    lm, batches, val = build_parts(cfg, data)
    ours = Trainer(lm, batches, cfg)
    torch.manual_seed(seed)
    peer = Loop(NanoGPT(data.tokenizer.vocab_size, **CPU_RECIPE), data.tokens["train"].ids, CPU_BATCH, peer_steps)
    clocks, draws = dict(nanoGPT=[], lmnotes=[]), torch.get_rng_state()
    for turn in range(1, TURNS + 1):
        clocks["nanoGPT"].append(Clock())
        torch.set_rng_state(draws)  # The trainer reseeds torch at each step, so nanoGPT gets its own random state back
        with clocks["nanoGPT"][-1]:
            peer.run(peer_steps * turn // TURNS)
        draws = torch.get_rng_state()
        clocks["lmnotes"].append(Clock())
        with clocks["lmnotes"][-1]:
            ours.fit(steps * turn // TURNS)
    judged = val.subset(2 if quick else 0)
    loss = evaluate(lm, judged, autocast=ours.autocast)["loss"]
    return {
        "nanoGPT": (peer.model, peer_steps, clocks["nanoGPT"], full_loss(peer.model, judged)),
        "lmnotes": (lm, steps, clocks["lmnotes"], loss),
    }


def main():
    args = parse_options(
        __doc__,
        steps=(225, "steps of lmnotes"),
        seed=(0, "seed of both runs"),
        texts=("tinyshakespeare", "texts, separated by spaces"),
    )
    steps, peer_steps = (TURNS, TURNS) if args.quick else (args.steps, CPU_STEPS)
    rows, goals = [], []
    for text in args.texts.split()[: 1 if args.quick else None]:
        found = train_both(args.quick, text, steps, peer_steps, args.seed)
        cpu = {name: sum(clock.cpu for clock in clocks) for name, (_, _, clocks, _) in found.items()}
        turns = [a.cpu / b.cpu for a, b in zip(found["nanoGPT"][2], found["lmnotes"][2])]
        times = Ratio(cpu["nanoGPT"] / cpu["lmnotes"], turns)
        for name, (model, n, clocks, loss) in found.items():
            row = dict(
                text="pydocs" if args.quick else text, model=name, parameters=n_params(model), steps=n, CPU_s=cpu[name]
            )
            rows.append(row | dict(wall_s=sum(clock.wall for clock in clocks), loss=loss))
        (_, _, _, target), (_, _, _, loss) = found.values()
        goals.append((f"{text}: nanoGPT's final loss or less", f"{loss:.4f}, nanoGPT {target:.4f}", loss <= target))
        goals.append((f"{text}: in at most 1/6 of nanoGPT's CPU seconds", f"1/{times}", times >= 6))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
