"""Time to the first token of the second turn of a chat, with its first turn read again and with that reused.

python benchmarks/bench_reuse.py [--tokens 1500] [--clients 16]

On transformers and on llama.cpp, by the server's worker. Then many clients at one time with one system prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time

from common import heading, report

import tokenry
from tokenry.serve.backend import Work
from tokenry.serve.worker import Worker

ROUNDS = 3
ANSWER, QUESTION = 24, 20


class Sides:
    """A worker that reuses and one that reads anew, and how long each takes."""

    def __init__(self, engine: str) -> None:
        loaded = tokenry.load("smollm2", engine=engine)
        self.words = loaded.tokenizer.encode(
            "The keeper of the old lighthouse walks along the shore, and the sea is calm."
        )
        self.workers = {"reused": Worker(loaded, "reused"), "anew": Worker(loaded, "anew", reuse_memory=0)}
        self.random = random.Random(0)

    def tokens(self, count: int) -> list[int]:
        """Some that no text had before."""
        return self.random.choices(self.words, k=count)

    async def first(self, worker: Worker, prompt: list[int]) -> tuple[float, list[int]]:
        """Seconds to the first token, and the ids."""
        start, seconds, ids = time.perf_counter(), 0.0, []
        async for piece in worker.stream(Work(prompt, ANSWER)):
            seconds = seconds or time.perf_counter() - start
            ids += piece.ids
        return seconds, ids

    async def second_turn(self, length: int) -> dict[str, float]:
        """Seconds of each side to the first token of a second turn."""
        prompt, question, found = self.tokens(length), self.tokens(QUESTION), {}
        for name, worker in self.workers.items():
            _, answer = await self.first(worker, prompt)
            found[name], _ = await self.first(worker, prompt + answer + question)
        return found

    async def clients(self, count: int, length: int) -> dict[str, float]:
        """Median seconds of each side to the first tokens of texts that begin alike, all at one time."""
        system, found = self.tokens(length), {}
        prompts = [system + self.tokens(QUESTION) for _ in range(count)]
        for name, worker in self.workers.items():
            texts = await asyncio.gather(*(self.first(worker, prompt) for prompt in prompts))
            found[name] = statistics.median(seconds for seconds, _ in texts)
        return found

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.close(10)


async def measured(engine: str, asked: argparse.Namespace) -> None:
    sides = Sides(engine)
    turns = [await sides.second_turn(asked.tokens) for _ in range(ROUNDS)]
    said = {name: statistics.median(turn[name] for turn in turns) for name in sides.workers}
    print(f"{engine}: {said['anew']:.2f} s anew, {said['reused']:.2f} s reused")
    faster = statistics.median(turn["anew"] / turn["reused"] for turn in turns)
    report(f"{engine}: second turn behind {asked.tokens} tokens, anew / reused", faster, ">= 5", faster >= 5)
    for length in (40, 300):
        rounds = [await sides.clients(asked.clients, length) for _ in range(ROUNDS)]
        faster = statistics.median(one["anew"] / one["reused"] for one in rounds)
        what = f"{engine}: {asked.clients} clients, {length} tokens in common, anew / reused"
        report(what, faster, ">= 0.9", faster >= 0.9)
    await sides.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1500, help="of the first turn")
    parser.add_argument("--clients", type=int, default=16, help="at one time")
    asked = parser.parse_args()
    heading(f"worker, SmolLM2-135M, seconds to the first token, median of {ROUNDS} rounds")
    for engine in ("transformers", "llamacpp"):
        asyncio.run(measured(engine, asked))


if __name__ == "__main__":
    main()
