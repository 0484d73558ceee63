"""A process that is killed at any of its file operations, even repeatedly, resumes to the results of an uninterrupted run.

The process kills itself at its k-th operation in the folder of runs. A write is killed when half of it is written. A failed case
names its setting and the numbers of its operations, with which you can repeat it.
"""

import itertools
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from faults import kill_at, record_operations
from foreign import NIGHT
from helpers import (
    TINY,
    command_line_args,
    differences,
    lmnotes_command,
    read_log,
    run_after_call,
    run_in_process,
    run_results,
    start_process,
    train,
    wait_for_exit,
    wait_until,
)
from test_exactness_matrix import ARCHITECTURES

from lmnotes import core
from lmnotes.core import read_json
from lmnotes.inspect.verify import verify
from lmnotes.runs import folder as folder_module
from lmnotes.runs import run as run_module
from lmnotes.training import saving

SHORT = TINY | dict(steps=12, batch_size=2, eval_every=3, eval_batches=1, sample_every=6, save_every=4, log_every=4)


@dataclass
class Setting:
    "Parameters of a run, and the way in which it is started and resumed"

    params: dict
    resume: str = "auto"  # auto: repeat one command. explicit: pass resume=True as soon as there is a record
    before: str = ""  # finished: another run has the name. stopped: the run has been stopped at step 6
    more: dict = field(default_factory=dict)  # Further parameters of the command that is killed

    def command(self, folder):
        "Return the command that starts or resumes the run"
        params, record = SHORT | self.params | self.more, folder / "runs/r/run.json"
        if self.resume == "auto":
            params |= dict(resume="auto")
        elif record.exists() and read_json(record)["config"]["seed"] == params.get("seed", 0):
            params = dict(run="r", out_dir="runs", resume=True) | self.more
        return "train", *command_line_args(**params)


SAMPLERS = "random", "epochs", "sequential", "domains", "documents"
TOKENIZERS = "bytes", "chars", "bpe:300"


