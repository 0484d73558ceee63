"""Token files of other programs: the right ids or an error, for every dtype, header and layout."""

import pickle

import numpy as np
import pytest
import torch

from lmnotes.core import DataError, TokenizerError
from lmnotes.data.batches import get_batches
from lmnotes.data.prepare import record_texts
from lmnotes.data.token_formats import TOKEN_DTYPES
from lmnotes.data.tokenizer import ByteTokenizer, CharTokenizer
from lmnotes.data.tokens import TokenWriter, open_tokens
from lmnotes.runs.config import RunConfig, resolve_config
from lmnotes.runs.data import check_data_params, describe_data, load_data
from lmnotes.runs.folder import fork
from lmnotes.runs.run import run

RNG = np.random.default_rng(0)
TEXT = "The sea was calm, and the gulls were not.\nNobody spoke.\n" * 300
CHARS = CharTokenizer(TEXT)
IDS = {  # {name: (ids, size of the vocabulary)}
    "GPT-2": (np.minimum(RNG.zipf(1.3, 20_000), 50_256), 50_257),
    "GPT-2, uniform": (RNG.integers(0, 50_257, 20_000), 50_257),
    "a few": (np.minimum(RNG.zipf(1.3, 300), 50_256), 50_257),
    "128,000": (np.minimum(RNG.zipf(1.1, 20_000), 127_999), 128_000),
    "BPE of 2,048": (np.minimum(RNG.zipf(1.2, 20_000), 2_047), 2_048),
    "characters": (CHARS.encode(TEXT), CHARS.vocab_size),
    "bytes": (np.frombuffer(TEXT.encode(), np.uint8).astype(int), 256),
    "four": (RNG.integers(0, 4, 20_000), 4),
}


@pytest.mark.parametrize("knows_vocabulary", [True, False])
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
@pytest.mark.parametrize("name", IDS)
def test_no_dtype_is_misread(tmp_path, name, dtype, knows_vocabulary):
    ids, vocab_size = IDS[name]
    if ids.max() > np.iinfo(TOKEN_DTYPES[dtype]).max:
        pytest.skip("the ids do not fit the dtype")
    ids.astype(TOKEN_DTYPES[dtype]).tofile(tmp_path / "ids.bin")
    vocab_size = vocab_size if knows_vocabulary else None
    assert open_tokens(tmp_path / "ids.bin", dtype, vocab_size=vocab_size).ids.tolist() == ids.tolist()
    try:
        assert open_tokens(tmp_path / "ids.bin", vocab_size=vocab_size).ids.tolist() == ids.tolist()
    except DataError as e:
        assert "set token_dtype to one of uint8, uint16" in str(e) or "is not in the vocabulary" in str(e)
        assert name in ("a few", "GPT-2, uniform", "four") or (name, dtype) == ("bytes", "uint8")  # That is a text


def test_another_dtype_is_other_content(tmp_path):
    IDS["GPT-2"][0].astype("<i4").tofile(tmp_path / "ids.bin")
    found = [open_tokens(tmp_path / "ids.bin", dtype).fingerprint for dtype in (None, "int32", "uint32", "uint16")]
    assert found[0] == found[1] == found[2] != found[3]


