"""Memory of the text-only guide's batch: what a step of 32 x 2048 tokens over 50,257 ids needs, part by part.

The loss of the `streams` model is measured as it runs, forward and backward, in a process of its own: how much more memory the process
has had at its highest than before. `--rows 32` is the guide's batch (five CPU minutes); fewer rows show that only what is as large as
the states grows with them. What the transformer keeps for its gradient is counted on one row and on two, and grows by their difference. The
bar is the guide's card of 24 GB, on which its own system, with all logits there several times, could not run. In bfloat16, which such a
card computes in, and in float32. No GPU is used here: what is counted is what the kernels of a CPU keep and take, and a GPU's may differ.
"""

from common import finish, options  # isort: skip
import multiprocessing
import resource

import torch
import torch.nn.functional as F

from lmnotes.data.batches import Batch
from lmnotes.nn.layers import chunked_cross_entropy, soft_cap
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.training.trainer import autocast

BATCH, GB = 32, 1e9


def in_pieces(h, w, y):
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
    "How much more memory a process has at its highest while it computes a loss and its gradients, those included"
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(*case, results))
    process.start()
    size = results.get()
    process.join()
    return size


def kept_bytes(lm, dtype, rows, length):
    "What the transformer keeps for its gradient"
    x, kept = torch.randint(lm.cfg.vocab_size, (rows, length)), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t  # Held, so that no address comes twice
        return t

    with autocast("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm.loss(Batch(x, x.roll(-1, 1)))
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


def losses(dtype, n, shape):
    "Rows of what the loss needs, the last with `n` rows in pieces"
    cases = ("loss, all logits", plain, 1), ("loss, in pieces", in_pieces, 1), ("loss, in pieces", in_pieces, n)
    return [(what, rows, loss_bytes(loss, dtype, rows, *shape)) for what, loss, rows in cases]


def needed(dtype, found, lm, shape, params):
    "Rows of all that a step needs; `found` is from `losses`"
    length, _, width = shape
    _, n, loss = found[-1]
    more = 2 * 4 * (BATCH - n) * length * width  # Gradients of the states, and their copy on the way
    one, two = (kept_bytes(lm, dtype, rows, length) for rows in (1, 2))
    kept = one + (two - one) * (BATCH - 1)  # What is there once, such as weights in bfloat16, does not grow
    sizes = [
        *found,
        ("transformer, kept for the gradient (from one row and two)", BATCH, kept),
        ("parameters, gradients, AdamW's moments", BATCH, params),
        (f"all of it (the loss from {n} rows on by the size of its states)", BATCH, loss + more + kept + params),
    ]
    return [dict(dtype=str(dtype)[6:], what=what, rows=rows, GB=size / GB) for what, rows, size in sizes]


def main():
    args = options(__doc__, rows=(4, "rows of the loss that is measured"))
    shape = (64, 1000, 64) if args.quick else (2048, 50257, 512)
    small = dict(vocab_size=1000) | (dict(d_model=64, d_ff=256, n_layers=1) if args.quick else {})
    dtypes = torch.float32, torch.bfloat16
    found = [losses(dtype, args.rows, shape) for dtype in dtypes]  # First: a process begins with its parent's highest
    with torch.device("meta"):
        params = 16 * n_params(new_lm("streams", "tiny"))
    lm = new_lm("streams", "tiny", **small)
    rows = [row for dtype, sizes in zip(dtypes, found) for row in needed(dtype, sizes, lm, shape, params)]
    most = rows[-1]["GB"]
    finish(args, rows, [("a step of 32 x 2048 tokens in bfloat16 needs at most 24 GB", f"{most:.1f} GB", most <= 24)])


if __name__ == "__main__":
    main()
