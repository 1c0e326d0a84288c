"""The trie of labels against a plain dictionary of prefixes, and a search that keeps its caches against one that reads
every candidate again.

python benchmarks/bench_tvm.py
"""

from __future__ import annotations

import time

import numpy as np
from common import heading, report

import tokenry
from tokenry.decode import TreeShape, step_beam_search
from tokenry.judge import TokenValueModel, token_value_labels

SOLUTIONS, TOKENS, PLAIN = 1000, 500, 100  # the dictionary is timed on fewer: its time grows with the square of TOKENS
QUESTIONS = ("12+35-8*3=", "40-6*3+75-12=", "9*7-31+8*4+26=")


def solutions(count: int) -> list[list[int]]:
    """Texts that part at random places from one of forty."""
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 50_000, (40, TOKENS))
    found = bases[rng.integers(0, 40, count)]
    for row, cut in zip(found, rng.integers(0, TOKENS, count)):
        row[cut:] = rng.integers(0, 50_000, TOKENS - cut)
    return found.tolist()


def by_dictionary(texts: list[list[int]], correct: list[int]) -> list[list[float]]:
    """The definition with a dictionary of all prefixes."""
    counts: dict[tuple[int, ...], list[int]] = {}
    for ids, right in zip(texts, correct):
        for k in range(1, len(ids) + 1):
            node = counts.setdefault(tuple(ids[:k]), [0, 0])
            node[0], node[1] = node[0] + 1, node[1] + right
    nodes = [[counts[tuple(ids[:k])] for k in range(1, len(ids) + 1)] for ids in texts]
    return [[right / count for count, right in row] for row in nodes]


def labels() -> None:
    heading(f"labels of {SOLUTIONS} solutions of {TOKENS} tokens")
    texts, correct = solutions(SOLUTIONS), np.random.default_rng(1).integers(0, 2, SOLUTIONS).tolist()
    start = time.perf_counter()
    token_value_labels(texts, correct)
    seconds = time.perf_counter() - start
    few = texts[:PLAIN], correct[:PLAIN]
    start = time.perf_counter()
    plain = by_dictionary(*few)
    slow = time.perf_counter() - start
    assert token_value_labels(*few) == plain
    rate, slow_rate = SOLUTIONS * TOKENS / seconds, PLAIN * TOKENS / slow
    report("seconds", seconds, "< 1", seconds < 1)
    report("million tokens per second", rate / 1e6, "> 0.5", rate > 5e5)
    report("times the tokens per second of a dictionary of prefixes", rate / slow_rate, "> 1", rate > slow_rate)


def search() -> None:
    heading("search on zoo/reasoner, 4 beams, 16 candidates: tokens fed to both models")
    model, tokenizer = tokenry.load("zoo/reasoner")
    values = TokenValueModel.from_language_model(tokenry.load("zoo/speculator").model, tokenizer).eval()
    options = {"do_sample": True, "temperature": 1.0, "seed": 0}
    for question in QUESTIONS:
        found = step_beam_search((model, tokenizer), values, question, TreeShape(), max_new_tokens=192, **options)
        fed = found.fed + found.value_fed
        print(f"{question}: {fed} tokens fed, {found.written} written, {found.kept} kept, {found.reread} if read again")
        report(
            "tokens fed / tokens if every candidate is read again",
            fed / found.reread,
            "<= 0.5",
            2 * fed <= found.reread,
        )
        report("tokens fed / tokens kept", fed / found.kept, "printed", True)


if __name__ == "__main__":
    labels()
    search()
