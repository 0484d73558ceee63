"""What the process tests share: a tiny corpus, runs in processes of their own, and the hash of all that a run leaves behind.

Processes are forked from a server that has torch and lmnotes imported, and nothing else has happened in it: each starts as a fresh
interpreter would, without the seconds that importing takes. The server is standard (`multiprocessing`'s `forkserver`).
"""

import ast
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import torch

from lmnotes import core
from lmnotes.apps.cli import execute_command, run_notebook
from lmnotes.runs.run import run
from lmnotes.training.trainer import Hook, Trainer

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("forkserver")
PRELOAD = "lmnotes.apps.cli lmnotes.models.gpt nbformat safetensors.torch tokenizers tyro filelock torch._dynamo"
FORK.set_forkserver_preload(PRELOAD.split())
STARTED = []  # Processes, which a test that fails may leave behind
DEADLINE = 900  # Seconds after which a test stops waiting; no test needs them, however slow the machine is
os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(DEADLINE)  # What torchrun waits after a signal before it kills

# Small enough for hundreds of runs; dropout, pieces, early-stop counters, evaluations, samples and pruning all at work.
TINY = dict(
    data="corpus",
    tokenizer="bytes",
    model_args="d_model=16 n_layers=1 n_heads=2 dropout=0.1",
    ctx_len=16,
    batch_size=4,
    accum=2,
    steps=40,
    warmup=0.1,
    dtype="float32",
    device="cpu",
    eval_every=5,
    eval_batches=2,
    sample_every=15,
    save_every=10,
    log_every=3,
    patience=50,
    out_dir="runs",
    run="r",
)


def write_corpus(folder, documents=16, seed=0):
    "Two domains of short JSON-lines documents"
    draw = random.Random(seed)
    words = dict(sea="wave salt tide foam harbour gull".split(), wood="moss fern oak bark owl clearing".split())
    for domain, own in words.items():
        lines = []
        for n in range(documents):
            text = f"{n}: " + " ".join(draw.choice(own) for _ in range(draw.randint(3, 7)))
            lines.append(json.dumps(dict(text=text)) + "\n")
        (folder / domain).mkdir(parents=True)
        (folder / domain / "all.jsonl").write_text("".join(lines))


class StopAt(Hook):
    "Stops the run after each of some steps, as a signal does"

    def __init__(self, *steps):
        self.steps = steps
        self.first = None

    def after_step(self, t):
        if self.first is None:
            self.first = t.step  # where a resumed run begins
        if t.step in self.steps and t.step > self.first:
            t.stop = t.stop or "interrupted"


def train(*stops, **params):
    "Run, stopping after each of the steps `stops`; exit code 0 if it got to the end"
    return dict(done=0, early_stop=0, interrupted=130)[run(hooks=[StopAt(*stops)], **params).status]


def lmnotes_command(*words):
    "Run the command line"
    return execute_command([str(w) for w in words])


def run_recipe(notebook, **params):
    "Run a recipe's cells with parameters; 0 if the run got to the end"
    return dict(done=0, early_stop=0, dry_run=0, interrupted=130, diverged=3)[
        run_notebook(notebook, params)["r"].status
    ]