def test_arrays_in_two_dimensions_get_the_line_to_type(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4), int))
    torch.save(torch.zeros(3, 4, dtype=torch.int64), tmp_path / "a.pt")
    torch.save(np.zeros(3, int), tmp_path / "b.pt")
    for name, line in {
        "a.npy": r"numpy.save\(path, ids.reshape",
        "a.pt": r"torch.save\(ids.reshape",
        "b.pt": "torch.save",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: .*{line}"):
            open_tokens(tmp_path / name)


def test_arrays_under_other_names(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200))
    torch.save(torch.arange(200), tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        for other in ("ids", "ids.txt", "ids.bin"):
            (tmp_path / other).write_bytes((tmp_path / name).read_bytes())
            assert open_tokens(tmp_path / other).ids.tolist() == list(range(200))
            cfg = RunConfig(data=str(tmp_path / other), tokenizer="bytes", ctx_len=8)
            assert len(load_data(cfg, log_fn=None).tokens["train"]) == 180
    (tmp_path / "ids.npy").write_text(TEXT)
    with pytest.raises(DataError, match="ids.npy: is plain text"):
        open_tokens(tmp_path / "ids.npy")


def nanogpt(folder):
    "Write the files of nanoGPT's prepare.py for characters"
    folder.mkdir()
    chars = sorted(set(TEXT))
    ids = np.array([chars.index(c) for c in TEXT], np.uint16)
    ids[:9000].tofile(folder / "train.bin")
    ids[9000:].tofile(folder / "val.bin")
    meta = dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_the_folder_of_nanogpt(tmp_path):
    nanogpt(tmp_path / "chars")
    data = load_data(RunConfig(data=str(tmp_path / "chars")), log_fn=None)
    assert data.tokenizer.decode(data.tokens["train"].ids) == TEXT[:9000]
    with pytest.raises(TokenizerError, match=r"meta.pkl .*not by tokenizer='bytes'"):
        load_data(RunConfig(data=str(tmp_path / "chars"), tokenizer="bytes"), log_fn=None)
    (tmp_path / "chars/meta.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(TokenizerError, match="meta.pkl: cannot be read, because it needs the instruction"):
        load_data(RunConfig(data=str(tmp_path / "chars")), log_fn=None)


def write_shard(path, ids, magic=20240520, dtype="<u2", count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(dtype).tobytes())


def test_shards_are_one_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web").mkdir()
    ids = ByteTokenizer().encode(TEXT)
    for i in range(3):
        write_shard(tmp_path / f"web/train_{i}.bin", ids[i * 1000 : (i + 1) * 1000])
    write_shard(tmp_path / "web/val_0.bin", ids[3000:4000], 20240801, "<u4")
    for data in (
        "web",
        "web/*.bin",
        "w*/*.bin",
        "web/train_0.bin+web/train_1.bin+web/train_2.bin+web/val_0.bin",
    ):
        for _ in range(2):  # The second time, the copy is reused
            found = load_data(RunConfig(data=data, tokenizer="bytes"), log_fn=None)
            assert found.tokens["train"].ids.tolist() == ids[:3000].tolist()
            assert found.tokens["val"].ids.tolist() == ids[3000:4000].tolist()
            assert found.tokens["train"].n_bytes == 3000
    write_shard(tmp_path / "web/train_1.bin", ids[:1000], count=1001)
    with pytest.raises(DataError, match=r"train_1.bin: is a token shard with 2,000 bytes after the header, but 1,001"):
        load_data(RunConfig(data="web", tokenizer="bytes"), log_fn=None)


def write_megatron(path, documents):
    "Write documents of ids as Megatron does, with an index"
    ids, lengths = np.concatenate(documents).astype("<u2"), [len(d) for d in documents]
    ids.tofile(path)
    offsets = 2 * np.append(0, np.cumsum(lengths))[:-1]
    counts = np.array([len(lengths), len(lengths) + 1], "<i8").tobytes()
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + counts
    arrays = (lengths, "<i4"), (offsets, "<i8"), (range(len(lengths) + 1), "<i8")
    path.with_suffix(".idx").write_bytes(head + b"".join(np.array(a, dtype).tobytes() for a, dtype in arrays))


def test_documents_of_megatron_can_be_packed(tmp_path):
    documents = [RNG.integers(0, 256, n) for n in RNG.integers(3, 40, 200)]
    write_megatron(tmp_path / "a.bin", documents)
    found = load_data(RunConfig(data=str(tmp_path / "a.bin"), tokenizer="bytes"), log_fn=None).tokens
    cut = len(np.concatenate(documents)) * 9 // 10
    starts = np.append(0, np.cumsum([len(d) for d in documents]))[:-1]
    assert found["train"].doc_starts.tolist() == starts[starts < cut].tolist()
    assert found["val"].doc_starts.tolist() == (np.union1d([cut], starts[starts >= cut]) - cut).tolist()
    assert get_batches(found["train"], 2, 16, sampler="documents")[0].x.shape == (2, 16)


def test_a_stated_dtype_is_not_overridden(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(200, dtype=np.uint16))
    write_shard(tmp_path / "b.bin", np.arange(200))
    write_megatron(tmp_path / "c.bin", [np.arange(200)])
    with TokenWriter(tmp_path / "d.bin", 257) as out:
        out.add(np.arange(200))
    for name in ("a.npy", "b.bin", "c.bin", "d.bin"):
        assert len(open_tokens(tmp_path / name, "uint16")) == 200
        with pytest.raises(DataError, match="states its dtype, uint16, so token_dtype='uint8' has no effect"):
            open_tokens(tmp_path / name, "uint8")


def test_token_files_among_texts_are_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    ByteTokenizer().encode(TEXT).astype("<u2").tofile(tmp_path / "b.bin")
    for data in ("b.bin+a.txt", "a.txt+b.bin", "b.bin+pydocs"):
        with pytest.raises(DataError, match="b.bin: holds token ids or text in UTF-16-LE. Pass it alone to read ids"):
            load_data(RunConfig(data=data, tokenizer="bytes"), log_fn=None)
    assert (
        len(load_data(RunConfig(data="b.bin", tokenizer="bytes"), log_fn=None).tokens["train"]) == len(TEXT) * 9 // 10
    )


def test_the_table_names_files_documents_and_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in dict(large=60, small=3, tiny=1).items():
        (tmp_path / "db" / name).mkdir(parents=True)
        line = '{{"text": "{} {}"}}\n'
        (tmp_path / f"db/{name}/a.jsonl").write_text("".join(line.format(name, "word " * 9) for _ in range(n)))
    (tmp_path / "db/paper.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "db/large/.a.jsonl").write_bytes(b"x")
    cfg = RunConfig(data="db", tokenizer="bytes", ctx_len=64, batch_size=8, split="randperm42")
    data = load_data(cfg, log_fn=None)
    train = data.tokens["train"]
    assert set(train.domains) == {"large", "small", "tiny"}  # Each keeps a document in training
    batches = get_batches(train, 8, 64, sampler="domains", weights="large=6 small=1 tiny=1")
    batch = batches[0]
    assert batch.n_targets < 8 * 64  # The domain below a sequence is padded
    lines = describe_data(data, batches, cfg).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["large", "small", "tiny"]
    assert lines[1].split()[1] == "1" and "75.0%" in lines[1] and "12.5%" in lines[3]
    assert "paper.pdf (a PDF document" in lines[-1] and ".a.jsonl (hidden or temporary)" in lines[-1]
    documents = [list(map(int, line.split()[2:4])) for line in lines[1:4]]
    assert [sum(pair) for pair in documents] == [60, 3, 1]


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(data_dir="texts"), "data_dir='texts' has no effect on data='docstrings'.*pass data='texts'"),
        (dict(data_dir="texts", domains="sea"), "data_dir='texts' has no effect"),
        (
            dict(text_key="body"),
            "text_key='body' has no effect on data='docstrings', which is text that comes with Python",
        ),
        (
            dict(data="a.txt", token_dtype="int32"),
            "token_dtype='int32' has no effect on data='a.txt', which is plain text",
        ),
        (dict(data="a.txt", text_key="body"), "text_key='body' has no effect on data='a.txt', which is plain text"),
        (
            dict(data="a.bin", tokenizer="bytes", split="hash"),
            "split='hash' has no effect on data='a.bin', which is token",
        ),
        (
            dict(data="a.bin", tokenizer="bytes", domains="sea"),
            "domains='sea' has no effect on data='a.bin', which is token",
        ),
    ],
)
def test_a_parameter_without_effect_is_named(tmp_path, monkeypatch, params, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=message):
        check_data_params(*resolve_config(params, environ={}))
    check_data_params(*resolve_config(dict(data="texts", text_key="body", recursive=True), environ={}))


