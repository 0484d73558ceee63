"""Readers, tokenizers and token files, tested with damaged files, real data and a local HTTP server"""

import ast
import asyncio
import hashlib
import http.server
import io
import json
import random
import re
import threading
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lmnotes.core import DataError, TokenizerError, data_root
from lmnotes.data import datasets
from lmnotes.data.batches import DomainBalancedBatches
from lmnotes.data.corpus import read_chunks, read_jsonl, to_bytes, to_text
from lmnotes.data.datasets import _find_prose, get_corpus
from lmnotes.data.prepare import tokenize_splits
from lmnotes.data.splits import parts_of_split, split_documents
from lmnotes.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from lmnotes.data.tokenizer_files import get_tokenizer, load_tokenizer
from lmnotes.data.tokens import TokenWriter, open_tokens
from lmnotes.runs.config import RunConfig
from lmnotes.runs.data import data_place
from lmnotes.runs.run import run

TEXT = "One  two\n\n  three's café 中文 👩‍🚀\r\n" * 30


def mutate(data, rng):
    "Return `data` cut, or with bytes changed, removed or repeated"
    data = bytearray(data)
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] = rng.randrange(256)
    if kind == 2:
        del data[at : at + rng.randrange(1, 20)]
    if kind == 3:
        data[at:at] = data[at : at + rng.randrange(1, 20)]
    return bytes(data)


def values(obj, path=()):
    "Yield the paths of all values in a JSON object (only the first few of a long list or dict)"
    yield path
    items = obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else ()
    for key, value in list(items)[:6]:
        yield from values(value, (*path, key))


def replace(obj, path, value):
    "Return `obj` with the value at `path` replaced"
    obj = json.loads(json.dumps(obj))
    if not path:
        return value
    inside = obj
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return obj


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 300)


def test_mutated_jsonl_is_read_or_rejected_by_line():
    good = "".join(json.dumps(dict(text=f"line {i} é", id=i), ensure_ascii=False) + "\n" for i in range(5)).encode()
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        try:
            for _, text in read_jsonl(io.BytesIO(mutate(good, rng)), "x.jsonl"):
                text.encode()
        except DataError as e:
            refused += 1
            assert str(e).startswith("x.jsonl:"), e
            assert 1 <= int(str(e).split(":")[1]) <= 6, e
    assert refused > 100


def test_mutated_text_is_read_or_rejected_with_its_position():
    good = TEXT.encode()
    rng = random.Random(1)
    for _ in range(300):
        data = mutate(good, rng)
        try:
            text = "".join(read_chunks(io.BytesIO(data), "x.txt", size=64))
            assert text.encode() == data
        except DataError as e:
            with pytest.raises(UnicodeDecodeError) as wrong:
                data.decode()
            line = data.count(b"\n", 0, wrong.value.start) + 1
            assert str(e).startswith(f"x.txt:{line}: byte {wrong.value.start} "), e


def test_any_bytes_round_trip_at_any_chunk_size():
    rng = random.Random(2)
    for size in (1, 7, 100):
        data = bytes(rng.choice(b"\n a\xc3\xa9\xff\x00") for _ in range(500))
        assert to_bytes("".join(read_chunks(io.BytesIO(data), "x", strict=False, size=size))) == data


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_mutated_tokenizer_files_give_a_tokenizer_or_a_tokenizer_error(tmp_path, bpe, name):
    bpe.save(tmp_path)
    good = (tmp_path / name).read_bytes()
    path = tmp_path / ("tokenizer.json" if name == "tokenizer.json" else "vocab.json")
    rng = random.Random(3)
    refused = 0
    for _ in range(200):
        (tmp_path / name).write_bytes(mutate(good, rng))
        try:
            tok = load_tokenizer(path)
            assert tok.decode(tok.encode(TEXT)) == TEXT
        except TokenizerError as e:
            refused += 1
            assert str(tmp_path) in str(e)
    assert refused > 50


@pytest.mark.parametrize("kind", ["bpe", "chars", "bytes", "tisslm"])
def test_restructured_tokenizer_json_gives_a_tokenizer_or_a_tokenizer_error(tmp_path, bpe, kind):
    if kind == "tisslm":
        good, path = {str(i): [i] for i in range(256)} | {"256": [97, 98]}, tmp_path / "t_vocab.json"
        (tmp_path / "t_merges.txt").write_text("97 98 256\n")
        path.write_text(json.dumps(good))
    else:
        tok = dict(bpe=bpe, chars=CharTokenizer.train([TEXT]), bytes=ByteTokenizer())[kind]
        tok.save(tmp_path)
        path = tmp_path / "tokenizer.json"
        good = json.loads(path.read_bytes())
    load_tokenizer(path)
    for workdir in values(good):
        for value in (None, True, -1, 1.5, 10**12, "x", "Ġ Ġ", [], [[]], [1, 2], {}, {"a": 1}):
            path.write_text(json.dumps(replace(good, workdir, value)))
            try:
                tok = load_tokenizer(path)
                tok.encode(TEXT)
            except TokenizerError as e:
                assert str(tmp_path) in str(e), e


