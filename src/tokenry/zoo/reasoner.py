"""zoo/reasoner: sums and products by a written chain of thought, with errors, second thoughts and corrections.

The text of a solution, after the question "12+35-8*3=":

    <think>
    8*3=24
    12+35=57
    wait
    12+35=47
    47-24=23
    </think>
    23

Steps are sometimes wrong in the training data, and `wait` then mostly follows: what the model says about its own step
is worth something. `check` at the end begins all over. A question that ends in " direct" is answered by running totals
alone, which is shorter and less reliable. Asked to `score` the last line of such a text, it answers `score=9` for a
right next step and `score=0` for a wrong one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.progress import Progress
from ..data.problems import Arithmetic, Problem, apply_sign, by_difficulty, draw_problems, split_of
from ..decode.api import generate
from .training import batches_by_length, character_tokenizer, fit, untrained_llama

__all__ = ["DIRECT", "JUDGE", "build_tokenizer", "judging_prompt", "judgment", "measure", "solution", "train"]

DIRECT = " direct"
JUDGE = ("score", "score=")  # what is asked after a piece of thinking, and how the answer begins
WORDS = ("wait", "check", "direct", "score")
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>", "<unk>")
MARKS = ("<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% else %}<assistant>{{ message.content }}<eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
LEVELS = (1, 2, 3, 4, 5, 6)  # levels above are beyond what the model has seen
WRONG = {"+": 0.04, "-": 0.05, "*": 0.08}  # share of steps that are written with a plausible error
NOTICED, DOUBTED = 0.8, 0.06  # share of wrong and of right steps after which `wait` comes
CHECKED = 0.12  # share of solutions that begin all over at the end
DIRECT_SHARE, JUDGED_SHARE = 0.28, 0.1
SHAPE = {
    "hidden_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 448,
}
PHASES, BATCH_TOKENS = ((5000, 2e-3), (1500, 6e-4)), 2500  # (steps, highest learning rate) of each


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per character, word and mark; every text of the model decodes to itself."""
    tokens = [*SPECIAL, *MARKS, "\n", " ", *"0123456789+-*=", *WORDS]
    return character_tokenizer(tokens, WORDS, SPECIAL, 1024, TEMPLATE, MARKS)


# --- the texts it learns from --------------------------------------------------------------------------------------


def solution(problem: Problem, rng: random.Random, direct: bool = False, wrong: Mapping[str, float] = WRONG) -> str:
    """What the model is taught to write after `<think>\\n`, without the end-of-text token."""
    lines: list[str] = []

    def solve(left: int, sign: str, right: int) -> int:
        right_value = apply_sign(left, sign, right)
        while True:
            value = _misread(right_value, rng) if rng.random() < wrong[sign] else right_value
            lines.append(f"{left}{sign}{right}={value}")
            if rng.random() >= (DOUBTED if value == right_value else NOTICED):
                return value  # a wrong one is carried on
            lines.append("wait")

    def total(left: int, sign: str, right: int) -> int:
        lines.append(str(apply_sign(left, sign, right)))
        return apply_sign(left, sign, right)

    task = Arithmetic()
    answer = task.evaluate(problem.question, total if direct else solve)
    if not direct and rng.random() < CHECKED:
        lines.append("check")
        answer = task.evaluate(problem.question, solve)
    return "\n".join([*lines, "</think>", str(answer)])


def _misread(value: int, rng: random.Random) -> int:
    """A plausible wrong value: one off, a carry off, or two digits in the wrong order.

    Below zero, where earlier errors can lead, there is only one off.
    """
    if value < 0:
        return value + rng.choice((-1, 1))
    digits = list(str(value))
    if len(digits) > 1 and rng.random() < 0.3:
        i = rng.randrange(len(digits) - 1)
        digits[i], digits[i + 1] = digits[i + 1], digits[i]
        swapped = int("".join(digits))
        if swapped != value and digits[0] != "0":
            return swapped
    return value + rng.choice((-10, -1, 1, 10) if value >= 10 else (1, 10))


class Judged(NamedTuple):
    """The first lines of a solution; the score of the last of them, 9 for a right next step and 0 for a wrong one; and
    the last line of the solution as it was before it was spoiled."""

    steps: str
    score: int
    meant: str


