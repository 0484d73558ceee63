"""LoRA against full training and against the library peft: what it learns, what a step costs, and the same curve.

A model in the shape of GPT-2 (124 M parameters, random weights), rank 16 on all linear layers, the head's too. Beside it, in small:
a character model on random frozen weights, trained in full, with adapters, and with adapters whose frozen product takes no part in the
gradient, the mistake of many a hand-made LoRA.
"""

# ruff: noqa: E402
import tempfile

import torch
import torch.nn.functional as F
from common import corpus, finish, interleave, least, options

from lmnotes.core import seed_torch
from lmnotes.data.batches import Batch, EvaluationBatches, RandomBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.models.gpt2 import to_hf
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.nn.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, save_adapter


def shape(quick):
    small = dict(vocab_size=61, n_positions=32, ctx_len=32, d_model=16, n_layers=2, n_heads=2)
    return {**(small if quick else dict(ctx_len=128)), "dropout": 0.0}


def rows_of_tokens(lm, rows=2):
    "A batch of random tokens"
    ids = torch.randint(lm.cfg.vocab_size, (rows, lm.cfg.ctx_len + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:])


def gpt2(quick, lora=False):
    torch.manual_seed(0)
    lm = new_lm("gpt2", **shape(quick)).train()
    return add_lora(lm, LoRAConfig(rank=16)) if lora else lm


def in_peft(quick, ours):
    "The same base and the same adapter in the library peft; None where it is not installed"
    try:
        from peft import PeftModel
    except ImportError:
        print("peft is not installed (pip install peft); nothing is compared with it")
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        return PeftModel.from_pretrained(to_hf(gpt2(quick)), folder, is_trainable=True).train()


def stepper(model, loss, batch, dtype):
    "A function that does one training step and returns the loss"
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def our_loss(lm, batch):
    return lm.loss(batch)["loss"]


def peft_loss(model, batch):
    logits = model(input_ids=batch.x, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.y.flatten())


def steppers(quick, dtype):
    lora, full = gpt2(quick, lora=True), gpt2(quick)
    batch, theirs = rows_of_tokens(lora), in_peft(quick, lora)
    found = {"all weights": stepper(full, our_loss, batch, dtype), "adapters": stepper(lora, our_loss, batch, dtype)}
    if theirs is not None:
        found["adapters, peft"] = stepper(theirs, peft_loss, batch, dtype)
    return found, batch, lora


def curves(quick, steps=5):
    "Loss curves from the same start in float32, ours and peft's"
    found, _, _ = steppers(quick, torch.float32)
    del found["all weights"]
    return {name: [step() for _ in range(steps)] for name, step in found.items()}


class CutOff(LoRALinear):
    "The mistake: the frozen product takes no part in the gradient"

    def forward(self, x):
        with torch.no_grad():
            y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


GUIDE = LoRAConfig(rank=16, alpha=24.0, train="embed.* positions.* *norm*")  # What the guide's system adapts and trains


def toy(data, steps, lr, lora=None, kind=LoRALinear, seed=0):
    "Validation loss of a small character model after some steps"
    seed_torch(seed)
    sizes = dict(d_model=32, n_layers=2, n_heads=4, dropout=0.0)
    lm = new_lm("scratch_gpt", vocab_size=data.tokenizer.vocab_size, ctx_len=32, **sizes)
    if lora:
        add_lora(lm, lora)
        for layer in lora_layers(lm).values():
            layer.__class__ = kind
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=lr)
    batches = RandomBatches(data.tokens["train"].ids, 32, 32, seed)
    for i in range(steps):
        lm.loss(batches[i])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return evaluate(lm, EvaluationBatches(data.tokens["val"].ids, 64, 32).subset(50))["loss"]


def toys(args):
    "Rows of the toy setting, and how much adapters lose to full training in each"
    _, data = corpus(args.quick)
    rows, lost = [], []
    for steps, lr in ((4, 3e-4),) if args.quick else ((400, 3e-4), (150, 1e-2)):
        kinds = {"all weights": {}, "adapters": dict(lora=GUIDE), "cut off": dict(lora=GUIDE, kind=CutOff)}
        loss = {
            name: sum(toy(data, steps, lr, seed=s, **how) for s in range(args.seeds)) / args.seeds
            for name, how in kinds.items()
        }
        rows.append({"steps": steps, "lr": lr, **loss})
        lost.append(loss["adapters"] - loss["all weights"])
    return rows, lost


def main():
    args = options(__doc__, rounds=(6, "timed steps of each"), seeds=(3, "seeds of the toy setting"))
    args.seeds = 1 if args.quick else args.seeds
    rows, lost = toys(args)
    bars = [
        (f"toy: at most 0.1 nats lost to full training ({r['steps']} steps)", f"{x:+.3f}", x <= 0.1)
        for r, x in zip(rows, lost)
    ]
    curve = curves(args.quick)
    if "adapters, peft" in curve:
        far = max(abs(a - b) for a, b in zip(curve["adapters"], curve["adapters, peft"]))
        bars.append(("curve: peft's, to 1e-4", f"{far:.1e}", far <= 1e-4))
    found, batch, lora = steppers(args.quick, torch.bfloat16)
    clocks = interleave(found, 1 if args.quick else args.rounds)
    seconds = {name: least(of) for name, of in clocks.items()}
    for name, s in seconds.items():
        rows.append(
            {
                "step": name,
                "tokens per CPU second": batch.n_targets / s,
                "times all weights": seconds["all weights"] / s,
            }
        )
    bars.append(
        (
            "step: 2 x the tokens of a full one",
            f"{seconds['all weights'] / seconds['adapters']:.2f}",
            seconds["all weights"] >= 2 * seconds["adapters"],
        )
    )
    if "adapters, peft" in seconds:
        ratio = seconds["adapters, peft"] / seconds["adapters"]
        bars.append(("step: peft's tokens", f"{ratio:.2f}", ratio >= 1.0))
    print(f"{n_params(lora, trainable=True):,} of {n_params(lora):,} parameters are trained with adapters")
    finish(args, rows, bars)


if __name__ == "__main__":
    main()
