"""Shared code of the process tests: a tiny corpus, runs in new processes, and hashes of a run's results.

Processes are forked from a server that has only imported torch and lmnotes (preloaded.py). Each starts like a fresh
interpreter, but saves the seconds that importing takes. The server is `multiprocessing`'s `forkserver`.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat
import torch

from lmnotes import core
from lmnotes.apps.cli import execute_command, run_notebook
from lmnotes.inference import generation
from lmnotes.runs import compare as comparing
from lmnotes.runs import setup
from lmnotes.runs.run import run
from lmnotes.training.trainer import Hook, Trainer

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["preloaded"])
SAMPLE_TOKENS = 0  # Maximum length of texts that new processes generate (0: no limit). `short_texts` sets it
STARTED = []  # Processes, so that a failed test leaves none behind
DEADLINE = 900  # Seconds until a test stops waiting. No test needs that long, even on a slow machine
os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(DEADLINE)  # Seconds that torchrun waits between a signal and a kill

# Small enough for hundreds of runs, with dropout, gradient accumulation, early stopping, evaluations, samples and pruning.
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
    "Write two domains of short JSON-lines documents"
    draw = random.Random(seed)
    vocabulary = dict(sea="wave salt tide foam harbour gull".split(), wood="moss fern oak bark owl clearing".split())
    for domain, own_words in vocabulary.items():
        lines = []
        for n in range(documents):
            text = f"{n}: " + " ".join(draw.choice(own_words) for _ in range(draw.randint(3, 7)))
            lines.append(json.dumps(dict(text=text)) + "\n")
        (folder / domain).mkdir(parents=True)
        (folder / domain / "all.jsonl").write_text("".join(lines))


class StopAtSteps(Hook):
    "Hook that stops the run after each of the given steps, as a signal does"

    def __init__(self, *steps):
        self.steps = steps
        self.first = None

    def after_step(self, t):
        if self.first is None:
            self.first = t.step  # Where a resumed run begins
        if t.step in self.steps and t.step > self.first:
            t.stop = t.stop or "interrupted"


def train(*stops, **params):
    "Train, stopping after each of the steps `stops`, and return the exit code (0 at the end)"
    return dict(done=0, early_stop=0, interrupted=130)[run(hooks=[StopAtSteps(*stops)], **params).status]


def lmnotes_command(*command_line_args):
    "Run the command line"
    return execute_command([str(w) for w in command_line_args])


def run_recipe(notebook, **params):
    "Run a recipe's cells with parameters and return the exit code (0 at the end)"
    return dict(done=0, early_stop=0, dry_run=0, interrupted=130, diverged=3)[
        run_notebook(notebook, params)["r"].status
    ]


def recipe_parameters(notebook):
    "Return {parameter: default} of a recipe, in order"
    cells = nbformat.read(notebook, 4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {line.target.id: ast.literal_eval(line.value) for line in ast.parse(source).body}


def run_papermill(workdir, notebook, **params):
    "Execute a notebook with papermill in the folder `workdir`, as `report.ipynb`"
    papermill = str(Path(sys.executable).parent / "papermill")
    given = [word for name, value in params.items() for word in ("-p", name, str(value))]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    done = subprocess.run(
        [papermill, str(notebook), "report.ipynb", *given, "--no-progress-bar", "--start-timeout", str(DEADLINE)],
        cwd=workdir,
        env=environ | dict(MPLBACKEND="agg", IPYTHONDIR=str(workdir / "ipython")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return workdir


def printed_text(workdir):
    "Return the printed and displayed texts of `report.ipynb`, or of the processes that worked in this folder"
    if not (workdir / "report.ipynb").exists():
        return read_log(workdir)
    cells = [cell for cell in nbformat.read(workdir / "report.ipynb", 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return "\n".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


def shorten_samples(set_attribute=setattr):
    "Generate 8 tokens for each sample of a run instead of 120, which take a third of the time of a tiny run"
    set_attribute(setup, "Sample", partial(generation.Sample, n=8))


def _limit_samples(limit):
    "Generate at most `limit` tokens for each prompt"
    generate_chunks = generation._generate_chunks

    def generate_few_chunks(lm, prompts, n, *args):
        return generate_chunks(lm, prompts, min(n, limit), *args)

    generation._generate_chunks = generate_few_chunks


def _child_main(function, args, kwargs, folder, output, dtype, sample_tokens):
    assert "preloaded" in sys.modules, "the server could not import preloaded.py"
    os.chdir(folder)
    if sample_tokens:
        _limit_samples(sample_tokens)
    torch.set_num_threads(1)
    shorten_samples()
    core._auto_dtype = lambda device: dtype
    os.fsync = lambda descriptor: None  # No power cut here: test_crash tests the flushes
    for name in [n for n in os.environ if n.startswith("LMNOTES_")]:
        del os.environ[name]
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    if os.isatty(1):
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.exit(function(*args, **kwargs))


def fork_process(function, *args):
    "Start a process of the server that calls a function, and return it"
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    with patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    process = FORK.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def start_process(folder, function, *args, output="log", **kwargs):
    "Start a process that calls a function in `folder` and writes to `folder/log`, or to a terminal, and return it"
    dtype = core.pick_dtype("cpu")  # Measured once, so that compared processes use the same dtype
    process = fork_process(_child_main, function, args, kwargs, str(folder), output, dtype, SAMPLE_TOKENS)
    STARTED.append(process)
    return process


def wait_for_exit(process):
    "Wait for a process and return its exit code, or the negative number of the signal that killed it"
    process.join(DEADLINE)
    assert process.exitcode is not None, "the process did not end"
    return process.exitcode


def run_in_process(folder, function, *args, **kwargs):
    "Call a function in a new process and return the exit code"
    return wait_for_exit(start_process(folder, function, *args, **kwargs))


def with_environment(variables, function, *args, **kwargs):
    "Set environment variables and call a function, for use in a new process"
    os.environ.update(variables)
    return function(*args, **kwargs)


def replacing_environment(variables, function, *args, **kwargs):
    "Call a function with these environment variables alone, for use in a new process"
    os.environ.clear()
    return with_environment(variables, function, *args, **kwargs)


def run_program(source):
    "Run a program as `python -c` does, for use in a new process. Python's own hook prints an uncaught error"
    try:
        exec(compile(source, "<string>", "exec"), dict(__name__="__main__"))
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def run_code_alone(code, *argv, packages=("lmnotes",)):
    "Run a script as if no module of these packages had been imported, for use in a new process"
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    sys.argv = ["-c", *map(str, argv)]
    exec(compile(code, "<script>", "exec"), dict(__name__="__main__"))
    return 0


def run_ranks(folder, world, function, *args, **kwargs):
    "Call a function in new processes, as torchrun does, and return their exit codes. One process is not distributed"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    shared = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = [shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)] if world > 1 else [{}]
    processes = [start_process(folder, with_environment, rank, function, *args, **kwargs) for rank in ranks]
    return [wait_for_exit(process) for process in processes]


def page_blocks(path, kind="sh"):
    "Return the code blocks of a kind in a page"
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def files_of_page(path):
    "Return {name: content} of the files that a page asks its reader to save"
    text = path.read_text(encoding="utf-8")
    return dict(re.findall(r"^[^\n]* as `([\w.]+)`:\n\n```\w+\n(.*?)^```", text, re.M | re.S))


def read_log(folder):
    "Return the output of the processes that worked in `folder`"
    return (Path(folder) / "log").read_text()


def paste_resume_line(folder, before="esume with"):
    "Run the only command that the processes in `folder` printed after `before` and a colon, and return the exit code"
    (line,) = re.findall(rf"{before}: (.+)$", read_log(folder), re.M)
    return run_in_process(folder, lmnotes_command, *shlex.split(line)[1:])


def wait_until(condition, process=None):
    "Wait until a condition holds, and fail if `process` ends before"
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process is None or process.exitcode is None, "the process ended before the condition was met"
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.001)


def pause_process():
    "Create the file `reached` and wait until the test creates the file `go`. Only the first call waits"
    if not Path("reached").exists():
        Path("reached").touch()
        wait_until(Path("go").exists)


def run_before_call(owner, name, when, act=pause_process):
    "Patch `owner.name` to call `act` before each call whose arguments satisfy `when`"
    original = getattr(owner, name)

    def held(*args, **kwargs):
        if when(*args, **kwargs):
            act()
        return original(*args, **kwargs)

    setattr(owner, name, held)


def run_after_call(owner, name, when, act=pause_process):
    "Patch `owner.name` to call `act` after each call whose arguments satisfy `when`"
    original = getattr(owner, name)

    def held(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args, **kwargs):
            act()
        return result

    setattr(owner, name, held)


def pause_before_step(step, function, *args, **kwargs):
    "Call a function that trains, and pause before this step"
    run_before_call(Trainer, "train_step", lambda trainer: trainer.step == step - 1)
    return function(*args, **kwargs)


def stop_before_step(step, folder, function, *args, number=signal.SIGINT, **kwargs):
    "Train in a new process, send a signal before this step, and return the exit code"
    process = start_process(folder, pause_before_step, step, function, *args, **kwargs)
    wait_until((folder / "reached").exists, process)
    os.kill(process.pid, number)
    (folder / "go").touch()
    return wait_for_exit(process)


def train_with_command(folder, corpus, **params):
    "Train a run on a corpus by the command line in a new folder, and return its run folder"
    (folder / "corpus").symlink_to(corpus)
    assert run_in_process(folder, lmnotes_command, "train", *command_line_args(**params)) == 0, read_log(folder)
    return folder / "runs/r"


def command_line_args(**params):
    "Return parameters as command-line arguments"
    flags = {"--" + name.replace("_", "-"): value for name, value in params.items()}
    return [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]


def iter_leaves(value, name=""):
    "Yield (name, bytes) of every number, text and tensor in nested dicts and lists, in a fixed order"
    if isinstance(value, dict):
        for key in sorted(value, key=lambda k: (str(type(k)), k)):
            yield from iter_leaves(value[key], f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name}.length", str(len(value)).encode()
        for i, item in enumerate(value):
            yield from iter_leaves(item, f"{name}[{i}]")
    elif isinstance(value, torch.Tensor):
        yield name, f"{value.dtype} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
    else:
        yield name, repr(value).encode()


def state_hash(checkpoint_folder):
    "Return the SHA-256 of optimizer states and counters"
    h = hashlib.sha256()
    for name, data in iter_leaves(torch.load(checkpoint_folder / "state.pt", weights_only=True)):
        h.update(f"{name} {len(data)}\n".encode() + data)
    return h.hexdigest()


def read_records(path):
    "Return the lines of a .jsonl file without the fields that depend on the clock"
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "tok_per_s")} for line in lines]


def run_results(folder):
    "Return {name: hash or content} of everything that a finished run wrote, except times"
    folder = Path(folder)
    record = json.loads((folder / "run.json").read_bytes())
    out = dict(status=record["status"], step=record["step"], result=record["result"], tokens=record["tokens"])
    for pointer in ("final", "last", "best"):
        checkpoint_folder = folder / (folder / pointer).read_text().strip()
        out[pointer] = checkpoint_folder.name
        for path in sorted(checkpoint_folder.glob("*.safetensors")):  # Of the model, or of an adapter
            out[f"{pointer} weights"] = hashlib.sha256(path.read_bytes()).hexdigest()
        out[f"{pointer} optimizers and counters"] = state_hash(checkpoint_folder)
    out["metrics"] = read_records(folder / "metrics.jsonl")
    out["samples"] = read_records(folder / "samples.jsonl")
    out["interrupted"] = (folder / "interrupted").exists()
    return out


def differences(a, b):
    "Return the names of the entries that differ between two results of `run_results`"
    return [name for name in a if a[name] != b[name]]


class ForkedChild:
    "Child process of a comparison, forked instead of started, which saves its imports"

    def __init__(self, words, stdout, **how):
        self.returncode, self.pid = None, os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # As in a new process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            comparing._child_main(json.loads(words[3]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fork_children():
    "Make comparisons of this process fork their children"
    comparing.subprocess = SimpleNamespace(Popen=ForkedChild, DEVNULL=subprocess.DEVNULL)