def pairwise_settings():
    "Return {name: setting}: each pair of architecture, sampler, tokenizer, `keep`, optimizer and way to resume is in one"
    settings = {}
    for (a, arch), (s, sampler) in itertools.product(enumerate(ARCHITECTURES), enumerate(SAMPLERS)):
        values = dict(
            arch=arch, sampler=sampler, tokenizer=TOKENIZERS[(a + s) % 3], keep=(2, 1, "all")[(a + 2 * s) % 3]
        )
        values |= dict(optimizer=("muon", "adamw")[(a + a // 3 + s) % 2]) | ARCHITECTURES[arch]
        name = f"{arch} {sampler} {values['tokenizer']}"
        settings[name] = Setting(values, ("auto", "explicit")[(a + a // 2 + s // 2) % 2])
    return settings


LORA = dict(lora_rank=2, lora_dropout=0.1)
SCENARIOS = {
    "one checkpoint is kept": Setting(dict(keep=1, save_every=1)),
    "adapters with dropout": Setting(LORA, "explicit"),
    "an earlier run moves aside": Setting({}, "explicit", before="finished"),
    "an earlier run with adapters moves aside": Setting(LORA, "explicit", before="finished"),
    "the learning rate changes": Setting({}, before="stopped", more=dict(lr=0.003, allow_change="lr")),
}
PAIRWISE = pairwise_settings()
SETTINGS = PAIRWISE | SCENARIOS


def default_settings():
    "Return a setting of each architecture, with another sampler for each, and all scenarios"
    chosen = [
        list(PAIRWISE)[5 * a + a % 5]
        for a, name in enumerate(ARCHITECTURES)
        if ARCHITECTURES[name].get("arch", name) == name
    ]
    return [*chosen, *SCENARIOS]


DEFAULT = default_settings()


def test_settings_are_pairwise():
    "Each pair of values of two parameters is in a setting, and by default each value is in one"
    names = "sampler", "tokenizer", "keep", "optimizer", "resume"
    rows = {name: [name.split()[0], *(({**vars(s), **s.params})[n] for n in names)] for name, s in PAIRWISE.items()}
    for i, j in itertools.combinations(range(len(names) + 1), 2):
        pairs = {(row[i], row[j]) for row in rows.values()}
        possible = set(itertools.product({row[i] for row in rows.values()}, {row[j] for row in rows.values()}))
        assert all(pair[0] in ("bytepatch", "agiformer") for pair in possible - pairs), sorted(possible - pairs)
    for i, n in enumerate(names, 1):
        assert {row[i] for row in rows.values()} == {row[i] for name, row in rows.items() if name in DEFAULT}, n


def content(folder):
    "Return {relative path: content} of the files of a run, without its lock and temporary files"
    files = [p for p in folder.rglob("*") if p.is_file() and not p.relative_to(folder).parts[0].startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, corpus):
    "Return a folder with a finished run and a stopped one"
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "corpus").symlink_to(corpus)
    assert run_in_process(folder, train, **SHORT | dict(run="finished", seed=1)) == 0, read_log(folder)
    assert run_in_process(folder, train, 6, **SHORT | dict(run="stopped")) == 130, read_log(folder)
    return folder / "runs"


class Case:
    "A setting in a folder of its own: its unbroken run, and the same run with kills"

    def __init__(self, name, folder, corpus, earlier):
        self.name, self.setting, self.folder, self.corpus, self.earlier = name, SETTINGS[name], folder, corpus, earlier

    def new_folder(self, name):
        "Return a new folder with the corpus and the run that was there before"
        folder = self.folder / name
        folder.mkdir()
        (folder / "corpus").symlink_to(self.corpus)
        if self.setting.before:
            shutil.copytree(self.earlier / self.setting.before, folder / "runs/r")
        return folder

    def run_unbroken(self):
        "Run without kills. Return (results, operations)"
        folder = self.new_folder("unbroken")
        assert run_in_process(folder, record_operations, lmnotes_command, *self.setting.command(folder)) == 0, read_log(
            folder
        )
        self.results = run_results(folder / "runs/r")
        self.operations = (folder / "operations").read_text().splitlines()

    def kill(self, numbers, mutant=""):
        "Kill the run at an operation, and its resumed runs at further ones. Return the problem with its results, or an empty text"
        folder = self.new_folder(re.sub(r"\W+", "-", f"killed {numbers} {mutant}"))
        for number in numbers:
            command = self.setting.command(folder)
            code = run_in_process(folder, mutated, mutant, kill_at, number, lmnotes_command, *command)
            if code != -9:
                assert number != numbers[0] and code == 0, f"exit code {code}: {read_log(folder)}"
            if self.setting.before == "finished" and not self.earlier_is_complete(folder):
                return "the earlier run is not complete in one folder"
        if run_in_process(folder, mutated, mutant, lmnotes_command, *self.setting.command(folder)):
            return read_log(folder)[-1000:]
        found = differences(self.results, run_results(folder / "runs/r"))
        temporary = [str(p) for p in folder.glob("runs/r/.*.tmp")]
        shutil.rmtree(folder)
        return f"these differ: {found}" if found else f"these remain: {temporary}" if temporary else ""

    def earlier_is_complete(self, folder):
        runs, expected = [p for p in (folder / "runs").iterdir() if p.is_dir()], content(self.earlier / "finished")
        return sum(content(run) == expected for run in runs) == 1

    def failures(self, kills):
        "Return each failed kill as a text"
        with ThreadPoolExecutor(2) as pool:
            problems = pool.map(self.kill, kills)
        return [f"{self.name!r}, {numbers}: {problem}" for numbers, problem in zip(kills, problems) if problem]


def mutated(name, function, *args):
    "Call a function with a part of the library replaced by a `MUTANTS`"
    if name:
        MUTANTS[name][0]()
    return function(*args)


@pytest.fixture
def case(request, tmp_path, corpus, earlier):
    case = Case(request.param, tmp_path, corpus, earlier)
    case.run_unbroken()
    return case


def further(number, i):
    "Return the numbers of the operations at which a run and its resumed runs are killed: one, two or three kills"
    return [number, 7 * number % 61 + 1, 11 * number % 23 + 1][: 1 + (i % 3 == 1) + 2 * (i % 6 == 2)]


@pytest.mark.parametrize("case", DEFAULT, indirect=True)
def test_kills(case):
    "A run that is killed, once or more, at operations spread over all of a run, resumes to the results of an uninterrupted run, in each architecture and scenario"
    i, n = DEFAULT.index(case.name), len(case.operations)
    numbers = [1 + n * (2 * i + 1) // (2 * len(DEFAULT))]
    if case.setting.before == "finished":  # Near the operation that moves it
        at = next(k for k, operation in enumerate(case.operations, 1) if operation.startswith("exchange"))
        numbers = [at + (case.name in DEFAULT[::2]), at + 4]
    failures = case.failures([further(number, i) for number in numbers])
    assert not failures, failures


@pytest.mark.nightly
@pytest.mark.parametrize("case", SETTINGS, indirect=True)
def test_kill_at_every_operation(case):
    "A run of each setting is killed at every eighth of its file operations, and in eight nights at each of them"
    kills = [further(number, number) for number in range(1 + NIGHT % 8, len(case.operations) + 1, 8)]
    failures = case.failures(kills)
    assert not failures, (len(failures), len(kills), failures[:5])


def write_in_place():
    def write(path, data, durable=True):
        with open(path, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)

    core.write_atomic = write


def move_file_by_file():
    def move(lock, files):
        if (lock.folder / "run.json").exists():
            aside = lock.folder.with_name("r-1")
            aside.mkdir(exist_ok=True)
            for path in sorted(p for p in lock.folder.iterdir() if not p.name.startswith(".")):
                os.replace(path, aside / path.name)

    run_module.move_earlier_run_aside = move


def prune_first():
    real = saving.Save.save

    def save(hook, t, ending=""):
        for folder in [] if t.rank else hook.run.glob("step_*"):
            shutil.rmtree(folder)
        real(hook, t, ending)

    saving.Save.save = save


def keep_metrics():
    run_module.truncate_metrics = lambda folder, step, counters: None


def keep_temporary_files():
    run_module.locked_run_folder.__wrapped__.__globals__["remove_temporary_files"] = lambda folder: None


def lose_counters():
    real = run_module.restore_trainer

    def restore(trainer, folder):
        counters = dict(trainer.counters)
        real(trainer, folder).counters.update(counters)

    run_module.restore_trainer = restore


# {name: (function that replaces a part of the library, setting, operation before which the run is killed)}
MUTANTS = {
    "writes run.json in place": (write_in_place, "gpt random bytes", "write r/run.json"),
    "moves an earlier run file by file": (move_file_by_file, "an earlier run moves aside", "rename r-1/metrics.jsonl"),
    "deletes old checkpoints before it writes the new one": (
        prune_first,
        "one checkpoint is kept",
        "mkdir r/.step_00000008",
    ),
    "does not cut metrics on resume": (keep_metrics, "gpt random bytes", "mkdir r/.step_00000008"),
    "does not remove temporary files": (keep_temporary_files, "gpt random bytes", "write r/.step_00000008"),
    "does not restore counters": (lose_counters, "gpt random bytes", "mkdir r/.step_00000008"),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus, earlier):
    "Return {name: case} of the settings of `MUTANTS`"
    cases = {name: Case(name, tmp_path_factory.mktemp("case"), corpus, earlier) for _, name, _ in MUTANTS.values()}
    for case in cases.values():
        case.run_unbroken()
    return cases


@pytest.mark.parametrize("mutant", MUTANTS)
def test_kills_detect_a_missing_measure(unbroken, mutant):
    "If a measure is removed, a kill leaves another result, so the tests above detect its absence"
    _, name, operation = MUTANTS[mutant]
    case = unbroken[name]
    assert case.kill([operation], mutant)


def test_killed_before_best_points_at_the_last_best(unbroken):
    "The best checkpoint of a run that is killed before `best` changes for the last time is that of an uninterrupted run"
    case = unbroken["one checkpoint is kept"]
    last = [k for k, operation in enumerate(case.operations, 1) if operation == "rename r/best"][-1]
    failures = case.failures([[last], [last + 1]])
    assert not failures, failures


def copy_slowly(run):
    "Fork a run, and pause when its files are copied"
    run_after_call(folder_module, "_copy_run_at_step", lambda *args: True)
    folder_module.fork(run, "copy", "runs")


def test_a_fork_that_is_killed(tmp_path, uninterrupted_run):
    "The copy of a killed fork is removed, but not that of a living one"
    process, runs = start_process(tmp_path, copy_slowly, uninterrupted_run), tmp_path / "runs"
    wait_until((tmp_path / "reached").exists, process)
    folder_module.remove_abandoned_folders(runs)
    (copy,) = runs.iterdir()
    process.kill()
    assert wait_for_exit(process) == -signal.SIGKILL and (copy / "metrics.jsonl").is_file()
    with folder_module.locked_run_folder(runs / "another"):
        assert not copy.exists()
    folder_module.fork(uninterrupted_run, "copy", runs)
    assert verify(runs / "copy").exit_code == 0 and not (runs / "copy/.lock").exists()
