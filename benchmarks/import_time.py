"""Import time: `import lmnotes` against `import torch`, each in a new process.

lmnotes loads its modules when a name is first used, so the goal applies to `lmnotes.run`, which loads torch and nearly all modules.
We measure the CPU time of the child processes, on one thread, with files in the file cache.
"""

from common import Clock, timing_columns, report, parse_options  # isort: skip
import os
import subprocess
import sys

USE = "import lmnotes; lmnotes.run"


class ChildClock(Clock):
    "CPU seconds of the child processes that ended inside its `with` blocks"

    def __enter__(self):
        super().__enter__()
        self._children = os.times()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        before, after = self._children, os.times()
        self.cpu = after.children_user + after.children_system - before.children_user - before.children_system


def main():
    args = parse_options(__doc__, rounds=(7, "new processes for each"))
    rounds = 1 if args.quick else args.rounds
    clocks = {"import torch": [], "import lmnotes": [], USE: []}
    for i in range(0 if args.quick else -1, rounds):
        for statement, of in clocks.items():
            clock = ChildClock()
            with clock:
                subprocess.run([sys.executable, "-c", statement], check=True)
            of += [clock] if i >= 0 else []  # The first round only fills the file cache
    loads = f"import sys; {USE}\nprint(*{{'transformers', 'matplotlib', 'faiss'}} & set(sys.modules))"
    heavy = subprocess.run([sys.executable, "-c", loads], check=True, capture_output=True, text=True).stdout.split()
    least = {statement: min(clock.cpu for clock in of) for statement, of in clocks.items()}
    more = max(least["import lmnotes"], least[USE]) - least["import torch"]
    report(
        args,
        [{"statement": statement, **timing_columns(of, "s")} for statement, of in clocks.items()],
        [
            ("at most 0.5 CPU seconds more than torch", f"{more:.2f} s", more <= 0.5),
            ("no heavy package is loaded", ", ".join(heavy) or "nothing", not heavy),
        ],
    )


if __name__ == "__main__":
    main()
