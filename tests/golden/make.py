"""Make the golden folders of a release: `python tests/golden/make.py`, in a checkout of that release.

Run this once per release, with the code of the release, and never again: later versions must open the folders as they are.
The script trains one tiny run per architecture, one with LoRA adapters and one with a BPE tokenizer, and exports one of them.
It writes them to `tests/golden/<version>/`, together with `expected.json`: the greedy text and the validation losses of each run.
`tests/test_golden.py` compares every later version with these values.

- All paths are relative to the folder that is copied, so the recorded configurations name no machine.
- There is no dropout, because its random numbers differ between types of CPU.
- Each prompt is chosen so that the two best tokens always differ by at least `MARGIN`: rounding errors cannot change the text.
- The learning rate stays high, so that a resume without the optimizer's state ends with another loss.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import lmnotes
from lmnotes.inference.generation import TokenSampler, encode_prompt
from lmnotes.training.trainer import Hook

HERE = Path(__file__).parent
TEXT = HERE / "0.1" / "text"  # Every release trains on the same text
MARGIN = 0.02  # Smallest difference between the two largest logits of a greedy step
TOKENS = 48  # Length of the greedy texts
TOLERANCE = 1e-3  # Of the losses in `tests/test_golden.py`
MORE = 6  # Steps after the resume

COMMON = dict(
    data="text/harbour.txt",
    tokenizer="chars",
    ctx_len=32,
    batch_size=4,
    steps=600,
    optimizer="adamw",
    lr=0.01,
    min_lr=0.005,  # The steps after the resume must move the model
    dtype="float32",
    device="cpu",
    keep=1,
    eval_every=1000,  # Only at the end
    sample_every=1000,
    save_every=1000,
    log_every=200,
    seed=1,
    out_dir="runs",
)
TINY = "d_model=16 n_layers=1 n_heads=2 dropout=0"
EXPERTS = (
    "transformer=gpt,d_model=16,n_layers=1,n_heads=2,dropout=0 state_space=ssm,d_model=16,n_layers=1,head_dim=8,d_state=4,dropout=0 "
    "diffuser=diffusion,block=1,d_model=16,n_layers=1,n_heads=2,dropout=0 d_model=16 n_heads=2 head_dim=8 kv_latent_dim=8 rope_dim=4 dropout=0"
)
RUNS = {
    "bigram": dict(arch="bigram", lr=0.1, min_lr=0.1),
    "rnn": dict(arch="rnn", model_args="d_model=16 d_hidden=32"),
    "gpt": dict(
        arch="gpt",
        model_args="d_model=24 n_layers=2 n_heads=2 dropout=0",
        optimizer="muon",
        lr=0.0,
        min_lr=0.01,
        steps=400,
    ),
    "scratch_gpt": dict(arch="scratch_gpt", model_args=TINY),
    "tiny_gpt2": dict(arch="gpt2", model_args=TINY + " n_positions=32", init_from="random"),
    "ssm": dict(
        arch="ssm",
        model_args="d_model=32 n_layers=2 head_dim=8 d_state=8 dropout=0",
        optimizer="muon",
        lr=0.0,
        steps=350,
    ),
    "bytepatch": dict(arch="bytepatch", model_args=TINY + " d_byte=16 ngrams=2 ngram_rows=32", tokenizer="bytes"),
    "diffusion": dict(arch="diffusion", model_args="d_model=24 n_layers=2 n_heads=2 dropout=0"),
    "nanothink": dict(arch="nanothink", model_args=EXPERTS),
    "streams": dict(arch="streams", model_args=TINY + " inputs=internal_voice,touch"),
    "lora": dict(
        arch="gpt2",
        model_args=TINY + " n_positions=32",
        init_from="runs/tiny_gpt2",
        data="text/letters.jsonl",
        tokenizer=None,  # That of the weights
        lora_rank=2,
    ),
    "bpe": dict(arch="gpt", model_args=TINY, tokenizer="bpe:300", steps=200, data="text/letters.jsonl"),
}
INTERRUPTED = "rnn"  # This run stops `MORE` steps before its end; the others have ended and get `MORE` steps
EXPORTED = "gpt"
WORDS = (TEXT / "harbour.txt").read_text(encoding="utf-8").split()
PROMPTS = [" ".join(WORDS[i : i + 3]) + " " for i in range(0, len(WORDS), 6)]


class StopAt(Hook):
    "Stop a run after one of its steps, as a signal does"

    def __init__(self, step):
        self.step = step

    def after_step(self, t):
        if t.step == self.step:
            t.stop = "interrupted"


class Margins(TokenSampler):
    "Greedy decoding that records the difference between the two largest logits"

    smallest = float("inf")

    def __call__(self, logits):
        best, second = logits[..., : self.vocab_size].float().topk(2).values.unbind(-1)
        self.smallest = min(self.smallest, (best - second).min().item())
        return super().__call__(logits)


def smallest_margin(r, prompt):
    "Smallest difference between the two best tokens in the greedy text after a prompt"
    x = torch.tensor([encode_prompt(r.tokenizer, prompt)])
    pick = Margins(temperature=0, vocab_size=r.tokenizer.vocab_size).reset(x)
    n = 0
    for new in r.lm.eval().generate(x, TOKENS, pick):
        n += new.shape[1]
        if n >= TOKENS:
            break
    return pick.smallest


def greedy_text(r, prompt):
    return r.generate(prompt, TOKENS, temperature=0)


def best_prompt(r):
    "The prompt with the most varied greedy text, among those whose margin is large enough"
    margins = {prompt: smallest_margin(r, prompt) for prompt in PROMPTS}
    safe = [prompt for prompt in PROMPTS if margins[prompt] >= MARGIN]
    assert safe, f"{r.folder.name}: the largest margin is {max(margins.values()):.3f}; train it longer"
    prompt = max(safe, key=lambda prompt: len(set(greedy_text(r, prompt).split())))
    print(f"{r.folder.name}: prompt {prompt!r}, margin {margins[prompt]:.3f}, {greedy_text(r, prompt)!r}")
    return prompt


def train(name, params):
    "Train one golden run in the current folder"
    hooks = [StopAt(params.get("steps", COMMON["steps"]) - MORE)] if name == INTERRUPTED else []
    lmnotes.run(run=name, hooks=hooks, **{n: v for n, v in (COMMON | params).items() if v is not None})


def expectations(name):
    "What a golden run must give, from a run in the current folder, which resumes here"
    r = lmnotes.load(f"runs/{name}", device="cpu")
    prompt = best_prompt(r)
    resume = {} if name == INTERRUPTED else dict(steps=r.config.steps + MORE, allow_change="steps")
    expected = dict(
        arch=r.config.arch,
        prompt=prompt,
        text=greedy_text(r, prompt),
        step=r.step,
        loss=r.evaluate()["loss"],
        resume=resume,
    )
    resumed = lmnotes.run(resume=True, run=name, out_dir="runs", **resume)
    expected |= dict(resumed_step=resumed.step, resumed_loss=resumed.result["last"]["loss"])
    moved = expected["resumed_loss"] - expected["loss"]
    assert abs(moved) > 2 * TOLERANCE, f"{name}: the resume moves the loss by {moved:+.4f}; choose other `steps`"
    return expected


def export():
    "Export a run from the command line, as users do"
    words = ["export", "--run", f"runs/{EXPORTED}", "--to", "export"]
    subprocess.run([sys.executable, "-m", "lmnotes", *words], check=True)


def make(folder):
    "Make all folders of a release inside an empty folder"
    shutil.copytree(TEXT, folder / "text")
    os.chdir(folder)
    for name, params in RUNS.items():
        train(name, params)
    missing = set(lmnotes.archs()) - {params["arch"] for params in RUNS.values()}
    assert not missing, f"no golden run of {', '.join(sorted(missing))}"
    export()
    for left in [*folder.glob("runs/.last"), *folder.glob("runs/*/.lock"), *folder.rglob("__pycache__")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(folder / "data")  # Tokens, which are made again


def main():
    "Make the folders and the expectations, and put them into the project"
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith("LMNOTES_")]:
        del os.environ[name]
    out = HERE / ".".join(lmnotes.__version__.split(".")[:2])
    if (out / "expected.json").exists():
        sys.exit(f"{out} exists; golden folders are never made again")
    with tempfile.TemporaryDirectory() as scratch:
        made, resumed = Path(scratch, "made"), Path(scratch, "resumed")
        made.mkdir()
        make(made)
        shutil.copytree(made, resumed)
        os.chdir(resumed)
        runs = {name: expectations(name) for name in RUNS}
        found = dict(version=lmnotes.__version__, tokens=TOKENS, exported=EXPORTED, runs=runs)
        (made / "expected.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.copytree(made, out, dirs_exist_ok=True)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
