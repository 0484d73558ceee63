"""Runs every benchmark, one after the other: `python -m benchmarks` in full, with `--quick` only to see that they run.

Other options, such as `--check`, are passed on to each. Leaves with 1 if one of them does not end well.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = "__main__.py", "common.py", "nanogpt.py"
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.name not in NOT_BENCHMARKS)


def main():
    failed = []
    for script in SCRIPTS:
        print(f"\n== {script.name}", flush=True)
        if subprocess.run([sys.executable, script, *sys.argv[1:]]).returncode:
            failed.append(script.name)
    if failed:
        sys.exit(f"\nnot well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
