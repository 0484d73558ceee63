"""Files from other people: mutations of every format that the library reads, and limits for the process that reads them."""

import io
import json
import os
import random
import resource
import struct
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from helpers import DEADLINE, FORK, fork_process
from safetensors.torch import save as safetensors_bytes

from lmnotes.core import CheckpointError, DataError, TokenizerError
from lmnotes.runs.run import peak_memory

OWN = DataError, TokenizerError, CheckpointError
SPARE = 1 << 31  # Bytes of address space that a child process may add


def _work(connection, function, args):
    "Call a function in a child process with limits, and send (type of the exception, message or result)"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE,) * 2)
    before = peak_memory("cpu")
    try:
        kind, text = "", str(function(*args))
    except BaseException as e:
        kind, text = type(e).__name__, str(e)
    connection.send((kind, text, peak_memory("cpu") - before))


def call(function, *args, megabytes=300):
    "Return (type of the exception or '', message or result) of a call in a child process, whose memory must stay small"
    ours, theirs = FORK.Pipe()
    process = fork_process(_work, theirs, function, args)
    theirs.close()
    try:
        assert ours.poll(DEADLINE), f"{function.__name__}{args} does not end"
        kind, text, grown = ours.recv()
        process.join(DEADLINE)
    finally:
        process.kill()
    assert grown < megabytes << 20, f"{function.__name__}{args} needs {grown >> 20} MiB"
    return kind, text


def random_value(rng):
    "Return a value that a JSON file can hold and that hardly any field expects"
    deep = []
    for _ in range(rng.choice([2, 90, 400])):
        deep = [deep]
    numbers = [0, 1, -1, 255, 2**31, 2**63, -(2**63), 10**7, 10**12, 10**30, 0.5, 1e308, float("nan"), float("inf")]
    texts = ["", "a", "NaN", "../up", "/dev/zero", "x" * 5000, "\0", "\ud800", "é", "<|endoftext|>", "torch.float32"]
    others = [None, True, False, [], {}, [None] * 3, {"a": 1}, [1, 2], [[0, 1]], deep]
    return rng.choice([*numbers, *texts, *others])


def mutate_json(rng, obj):
    "Return JSON text of an object with up to three changed, removed, added or repeated values"
    for _ in range(rng.randint(1, 3)):
        nodes, stack = [], [obj]
        while stack:
            node = stack.pop()
            if isinstance(node, (dict, list)) and node:
                nodes.append(node)
                stack.extend(node.values() if isinstance(node, dict) else node[:20])
        if not nodes or rng.random() < 0.03:
            obj = random_value(rng)
            continue
        node = rng.choice(nodes)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        action = rng.random()
        if action < 0.6:
            node[key] = random_value(rng)
        elif action < 0.75:
            del node[key]
        elif action < 0.9 and isinstance(node, dict):
            node[str(random_value(rng))] = node.pop(key)
        elif isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] += rng.choice([-1, 1, 1000])
    text = json.dumps(obj)
    if rng.random() < 0.05 and "{" in text:
        at = text.index("{") + 1
        text = text[:at] + '"text": 1, "arch": "gpt", "arch": "gpt", "text": 2, ' + text[at:]
    return text


