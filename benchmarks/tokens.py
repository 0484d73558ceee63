"""Text to tokens: learning a BPE of 8,192 ids and encoding with it, beside the library tokenizers, on prose and on Python's source code.

We count megabytes per CPU second of one thread. The texts are the documentation and the source code of Python (4 MB of it).
"""

from common import THREADS, interleave, min_cpu, parse_options, report, timing_columns  # isort: skip
import os

os.environ["RAYON_NUM_THREADS"] = str(THREADS)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import tokenizers

from lmnotes.data.datasets import get_corpus
from lmnotes.data.tokenizer import BPETokenizer


def theirs(texts, vocab_size):
    "Learn a byte-level BPE with tokenizers"
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts, tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return tok


def main():
    args = parse_options(__doc__, rounds=(3, "timed runs of each"))
    rows, goals, size = [], [], 300 if args.quick else 8192
    for name, data in dict(prose="pydocs", code="stdlib").items():
        text = "".join(d.text for d, _ in zip(get_corpus(data).documents(), range(2000)))[
            : 20_000 if args.quick else 4_000_000
        ]
        pieces = [text[i : i + 16384] for i in range(0, len(text), 16384)]
        ours, peer = BPETokenizer.train(iter(pieces), size), theirs(pieces, size)
        ways = {
            ("learn", "lmnotes"): lambda pieces=pieces: BPETokenizer.train(iter(pieces), size),
            ("learn", "tokenizers"): lambda pieces=pieces: theirs(pieces, size),
            ("encode", "lmnotes"): lambda tok=ours, pieces=pieces: tok.encode_batch(pieces),
            ("encode", "tokenizers"): lambda tok=peer, pieces=pieces: tok.encode_batch_fast(pieces),
        }
        clocks, mb = interleave(ways, 1 if args.quick else args.rounds), len(text.encode()) / 1e6
        for (work, who), of in clocks.items():
            rows.append(
                {"text": name, "work": work, "library": who, **timing_columns(of), "MB / CPU s": mb / min_cpu(of)}
            )
        for work, bar in dict(learn=5, encode=4).items():
            speed = mb / min_cpu(clocks[work, "lmnotes"])
            other = mb / min_cpu(clocks[work, "tokenizers"])
            goal = f"{name}: {work} a BPE of 8,192 ids, MB per CPU s (goal {bar})".replace("encode a", "encode by a")
            goals.append((goal, f"{speed:.1f}, tokenizers {other:.1f}", speed >= bar))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
