"""The vector store: many random cases against a plain search, FAISS against torch, and an interrupted write."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from lmnotes.core import CheckpointError
from lmnotes.nn.vector_store import VectorStore, l2_normalize

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="FAISS is not installed: pip install faiss-cpu"
)
INDEXES = ["torch", pytest.param("faiss", marks=needs_faiss)]


def plain(keys, values, groups, queries, k, exclude):
    "Find the nearest vectors by sorting all of them"
    out = []
    for q, own in zip(l2_normalize(queries), exclude):
        scores = (l2_normalize(keys) * q).sum(-1)
        order = sorted(range(len(keys)), key=lambda i: (-scores[i].item(), i))
        out.append([i for i in order if own < 0 or groups[i] != own][:k])
    return out


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("seed", range(6))
def test_search_equals_a_full_sort(index, seed):
    torch.manual_seed(seed)
    N, room, D = 150, (40, 150, 400)[seed % 3], 6
    keys, values, groups = torch.randn(N, D), torch.randn(N, D), torch.randint(7, (N,))
    copies = torch.randint(N, (60,))
    keys[copies] = torch.ones(D)  # Many equal keys
    store = VectorStore(D, room, index)
    for a in torch.arange(N).split(seed * 9 + 4):
        store.add(keys[a], values[a], groups[a])
    keys, values, groups = keys[-room:], values[-room:], groups[-room:]
    assert len(store) == len(keys)
    queries, exclude = torch.cat([torch.randn(9, D), keys[-1:]]), torch.randint(-1, 7, (10,))
    for k in (1, 5, 30):
        found = store.search(queries, k, exclude)
        for row, wanted in enumerate(plain(keys, values, groups, queries, k, exclude)):
            assert torch.equal(found[0][row, : len(wanted)], values[wanted])
            assert found[2][row].tolist() == [True] * len(wanted) + [False] * (k - len(wanted))


@needs_faiss
def test_faiss_and_torch_give_the_same_bits_also_across_files(tmp_path):
    torch.manual_seed(0)
    keys, groups = torch.randn(3000, 16), torch.arange(3000) // 50
    stores = {index: VectorStore(16, 2000, index) for index in ("torch", "faiss")}
    for index, store in list(stores.items()):
        store.add(keys, groups=groups)
        other = dict(torch="faiss", faiss="torch")[index]
        stores[f"{index} by {other}"] = VectorStore.load(store.save(tmp_path / index), other)
    queries = torch.randn(40, 16)
    exclude = torch.randint(60, (40,))
    wanted = stores["torch"].search(queries, 6, exclude)
    for store in stores.values():
        assert all(torch.equal(a, b) for a, b in zip(store.search(queries, 6, exclude), wanted))
        one = [store.search(q[None], 6, e[None]) for q, e in zip(queries, exclude)]  # For any batch
        assert all(torch.equal(torch.cat(a), b) for a, b in zip(zip(*one), wanted))


@pytest.mark.parametrize("index", INDEXES)
def test_loaded_store_continues_like_the_original(index, tmp_path):
    torch.manual_seed(0)
    keys, more = torch.randn(70, 4), torch.randn(25, 4)
    store = VectorStore(4, 50, index)
    store.add(keys)
    again = VectorStore.load(store.save(tmp_path / "memory.safetensors"), index)
    for s in (store, again):
        s.add(more)
    assert all(torch.equal(a, b) for a, b in zip(store.search(more, 9), again.search(more, 9)))


def test_failed_save_keeps_old_file(tmp_path, monkeypatch):
    store = VectorStore(4, index="torch")
    store.add(torch.randn(3, 4))
    path = store.save(tmp_path / "memory.safetensors")
    before = path.read_bytes()
    store.add(torch.randn(3, 4))
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError):
        store.save(path)
    assert path.read_bytes() == before
    assert [o.name for o in tmp_path.iterdir()] == ["memory.safetensors"]


@pytest.mark.parametrize("at", [10, 200, -1])
def test_changed_byte_is_detected(tmp_path, at):
    store = VectorStore(4, index="torch")
    store.add(torch.randn(30, 4))
    path = store.save(tmp_path / "memory.safetensors")
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="memory.safetensors"):
        VectorStore.load(path)


def test_without_faiss_the_torch_index_is_used():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from lmnotes.nn.vector_store import VectorStore\n"
        "print(VectorStore(4).index)\n"
        "try: VectorStore(4, index='faiss')\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "torch",
        "index='faiss' needs the library FAISS: pip install 'lmnotes[store]', or choose index='torch'",
    ]


def test_neither_autocast_nor_gradients_change_a_search():
    torch.manual_seed(0)
    keys = torch.randn(200, 16, requires_grad=True)
    store = VectorStore(16, index="torch")
    store.add(keys)
    wanted = store.search(keys[:5], 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = store.search(keys[:5], 4)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, wanted))
