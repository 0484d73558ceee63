"""Two processes train like one, stop together, and write a checkpoint that one process can resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    DEADLINE,
    TINY,
    command_line_args,
    lmnotes_command,
    read_log,
    read_records,
    run_in_process,
    run_ranks,
    wait_until,
)

TESTS = Path(__file__).parent
# Without dropout, which draws other numbers on each process, and with a rate that does not depend on the number of steps.
CASE = TINY | dict(
    model_args="d_model=16 n_layers=1 n_heads=2 dropout=0.0",
    optimizer="adamw",
    lr=0.0005,
    schedule="constant",
    warmup=0.0,
    steps=10,
    log_every=1,
    eval_batches="all",
)
HELD = """
import sys
from test_signals import command_held
sys.exit(command_held("before step 8", *sys.argv[1:]))
"""


def torchrun(workdir, *command):
    "Run torchrun with two processes"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    with open(workdir / "log", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
            cwd=workdir,
            env=clean
            | dict(
                OMP_NUM_THREADS="1",
                PYTHONPATH=os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
                CUDA_VISIBLE_DEVICES="",
            ),
            stdout=output,
            stderr=output,
        )


def figures(workdir, run):
    "Return {(split, step): loss} of a run"
    return {(r["split"], r["step"]): r["loss"] for r in read_records(workdir / "runs" / run / "metrics.jsonl")}


def equal_losses(two, single_process_run):
    "Return True if losses are equal within 1e-6, the last digit that is recorded"
    return two.keys() <= single_process_run.keys() and all(
        abs(loss - single_process_run[key]) <= 1e-6 + 1e-9 for key, loss in two.items()
    )


@pytest.fixture(scope="module")
def single_process_run(tmp_path_factory, corpus):
    "Return the losses of one process over 20 steps"
    folder = tmp_path_factory.mktemp("one")
    (folder / "corpus").symlink_to(corpus)
    assert run_in_process(folder, lmnotes_command, "train", *command_line_args(**CASE | dict(steps=20))) == 0, read_log(
        folder
    )
    return figures(folder, "r")


def test_two_processes_equal_one(workdir, single_process_run):
    "Ten steps on two processes, then ten on one from their checkpoint, have the losses of twenty steps on one process"
    assert run_ranks(workdir, 2, lmnotes_command, "train", *command_line_args(**CASE)) == [0, 0], read_log(workdir)
    two = figures(workdir, "r")
    assert [step for split, step in two if split == "train"] == list(range(1, 11))
    assert equal_losses(two, single_process_run), (two, single_process_run)
    more = dict(run="r", out_dir="runs", resume=True, steps=20, allow_change="steps")
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**more)) == 0, read_log(workdir)
    both = figures(workdir, "r")
    assert both.keys() == single_process_run.keys()
    for key, loss in both.items():
        assert abs(loss - single_process_run[key]) <= 1e-5, (key, loss, single_process_run[key])


def test_two_processes_stop_together(workdir, single_process_run):
    "After a signal to torchrun, just before one process starts its eighth step, both stop at the same step"
    (workdir / "held.py").write_text(HELD)
    process = torchrun(workdir, "--", "held.py", "train", *command_line_args(**CASE | dict(steps=20)))
    wait_until(lambda: (workdir / "reached").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in read_log(workdir))
    (workdir / "go").touch()
    assert process.wait(DEADLINE) != 0
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    assert record["status"] == "interrupted" and record["step"] in (8, 9), read_log(workdir)
    assert (
        run_in_process(workdir, lmnotes_command, "train", *command_line_args(run="r", out_dir="runs", resume=True)) == 0
    ), read_log(workdir)
    both = figures(workdir, "r")
    assert both.keys() == single_process_run.keys()
    for key, loss in both.items():
        assert abs(loss - single_process_run[key]) <= 1e-5, (key, loss, single_process_run[key])


def test_processes_started_by_the_command(workdir, single_process_run):
    "`--procs 2` starts two processes"
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**CASE, procs=2)) == 0, read_log(
        workdir
    )
    assert len(figures(workdir, "r")) == 12 and equal_losses(figures(workdir, "r"), single_process_run), read_log(
        workdir
    )