def recipe_parameters(notebook):
    "{parameter: default} of a recipe, in order"
    cells = nbformat.read(notebook, 4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def run_papermill(place, notebook, **params):
    "Execute a notebook by papermill in the folder `place`, as `report.ipynb`"
    papermill = str(Path(sys.executable).parent / "papermill")
    given = [word for name, value in params.items() for word in ("-p", name, str(value))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    done = subprocess.run(
        [papermill, str(notebook), "report.ipynb", *given, "--no-progress-bar", "--start-timeout", str(DEADLINE)],
        cwd=place,
        env=environ | dict(MPLBACKEND="agg", IPYTHONDIR=str(place / "ipython")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return place


def _child(function, args, kwargs, folder, dtype):
    os.chdir(folder)
    torch.set_num_threads(1)
    core._auto_dtype = lambda device: dtype
    os.fsync = lambda descriptor: None  # No power is cut here; what is flushed, and when, is the matter of test_crash
    for name in [n for n in os.environ if n.startswith("LMNOTES_")]:
        del os.environ[name]
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(function(*args, **kwargs))


def start(folder, function, *args, **kwargs):
    "Call a function in a new process that works in `folder` and writes to `folder/log`; the process"
    dtype = core.pick_dtype("cpu")  # Measured once, so that two processes whose results are compared use the same
    process = FORK.Process(target=_child, args=(function, args, kwargs, str(folder), dtype), daemon=True)
    process.start()
    STARTED.append(process)
    return process


def finish(process):
    "The exit code, minus the signal's number if one killed it"
    process.join(DEADLINE)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def call(folder, function, *args, **kwargs):
    "Call a function in a new process; its exit code"
    return finish(start(folder, function, *args, **kwargs))


def log(folder):
    "What the processes that worked in `folder` have said"
    return (Path(folder) / "log").read_text()


def until(condition, process=None):
    "Wait for something to be true, while `process` lives"
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process is None or process.exitcode is None, "the process ended before what was waited for"
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.001)


def hold():
    "Create the file `reached`, then wait until the test creates the file `go`; only the first call waits"
    if not Path("reached").exists():
        Path("reached").touch()
        until(Path("go").exists)


def before(owner, name, when, act=hold):
    "Call `act` before each call of `owner.name` for whose arguments `when` is true"
    original = getattr(owner, name)

    def held(*args, **kwargs):
        if when(*args, **kwargs):
            act()
        return original(*args, **kwargs)

    setattr(owner, name, held)


def after(owner, name, when, act=hold):
    "Call `act` after each such call"
    original = getattr(owner, name)

    def held(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args, **kwargs):
            act()
        return result

    setattr(owner, name, held)


def held_before_step(step, function, *args, **kwargs):
    "Call a function that trains, and hold before this step"
    before(Trainer, "train_step", lambda trainer: trainer.step == step - 1)
    return function(*args, **kwargs)


def stop_before_step(step, folder, function, *args, number=signal.SIGINT, **kwargs):
    "Call a function that trains in a new process, and send it a signal before this step; its exit code"
    process = start(folder, held_before_step, step, function, *args, **kwargs)
    until((folder / "reached").exists, process)
    os.kill(process.pid, number)
    (folder / "go").touch()
    return finish(process)


def words(**params):
    "Parameters as the words of a command line"
    flags = {"--" + name.replace("_", "-"): value for name, value in params.items()}
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


def walk(value, name=""):
    "(name, bytes) of every number, text and tensor in a nest of dicts and lists, in a fixed order"
    if isinstance(value, dict):
        for key in sorted(value, key=lambda k: (str(type(k)), k)):
            yield from walk(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name}.length", str(len(value)).encode()
        for i, item in enumerate(value):
            yield from walk(item, f"{name}[{i}]")
    elif isinstance(value, torch.Tensor):
        yield name, f"{value.dtype} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
    else:
        yield name, repr(value).encode()


def state_hash(checkpoint_folder):
    "SHA-256 of optimizers and counters"
    h = hashlib.sha256()
    for name, data in walk(torch.load(checkpoint_folder / "state.pt", weights_only=True)):
        h.update(f"{name} {len(data)}\n".encode() + data)
    return h.hexdigest()


def records(path):
    "Lines of a .jsonl file without what depends on the clock"
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tok_per_s")} for line in lines]


def left_behind(folder):
    "{what: hash or content} of all that a finished run has written, but times"
    folder = Path(folder)
    record = json.loads((folder / "run.json").read_bytes())
    out = dict(status=record["status"], step=record["step"], result=record["result"], tokens=record["tokens"])
    for pointer in ("final", "last", "best"):
        checkpoint_folder = folder / (folder / pointer).read_text().strip()
        out[pointer] = checkpoint_folder.name
        for path in sorted(checkpoint_folder.glob("*.safetensors")):  # The model's, or an adapter's
            out[f"{pointer} weights"] = hashlib.sha256(path.read_bytes()).hexdigest()
        out[f"{pointer} optimizers and counters"] = state_hash(checkpoint_folder)
    out["metrics"] = records(folder / "metrics.jsonl")
    out["samples"] = records(folder / "samples.jsonl")
    out["interrupted"] = (folder / "interrupted").exists()
    return out


def differences(a, b):
    "Names of what differs between two results of `left_behind`"
    return [name for name in a if a[name] != b[name]]
