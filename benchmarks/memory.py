"""Memory of the text-only guide's batch: what a step of 32 x 2048 tokens over 50,257 ids needs, part by part.

The loss of the `streams` model is measured as it runs, forward and backward, in a process of its own: how much more memory the process
has had at its highest than before. `--rows 32` is the guide's batch (five CPU minutes); fewer rows show that only what is as large as
the states grows with them. What the transformer keeps for its gradient is counted on one row, and is proportional to the rows. The
bar is the guide's card of 24 GB, on which its own system, with all logits there several times, could not run. No GPU is used here.
"""

from common import finish, options  # isort: skip
import multiprocessing
import resource

import torch
import torch.nn.functional as F

from lmnotes.batches import Batch
from lmnotes.layers import soft_cap
from lmnotes.lm import n_params, new_lm

BATCH, GB = 32, 1e9


def in_pieces(h, w, y):
    from lmnotes.models.streams import summed_nll

    return summed_nll(h, w, y, 15.0)


def plain(h, w, y):
    return F.cross_entropy(soft_cap(F.linear(h, w).float(), 15.0).flatten(0, 1), y.flatten(), reduction="sum")


def _highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(loss, rows, length, vocab, width, results):
    torch.manual_seed(0)
    h = torch.randn(rows, length, width, requires_grad=True)
    w = torch.randn(vocab, width).mul_(0.02).requires_grad_()
    y, before = torch.randint(vocab, (rows, length)), _highest()
    with torch.autocast("cpu", torch.bfloat16):
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


def kept_bytes(lm, length):
    "What the transformer keeps for its gradient, for one row, in bfloat16"
    x, kept = torch.randint(lm.cfg.vocab_size, (1, length)), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t  # Held, so that no address comes twice
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm.loss(Batch(x, x.roll(-1, 1)))
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)


def main():
    args = options(__doc__, rows=(4, "rows of the loss that is measured"))
    length, vocab, width = (64, 1000, 64) if args.quick else (2048, 50257, 512)
    rows = []
    for kind, loss, n in (("all logits", plain, 1), ("in pieces", in_pieces, 1), ("in pieces", in_pieces, args.rows)):
        size = loss_bytes(loss, n, length, vocab, width)
        rows.append(dict(what=f"loss, {kind}", rows=n, GB=size / GB))
    with torch.device("meta"):
        params = n_params(new_lm("streams", "tiny"))
    small = dict(vocab_size=1000) | (dict(d_model=64, d_ff=256, n_layers=1) if args.quick else {})
    kept = kept_bytes(new_lm("streams", "tiny", **small), length) * BATCH
    states = 2 * 4 * (BATCH - args.rows) * length * width  # Gradients of the states, and their copy on the way
    loss = size + states
    rows.append(dict(what="transformer, kept for the gradient (one row, times 32)", rows=BATCH, GB=kept / GB))
    rows.append(dict(what="parameters, gradients, AdamW's moments", rows=BATCH, GB=16 * params / GB))
    rows.append(
        dict(
            what=f"all of it (the loss from {args.rows} rows on by the size of its states)",
            rows=BATCH,
            GB=(loss + kept + 16 * params) / GB,
        )
    )
    finish(
        args,
        rows,
        [("a step of 32 x 2048 tokens needs at most 24 GB", f"{rows[-1]['GB']:.1f} GB", rows[-1]["GB"] <= 24)],
    )


if __name__ == "__main__":
    main()
