"""nanoGPT as a peer: a plain implementation of a model in the shape of GPT-2 and of its training loop.

The model has learned positions, pre-layer norm, GELU, an LM head tied to the embedding, and scaled initial weights (Radford et al.
2019). It trains with AdamW and a cosine schedule in float32, on batches stacked from slices. The sizes and rates in `CPU_RECIPE` are
the ones that nanoGPT documents for training on a CPU. Nothing here uses lmnotes, and nothing is tuned.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CPU_RECIPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=64)
CPU_BATCH, CPU_STEPS = 12, 2000


class SelfAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, bias=False)
        self.attn = SelfAttention(n_embd, n_head)
        self.norm2 = nn.LayerNorm(n_embd, bias=False)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.proj(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd):
        super().__init__()
        self.block_size = block_size
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)

    def forward(self, x):
        "(B,T) ids -> (B,T,V) logits"
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.tokens.weight)

    def loss(self, x, y):
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def generate(self, x, n, sample_fn=lambda logits: logits.argmax(-1)):
        "Return `x` and `n` new ids, recomputing everything for each"
        for _ in range(n):
            logits = self(x[:, -self.block_size :])[:, -1]
            x = torch.cat([x, sample_fn(logits)[:, None]], 1)
        return x


class Loop:
    "Training loop. Each call of `run` continues where the last one ended"

    def __init__(self, model, ids, batch_size, steps, lr=1e-3, min_lr=1e-4, warmup=100):
        self.model, self.ids, self.batch_size, self.steps = model, ids, batch_size, steps
        self.lr, self.min_lr, self.warmup, self.step = lr, min_lr, warmup, 0
        decay = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))

    def lr_now(self):
        if self.step < self.warmup:
            return self.lr * (self.step + 1) / (self.warmup + 1)
        r = min(1.0, (self.step - self.warmup) / max(1, self.steps - self.warmup))
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * r)) / 2

    def batch(self):
        T = self.model.block_size
        starts = torch.randint(len(self.ids) - T, (self.batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(self.ids[i : i + T].astype("int64")) for i in starts])
        y = torch.stack([torch.from_numpy(self.ids[i + 1 : i + 1 + T].astype("int64")) for i in starts])
        return x, y

    def train_step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_now()
        loss = self.model.loss(*self.batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def run(self, until):
        self.model.train()
        while self.step < min(until, self.steps):
            self.train_step()


@torch.no_grad()
def full_loss(
    model,  # Returns (B, T, V) logits
    batches,  # Batches (x, y, …) that cover a split once, with y = -100 at positions without a target
):
    "Return the loss in nats per token"
    model.eval()
    total = n = 0
    for x, y, _ in batches:
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        n += (y != -100).sum().item()
    return total / n
