"""Time to start: `import lmnotes`, its help, training for one step and generating one token, against `import torch`, each in a new process.

lmnotes loads its modules when a name is first used, so the goal of an import applies to `lmnotes.run`, which loads torch and nearly
all modules. We measure the CPU time of the child processes, on one thread, with files in the file cache.
"""

from common import Clock, timing_columns, report, parse_options  # isort: skip
import os
import shlex
import subprocess
import sys
import tempfile

USE = "import lmnotes; lmnotes.run"
TINY = "--tokenizer bytes --model-args d_model=16\\ n_layers=1\\ n_heads=2 --ctx-len 16 --steps 1 --eval-batches 1"


class ChildClock(Clock):
    "CPU seconds of the child processes that ended inside its `with` blocks"

    def __enter__(self):
        super().__enter__()
        self._children = os.times()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        before, after = self._children, os.times()
        self.cpu = after.children_user + after.children_system - before.children_user - before.children_system


def commands(folder):
    "Return {name: words after `python`} of what we measure, with runs in a folder"
    run = ["--run", "r", "--out-dir", folder]
    statements = {statement: ["-c", statement] for statement in ("import torch", "import lmnotes", USE)}
    statements["lmnotes --help"] = ["-m", "lmnotes", "--help"]
    statements["lmnotes train, one step"] = ["-m", "lmnotes", "train", *shlex.split(TINY), *run]
    return statements | {
        "lmnotes generate, one token": ["-m", "lmnotes", "generate", "--run", f"{folder}/r", "--n", "1"]
    }


def main():
    args = parse_options(__doc__, rounds=(7, "new processes for each"))
    rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        programs = commands(folder)
        clocks = {name: [] for name in programs}
        for i in range(0 if args.quick else -1, rounds):
            for name, words in programs.items():
                clock = ChildClock()
                with clock:
                    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
                clocks[name] += [clock] if i >= 0 else []  # The first round only fills the file cache
    loads = f"import sys; {USE}\nprint(*{{'transformers', 'matplotlib', 'faiss'}} & set(sys.modules))"
    heavy = subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, text=True).stdout.split()
    torch, first, use, overview, train, generate = (min(clock.cpu for clock in of) for of in clocks.values())
    more = max(first, use) - torch
    report(
        args,
        [{"process": name, **timing_columns(of, "s")} for name, of in clocks.items()],
        [
            ("import: at most 0.5 CPU seconds more than torch", f"{more:.2f} s", more <= 0.5),
            ("no heavy package is loaded", ", ".join(heavy) or "nothing", not heavy),
            ("--help: at most 1.2 times torch", f"{overview / torch:.2f}", overview <= 1.2 * torch),
            ("train: at most twice torch", f"{train / torch:.2f}", train <= 2 * torch),
            ("generate: at most 1.5 times torch", f"{generate / torch:.2f}", generate <= 1.5 * torch),
        ],
    )


if __name__ == "__main__":
    main()
