"""zoo/denoiser: a masked-diffusion model that solves the puzzles of `tokenry.data.puzzles`.

    add 843000+257000=0011<eos><eos><eos>
    sort 4092=0249<eos><eos><eos><eos>
    sudoku 1.3..4.22.4..3.1=1234341221434321<eos>

The window of an answer has a random width. What the answer leaves of it is filled with end-of-text tokens, which the
model is trained on; a window that is too narrow holds the start of the answer. So the model says with the last tokens
of a window whether it is wide enough.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..core.progress import Progress
from ..data.problems import draw_problems, split_of
from ..data.puzzles import EMPTY, PUZZLES
from ..decode.denoising.loop import MaskedDiffusionModel, diffusion_generate
from ..models.prompts import encode_prompts
from ..train.masked_diffusion import masked_diffusion_loss
from .training import batches_by_length, character_tokenizer, fit, untrained_llama

__all__ = ["WIDEST", "build_tokenizer", "measure", "train"]

KINDS = ("add ", "sort ", "sudoku ")  # a token each
SPECIAL = ("<pad>", "<eos>", "<mask>", "<unk>")
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
SHARES = (0.35, 0.35, 0.3)  # of the examples, by puzzle
LEVELS = {**{task.name: task.levels for task in PUZZLES}, "sudoku": (4, 6, 8, 10, 12)}  # 14 is beyond what it has seen
WIDEST = 32  # the widest window in training
SPARE = 4.0  # end-of-text tokens after an answer, on average
NARROW, WIDE = 0.08, 0.15  # share of windows that are narrower than the answer, and of any width up to the widest
EPS = 0.1  # the least share of hidden tokens: fewer are no harder, and their weight would be large
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
}
STEPS, BATCH_TOKENS = 9000, 2000


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character and per kind of puzzle; every text of the model decodes to itself."""
    tokens = [*SPECIAL, *KINDS, *"0123456789+=", EMPTY]
    return character_tokenizer(tokens, KINDS, SPECIAL, 128, TEMPLATE, mask_token="<mask>")


def examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless training examples: ids of prompt and window, and how many of them are the prompt."""
    rng = random.Random(seed)
    vocabulary, eos = tokenizer.get_vocab(), cast(int, tokenizer.eos_token_id)
    while True:
        (task,) = rng.choices(PUZZLES, SHARES)
        problem = task.draw(rng.choice(LEVELS[task.name]), rng)
        if split_of(problem.question) != "train":
            continue
        kind, rest = problem.question.split(" ")
        prompt = [vocabulary[kind + " "], *(vocabulary[c] for c in rest)]
        answer = [vocabulary[c] for c in problem.answer]
        answer += [eos] * (WIDEST - len(answer))
        yield prompt + answer[: _width(len(problem.answer), rng)], len(prompt)


def _width(answer: int, rng: random.Random) -> int:
    """A random width of the window for an answer of this length."""
    kind = rng.random()
    if kind < NARROW:
        return rng.randint(2, answer)
    if kind < NARROW + WIDE:
        return rng.randint(answer, WIDEST)
    return min(WIDEST, answer + int(rng.expovariate(1 / SPARE)))


# --- the recipe ----------------------------------------------------------------------------------------------------


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    own = {"tie_word_embeddings": False, "is_causal": False, "mask_token_id": tokenizer.mask_token_id}
    model = untrained_llama(tokenizer, 128, **own, **SHAPE)
    batches = batches_by_length(examples(tokenizer, seed), BATCH_TOKENS, cast(int, tokenizer.pad_token_id))
    fit(model, batches, STEPS, learning_rate=3e-3, loss=_loss, progress=progress)
    return model, tokenizer


def _loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`labels` are -100 in prompts and padding; the padding is on the right, so the rest before them is the prompt."""
    prompts = (batch["labels"] != -100).long().argmax(1)
    return masked_diffusion_loss(
        model,
        batch["input_ids"],
        model.config.mask_token_id,
        prompt_lengths=prompts,
        attention_mask=batch["attention_mask"],
        eps=EPS,
        stratified=True,
    )


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Shares of 120 test problems of each puzzle that it solves, one token per step, in windows of 20.

    Returns also `ends`: the share of all answers after which every token is end-of-text.
    """
    denoiser = MaskedDiffusionModel(model, tokenizer)
    found, ends, eos = {}, [], cast(int, tokenizer.eos_token_id)
    for task in PUZZLES:
        problems = draw_problems(task, 120, levels=LEVELS[task.name])
        inputs = encode_prompts(tokenizer, [problem.question for problem in problems])
        out = diffusion_generate(denoiser, **inputs, gen_length=20, block_length=None, tokenizer=tokenizer)
        right = [task.check(problem, text) for problem, text in zip(problems, cast(list[str], out.texts))]
        found[task.name] = sum(right) / len(right)
        windows, answers = cast(tuple[list[list[int]], list[list[int]]], (out.windows, out.new_ids))
        ends += [set(window[len(ids) :]) == {eos} for window, ids in zip(windows, answers)]
    return {**found, "ends": sum(ends) / len(ends)}
