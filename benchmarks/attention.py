"""Attention: time of forward and backward by kernel and shape, as in the table of `nbs/nn/22_attention`.

We compare torch's fused `scaled_dot_product_attention` with plain matrix products, in float32 and bfloat16, causal, on one thread.
The goal is that the kernel chosen by `causal_attention` takes at most 1.25 x the time of the best kernel in the same dtype.
"""

from common import report, interleave, min_cpu, parse_options  # isort: skip
import torch
import torch.nn.functional as F

from lmnotes.nn.attention import _causal_bias, _matmul_attention, causal_attention

SHAPES = (12, 4, 64, 32), (8, 6, 256, 64), (2, 8, 512, 64), (2, 8, 1024, 64)


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def products(q, k, v):
    T, d = q.shape[2:]
    return _matmul_attention(q * d**-0.5, k, v, _causal_bias(T, T, 0, q.device, q.dtype), 0.0)


def forward_backward(kernel, shape, dtype):
    "Return a function that computes attention of random tensors and its gradients"
    q, k, v, g = (torch.randn(shape, dtype=dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(kernel(*inputs), inputs, g)


def main():
    args = parse_options(__doc__, rounds=(9, "timed calls of each"))
    kernels = dict(fused=fused, products=products, chosen=causal_attention)
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16)
    rows, worst = [], 0.0
    for shape in SHAPES[:1] if args.quick else SHAPES:
        calls = {f"{k} {d}": forward_backward(kernels[k], shape, dtypes[d]) for d in dtypes for k in kernels}
        ms = {name: 1e3 * min_cpu(of) for name, of in interleave(calls, 1 if args.quick else args.rounds).items()}
        rows.append({"batch, heads, length, width": ", ".join(map(str, shape)), **ms})
        for dtype in dtypes:
            worst = max(worst, ms[f"chosen {dtype}"] / min(ms[f"fused {dtype}"], ms[f"products {dtype}"]))
    print("\nCPU milliseconds, forward and backward, least of several calls")
    report(
        args, rows, [("the chosen kernel takes at most 1.25 times the time of the best", f"{worst:.2f}", worst <= 1.25)]
    )


if __name__ == "__main__":
    main()
