"""Test mode of the fresh-or-resume guide (0.7 M parameters, 1,000 steps of 32 x 64 tokens) against `arch='scratch_gpt'`.

The peer is the model of the fresh-or-resume guide: each head has separate query, key and value matrices, scores are divided by the
square root of the whole width, weights have torch's default initialization, AdamW runs at a constant rate, and batches come from torch's
global generator. Both train on the same number of tokens with the same settings, in turns of 50 steps, and we evaluate them on the whole
validation split. Then we train `scratch_gpt` again with lmnotes' own optimizer and schedule. Only training steps are timed.
`--tokenizer bpe` repeats the comparison with subwords, using the same tokenizer and vocabulary for all.
"""

from common import Clock, load_corpus, report, parse_options, build_parts  # isort: skip
import copy

import torch
import torch.nn.functional as F
from nanogpt import full_loss
from torch import nn

from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer

TEST_MODE = dict(ctx_len=64, batch_size=32, seed=1337)
SHAPE = dict(n_embd=128, n_head=4, n_layer=3, dropout=0.2)
RATE = 3e-4
RECIPE = dict(
    optimizer="adamw", lr=RATE, weight_decay=0.01, betas="0.9 0.999", schedule="constant", clip=0.0, warmup=0.0
)


class Head(nn.Module):
    "One head of self-attention"

    def __init__(self, n_embd, head_size, block_size, dropout):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * C**-0.5
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.heads = nn.ModuleList(Head(n_embd, n_embd // n_head, block_size, dropout) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.attention = MultiHeadAttention(n_embd, n_head, block_size, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class GuideGPT(nn.Module):
    "Model that the fresh-or-resume guide names BigramLanguageModel"

    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer, dropout):
        super().__init__()
        self.block_size = block_size
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(h)))


class Loop:
    "Training loop of the fresh-or-resume guide. Each call of `run` continues where the last one ended, with the saved generator state"

    def __init__(self, model, ids, batch_size):
        self.model, self.ids, self.batch_size, self.step = model, torch.from_numpy(ids.astype("int64")), batch_size, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self.draws = torch.get_rng_state()

    def batch(self):
        T = self.model.block_size
        starts = torch.randint(len(self.ids) - T, (self.batch_size,))
        x = torch.stack([self.ids[i : i + T] for i in starts])
        y = torch.stack([self.ids[i + 1 : i + T + 1] for i in starts])
        return x, y

    def run(self, until):
        torch.set_rng_state(self.draws)
        self.model.train()
        while self.step < until:
            x, y = self.batch()
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.step += 1
        self.draws = torch.get_rng_state()


def main():
    args = parse_options(
        __doc__,
        steps=(1000, "length of all runs"),
        every=(50, "steps in a turn"),
        tokenizer=("chars", "of all runs: chars | bpe | bpe:SIZE"),
    )
    steps, every = (20, 10) if args.quick else (args.steps, args.every)
    cfg, data = load_corpus(
        args.quick, tokenizer=args.tokenizer, arch="scratch_gpt", preset="test", steps=steps, **TEST_MODE, **RECIPE
    )
    own = copy.copy(cfg)
    own.optimizer, own.lr, own.weight_decay, own.betas, own.schedule, own.clip = (
        "muon",
        0.0,
        0.0,
        "0.9 0.95",
        "wsd",
        1.0,
    )

    runs = {}
    for name, settings in {"scratch_gpt, same recipe": cfg, "scratch_gpt, lmnotes' recipe": own}.items():
        lm, batches, val = build_parts(settings, data, dropout=SHAPE["dropout"])
        runs[name] = Trainer(lm, batches, settings)
    torch.manual_seed(cfg.seed)
    model = GuideGPT(data.tokenizer.vocab_size, cfg.ctx_len, **SHAPE)
    peer = Loop(model, data.tokens["train"].ids, cfg.batch_size)
    turns = {"fresh-or-resume guide": peer.run, **{name: trainer.fit for name, trainer in runs.items()}}

    clocks = {name: Clock() for name in turns}
    for step in range(every, steps + 1, every):
        for name, turn in turns.items():
            with clocks[name]:
                turn(step)
        if step % (4 * every) == 0:
            print(f"step {step}: {', '.join(f'{name} {c.cpu:.1f} CPU s' for name, c in clocks.items())}", flush=True)

    judged = val.subset(2 if args.quick else 0)
    loss = {"fresh-or-resume guide": full_loss(model, judged)}
    loss |= {name: evaluate(t.lm, judged, autocast=t.autocast)["loss"] for name, t in runs.items()}
    size = {"fresh-or-resume guide": n_params(model), **{name: n_params(t.lm) for name, t in runs.items()}}
    rows = [
        dict(
            model=name,
            parameters=size[name],
            steps=steps,
            CPU_s=clocks[name].cpu,
            wall_s=clocks[name].wall,
            loss=loss[name],
        )
        for name in turns
    ]
    guide_loss, same_recipe_loss, best = loss.values()
    ratio = clocks["fresh-or-resume guide"].cpu / clocks["scratch_gpt, same recipe"].cpu
    report(
        args,
        rows,
        [
            (
                "loss at most that of the fresh-or-resume guide, with its recipe",
                f"{same_recipe_loss:.4f} and {guide_loss:.4f}",
                same_recipe_loss <= guide_loss,
            ),
            (
                "loss below both, with lmnotes' optimizer and schedule",
                f"{best:.4f}",
                best < min(same_recipe_loss, guide_loss),
            ),
            ("CPU seconds at most those of the fresh-or-resume guide", f"1/{ratio:.2f}", ratio >= 1),
        ],
    )


if __name__ == "__main__":
    main()