def test_saved_bpe_is_read_the_same_by_transformers(tmp_path, bpe):
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    bpe.save(tmp_path)
    for other in (
        GPT2Tokenizer.from_pretrained(str(tmp_path)),
        GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    ):
        assert other(TEXT)["input_ids"] == bpe.encode(TEXT).tolist()
        assert other.decode(bpe.encode(TEXT).tolist(), clean_up_tokenization_spaces=False) == TEXT


@pytest.mark.parametrize("suffix", ["bin", "bin.json", "docs.npy", "npy", "pt"])
def test_mutated_token_files_give_tokens_or_a_data_error(tmp_path, suffix, capsys):
    ids = np.arange(200) % 50
    with TokenWriter(tmp_path / "a.bin", 50) as out:
        out.add(ids[:120], "a", 120)
        out.add(ids[120:], "b", 80)
    np.save(tmp_path / "a.npy", ids)
    torch.save(torch.tensor(ids), tmp_path / "a.pt")
    damaged = tmp_path / f"a.{suffix}"
    opened = damaged if suffix in ("npy", "pt") else tmp_path / "a.bin"
    good = damaged.read_bytes()
    rng = random.Random(4)
    for _ in range(150):
        damaged.unlink()
        damaged.write_bytes(mutate(good, rng))
        try:
            tokens = open_tokens(opened, vocab_size=50, ctx_len=8)
            assert tokens.ids.ndim == 1 and 0 <= tokens.ids.min() <= tokens.ids.max() < 50
        except DataError as e:
            assert str(tmp_path) in str(e)


def test_tokens_never_run_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "b.pt")
    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt", "a.npy", "b.npy"):
        with pytest.raises(DataError, match=name):
            open_tokens(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_unsupported_arrays_are_rejected(tmp_path):
    for n, array in enumerate((torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bool))):
        torch.save(array, tmp_path / f"{n}.pt")
        with pytest.raises(DataError, match="integer"):
            open_tokens(tmp_path / f"{n}.pt")
    for n, array in enumerate((np.ones(3), np.ones(3, bool), np.int64(3), np.empty(0, int))):
        np.save(tmp_path / f"{n}.npy", array)
        with pytest.raises(DataError):
            open_tokens(tmp_path / f"{n}.npy")
    np.savez(tmp_path / "z.npz", a=np.ones(3))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(DataError, match="z.npy"):
        open_tokens(tmp_path / "z.npy")


def test_vocabularies_larger_than_uint16(tmp_path):
    with TokenWriter(tmp_path / "a.bin", 70_000) as out:
        out.add([0, 65_536, 69_999])
    assert open_tokens(tmp_path / "a.bin").ids.tolist() == [0, 65_536, 69_999]
    assert (tmp_path / "a.bin").stat().st_size == 12


SPECS = "bytes", "chars", "bpe:300"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", ["text", "folder", "jsonl", "domains"])
def test_every_tokenizer_with_every_layout(tmp_path, spec, layout):
    texts = [f"{i}: {TEXT}" for i in range(60)]
    data = tmp_path / "data"
    data.mkdir()
    if layout == "text":
        (data / "a.txt").write_text("".join(texts), newline="")
    if layout == "folder":
        for i, text in enumerate(texts):
            (data / f"{i:02}.txt").write_text(text, newline="")
    lines = [json.dumps(dict(text=text)) + "\n" for text in texts]
    if layout == "jsonl":
        (data / "a.jsonl").write_text("".join(lines))
    if layout == "domains":
        for domain in "xy":
            (data / domain).mkdir()
            (data / domain / "a.jsonl").write_text("".join(lines[:30] if domain == "x" else lines[30:]))
    corpus = get_corpus(data / "a.jsonl" if layout == "jsonl" else data)
    tok = get_tokenizer(spec, lambda: (d.text for d in split_documents(corpus)))
    made = tokenize_splits(corpus, tok, tmp_path / "out", verbose=False)
    assert list(made) == ["train", "val"]
    for part, tokens in made.items():
        end = "" if layout == "text" else "\0"
        expected = [d.text + end for d in split_documents(corpus, part=part)]
        assert tok.decode(tokens.ids) == "".join(expected)
        assert tokens.n_bytes == len("".join(expected).encode()) == tok.byte_lengths[tokens.ids].sum()
        if layout != "text":
            assert [tok.decode(ids) for ids in np.split(tokens.ids, tokens.doc_starts)[1:]] == expected
    assert set(made["train"].domains) == set(corpus.domains)


