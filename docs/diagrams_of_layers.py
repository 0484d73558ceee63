"""Diagrams of the parts of models: attention, scans, blocks, adapters, mixtures, denoising and patches."""

from drawing import diagram


def causal_rows(T, S, window=0):
    "Return (T,S) truth values: may query `i`, at position S - T + i, attend to key `j`?"
    window = window or S
    return [[i - window < j <= i for j in range(S)] for i in range(S - T, S)]


def block_rows(n, block):
    "Return (n,2n) truth values: may noisy position 1 to n see clean positions 0 to n-1 and noisy ones 1 to n?"
    starts = [i // block * block for i in range(n)]
    return [[j <= start for j in range(n)] + [other == start for other in starts] for start in starts]


def stream_rows(time, head, window):
    "Return (S,S) truth values: may a position at `time` attend to another, as a text or sense (head 0) or a query?"
    return [
        [tj <= ti and (tj == 0 or hi > 0 or tj > ti - window) and hj in (0, hi) for tj, hj in zip(time, head)]
        for ti, hi in zip(time, head)
    ]


def mask(d, x, y, rows, cell=26, columns=(), names=(), kinds=None):
    "Draw a mask with a filled cell where a row attends to a column, and the names of columns and rows"
    kinds = kinds or ["layer"] * len(rows[0])
    for j, name in enumerate(columns):
        d.box(x + j * cell + 1, y - cell + 1, cell - 2, cell - 2, name, "data")
    for i, name in enumerate(names):
        d.box(x - cell + 1, y + i * cell + 1, cell - 2, cell - 2, name, "data")
    return d.grid(x, y, [[("", kind if true else "") for true, kind in zip(row, kinds)] for row in rows], cell)


@diagram(
    "nn/22_attention",
    "The causal mask",
    "Three masks with a row for each query and a column for each key. Without a window, a query attends to all keys "
    "up to its own position. With a window of 3, it attends to the last 3. New queries attend to cached keys too.",
    268,
)
def causal_mask(d):
    for x, T, S, window, text in (
        (44, 6, 6, 0, "no window"),
        (266, 6, 6, 3, "window = 3"),
        (488, 2, 6, 4, "window = 4, 2 new queries\nafter 4 cached keys"),
    ):
        d.note(x + 78, 20 if "\n" not in text else 24, text)
        positions = [str(i) for i in range(S)]
        mask(d, x, 78, causal_rows(T, S, window), 26, positions, positions[S - T :])
    d.note(566, 174, "gray: positions\nof keys (columns)\nand queries (rows)")
    d.note(350, 252, "A query attends to the blue cells of its row. No cell to the right of its position is blue")


@diagram(
    "nn/22_attention",
    "The KV cache as a ring buffer",
    "A cache of 4 slots holds the keys and values of the last 4 positions. Position p is in slot p mod 4, so position 5 "
    "overwrites position 1, and its query attends to all slots.",
    240,
)
def kv_cache(d):
    for i, held in enumerate(("0123", "4123", "4523")):
        x, new = 14 + 232 * i, 3 + i
        d.note(x + 104, 20, f"after position {new}")
        query = d.box(x + 52, 44, 104, 30, f"q, k, v of {new}", "data")
        for j, p in enumerate(held):
            is_new = int(p) == new
            slot = d.box(x + 52 * j + 2, 110, 48, 44, f"k, v\nof {p}", "layer" if is_new else "state")
            d.note(slot.bottom[0], 172, str(j))
            if is_new:
                side = query.right if j > 2 else query.left
                d.arrow((slot.top[0], 74) if j in (1, 2) else side, (slot.top[0], 74 if j in (1, 2) else 59), slot.top)
    d.note(
        350,
        212,
        "slots 0 to 3: position p is in slot p mod 4 (blue: just written)\nEach new query attends to all slots",
    )


@diagram(
    "nn/23_scans",
    "The S6 scan",
    "A state passes from position to position. At each one it decays by exp of delta A, and delta B x is added. The "
    "output reads the state with C and adds D x. Delta, B and C are computed from the input.",
    310,
)
def s6_scan(d):
    before = d.box(14, 134, 94, 44, "h₀\nstate before", "state")
    for i, sub in enumerate("₁₂₃"):
        x = 176 + 180 * i
        state = d.box(x, 134, 124, 44, f"h{sub}\nE × N numbers", "state")
        d.arrow(before.right, state.left)
        d.note((before.right[0] + x) / 2, 112, f"× exp(Δ{sub}A)")
        source = d.box(x, 232, 124, 32, f"+ Δ{sub} B{sub} x{sub}", "layer")
        d.arrow(source.top, state.bottom)
        d.box(x - 14, 50, 152, 32, f"y{sub} = C{sub}·h{sub} + D x{sub}", "result")
        d.arrow(state.top, (state.top[0], 82))
        before = state
    d.note(350, 20, "Δ, B and C are computed from the input, so the decay differs between positions")
    d.note(350, 290, "A: a negative rate for each number of the state. Large Δ: forget, small Δ: skip")


@diagram(
    "nn/23_scans",
    "The SSD scan",
    "In a matrix of output positions and input positions, the squares on the diagonal are computed directly as matrix "
    "products. Everything below them goes through the state at the start of each chunk.",
    300,
)
def ssd_scan(d):
    rows = [
        [("", "layer" if i // 3 == j // 3 and j <= i else "state" if j // 3 < i // 3 else "") for j in range(9)]
        for i in range(9)
    ]
    d.note(133, 20, "inputs (columns), outputs (rows)")
    d.grid(16, 40, rows, 26)
    d.box(290, 40, 16, 16, kind="layer")
    d.note(314, 48, "inside a chunk: matrix products (C Bᵀ ⊙ L) (Δ x)", "left")
    d.box(290, 76, 16, 16, kind="state")
    d.note(314, 84, "earlier chunks: through the state before the chunk", "left")
    for i in range(3):
        x = 284 + 120 * i
        d.box(x, 128, 100, 44, f"chunk {i + 1}\n3 positions", "layer")
        state = d.box(x + 60, 206, 100, 34, f"state {i + 1}", "state")
        d.arrow((x + 80, 172), (x + 80, 206))
        if i < 2:
            d.arrow((x + 140, 206), (x + 140, 172))
            d.arrow(state.right, (x + 180, 223))
    d.note(484, 272, "L: decays exp(Σ Δ A), one rate for each head\nBy default, a chunk has 64 positions")


@diagram(
    "nn/24_blocks",
    "The transformer block and its attention layer",
    "A block optionally mixes in the input of the first block, then adds attention and a feed-forward layer to the "
    "stream, each on the normalized stream. Attention splits into queries, keys and values.",
    436,
)
def block(d):
    d.frame(14, 24, 300, 352, "Block")
    d.box(26, 48, 276, 34, "stream_mix: a·x + b·x₀ (optional)")
    plus = []
    for i, (norm, layer) in enumerate((("norm1", "attn"), ("norm2", "ffn"))):
        plus.append(d.branch(54, 106 + 132 * i, [(72, 44, norm, "function"), (92, 44, layer, "layer")], drop=42))
    d.arrow((54, 82), plus[0].top)
    d.arrow(plus[0].bottom, plus[1].top)
    d.arrow(plus[1].bottom, (54, 372))
    d.frame(344, 24, 342, 352, "Attention")
    d.box(360, 48, 310, 34, "qkv: one matrix, D × 3D")
    parts = [d.box(360 + 106 * i, 106, 98, 30, name, "data") for i, name in enumerate(("queries", "keys", "values"))]
    for part in parts:
        d.arrow((part.top[0], 82), part.top)
    norm = d.box(360, 160, 204, 44, "RMSNorm (qk_norm)\nthen RoPE (table)", "function")
    value = d.box(572, 160, 98, 44, "value_mix\nwith block 1")
    d.arrow(parts[0].bottom, (parts[0].bottom[0], 160))
    d.arrow(parts[1].bottom, (parts[1].bottom[0], 160))
    d.arrow(parts[2].bottom, value.top)
    cache = d.box(466, 228, 204, 34, "KV cache, in generation", "state")
    d.arrow((515, 204), (515, 228))
    d.arrow(value.bottom, (value.bottom[0], 228))
    attend = d.box(360, 286, 310, 34, "softmax(s q·k, masked) · v, in each head", "function")
    d.arrow((409, 204), (409, 286))
    d.arrow(cache.bottom, (cache.bottom[0], 286))
    out = d.box(360, 332, 310, 34, "out: D × D")
    d.arrow(attend.bottom, out.top)
    d.note(350, 396, "scale s: 1 / √d, with qk_norm 1.2 / √d. gpt uses all options, scratch_gpt none")
    d.legend(424, "layer", "function", "state", "data")


@diagram(
    "nn/25_lora",
    "A linear layer with a LoRA adapter",
    "The input passes through the frozen weight W and, beside it, through the thin matrices A and B. The update, scaled "
    "by alpha over r, is added to the output.",
    270,
)
def lora(d):
    d.box(14, 112, 100, 44, "input x\n(…, in)", "data")
    w = d.box(220, 26, 300, 74, "W: out × in\nfrozen, with its bias", "data")
    a = d.box(220, 164, 110, 44, "A: r × in\nrandom start")
    b = d.box(410, 164, 110, 44, "B: out × r\nzero start")
    plus = d.circle(584, 134, "+")
    y = d.box(622, 112, 64, 44, "output\n(…, out)", "result")
    d.arrow((114, 134), (160, 134), (160, 63), w.left)
    d.arrow((114, 134), (160, 134), (160, 186), a.left)
    d.arrow(a.right, b.left)
    d.note(370, 158, "r")
    d.arrow(w.right, (584, 63), plus.top)
    d.arrow(b.right, (584, 186), plus.bottom)
    d.note(620, 186, "× α / r")
    d.arrow(plus.right, y.left)
    d.note(350, 240, "By default, r = 16, α = 2r, and only A and B are trained. Checkpoints hold only them")


@diagram(
    "nn/27_mixture",
    "Latent attention",
    "Each position caches a latent vector of 128 numbers and a rotary key of 32. In training, the latents are expanded "
    "to keys and values of all heads. With a cache, the key matrix is absorbed into the query instead.",
    420,
)
def latent_attention(d):
    x = d.box(250, 14, 200, 32, "input x, D = 384", "data")
    q = d.box(14, 84, 272, 44, "q: a query for each head\n64 content + 32 rotary numbers")
    kv = d.box(396, 84, 290, 44, "kv: one entry for all heads\n128 latent + 32 rotary numbers")
    d.arrow(x.left, (q.top[0], 30), q.top)
    d.arrow(x.right, (kv.top[0], 30), kv.top)
    cache = d.box(396, 150, 290, 44, "cache entry of 160 numbers (not 768)\nlatent: RMSNorm, rotary key: RoPE", "state")
    d.arrow(kv.bottom, cache.top)
    d.frame(14, 240, 324, 118, "whole sequence: expand", 0.58)
    d.frame(362, 240, 324, 118, "with a cache: absorb", 0.42)
    d.box(26, 260, 300, 44, "key = up_k · latent, and rotary key\nvalue = up_v · latent")
    d.box(26, 316, 300, 32, "attention of each head", "function")
    d.box(374, 260, 300, 44, "query = up_kᵀ · content, and rotary\nattends to the cache entries")
    d.box(374, 316, 300, 32, "output = up_v · weighted latent")
    for left in (176, 524):
        d.arrow((left, 304), (left, 316))
    d.arrow(q.bottom, (q.bottom[0], 214), tip=False)
    d.arrow(cache.bottom, (cache.bottom[0], 214), tip=False)
    d.arrow((150, 214), (50, 214), (50, 240))
    d.arrow((541, 214), (650, 214), (650, 240))
    d.arrow((150, 214), (541, 214), tip=False)
    d.note(350, 386, "Both ways give the same result. An output matrix, zero at the start, follows")


@diagram(
    "nn/27_mixture",
    "The router of a mixture",
    "The router turns the hidden state of each token into a weight for each expert. The prediction is the weighted sum "
    "of the experts' probabilities. Three terms are added to the loss of the text.",
    330,
)
def router(d):
    tokens = ("the", "cat", "sat", "on")
    weights = ((98, 1, 1), (60, 30, 10), (20, 70, 10), (34, 33, 33))
    d.note(98, 20, "example: 4 tokens")
    for i, token in enumerate(tokens):
        d.box(14, 68 + 40 * i, 56, 32, token, "data")
        h = d.box(88, 68 + 40 * i, 78, 32, "state", "data")
        d.arrow(h.right, (198, 84 + 40 * i))
    d.box(198, 68, 110, 152, "router\nRMSNorm,\none matrix,\nsoftmax")
    for j, name in enumerate(("expert 1", "expert 2", "expert 3")):
        d.note(388 + 88 * j, 46, name)
    for i, row in enumerate(weights):
        d.arrow((308, 84 + 40 * i), (344, 84 + 40 * i))
        for j, w in enumerate(row):
            kind = "layer" if w == max(row) else "data"
            d.box(346 + 88 * j, 68 + 40 * i, 84, 32, f"{w / 100:.2f}", kind)
    d.note(652, 128, "each row\nsums to 1\nblue: the\nlargest")
    d.note(350, 252, "prediction: p = w₁ p₁ + w₂ p₂ + w₃ p₃ (fusion=mixture)")
    d.note(
        350,
        296,
        "loss = cross-entropy − 0.01 · entropy + 0.01 · balance + 0.001 · z\nThe weights of a token depend on it and earlier tokens only",
    )


@diagram(
    "nn/28_denoising",
    "Masked diffusion",
    "In training, k of n ids are hidden and the network predicts them from all others, with the loss weighted by n over "
    "k. Generation starts with masks everywhere and reveals ids step by step.",
    400,
)
def masked_diffusion(d):
    text = ("the", "cat", "sat", "on", "the", "mat", ".")
    hidden, x, w = (2, 3, 5), 106, 60

    def row(y, name, words):
        d.note(x - 10, y + 15, name, "right")
        d.grid(x, y, [words], 30, w)

    d.frame(14, 22, 672, 166, "training: n = 6 ids after the first, k = 3 of them hidden")
    row(44, "ids", [(word, "data") for word in text])
    row(94, "input", [("mask", "noise") if i in hidden else (word, "data") for i, word in enumerate(text)])
    row(144, "targets", [(word, "result") if i in hidden else ("", "") for i, word in enumerate(text)])
    for i in hidden:
        d.arrow((x + w * i + w / 2, 124), (x + w * i + w / 2, 144))
    d.note(606, 109, "the network sees\nall positions")
    d.note(606, 159, "loss × n / k")
    d.frame(14, 222, 672, 162, "generation (sampler=ancestral): each step reveals some ids, in random order")
    for step, known in enumerate(((0,), (0, 4), (0, 1, 4, 6), range(7))):
        words = [(word, "data") if i in known else ("mask", "noise") for i, word in enumerate(text)]
        row(242 + 34 * step, f"step {step}", words)


@diagram(
    "models/35_bytepatch",
    "Patches and thinking steps",
    "Bytes 0 to 11 form three patches. The latent of a patch is refined in several thinking steps and then added "
    "where the bytes of the next patch are predicted.",
    330,
)
def patches(d):
    centers = []
    for patch in range(3):
        x = 26 + 220 * patch
        d.grid(x, 22, [[(str(4 * patch + i), "data") for i in range(4)]], 30, 52)
        centers.append(x + 104)
    for patch, x in enumerate(centers):
        latent = d.box(x - 76, 80, 152, 44, f"patch layers\nlatent {patch}")
        d.arrow((x, 52), latent.top)
        if patch < 2:
            d.arrow(latent.right, (x + 144, latent.right[1]))
        think = d.box(x - 76, 148, 152, 48, "thinking, 3 times\nz + g ⊙ (layer(z) − z)")
        d.arrow(latent.bottom, think.top)
        first, last = 4 * patch + 4, 4 * patch + 7
        goal = d.box(x - 76, 228, 152, 44, f"helps to predict\nbytes {first} to {last}", "result")
        d.arrow(think.bottom, goal.top)
    for a, b in zip(centers, centers[1:]):
        d.arrow((a + 76, 172), (b - 76, 172))
    d.note(350, 300, "z: a latent, g: a gate from 0 to 1. Bytes 0 to 3 are predicted without a latent")


@diagram(
    "models/38_streams",
    "The mask across streams",
    "Ten positions of a sequence with their times. A position attends to every position that is not later, and no "
    "position attends to the queries of another head.",
    356,
)
def stream_mask(d):
    time, head = [0, 0, 1, 2, 3, 1, 2, 4, 5, 4], [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]
    kinds = ["state"] * 2 + ["layer"] * 3 + ["data"] * 2 + ["noise"] * 2 + ["result"]
    rows = stream_rows(time, head, 8)
    d.note(230, 16, "times of the positions attended to")
    for i, t in enumerate(time):
        d.box(101 + 26 * i, 34, 24, 24, str(t), kinds[i])
        d.box(75, 61 + 26 * i, 24, 24, str(t), kinds[i])
    mask(d, 100, 60, rows, 26, kinds=kinds)
    names = (
        "2 contacts (touch)",
        "3 tokens of a text",
        "2 tokens of another text",
        "2 queries of a head",
        "1 query of another head",
    )
    for i, (name, kind) in enumerate(zip(names, ("state", "layer", "data", "noise", "result"))):
        d.box(400, 76 + 36 * i, 16, 16, kind=kind)
        d.note(424, 84 + 36 * i, name, "left")
    d.note(
        540,
        290,
        "Rule: a row attends to the columns\nwhose time is not later than its own,\nexcept queries of other heads",
    )
    d.note(350, 340, "Senses have time 0, token t of a text has time t + 1, queries come last")
