"""MB/s of the morphological tokenizer in a batch call, against the package of the paper's authors and BPE, on one core.

python benchmarks/bench_morphological.py

The peer is turkish-tokenizer 0.2, in Python: versions in Rust come as source alone, for a compiler and its registry.
"""

from __future__ import annotations

import os
import statistics

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from common import heading, interleaved, ratio, report
from turkish_tokenizer import TurkishTokenizer

from tokenry.data.turkish import turkish_sentences
from tokenry.tokenize import KL3M, Morphological

ROUNDS = 7


def main() -> None:
    texts = [sentence.text for sentence in turkish_sentences()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    ours, official = Morphological().train(texts), TurkishTokenizer()
    bpe = KL3M(custom_tokens=(), normalization="none", pad_to_power_of_two=False).train(texts)

    def first_sight() -> None:
        ours.forget_words()
        ours(texts)

    runs = {
        "official": lambda: [official.encode(text) for text in texts],
        "known words": lambda: ours(texts),
        "first sight": first_sight,
        "bpe": lambda: bpe(texts),
        "one by one": lambda: [ours(text) for text in texts],
    }
    seconds = interleaved(runs, ROUNDS)
    heading(f"{size:.2f} MB of Turkish in {len(texts)} texts, one core")
    for name, found in seconds.items():
        print(f"{name:<14} {size / statistics.median(found):7.2f} MB/s")
    for name, goal in (("known words", 3), ("first sight", 1)):
        value = ratio(seconds, name, "official")
        report(f"batch call, {name}: MB/s over those of turkish-tokenizer", value, f">= {goal}", value >= goal)
    value = ratio(seconds, "known words", "bpe")
    report("batch call, known words: MB/s over those of a fast BPE", value, ">= 1", value >= 1)


if __name__ == "__main__":
    main()
