"""One state-space layer, forward and backward: our S6 scan against the usual loop and a parallel scan, and SSD against S6.

The sizes are those of NanoThink's state-space expert: 4 sequences of 256 positions, 768 channels, 16 state values each.
This file implements both peers. The loop is the fallback of transformers without a kernel: it computes the decays and
inputs of all positions, then loops over the positions, and autograd computes the gradient. The parallel scan is
Blelloch's with an explicit gradient, as in mamba.py. All three get the same float32 inputs and must agree in values and
gradients. SSD has heads of 64 channels. We also time it in bfloat16, the dtype that a model uses for it on a CPU with
bfloat16 instructions.

Then whole layers of width 384 with their projections: ours with S6 and with SSD, and transformers' Mamba2, for sequences of 256 to 4,096 positions.
"""

from common import timing_columns, report, interleave, min_cpu, parse_options, ratio  # isort: skip
import torch
import torch.nn.functional as F
from torch.autograd import Function

from lmnotes.inference.evaluation import Table
from lmnotes.nn.lm import new_lm
from lmnotes.nn.scans import selective_scan, ssd


def loop(x, dt, A, B, C):
    "S6 scan in a loop over positions, with autograd's gradient"
    x, dt = x.transpose(1, 2), dt.transpose(1, 2)
    decay = torch.exp(A[None, :, None] * dt[..., None])
    added = dt[..., None] * B[:, None] * x[..., None]
    state, ys = x.new_zeros(*x.shape[:2], A.shape[1]), []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + added[:, :, t]
        ys.append(torch.matmul(state, C[:, t, :, None])[..., 0])
    return torch.stack(ys, 1)


def sweep(decay, h, back=False):
    "Blelloch's scan over the third dimension (a power of two), in place. `back` scans from the end"

    def join(of, to):
        h[:, :, to].addcmul_(decay[:, :, to], h[:, :, of])
        decay[:, :, to].mul_(decay[:, :, of])

    T, step = h.shape[2], 1
    while step < T:
        first, second = slice(step - 1, None, 2 * step), slice(2 * step - 1, None, 2 * step)
        join(*((slice(step, None, 2 * step), slice(0, None, 2 * step)) if back else (first, second)))
        step *= 2
    step = T // 4
    while step:
        first, second = slice(2 * step - 1, T - step, 2 * step), slice(3 * step - 1, None, 2 * step)
        ends = slice(2 * step, None, 2 * step), slice(step, T - 2 * step, 2 * step)
        join(*(ends if back else (first, second)))
        step //= 2


class ParallelScan(Function):
    "Parallel scan: (b,T,E,N) decays and inputs -> (b,T,E,N) states"

    @staticmethod
    def forward(ctx, decay, added):
        a, h = (t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in (decay, added))
        sweep(a, h)
        h = h.transpose(1, 2)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx, g):
        decay, h = ctx.saved_tensors
        a = F.pad(decay.transpose(1, 2)[:, :, 1:], (0, 0, 0, 1))
        g = g.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        sweep(a, g, back=True)
        g = g.transpose(1, 2)
        return F.pad(g[:, 1:] * h[:, :-1], (0, 0, 0, 0, 1, 0)), g


def parallel(x, dt, A, B, C):
    decay, added = torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
    return (ParallelScan.apply(decay, added) @ C[..., None])[..., 0]


def inputs(b, T, E, N, H=0, dtype=torch.float32):
    "Return random x, dt, A, B, C, with `H` heads for SSD"
    torch.manual_seed(0)
    x, B, C = (torch.randn(b, T, n).to(dtype) for n in (E, N, N))
    dt = F.softplus(torch.randn(b, T, H or E) - 3)
    A = -torch.linspace(1, 16, H) if H else -torch.arange(1.0, N + 1).repeat(E, 1)
    return [t.requires_grad_() for t in (x, dt, A, B, C)]


def both_ways(scan, given):
    def run():
        y = scan(*given)
        return [y, *torch.autograd.grad(y.float().square().mean(), given)]

    return run


