"""Memory of one step of 32 x 2048 tokens over 50,257 ids, the batch of MultiModalCreature's text-only training, part by part.

We measure the loss of the `streams` model, forward and backward, as the growth of the peak memory of a new process.
`--rows 32` is the full batch (five CPU minutes). Fewer rows show that only tensors of the size of the hidden states
grow with the rows. We count the tensors saved for the transformer's backward pass with one and two rows, and
extrapolate from the difference. The goal is a step that fits on a GPU with 24 GB. MultiModalCreature's own code, which
holds several copies of all logits, did not fit. We measure in bfloat16, the dtype for such a GPU, and in float32. No
GPU is used: the numbers count the memory of CPU kernels, and GPU kernels may differ.
"""

from common import report, parse_options  # isort: skip
import multiprocessing
import resource

import torch
import torch.nn.functional as F

from lmnotes.data.batches import Batch
from lmnotes.nn.layers import chunked_cross_entropy, soft_cap
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.training.trainer import autocast

BATCH, GB = 32, 1e9


def in_chunks(h, w, y):
    return chunked_cross_entropy(h, w, y, 15.0)


def plain(h, w, y):
    return F.cross_entropy(soft_cap(F.linear(h, w).float(), 15.0).flatten(0, 1), y.flatten(), reduction="sum")


def _highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(loss, dtype, rows, length, vocab, width, results):
    torch.manual_seed(0)
    h = torch.randn(rows, length, width, requires_grad=True)
    w = torch.randn(vocab, width).mul_(0.02).requires_grad_()
    y, before = torch.randint(vocab, (rows, length)), _highest()
    with autocast("cpu", dtype):
        loss(h, w, y).backward()
    results.put(_highest() - before)


def loss_bytes(*case):
    "Return the growth of a process's peak memory while it computes a loss and its gradients, including the gradients"
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(*case, results))
    process.start()
    size = results.get()
    process.join()
    return size


def saved_bytes(lm, dtype, rows, length):
    "Return the bytes of the tensors that autograd saves for the transformer's backward pass"
    x, saved = torch.randint(lm.cfg.vocab_size, (rows, length)), {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t  # Holding it keeps its address from being reused
        return t

    with autocast("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm.loss(Batch(x, x.roll(-1, 1)))
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)


def losses(dtype, n, shape):
    "Return [(part, rows, bytes)] of the loss: with all logits, in chunks, and in chunks with `n` rows"
    cases = ("loss, all logits", plain, 1), ("loss, in chunks", in_chunks, 1), ("loss, in chunks", in_chunks, n)
    return [(what, rows, loss_bytes(loss, dtype, rows, *shape)) for what, loss, rows in cases]


def needed(dtype, found, lm, shape, params):
    "Return the table rows for everything that a step needs. `found` is from `losses`"
    length, _, width = shape
    _, n, loss = found[-1]
    state_bytes = 2 * 4 * (BATCH - n) * length * width  # Gradients of the hidden states, and a temporary copy
    one, two = (saved_bytes(lm, dtype, rows, length) for rows in (1, 2))
    saved = one + (two - one) * (BATCH - 1)  # Tensors that exist once, such as weights in bfloat16, do not grow
    sizes = [
        *found,
        ("transformer, saved for backward (from one and two rows)", BATCH, saved),
        ("parameters, gradients, AdamW's moments", BATCH, params),
        (
            f"total (loss extrapolated from {n} rows by the size of the hidden states)",
            BATCH,
            loss + state_bytes + saved + params,
        ),
    ]
    return [dict(dtype=str(dtype)[6:], what=what, rows=rows, GB=size / GB) for what, rows, size in sizes]


def main():
    args = parse_options(__doc__, rows=(4, "rows for which the loss is measured"))
    shape = (64, 1000, 64) if args.quick else (2048, 50257, 512)
    small = dict(vocab_size=1000) | (dict(d_model=64, d_ff=256, n_layers=1) if args.quick else {})
    dtypes = torch.float32, torch.bfloat16
    # First, because a process starts with its parent's peak
    found = [losses(dtype, args.rows, shape) for dtype in dtypes]
    with torch.device("meta"):
        params = 16 * n_params(new_lm("streams", "tiny"))
    lm = new_lm("streams", "tiny", **small)
    rows = [row for dtype, sizes in zip(dtypes, found) for row in needed(dtype, sizes, lm, shape, params)]
    most = rows[-1]["GB"]
    report(args, rows, [("a step of 32 x 2048 tokens in bfloat16 needs at most 24 GB", f"{most:.1f} GB", most <= 24)])


if __name__ == "__main__":
    main()
