"""Diagrams of the model interface and of the architectures, with the default values of their configurations."""

from diagrams_of_layers import block_rows, mask
from drawing import diagram

LEFT, COLUMN = 14, 200  # Place and width of the column from ids to logits
MIX = ("mix: a·x + b·x₀", "layer")


def pipeline(d, items, y=16, h=36, gap=16):
    "Draw the column from ids to logits"
    return d.stack(LEFT, y, COLUMN, items, h, gap)


@diagram(
    "nn/20_lm",
    "The model interface",
    "The trainer and evaluation call loss, which calls forward. Generation calls generate, which calls step for each "
    "new token. A building block splits forward into embed_ids, hidden_states and logits.",
    240,
)
def model_interface(d):
    train = d.box(14, 30, 160, 44, "trainer\nand evaluation", "data")
    loss = d.box(226, 30, 200, 44, "loss(batch)\ncross-entropy of batch.y")
    forward = d.box(478, 30, 208, 44, "forward(x)\nids (B,T) → logits (B,T,V)")
    text = d.box(14, 146, 160, 44, "generation", "data")
    generate = d.box(226, 146, 200, 44, "generate(x, n, sample_fn)\none id after another")
    step = d.box(478, 146, 208, 44, "step(x, state)\nnew ids → logits (B,V), state")
    for a, b in ((train, loss), (loss, forward), (text, generate), (generate, step)):
        d.arrow(a.right, b.left)
    d.arrow(step.top, forward.bottom)
    d.note(570, 110, "default: the last ctx_len ids", "right")
    d.note(350, 220, "a building block splits forward: logits(hidden_states(embed_ids(x)))")


@diagram(
    "nn/20_lm",
    "The bigram model",
    "Each id selects one row of a table with V rows and V columns. The row holds the logits of the next id.",
    216,
)
def bigram(d):
    ids = [d.box(14, 23 + 28 * i, 62, 26, f"id {n}", "data") for i, n in enumerate((2, 0, 1, 3, 2))]
    table = d.grid(190, 22, [[("", "layer" if i == 3 else "")] * 6 for i in range(6)], 28)
    d.arrow(ids[3].right, table[18].left)
    d.note(274, 204, "table of V × V weights, zero at the start")
    logits = d.box(420, 106, 116, 28, "logits (V)", "data")
    d.arrow(table[23].right, logits.left)
    result = d.box(574, 98, 112, 44, "next id:\nsoftmax", "result")
    d.arrow(logits.right, result.left)
    d.note(550, 48, "each prediction depends on\none id, and on no earlier one")


@diagram(
    "models/30_rnn",
    "The recurrent network",
    "Every id is embedded and enters a GRU or LSTM cell, which updates a state of fixed size. A linear head computes "
    "the logits of the next id from the state.",
    362,
)
def rnn(d):
    before = None
    for i, t in enumerate(("1", "2", "t")):
        x = 128 + 214 * i
        ids = d.box(x, 276, 140, 34, f"id at position {t}", "data")
        embed = d.box(x, 218, 140, 38, "embedding\nV × 128")
        cell = d.box(x, 138, 140, 50, "GRU or LSTM\n256 units")
        head = d.box(x, 70, 140, 38, "LM head\n256 × V, with bias")
        out = d.box(x, 14, 140, 34, "logits (V)", "result")
        for a, b in ((ids, embed), (embed, cell), (cell, head), (head, out)):
            d.arrow(a.top, b.bottom)
        if before:
            d.arrow(before.right, cell.left)
        before = before or d.box(14, 142, 66, 42, "state\nzero", "state")
        if i == 0:
            d.arrow(before.right, cell.left)
        before = cell
        if i:
            d.note(x - 37, 122, "state" if i == 1 else "… state")
    d.note(350, 336, "The state is the only memory. Its size is fixed, so each id costs the same")


def residual_block(d, x, y, w, h, title, mix, attention, ffn, norm=("RMSNorm", "function")):
    "Draw a transformer block in a frame: mixing of the stream if `mix`, attention, feed-forward"
    d.frame(x, y, w, h, title)
    stream, top, start = x + 84, y + 34, (x + 84, y + 16)
    tall = [17 * (text.count("\n") + 1) + 12 for text in (attention, ffn)]
    space = (h - 34 - sum(tall) - 52 * mix - 22) / 4
    if mix:
        box = d.box(x + 8, top, 152, 34, *MIX)
        d.note(x + 168, top + 17, "x₀: input of block 1\na = 1 and b = 0 at the start", "left")
        d.arrow(start, box.top)
        start, top = box.bottom, top + 52
    for height, text in zip(tall, (attention, ffn)):
        circle = d.branch(stream, top, [(88, 36, *norm), (w - 238, height, text, "layer")], drop=space)
        d.arrow(start, circle.top)
        start, top = circle.bottom, top + height + 2 * space
    d.arrow(start, (stream, y + h - 4))


