"""The decode loop against `model.generate`, and Antislop with thousands of phrases against the loop without.

python benchmarks/bench_loop.py
"""

from __future__ import annotations

import random

from common import heading, interleaved, ratio, report

import tokenry
from tokenry.decode import PhraseBan, encode_prompts, loop

NEW_TOKENS = 64
THINGS = ("a lighthouse", "a fox", "rain", "a clock", "tea", "a map", "ice", "a bell")
PROMPTS = [f"Write a story about {thing}." for thing in THINGS]


def phrases(count: int) -> list[str]:
    """Phrases of two to five made-up words that no model writes."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))

    return [" ".join(["qz" + word(), *(word() for _ in range(rng.randint(1, 4)))]) for _ in range(count)]


def main() -> None:
    model, tokenizer = tokenry.load()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    heading(f"decode loop, SmolLM2-135M, {NEW_TOKENS} new tokens, median of rounds")
    for batch, rounds in ((1, 9), (8, 7)):
        inputs = encode_prompts(tokenizer, PROMPTS[:batch])
        seconds = interleaved(
            {
                "generate": lambda inputs=inputs: model.generate(**inputs, **options),
                "loop": lambda inputs=inputs: model.generate(**inputs, custom_generate=loop, **options),
            },
            rounds,
        )
        speed = ratio(seconds, "loop", "generate")
        report(f"tokens per second, loop / generate, batch {batch}", speed, ">= 0.97", speed >= 0.97)

    inputs = encode_prompts(tokenizer, PROMPTS[:1])
    for count in (1000, 8000):
        monitors = [PhraseBan(phrases(count))]
        seconds = interleaved(
            {
                "without": lambda: model.generate(**inputs, custom_generate=loop, **options),
                "with": lambda monitors=monitors: model.generate(
                    **inputs, custom_generate=loop, monitors=monitors, processing_class=tokenizer, **options
                ),
            },
            9,
        )
        speed = ratio(seconds, "with", "without")
        report(f"tokens per second, {count} phrases / none, batch 1", speed, ">= 0.95", speed >= 0.95)


if __name__ == "__main__":
    main()
