"""A rank that is killed ends the run with one line, and a killed launcher takes its ranks with it. Both can be resumed exactly."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import (
    DEADLINE,
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    read_log,
    run_in_process,
    run_ranks,
    run_results,
    train,
    wait_until,
)
from test_distributed import torchrun

import lmnotes
from lmnotes.files import RunLock
from lmnotes.runs import launch
from lmnotes.runs import run as run_module
from lmnotes.training import trainer

TRUST = Path(__file__).parent
LAUNCHERS = {
    "procs": [sys.executable, "-m", "lmnotes", "train", "--procs", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    + ["-m", "--", "lmnotes", "train"],
}
LAUNCHERS["torchrun of 3"] = [word.replace("node=2", "node=3") for word in LAUNCHERS["torchrun"]]
LONG = TINY | dict(steps=100000, patience=0, save_every=10)


def start(workdir, launcher, **params):
    "Start a run in two processes"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}
    with open(workdir / "log", "ab") as output:
        command = [*LAUNCHERS[launcher], *command_line_args(**params)]
        return subprocess.Popen(
            command, cwd=workdir, env=clean | dict(OMP_NUM_THREADS="1"), stdout=output, stderr=output
        )


def wait_for_step(workdir, step, process):
    "Wait until a run has saved a checkpoint of at least `step` steps"
    wait_until(lambda: saved(workdir) >= step or process.poll() is not None)
    assert process.poll() is None, read_log(workdir)


def saved(workdir):
    "Return the step of the newest checkpoint, 0 if there is none"
    return max((int(path.parent.name[5:]) for path in (workdir / "runs/r").glob("step_*/manifest.json")), default=0)


def ranks_of(launcher):
    "Return the process ids of the ranks, in the order of their numbers"
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    ranks = {}
    for pid in children.stdout.split():
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(word[5:]): int(pid) for word in environ if word.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def has_ended(pid):
    "Return True if a process has ended, also if nobody has collected its exit code"
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def own_lines(workdir):
    "Return the lines on stderr that lmnotes printed for an error"
    return [line for line in read_log(workdir).splitlines() if line.startswith("lmnotes: ")]


pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_killed_rank_of_procs(workdir, rank):
    "If a rank is killed, one line names the rank, the signal, the step and the command that resumes. The record has the reason, and no rank remains"
    launcher = start(workdir, "procs", **LONG)
    wait_for_step(workdir, 10, launcher)
    ranks = ranks_of(launcher)
    os.kill(ranks[rank], signal.SIGKILL)
    assert launcher.wait(DEADLINE) == 6, read_log(workdir)
    assert all(has_ended(pid) for pid in ranks)
    assert "Traceback" not in read_log(workdir), read_log(workdir)
    (line,) = own_lines(workdir)
    pattern = rf"lmnotes: r: rank {rank} was killed by SIGKILL at step [\d,]+ or soon after\. Resume with: \S+ -m lmnotes train (.+)"
    words = re.fullmatch(pattern, line)[1].split()
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    assert (record["status"], f"rank {rank} was killed by SIGKILL" in record["error"]) == ("failed", True)
    more = ["--steps", str(saved(workdir) + 1), "--allow-change", "steps"]
    assert run_in_process(workdir, lmnotes_command, "train", *words, *more) == 0, read_log(workdir)


@pytest.mark.parametrize("way", ["procs", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_killed_launcher(workdir, way):
    "If the launcher is killed, its ranks stop, save and free the lock"
    launcher = start(workdir, way, **LONG)
    wait_for_step(workdir, 10, launcher)
    ranks = ranks_of(launcher)
    launcher.kill()
    wait_until(lambda: all(has_ended(pid) for pid in ranks))
    launcher.wait()
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    assert (record["status"], record["signal"], record["step"]) == ("interrupted", "SIGHUP", saved(workdir))
    with RunLock(workdir / "runs/r"):
        pass


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_of_torchrun(workdir, rank):
    "Of the two ranks that remain, one prints one line that names the killed one, and the record has the reason"
    launcher = start(workdir, "torchrun of 3", **LONG | dict(batch_size=6))
    wait_for_step(workdir, 10, launcher)
    ranks = ranks_of(launcher)
    os.kill(ranks[rank], signal.SIGKILL)
    assert launcher.wait(DEADLINE) != 0
    assert all(has_ended(pid) for pid in ranks)
    assert len(own_lines(workdir)) == 1, read_log(workdir)
    (line,) = own_lines(workdir)
    pattern = rf"lmnotes: r: rank {rank} ended at step [\d,]+ or soon after\. Resume with: .+ train --resume .+"
    assert re.fullmatch(pattern, line), line
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    assert (record["status"], f"rank {rank} ended" in record["error"]) == ("failed", True)
    with RunLock(workdir / "runs/r"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_stopped_launcher(workdir, number):
    "After a signal to `lmnotes train --procs 2`, the run saves a checkpoint and prints its status as the last line"
    launcher = start(workdir, "procs", **LONG)
    wait_for_step(workdir, 10, launcher)
    launcher.send_signal(number)
    assert launcher.wait(DEADLINE) == 128 + number, read_log(workdir)
    last = read_log(workdir).splitlines()[-1]
    assert last.startswith("r: interrupted at step ") and "Traceback" not in read_log(workdir), read_log(workdir)


# Startup code of the processes: each rank waits before step 12. A rank that waited in a collective operation would not see a signal.
PAUSED = """
import os, sys
if "RANK" in os.environ:
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from helpers import run_before_call, shorten_samples, wait_until
    shorten_samples()
    from lmnotes.training.trainer import Trainer
    def wait():
        Path("reached" + os.environ["RANK"]).touch()
        wait_until(Path("go").exists)
    run_before_call(Trainer, "train_step", lambda trainer: trainer.step == 11, wait)
