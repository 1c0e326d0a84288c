"""UQAC's second pass, which computes what its variations share once, against a plain batched forward of all of them.

python benchmarks/bench_uqac.py
"""

from __future__ import annotations

import torch
from common import heading, interleaved, ratio

import tokenry
from tokenry.read import UQAC
from tokenry.read.chains.variations import chosen_logprobs, variations
from tokenry.trace.trace import Trace

PROMPT, RESPONSE, ROUNDS = 64, 128, 3
TEXT = "A lighthouse keeper counts the ships that pass: 12 in the morning, 7 at noon, and 31 in the night. " * 40


def main() -> None:
    loaded = tokenry.load()
    model, tokenizer = loaded
    ids = torch.tensor(tokenizer.encode(TEXT)[: PROMPT + RESPONSE])
    method = UQAC()
    span = (len(ids) - 4, len(ids) - 1)
    found = method.trace_ids(ids, PROMPT, loaded)
    trace = Trace(found.tensors, found.header, model)
    everywhere = method.kept(trace, span, method.attention_chain(trace, span))
    heading(f"uqac, SmolLM2-135M, {PROMPT} + {RESPONSE} tokens, median of rounds")
    for name, kept in (
        ("as found", everywhere),
        ("near the end", [len(ids) - 5 - 3 * n for n in range(10)]),
        ("from the first token of the response on", [PROMPT + 12 * n for n in range(10)]),
    ):
        compared(model, trace, kept, span, name, method)


def compared(model, trace: Trace, kept: list[int], span: tuple[int, int], name: str, method: UQAC) -> None:
    """One line: the speed of the shared pass, and that both give the same."""
    made = variations(trace, kept, method.n_candidates, method.ensemble_k, 0.0)
    places = sorted({*range(*span), *kept})

    @torch.no_grad()
    def plain() -> torch.Tensor:
        rows = torch.tensor(places) - 1
        logits = model(made.to(model.device), use_cache=False, logits_to_keep=rows.to(model.device)).logits
        return logits.float().log_softmax(-1).gather(-1, made[:, places].to(logits.device)[..., None])[..., 0].cpu()

    def shared() -> torch.Tensor:
        return chosen_logprobs(model, trace, made, places)

    assert torch.allclose(plain(), shared(), atol=1e-3)
    gain = ratio(interleaved({"shared": shared, "plain": plain}, ROUNDS), "shared", "plain")
    print(f"{f'times as fast as plain, {len(made)} sequences, kept {name}':<78} {gain:7.3f}", flush=True)


if __name__ == "__main__":
    main()
