"""Cost of CompressKV on the embedded model: prefill time with / without, and cache bytes against the budget.

python benchmarks/bench_compresskv.py
"""

from __future__ import annotations

import torch
from common import heading, interleaved, ratio, report
from transformers import DynamicCache

import tokenry
from tokenry.models.kv_cache import cache_bytes
from tokenry.select import CompressKV

LENGTH, BUDGET, ROUNDS = 2048, 128, 9


@torch.no_grad()
def main() -> None:
    model, _ = tokenry.load(dtype="float32")
    ids = torch.randint(0, 40_000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    method = CompressKV(budget=BUDGET)
    held = {}

    def plain() -> None:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held["plain"] = cache_bytes(cache)

    def compressed() -> None:  # opening the context is part of the cost
        cache = DynamicCache(config=model.config)
        with method(model):
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        held["compressed"] = cache_bytes(cache)

    heading(f"CompressKV, SmolLM2-135M, prompt of {LENGTH} tokens, budget {BUDGET}, median of {ROUNDS} rounds")
    cost = ratio(interleaved({"plain": plain, "compressed": compressed}, ROUNDS), "plain", "compressed")
    report("prefill time, with / without", cost, "<= 1.05", cost <= 1.05)
    share = held["compressed"] / (held["plain"] * BUDGET / LENGTH)
    report("cache bytes / bytes of the budget", share, "1 +- 0.01", abs(share - 1) <= 0.01)


if __name__ == "__main__":
    main()
