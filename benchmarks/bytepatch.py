"""AGIFORMER's model, reduced (d_model 128, 4 layers, 1,000 steps of 4 x 1,024 bytes), against `arch='bytepatch'`.

The peer is a plain implementation of AGIFORMER's model in float32. It builds the window mask at each call and computes
all N x N scores. Its linear attention stores the running sum of outer products for every position. For each byte,
torch's GRU reads the embedding concatenated with the latent of the patch. The peer's weights load into our model and
vice versa. First we train all models interleaved and time them. Then we train all but the peer to the end: preset
`agiformer` with AGIFORMER's recipe (AdamW at a constant 3e-4 after 100 steps), the same preset with lmnotes' own
optimizer and schedule, the default `bytepatch`, and a decoder of single bytes. We evaluate on the whole validation
split, 5% of the bytes after the first 90%. The data is the source of the standard library, which comes with every
Python. `--data bytes:PATH` takes any file.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts  # isort: skip
import copy

import torch
import torch.nn.functional as F
from torch import nn

from lmnotes.data.batches import EvaluationBatches
from lmnotes.inference.evaluation import evaluate
from lmnotes.nn.lm import n_params
from lmnotes.training.trainer import Trainer

REDUCED = dict(d_model=128, n_layers=4, n_heads=4)  # Heads are 32 wide, as in AGIFORMER's small model
RATE, WARMUP, CLIP = 3e-4, 100, 0.5
GUIDE = dict(
    optimizer="adamw",
    lr=RATE,
    weight_decay=0.01,
    betas="0.9 0.999",
    schedule="constant",
    clip=CLIP,
    warmup=WARMUP,
)


class WindowAttention(nn.Module):
    def __init__(self, d, n_heads, window):
        super().__init__()
        self.n_heads, self.window = n_heads, window
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (D // self.n_heads) ** -0.5
        i, j = torch.arange(N)[:, None], torch.arange(N)[None]
        scores = scores.masked_fill((j > i) | (j <= i - self.window), -1e4)
        return self.out((F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(B, N, D))


class LinearAttention(nn.Module):
    def __init__(self, d, n_heads, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(dropout)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.n_heads, D // self.n_heads).unbind(2)
        q = (F.elu(q) + 1 + 1e-4) * (D // self.n_heads) ** -0.5
        k = F.elu(k) + 1 + 1e-4
        products = torch.einsum("bnhd,bnhe->bnhde", k, v).cumsum(1)
        above = torch.einsum("bnhd,bnhde->bnhe", q, products)
        below = torch.einsum("bnhd,bnhd->bnh", q, k.cumsum(1))[..., None] + 1e-4
        return self.dropout(self.norm(self.out((above / below).reshape(B, N, D))))


class MLP(nn.Module):
    def __init__(self, d, dropout):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, d, n_heads, window, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.local, self.linear = WindowAttention(d, n_heads, window), LinearAttention(d, n_heads, dropout)
        self.out, self.ffn = nn.Linear(d, d), MLP(d, dropout)

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.out(self.local(h) + self.linear(h))
        return x + self.ffn(self.norm2(x))


class Thinking(nn.Module):
    def __init__(self, d, dropout):
        super().__init__()
        self.norm, self.gate, self.ffn = nn.LayerNorm(d), nn.Linear(d, d), MLP(d, dropout)

    def forward(self, z):
        h = self.norm(z)
        return z + torch.sigmoid(self.gate(h)) * self.ffn(h)


class Patches(nn.Module):
    def __init__(self, d, n_layers, n_heads, window, thinking_steps, dropout):
        super().__init__()
        self.norm_in, self.norm_out, self.dropout = nn.LayerNorm(d), nn.LayerNorm(d), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(d, n_heads, window, dropout) for _ in range(n_layers))
        self.thinking, self.thinking_steps = Thinking(d, dropout), thinking_steps
        self.frequency = 10000.0 ** (-torch.arange(0, d, 2) / d)

    def forward(self, x):
        angle = torch.arange(x.shape[1])[:, None] * self.frequency
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        first, second = x.chunk(2, -1)
        z = self.dropout(self.norm_in(x * cos + torch.cat([-second, first], -1) * sin))
        for layer in self.layers:
            z = layer(z)
        z = self.norm_out(z)
        for _ in range(self.thinking_steps):
            z = self.thinking(z)
        return z


class Bytes(nn.Module):
    def __init__(self, d, patch_size, d_byte=256):
        super().__init__()
        self.embed, self.conv = nn.Embedding(256, d), nn.Conv1d(d, d, patch_size, stride=patch_size)
        self.latent, self.byte_embed = nn.Linear(d, d_byte), nn.Embedding(256, d_byte)
        self.gru, self.head = nn.GRU(2 * d_byte, d_byte, batch_first=True), nn.Linear(d_byte, 256)

    def join(self, x):
        return self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)

    def write(self, latents, targets):
        "(B,N,D) latents and (B,N,P) bytes of the patches after them -> (B,N,P,256)"
        B, N, P = targets.shape
        before = self.byte_embed(F.pad(targets[:, :, :-1], (1, 0)))
        z = self.latent(latents)[:, :, None].expand(-1, -1, P, -1)
        h, _ = self.gru(torch.cat([before, z], -1).view(B * N, P, -1))
        return self.head(h).view(B, N, P, -1)


class GuideModel(nn.Module):
    "Plain implementation of AGIFORMER's model"

    def __init__(self, d_model, n_layers, n_heads=8, patch_size=4, window=128, thinking_steps=3, dropout=0.1):
        super().__init__()
        self.patch_size = patch_size
        self.bytes = Bytes(d_model, patch_size)
        self.patches = Patches(d_model, n_layers, n_heads, window, thinking_steps, dropout)

    def forward(self, window):
        "(B,L) bytes -> (B,L/P-1,P,256) logits of all bytes after the first patch, and these bytes"
        P = self.patch_size
        targets = window[:, P:].unflatten(1, (-1, P))
        return self.bytes.write(self.patches(self.bytes.join(window[:, :-P])), targets), targets


class Loop:
    "AGIFORMER's training loop"

    def __init__(self, model, batches):
        self.model, self.batches, self.step = model.train(), batches, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)

    def train_step(self):
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1, (self.step + 1) / WARMUP)
        logits, targets = self.model(self.batches[self.step].x)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.step += 1


def trainers(
    args,  # From `parse_options`
    cfg,  # `RunConfig`
    data,  # From `load_corpus`
    shape,  # Configuration values of the reduced model
):  # {name: Trainer}
    "Return the trainers of the four models that are trained to the end"
    guide = dict(arch="bytepatch", preset="agiformer")
    wanted = {
        "agiformer, its own recipe": (guide | GUIDE, shape | dict(dropout=0.1)),
        "agiformer, lmnotes' recipe": (guide, shape),
        "bytepatch": (dict(arch="bytepatch"), dict(ngram_rows=64) if args.quick else {}),
        "gpt on bytes": (dict(arch="gpt", preset="bytes"), {}),
    }
    runs = {}
    for name, (settings, model) in wanted.items():
        own = copy.copy(cfg)
        vars(own).update(settings)
        lm, batches, _ = build_parts(own, data, **model)
        runs[name] = Trainer(lm, batches, own)
    return runs


def main():
    args = parse_options(
        __doc__,
        steps=(1000, "length of the four runs"),
        rounds=(8, "timed turns of all five models"),
        turn=(5, "steps in a turn"),
        data=("stdlib", "a corpus, or bytes:PATH for any file"),
    )
    steps, rounds, turn = (4, 1, 2) if args.quick else (args.steps, args.rounds, args.turn)
    shape = dict(REDUCED, d_model=32, n_layers=1) if args.quick else REDUCED
    size = dict(tokenizer="bytes", ctx_len=128 if args.quick else 1024, batch_size=4, steps=steps)
    source = {} if args.quick else dict(data=args.data, split="enwik8")
    cfg, data = load_corpus(args.quick, **size, **source)
    runs, val = trainers(args, cfg, data, shape), EvaluationBatches(data.tokens["val"].ids, 8, cfg.ctx_len)
    torch.manual_seed(cfg.seed)
    peer = Loop(GuideModel(**shape), runs["bytepatch"].batches)

    def some_steps(train_step):
        return lambda: [train_step() for _ in range(turn)]

    steppers = {"AGIFORMER": peer.train_step, **{name: t.train_step for name, t in runs.items()}}
    clocks = interleave({name: some_steps(train_step) for name, train_step in steppers.items()}, rounds)
    rows = [dict(model="AGIFORMER", parameters=n_params(peer.model), **timing_columns(clocks["AGIFORMER"], calls=turn))]
    for name, t in runs.items():
        t.fit()
        result = evaluate(t.lm, val.subset(2 if args.quick else 0), data.tokenizer.byte_lengths, t.autocast)
        rows.append(dict(model=name, parameters=n_params(t.lm), **timing_columns(clocks[name], calls=turn)))
        rows[-1].update({"bytes": t.counters["tokens"], "bpb": result["bpb"], "±": result["bpb_stderr"]})
        print(f"{name}: {result['bpb']:.4f} bits per byte", flush=True)

    bpb = {row["model"]: row.get("bpb") for row in rows}
    gain = bpb["agiformer, its own recipe"] - bpb["bytepatch"]
    ratio = min_cpu(clocks["AGIFORMER"]) / min_cpu(clocks["agiformer, its own recipe"])
    report(
        args,
        rows,
        [
            (
                "bytepatch at least 0.25 bits per byte below agiformer, each with its own recipe",
                f"{gain:.4f}",
                gain >= 0.25,
            ),
            (
                "agiformer processes at least 6 times the bytes per CPU second of the plain implementation",
                f"{ratio:.2f}",
                ratio >= 6,
            ),
        ],
    )


if __name__ == "__main__":
    main()
