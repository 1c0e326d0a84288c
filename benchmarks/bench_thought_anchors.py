"""The suppression matrix against a full forward for each sentence, receiver heads against stored maps, shared rollouts.

python benchmarks/bench_thought_anchors.py [--tokens 512] [--sentences 12] [--rounds 3] [--rollouts 8]

So many sentences of the text, evenly spaced, are hidden; receiver heads look at all of them.

The peers run in the same process, in turns: n full forwards with a mask of four dimensions and whole logits; a forward
that stores queries and keys; `generate` once for each rollout.
"""

from __future__ import annotations

import argparse

import torch
from common import heading, interleaved, ratio, report

import tokenry
from tokenry.measure.cost import Meter
from tokenry.models.masks import as_attention_mask
from tokenry.read import generate_rollouts, receiver_heads, segment_sentences, suppressed_kl
from tokenry.trace import SentenceMean

NEW = 24  # tokens of a rollout


def prose(tokenizer, tokens: int) -> str:
    """So many tokens of short sentences."""
    text = " ".join(f"Word number {i} stands on page {3 * i + 1} of the old book." for i in range(tokens))
    return tokenizer.decode(tokenizer(text).input_ids[:tokens])


@torch.no_grad()
def one_by_one(model, ids: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """The same divergences by a full forward for each sentence."""
    time, found = len(ids), []
    plain = (model(ids[None], use_cache=False).logits[0] / 0.6).log_softmax(-1)
    for start, stop in spans:
        mask = torch.ones(time, time).tril().bool()
        mask[stop:, start:stop] = False
        masked = model(ids[None], as_attention_mask(model, mask[None, None]), use_cache=False).logits[0]
        found.append((plain.exp() * (plain - (masked / 0.6).log_softmax(-1))).sum(-1))
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sentences", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=8)
    given = parser.parse_args()
    model, tokenizer = tokenry.load(dtype="float32", device="cpu")
    text = prose(tokenizer, given.tokens)
    ids = tokenizer(text, return_tensors="pt").input_ids
    every = [(s.start, s.stop) for s in segment_sentences(text, tokenizer)]
    spans = every[:: max(1, len(every) // given.sentences)]

    def captured(**kept):
        with tokenry.capture(model, tokenizer, **kept) as cap:
            model(ids, use_cache=False, logits_to_keep=1)
        return cap.trace

    def alone() -> None:
        one = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "pad_token_id": 0}
        for _ in range(given.rollouts):
            model.generate(ids, **one)

    draw = generate_rollouts(model, tokenizer, NEW)
    heading(f"thought anchors, SmolLM2-135M, {ids.shape[1]} tokens, {len(spans)} of {len(every)} sentences hidden")
    apart = (suppressed_kl(model, ids[0], spans) - one_by_one(model, ids[0], spans)).abs().max()
    report("largest difference of divergences", float(apart), "<= 1e-4", apart <= 1e-4)
    runs = {
        "suppression": lambda: suppressed_kl(model, ids[0], spans),
        "forwards": lambda: one_by_one(model, ids[0], spans),
        "heads": lambda: receiver_heads([captured(reducers=[SentenceMean(every)])]),
        "stored": lambda: captured(qk="all"),
        "rollouts": lambda: draw(ids[0].tolist(), given.rollouts),
        "generate": alone,
    }
    seconds = interleaved(runs, given.rounds)
    faster = ratio(seconds, "suppression", "forwards")
    report("suppression matrix: times as fast as n full forwards", faster, ">= 2", faster >= 2)
    slower = ratio(seconds, "stored", "heads")
    report("receiver heads: time by a forward that stores queries and keys", slower, "<= 1.5", slower <= 1.5)
    shared = ratio(seconds, "rollouts", "generate")
    report("rollouts: times as fast as a generate for each", shared, ">= 2", shared >= 2)
    with Meter() as plain:
        model(ids, use_cache=False)
    with Meter() as hidden:
        suppressed_kl(model, ids[0], spans)
    more = hidden.peak_bytes / plain.peak_bytes
    report("suppression matrix: peak memory by a plain forward", more, "<= 1.3", more <= 1.3)


if __name__ == "__main__":
    main()
