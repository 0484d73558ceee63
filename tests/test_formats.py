"""Files of all kinds under right and wrong suffixes: read as the type of their content, or rejected with its name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.torch import save as save_safetensors

from lmnotes.core import DataError
from lmnotes.data import formats
from lmnotes.data.datasets import get_corpus
from lmnotes.data.formats import recognize

TEXTS = ["The sea was calm.\nThe gulls were not.", 'He asked: "Why, naïve 中文?"\n', "Three, four, five."]
PROSE = "The sea was calm, and the gulls were not.\nA naïve text — with 中文.\n\n" * 50
IDS = np.minimum(np.random.default_rng(0).zipf(1.3, 20_000), 50256)


def jsonl(key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)).encode()


def table(delimiter):
    quoted = [text.replace('"', '""') for text in TEXTS]
    return (
        "\n".join([f"id{delimiter}text", *(f'{i}{delimiter}"{text}"' for i, text in enumerate(quoted))]) + "\n"
    ).encode()


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def written(write):
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


def arrow_stream():
    rows = pa.table(dict(text=TEXTS))
    out = io.BytesIO()
    with pa.ipc.new_stream(out, rows.schema) as writer:
        writer.write_table(rows)
    return out.getvalue()


WORDS = "ORCAS", "ID3", "GIF89", "RIFFS", "OggS", "GGUF", "%PDF-files", "#version: 3", "PAR1", "Rar!"
MANY = (jsonl() * 4000).decode().splitlines(keepends=True)  # More than the bytes that decide the format
READ = {  # {name: (content, texts)}
    "UTF-8": (PROSE.encode(), [PROSE]),
    "UTF-8 with a mark": (PROSE.encode("utf-8-sig"), [PROSE]),
    "UTF-16": (PROSE.encode("utf-16"), [PROSE]),
    "UTF-16 without a mark": (PROSE.encode("utf-16-le"), [PROSE]),
    "UTF-16-BE without a mark": (PROSE.encode("utf-16-be"), [PROSE]),
    "UTF-32": (PROSE.encode("utf-32"), [PROSE]),
    "Markdown": (b"# Notes\n\n[A link](a.md), and `code`.\n", ["# Notes\n\n[A link](a.md), and `code`.\n"]),
    "source code": (b"x = {'a': [1, 2]}\nprint(x)\n", ["x = {'a': [1, 2]}\nprint(x)\n"]),
    "JSON lines": (jsonl(), TEXTS),
    "long JSON lines": ("".join(MANY).encode(), TEXTS * 4000),
    "JSON lines in UTF-16": (jsonl().decode().encode("utf-16"), TEXTS),
    "a JSON array": (json.dumps([dict(text=t) for t in TEXTS], indent=1).encode(), TEXTS),
    "a long JSON array": (json.dumps([dict(text=t) for t in TEXTS * 4000]).encode(), TEXTS * 4000),
    "a JSON array of long texts": (json.dumps([dict(text=t * 400) for t in TEXTS * 3]).encode(), [t * 400 for t in TEXTS * 3]),
    "a JSON array of texts": (json.dumps(TEXTS).encode(), TEXTS),
    "CSV": (table(","), TEXTS),
    "TSV": (table("\t"), TEXTS),
    "a CSV with a long first row": (f'id,text\n1,"{PROSE * 2000}"\n2,two\n'.encode(), [PROSE * 2000, "two"]),
    "JSON text sequences": (b"\x1e" + jsonl().replace(b"\n{", b"\n\x1e{"), TEXTS),
    **{start: (f"{start} in the morning\n{PROSE}".encode(), [f"{start} in the morning\n{PROSE}"]) for start in WORDS},
    "text.gz": (gzip.compress(PROSE.encode()), [PROSE]),
    "text.xz": (lzma.compress(PROSE.encode()), [PROSE]),
    "text.bz2": (bz2.compress(PROSE.encode()), [PROSE]),
    "text.zst": (zstandard.compress(PROSE.encode()), [PROSE]),
    "jsonl.gz": (gzip.compress(jsonl()), TEXTS),
    "two members of gz": (gzip.compress(jsonl()) + gzip.compress(jsonl()), TEXTS * 2),
    "two streams of xz": (lzma.compress(jsonl()) + lzma.compress(jsonl()), TEXTS * 2),
    "two frames of zst": (zstandard.compress(jsonl()) * 2, TEXTS * 2),
    "UTF-16 in gz": (gzip.compress(PROSE.encode("utf-16")), [PROSE]),
    "zip": (zipped({"a.txt": PROSE, "b.jsonl": jsonl(), "__MACOSX/c.txt": b"x"}), [PROSE, *TEXTS]),
    "Parquet": (written(lambda out: pq.write_table(pa.table(dict(id=[0, 1, 2], text=TEXTS)), out)), TEXTS),
    "Arrow": (arrow_stream(), TEXTS),
}  # fmt: skip
REJECTED = {  # {name: (content, words in the message)}
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" * 9, "a PDF document"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    "Word": (zipped({"word/document.xml": b"<a/>"}), "a Word document"),
    "npz": (written(lambda out: np.savez(out, ids=IDS)), "an .npz archive"),
    "npy": (written(lambda out: np.save(out, IDS)), "a NumPy array, which holds tokens"),
    "torch": (written(lambda out: torch.save(torch.tensor(IDS), out)), "a file of torch.save, which holds tokens"),
    "pickle": (pickle.dumps(dict(a=1)), "a Python pickle"),
    "safetensors": (save_safetensors(dict(a=torch.zeros(3))), "weights in safetensors"),
    "tar.gz": (gzip.compress(tar()), "a tar archive"),
    "gz in gz": (gzip.compress(gzip.compress(PROSE.encode())), "a compressed archive"),
    "llm.c shard": (np.array([20240520, 1, 9], "<i4").tobytes() + bytes(1012) + IDS.astype("<u2").tobytes(), "a token shard"),
    "merges": (b"#version: 0.2\nt h\nth e\n", "the merges of a BPE tokenizer"),
    "a JSON object": (json.dumps(dict(model=dict(vocab=dict(a=1))), indent=1).encode(), "a JSON object|found no text"),
    "a JSON array of numbers": (b"[1, 2, 3]", "a JSON array without texts"),
    "uint16": (IDS.astype("<u2").tobytes(), "binary data"),
    "uint8": ((IDS % 65).astype("<u1").tobytes(), "binary data"),
    "int64": (IDS.astype("<i8").tobytes(), "binary data"),
    "big-endian": (IDS.astype(">u2").tobytes(), "binary data"),
    "zeros": (bytes(5000), "a file of zeros"),
    "Latin-1": ("Un café très sucré à la crème.\n".encode("latin-1") * 20, "is not valid UTF-8.*It may be"),
    "cut gz": (gzip.compress(jsonl() * 99)[:200], "cannot be decompressed"),
    "other key": (jsonl("body"), "Set text_key to one of its texts .body.|without the column"),
}  # fmt: skip
SUFFIXES = ".txt", ".jsonl", ".JSON", ".csv", ".md", ".gz", ".parquet", ".bin", ".npy", ""


@pytest.mark.parametrize("name", [*READ, *REJECTED])
def test_no_file_is_misread_under_any_suffix(name, tmp_path):
    content, expected = (READ | REJECTED)[name]
    for suffix in SUFFIXES:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        if suffix == ".bin" and name in ("UTF-16 without a mark", "UTF-16-BE without a mark"):  # The same bytes as ids
            with pytest.raises(DataError, match="holds token ids or text in UTF-16"):
                get_corpus(path)
        elif name in READ:
            found = [d.text for d in get_corpus(path).documents()]
            assert found == expected or len(expected) == 1 and "".join(found) == expected[0], suffix  # Chunks of a text
        else:
            with pytest.raises(DataError, match=f"(?s){expected}"):
                list(get_corpus(path).documents())


LONG_PROSE = PROSE.replace("\n", " ") * 2000


@pytest.mark.parametrize(
    "text",
    [
        "text | body\n--- | ---\na | b\n",
        "Content; calm\nthe sea; the sky\n",
        f'["Stop!\n{LONG_PROSE}',
        f"Content, Text\n{LONG_PROSE}",
        f'text\n"{LONG_PROSE}',
    ],
)
def test_a_text_that_resembles_a_table_is_a_text(text, tmp_path):
    for suffix in (".md", ".txt", ""):
        (tmp_path / f"a{suffix}").write_text(text)
        assert "".join(d.text for d in get_corpus(tmp_path / f"a{suffix}").documents()) == text


@pytest.mark.parametrize("delimiter", ";|\t,")
def test_a_table_with_any_delimiter(delimiter, tmp_path):
    (tmp_path / "a.csv").write_bytes(table(delimiter).replace(b"text", b" text", 1))
    assert [d.text for d in get_corpus(tmp_path / "a.csv").documents()] == TEXTS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "id,text,text\n1,a,b\n", "2 columns 'text'. Rename one"),
        ("a.csv", "id;body\n1;a\n", "a table without the column 'text'"),
        ("a.csv", "id,,body\n1,,a\n2,,b\n", "a table without the column 'text'"),
        ("a.jsonl", '"a"\n"b"\n', "a.jsonl:1: expected"),
        ("a.jsonl", "1\n2\n", "a.jsonl:1: expected"),
        ("a.txt", "Un café\n" * 9, "It may be cp125"),
        ("a.txt", "The sea was calm.\n" * 9999 + "é", "It may be cp125"),
    ],
)
def test_an_untidy_file_is_no_plain_text(name, content, message, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        list(get_corpus(tmp_path / name).documents())


def test_the_content_decides_the_fingerprint(tmp_path):
    "A text has one fingerprint, compressed or in another encoding"
    found = set()
    for name in ("UTF-8", "UTF-16", "text.gz", "text.xz", "text.bz2", "text.zst", "UTF-16 in gz"):
        (tmp_path / "a").write_bytes(READ[name][0])
        found.add(get_corpus(tmp_path / "a").fingerprint)
    assert len(found) == 1


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2", "zst"])
def test_decompression_is_bounded(compression, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FREE_BYTES", 1 << 16)
    compress = dict(gz=gzip.compress, xz=lzma.compress, bz2=bz2.compress, zst=zstandard.compress)[compression]
    (tmp_path / "bomb.txt").write_bytes(compress(b"The sea.\n" * (1 << 18)))
    with pytest.raises(DataError, match="bomb.txt: .* expand to over .* more than 200 times"):
        list(get_corpus(tmp_path / "bomb.txt").documents())


def test_a_decoder_of_xz_has_limited_memory(tmp_path):
    data = lzma.compress(b"The sea.\n", filters=[dict(id=lzma.FILTER_LZMA2, dict_size=3 << 27)])
    (tmp_path / "a.xz").write_bytes(data)
    with pytest.raises(DataError, match="cannot be decompressed .Memory usage limit"):
        recognize(tmp_path / "a.xz")


@pytest.mark.parametrize("name", ["pyarrow", "zstandard"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "a").write_bytes(READ["Parquet" if name == "pyarrow" else "text.zst"][0])
    with pytest.raises(
        DataError, match=rf"a: .* needs the package {name}. Install it with: pip install 'lmnotes\[data\]'"
    ):
        list(get_corpus(tmp_path / "a").documents())


def test_hidden_and_temporary_files_are_skipped_by_name(tmp_path):
    for sub, suffix in (("text", "txt"), ("lines/sea", "jsonl")):
        folder = tmp_path / sub
        (folder / ".ipynb_checkpoints").mkdir(parents=True)
        for name in ("a", ".ipynb_checkpoints/a-checkpoint", "._a", ".a"):
            (folder / f"{name}.{suffix}").write_text(json.dumps(dict(text=f"text of {name}")) + "\n")
        (folder / f"a.{suffix}~").write_text("old")
    for folder in (tmp_path / "text", tmp_path / "lines"):
        corpus = get_corpus(folder, recursive=True)
        assert [d.text for d in corpus.documents()] == ["text of a"]
        assert len([s for s in corpus.skipped if s.reason == "hidden or temporary"]) == 4


def test_every_odd_file_of_a_folder_is_named(tmp_path):
    data = {
        "good/a.jsonl": jsonl(),
        "compressed/a.jsonl.gz": gzip.compress(jsonl()),
        "upper/A.JSONL": jsonl(),
        "array/a.json": json.dumps(TEXTS).encode(),
        "outer/inner/n.jsonl": jsonl(),
        "empty/a.jsonl": b"",
        "beside.txt": PROSE.encode(),
        "paper.pdf": b"%PDF-1.7",
        "README.md": b"# Data\n",
    }
    for name, content in data.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    corpus = get_corpus(tmp_path)
    assert corpus.domains == sorted(["good", "compressed", "upper", "array", "empty", tmp_path.name])
    assert {s.name for s in corpus.skipped} == {"outer/inner/", "paper.pdf", "README.md"}
    assert "outer" in get_corpus(tmp_path, recursive=True).domains


def test_saved_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict(dict(body=TEXTS, id=[0, 1, 2]))
    rows.save_to_disk(str(tmp_path / "one"))
    assert [d.text for d in get_corpus(tmp_path / "one", text_key="body").documents()] == TEXTS
    DatasetDict(train=rows, validation=rows.select([0]), extra=rows).save_to_disk(str(tmp_path / "parts"))
    corpus = get_corpus(tmp_path / "parts", text_key="body")
    assert corpus.default_split == "own" and [s.part for s in corpus.sources] == ["train", "val"]
    assert [s.name for s in corpus.skipped] == ["extra/"]
    with pytest.raises(DataError, match=r"without the column 'text'. Set text_key to one of its columns .body, id"):
        list(get_corpus(tmp_path / "one").documents())
    (tmp_path / "one/state.json").write_text('{"_data_files": [{"filename": "../../secret.arrow"}]}')
    with pytest.raises(DataError, match="would not name a file"):
        get_corpus(tmp_path / "one")


def test_text_keys_change_the_fingerprint(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "body": "b"}\n')
    found = {key: get_corpus(tmp_path / "a.jsonl", text_key=key) for key in ("text", "body")}
    assert [next(c.documents()).text for c in found.values()] == ["a", "b"]
    assert found["text"].fingerprint != found["body"].fingerprint
