"""A rectifier that reads along with a cache against one that reads the whole prefix at every step.

python benchmarks/bench_rectification.py
"""

from __future__ import annotations

from common import heading, interleaved, ratio, report
from transformers import LlamaConfig, LlamaModel

import tokenry
from tokenry.decode import encode_prompts, loop
from tokenry.decode.rectification import RectifierLogitsProcessor
from tokenry.learned.dead_end_values import DeadEndValueModel

NEW_TOKENS, ROUNDS = 96, 3
PROMPT = "Write a story about a lighthouse and the man who keeps it. " * 64


class Rereading(RectifierLogitsProcessor):
    """The same caps as the official processor finds them."""

    def _values(self, ids):
        return self.rectifier.q_head(self.rectifier.hidden(ids)[:, -1]).float()


def main() -> None:
    model, tokenizer = tokenry.load()
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    trunk = LlamaModel(LlamaConfig(vocab_size=model.config.vocab_size, **shape))
    rectifier = DeadEndValueModel(trunk).bind(tokenizer).eval()
    inputs = encode_prompts(tokenizer, [PROMPT])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "custom_generate": loop}

    def run(*caps):
        return lambda: model.generate(**inputs, final_processors=caps, **options)

    length = inputs["input_ids"].shape[1]
    heading(f"rectification, SmolLM2-135M, {length} + {NEW_TOKENS} tokens, a rectifier of 4 layers, median of rounds")
    runs = {"none": run(), "cached": run(RectifierLogitsProcessor(rectifier)), "rereading": run(Rereading(rectifier))}
    seconds = interleaved(runs, ROUNDS)
    gain = ratio(seconds, "cached", "rereading")
    report("speed, rectifier with its cache / reading the prefix again", gain, ">= 1.5", gain >= 1.5)
    share = ratio(seconds, "cached", "none")
    report("speed, with the rectifier / without", share, ">= 0.5", share >= 0.5)


if __name__ == "__main__":
    main()
