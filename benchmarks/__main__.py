"""Run every benchmark, one after the other: `python -m benchmarks`, with `--quick` only to check that they run.

Other options, such as `--check`, are passed to each benchmark. The exit code is 1 if one of them fails.
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
        sys.exit(f"\nfailed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
