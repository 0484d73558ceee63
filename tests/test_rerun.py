"""In JupyterLab you can run every cell of a notebook again, in any order, after a stop, and from the middle after a restart."""

import json
import os
import signal

import pytest
from helpers import ROOT, fork_children, read_log, run_in_process, write_corpus

from lmnotes.apps.cli import _run_cell
from lmnotes.core import CheckpointError
from lmnotes.data.prepare import prepare_data
from lmnotes.data.tokens import TokenWriter
from lmnotes.inspect import cost
from lmnotes.runs import compare as comparing
from lmnotes.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_texts")
TRAIN = dict(data="corpus", tokenizer="bytes", model_args="d_model=16 n_layers=1 n_heads=2", ctx_len=16, batch_size=4)
COMPARE = dict(data="corpus", ctx_len=16, batch_size=4, budget=3e7, seeds=1, evals=2, model_args="d_model=8")
EXPERT = dict(tokenizer="bytes", d_model=16, n_heads=2, n_layers=1, max_seq_len=32, max_epochs=1, batch_size=8)
JOINED = dict(d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, max_seq_len=32, max_epochs=3)
AGIFORMER = dict(D_MODEL=16, N_LAYERS=1, NUM_HEADS=2, WINDOW_SIZE=8, THINKING_STEPS=1, BATCH_SIZE=2, SEQ_LEN=64)
FRESH = dict(BLOCK_SIZE="16", N_EMBD="16", N_HEAD="2", N_LAYER="1", EVAL_ITERS="2", MAX_NEW_TOKENS="8")
TEXT_ONLY = """
training: {batch_size: 4, log_interval: 2, save_interval: 3}
model:
  transformer: {num_layers: 1, hidden_dim: 16, num_attention_heads: 2, ffn_dim: 64, max_position_embeddings: 32}
  encoders: {internal_voice: {vocab_size: 256, embedding_dim: 16, max_seq_length: 32}}
"""
CASES = {  # {notebook: values in its parameters cell}
    "train": TRAIN | dict(steps=6, log_every=2),
    "generate": dict(n=8),
    "playground": dict(n=8),
    "prepare": dict(data="corpus", tokenizer="bytes", out="prepared"),
    "compare": COMPARE | dict(archs="bigram rnn", own_args="rnn: d_hidden=8", procs=1),
    "recipes/agiformer": AGIFORMER | dict(MAX_STEPS=6, VAL_INTERVAL=3, DATA="text.txt", FINAL_BATCHES=1),
    "recipes/fresh_or_resume": FRESH | dict(TRAINING_DATA_SOURCE="text.txt", BATCH_SIZE="4", TRAINING_STEPS="6"),
    "recipes/pretrain_expert": EXPERT | dict(data_dir="corpus"),
    "recipes/train_mla": JOINED | dict(data_dir="corpus", batch_size=4, state_space_ckpt="", diffuser_ckpt=""),
    "recipes/text_only": dict(config="small.yaml", data="tokens.bin", max_steps=6),
    "recipes/tisslm": dict(VOCAB_SIZE=257, seq_len=16, batch_size=8, epochs=0.2, stride=16, CORPUS_PATH="texts"),
}
LOADING = "generate", "playground"  # They load a run, or train one if there is none
RESULT = dict(prepare="tokens", compare="c")  # Name that the main cell of a notebook assigns, else r
RESUME = {"generate": {}, "playground": {}, "prepare": {}, "compare": {}}  # They need no parameter to continue


