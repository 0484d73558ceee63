"""LoRA against full training and against the library peft: loss, cost of a step, and equal loss curves.

We use a model in the shape of GPT-2 (124 M parameters, random weights) with rank 16 on all linear layers, including the LM head. A small
character model with random frozen weights is trained in full, with adapters, and with adapters that cut the gradient through the frozen
matrix product, a common mistake in hand-written LoRA.
"""

# ruff: noqa: E402
import tempfile

import torch
import torch.nn.functional as F
from common import interleave, load_corpus, min_cpu, parse_options, ratio, report

from lmnotes.core import pick_dtype, seed_torch
from lmnotes.data.batches import Batch, EvaluationBatches, RandomBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.models.gpt2 import to_hf
from lmnotes.nn.lm import n_params, new_lm
from lmnotes.nn.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, save_adapter


def shape(quick):
    small = dict(vocab_size=61, n_positions=32, ctx_len=32, d_model=16, n_layers=2, n_heads=2)
    return {**(small if quick else dict(ctx_len=128)), "dropout": 0.0}


def rows_of_tokens(lm, rows=2):
    "Return a batch of random tokens"
    ids = torch.randint(lm.cfg.vocab_size, (rows, lm.cfg.ctx_len + 1), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:])


def gpt2(quick, lora=False):
    torch.manual_seed(0)
    lm = new_lm("gpt2", **shape(quick)).train()
    return add_lora(lm, LoRAConfig(rank=16)) if lora else lm


def in_peft(quick, ours):
    "Return the same base and adapter as a peft model, or None if peft is not installed"
    try:
        from peft import PeftModel
    except ImportError:
        print("peft is not installed, so the comparison with it is skipped. Install it with: pip install peft")
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ours, folder)
        return PeftModel.from_pretrained(to_hf(gpt2(quick)), folder, is_trainable=True).train()


def stepper(model, loss, batch, dtype):
    "Return a function that runs one training step and returns the loss"
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
    batch, peft_model = rows_of_tokens(lora), in_peft(quick, lora)
    found = {"all weights": stepper(full, our_loss, batch, dtype), "adapters": stepper(lora, our_loss, batch, dtype)}
    if peft_model is not None:
        found["adapters, peft"] = stepper(peft_model, peft_loss, batch, dtype)
    return found, batch, lora


def curves(quick, steps=5):
    "Return the float32 loss curves of lmnotes and peft from the same weights"
    found, _, _ = steppers(quick, torch.float32)
    del found["all weights"]
    return {name: [step() for _ in range(steps)] for name, step in found.items()}


class CutOff(LoRALinear):
    "LoRA layer with the mistake: no gradient flows through the frozen product"

    def forward(self, x):
        with torch.no_grad():
            y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


# Layers that the fresh-or-resume guide adapts and trains
GUIDE = LoRAConfig(rank=16, alpha=24.0, train="embed.* positions.* *norm*")


def toy(data, steps, lr, lora=None, kind=LoRALinear, seed=0):
    "Return the validation loss of a small character model after some steps"
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
    "Return the rows of the toy setting, and the loss of adapters minus full training in each"
    _, data = load_corpus(args.quick)
    rows, gaps = [], []
    for steps, lr in ((4, 3e-4),) if args.quick else ((400, 3e-4), (150, 1e-2)):
        kinds = {"all weights": {}, "adapters": dict(lora=GUIDE), "cut off": dict(lora=GUIDE, kind=CutOff)}
        loss = {
            name: sum(toy(data, steps, lr, seed=s, **lora_args) for s in range(args.seeds)) / args.seeds
            for name, lora_args in kinds.items()
        }
        rows.append({"steps": steps, "lr": lr, **loss})
        gaps.append(loss["adapters"] - loss["all weights"])
    return rows, gaps


def main():
    args = parse_options(__doc__, rounds=(6, "timed steps of each"), seeds=(3, "seeds of the toy setting"))
    args.seeds = 1 if args.quick else args.seeds
    rows, gaps = toys(args)
    bars = [
        (f"toy: loss at most 0.1 nats above full training ({r['steps']} steps)", f"{x:+.3f}", x <= 0.1)
        for r, x in zip(rows, gaps)
    ]
    curve = curves(args.quick)
    if "adapters, peft" in curve:
        difference = max(abs(a - b) for a, b in zip(curve["adapters"], curve["adapters, peft"]))
        bars.append(("loss curve equals peft's to 1e-4", f"{difference:.1e}", difference <= 1e-4))
    found, batch, lora = steppers(args.quick, getattr(torch, pick_dtype("cpu")[0]))
    clocks = interleave(found, 1 if args.quick else args.rounds)
    seconds = {name: min_cpu(of) for name, of in clocks.items()}
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
            "124 M with adapters: times the speed of training all weights (goal 2)",
            ratio(clocks, "all weights", "adapters"),
            seconds["all weights"] >= 2 * seconds["adapters"],
        )
    )
    if "adapters, peft" in seconds:
        times = ratio(clocks, "adapters, peft", "adapters")
        bars.append(("124 M with adapters: times the speed of peft (goal 1.15)", times, times >= 1.15))
    print(f"{n_params(lora, trainable=True):,} of {n_params(lora):,} parameters are trainable with adapters")
    report(args, rows, bars)


if __name__ == "__main__":
    main()
