"""Many clients for a long time: what the server answers, whether rows are left behind, and how its memory grows.

What rests of texts that are over is no row: it is bounded, and has filled its bound when memory is read first.

python benchmarks/soak_server.py --streams 200 --minutes 10

The server runs in a process of its own, over a port. Clients ask its routes for texts of many kinds, one after the
other; some leave early, some send what has to be refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import heading, report, served

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.families import build, byte_tokenizer

BAD, LEAVING = 0.05, 0.2  # shares of the requests
WARM = 0.25  # of the time passes before memory is read for the first time
MARGIN = 0.03  # growth of memory that is none
RESTING = 8  # MiB that texts may take that are over
REST = 20.0  # seconds in which the rows of those that left are to be free
WORDS = (
    "the keeper walked along a shore and old tower while sea wind seemed to whisper of rain in night 🙂 café".split()
)
BEGINNING = " ".join(WORDS * 2) + ". "  # which many texts have in common
COMPLETIONS, CHAT, KOBOLD = "/v1/completions", "/v1/chat/completions", "/api/extra/generate/stream"
CHATS = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"
REFUSED: list[tuple[str, Any]] = [
    (COMPLETIONS, b'{"prompt": '),
    (COMPLETIONS, {"prompt": 7}),
    (COMPLETIONS, {"prompt": ""}),
    (COMPLETIONS, {"prompt": "the " * 4000}),
    (COMPLETIONS, {"prompt": "sea", "max_tokens": -1}),
    (COMPLETIONS, {"prompt": "sea", "model": "nothing"}),
    (COMPLETIONS, {"prompt": "sea", "banned_regex": "("}),
    (COMPLETIONS, {"prompt": "sea", "logit_bias": {"99999": 1}}),
    (COMPLETIONS, {"prompt": "sea", "methods": [{"name": "antislop", "phrazes": ["x"]}]}),
    (CHAT, {"messages": []}),
    (KOBOLD, {"prompt": "sea", "memory": "x"}),
    ("/v1/nothing", {"prompt": "sea"}),
]


class Clients:
    """What they ask, and what they were answered.

    Attributes:
        counts: answers by status; `left` and `broken` for those that had no end.
        errors: a sentence for every error that a good request was answered with.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random = url, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def run(self, streams: int, seconds: float) -> None:
        """So many at a time, for so long."""
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._one_by_one(client, until) for _ in range(streams)))

    async def _one_by_one(self, client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            bad = self.random.random() < BAD
            path, body = self.random.choice(REFUSED) if bad else self._good()
            try:
                await self._ask(client, path, body, bad)
            except httpx.TransportError as error:
                self.counts["broken"] += 1
                self.errors[repr(error)] += 1

    def _good(self) -> tuple[str, dict[str, Any]]:
        """A request that is to be answered."""
        pick = self.random
        text = pick.choice(("", BEGINNING)) + " ".join(pick.choices(WORDS, k=pick.randint(1, 60)))
        path = pick.choice((COMPLETIONS, COMPLETIONS, CHAT, KOBOLD))
        body: dict[str, Any] = {"max_tokens": pick.randint(1, 64), "temperature": pick.choice((0, 0.7, 1.3))}
        body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
        body |= {"stream": pick.random() < 0.7} if path != KOBOLD else {}
        body |= pick.choice(({}, {"stop": ["e", "the s"]}, {"seed": 7}, {"repetition_penalty": 1.2}))
        body |= pick.choice(({}, {"banned_strings": ["the sea", "a", "🙂"]}, {"banned_regex": "s[a-z]+ t"}))
        if path != KOBOLD:
            body |= pick.choice(
                ({}, {"n": 2}, {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2})
            )
        return path, body

    async def _ask(self, client: httpx.AsyncClient, path: str, body: Any, bad: bool) -> None:
        patience = self.random.uniform(0, 1.5) if not bad and self.random.random() < LEAVING else None
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        try:
            async with asyncio.timeout(patience), client.stream("POST", path, **given) as answer:
                text = (await answer.aread()).decode()
        except TimeoutError:
            self.counts["left"] += 1
            return
        self.counts[str(answer.status_code)] += 1
        if bad and answer.status_code < 400:
            self.errors[f"taken though it is wrong: {path} {str(body)[:60]}"] += 1
        if not bad and (answer.status_code != 200 or '"error":' in text):
            self.errors[text[text.find('{"error"') :][:160]] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50, help="clients at a time")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--model", help="a name or folder (default: a tiny one, made here)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with ExitStack() as stack:
        model = asked.model or tiny(stack.enter_context(tempfile.TemporaryDirectory()))
        soaked(asked, *stack.enter_context(served(model, "--reuse-memory", str(RESTING))))


def tiny(folder: str) -> str:
    """A small random model in a folder."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATS
    tokenizer.save_pretrained(folder)
    build("llama").save_pretrained(folder)
    return folder


def soaked(asked: argparse.Namespace, server: subprocess.Popen[str], url: str) -> None:
    """Let the clients run, and report."""
    heading(f"{asked.streams} streams for {asked.minutes:g} minutes, {BAD:.0%} bad, {LEAVING:.0%} leave early")
    clients, memory, seconds = Clients(url, asked.seed), psutil.Process(server.pid).memory_info, 60 * asked.minutes
    asyncio.run(clients.run(asked.streams, WARM * seconds))
    first = memory().rss
    asyncio.run(clients.run(asked.streams, (1 - WARM) * seconds))
    left = rest(url)
    resting, reused = numbers(url, "resting_bytes", "tokens_reused").values()
    last = memory().rss
    print(f"answers: {json.dumps(dict(sorted(clients.counts.items())))}")
    for error, count in clients.errors.most_common(10):
        print(f"  {count} x {error}")
    print(
        f"memory of the server: {first / 2**20:.1f} MiB after {WARM * seconds:.0f} s, {last / 2**20:.1f} MiB at the end"
    )
    failed = sum(count for status, count in clients.counts.items() if status.startswith("5"))
    broken = clients.counts["broken"]
    report("answers 5xx", failed, "0", failed == 0)
    report("connections that broke", broken, "0", broken == 0)
    report(
        "good requests that had an error, or bad ones that had none", clients.errors.total(), "0", not clients.errors
    )
    for name, value in left.items():
        report(f"{name} when all have gone", value, "0", value == 0)
    report("MiB of texts that rest", resting / 2**20, f"<= {RESTING}", 0 < resting <= RESTING * 2**20)
    report("tokens of prompts that were not read again", reused, "> 0", reused > 0)
    report("memory at the end / after warming up", last / first, f"<= {1 + MARGIN}", last <= (1 + MARGIN) * first)
    server.send_signal(signal.SIGINT)
    report("exit status of the server", server.wait(60), "0", server.returncode == 0)


def rest(url: str) -> dict[str, float]:
    """What is left of the texts when all clients have gone."""
    until = time.monotonic() + REST
    while True:
        left = numbers(url, "running", "waiting", "cache_bytes")
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.2)


def numbers(url: str, *names: str) -> dict[str, float]:
    """What the server counts."""
    page = httpx.get(f"{url}/metrics", timeout=60).text
    return {name: float(re.search(rf"^tokenry_{name} (\S+)", page, re.M)[1]) for name in names}  # type: ignore[index]


if __name__ == "__main__":
    main()
