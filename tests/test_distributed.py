"""Two processes train what one trains, stop together, and leave a checkpoint with which one goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DEADLINE, TINY, call, lmnotes_command, log, records, until, words

TESTS = Path(__file__).parent
# Dropout draws other numbers on each process, so the comparison is without it; a constant rate, so that more steps change nothing.
CASE = TINY | dict(
    model_args="d_model=16 n_layers=1 n_heads=2 dropout=0.0",
    optimizer="adamw",
    lr=0.0005,
    schedule="constant",
    warmup=0.0,
    steps=10,
    log_every=1,
    eval_batches=0,
)
HELD = """
import sys
from test_signals import command_held
sys.exit(command_held("before step 8", *sys.argv[1:]))
"""


def torchrun(place, *command):
    "Start two processes"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    with open(place / "log", "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
            cwd=place,
            env=clean
            | dict(
                OMP_NUM_THREADS="1",
                PYTHONPATH=os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
                CUDA_VISIBLE_DEVICES="",
            ),
            stdout=said,
            stderr=said,
        )


def figures(place, run):
    "{(split, step): loss} of a run"
    return {(r["split"], r["step"]): r["loss"] for r in records(place / "runs" / run / "metrics.jsonl")}


def the_same(two, one):
    "Are losses the same within 1e-6? They are recorded with seven digits, the last of which is a millionth here"
    return two.keys() <= one.keys() and all(abs(loss - one[key]) <= 1e-6 + 1e-9 for key, loss in two.items())


@pytest.fixture(scope="module")
def one(tmp_path_factory, corpus):
    "The losses of one process over 20 steps"
    folder = tmp_path_factory.mktemp("one")
    (folder / "corpus").symlink_to(corpus)
    assert call(folder, lmnotes_command, "train", *words(**CASE | dict(steps=20))) == 0, log(folder)
    return figures(folder, "r")


def test_two_processes_are_one(place, one):
    "Ten steps on two; then ten on one, from the checkpoint of two"
    process = torchrun(place, "-m", "--", "lmnotes", "train", *words(**CASE))
    assert process.wait(DEADLINE) == 0, log(place)
    two = figures(place, "r")
    assert [step for split, step in two if split == "train"] == list(range(1, 11))
    assert the_same(two, one), (two, one)
    more = dict(run="r", out_dir="runs", resume=True, steps=20, allow_change="steps")
    assert call(place, lmnotes_command, "train", *words(**more)) == 0, log(place)
    both = figures(place, "r")
    assert both.keys() == one.keys()
    for key, loss in both.items():
        assert abs(loss - one[key]) <= 1e-5, (key, loss, one[key])


def test_two_processes_stop_together(place, one):
    "A signal to torchrun, held until one process is about to begin its eighth step"
    (place / "held.py").write_text(HELD)
    process = torchrun(place, "--", "held.py", "train", *words(**CASE | dict(steps=20)))
    until(lambda: (place / "reached").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    until(lambda: "SIGTERM" in log(place))
    (place / "go").touch()
    assert process.wait(DEADLINE) != 0
    record = json.loads((place / "runs/r/run.json").read_bytes())
    assert record["status"] == "interrupted" and record["step"] in (8, 9), log(place)
    assert call(place, lmnotes_command, "train", *words(run="r", out_dir="runs", resume=True)) == 0, log(place)
    both = figures(place, "r")
    assert both.keys() == one.keys()
    for key, loss in both.items():
        assert abs(loss - one[key]) <= 1e-5, (key, loss, one[key])


def test_processes_started_by_the_command(place, one):
    "`--procs 2` starts them itself"
    assert call(place, lmnotes_command, "train", *words(**CASE, procs=2)) == 0, log(place)
    assert len(figures(place, "r")) == 12 and the_same(figures(place, "r"), one), log(place)