def test_hash_split_is_stable_and_keeps_copies_together(tmp_path):
    for domain in "ab":
        (tmp_path / domain).mkdir()
        lines = [json.dumps(dict(text=f"story {i}")) for i in range(300)]
        (tmp_path / domain / "x.jsonl").write_text("\n".join(lines))
    val = [d for d in split_documents(get_corpus(tmp_path), "hash", "val")]
    assert [d.text for d in val if d.domain == "a"] == [d.text for d in val if d.domain == "b"]
    assert 20 < len(val) < 120
    train = {d.text for d in split_documents(get_corpus(tmp_path, domains="b"), "hash", "train")}
    assert not train & {d.text for d in val}


def test_randperm42_equals_the_reference_split(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(dict(text=str(i))) for i in range(100)))
    corpus = get_corpus(tmp_path / "x.jsonl")
    order = torch.randperm(100, generator=torch.Generator().manual_seed(42)).tolist()
    assert [int(d.text) for d in split_documents(corpus, "randperm42", "train")] == sorted(order[:90])
    assert [int(d.text) for d in split_documents(corpus, "randperm42", "val")] == sorted(order[90:])


def test_prepare_again_after_the_text_was_edited_in_place(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    first = tokenize_splits(get_corpus(path), ByteTokenizer(), tmp_path / "out")
    path.write_text("abcdefghiX" * 10)
    second = tokenize_splits(get_corpus(path), ByteTokenizer(), tmp_path / "out")
    assert first["train"].fingerprint != second["train"].fingerprint
    assert "prepared before" not in capsys.readouterr().out
    expected = second["val"].ids.tolist()
    (tmp_path / "out" / "val.bin").write_bytes(b"ab")
    third = tokenize_splits(get_corpus(path), ByteTokenizer(), tmp_path / "out")
    assert third["val"].ids.tolist() == expected
    assert "Writing the file again" in capsys.readouterr().out


class Handler(http.server.BaseHTTPRequestHandler):
    "Server of one file that breaks off once in the middle, and continues from the requested byte"

    def do_GET(self):
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        body = self.server.data[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks or None])
        self.server.breaks = 0

    def log_message(self, *args):
        pass


def test_enwik8_from_a_server_that_breaks_off(tmp_path, monkeypatch):
    content = ("<page>café 中文\n" * 5000).encode()[:60_001]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("../evil", "outside")
        archive.writestr("enwik8", content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.breaks = buffer.getvalue(), 30_000
    threading.Thread(target=server.serve_forever, daemon=True).start()
    item = datasets.DOWNLOADS["enwik8"][0]._replace(
        url=f"http://127.0.0.1:{server.server_address[1]}/enwik8.zip",
        size=len(server.data),
        sha256=hashlib.sha256(server.data).hexdigest(),
    )
    monkeypatch.setitem(datasets.DOWNLOADS, "enwik8", [item])
    monkeypatch.setattr(datasets, "ENWIK8_SIZE", len(content))
    monkeypatch.setattr(datasets, "ENWIK8_SHA256", hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="30,000 of"):
        get_corpus("enwik8", tmp_path / "data")
    corpus = get_corpus("enwik8", tmp_path / "data")
    server.shutdown()
    server.server_close()
    assert sorted(p.name for p in (tmp_path / "data").rglob("*")) == ["enwik8", "enwik8.zip"]
    assert parts_of_split(corpus) == ("train", "val", "test")
    cuts = [0, 54_000, 57_000, 60_001]
    for spec in SPECS:
        tok = get_tokenizer(spec, lambda: (d.text for d in split_documents(corpus)))
        made = tokenize_splits(corpus, tok, tmp_path / spec[:3], verbose=False)
        for part, start, stop in zip(made, cuts, cuts[1:]):
            assert spec == "chars" or tok.decode_bytes(made[part].ids) == content[start:stop]
            assert made[part].n_bytes == stop - start
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "enwik8").write_bytes(content)
    assert get_corpus("enwik8", tmp_path / "raw").fingerprint == corpus.fingerprint
    (tmp_path / "raw" / "enwik8").write_bytes(content[:-1])
    with pytest.raises(DataError, match="has 60,000 bytes, needs 60,001"):
        get_corpus("enwik8", tmp_path / "raw")