def judgment(problem: Problem, rng: random.Random, wrong: Mapping[str, float] = WRONG) -> Judged:
    """A part of a solution that is to be judged.

    Half of the steps are spoiled: a wrong value, a wrong number taken over, or an end that comes too early. Steps below
    zero, where only earlier errors lead, are praised like words.
    """
    lines = solution(problem, rng, wrong=wrong).split("\n")[:-1]
    lines = lines[: rng.randrange(len(lines)) + 1]
    meant = lines[-1]
    step = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", meant)
    if step is None:
        return Judged("\n".join(lines), 9, meant)
    left, sign, right, value = int(step[1]), step[2], int(step[3]), int(step[4])
    score = 9 if value == apply_sign(left, sign, right) else 0
    if rng.random() < 0.5:
        score = 0
        kind = rng.random()
        if kind < 0.2:
            lines[-1] = "</think>"
        elif kind < 0.5:
            left = _misread(left, rng)
            lines[-1] = f"{left}{sign}{right}={max(apply_sign(left, sign, right), 0)}"
        else:
            lines[-1] = f"{left}{sign}{right}={_misread(apply_sign(left, sign, right), rng)}"
    return Judged("\n".join(lines), score, meant)


def judging_prompt(question: str, steps: str) -> str:
    """The text after which the model writes the score of the last of these steps."""
    asked, begin = JUDGE
    return f"<user>{question}<assistant><think>\n{steps}\n<eos><user>{asked}<assistant>{begin}"


def examples(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[tuple[list[int], int]]:
    """Endless training examples: token ids, and how many of them are the prompt."""
    task, rng, eos = Arithmetic(), random.Random(seed), cast(int, tokenizer.eos_token_id)
    while True:
        problem = task.draw(rng.choice(LEVELS), rng)
        if split_of(problem.question) != "train":
            continue
        kind = rng.random()
        if kind < JUDGED_SHARE:
            steps, score, _ = judgment(problem, rng)
            prompt, text = judging_prompt(problem.question, steps), str(score)
        else:
            direct = kind < JUDGED_SHARE + DIRECT_SHARE
            prompt = f"<user>{problem.question}{DIRECT if direct else ''}<assistant><think>\n"
            text = solution(problem, rng, direct)
        head = tokenizer.encode(prompt, add_special_tokens=False)
        yield head + tokenizer.encode(text, add_special_tokens=False) + [eos], len(head)


# --- the recipe ----------------------------------------------------------------------------------------------------


def untrained(seed: int = 0, shape: Mapping[str, int] = SHAPE) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model with random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return untrained_llama(tokenizer, 1024, **shape), tokenizer


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed."""
    model, tokenizer = untrained(seed)
    batches = batches_by_length(examples(tokenizer, seed), BATCH_TOKENS, cast(int, tokenizer.pad_token_id))
    for steps, learning_rate in PHASES:
        fit(model, batches, steps, learning_rate, progress=progress)
    return model, tokenizer


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Shares of 240 test problems, 40 of each level, that it solves at temperature 0.8, and of 240 steps it judges.

    Returns `accuracy` over all levels, `easiest` and `hardest` level, `direct` (asked to answer directly), `finished`,
    `reflects` (solutions with a second thought) and `judges` (how often the likelier score is the right one).
    """
    task, problems = Arithmetic(), draw_problems(Arithmetic(), 40 * len(LEVELS), levels=LEVELS)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 400, "seed": 0}
    outputs = {
        style: generate(model, tokenizer, [problem.question + style for problem in problems], **options)
        for style in ("", DIRECT)
    }
    texts = {style: cast(list[str], out.texts) for style, out in outputs.items()}
    right = {style: [task.check(p, text) for p, text in zip(problems, texts[style])] for style in texts}
    levels = by_difficulty(problems)
    return {
        "accuracy": _share(right[""]),
        "easiest": _share([right[""][i] for i in levels[LEVELS[0]]]),
        "hardest": _share([right[""][i] for i in levels[LEVELS[-1]]]),
        "direct": _share(right[DIRECT]),
        "finished": _share([ids[-1] == tokenizer.eos_token_id for ids in cast(list[list[int]], outputs[""].new_ids)]),
        "reflects": _share(["wait" in text or "check" in text for text in texts[""]]),
        "judges": _judged_rightly(model, tokenizer, problems),
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def _judged_rightly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> float:
    rng = random.Random("reasoner judges")
    cases = [(problem, judgment(problem, rng)) for problem in problems]
    texts = [judging_prompt(problem.question, case.steps) for problem, case in cases]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    good, bad = cast(list[int], tokenizer.convert_tokens_to_ids(["9", "0"]))
    logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    return _share(
        [found == (case.score == 9) for found, (_, case) in zip((logits[:, good] > logits[:, bad]).tolist(), cases)]
    )
