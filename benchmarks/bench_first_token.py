"""Time to the first token with many streams: tokenry's server, `transformers serve` and llama.cpp's own server.

python benchmarks/bench_first_token.py

All serve the same weights in float32, each in a process of its own with as many threads, and write the same greedy
texts. The rounds take the servers in turns, each with prompts of its own, as llama.cpp's server remembers those it has
seen; a number is the median of the rounds.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import httpx
from bench_server import PLACES, THINGS
from common import THREADS, as_f32, heading, served
from support.llama_server import llama_server

import tokenry
from tokenry.models.load import _embedded_gguf

KINDS = ("a story", "a poem", "a letter", "a song")  # one for each round, the first to warm up
STREAMS, NEW_TOKENS = 32, 32
STARTS = 180.0  # seconds in which a server has to be there
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of each server
OURS, OURS_GGUF = "tokenry", "tokenry, GGUF"
THEIRS, THEIRS_BATCHED, LLAMA = "transformers serve", "transformers serve, batching", "llama.cpp's server"


class Round(NamedTuple):
    """Seconds to the first token of each stream, seconds of all, characters written."""

    first: list[float]
    seconds: float
    letters: int


@contextmanager
def transformers_server(folder: str, *options: str) -> Iterator[str]:
    """The address of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            yield there(f"http://127.0.0.1:{port}")
        finally:
            server.kill()


def there(url: str) -> str:
    """The address, when the server behind it answers."""
    until = time.monotonic() + STARTS
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return url
        time.sleep(0.5)
    raise SystemExit(f"no server answers at {url}")


async def one(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[float, str]:
    """Seconds to the first text of a stream, and its text."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    body |= {"max_tokens": NEW_TOKENS, "temperature": 0}
    start, first, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line[6:]).get("choices")
            piece = choices[0]["delta"].get("content") if choices else None
            if piece:
                first = first or time.perf_counter() - start
                text += piece
    return first, text


async def streams(url: str, model: str, kind: str) -> tuple[Round, list[str]]:
    prompts = [f"Write {kind} about {thing} {place}." for place in PLACES for thing in THINGS]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        found = await asyncio.gather(*(one(client, model, prompt) for prompt in prompts[:STREAMS]))
        seconds = time.perf_counter() - start
    texts = [text for _, text in found]
    return Round([first for first, _ in found], seconds, sum(map(len, texts))), texts


def main() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for part in tokenry.load():
            part.save_pretrained(folder)
        gguf = str(as_f32(_embedded_gguf()))
        batching = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "2048")
        urls = {name: stack.enter_context(served(what))[1] for name, what in ((OURS, folder), (OURS_GGUF, gguf))}
        theirs = {
            THEIRS: transformers_server(folder),
            THEIRS_BATCHED: transformers_server(folder, *batching),
            LLAMA: llama_server(gguf, context=256 * STREAMS, streams=STREAMS, threads=THREADS),
        }
        urls |= {name: stack.enter_context(server) for name, server in theirs.items()}
        names = dict.fromkeys(urls, folder)
        for name in (OURS, OURS_GGUF, LLAMA):
            names[name] = httpx.get(f"{urls[name]}/v1/models").json()["data"][0]["id"]
        rounds: dict[str, list[Round]] = {name: [] for name in urls}
        texts: dict[str, list[str]] = {}
        for kind in KINDS:
            for name in urls:
                found, texts[name] = asyncio.run(streams(urls[name], names[name], kind))
                if kind != KINDS[0]:
                    rounds[name].append(found)
    heading(f"{STREAMS} streams at once, {NEW_TOKENS} new tokens each, SmolLM2-135M in float32, greedy")
    print(f"{'':<30} {'p50, s':>8} {'p99, s':>8} {'characters/s':>13} {'same texts':>11}   against {OURS}")
    for name, found in rounds.items():
        same = sum(text == ours for text, ours in zip(texts[name], texts[OURS], strict=True))
        p50, p99, speed = numbers(found)
        ours = numbers(rounds[OURS])
        against = f"{p50 / ours[0]:.2f} {p99 / ours[1]:.2f} {speed / ours[2]:.2f}"
        print(f"{name:<30} {p50:8.2f} {p99:8.2f} {speed:13.0f} {same:8d}/{STREAMS}   {against}", flush=True)


def numbers(rounds: list[Round]) -> tuple[float, float, float]:
    """p50 and p99 of the seconds to the first token, and characters per second."""
    cuts = [statistics.quantiles(each.first, n=100, method="inclusive") for each in rounds]
    speed = statistics.median(each.letters / each.seconds for each in rounds)
    return statistics.median(c[49] for c in cuts), statistics.median(c[98] for c in cuts), speed


if __name__ == "__main__":
    main()
