"""A run folder from someone else may hold links, names and entries of any kind. None of them leads a write, a command or a choice of
the library elsewhere."""

import os

from lmnotes.core import write_atomic
from lmnotes.data.prepare import record_batches
from lmnotes.data.tokenizer import ByteTokenizer
from lmnotes.data.tokens import TokenWriter, open_tokens
from lmnotes.nn.lm import new_lm
from lmnotes.training.checkpoint import save_checkpoint

SIZES = dict(n_layers=1, d_model=8, n_heads=1, vocab_size=256, ctx_len=8)


def write_tokens(path):
    with TokenWriter(path, 256) as out:
        out.add([1, 2, 3])


def link_temporary_names(folder, target):
    "Make every temporary name that this process can choose for the files of a folder a link"
    for name in ("a.json", "train.bin", "train.bin.json", "train.docs.npy", "last", "step_00000001"):
        (folder / f".{name}.{os.getpid()}.tmp").symlink_to(target)
    (folder / f".{os.getpid()}.tmp").symlink_to(target)


def test_no_write_follows_a_link_with_a_temporary_name(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "foreign"
    victim.write_text("precious")
    folder.mkdir()
    link_temporary_names(folder, victim)
    write_atomic(folder / "a.json", "new")
    write_tokens(folder / "train.bin")
    assert victim.read_text() == "precious" and (folder / "a.json").read_text() == "new"
    assert open_tokens(folder / "train.bin", vocab_size=256).ids.tolist() == [1, 2, 3]


def test_no_folder_is_written_through_a_link_with_a_temporary_name(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "foreign"
    victim.mkdir()
    (victim / "train.bin").write_text("precious")
    folder.mkdir()
    link_temporary_names(folder, victim)
    lm = new_lm("gpt", **SIZES)
    for write in (
        lambda: save_checkpoint(folder, lm, 1),
        lambda: record_batches(lambda b, t: [[1] * t] * b, folder, ByteTokenizer(), 2, 4, 1, 1),
    ):
        try:
            write()
        except (ValueError, OSError):  # The name is taken
            pass
        assert [(p.name, p.read_text()) for p in victim.iterdir()] == [("train.bin", "precious")]
