"""Texts, tokens, tokenizers and settings from other people: rejected with an error that names the file, in little memory."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import pickle
import shutil
import threading
import zipfile
from dataclasses import asdict

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from foreign import (
    NIGHT,
    call,
    fuzz,
    mutate_archive,
    mutate_bytes,
    mutate_json,
    npy_bytes,
    random_tensor,
    saved,
    yaml_text,
)

from lmnotes.core import CheckpointError, DataError, TokenizerError, read_json
from lmnotes.data import corpus, datasets, folders
from lmnotes.data.datasets import download, get_corpus
from lmnotes.data.prepare import tokenize_splits
from lmnotes.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from lmnotes.data.tokenizer_files import load_nanogpt_meta, load_tokenizer
from lmnotes.data.tokens import TokenWriter, open_tokens
from lmnotes.inspect.comparison import comparison_table
from lmnotes.recipes.fresh_or_resume_config import config_from_record, load_config_from_checkpoint
from lmnotes.recipes.nanothink import recipe_params
from lmnotes.recipes.text_only_config import load_text_config, read_settings
from lmnotes.runs.compare import CompareConfig, Comparison, read_peak_memory
from lmnotes.runs.config import RunConfig

# Settings in YAML


def aliases(n):
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, n))


YAML = {
    "maps of aliases": (aliases(40), "repeats another value"),
    "lists of aliases": (
        "a: &a [1]\n" + "".join(f"{c}: &{c} [{f'*{d}, ' * 9}]\n" for c, d in zip("bcdefghij", "abcdefghi")),
        "repeats another",
    ),
    "a map in itself": ("a: &a {b: *a}\n", "repeats another value"),
    "nested lists": ("a: " + "[" * 100_000, "nested more than"),
    "nested maps": ("".join(" " * i + "a:\n" for i in range(300)), "nested more than"),
    "a long number": ("training:\n  max_steps: " + "9" * 10_000, "a value has over 1000 characters"),
    "a number of base 60": ("a: " + "1:" * 100_000 + "1", "over 1000 characters"),
    "a large file": ("# comment\n" * 100_000, "expected at most"),
    "an empty number": ("training:\n  max_steps: !!int ''", "cannot be read"),
    "an unknown truth value": ("training:\n  compile: !!bool x", "cannot be read"),
    "code": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name, tmp_path):
    text, message = YAML[name]
    (tmp_path / "config.yaml").write_text(text)
    kind, found = call(read_settings, str(tmp_path / "config.yaml"))
    assert kind == "ValueError" and "config.yaml" in found and message in found, (kind, found[:300])
    assert len(found) < 1000 + len(str(tmp_path))


# Tokens


def write_tensor(path, tensor):
    torch.save(tensor, path)


TENSORS = {
    "one value as 10**12": lambda: torch.tensor([7]).expand(10**12),
    "no values": lambda: torch.zeros(10, dtype=torch.int64, device="meta"),
    "negative": lambda: torch.zeros(4, dtype=torch.complex64).conj().imag,
    "nested": lambda: torch.nested.nested_tensor([torch.arange(3), torch.arange(2)]),
    "sparse": lambda: torch.arange(4).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
    "a list in itself": lambda: (lambda x: x.append(x) or x)([]),
    "a dict": lambda: {"ids": torch.arange(3)},
    "floats": lambda: torch.zeros(3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_ids(name, tmp_path):
    write_tensor(tmp_path / "ids.pt", TENSORS[name]())
    kind, found = call(open_tokens, tmp_path / "ids.pt")
    assert kind == "DataError" and "ids.pt" in found, (kind, found)
    assert "weights_only" not in found


def test_a_large_file_of_ids_is_mapped(tmp_path):
    write_tensor(tmp_path / "ids.pt", torch.zeros(400 << 20, dtype=torch.uint8))
    write_tensor(tmp_path / "view.pt", torch.arange(100)[10:50])
    kind, found = call(open_tokens, tmp_path / "ids.pt", megabytes=600)  # The mapped pages count
    assert kind == "" and "419,430,400 tokens" in found
    assert open_tokens(tmp_path / "view.pt").ids.tolist() == list(range(10, 50))


def write_tokens(folder, name="a.bin"):
    with TokenWriter(folder / name, 256, "f" * 64, dict(corpus="x")) as out:
        out.add(np.arange(100) % 250, "one", 100)
        out.add(np.arange(50), "two", 50)
    return folder / name


METADATA = {
    "an unknown dtype": dict(dtype="float32"),
    "no vocabulary": dict(vocab_size=0),
    "a gap": dict(domains={"one": [0, 90], "two": [100, 150]}),
    "a repeated domain": dict(domains={"one": [0, 100], "two": [50, 150]}),
    "text as a range": dict(domains={"one": "ab"}),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_tokens(name, tmp_path):
    path = write_tokens(tmp_path)
    file = tmp_path / "a.bin.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | METADATA[name]))
    with pytest.raises(DataError, match=r"a\.bin\.json: "):
        open_tokens(path)


@pytest.mark.parametrize("name", ["train.bin", "train.bin.json", "train.docs.npy", ".x.tmp"])
def test_a_folder_in_place_of_a_token_file(name, tmp_path):
    (tmp_path / "a.txt").write_text("The sea was calm.\n" * 50)
    (tmp_path / "out" / name).mkdir(parents=True)
    text = get_corpus(tmp_path / "a.txt")
    if name == ".x.tmp":  # Left by an interrupted process
        assert len(tokenize_splits(text, ByteTokenizer(), tmp_path / "out")["train"])
    else:
        with pytest.raises(DataError, match=f"{name}: is a folder"):
            tokenize_splits(text, ByteTokenizer(), tmp_path / "out")


# Texts


@pytest.mark.parametrize(
    "line",
    [
        '"hello"',
        '"text"',
        "1",
        "null",
        '[{"text": "a"}]',
        '{"text": "a", "text": "b"}',
        '{"text": "a", "n": 1, "n": 1}',
    ],
)
def test_json_lines_that_are_no_objects_with_one_text(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        list(get_corpus(tmp_path / "a.jsonl").documents())


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        kind, found = call(read_all, str(tmp_path / name))
        assert kind == "DataError" and "is a device or a pipe" in found, (kind, found)
        kind, found = call(read_all, f"bytes:{tmp_path / name}")
        assert kind == "DataError" and "no file: tried" in found, (kind, found)


def test_pipes_in_folders_and_beside_tokenizers(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    os.mkfifo(tmp_path / "texts" / "b.txt")
    assert call(read_all, str(tmp_path / "texts"))[0] == ""  # Only files are texts of a folder
    BPETokenizer.train(["a text of a few words"], 300).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").unlink()
    os.mkfifo(tmp_path / "merges.txt")
    kind, found = call(load_tokenizer, tmp_path)
    assert kind == "TokenizerError" and "merges.txt: is a device or a pipe" in found


def read_all(data):
    return sum(len(d.text) for d in get_corpus(data).documents())


def test_gigabytes_without_a_line_end(tmp_path):
    with open(tmp_path / "long.txt", "wb") as f:
        f.write(b"a first line\n")
        f.truncate(10 << 30)  # A sparse file, which needs no space on the disk
    kind, found = call(read_all, str(tmp_path / "long.txt"), megabytes=800)
    assert kind == "DataError" and "long.txt:2: " in found and "zero bytes" in found, (kind, found)


def test_one_long_line_is_a_legal_text(tmp_path, monkeypatch):
    line = "the cat sat on the mat " * 50_000
    (tmp_path / "line.txt").write_text(line)
    assert "".join(d.text for d in get_corpus(tmp_path / "line.txt").documents()) == line
    monkeypatch.setattr(corpus, "MAX_WORD_CHARS", 1000)
    for text in ("the cat\n" * 10_000, "\n\nthe cat\n\n\nsat\n" * 500, "x" * 1000, "the cat\n" * 100 + "x" * 5000):
        chunks = list(corpus.read_chunks(io.BytesIO(text.encode()), "line.txt", size=100))
        assert "".join(chunks) == text and max(map(len, chunks)) <= 1100
    with pytest.raises(DataError, match=r"line\.txt:2: 1,090 zero bytes before byte 1100, as in a file"):
        list(corpus.read_chunks(io.BytesIO(b"the cat\n" + b"x \0" + b"\0" * 2000), "line.txt", size=100))


# Downloads


class Endless(http.server.BaseHTTPRequestHandler):
    "Sends the file of the server, and then bytes without end if `self.server.endless`"

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.server.requests += 1
        try:
            self.wfile.write(self.server.data)
            while self.server.endless:
                self.wfile.write(bytes(1 << 16))
        except OSError:
            self.server.ended.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.data, server.endless, server.requests, server.ended = (
        b"The sea was calm.\n" * 1000,
        False,
        0,
        threading.Event(),
    )
    server.url = f"http://127.0.0.1:{server.server_address[1]}/input.txt"
    server.sha256 = hashlib.sha256(server.data).hexdigest()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.endless = False
    server.shutdown()
    server.server_close()


def test_every_name_has_a_size_and_a_hash():
    for items in datasets.DOWNLOADS.values():
        for item in items:
            assert item.size > 0 and len(bytes.fromhex(item.sha256)) == 32


def test_an_endless_response_is_cut_off(server, tmp_path):
    server.endless = True
    with pytest.raises(DataError, match="the server sent more than 18,000 bytes"):
        download(server.url, tmp_path / "input.txt", len(server.data), server.sha256)
    assert server.ended.wait(60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_checked(server, tmp_path, monkeypatch):
    item = datasets.DOWNLOADS["tinyshakespeare"][0]._replace(
        url=server.url, size=len(server.data), sha256=server.sha256
    )
    monkeypatch.setitem(datasets.DOWNLOADS, "tinyshakespeare", [item])
    path = tmp_path / "tinyshakespeare" / "input.txt"
    get_corpus("tinyshakespeare", tmp_path)
    assert path.read_bytes() == server.data and server.requests == 1
    hashed = []
    monkeypatch.setattr(
        datasets, "sha256_file", lambda path: hashed.append(path) or hashlib.sha256(path.read_bytes()).hexdigest()
    )
    for _ in range(3):
        get_corpus("tinyshakespeare", tmp_path)
    assert hashed == [] and server.requests == 1  # Once for each path, size and time of change
    path.write_bytes(server.data.replace(b"calm", b"warm"))
    with pytest.raises(DataError, match=r"input\.txt has SHA-256 .*Delete it to download it again"):
        get_corpus("tinyshakespeare", tmp_path)


OFFSETS = {"backwards": [0, 3, 2, 11], "huge": [0, 3, 2**31 - 1, 2**31 - 1], "outside": [0, 40, 60, 100]}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_outside_an_arrow_file(name, tmp_path):
    "A table whose texts would lie outside the file is rejected before memory is read"
    table = pyarrow.table({"text": ["abc", "defg", "hijk"]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as w:
        w.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    good = np.array([0, 3, 7, 11], "<i4").tobytes()
    assert data.count(good) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(good, np.array(OFFSETS[name], "<i4").tobytes()))
    kind, found = call(read_all, tmp_path / "a.arrow")
    assert kind == "DataError" and "a.arrow" in found, (kind, found)


def test_a_zip_of_many_large_files(tmp_path, monkeypatch):
    "An archive is limited by the size of all of its files together, and a name comes once"
    monkeypatch.setattr(folders, "FREE_BYTES", 1 << 16)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(f"{i}.txt", b"The sea.\n" * (1 << 16))
    with pytest.raises(DataError, match=r"bomb.zip: expands more than 200 times, to 11,796,480 bytes. Unpack it"):
        get_corpus(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "one.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("noise.bin", np.random.default_rng(0).bytes(1 << 18))
        archive.writestr("bomb.txt", b"The sea.\n" * (1 << 18))
        archive.writestr("a.txt", "The sea.\n")
    text = get_corpus(tmp_path / "one.zip")
    assert [d.text for d in text.documents()] == ["The sea.\n"]
    assert [f.reason for f in text.skipped if "bomb" in f.name] == ["expands more than 200 times"]
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a.txt", "The sea.\n")
        archive.writestr("a.txt", "The tide.\n")
    with pytest.raises(DataError, match=r"twice.zip: holds 2 files with the name 'a.txt'"):
        get_corpus(tmp_path / "twice.zip")


# Mutated files


def case_pt_tokens(rng, folder):
    obj = rng.choice(
        [random_tensor(rng), torch.arange(40), torch.arange(40), {"a": random_tensor(rng)}, [[random_tensor(rng)]]]
    )
    data = saved(obj)
    (folder / "ids.pt").write_bytes(mutate_archive(rng, data) if rng.random() < 0.8 else data)
    return "ids.pt", lambda: open_tokens(folder / "ids.pt")


def case_npy(rng, folder):
    np.save(folder / "ids.npy", np.arange(40, dtype=np.uint16))
    data = (folder / "ids.npy").read_bytes()
    (folder / "ids.npy").write_bytes(npy_bytes(rng) if rng.random() < 0.5 else mutate_bytes(rng, data))
    return "ids.npy", lambda: open_tokens(folder / "ids.npy")


def case_bin(rng, folder):
    if not (folder / "good").exists():
        write_tokens(folder / "good")
    for file in (folder / "good").iterdir():
        shutil.copy(file, folder)
    file = folder / rng.choice(["a.bin", "a.bin.json", "a.bin.json", "a.docs.npy"])
    if file.suffix == ".json" and rng.random() < 0.8:
        file.write_text(mutate_json(rng, json.loads(file.read_text())))
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return "a.", lambda: open_tokens(folder / "a.bin")


def case_jsonl(rng, folder):
    lines = [json.dumps({"text": f"line {i}", "meta": {"id": i, "tags": ["a", "b"]}}) for i in range(5)]
    at = rng.randrange(5)
    lines[at] = mutate_json(rng, json.loads(lines[at]))
    data = "\n".join(lines).encode()
    (folder / "a.jsonl").write_bytes(data if rng.random() < 0.7 else mutate_bytes(rng, data))
    return "a.jsonl", lambda: read_all(folder / "a.jsonl")


def case_txt(rng, folder):
    (folder / "a.txt").write_bytes(mutate_bytes(rng, "The sea was calm.\nNobody — spoke.\n\n".encode() * 5))
    return "a.txt", lambda: read_all(folder / "a.txt")


GUIDE = """
training:
  max_steps: 10
  batch_size: 4
  compile: false
  optimizer:
    lr: 3e-4
    betas: [0.9, 0.95]
