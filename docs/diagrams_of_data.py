"""Diagrams of tokens, batches, checkpoints and run folders."""

from drawing import diagram


def row_of_tokens(d, y, title, tokens, ids, sizes, w):
    "Draw tokens above their ids and their numbers of bytes"
    d.note(14, y + 14, title, "left")
    for i, (name, cells, kind) in enumerate((("", tokens, "data"), ("id", ids, "layer"), ("bytes", sizes, "function"))):
        d.grid(260, y + 32 * i, [[(str(cell), kind) for cell in cells]], 30, w)
        if name:
            d.note(250, y + 32 * i + 15, name, "right")


@diagram(
    "data/13_tokenizer",
    "Text to tokens to ids",
    "Three tokenizers split a text into tokens, number them, and store how many bytes of text each id stands for.",
    392,
)
def tokens(d):
    row_of_tokens(d, 14, "bytes: “naïve”", "n a ï₁ ï₂ v e".split(), (110, 97, 195, 175, 118, 101), [1] * 6, 70)
    row_of_tokens(d, 128, "chars: “to be”", "t o ␣ b e".split(), (7, 5, 1, 2, 3), [1] * 5, 70)
    row_of_tokens(
        d, 242, "bpe: “ are evaluated.”", ("␣are", "␣evalu", "ated", "."), (358, 702, 500, 14), (4, 6, 4, 1), 105
    )
    d.note(350, 362, "␣: a space. With the bytes, we compare losses of all tokenizers in bits per byte")


@diagram(
    "data/17_batches",
    "The batch of a step",
    "Seed and step determine the start positions of the sequences, and so the global batch. Each rank takes every "
    "second row, and gradient accumulation cuts its rows into micro-batches.",
    392,
)
def batches(d):
    source = d.box(14, 132, 112, 62, "seed = 0\nstep = 3", "data")
    draw = d.box(150, 132, 134, 62, "random starts\nfrom (seed, step)", "function")
    d.arrow(source.right, draw.left)
    starts = (499, 887, 946, 853, 691, 318, 576, 314)
    d.note(364, 20, "start")
    d.note(484, 20, "rank")
    d.note(623, 20, "micro-batch")
    for i, start in enumerate(starts):
        y = 40 + 32 * i
        rank, kind = i % 2, ("layer", "state")[i % 2]
        d.box(320, y, 88, 26, f"{start}", "data")
        d.box(436, y, 96, 26, f"rank {rank}", kind)
        d.box(560, y, 126, 26, f"rank {rank}, part {i // 4}", kind)
        d.arrow((408, y + 13), (436, y + 13))
        d.arrow((532, y + 13), (560, y + 13))
    d.arrow(draw.right, (320, 163))
    d.note(350, 320, "A sequence is ids[start : start + ctx_len + 1]: x without its last id, y without its first")
    d.note(
        350, 366, "A resume at step 3 reads the same 8 rows. More ranks or micro-batches\ncut the same rows differently"
    )


@diagram(
    "training/42_checkpoint",
    "How a checkpoint is written and verified",
    "Files are written into a temporary folder and flushed, then the manifest with their hashes. One rename gives the "
    "folder its name. A reader verifies all hashes and falls back to an earlier checkpoint.",
    330,
)
def checkpoint(d):
    d.frame(14, 22, 672, 136, "writing")
    files = d.box(26, 46, 196, 98, "a temporary folder\nconfig.json\nmodel.safetensors\nstate.pt (all flushed)", "data")
    manifest = d.box(252, 66, 176, 58, "manifest.json\nlast, with size and\nSHA-256 of each file", "layer")
    folder = d.box(482, 66, 192, 58, "step_00000020\ncomplete from the first\nmoment it exists", "result")
    d.arrow(files.right, manifest.left)
    d.arrow(manifest.right, folder.left)
    d.note(455, 50, "rename")
    d.frame(14, 192, 672, 92, "reading: latest_checkpoint")
    newest = d.box(26, 214, 166, 54, "step_00000020\none bit is flipped", "noise")
    check = d.box(246, 214, 176, 54, "verify_checkpoint\nevery hash, before\nanything is parsed", "layer")
    older = d.box(476, 214, 198, 54, "step_00000010\nused, after a warning", "result")
    d.arrow(newest.right, check.left)
    d.arrow(check.right, older.left)
    d.note(350, 308, "A process that is killed in the middle leaves only the temporary folder")


@diagram(
    "runs/61_folder",
    "The files of a run folder",
    "A run folder holds the record of the run, its logs, the tokenizer, checkpoint folders, and one-line files that name "
    "a checkpoint.",
    410,
)
def run_folder(d):
    rows = (
        ("run.json", "status, step, parameters, versions, hashes of the data", "data"),
        ("metrics.jsonl", "a record a line: step, loss, learning rate, speed", "data"),
        ("samples.jsonl", "text generated during training", "data"),
        ("tokenizer/", "tokenizer.json, and for BPE vocab.json, merges.txt", "data"),
        ("step_00000054/", "config.json, weights, state.pt, manifest.json", "state"),
        ("step_00000060/", "the same files, six steps later", "state"),
    )
    d.note(14, 18, "checkpoints/small/", "left")
    d.arrow((26, 30), (26, 383), tip=False)
    for i, (name, text, kind) in enumerate(rows):
        y = 40 + 42 * i
        d.arrow((26, y + 16), (46, y + 16), tip=False)
        d.box(46, y, 160, 32, name, kind)
        d.note(222, y + 16, text, "left")
    lines = ("the lowest validation loss", "the newest checkpoint", "the end of the run (or interrupted)")
    for i, (name, text) in enumerate(zip(("best", "last", "final"), lines)):
        y = 292 + 38 * i
        d.arrow((26, y + 15), (46, y + 15), tip=False)
        d.box(46, y, 160, 30, name, "layer")
        d.note(222, y + 15, f"one line: step_000000{54 if i == 0 else 60}, {text}", "left")


@diagram(
    "runs/67_run",
    "A run that is killed and resumed",
    "A run is killed after ten steps. The resumed run starts from the checkpoint of step 8 and repeats steps with the "
    "same batches, so it ends in the same bits as an uninterrupted run.",
    330,
)
def resume(d):
    x, w = 136, 45

    def row(y, name, first, last, kind):
        d.note(x - 10, y + 15, name, "right")
        d.grid(x + w * first, y, [[(str(i), kind(i)) for i in range(first, last)]], 30, w)

    d.note(x + 6 * w, 16, "numbers of the batches: batches[step] depends on seed and step only")
    row(40, "uninterrupted", 0, 12, lambda i: "layer")
    row(104, "first process", 0, 10, lambda i: "layer" if i < 8 else "noise")
    d.note(x + 10 * w + 32, 119, "killed")
    for step in (4, 8):
        d.box(x + w * step - 40, 156, 80, 32, f"step {step}", "state")
        d.arrow((x + w * step, 136), (x + w * step, 156))
    d.note(x - 10, 172, "checkpoints", "right")
    row(222, "resumed", 8, 12, lambda i: "result" if i > 9 else "layer")
    d.arrow((x + w * 8, 188), (x + w * 8, 205), (x + w * 8.5, 205), (x + w * 8.5, 222))
    note = d.note(x + 3.4 * w, 237, "loads weights, optimizer, counters")
    d.arrow(note.right, (x + w * 8, 237))
    d.note(
        350,
        296,
        "Records after step 8 are dropped and written again. Learning rate, dropout and\nnoise are functions of the step too, so in the same environment the final weights are identical",
    )