@diagram(
    "models/31_gpt",
    "The architecture gpt",
    "Ids are embedded, normalized, and pass through transformer blocks, a last RMSNorm, the LM head and a soft-cap. "
    "Each block mixes in the input of block 1, then adds attention and a feed-forward layer to the stream.",
    500,
)
def gpt(d):
    items = [
        ("ids (B, T)", "data"),
        ("embedding, V × D", "layer"),
        ("RMSNorm", "function"),
        ("blocks 1 to n_layers", "layer"),
        ("RMSNorm", "function"),
        ("LM head, D × V, zero", "layer"),
        ("15 · tanh(logits / 15)", "function"),
        ("logits (B, T, V)", "result"),
    ]
    boxes = pipeline(d, items)
    attention = "causal attention\nqueries, keys: RMSNorm, RoPE\nvalues: mixed with block 1's\noutput matrix: zero"
    residual_block(d, 232, 24, 454, 392, "one block", True, attention, "feed-forward\nD → 4D, ReLU², 4D → D (zero)")
    d.arrow(boxes[3].right, (232, boxes[3].right[1]))
    d.note(350, 452, "“zero”: the weights start at zero, so a new block changes nothing")
    d.legend(482, "data", "layer", "function", "result")


@diagram(
    "models/32_scratch_gpt",
    "The architecture scratch_gpt",
    "Token and position embeddings are added. Blocks apply LayerNorm before attention and before a ReLU feed-forward "
    "layer. A LayerNorm and an untied LM head follow.",
    430,
)
def scratch_gpt(d):
    boxes = pipeline(
        d,
        [
            ("ids (B, T)", "data"),
            ("token embedding, V × D", "layer"),
            ("+ position embedding", "layer"),
            ("blocks 1 to n_layers", "layer"),
            ("LayerNorm", "layer"),
            ("LM head with bias", "layer"),
            ("logits (B, T, V)", "result"),
        ],
    )
    attention = "causal attention\nq, k, v: no bias\noutput: bias, dropout"
    ffn = "feed-forward, biases\nD → 4D, ReLU, 4D → D, dropout"
    residual_block(d, 232, 24, 454, 300, "one block", False, attention, ffn, ("LayerNorm", "layer"))
    d.arrow(boxes[3].right, (232, boxes[3].right[1]))
    d.note(459, 354, "positions: a learned row for each of ctx_len")
    d.legend(408, "data", "layer", "result")


@diagram(
    "models/33_gpt2",
    "The architecture gpt2",
    "The layers are those of GPT2LMHeadModel in transformers. This library replaces its attention kernel and dropout, "
    "and adds the methods of the model interface.",
    452,
)
def gpt2(d):
    boxes = pipeline(
        d,
        [
            ("ids (B, T)", "data"),
            ("token embedding, V × D", "layer"),
            ("+ position embedding", "layer"),
            ("blocks 1 to n_layers", "layer"),
            ("LayerNorm", "layer"),
            ("LM head, tied", "layer"),
            ("logits (B, T, V)", "result"),
        ],
    )
    d.arrow(boxes[5].left, (5, boxes[5].left[1]), (5, boxes[1].left[1]), boxes[1].left, tip=False)
    attention = "attention, biases\nscores / √(head width)\nour causal kernel"
    ffn = "feed-forward, biases\nD → 4D, GELU (tanh), 4D → D"
    residual_block(d, 232, 24, 454, 300, "one block, from transformers", False, attention, ffn, ("LayerNorm", "layer"))
    d.arrow(boxes[3].right, (232, boxes[3].right[1]))
    d.note(459, 354, "weights: pretrained (gpt2 to gpt2-xl) or random")
    d.note(350, 398, "line on the left: token embedding and LM head are one matrix (tie=True)")
    d.legend(432, "data", "layer", "result")