model:
  transformer:
    hidden_dim: 64
    num_attention_heads: 4
  encoders:
    internal_voice:
      vocab_size: 300
defaults:
  save_dir: checkpoints/x
"""


def case_yaml(rng, folder):
    text = yaml_text(rng, GUIDE)
    data = text.encode() if rng.random() < 0.7 else mutate_bytes(rng, text.encode())
    (folder / "config.yaml").write_bytes(data)
    return "config.yaml", lambda: load_text_config(str(folder / "config.yaml"))


def case_tokenizer(rng, folder):
    for file in folder.glob("*.*"):
        file.unlink()
    if not (folder / "bpe").exists():
        BPETokenizer.train(["the cat sat on the mat and the cat ran"] * 3, 270).save(folder / "bpe")
        CharTokenizer("abc é").save(folder / "chars")
        ByteTokenizer().save(folder / "bytes")
    for file in (folder / rng.choice(["bpe", "bpe", "chars", "bytes"])).iterdir():
        shutil.copy(file, folder)
    if (folder / "vocab.json").exists() and rng.random() < 0.4:
        (folder / "tokenizer.json").unlink()
    file = rng.choice(sorted(folder.glob("*.*")))
    if file.suffix == ".json" and rng.random() < 0.7:
        file.write_text(mutate_json(rng, json.loads(file.read_text())))
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return ".json" if file.suffix == ".json" else "merges.txt", lambda: use_tokenizer(load_tokenizer(folder))


def case_tisslm(rng, folder):
    tokens = {i: [i] for i in range(256)} | {256: [*b"th"], 257: [*b"the"], 258: [*b"at"]}
    vocab, merges = folder / "x_vocab.json", folder / "x_merges.txt"
    vocab.write_text(json.dumps(tokens))
    merges.write_text("116 104 256\n256 101 257\n97 116 258\n")
    if (action := rng.random()) < 0.5:
        vocab.write_text(mutate_json(rng, json.loads(vocab.read_text())))
    else:
        file = vocab if action < 0.7 else merges
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return "x_", lambda: use_tokenizer(load_tokenizer(vocab))


RECIPE = dict(lr=3e-4, max_epochs=2, batch_size=4, data="corpus", use_amp=True, arch="gpt", resume=False)
RECORD = dict(model=dict(d_model=16, n_layers=1, n_heads=2, dropout=0.0), step=5)


def case_recipe(rng, folder):
    def read():
        try:
            recipe_params(folder, True, RECIPE | dict(__annotations__={n: type(v) for n, v in RECIPE.items()}))
        except CheckpointError as e:
            if "this run has " not in str(e):  # A valid value that is not the given one
                raise

    (folder / "recipe.json").write_text(mutate_json(rng, dict(RECIPE)))
    return "recipe.json", read


def case_env(rng, folder):
    config = asdict(RunConfig(arch="scratch_gpt", steps=10, ctx_len=8, batch_size=2, lr=1e-3, tokenizer="chars"))
    saved = asdict(config_from_record(RECORD | dict(config=config)))
    (folder / "env.json").write_text(mutate_json(rng, saved))
    record = RECORD | dict(config=config)
    return "env.json", lambda: load_config_from_checkpoint(record | dict(env=read_json(folder / "env.json")), {})


ROWS = [dict(text=f'line {i} of, "text" é', n=i) for i in range(6)]


def table_bytes(kind):
    "Return a table of texts in a format of pyarrow"
    table, out = pyarrow.table({name: [row[name] for row in ROWS] for name in ("text", "n")}), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, out)
        return out.getvalue()
    with (
        pyarrow.ipc.new_stream(out, table.schema) if kind == "stream" else pyarrow.ipc.new_file(out, table.schema) as w
    ):
        w.write_table(table)
    return out.getvalue()


def zip_bytes():
    "Return a zip archive of two texts"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", LINES)
        archive.writestr("b/c.txt", "The sea was calm.\n" * 20)
    return out.getvalue()


def shard_bytes():
    "Return a token shard of llm.c"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 40
    return header.tobytes() + np.arange(40, dtype="<u2").tobytes()


def index_bytes():
    "Return an index of Megatron for two documents with 60 ids"
    numbers = (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    arrays = (
        np.array([40, 20], "<i4").tobytes() + np.array([0, 80], "<i8").tobytes() + np.array([0, 1, 2], "<i8").tobytes()
    )
    return b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8]) + numbers + arrays


LINES = "\n".join(map(json.dumps, ROWS)).encode()
TABLE = "".join(f'"line {i}, é",{i}\n' for i in range(6))
TEXTS = {  # Each a small text in a format that holds texts
    "a.csv": lambda: f"text,n\n{TABLE}".encode(),
    "a.tsv": lambda: f"text\tn\n{TABLE}".replace('",', '"\t').encode(),
    "a.json": lambda: json.dumps(ROWS).encode(),
    "a.jsonl.gz": lambda: gzip.compress(LINES),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.jsonl.xz": lambda: lzma.compress(LINES),
    "a.jsonl.zst": lambda: zstandard.compress(LINES),
    "a.zip": zip_bytes,
    "a.parquet": lambda: table_bytes("parquet"),
    "a.arrow": lambda: table_bytes("file"),
    "b.arrow": lambda: table_bytes("stream"),
    "utf16.txt": lambda: ("The sea was calm, é.\n" * 5).encode("utf-16"),
}


class TextCase:
    "The case of a format that holds texts"

    def __init__(self, name):
        self.name, self.__name__, self.data = name, f"case_{name}", TEXTS[name]()

    def __call__(self, rng, folder):
        mutate = mutate_archive if self.name == "a.zip" else mutate_bytes
        (folder / self.name).write_bytes(mutate(rng, self.data))
        return self.name, lambda: read_all(folder / self.name)


def case_saved_dataset(rng, folder):
    "The folder of `save_to_disk` of the library datasets"
    state = dict(_data_files=[dict(filename="data-00000-of-00001.arrow")], _split=None, _fingerprint="a")
    (folder / "saved").mkdir(exist_ok=True)
    (folder / "saved/data-00000-of-00001.arrow").write_bytes(table_bytes("stream"))
    (folder / "saved/dataset_info.json").write_text("{}")
    (folder / "saved/state.json").write_text(mutate_json(rng, state))
    return "saved", lambda: read_all(folder / "saved")


def case_shard(rng, folder):
    (folder / "shard.bin").write_bytes(mutate_bytes(rng, shard_bytes()))
    return "shard.bin", lambda: open_tokens(folder / "shard.bin")


def case_megatron(rng, folder):
    (folder / "ids.bin").write_bytes(np.arange(60, dtype="<u2").tobytes())
    (folder / "ids.idx").write_bytes(mutate_bytes(rng, index_bytes()))
    return "ids.", lambda: open_tokens(folder / "ids.bin")


def case_nanogpt(rng, folder):
    chars = "abc é\n"
    meta = dict(vocab_size=6, itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
    (folder / "meta.pkl").write_bytes(mutate_bytes(rng, pickle.dumps(meta)))
    return "meta.pkl", lambda: use_tokenizer(load_nanogpt_meta(folder / "meta.pkl"))


def case_comparison(rng, folder):
    costs = dict(n_params=10, flops=1e6, pointwise=10.0, seconds=0.1, bytes_per_s=1e3, bytes_per_step=64.0)
    known = dict(cfg=asdict(CompareConfig(archs="gpt")), cost=dict(gpt=costs), steps=dict(gpt=5))
    (folder / "compare.json").write_text(mutate_json(rng, known))
    (folder / "gpt-0").mkdir(exist_ok=True)
    (folder / "gpt-0/memory.json").write_text(mutate_json(rng, dict(bytes=5)))

    def read():
        comparison_table(Comparison(str(folder)))
        read_peak_memory(folder / "gpt-0")

    return ".json", read


def use_tokenizer(tokenizer):
    ids = tokenizer.encode("the cat é\n")
    return tokenizer.decode(ids), tokenizer.fingerprint


ERRORS = {case_yaml: (ValueError,), case_env: (ValueError,), case_recipe: (CheckpointError,)}
ERRORS |= dict.fromkeys([case_tokenizer, case_tisslm, case_nanogpt], (TokenizerError,))
ERRORS |= {case_comparison: (CheckpointError,)}
CASES = [case_pt_tokens, case_npy, case_bin, case_jsonl, case_txt, case_yaml, case_tokenizer, case_tisslm]
CASES += [case_recipe, case_env, case_saved_dataset, case_shard, case_megatron, case_nanogpt, case_comparison]
CASES += map(TextCase, TEXTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__[5:])
def test_mutated_files(case, tmp_path):
    "Each of 100 mutated files of each format, and of those that failed in an earlier night, loads or raises an error that names it"
    fuzz(case, tmp_path, 100, seed=0, allowed=ERRORS.get(case, (DataError,)))


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__[5:])
def test_ten_thousand_mutated_files(case, tmp_path):
    "The same for ten thousand mutated files of each format, with another seed each night"
    fuzz(case, tmp_path, 10_000, seed=NIGHT, allowed=ERRORS.get(case, (DataError,)))
