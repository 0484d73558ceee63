"""Matrix products of 1024 x 1024: what this kind of CPU can do in float32 and in bfloat16."""

from common import interleave, min_cpu, parse_options, report, timing_columns  # isort: skip
import torch


def main():
    args = parse_options(__doc__, rounds=(7, "timed products of each"))
    n = 128 if args.quick else 1024
    xs = {str(dtype)[6:]: torch.ones(n, n, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    clocks = interleave({name: lambda x=x: x @ x for name, x in xs.items()}, 1 if args.quick else args.rounds)
    speed = {name: 2e-9 * n**3 / min_cpu(of) for name, of in clocks.items()}
    rows = [{"dtype": name, **timing_columns(of), "GFLOP/s": speed[name]} for name, of in clocks.items()]
    report(args, rows, [(f"products in {name}, GFLOP/s", f"{value:.3g}", None) for name, value in speed.items()])


if __name__ == "__main__":
    main()