@diagram(
    "models/34_ssm",
    "The architecture ssm",
    "A block normalizes the stream, projects it to z, x, B, C and dt, applies a short convolution and the scan, gates "
    "the result with SiLU(z), normalizes it and adds its projection to the stream.",
    500,
)
def ssm(d):
    boxes = pipeline(
        d,
        [
            ("ids (B, T)", "data"),
            ("embedding, V × D", "layer"),
            ("RMSNorm", "function"),
            ("blocks 1 to n_layers", "layer"),
            ("RMSNorm", "function"),
            ("LM head, D × V, zero", "layer"),
            ("15 · tanh(logits / 15)", "function"),
            ("logits (B, T, V)", "result"),
        ],
    )
    d.frame(232, 24, 454, 418, "one block, kind=ssd")
    d.arrow(boxes[3].right, (232, boxes[3].right[1]))
    mix = d.box(262, 48, 152, 32, *MIX)
    norm = d.box(262, 98, 152, 32, "RMSNorm", "function")
    d.box(262, 148, 412, 32, "in_proj: one matrix gives z, x, B, C and dt")
    conv = d.box(346, 212, 172, 44, "x, B, C: convolution\nover 4 positions, SiLU")
    step = d.box(538, 212, 136, 44, "dt: softplus(\ndt + bias)", "layer")
    scan = d.box(346, 282, 328, 44, "scan: state h of each channel (32 numbers)\noutput y = C·h + D x", "state")
    gate = d.box(346, 352, 328, 32, "RMSNorm(y · SiLU(z))", "function")
    out = d.box(346, 400, 328, 32, "out_proj, zero at the start")
    circle = d.circle(302, 416, "+")
    d.arrow((338, 34), mix.top)
    d.arrow(mix.bottom, norm.top)
    d.arrow((338, 89), (251 + 3, 89), (254, 416), circle.left)
    d.arrow(norm.bottom, (338, 148))
    d.arrow((432, 180), conv.top)
    d.arrow((606, 180), step.top)
    d.arrow(conv.bottom, (432, 282))
    d.arrow(step.bottom, (606, 282))
    d.arrow(scan.bottom, gate.top)
    d.arrow((302, 180), (302, 368), gate.left)
    d.note(302, 240, "z")
    d.arrow(gate.bottom, out.top)
    d.arrow(out.left, circle.right)
    d.arrow(circle.bottom, (302, 456))
    d.legend(482, "data", "layer", "function", "state", "result")


@diagram(
    "models/35_bytepatch",
    "The architecture bytepatch",
    "Byte layers read every byte, patch layers and a thinking layer run once for each four bytes, and the latent of a "
    "patch is added to the bytes of the next patch before the last byte layers predict.",
    430,
)
def bytepatch(d):
    d.frame(14, 22, 300, 346, "for each byte")
    d.frame(386, 22, 300, 346, "for each patch of 4 bytes")
    a = d.stack(
        34,
        44,
        260,
        [
            ("byte embedding\n+ embeddings of 2-, 3- and 4-grams", "layer"),
            ("RMSNorm, then 1 byte layer\nattends to the last 64 bytes", "layer"),
        ],
        44,
        18,
    )
    plus = d.circle(164, 216, "+")
    last = d.box(34, 248, 260, 44, "1 byte layer\nattends to the last 64 bytes")
    head = d.box(34, 312, 260, 44, "RMSNorm, LM head\n15 · tanh(logits / 15)")
    out = d.box(34, 384, 260, 32, "logits of the next byte", "result")
    b = d.stack(
        406,
        44,
        260,
        [
            ("RMSNorm, join 4 bytes, project", "layer"),
            ("RMSNorm, then 4 patch layers\nattend to the last 256 patches", "layer"),
            ("thinking layer, 3 times\n(0 to 3 times in training)", "layer"),
            ("RMSNorm, a matrix for each\nof the 4 positions in a patch", "layer"),
        ],
        44,
        46,
    )
    d.arrow(a[1].right, (350, a[1].right[1]), (350, b[0].left[1]), b[0].left)
    d.arrow(a[1].bottom, plus.top)
    d.arrow(b[3].left, (350, b[3].left[1]), (350, 216), plus.right)
    d.arrow(plus.bottom, last.top)
    d.arrow(last.bottom, head.top)
    d.arrow(head.bottom, out.top)
    d.note(256, 196, "next patch")
    d.note(536, 400, "default: byte_path=local\nall layers: RoPE, ReLU², zero outputs")


@diagram(
    "models/36_diffusion",
    "The architecture diffusion",
    "Hidden ids are replaced by a mask id. A transformer predicts the hidden ids. The attention pattern depends on the "
    "field block: the whole window, blocks, or one id after another.",
    452,
)
def diffusion(d):
    items = [
        ("ids, some hidden", "noise"),
        ("embedding, (V + 1) × D", "layer"),
        ("RMSNorm", "function"),
        ("blocks as in gpt", "layer"),
        ("RMSNorm", "function"),
        ("LM head, D × V, zero", "layer"),
        ("15 · tanh(logits / 15)", "function"),
        ("logits of hidden ids", "result"),
    ]
    boxes = pipeline(d, items, h=34)
    d.note(350, 432, "row V of the embedding is the mask. The preset nanothink denoises embeddings instead")
    d.frame(232, 24, 454, 384, "positions that each position to denoise (row) sees")
    d.arrow(boxes[3].right, (232, boxes[3].right[1]))
    clean, noisy = ["data"] * 6, ["noise"] * 6
    mask(d, 250, 52, [[True] * 7] * 6, 15, kinds=["data", *noisy])
    d.note(372, 97, "block=0: the whole window, in\nboth directions. The first id\nis never hidden", "left")
    mask(d, 250, 164, block_rows(6, 3), 15, kinds=clean + noisy)
    d.note(446, 209, "block=3: clean ids before the\nblock, and the block itself", "left")
    mask(d, 250, 276, block_rows(6, 1), 15, kinds=clean + noisy)
    d.note(446, 321, "block=1: all clean ids before.\nA next-token model with exact\nlikelihood and KV cache", "left")
    d.box(250, 380, 15, 15, kind="data")
    d.note(270, 388, "clean id", "left")
    d.box(366, 380, 15, 15, kind="noise")
    d.note(386, 388, "id to denoise, hidden or not", "left")


