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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..core.progress import Progress
from ..data.problems import VerifiableTask, draw_problems, split_of
from ..data.puzzles import EMPTY, PUZZLES
from ..decode.denoising.loop import MaskedDiffusionModel, diffusion_generate
from ..models.prompts import encode_prompts
from ..train.masked_diffusion import masked_diffusion_loss
from .training import batches_by_length, character_tokenizer, fit, untrained_llama

__all__ = ["COURSE", "Course", "build_tokenizer", "examples", "measure", "solved", "teach", "train", "untrained"]

KINDS = ("add ", "sort ", "sudoku ")  # a token each
SPECIAL = ("<pad>", "<eos>", "<mask>", "<unk>")
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
LEVELS = {**{task.name: task.levels for task in PUZZLES}, "sudoku": (4, 6, 8, 10, 12)}  # 14 is beyond what it has seen
EPS = 0.1  # the least share of hidden tokens: fewer are no harder, and their weight would be large
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
}
STEPS, BATCH_TOKENS = 9000, 2000


@dataclass(frozen=True)
class Course:
    """What a denoiser learns from.

    Attributes:
        kinds: the puzzles; shares: of the examples, by puzzle; levels: of each puzzle, by its name.
        widest: the widest window.
        spare: end-of-text tokens after an answer, on average.
        narrow, wide: share of windows that are narrower than the answer, and of any width up to the widest.
    """

    kinds: Sequence[VerifiableTask]
    shares: Sequence[float]
    levels: Mapping[str, Sequence[int]]
    widest: int
    spare: float = 4.0
    narrow: float = 0.08
    wide: float = 0.15

    def width(self, answer: int, rng: random.Random) -> int:
        """A random width of the window for an answer of this length."""
        kind = rng.random()
        if kind < self.narrow:
            return rng.randint(2, answer)
        if kind < self.narrow + self.wide:
            return rng.randint(answer, self.widest)
        return min(self.widest, answer + int(rng.expovariate(1 / self.spare)))


COURSE = Course(PUZZLES, (0.35, 0.35, 0.3), LEVELS, widest=32)


def build_tokenizer(kinds: Sequence[str] = (), characters: str = "") -> PreTrainedTokenizerFast:
    """A token per character and per kind of puzzle; every text of the model decodes to itself.

    Args:
        kinds, characters: those that come after the ones of zoo/denoiser.
    """
    tokens = [*SPECIAL, *KINDS, *"0123456789+=", EMPTY, *kinds, *characters]
    return character_tokenizer(tokens, (*KINDS, *kinds), SPECIAL, 128, TEMPLATE, mask_token="<mask>")


def examples(tokenizer: PreTrainedTokenizerFast, seed: int, course: Course = COURSE) -> Iterator[tuple[list[int], int]]:
    """Endless training examples: ids of prompt and window, and how many of them are the prompt."""
    rng = random.Random(seed)
    vocabulary, eos = tokenizer.get_vocab(), cast(int, tokenizer.eos_token_id)
    while True:
        (task,) = rng.choices(course.kinds, course.shares)
        problem = task.draw(rng.choice(course.levels[task.name]), rng)
        if split_of(problem.question) != "train":
            continue
        kind, rest = problem.question.split(" ")
        prompt = [vocabulary[kind + " "], *(vocabulary[c] for c in rest)]
        answer = [vocabulary[c] for c in problem.answer]
        answer += [eos] * (course.widest - len(answer))
        yield prompt + answer[: course.width(len(problem.answer), rng)], len(prompt)


# --- the recipe ----------------------------------------------------------------------------------------------------


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = untrained(tokenizer)
    teach(model, tokenizer, examples(tokenizer, seed), STEPS, progress=progress)
    return model, tokenizer


def untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A denoiser with random weights."""
    own = {"tie_word_embeddings": False, "is_causal": False, "mask_token_id": tokenizer.mask_token_id}
    return untrained_llama(tokenizer, 128, **own, **SHAPE)


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[tuple[list[int], int]],
    steps: int,
    learning_rate: float = 3e-3,
    progress: Progress | None = None,
) -> None:
    """Train it on so many batches of these examples."""
    batches = batches_by_length(examples, BATCH_TOKENS, cast(int, tokenizer.pad_token_id))
    fit(model, batches, steps, learning_rate, loss=_loss, progress=progress)


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
    """What it has `solved` in windows of 20."""
    return solved(model, tokenizer, COURSE, 20)


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, course: Course, width: int) -> dict[str, float]:
    """Shares of 120 test problems of each puzzle that it solves, one token per step, in windows of this width.

    Returns also `ends`: the share of all answers after which every token is end-of-text.
    """
    denoiser = MaskedDiffusionModel(model, tokenizer)
    found, ends, eos = {}, [], cast(int, tokenizer.eos_token_id)
    for task in course.kinds:
        problems = draw_problems(task, 120, levels=course.levels[task.name])
        inputs = encode_prompts(tokenizer, [problem.question for problem in problems])
        out = diffusion_generate(denoiser, **inputs, gen_length=width, block_length=None, tokenizer=tokenizer)
        right = [task.check(problem, text) for problem, text in zip(problems, cast(list[str], out.texts))]
        found[task.name] = sum(right) / len(right)
        windows, answers = cast(tuple[list[list[int]], list[list[int]]], (out.windows, out.new_ids))
        ends += [set(window[len(ids) :]) == {eos} for window, ids in zip(windows, answers)]
    return {**found, "ends": sum(ends) / len(ends)}
