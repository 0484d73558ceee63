"""Time and memory of preparing text of every shape: any newlines, none, no spaces, one repeated character.

Each text is prepared in a new process, by a tokenizer trained on it. We measure the CPU seconds and the peak memory of the whole process, and compare a
text with half of it. One repeated character is text for the tokenizer `bytes`, and must be rejected within a second for `bpe`.
"""

from common import parse_options, report  # isort: skip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, time
import lmnotes.data.prepare as prepare
start = time.perf_counter()
try:
    prepare.prepare_data(sys.argv[1], sys.argv[2], sys.argv[3])
    error = ""
except Exception as e:
    error = f"{type(e).__name__}: {e}"
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(dict(error=error, wall=time.perf_counter() - start, cpu=used.ru_utime + used.ru_stime, peak=used.ru_maxrss)))
"""
ENDS = {"\\n": b"\n", "\\r\\n": b"\r\n", "\\r": b"\r", "blank lines": b"\n\n", "no newlines": b" "}


def write_text(path, size, end=b"\n", space=b" "):
    "Write `size` bytes of sentences of made-up words with the frequencies of a real text"
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))).encode() for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "wb") as f:
        while (left := size - f.tell()) > 0:
            block = rng.choices(words, weights, k=100_000)
            lines = (space.join(block[i : i + 12]) + b"." + end for i in range(0, len(block), 12))
            f.write(b"".join(lines)[:left])


def write_repeated(path, size):
    "Write `size` times the letter a"
    with open(path, "wb") as f:
        for i in range(0, size, 1 << 20):
            f.write(b"a" * min(1 << 20, size - i))


TEXTS = {
    f"ends of lines: {name}": lambda path, size, end=end: write_text(path, size, end) for name, end in ENDS.items()
}
TEXTS |= {"no spaces": lambda path, size: write_text(path, size, b"", b""), "one character": write_repeated}


def write_folder(path, size):
    "Write two texts of half the size into a folder"
    path.mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        write_text(path / name, size // 2)


TEXTS["a folder of two texts"] = write_folder


def prepare(folder, text, tokenizer):
    "Prepare a text in a new process, and return what it needed"
    out = folder / "out"
    command = [sys.executable, "-c", CHILD, str(out), str(text), tokenizer]
    env = os.environ | dict(RAYON_NUM_THREADS=os.environ["OMP_NUM_THREADS"])
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=True)
    for path in [*out.glob("*.bin"), *folder.glob("data/**/*.bin")]:
        path.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def main():
    args = parse_options(
        __doc__, mb=(1000, "megabytes of each text"), only=("", "part of the names of the texts to measure")
    )
    size = (1 if args.quick else args.mb) * 10**6
    rows, texts = [], {name: write for name, write in TEXTS.items() if args.only in name}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in texts.items():
            text = Path(folder) / ("folder" if write is write_folder else "text.txt")
            for tokenizer in ("bytes", "bpe:2048"):
                found = []
                for n in (size // 2, size):
                    write(text, n)
                    found.append(prepare(Path(folder), text, tokenizer))
                half, whole = found
                growth = whole["cpu"] / half["cpu"]
                rows.append(dict(text=name, tokenizer=tokenizer, rejected=bool(whole["error"])))
                rows[-1] |= {"wall s": whole["wall"], "CPU of half x": growth, "peak MB": whole["peak"] / 1000}
                print(name, tokenizer, whole["error"][:200], flush=True)
    most = max(row["peak MB"] for row in rows)
    linear = max(row["CPU of half x"] for row in rows)
    rejected = [row for row in rows if row["rejected"]]
    seconds = max((row["wall s"] for row in rejected), default=0)
    goals = [
        ("peak memory under 600 MB", f"{most:.0f} MB", most < 600),
        ("twice the text takes at most 2.3 times the time", f"{linear:.2f}", linear <= 2.3),
        (
            "only one character is rejected, by BPE",
            f"{len(rejected)}",
            [r["text"] for r in rejected] == [name for name in texts if name == "one character"],
        ),
        ("a rejection takes at most a second", f"{seconds:.2f} s", seconds <= 1),
    ]
    report(args, rows, goals)


if __name__ == "__main__":
    main()
