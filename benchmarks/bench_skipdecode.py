"""SkipDecode with half of the layers on average, against the plain loop and `generate` in the same rounds.

python benchmarks/bench_skipdecode.py

The prompt runs all layers that are allowed, embedding and unembedding always run: the ratio that the weights read per
new token allow is printed beside.
"""

from __future__ import annotations

from common import heading, interleaved, ratio, report

import tokenry
from tokenry.decode import SkipDecode, encode_prompts, loop
from tokenry.errors import InputError
from tokenry.hooks import decoder_layers

NEW_TOKENS, ROUNDS = 64, 7
MODELS = {"smollm2": (SkipDecode(target_speedup=2), "Write a story about rain."), "zoo/reasoner": (None, "12+35-8*3=")}


def expected(model, speedup: float) -> float:
    """Weights of the blocks and the head, over those that are read when `speedup` times fewer blocks run."""
    blocks = sum(p.numel() for p in decoder_layers(model).parameters())
    head = model.get_output_embeddings().weight.numel()
    return (blocks + head) / (blocks / speedup + head)


def main() -> None:
    for name, (method, prompt) in MODELS.items():
        try:
            model, tokenizer = tokenry.load(name)
        except InputError as error:
            print(f"\n{error}")
            continue
        # of six layers two are the warm-up, so that a linear way down cannot halve them
        method = method or SkipDecode(e_min=3, schedule="constant")
        inputs = encode_prompts(tokenizer, [prompt])
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

        def skip(method=method, model=model, tokenizer=tokenizer, inputs=inputs, options=options):
            policy = method.plugins(model, tokenizer).layer_policy
            return model.generate(**inputs, custom_generate=loop, layer_policy=policy, **options)

        seconds = interleaved(
            {
                "generate": lambda model=model, inputs=inputs: model.generate(**inputs, **options),
                "loop": lambda model=model, inputs=inputs: model.generate(**inputs, custom_generate=loop, **options),
                "skip": skip,
            },
            ROUNDS,
        )
        layers, columns = len(decoder_layers(model)), inputs["input_ids"].shape[1]
        speedup = method.schedule_for(layers, columns, NEW_TOKENS).speedup()
        heading(f"{name}, {NEW_TOKENS} new tokens, {speedup:.2f} times fewer layers, median of {ROUNDS} rounds")
        for other in ("loop", "generate"):
            found = ratio(seconds, "skip", other)
            report(f"tokens per second, skipdecode / {other}", found, ">= 1.6", found >= 1.6)
        print(f"{'the same, as the weights that are read allow':<78} {expected(model, speedup):7.3f}")


if __name__ == "__main__":
    main()