@diagram(
    "models/37_nanothink",
    "The architecture nanothink",
    "Three frozen experts read the ids. Links and an embedding feed an attention layer, a router computes a weight for "
    "each expert at each token, and the prediction is the weighted mixture of their probabilities.",
    494,
)
def nanothink(d):
    ids = d.box(28, 14, 136, 32, "ids (B, T)", "data")
    names = ("transformer\ngpt:nanothink", "state_space\nssm:nanothink_s6", "diffuser\ndiffusion, block=1")
    d.frame(14, 82, 472, 96, "experts: frozen, with their own embeddings", 0.62)
    for i, name in enumerate(names):
        d.box(28 + 154 * i, 108, 136, 52, name, "data")
    embed = d.box(505, 108, 166, 52, "embedding of ids\nRMSNorm")
    d.arrow(ids.bottom, (96, 82))
    d.arrow(ids.right, (588, 30), embed.top)
    heads = d.box(28, 292, 290, 44, "LM heads of the experts\nprobabilities p₁, p₂, p₃ of the next id", "data")
    links = d.box(190, 222, 254, 34, "links: one matrix for each expert")
    plus = d.circle(588, 239, "+")
    d.arrow((96, 178), (96, 292))
    d.arrow((317, 178), links.top)
    d.note(206, 200, "hidden states")
    d.arrow(links.right, plus.left)
    d.arrow(embed.bottom, plus.top)
    d.box(490, 288, 196, 52, "+ attention(RMSNorm(h))\nwith latents, output\nzero at the start")
    d.box(490, 374, 196, 44, "router\nRMSNorm, matrix, softmax")
    d.arrow(plus.bottom, (588, 288))
    d.note(612, 268, "h")
    d.arrow((588, 340), (588, 374))
    mix = d.box(28, 379, 290, 34, "w₁ p₁ + w₂ p₂ + w₃ p₃", "result")
    d.arrow(heads.bottom, mix.top)
    d.arrow((490, 396), mix.right)
    d.note(409, 368, "weights w of\neach token")
    d.note(350, 446, "default: fusion=mixture. Before training, the transformer has the weight 0.99")
    d.legend(476, "data", "layer", "result")


@diagram(
    "models/38_streams",
    "The architecture streams",
    "Encoders turn sensory inputs and texts into vectors. All of them form one sequence for a transformer. Heads read "
    "the hidden states of texts and of query positions.",
    448,
)
def streams(d):
    senses, texts = ("touch", "proprioception", "vision", "audio"), ("internal_voice", "external_voice")
    d.frame(14, 22, 162, 348, "inputs")
    d.frame(204, 22, 146, 348, "one sequence")
    d.frame(538, 22, 148, 348, "outputs")
    boxes = [d.box(26, 46 + 46 * i, 138, 36, f"{name}\nencoder") for i, name in enumerate(senses)]
    boxes += [d.box(26, 236 + 46 * i, 138, 36, f"{name}\nembedding") for i, name in enumerate(texts)]
    sense = d.box(216, 46, 122, 174, "senses\npositions\n…, −2, −1", "data")
    text = d.box(216, 236, 122, 82, "texts\npositions\n0, 1, 2, …", "data")
    query = d.box(216, 328, 122, 36, "queries\nafter the texts", "data")
    for box in boxes:
        d.arrow(box.right, ((sense if box in boxes[:4] else text).x, box.right[1]))
    model = d.box(382, 134, 120, 124, "transformer\nn_layers blocks:\nRoPE, ReLU²,\nmask by time\nthen RMSNorm")
    d.arrow((350, 196), model.left)
    d.arrow(model.right, (538, 196))
    outputs = dict(internal_text="at its text", external_text="at its text", audio="at queries", animation="at queries")
    for i, (name, place) in enumerate(outputs.items()):
        d.box(550, 54 + 78 * i, 124, 44, f"{name}\n{place}", "result")
    d.note(95, 346, "learned queries")
    d.arrow((163, 346), query.left)
    d.note(350, 396, "default: internal_voice → internal_text alone, which is a plain decoder")
    d.legend(428, "data", "layer", "result")
