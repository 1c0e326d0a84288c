"""The server's worker with many streams against `tokenry.generate` with as many rows in one batch.

python benchmarks/bench_server.py
"""

from __future__ import annotations

import asyncio

from common import heading, interleaved, ratio, report

import tokenry
from tokenry.decode import encode_prompts
from tokenry.serve.backend import Work
from tokenry.serve.worker import Worker

NEW_TOKENS = 48
THINGS = ("a lighthouse", "a fox", "rain", "a clock", "tea", "a map", "ice", "a bell")
PLACES = ("in winter", "at sea", "on a hill, long ago", "in the town where I was born")
PROMPTS = [f"Write a story about {thing} {place}." for place in PLACES for thing in THINGS]


def main() -> None:
    loaded = tokenry.load()
    worker = Worker(loaded)
    ids = [encode_prompts(loaded.tokenizer, prompt)["input_ids"][0].tolist() for prompt in PROMPTS]

    async def one(prompt: list[int]) -> int:
        return sum([len(piece.ids) async for piece in worker.stream(Work(prompt, NEW_TOKENS))])

    async def streams(count: int) -> None:
        await asyncio.gather(*map(one, ids[:count]))

    heading(f"worker, SmolLM2-135M, at most {NEW_TOKENS} new tokens, the same on both sides, median of rounds")
    for count, rounds in ((1, 7), (8, 5), (32, 3)):
        seconds = interleaved(
            {
                "generate": lambda count=count: tokenry.generate(*loaded, PROMPTS[:count], max_new_tokens=NEW_TOKENS),
                "worker": lambda count=count: asyncio.run(streams(count)),
            },
            rounds,
        )
        speed = ratio(seconds, "worker", "generate")
        report(f"tokens per second, worker / generate, {count} streams", speed, ">= 0.9", speed >= 0.9)
    asyncio.run(worker.close(10))


if __name__ == "__main__":
    main()
