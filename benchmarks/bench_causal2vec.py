"""Cost of Causal2Vec (SmolLM2-135M and MiniLM) against the plain decoder's last token on the same texts.

python benchmarks/bench_causal2vec.py
"""

from __future__ import annotations

import torch
from common import heading, interleaved, ratio, report

import tokenry
from tokenry.measure.tasks.sts import load_pairs, spread
from tokenry.represent import Causal2Vec

TEXTS, ROUNDS, GOAL = 96, 7, 1.15


@torch.no_grad()
def main() -> None:
    model, tokenizer = tokenry.load(dtype="float32")
    texts = [pair.first for pair in spread(load_pairs("dev"), TEXTS)]
    plain = Causal2Vec(context="none", pooling="eos").untrained(model, tokenizer)
    method = Causal2Vec().untrained(model, tokenizer)
    heading(f"Causal2Vec, SmolLM2-135M with MiniLM, {TEXTS} sentences of STS-B, median of {ROUNDS} rounds")
    seconds = interleaved({"plain": lambda: plain.encode(texts), "method": lambda: method.encode(texts)}, ROUNDS)
    found = ratio(seconds, "plain", "method")
    report("time with the Contextual token / the plain last token", found, f"<= {GOAL}", found <= GOAL)


if __name__ == "__main__":
    main()
