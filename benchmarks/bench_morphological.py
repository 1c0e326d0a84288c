"""MB/s of the morphological tokenizer in a batch call, against the package of the paper's authors and BPE, on one core.

python benchmarks/bench_morphological.py

The peer is the turkish-tokenizer that is installed: up to 0.2 in Python, from 1.0 on in Rust (source alone, to be
compiled). `rule=score` is the rule of the latter. At first sight of a text all its words are new, and in these texts
half of the words stand there once.
"""

from __future__ import annotations

import inspect
import os
import statistics

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

from common import heading, interleaved, ratio, report
from turkish_tokenizer import TurkishTokenizer

from tokenry.data.turkish import turkish_sentences
from tokenry.tokenize import KL3M, Morphological

ROUNDS = 7
PEER = "Python" if inspect.isfunction(TurkishTokenizer.encode) else "Rust"
GOALS = {"known words": 3 if PEER == "Python" else 1, "first sight": 1}


def main() -> None:
    texts = [sentence.text for sentence in turkish_sentences()]
    size = sum(len(text.encode()) for text in texts) / 1e6
    ours, ahead, official = Morphological().train(texts), Morphological(rule="score").train(texts), TurkishTokenizer()
    bpe = KL3M(custom_tokens=(), normalization="none", pad_to_power_of_two=False).train(texts)

    def first_sight(tokenizer) -> None:
        tokenizer.forget_words()
        tokenizer(texts)

    runs = {
        "official": lambda: [official.encode(text) for text in texts],
        "known words": lambda: ours(texts),
        "known words, rule=score": lambda: ahead(texts),
        "first sight": lambda: first_sight(ours),
        "first sight, rule=score": lambda: first_sight(ahead),
        "bpe": lambda: bpe(texts),
        "one by one": lambda: [ours(text) for text in texts],
    }
    seconds = interleaved(runs, ROUNDS)
    heading(f"{size:.2f} MB of Turkish in {len(texts)} texts, one core; turkish-tokenizer in {PEER}")
    for name, found in seconds.items():
        print(f"{name:<24} {size / statistics.median(found):7.2f} MB/s")
    for name, goal in GOALS.items():
        for run in (name, f"{name}, rule=score"):
            value = ratio(seconds, run, "official")
            report(f"batch call, {run}: MB/s over those of turkish-tokenizer", value, f">= {goal}", value >= goal)
    value = ratio(seconds, "known words", "bpe")
    report("batch call, known words: MB/s over those of a fast BPE", value, ">= 1", value >= 1)


if __name__ == "__main__":
    main()