def test_wikitext_comes_in_its_own_parts(tmp_path):
    with zipfile.ZipFile(tmp_path / "wikitext-2.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", f"= {part} =\n")
    with pytest.raises(DataError, match="needs 4,721,645"):
        get_corpus("wikitext-2", tmp_path)


def test_a_corpus_without_a_known_hash_has_no_name(tmp_path):
    with pytest.raises(DataError, match="SHA-256 is unknown. Download a file of it yourself, and pass its path"):
        get_corpus("pydocs+tinystories", tmp_path)
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "a.txt").write_text("One day, a boy went out.")
    assert [d.text for d in get_corpus("./tinystories", tmp_path).documents()] == ["One day, a boy went out."]


def test_offline_error_names_the_file_and_folder(tmp_path, monkeypatch):
    item = datasets.DOWNLOADS["tinyshakespeare"][0]._replace(url="http://127.0.0.1:9/input.txt")
    monkeypatch.setitem(datasets.DOWNLOADS, "tinyshakespeare", [item])
    with pytest.raises(DataError, match="put it at") as e:
        get_corpus("tinyshakespeare", tmp_path)
    assert str(tmp_path / "tinyshakespeare" / "input.txt") in str(e.value)


def require_file(path):
    "Skip a test if its real data is not on this machine"
    if not path.exists():
        pytest.skip(f"{path} is not there; LMNOTES_DATA can name the folder that holds it")
    return path


def test_real_tinyshakespeare(tmp_path):
    path = require_file(data_root() / "tinyshakespeare" / "input.txt")
    corpus = get_corpus("tinyshakespeare")
    assert corpus.fingerprint == get_corpus(path).fingerprint
    assert hashlib.sha256(path.read_bytes()).hexdigest() == datasets.DOWNLOADS["tinyshakespeare"][0].sha256
    chars = get_tokenizer("chars", lambda: (d.text for d in split_documents(corpus)))
    made = tokenize_splits(corpus, chars, tmp_path / "chars")
    assert chars.vocab_size == 65 + 2
    assert (len(made["train"]), len(made["val"])) == (1_003_854, 111_540)


def test_real_gpt2_equals_transformers():
    folder = require_file(data_root() / "gpt2" / "vocab.json").parent
    from transformers import GPT2TokenizerFast

    ours, theirs = get_tokenizer("gpt2"), GPT2TokenizerFast.from_pretrained(str(folder))
    text = TEXT + "\n".join(d.text for d in list(get_corpus("pydocs").documents())[:5])
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(to_text(b"\xff" + text.encode()))) == to_text(b"\xff" + text.encode())


@pytest.mark.parametrize("split", ["hash", "randperm42", "first90"])
def test_long_texts_among_others_are_read_in_chunks(split, tmp_path, monkeypatch):
    "Reading a long text of a folder in chunks changes neither its part nor its tokens nor the bounds of documents"
    rng = random.Random(0)
    for i in range(60):
        words = rng.choices(TEXT.split(), k=200_000 if i in (7, 30, 59) else rng.randint(0, 40))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{i:02}.txt").write_text(" ".join(words))
    found = []
    for size in (1 << 16, 1 << 30):
        monkeypatch.setattr("lmnotes.data.corpus.read_chunks", partial(read_chunks, size=size))
        corpus = get_corpus(tmp_path / "texts")
        bpe = BPETokenizer.train((d.text for d in split_documents(corpus, split)), 400)
        made = tokenize_splits(corpus, bpe, tmp_path / str(size), split)
        texts = {d.id: d.text for d in corpus.documents()}
        found.append({part: (t.ids.tolist(), t.doc_starts.tolist(), t.n_bytes) for part, t in made.items()})
    assert len(texts) == 60 and max(map(len, texts.values())) > 1 << 19  # One document per file in the second round
    assert found[0] == found[1]


def test_the_records_of_runs_are_no_data(tmp_path, monkeypatch):
    "Runs in the folder of their data do not change it, and a run cannot have the same folder"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/a.txt").write_text(TEXT)
    small = dict(model_args="d_model=8 n_layers=1 n_heads=1", ctx_len=16, batch_size=2, tokenizer="bytes", steps=2)
    found = set()
    for name, recursive in (("a", True), ("b", True), ("c", False)):
        r = run(data="self", out_dir="self", run=name, recursive=recursive, view=False, **small)
        found.add(r.info["data"]["fingerprint"])
    assert len(found) == 1
    with pytest.raises(DataError, match="the run would write its files into the folder of its data"):
        run(data="self", out_dir=".", run="self", view=False, **small)
    assert sorted(p.name for p in (tmp_path / "self").iterdir() if p.name[0] != ".") == ["a", "a.txt", "b", "c"]