class Session:
    "A notebook in JupyterLab: its cells, the values that the user wrote into its parameters cell, and a kernel"

    def __init__(self, name, **params):
        self.name, self.params, self.names, self.result = name, params, {"__name__": "__main__"}, RESULT.get(name, "r")
        cells = json.loads((ROOT / f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        cells = [cell for cell in cells if cell["cell_type"] == "code"]
        self.sources = ["".join(cell["source"]) for cell in cells]
        self.cells = range(len(cells))
        self.parameters = next(i for i in self.cells if "parameters" in cells[i]["metadata"].get("tags", []))

    def run(self, *cells):
        "Run cells by their numbers"
        for i in cells:
            print(f"--- {self.name}, cell {i}")
            is_new = self.result not in self.names
            _run_cell(self.sources[i], f"cell {i}", self.names)
            if i == self.parameters:
                self.names.update(self.params)
            if is_new and self.result in self.names:
                self.main = i

    def restart(self, **params):
        "Start a new kernel, and write values into the parameters cell"
        self.params, self.names = self.params | params, {"__name__": "__main__"}

    @property
    def status(self):
        "The status of the run, or `done`"
        r = self.names[self.result]
        if self.name == "compare":
            return "done" if all(len(r.finished_runs(name)) for name in r.steps) else "interrupted"
        return r.status if self.result == "r" else "done"


def press_stop(owner, name, is_pressed):
    "Let the kernel get the signal of the stop button before the next call for which `is_pressed` returns True"
    original = getattr(owner, name)

    def stopped(*args, **kwargs):
        if is_pressed(*args, **kwargs):
            setattr(owner, name, original)
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    setattr(owner, name, stopped)


def stop_in_training(s):
    "Run all cells, and stop the main cell. A cell that the stop ends is run again"
    if s.name == "prepare":
        press_stop(TokenWriter, "add", lambda *args: True)
    elif s.name == "compare":
        press_stop(comparing, "_start_child", lambda *args, **values: "arch" in values)
    else:
        press_stop(Trainer, "train_step", lambda t: t.step == 1 and t.hooks)
    for i in s.cells:
        try:
            s.run(i)
        except KeyboardInterrupt:
            assert s.name == "prepare"
            s.run(i)
    assert s.status == ("done" if s.name == "prepare" else "interrupted")


def check_cells(name):
    "Run the cells of a notebook twice, in reverse order, after a stop, and from each cell on after a restart"
    step_seconds = cost._step_seconds
    cost._step_seconds = lambda trainer, seconds: step_seconds(trainer, 0)
    fork_children()
    s = Session(name, **CASES[name])
    if name in LOADING:
        os.environ.update({f"LMNOTES_{n.upper()}": str(value) for n, value in TRAIN.items()})
    if name == "recipes/train_mla":
        Session("recipes/pretrain_expert", **CASES["recipes/pretrain_expert"]).run(*range(7))
    for i in s.cells:
        s.run(i, i)
    s.run(*reversed(s.cells))
    assert s.status == "done"
    known = {*s.names}
    s.restart()
    if name in (*LOADING, "compare"):  # They train what is missing
        os.environ["LMNOTES_OUT_DIR"] = "stopped"
        if name in LOADING:
            press_stop(Trainer, "fit", lambda t, *steps: True)
            with pytest.raises(CheckpointError, match="none has been saved"):
                s.run(*s.cells)
        stop_in_training(s)
    else:
        stop_in_training(s)
        s.run(s.main)  # A new run
        assert s.status == "done"
        s.restart()
        stop_in_training(s)
    check_middle(s, known)
    return 0


def check_middle(s, known):
    "Resume after a restart, and begin at each cell. A cell that needs one above it says so"
    params, begun = RESUME.get(s.name, dict(resume=True)), []
    if s.name == "recipes/fresh_or_resume":
        params = dict(CHECKPOINT_PATH=str(s.names["r"].folder), RESUME_STEPS="2", TRAINING_STEPS="")
    for start in s.cells[s.parameters + 1 :]:
        s.restart(**params)
        s.run(*range(s.parameters + 1))
        try:
            s.run(*s.cells[start:])
        except NameError as e:
            assert e.name in known
            continue
        begun.append(start)
        assert s.result not in s.names or s.status == "done" or s.name in LOADING  # Which loads the stopped run
    assert s.parameters + 1 in begun
    assert s.main in begun or s.name.startswith("recipes/")


@pytest.mark.parametrize("name", CASES)
def test_cells_can_run_again_in_any_order_and_after_a_stop(name, tmp_path):
    write_corpus(tmp_path / "corpus")
    (tmp_path / "texts").mkdir()
    texts = [line for path in sorted((tmp_path / "corpus").rglob("*.jsonl")) for line in path.read_text().splitlines()]
    for path in (tmp_path / "text.txt", tmp_path / "texts/a.txt"):
        path.write_text("\n".join(json.loads(line)["text"] for line in texts * 3))
    (tmp_path / "small.yaml").write_text(TEXT_ONLY)
    prepare_data(tmp_path / "tokens.bin", str(tmp_path / "text.txt"), "bytes")
    assert run_in_process(tmp_path, check_cells, name) == 0, read_log(tmp_path)
