"""GGUF under the decode loop: against llama.cpp's own greedy loop, against transformers, and with drafts.

python benchmarks/bench_llamacpp.py

Seconds are those of the processor, on one thread, which a busy machine hardly changes; the same in one run for all. For
drafts they are those behind the prompt, which both sides read alike. The F32 file is made of the embedded Q4_1 one and
kept in the cache folder.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import time
from collections.abc import Callable
from typing import Any

from bench_loop import phrases
from common import as_f32, heading, report

import tokenry
from tokenry.decode import Antislop, Spectr, encode_prompts
from tokenry.decode.engines.branches import Entry
from tokenry.decode.engines.llamacpp import Sequences
from tokenry.models.llamacpp.bindings import library

NEW_TOKENS = 64
COPIED = 40  # tokens: then the copy is complete
DRAFTED = 8  # tokens at a time
PROMPT = "Write a story about a lighthouse."
COPYING = (
    "Copy this text: The old lighthouse stood on the cliff, and every evening the keeper climbed the stairs to light "
    "the lamp. One night a ship came near the rocks, and the keeper rang the bell until the ship turned away."
)

SAMPLER = """
struct llama_sampler_chain_params { bool no_perf; };
struct llama_sampler_chain_params llama_sampler_chain_default_params(void);
void * llama_sampler_chain_init(struct llama_sampler_chain_params params);
void llama_sampler_chain_add(void * chain, void * sampler);
void * llama_sampler_init_greedy(void);
llama_token llama_sampler_sample(void * chain, void * ctx, int32_t idx);
void llama_sampler_free(void * chain);
struct llama_batch llama_batch_get_one(llama_token * tokens, int32_t n_tokens);
"""


def own_loop(model: Any, ids: list[int]) -> list[int]:
    """llama.cpp alone: its C functions, fed token by token, the most probable token taken in C."""
    pool = Sequences(model, 1, len(ids) + NEW_TOKENS)
    ffi, lib = pool.ffi, pool.lib
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    block, new = ffi.new("llama_token[]", ids), []
    for _ in range(NEW_TOKENS):
        assert lib.llama_decode(pool.context, lib.llama_batch_get_one(block, len(block))) == 0
        new.append(lib.llama_sampler_sample(chain, pool.context, -1))
        block = ffi.new("llama_token[]", new[-1:])
    lib.llama_sampler_free(chain)
    return new


def seconds_of(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every run, taken in turns, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def faster(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other]))


def several(model: Any, count: int) -> float:
    """What so many tokens of a draft cost in one call, in tokens that are fed one by one."""
    pool = Sequences(model, 1, 4 * count)
    slot = pool.join()
    pool.forward({slot: [1] * count})

    def fed(tokens: int) -> None:
        pool.feed([Entry(1, count + i, (slot,), True) for i in range(tokens)])
        pool.cut(slot, count)

    seconds = seconds_of({"several": lambda: fed(count), "one": lambda: fed(1)}, 9)
    return faster(seconds, "one", "several")


def main() -> None:
    from tokenry.models.load import _embedded_gguf

    library().ffi.cdef(SAMPLER)
    quantized = tokenry.load("smollm2", engine="llamacpp", threads=1)
    full = tokenry.load(as_f32(_embedded_gguf()), threads=1)
    torch_model, tokenizer = tokenry.load()
    ids = encode_prompts(tokenizer, PROMPT)["input_ids"][0].tolist()
    bans = [Antislop(phrases=phrases(8000))]

    def write(model: Any, prompt: str = PROMPT, methods: Any = bans, count: int = NEW_TOKENS) -> Any:
        output = tokenry.generate(model, tokenizer, prompt, methods=methods, max_new_tokens=count)
        assert len(output.new_ids[0]) == count  # with no processor that would keep the end away
        return output

    drafts = [Spectr(num_drafts=1, verifier="single", draft_length=DRAFTED)]
    heading(f"llama.cpp engine, SmolLM2-135M, {NEW_TOKENS} new tokens, processor seconds")
    for name, model, goal in (("Q4_1", quantized.model, 4.0), ("F32", full.model, 2.5)):
        seconds = seconds_of(
            {
                "own": lambda model=model: own_loop(model, ids),
                "loop": lambda model=model: write(model),
                "transformers": lambda: write(torch_model),
                "plain": lambda model=model: write(model, COPYING, (), COPIED),
                "lookup": lambda model=model: write(model, COPYING, drafts, COPIED),
                "prompt": lambda model=model: write(model, COPYING, (), 1),
            },
            3,
        )
        for side in ("plain", "lookup"):
            seconds[side] = [a - b for a, b in zip(seconds[side], seconds["prompt"])]
        ratios = {
            "loop + 8,000 phrases / llama.cpp's own loop": (faster(seconds, "loop", "own"), 0.9),
            "loop + 8,000 phrases / transformers fp32": (faster(seconds, "loop", "transformers"), goal),
            "prompt lookup / plain on a copying prompt": (faster(seconds, "lookup", "plain"), 1.5),
        }
        for what, (value, least) in ratios.items():
            report(f"{name}: {what}, tokens per second", value, f">= {least}", value >= least)
        cost = several(model, DRAFTED + 1)
        print(f"{name + f': what {DRAFTED + 1} tokens in one call cost, in single tokens':<78} {cost:7.3f}", flush=True)


if __name__ == "__main__":
    main()