"""
SIGNALS = {
    "two signals to procs": ("procs", signal.SIGTERM, signal.SIGTERM),
    "two signals to torchrun": ("torchrun", signal.SIGTERM, signal.SIGINT),
    "SIGINT to a rank of procs": ("procs", signal.SIGINT),
    "SIGTERM to a rank of torchrun": ("torchrun", signal.SIGTERM),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    "Return the results of a run in two processes that nothing stops"
    folder = tmp_path_factory.mktemp("whole")
    (folder / "corpus").symlink_to(corpus)
    assert run_ranks(folder, 2, train, **TINY) == [0, 0], read_log(folder)
    return run_results(folder / "runs/r")


@pytest.mark.parametrize(
    "case",
    [name if "to a rank of procs" in name else pytest.param(name, marks=pytest.mark.nightly) for name in SIGNALS],
)
def test_signals(workdir, monkeypatch, whole, case):
    "After two signals to the launcher, or one to a rank, no process remains, and the resumed run ends in the same bits"
    way, first, *second = SIGNALS[case]
    (workdir / "sitecustomize.py").write_text(PAUSED.format(tests=str(TRUST.parent)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workdir), os.environ.get("PYTHONPATH", "")]))
    launcher = start(workdir, way, **TINY)
    wait_until(lambda: len(list(workdir.glob("reached?"))) == 2 or launcher.poll() is not None)
    assert launcher.poll() is None, read_log(workdir)
    ranks = ranks_of(launcher)
    os.kill(ranks[1] if "to a rank" in case else launcher.pid, first)
    wait_until(lambda: f"{first.name}: stopping" in read_log(workdir))
    for number in second:
        time.sleep(1.1)  # An earlier one would count as the same signal
        launcher.send_signal(number)
    (workdir / "go").touch()
    assert launcher.wait(DEADLINE) != 0, read_log(workdir)
    wait_until(lambda: all(has_ended(pid) for pid in ranks))
    record = json.loads((workdir / "runs/r/run.json").read_bytes())
    assert second or (record["status"], record["step"]) == ("interrupted", 12), read_log(workdir)
    assert start(workdir, way, run="r", out_dir="runs", resume=True).wait(DEADLINE) == 0, read_log(workdir)
    assert not differences(whole, run_results(workdir / "runs/r"))


RESTARTED = """
import os, signal, sys
sys.path.insert(0, {trust!r})
from pathlib import Path
from helpers import lmnotes_command, run_before_call, shorten_samples
from lmnotes.training import trainer

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, step = [*{kills}, (-1, 0)][attempt]
if int(os.environ["RANK"]) == rank:
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    run_before_call(trainer.Trainer, "train_step", lambda t: t.step == step, kill)
shorten_samples()
code = lmnotes_command("train", *sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.parametrize("kills", [[(1, 14)], pytest.param([(0, 14), (1, 25), (0, 33)], marks=pytest.mark.nightly)])
def test_torchrun_restarts(workdir, whole, kills):
    "`torchrun --max-restarts` and `--resume auto`: ranks are killed, and the run is the same as without a kill"
    (workdir / "held.py").write_text(RESTARTED.format(trust=str(TRUST.parent), kills=kills))
    restarts = f"--max-restarts={len(kills)}"
    process = torchrun(workdir, restarts, "--", "held.py", *command_line_args(**TINY, resume="auto"))
    assert process.wait(DEADLINE) == 0, read_log(workdir)
    assert read_log(workdir).count("from step") == len(kills), read_log(workdir)
    assert [path.name for path in (workdir / "runs").glob("[!.]*")] == ["r"]
    assert not differences(whole, run_results(workdir / "runs/r"))


@pytest.mark.parametrize("wait", [0, 7200, math.inf])
def test_ranks_wait_for_rank_0(monkeypatch, wait):
    "While rank 0 waits for the lock of the run, the other ranks wait at least `wait` seconds for it"
    for name, value in dict(RANK="1", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(trainer.dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(trainer.dist, "init_process_group", lambda *args: joined.append(args))
    monkeypatch.setattr(trainer.atexit, "register", lambda function: None)
    trainer.init_distributed("cpu", wait)
    (timeout,) = [value for value in joined[0] if isinstance(value, timedelta)]
    assert timeout.total_seconds() == 1800 + min(wait, 1e9)


def test_a_run_passes_its_wait_to_the_ranks(monkeypatch):
    "A run passes `wait` to the process group of its ranks"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run_module, "init_distributed", lambda device, wait: pytest.fail(f"wait={wait}"))
    with pytest.raises(pytest.fail.Exception, match="wait=7200"):
        lmnotes.run(wait=7200, run="r", device="cpu")


@pytest.mark.parametrize(
    "hosts, found", [(["", "far", "far"], "ranks 1, 2"), (["", "", "far"], "rank 2"), ([], "ranks 1, 2")]
)
def test_rank_lost_on_another_machine(monkeypatch, hosts, found):
    "If no rank on this machine has ended, the message names those on other machines, or all others"
    monkeypatch.setenv("WORLD_SIZE", "3")
    processes = [(os.getpid(), host) for host in hosts]
    assert launch._find_lost_ranks(processes, seconds=0) == f"rank 0 lost contact with {found}"
