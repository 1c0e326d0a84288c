"""Ceilings and verifiers at the vocabulary of SmolLM2, one position at a time, in milliseconds of processor time.

The target is SmolLM2, the drafter an n-gram model of the text so far or the first layers of the target.

python benchmarks/bench_acceptance.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import heading, report

import tokenry
from tokenry.decode import VERIFIERS, optimal_acceptance, sample_drafts
from tokenry.decode.speculation.drafters import make_drafter
from tokenry.decode.speculation.verifiers import SAMPLINGS

TEXT = """The harbour was quiet in the morning. The boats lay side by side, the nets were dry, and the gulls sat on the
wall in a row. An old man walked along the wall, and the gulls did not move. He looked at the boats and at the nets."""
PLACES, DRAFTS, WANTED, SELECTED = 8, 4, 50.0, 5.0


def milliseconds(run: Callable[..., object], *inputs: object) -> float:
    start = time.process_time()
    run(*inputs)
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def rows(drafter: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Target and draft probabilities at places spread over the text."""
    model, tokenizer = tokenry.load()
    ids = tokenizer(TEXT)["input_ids"]
    made = make_drafter(drafter, model, 20 if drafter == "early-exit" else None)
    made.begin(model, 1, True)
    target = model(torch.tensor([ids])).logits[0].softmax(-1)
    places = range(len(ids) // 2, len(ids), len(ids) // 2 // PLACES)
    return [(target[i], made.root([ids[: i + 1]])[0].softmax(-1)) for i in places]


def main() -> None:
    for drafter in ("ngram", "early-exit"):
        pairs = rows(drafter)
        heading(f"{drafter} drafts for SmolLM2, {len(pairs)} positions, {DRAFTS} drafts, vocabulary {len(pairs[0][0])}")
        optimal_acceptance(*pairs[0], DRAFTS, "without")  # warm up
        for scheme in SAMPLINGS:
            found = [milliseconds(optimal_acceptance, p, q, DRAFTS, scheme) for p, q in pairs]
            for what, value in (("median", statistics.median(found)), ("largest", max(found))):
                report(f"ms per position, ceiling {scheme}, {what}", value, f"<= {WANTED:g}", value <= WANTED)
        for name, verifier in VERIFIERS.items():
            found = []
            for p, q in pairs:
                tokens, _ = sample_drafts(q, 1 if name == "single" else DRAFTS, verifier.sampling)
                found.append(milliseconds(verifier.select, p, q, tokens, None))
            value = statistics.median(found)
            report(f"ms per position, select of {name}, median", value, f"<= {SELECTED:g}", value <= SELECTED)


if __name__ == "__main__":
    main()