def mutate_bytes(rng, data):
    "Return bytes with up to four changes: bits, numbers, pieces removed, repeated or cut off"
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(6)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            number = rng.choice([0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            data[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)[: rng.choice([1, 2, 4, 8])]
        elif action == 2:
            del data[at : at + rng.randint(1, 40)]
        elif action == 3:
            data[at:at] = data[at : at + 30] * rng.randint(1, 3)
        elif action == 4:
            del data[at:]
        else:
            data[at:at] = rng.choice([b"\0" * 20, b"\xff", b"\n", b'"', b"{", b"[" * 50, b"*a ", b"\xef\xbb\xbf"])
    return bytes(data)


def random_tensor(rng):
    "Return a tensor, most often one of a kind that a file of weights or ids should not hold"
    t = torch.arange(rng.choice([0, 1, 6, 40]))
    kinds = [
        lambda: t,
        lambda: t.float(),
        lambda: t.to(rng.choice([torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool])),
        lambda: t.to(rng.choice([torch.float8_e4m3fn, torch.bfloat16, torch.complex64])),
        lambda: t.float().to_sparse(),
        lambda: t.float().reshape(1, -1).to_sparse_csr(),
        lambda: t.to("meta"),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: t.to(torch.complex64).conj(),
        lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
        lambda: t[:1].expand(10**12) if len(t) else t,
        lambda: t.as_strided((len(t), 2), (1, 0)),
        lambda: t.float() * float("nan"),
        lambda: t.view(-1, 2).t() if len(t) % 2 == 0 else t,
        lambda: torch.tensor(7),
        lambda: torch.nn.Parameter(t.float()),
        lambda: torch.nested.nested_tensor([t.float(), t.float()]),
    ]
    return rng.choice(kinds)()


def mutate_archive(rng, data):
    "Return a zip archive with one member changed, removed, renamed, repeated or compressed, or changed bytes"
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as changed:
        names = archive.namelist()
        chosen, action = rng.choice(names), rng.randrange(7)
        chosen = names[0] if action in (0, 1) else chosen  # data.pkl
        for name in names:
            content, kind = archive.read(name), zipfile.ZIP_STORED
            if name == chosen:
                if action == 0:
                    content = mutate_bytes(rng, content)
                elif action == 1:
                    content = mutate_pickle(rng, content)
                elif action == 2:
                    continue
                elif action == 3:
                    kind, content = zipfile.ZIP_DEFLATED, content + bytes(rng.choice([0, 10**7]))
                elif action == 4:
                    content = content[: len(content) // 2] if rng.random() < 0.5 else content * 3
                elif action == 5:
                    name = rng.choice(
                        ["x/data.pkl", "archive/data/9", "../../evil", "data.pkl", "archive/constants.pkl"]
                    )
            changed.writestr(name, content, kind)
    return out.getvalue()


def mutate_pickle(rng, data):
    "Return a pickle with one number, name or operation replaced by another valid one"
    choice = rng.randrange(4)
    if choice == 0:
        names = [b"torch\nFloatStorage\n", b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n"]
        others = [b"os\nsystem\n", b"builtins\nbytearray\n", b"torch\nTensor\n", b"torch\nQInt8Storage\n"]
        others += [b"torch._utils\n_rebuild_sparse_tensor\n", b"torch\nSize\n", b"builtins\nset\n", b"torch\nint64\n"]
        return data.replace(rng.choice(names), rng.choice([*names, *others]), rng.choice([1, -1]))
    if choice == 1:
        places = [i for i, byte in enumerate(data) if byte in b"KJM"]
        at = rng.choice(places or [0])
        width = {b"K": 1, b"M": 2, b"J": 4}.get(data[at : at + 1], 1)
        return data[:at] + b"J" + struct.pack("<i", rng.choice([0, -1, 10**9, 2**31 - 1])) + data[at + 1 + width :]
    if choice == 2:
        at = rng.randrange(len(data))
        return (
            data[:at]
            + rng.choice([b"0", b"N", b"]", b"}", b")", b"(", b"t", b"R", b"\x85", b"e", b"s", b"."])
            + data[at:]
        )
    lists = b"]q\0" + b"".join(
        b"](" + b"h" + bytes([i, 104]) * 9 + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(20)
    )
    return b"\x80\x02" + rng.choice([lists, b"]q\0h\0a", b"]" * 5000 + b"a" * 4999]) + b"."


def saved(obj):
    "Return the bytes of `torch.save`"
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def mutate_safetensors(rng, data):
    "Return a safetensors file with changed values or text in its header, or changed bytes"
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    size = struct.unpack("<Q", data[:8])[0]
    header = mutate_json(rng, json.loads(data[8 : 8 + size])).encode()
    return struct.pack("<Q", rng.choice([len(header)] * 9 + [2**40])) + header + data[8 + size :]


def random_safetensors(rng, tensors):
    "Return a safetensors file of tensors of which one has another dtype, shape, name or value"
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    t = tensors[name]
    changes = [t.long(), t.bool(), t * float("nan"), t[:1], t.to(torch.float16), t.double(), t.to(torch.complex64)]
    changes += [t.to(torch.float8_e5m2), t * float("inf"), t.reshape(-1)]
    tensors[rng.choice([name, name, name, f"{name}x"])] = rng.choice(changes).contiguous().clone()
    return safetensors_bytes(tensors)


def npy_bytes(rng):
    "Return a NumPy file whose header declares an unusual shape, order or dtype"
    descr = rng.choice(["<u2", "<i8", ">u4", "<f4", "|O", "|V8", "<m8", "|b1", "<c8", "|S3", "[('a','<u2')]", "<u99"])
    shape = rng.choice(
        ["(4,)", "(-4,)", "(10**12,)", "(2,2)", "()", "(1000000000000,)", "(4,", "('a',)", "(4.0,)", "[4]"]
    )
    header = f"{{'descr': '{descr}', 'fortran_order': {rng.choice(['False', 'True', '1'])}, 'shape': {shape}, }}"
    header = rng.choice([header, header, header + " " * 20_000, "(" * 500, "{}", "{'descr': __import__('os')}"])
    data = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(data) & 0xFFFF) + data + np.arange(4, dtype="<u2").tobytes()


def yaml_text(rng, text):
    "Return YAML text with a value, a name, the indentation or a line replaced, or with aliases"
    lines = text.split("\n")
    values = [
        "&a [1, 2]",
        "*a",
        "!!int ''",
        "!!python/object/apply:os.system [true]",
        "[[[[[",
        "{a: {b: 1}}",
        "!!set {a}",
    ]
    values += [
        "!!binary x",
        "!!timestamp x",
        "!!bool x",
        "!!float ''",
        "1:2:3:4:5",
        "9" * 5000,
        "-.inf",
        ".nan",
        "0x10",
        "~",
    ]
    values += [
        "'" + "x" * 2000 + "'",
        "2020-13-45",
        "<<: *a",
        "? [a]",
        "|\n  a\n b",
        "\t1",
        "!!omap [a]",
        "!!pairs [[a]]",
        "@",
    ]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        name, colon, _ = lines[at].partition(":")
        action = rng.randrange(5)
        if action < 3 and colon:
            lines[at] = f"{name}: {rng.choice(values)}"
        elif action == 3:
            lines[at] = rng.choice(["  ", "\t", " ", "- ", "? ", ""]) + lines[at].lstrip(rng.choice(" x"))
        else:
            lines[at:at] = rng.choice(
                [[lines[at]], ["a0: &a0 {x: 1}", "a1: &a1 {p: *a0, q: *a0}"], ["---"], ["x: " + "[" * 999]]
            )
    return "\n".join(lines)


FAILURES = Path(__file__).with_name(
    "fuzz_failures.json"
)  # {case: [[seed, number]]}, which every run of the tests repeats
NIGHT = int(os.environ.get("FUZZ_SEED") or date.today().toordinal())  # Seed of the long tests


def try_cases(case, folder, numbers, allowed=OWN):
    "Read mutated files. Return JSON lines [seed, number, problem] of those not read and not rejected by an error with the name"
    torch.set_num_threads(1)
    failures = []
    os.chdir(folder)
    for seed, i in numbers:
        Path("current").write_text(json.dumps([seed, i]))
        rng = random.Random(f"{case.__name__} {seed} {i}")
        torch.manual_seed(i)
        path, read = case(rng, Path("."))
        try:
            read()
        except allowed as e:
            if Path(path).name not in str(e) or "weights_only" in str(e):
                failures.append([seed, i, f"the message lacks {path}: {str(e)[:200]}"])
        except BaseException as e:
            failures.append([seed, i, f"{type(e).__name__}: {str(e)[:200]}"])
    return "\n".join(map(json.dumps, failures[:20]))


def failures_of(case, folder, numbers, allowed):
    "Return ([[seed, number]] of the files that failed, message) of mutated files that a child process reads with limits"
    try:
        kind, text = call(try_cases, case, folder, numbers, allowed, megabytes=600)
    except (AssertionError, EOFError) as e:  # It does not end, or needs too much memory
        kind, text = type(e).__name__, str(e)[:1000]
    if kind:
        last = json.loads((folder / "current").read_text())
        others = [pair for pair in numbers if pair != last] if "MiB" not in text else []
        found, more = failures_of(case, folder, others, allowed) if others else ([], "")
        return [last, *found], f"{kind}: {text}\n{more}"
    return [json.loads(line)[:2] for line in text.splitlines()], text


def fuzz(case, folder, count, seed, allowed=OWN):
    """Read mutated files, and those that failed in an earlier night

    Fail with the seed and the number of each wrong file, after adding them to `FAILURES`.
    """
    name, known = case.__name__, json.loads(FAILURES.read_text())
    numbers, failed, message = [*known.get(name, []), *([seed, i] for i in range(count))], [], ""
    for start in range(0, len(numbers), 250):  # So few that only a file that does not end reaches the deadline
        found, text = failures_of(case, folder, numbers[start : start + 250], allowed)
        failed, message = failed + found, message + text
    if new := [pair for pair in failed if pair not in known.get(name, [])]:
        known[name] = known.get(name, []) + new
        FAILURES.write_text(json.dumps(known, indent=1) + "\n")
    assert not failed, f"{name}: {failed[:20]} {message[:5000]}"