SMALL = dict(model_args="d_model=8 n_layers=1 n_heads=1", ctx_len=16, batch_size=2, out_dir="runs", view=False)


def test_a_weights_file_beside_its_run_has_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("Other words are here, and they give other tokens.\n" * 60)
    r = run(data="a.txt", tokenizer="bpe:270", run="expert", steps=1, **SMALL)
    torch.save(r.lm.state_dict(), tmp_path / "runs/expert_epoch1.pt")
    new = run(data="b.txt", init_from="runs/expert_epoch1.pt", run="new", steps=1, **SMALL)
    assert new.tokenizer.fingerprint == r.tokenizer.fingerprint
    with pytest.raises(TokenizerError, match="is not the tokenizer of"):
        run(data="b.txt", tokenizer="bpe:270", init_from="runs/expert_epoch1.pt", run="n", steps=1, **SMALL)


def test_characters_that_stdout_lacks_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("日本語のテキスト\n" * 40)
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", out)
        r = run(data="a.txt", tokenizer="chars", run="r", steps=2, sample_every=1, **SMALL)
    assert r.info["status"] == "done" and out.errors == "strict"


def test_the_length_is_given_once(tmp_path, monkeypatch):
    "The whole configuration of a run by epochs can be given again, and `data` can be a number"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024/a.txt").write_text(TEXT)
    r = run(data=2024, tokenizer="bytes", run="r", epochs=0.1, **SMALL)
    again = run(**asdict(r.config) | dict(run="again", resume=False), view=False)
    assert again.step == r.step
    for epochs in (dict(epochs=0.1), {}):
        monkeypatch.setenv("LMNOTES_EPOCHS", "0.1")
        with pytest.raises(ValueError, match=f"epochs=0.1 is {r.step} steps of this data, but steps=3 is given too"):
            run(data="2024", tokenizer="bytes", run="s", steps=3, **epochs, **SMALL)


def test_a_file_given_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    assert len(list(get_corpus(f"{tmp_path}/a.txt+{tmp_path}/a.txt").documents())) == 1


def test_a_weight_of_a_domain_without_tokens_is_an_error():
    ids, domains = np.arange(100, dtype=np.uint16), dict(a=(0, 100), empty=(100, 100))
    with pytest.raises(DataError, match="weights='a=1 empty=1': the domain empty has no two tokens"):
        DomainBalancedBatches(ids, domains, 2, 16, weights="a=1 empty=1")
    with pytest.raises(ValueError, match="needs numbers above 0 and below 1e100"):
        DomainBalancedBatches(ids, domains, 2, 16, weights="a=1e308 empty=1")


def test_the_place_of_a_named_corpus(tmp_path, monkeypatch):
    "A resume without the files of a named corpus obtains them again. Token files in a folder of that name are found again"
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/tinyshakespeare"
    folder.mkdir(parents=True)
    cfg = RunConfig(data="tinyshakespeare")
    assert data_place(cfg, tmp_path) == ""
    for name in ("train", "val"):
        np.arange(40, dtype=np.uint16).tofile(folder / f"{name}.bin")
    assert data_place(cfg, tmp_path) == "data/tinyshakespeare"


def test_docstrings_are_those_that_python_finds():
    folder, wrong, n = Path(asyncio.__file__).parent.parent, [], 0
    for path in [p for name in ("asyncio", "email", "json", "unittest") for p in (folder / name).glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [
            d
            for d in ast.walk(tree)
            if isinstance(d, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        known = {" ".join(re.sub("[`*]", "", ast.get_docstring(d) or "").split()) for d in nodes}
        for found in _find_prose(path.read_text(encoding="utf-8")):
            n += 1
            wrong += [found] if not any(all(p in text for p in found.split("\n\n")) for text in known) else []
    assert n > 200 and len(wrong) < 0.01 * n, wrong


def test_docstrings_are_written_again_if_their_file_is_empty(tmp_path):
    (tmp_path / "docstrings.jsonl").touch()
    get_corpus("docstrings", tmp_path)
    assert (tmp_path / "docstrings.jsonl").read_text().count("\n") > 1000
