"""Prompt lookup against plain decoding and against transformers' own assisted generation, on texts that copy; draft
models; and a model that drafts for itself.

python benchmarks/bench_speculative.py
"""

from __future__ import annotations

import statistics
import time

from common import heading, interleaved, ratio, report

import tokenry
from tokenry.data.problems import Arithmetic, draw_problems
from tokenry.decode import encode_prompts, speculative, tidar_generate

NEW_TOKENS, DRAFT_LENGTH, ROUNDS = 96, 8, 3
CODE = """def read_config(path):
    with open(path) as file:
        lines = file.readlines()
    config = {}
    for line in lines:
        if line.startswith("#"):
            continue
        key, value = line.split("=", 1)
        config[key.strip()] = value.strip()
    return config
"""
TEXT = (
    "The old lighthouse on the northern cliff was built in 1871 by the harbour company of the town. Its lamp could be "
    "seen from thirty kilometres away, and for ninety years a keeper lived in the small house beside it. In 1961 the "
    "lamp was changed to an electric one, and the last keeper moved to the town. Today the lighthouse is a museum, and "
    "about twenty thousand people visit it every year."
)
ORIGINAL = f"Original code:\n```python\n{CODE}```\n\n"
PROMPTS = {  # continued as they are: the model is small, so that the first lines of an edit are given
    "code, a docstring": ORIGINAL
    + 'The same code with a docstring:\n```python\ndef read_config(path):\n    """Read a configuration file."""\n'
    "    with open(path) as file:\n        lines = file.readlines()",
    "code, a new name": ORIGINAL
    + "The same code with another name for the result:\n```python\ndef read_config(path):\n"
    "    with open(path) as file:\n        lines = file.readlines()\n    settings = {}",
    "code, type hints": ORIGINAL
    + "The same code with type hints:\n```python\ndef read_config(path: str) -> dict[str, str]:\n"
    "    with open(path) as file:\n        lines = file.readlines()",
    "text, spelling": f"Text:\n{TEXT}\n\nThe same text with corrected spelling:\n",
    "text, summary": f"Text:\n{TEXT}\n\nSummary with the most important sentences of the text:\n",
}


def main() -> None:
    model, tokenizer = tokenry.load()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    heading(f"speculative decoding, SmolLM2-135M, greedy, {NEW_TOKENS} new tokens, drafts of {DRAFT_LENGTH}")
    ours = {"custom_generate": speculative, "verifier": "single", "num_drafts": 1, "draft_length": DRAFT_LENGTH}
    against_plain, against_theirs = [], []
    for name, prompt in PROMPTS.items():
        inputs = encode_prompts(tokenizer, [prompt], chat=False)
        plain = model.generate(**inputs, **options)
        assert plain.equal(model.generate(**inputs, **ours, **options)), "greedy decoding must not change the text"
        seconds = interleaved(
            {
                "plain": lambda inputs=inputs: model.generate(**inputs, **options),
                "tokenry": lambda inputs=inputs: model.generate(**inputs, **ours, **options),
                "transformers": lambda inputs=inputs: model.generate(
                    **inputs, prompt_lookup_num_tokens=DRAFT_LENGTH, **options
                ),
            },
            ROUNDS,
        )
        against_plain.append(ratio(seconds, "tokenry", "plain"))
        against_theirs.append(ratio(seconds, "tokenry", "transformers"))
        print(f"    {name:<30} {against_plain[-1]:.2f} x plain, {against_theirs[-1]:.2f} x theirs")
    speed = statistics.geometric_mean(against_plain)
    report("prompt lookup / plain, tokens per second, mean of the prompts", speed, ">= 2.0", speed >= 2.0)
    speed = statistics.geometric_mean(against_theirs)
    report("prompt lookup / prompt_lookup_num_tokens", speed, ">= 1.0", speed >= 1.0)
    with_models()
    with_itself()


def with_models() -> None:
    """The same pair of models in both: a draft model of its own size class, sampling at temperature 1."""
    model, tokenizer = tokenry.load("zoo/reasoner")
    drafter, _ = tokenry.load("zoo/drafter")
    problems = draw_problems(Arithmetic(), 8, levels=(6,))
    drafter.generation_config.num_assistant_tokens = 4
    drafter.generation_config.num_assistant_tokens_schedule = "constant"
    options = {"max_new_tokens": 160, "do_sample": True, "top_k": 0}
    ours = {"custom_generate": speculative, "drafter": drafter, "verifier": "single", "num_drafts": 1}
    heading("the pair zoo/reasoner and zoo/drafter, temperature 1, 4 tokens drafted ahead")
    found: dict[str, list[float]] = {"tokenry": [], "transformers": []}
    for problem in problems:
        inputs = encode_prompts(tokenizer, [problem.question])
        for name, more in (("tokenry", ours), ("transformers", {"assistant_model": drafter})):
            for _ in range(ROUNDS):
                start = time.perf_counter()
                out = model.generate(**inputs, **more, **options)
                found[name].append((time.perf_counter() - start) / (out.shape[1] - inputs["input_ids"].shape[1]))
    speed = statistics.median(found["transformers"]) / statistics.median(found["tokenry"])
    report("draft model / assistant_model, tokens per second", speed, ">= 1.0", speed >= 1.0)
    with_itself()


def with_itself() -> None:
    """TiDAR, greedy, against `model.generate` of the same model."""
    model, tokenizer = tokenry.load("zoo/tidar")
    options = {"max_new_tokens": 160, "do_sample": False}
    heading("zoo/tidar, greedy, blocks of 4")
    found = []
    for problem in draw_problems(Arithmetic(), 8, levels=(6,)):
        inputs = encode_prompts(tokenizer, [problem.question])
        runs = {
            "plain": lambda inputs=inputs: model.generate(**inputs, **options),
            "tidar": lambda inputs=inputs: model.generate(**inputs, custom_generate=tidar_generate, **options),
        }
        assert runs["plain"]().equal(runs["tidar"]()), "greedy decoding must not change the text"
        found.append(ratio(interleaved(runs, ROUNDS), "tidar", "plain"))
    speed = statistics.geometric_mean(found)
    report("TiDAR / plain, tokens per second, mean of the problems", speed, ">= 1.5", speed >= 1.5)


if __name__ == "__main__":
    main()