@pytest.mark.parametrize(
    "address", ["s3://bucket/a.txt", "https://example.org/a.txt", "hf://datasets/a", "file:///a.txt"]
)
def test_addresses_are_named(address):
    for params in (dict(data=address), dict(data="a.txt", data_dir=address)):
        with pytest.raises(
            DataError, match=rf"is an address \({address.partition(':')[0]}\), and lmnotes reads local files"
        ):
            load_data(RunConfig(**params), log_fn=None)


def test_lists_and_generators_as_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT)
    cfg, _ = resolve_config(dict(data=["a.txt", "b.txt"], tokenizer="bytes"), environ={})
    assert cfg.data == "a.txt+b.txt"
    assert set(load_data(cfg, log_fn=None).tokens["train"].domains) == {"a", "b"}
    for texts in (["one text\nof two lines", "another"], [dict(text="a")], [b"a"], [1.5], None, ["word " * 99]):
        with pytest.raises(DataError, match="is no name and no path. Record the texts once with"):
            resolve_config(dict(data=texts), environ={})
    with pytest.raises(ValueError, match="data is a generator, which a resumed run could not read again. Record"):
        resolve_config(dict(data=(line for line in TEXT)), environ={})
    folder = record_texts(({"body": f"{i} lines"} for i in range(200)), tmp_path / "made", "bytes", text_key="body")
    tokens = load_data(RunConfig(data=str(folder)), log_fn=None).tokens
    assert sum(len(t.doc_starts) for t in tokens.values()) == 200


@pytest.mark.parametrize("data", ["a.txt+texts/*.txt+pydocs", "texts/**/*.txt", "0.bin+1.bin", "bytes:a.txt"])
def test_lists_and_globs_are_found_from_another_folder(tmp_path, monkeypatch, data):
    "A run resumes though the current folder is another one, also a fork of it"
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "texts/b.txt", "texts/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n{TEXT}")
    for name in ("0.bin", "1.bin"):
        CHARS.encode(TEXT).astype(np.uint16).tofile(tmp_path / name)
    small = dict(model_args="d_model=8 n_layers=1 n_heads=1", ctx_len=16, batch_size=2, view=False)
    run(run="r", data=data, out_dir="runs", tokenizer="bytes", steps=2, **small)
    (tmp_path / "other/cwd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other/cwd")
    assert run(run="r", out_dir="../../runs", resume=True, steps=3, view=False).step == 3
    fork("../../runs/r", "f")
    assert run(run="f", out_dir="../../runs", resume=True, steps=4, view=False).step == 4


def test_a_dataset_of_the_hub_is_streamed_once(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split, streaming, revision):
        calls.append((name, config, split, streaming, revision))
        if name == "me/none":
            raise ConnectionError("offline")
        return iter([dict(body="one"), dict(body="two")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from lmnotes.data.datasets import get_corpus

    for _ in range(2):
        corpus = get_corpus("hf:me/stories:en@abc", tmp_path, text_key="body")
        assert [d.text for d in corpus.documents()] == ["one", "two"]
    assert calls == [("me/stories", "en", "train", True, "abc")]
    with pytest.raises(DataError, match="data='hf:me/none': cannot be streamed .ConnectionError: offline"):
        get_corpus("hf:me/none", tmp_path)
    assert len(list((tmp_path / "hf").iterdir())) == 1
