"""Where the time of a training step goes, for every architecture: matrix products, attention, other kernels, and everything outside kernels.

A step of each architecture in a small size, 12 x 64 tokens, with AdamW, in the dtype that lmnotes chooses here. The time of a step is measured without the
profiler. The shares come from PyTorch's profiler, which adds time to every operation. `--plot FILE` draws them.
"""

from common import interleave, load_corpus, min_cpu, parse_options, report, build_parts  # isort: skip
from torch.profiler import ProfilerActivity, profile

from lmnotes.plots import PLOT_STYLE
from lmnotes.training.trainer import Trainer

GROUPS = {  # Name: the beginnings of the names of its kernels
    "products": "mm addmm bmm baddbmm linear matmul mkldnn_linear dot mv".split(),
    "attention": ["_scaled_dot_product"],
    "optimizer": "_fused_adamw_ _foreach Optimizer.".split(),
    "exponentials": "_softmax _log_softmax exp log tanh sigmoid gelu silu softplus erf sin cos rsqrt sqrt pow".split(),
    "copies": "copy_ cat clone contiguous fill_ zero_ index gather scatter roll flip stack embedding".split(),
}
MODELS = {  # {architecture: (run parameters, configuration)}
    "gpt": (dict(preset="tiny"), {}),
    "gpt, dropout 0.1": (dict(preset="tiny"), dict(dropout=0.1)),
    "gpt2": ({}, dict(n_positions=64, d_model=128, n_layers=4, n_heads=4)),
    "scratch_gpt": ({}, dict(d_model=128, n_layers=4, n_heads=4)),
    "rnn": ({}, dict(d_model=256)),
    "ssm": (dict(preset="tiny"), {}),
    "ssm, S6": (dict(preset="nanothink_s6"), dict(d_model=128, d_inner=256, n_layers=4)),
    "bytepatch": (dict(tokenizer="bytes"), dict(d_model=128, n_layers=4, n_heads=4)),
    "streams": ({}, dict(d_model=128, n_layers=4, n_heads=4)),
    "diffusion": (dict(preset="tiny"), {}),
    "nanothink": (
        {},
        dict(
            transformer="gpt,d_model=128,n_layers=4,n_heads=4",
            state_space="ssm,d_model=128,n_layers=4",
            diffuser="diffusion,block=1,d_model=128,n_layers=4,n_heads=4",
            **dict(d_model=128, n_heads=4, head_dim=32, kv_latent_dim=64, rope_dim=16),
        ),
    ),
}
LIMIT = 2.5


def group_of(name):
    "Return the group of an event of the profiler"
    plain = name.removeprefix("aten::")
    found = next((g for g, starts in GROUPS.items() if plain.startswith(tuple(starts))), None)
    return found or ("other kernels" if name.startswith("aten::") else "outside kernels")


def shares(step, repeats):
    "Return {group: share of the time of a step}, by the profiler"
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            step()
    sums = {}
    for event in found.key_averages():
        group = group_of(event.key)
        sums[group] = sums.get(group, 0.0) + event.self_cpu_time_total
    return {group: value / sum(sums.values()) for group, value in sums.items()}


def draw(rows, path):
    "Draw the parts of each step as one bar"
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = ["products", "attention", *(g for g in GROUPS if g not in ("products", "attention"))]
    names += ["other kernels", "outside kernels"]
    with rc_context(PLOT_STYLE | {"svg.hashsalt": "step_profile"}):
        figure = Figure((9, 4.5), layout="constrained")
        axes, left = figure.subplots(), [0.0] * len(rows)
        for name in names:
            widths = [float(row.get(name, 0.0)) for row in rows]
            axes.barh([row["model"] for row in rows], widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths)]
        axes.invert_yaxis()
        axes.set_xlabel("CPU milliseconds of a step")
        axes.legend()
        figure.savefig(path, metadata={"Date": None})


def main():
    args = parse_options(
        __doc__,
        rounds=(8, "timed steps of each"),
        models=("", "names of architectures, separated by commas (empty: all)"),
        plot=("", "file for the plot, such as profile.svg"),
    )
    wanted = [name for name in args.models.split(",") if name] or list(MODELS)
    steps = {}
    for name in wanted[: 2 if args.quick else None]:
        params, config = MODELS[name]
        size = dict(ctx_len=64, batch_size=12, steps=1000, optimizer="adamw", arch=name.partition(",")[0])
        cfg, data = load_corpus(args.quick, **size, **params)
        lm, batches, _ = build_parts(cfg, data, **config)
        steps[name] = Trainer(lm, batches, cfg).train_step
    clocks = interleave(steps, 1 if args.quick else args.rounds)
    rows, goals = [], []
    for name, of in clocks.items():
        part, ms = shares(steps[name], 1 if args.quick else 5), 1e3 * min_cpu(of)
        times = ms / (ms * (part["products"] + part.get("attention", 0.0)))
        rows.append({"model": name, "ms": ms, **{group: ms * share for group, share in part.items()}, "times": times})
        goals.append(
            (
                f"{name}: a step as a multiple of its products and attention (goal {LIMIT})",
                f"{times:.2f}",
                times <= LIMIT,
            )
        )
    if args.plot:
        draw(rows, args.plot)
    report(args, rows, goals)


if __name__ == "__main__":
    main()
