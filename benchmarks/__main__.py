"""Run benchmarks and compare kinds of CPU: `python -m benchmarks`, or only some with `python -m benchmarks muon generation`.

The benchmarks of speed run once for each kind of CPU that this one can imitate, in turn: with the instructions of AVX2, with those of
AVX-512, and with all that it has. `matmul` shows what each kind can do. The others run once, with all instructions.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = "__main__.py", "common.py", "nanogpt.py"
SCRIPTS = {path.stem: path for path in sorted(HERE.glob("*.py")) if path.name not in NOT_BENCHMARKS}
SPEED = "matmul compiled generation lora muon plain_forms scans step_profile throughput time_to_loss tokens".split()
RESULTS = HERE.parent / "docs" / "results.md"
MARKS = "<!-- kinds of CPU -->", "<!-- end of kinds of CPU -->"


def limits(aten, onednn, mkl):
    "Return the variables that limit the instructions of torch and of its two libraries"
    return dict(ATEN_CPU_CAPABILITY=aten, ONEDNN_MAX_CPU_ISA=onednn, MKL_ENABLE_INSTRUCTIONS=mkl)


def kinds_of_cpu():
    "Return {kind: variables} of the kinds of CPU that this one can imitate, itself last"
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    kinds = {"AVX2": limits("avx2", "AVX2", "AVX2")} if "avx512f" in flags else {}
    if flags & {"avx512_bf16", "amx_bf16"}:
        kinds["AVX-512"] = limits("avx512", "AVX512_CORE", "AVX512")
    whole = "AMX" if "amx_bf16" in flags else "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "CPU"
    return kinds | {whole + " with bfloat16" * ("avx512_bf16" in flags and whole != "AMX"): {}}


def run(script, variables, options):
    "Run a benchmark with limited instructions. Return whether it succeeded, and its goals as [(goal, value, met)]"
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "goals.jsonl"
        environ = os.environ | variables | dict(BENCHMARK_GOALS=str(found))
        done = subprocess.run([sys.executable, script, *options], env=environ)
        return not done.returncode, [
            json.loads(line) for line in found.read_text().splitlines()
        ] if found.exists() else []


def table(goals, kinds):
    "Return a Markdown table of {(script, goal): {kind: (value, met)}}"
    lines = [f"| Goal | {' | '.join(kinds)} | Command |", "|---|" + "---|" * (len(kinds) + 1)]
    for (script, goal), values in goals.items():
        cells = [values.get(kind, ("not run", None)) for kind in kinds]
        shown = " | ".join(f"{value}{', missed' if met is False else ''}" for value, met in cells)
        lines.append(f"| {goal} | {shown} | `python -m benchmarks {script}` |")
    return "\n".join(lines)


def write_results(text):
    "Replace the table of the kinds of CPU in docs/results.md"
    old = RESULTS.read_text(encoding="utf-8")
    new = re.sub(f"({MARKS[0]}\n).*({MARKS[1]})", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.S)
    RESULTS.write_text(new, encoding="utf-8")


def main():
    kinds = kinds_of_cpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"benchmarks to run (default all): {', '.join(SCRIPTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="only check that they run, without judging the results")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--only", choices=kinds, action="append", help="kind of CPU (may be repeated, default all)")
    parser.add_argument("--write", action="store_true", help="write the table of speeds into docs/results.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SCRIPTS):
        parser.error(f"there is no benchmark {min(unknown)!r}: choose from {', '.join(SCRIPTS)}")
    chosen = {kind: kinds[kind] for kind in kinds if kind in (args.only or kinds)}
    options = ["--quick"] * args.quick + ["--check"] * args.check
    goals, failed = {}, []
    for name in args.names or SCRIPTS:
        for kind, variables in (chosen if name in SPEED else {list(kinds)[-1]: {}}).items():
            print(f"\n== {name}, {kind}", flush=True)
            succeeded, found = run(SCRIPTS[name], variables, options)
            failed += [] if succeeded else [f"{name} ({kind})"]
            for goal, value, met in found:
                goals.setdefault((name, goal), {})[kind] = value, met
    speeds = {key: values for key, values in goals.items() if key[0] in SPEED}
    if speeds:
        from lmnotes.core import environment

        threads = os.environ.get("OMP_NUM_THREADS", "1")
        machine = f"{environment()['cpu_model']}, {threads} thread{'s' * (threads != '1')}, {datetime.date.today()}"
        note = "A ratio is that of the least times. The quartiles of single rounds are in brackets, and it can lie outside them"
        text = f"{machine}. {note}.\n\n{table(speeds, chosen)}"
        print(f"\n{text}")
        if args.write:
            write_results(text)
    if failed:
        sys.exit(f"\nfailed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
