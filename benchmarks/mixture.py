"""NanoThink: three experts of at most 0.81 M parameters, frozen, and a mixture of them, on tinyshakespeare characters.

We train each expert on 1.54 M characters (2,000 steps of 12 x 64). Then we freeze them and train the attention and router of
`arch='nanothink'` on sequences that repeat in each epoch, starting from the expert with the lowest loss. We evaluate everything on
the whole validation split, and compare with the plain averages of the experts' probabilities and log-probabilities. Each expert also
generates a text, which the transformer scores, and we report the mean weight that the router gives to each. Finally we time
steps of phase two interleaved, with experts computed at each step and with cached expert outputs (`CachedExpertBatches`), here and at
NanoThink's shapes (one sequence of 256).
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lmnotes.data.batches import IGNORE_INDEX, EpochBatches, EvaluationBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.inference.generation import generate
from lmnotes.inspect.routing import router_usage
from lmnotes.models.nanothink import EXPERTS
from lmnotes.nn.lm import lm_config, n_params, new_lm, parse_model_args
from lmnotes.nn.mixture import new_expert
from lmnotes.nn.vector_store import VectorStore
from lmnotes.training.expert_cache import CachedExpertBatches, DocumentOfChunk, fill_store
from lmnotes.training.trainer import Trainer

MAX_TRAINABLE = 810_000  # Trainable parameters


def train_expert(name, spec, cfg, data, folder):
    "Train an expert as a separate model, or load it from `folder` if it is there"
    torch.manual_seed(cfg.seed)
    lm = new_expert(spec, data.tokenizer.vocab_size, cfg.ctx_len)
    file = Path(folder) / f"{name}-{spec.replace(':', '-')}-{cfg.steps}.pt" if folder else None
    if file and file.exists():
        lm.load_state_dict(torch.load(file, weights_only=True))
        return lm
    _, batches, _ = build_parts(cfg, data)
    Trainer(lm, batches, cfg).fit()
    if file:
        torch.save(lm.state_dict(), file)
    return lm


def mixture(experts, cfg, data, **config):
    "Return a new `NanoThink` with frozen experts"
    torch.manual_seed(cfg.seed)
    sizes = dict(vocab_size=data.tokenizer.vocab_size, ctx_len=cfg.ctx_len)
    lm = new_lm("nanothink", "tiny", **sizes, **config)
    for name, expert in experts.items():
        lm.experts[name].load_state_dict(expert.state_dict())
    lm.experts.requires_grad_(False)
    return lm


@torch.no_grad()
def averages(experts, batches, context):
    "Return the losses of the plain averages of probabilities and log-probabilities, in nats per token"
    sums, n = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        y = batch.y.flatten()
        with context():
            log_probs = torch.stack([e.eval()(batch.x).flatten(0, 1).float().log_softmax(-1) for e in experts.values()])
        for i, mixed in enumerate((log_probs.logsumexp(0), log_probs.mean(0))):
            sums[i] += F.cross_entropy(mixed, y, ignore_index=IGNORE_INDEX, reduction="sum")
        n += batch.n_targets
    return dict(zip(("average of probabilities", "average of log-probabilities"), (sums / n).tolist()))


def text_score(judge, writer, data, context, n):
    "Return the nats per token that `judge` gives to eight texts of `n` tokens that `writer` generates"
    texts = generate(writer.eval(), data.tokenizer, ["\n"] * 8, n, temperature=1.0, seed=0)
    ids = np.concatenate([data.tokenizer.encode("\n" + text) for text in texts])
    return evaluate(judge, EvaluationBatches(ids, 64, judge.cfg.ctx_len), autocast=context)["loss"]


def speed(lm, windows, cfg, turn, rounds):
    "Return {name: clocks} of turns of steps in phase two, from the second epoch on"
    computed, cached = Trainer(copy.deepcopy(lm), windows, cfg), Trainer(lm, windows, cfg)
    cached.batches = CachedExpertBatches(lm, windows, autocast=cached.autocast)
    cached.fit(int(windows.steps_per_epoch))

    def some_steps(t):
        return lambda: [t.train_step() for _ in range(turn)]

    return interleave({"computed": some_steps(computed), "cached": some_steps(cached)}, rounds)


def main():
    args = parse_options(
        __doc__,
        steps=(2000, "training steps of each expert"),
        phase2=(2000, "steps of phase two"),
        folder=("", "folder that keeps trained experts between runs of this script"),
        lr=("auto", "learning rate of phase two, auto for the default of the optimizer"),
        optimizer=("muon", "optimizer of phase two"),
        config=("", "further configuration values of the mixture, such as 'memory=4 memory_chunk=16'"),
    )
    steps, phase2 = (20, 10) if args.quick else (args.steps, args.phase2)
    cfg, data = load_corpus(args.quick, steps=steps, preset="tiny", ctx_len=64, batch_size=12)
    specs = vars(lm_config("nanothink", "tiny"))
    experts = {name: train_expert(name, specs[name], cfg, data, args.folder) for name in EXPERTS}

    own = copy.copy(cfg)
    vars(own).update(steps=phase2, lr=args.lr if args.lr == "auto" else float(args.lr), optimizer=args.optimizer)
    judged = EvaluationBatches(data.tokens["val"].ids, 64, cfg.ctx_len).subset(2 if args.quick else 0)
    windows = EpochBatches(data.tokens["train"].ids, cfg.batch_size, cfg.ctx_len, cfg.seed)
    context = Trainer(experts["transformer"], windows, own).autocast
    losses = {name: evaluate(expert, judged, autocast=context)["loss"] for name, expert in experts.items()}
    losses |= averages(experts, judged, context)
    start = min(EXPERTS, key=losses.get)
    lm = mixture(experts, cfg, data, **dict(default_expert=start) | parse_model_args("nanothink", args.config))
    trainer = Trainer(lm, windows, own)
    losses["mixture, untrained"] = evaluate(lm, judged, autocast=context)["loss"]
    print({k: round(v, 4) for k, v in losses.items()}, flush=True)
    documents = None
    if lm.recall:
        store = VectorStore(lm.experts["transformer"].cfg.d_model, lm.cfg.max_vectors)
        lm.store = fill_store(lm, store, data.tokens["train"], context)
        documents = DocumentOfChunk(data.tokens["train"], lm.cfg)
        print(f"memory: {len(lm.store):,} vectors")
    trainer.batches = CachedExpertBatches(lm, windows, autocast=context, documents=documents)
    trainer.fit()
    print({k: round(v, 4) for k, v in trainer.last_metrics.items()})
    losses["mixture"] = evaluate(lm, judged, autocast=context)["loss"]

    sizes = {name: n_params(e) for name, e in experts.items()} | {"mixture": n_params(lm, trainable=True)}
    writers, n = experts | dict(mixture=lm), 40 if args.quick else 400
    texts = {name: text_score(experts["transformer"], writer, data, context, n) for name, writer in writers.items()}
    (weights,) = router_usage(lm, data.tokens["val"]).rows
    rows = [
        dict(model=name, trained=sizes.get(name, ""), loss=loss, text=texts.get(name, ""), weight=weights.get(name, ""))
        for name, loss in losses.items()
    ]
    turn, rounds = (2, 1) if args.quick else (20, 8)
    few = EpochBatches(data.tokens["train"].ids[: 64 * 12 * 10 + 1], cfg.batch_size, cfg.ctx_len)
    clocks = speed(mixture(experts, cfg, data), few, own, turn, rounds)
    rows += [dict(model=f"step, experts {name}", **timing_columns(clocks[name], calls=turn)) for name in clocks]
    if not args.quick:
        large = new_lm("nanothink", vocab_size=data.tokenizer.vocab_size, ctx_len=256)
        large.experts.requires_grad_(False)
        guide = speed(large, EpochBatches(data.tokens["train"].ids[:1025], 1, 256), own, 1, 4)
        rows += [dict(model=f"NanoThink's shapes, experts {name}", **timing_columns(guide[name])) for name in guide]

    best, average = min(losses[name] for name in EXPERTS), min(v for k, v in losses.items() if "average" in k)
    faster = min_cpu(clocks["computed"]) / min_cpu(clocks["cached"])
    report(
        args,
        rows,
        [
            (
                f"each has at most {MAX_TRAINABLE:,} trainable parameters",
                f"{max(sizes.values()):,}",
                max(sizes.values()) <= MAX_TRAINABLE,
            ),
            (
                "untrained mixture within 0.02 of the best expert",
                f"{losses['mixture, untrained'] - best:+.4f}",
                abs(losses["mixture, untrained"] - best) <= 0.02,
            ),
            (
                "mixture below the best expert by 0.02",
                f"{best - losses['mixture']:.4f}",
                best - losses["mixture"] >= 0.02,
            ),
            (
                "mixture at most the better plain average",
                f"{losses['mixture'] - average:+.4f}",
                losses["mixture"] <= average,
            ),
            (
                "text of the diffuser within 1.5 times the nats of real text",
                f"{texts['diffuser'] / losses['transformer']:.2f}",
                texts["diffuser"] <= 1.5 * losses["transformer"],
            ),
            ("steps with cached expert outputs 3 times as fast", f"{faster:.2f}", faster >= 3),
        ],
    )


if __name__ == "__main__":
    main()