def mamba2(width):
    "Return a layer of transformers' Mamba2"
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    cfg = Mamba2Config(
        hidden_size=width, num_heads=width // 32, head_dim=64, state_size=64, n_groups=1, num_hidden_layers=1
    )
    return Mamba2Mixer(cfg, layer_idx=0)


def compare_layers(args):
    "Return (rows, goals) for whole layers, forward and backward in float32"
    width = 64 if args.quick else 384
    ours = {
        "S6": new_lm(
            "ssm", "nanothink_s6", vocab_size=64, d_model=width, d_inner=2 * width, n_layers=1, dropout=0.0
        ).blocks[0],
        "SSD": new_lm("ssm", "small", vocab_size=64, d_model=width, n_layers=1, dropout=0.0).blocks[0],
    }
    rows, goals = [], []
    for T in (64,) if args.quick else (256, 1024, 4096):
        x = torch.randn(4 if T < 4096 else 1, T, width)

        peer = mamba2(width)
        layers = {name: lambda block=block, x=x: block(x, x) for name, block in ours.items()}
        layers["Mamba2"] = lambda x=x, peer=peer: peer(x)
        ways = {name: lambda layer=layer: layer().square().mean().backward() for name, layer in layers.items()}
        clocks = interleave(ways, 1 if args.quick else 3)
        for name, of in clocks.items():
            rows.append(
                {
                    "layer": name,
                    "positions": T,
                    **timing_columns(of),
                    "tokens / CPU s": x.shape[:2].numel() / min_cpu(of),
                }
            )
        for name, bar in dict(S6=1.0, SSD=2.5).items():
            value = ratio(clocks, "Mamba2", name)
            goals.append((f"{name} at {T:,} positions: times the speed of Mamba2 (goal {bar})", value, value >= bar))
    return rows, goals


def main():
    args = parse_options(__doc__, rounds=(3, "timed runs of each"))
    size = (2, 32, 64, 8) if args.quick else (4, 256, 768, 16)
    given = inputs(*size)
    runs = {
        "loop": both_ways(loop, given),
        "parallel scan": both_ways(parallel, given),
        "S6": both_ways(lambda *t: selective_scan(*t)[0], given),
    }
    for dtype in (torch.float32, torch.bfloat16):
        one = inputs(*size, H=size[2] // 64, dtype=dtype)
        runs[f"SSD, {str(dtype)[6:]}"] = both_ways(lambda *t: ssd(*t, chunk=32, return_state=False)[0], one)
    wanted = runs["loop"]()
    for name in ("parallel scan", "S6"):
        difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(runs[name](), wanted))
        assert difference < 1e-5, f"{name} differs from the loop by {difference:.1e}"
    clocks = interleave(runs, 1 if args.quick else args.rounds)
    quick = {name: run for name, run in runs.items() if name != "loop"}
    for name, extra in interleave(quick, 1 if args.quick else 5 * args.rounds).items():
        clocks[name] += extra
    tokens = size[0] * size[1]
    rows = [
        {"scan": name, **timing_columns(times), "tokens / CPU s": int(tokens / min_cpu(times))}
        for name, times in clocks.items()
    ]
    cpu = {name: min_cpu(times) for name, times in clocks.items()}
    ratios = cpu["loop"] / cpu["S6"], cpu["parallel scan"] / cpu["S6"]
    heads = min(cpu["SSD, float32"], cpu["SSD, bfloat16"])
    layer_rows, layer_goals = compare_layers(args)
    print(f"\n{Table(layer_rows)}")
    goals = [
        ("S6 at least 20 times as fast as the loop", f"{ratios[0]:.1f}", ratios[0] >= 20),
        ("S6 at least 1.3 times as fast as the parallel scan", f"{ratios[1]:.2f}", ratios[1] >= 1.3),
        ("SSD at least 10 times as fast as S6", f"{cpu['S6'] / heads:.1f}", cpu["S6"] / heads >= 10),
    ]
    report(args, rows, goals + layer_goals)


if __name__ == "__main__":
    main()
