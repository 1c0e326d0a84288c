"""SkipDecode with half of the layers on average, against the plain loop and `generate` in the same rounds.

python benchmarks/bench_skipdecode.py

The prompt runs all layers that are allowed, embedding and unembedding always run: the ratio that the weights read per
new token allow is printed beside.
"""

from __future__ import annotations

from common import heading, interleaved, ratio, report

import tokenry
from tokenry.decode import SkipDecode, encode_prompts, loop
from tokenry.models.anatomy import decoder_layers

NEW_TOKENS, ROUNDS = 64, 7
MODELS = {
    "smollm2": (SkipDecode(target_speedup=2), "Write a story about rain."),
    "zoo/reasoner": (SkipDecode(target_speedup=2), "12+35-8*3="),
}


def expected(model, speedup: float) -> float:
    """Weights of the blocks and the head, over those that are read when `speedup` times fewer blocks run."""
    blocks = sum(p.numel() for p in decoder_layers(model).parameters())
    head = model.get_output_embeddings().weight.numel()
    return (blocks + head) / (blocks / speedup + head)


def rounds(model, tokenizer, method: SkipDecode, prompt: str) -> None:
    inputs = encode_prompts(tokenizer, [prompt])
    options = {**inputs, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    policy = method.plugins(model, tokenizer).layer_policy
    seconds = interleaved(
        {
            "generate": lambda: model.generate(**options),
            "loop": lambda: model.generate(**options, custom_generate=loop),
            "skip": lambda: model.generate(**options, custom_generate=loop, layer_policy=policy),
        },
        ROUNDS,
    )
    for other in ("loop", "generate"):
        found = ratio(seconds, "skip", other)
        report(f"tokens per second, skipdecode / {other}", found, ">= 1.6", found >= 1.6)
    print(f"{'the same, as the weights that are read allow':<78} {expected(model, policy.schedule.speedup()):7.3f}")


def main() -> None:
    for name, (method, prompt) in MODELS.items():
        model, tokenizer = tokenry.load(name)
        heading(f"{name}, {NEW_TOKENS} new tokens, half of the layers on average, median of {ROUNDS} rounds")
        rounds(model, tokenizer, method, prompt)


if __name__ == "__main__":
    main()
