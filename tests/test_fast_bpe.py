"""BPE through rustbpe and tiktoken: the same tokens and ids as those of tokenizers."""

import os
import random
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers as hf
from helpers import read_log, run_in_process

from lmnotes.core import TokenizerError
from lmnotes.data.datasets import get_corpus
from lmnotes.data.splits import split_documents
from lmnotes.data.tokenizer import BYTE_CHARS, EOT, BPETokenizer

HARD = [
    "it's I'll we've they're I'd I'm 'tis 'S 'LL don''t ' 's",
    "   leading\n\n\ntrailing   \n \t \r\n\u2003\u00a0x\u3000 ",
    "1234567 3.14 ½ ² ٣٤ Ⅷ x1y2 007",
    "naïve café e\u0301 ﬁ Ǆ İ ß ẞ Ελλάς 中文字 日本語テキスト ไทย हिन्दी عربى",
    "👩‍🚀 🏳️‍🌈 🇩🇪 \U0001f9ff\U000e0067 \ufeff\u200b\u200d",
    "<|endoftext|> <|endofprompt|> [MASK] \0\x01\x7f\x80",
    "_private __init__ a->b ==!= //\\ \"'`~^ {}[]()<>",
    "a" * 300 + " " * 300 + "\n" * 300 + "ab" * 300 + "aab" * 300 + "😀" * 100,
    "\x85\u2028\u2029\x1c\x1d\x1e\x1f\x0b\x0c",
]


def ids_of_both(tok, texts):
    "Return the ids that tokenizers and tiktoken give, one text after another"
    slow = tok._hf.encode_batch_fast(texts, add_special_tokens=False)
    encoding, ids = tok._tiktoken
    fast = (ids[encoding.encode_to_numpy(text, disallowed_special=())] for text in texts)
    return [e.ids for e in slow], [part.tolist() for part in fast]


def random_text(draw):
    "Return a random text of letters, digits, marks, spaces and characters of any script"
    kinds = ["etaoin shrdlu", "ABC'sdmtlv re", " \n\t\r\u2003", "0123456789", ".,!?'\"-_", "éßñΩЖ中あ한ไ\u0301😀"]
    pieces = (draw.choice(draw.choice(kinds)) * draw.choice((1, 1, 1, 2, 5)) for _ in range(draw.randint(0, 60)))
    return "".join(pieces)


@pytest.fixture(scope="module")
def trained():
    return BPETokenizer.train((d.text for d in split_documents(get_corpus("pydocs"))), 3000)


def test_hard_and_random_texts(trained):
    draw = random.Random(0)
    slow, fast = ids_of_both(trained, HARD + [random_text(draw) for _ in range(10_000)])
    assert slow == fast


@pytest.mark.parametrize("unused", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_every_character(trained, unused):
    "Both libraries take the same characters for letters, digits and spaces (the unused code points in the nightly run)"
    codes = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    chars = [chr(c) for c in codes if (unicodedata.category(chr(c)) in ("Cn", "Co")) == unused]
    texts = ["".join(f"a{c}1{c} {c}!{c}\n" for c in chars[i : i + 5000]) for i in range(0, len(chars), 5000)]
    slow, fast = ids_of_both(trained, texts)
    assert slow == fast


def test_a_long_text_goes_through_tiktoken(trained, monkeypatch):
    text = " ".join(HARD) + " the end" * 10_000
    expected, _ = ids_of_both(trained, [text])
    monkeypatch.setattr(trained, "_hf", None)
    ids = trained.encode_batch([text, "\udcff" + text + "\udcfe\udcfd", ""])
    assert ids[0].tolist() == expected[0] and ids[1].tolist()[1:-2] == expected[0] and len(ids[2]) == 0
    assert [len(trained.decode_bytes(ids[1][at])) for at in (slice(1), slice(-2, None))] == [1, 2]


def bpe(*merges):
    "Return a BPE with these merges, such as `ab`, written as `a b`"
    merges = [tuple(merge.split()) for merge in merges]
    tokens = dict.fromkeys([EOT, *BYTE_CHARS, *map("".join, merges)])
    return BPETokenizer({token: i for i, token in enumerate(tokens)}, merges)


@pytest.mark.parametrize(
    "merges, is_fast",
    {
        ("a b", "ab c"): True,
        ("b c", "p q", "pq b", "pqb c"): False,  # tiktoken would join pq and bc
        ("a b", "b c", "ab c", "a bc"): False,  # A text with two merges
    }.items(),
)
def test_other_merges_go_through_tokenizers(merges, is_fast):
    "A vocabulary in which tiktoken could join two tokens that no merge joins goes through tokenizers"
    tok, text = bpe(*merges), "pqbc abc bcabcpq " * 1000
    assert (tok._tiktoken is not None) == is_fast
    assert tok.encode(text).tolist() == tok._hf.encode(text, add_special_tokens=False).ids
    assert np.array_equal(np.concatenate([tok.encode(word) for word in (text[:9], text[9:])]), tok.encode(text))


def test_training_equals_tokenizers_up_to_ties():
    "rustbpe and tokenizers learn the same tokens, apart from the last of equally frequent pairs, in another order"
    text = "\n".join(d.text for d in split_documents(get_corpus("pydocs")))[:300_000]
    other = hf.Tokenizer(hf.models.BPE())
    other.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(vocab_size=2000, special_tokens=[EOT], initial_alphabet=BYTE_CHARS)
    other.train_from_iterator([text], trainer)
    tok = BPETokenizer.train([text], 2000)
    assert len(tok.vocab.keys() - other.get_vocab().keys()) <= 2
    assert BPETokenizer.train(iter([text]), 2000).fingerprint == tok.fingerprint


def test_a_text_that_fails_ends_the_training():
    def texts():
        yield "text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BPETokenizer.train(texts(), 300)
    with pytest.raises(TokenizerError, match="characters without the start of a word"):
        BPETokenizer.train(["a" * 1_000_000], 300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_training_in_a_fork_of_a_process_that_trained(tmp_path):
    "rustbpe would wait for threads that a fork does not have, so it is an error"
    assert run_in_process(tmp_path, train_and_fork) == 0, read_log(tmp_path)


def train_and_fork():
    "Train a BPE, then train one in a fork, and return 0 if that is an error"
    BPETokenizer.train(["a text"], 300)
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        BPETokenizer.train(["a text"], 300)
    except TokenizerError as e:
        os._exit("a fork of one that has trained a BPE" not in str(e))
    os._exit(2)
