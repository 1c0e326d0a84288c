"""zoo/reasoner-2: zoo/reasoner, deeper and wider, and taught to check its own steps.

It learns on from the reasoner's weights, with lessons of the same kind, of which more ask for a judgment. Whether
`wait` follows a step, and the score of one, are few tokens among many: their loss weighs more. In the texts that are to
be judged more steps are wrong, and only what comes behind the steps is learned, so that it sees many errors and does
not learn to make them.

A step can only be checked where it is known what was written and what should have been. The reasoner knows the latter
in its last layers, but by then little is left of the former: what its layers write is a hundred times as large as what
tokens bring along. So the states are wider here, by numbers that no old layer reads or writes and that hold the token.
While it learns, two linear readers say what the new layers should find in numbers that are taken over or computed:
which digit should stand here, which one does, and whether the number is wrong so far. They are not part of the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.progress import Progress
from ..data.problems import Arithmetic, Problem, apply_sign, draw_problems, split_of
from ..decode.api import generate
from ..models.batch import right_padded
from ..models.load import load
from . import reasoner
from .reasoner import DIRECT, LEVELS, SHAPE, WRONG, judging_prompt, judgment, solution
from .training import batches_by_length, fit

__all__ = ["measure", "train"]

START, EXTRA, ADDED = "zoo/reasoner", 32, 3  # numbers more in every hidden state, and layers more
LOUD = 10.0  # how much the norms of the new layers make of these numbers
DIRECT_SHARE = 0.1
WRONG_WEIGHT = 3.0  # of wrong digits, of which there are fewer, where readers learn
SPOILED = dict.fromkeys(WRONG, 0.35)  # share of wrong steps in texts that are to be judged
BATCH_TOKENS = 1200
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")
PROBLEMS, MAX_NEW_TOKENS, ROWS = 480, 256, 80  # on which doubts are counted, and how many of them at a time


class Phase(NamedTuple):
    """A part of the training: steps, learning rate, share of the texts that are to be judged, and the weight of tokens
    behind a step and of scores; others weigh 1."""

    steps: int
    learning_rate: float
    judged: float
    weight: float


PHASES = (Phase(5000, 1e-3, 0.7, 12.0), Phase(1500, 4e-4, 0.25, 3.0))  # to check steps, then to solve as before


# --- what it learns ------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What an example teaches: the weight of each of its tokens, and the number with which its last step should begin,
    empty where that is not to be judged."""

    weights: list[float]
    number: str


def examples(
    tokenizer: PreTrainedTokenizerBase, seed: int, phase: Phase = PHASES[0]
) -> Iterator[tuple[list[int], Lesson]]:
    """Endless training examples: token ids, and what they teach."""
    task, rng, eos = Arithmetic(), random.Random(seed), cast(int, tokenizer.eos_token_id)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    while True:
        problem = task.draw(rng.choice(LEVELS), rng)
        if split_of(problem.question) != "train":
            continue
        kind, number = rng.random(), ""
        judged, direct = kind < phase.judged, phase.judged <= kind < phase.judged + DIRECT_SHARE
        prompt = f"<user>{problem.question}{DIRECT if direct else ''}<assistant><think>\n"
        if judged:
            steps, score, meant = judgment(problem, rng, SPOILED)
            before, _, last = steps.rpartition("\n")
            step = STEP.fullmatch(meant)
            number = step[1] if step and STEP.fullmatch(last) else ""
            read = encode(prompt + before)  # the last one may be none that can follow
            prompt, text = judging_prompt(problem.question, steps), str(score)
        else:
            text = solution(problem, rng, direct)
            read = encode(prompt + text)
        head, tail = encode(prompt), [*encode(text), eos]
        weights = [0.0] * len(head) + [1.0] * len(tail)
        for place in behind_steps(tokenizer, read) + [len(head)] * judged:
            weights[place] = phase.weight
        yield head + tail, Lesson(weights, number)


def behind_steps(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The places of the first tokens of lines behind a step, where `wait` may stand."""
    think, line, equals = cast(list[int], tokenizer.convert_tokens_to_ids(["<think>", "\n", "="]))
    places, step = [], False
    for i in range(ids.index(think) + 1, len(ids)):
        if ids[i - 1] == line:
            places += [i] * step
            step = False
        step |= ids[i] == equals
    return places


class Digit(NamedTuple):
    """A digit of a step: its place, which one it is, which one should stand there (-100: none that is known), and
    whether its number is wrong up to here."""

    place: int
    stands: int
    should: int
    wrong: bool


def written_digits(tokens: Sequence[str], number: str = "") -> list[Digit]:
    """The digits of the first numbers and of the values of all steps in a text.

    A step is taken to begin with the right number, but the last one, if it should begin with `number`.
    """
    steps, start = [], 0
    for end, token in enumerate(tokens):
        if token == "\n" or end == len(tokens) - 1:
            step = STEP.fullmatch("".join(tokens[start:end]))
            steps += [(start, step)] if step else []
            start = end + 1
    found = []
    for i, (start, step) in enumerate(steps):
        last = i == len(steps) - 1
        value = str(apply_sign(int(step[1]), step[2], int(step[3])))
        found += compared(step[1], number if last and number else step[1], start)
        found += compared(step[4], value, start + step.start(4))
    return found


def compared(number: str, right: str, start: int) -> Iterator[Digit]:
    """The digits of a number that begins at the place `start`, beside those of the right one."""
    for i, digit in enumerate(number):
        begun = number[:i] == right[:i] and i < len(right) and right[0] != "-"
        wrong = number[: i + 1] != right[: i + 1]
        yield Digit(start + i, int(digit), int(right[i]) if begun else -100, wrong)


class Taught(nn.Module):
    """The model with its readers: `digits` behind the first new layer, `errors` behind the second."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.model, self.digits, self.errors = model, nn.Linear(width, 20), nn.Linear(width, 1)
        self.tokens = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))

    def collate(self, batch: Sequence[tuple[list[int], Lesson]], pad_id: int) -> dict[str, Tensor]:
        """A right-padded batch: `input_ids` and `weights` (batch, time), 0 for padding, and `digits` (digits, 5), the
        row of each and what `Digit` says."""
        ids, _ = right_padded([ids for ids, _ in batch], pad_id)
        weights, digits = torch.zeros(ids.shape), []
        for row, (line, lesson) in enumerate(batch):
            weights[row, : len(line)] = torch.tensor(lesson.weights)
            digits += [(row, *one) for one in written_digits([self.tokens[i] for i in line], lesson.number)]
        return {"input_ids": ids, "weights": weights, "digits": torch.tensor(digits, dtype=torch.long).view(-1, 5)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted mean of the loss of next tokens, and what the readers miss. Nothing looks ahead to the padding,
        which needs no mask."""
        output = self.model(batch["input_ids"], use_cache=False, output_hidden_states=True)
        missed = self._missed(batch["digits"], *output.hidden_states[SHAPE["num_hidden_layers"] + 1 :][:2])
        return next_token_loss(output.logits, batch) + missed

    def _missed(self, digits: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What the readers do not find in the states (batch, time, width) behind the first two new layers."""
        if not len(digits):
            return first.new_zeros(())
        row, place, stands, should, wrong = digits.unbind(1)
        said = self.digits(scaled(first[row, place]))
        erred = self.errors(scaled(second[row, place]))[:, 0]
        return (
            cross_entropy(said[:, :10], should)
            + cross_entropy(said[:, 10:], stands)
            + binary_cross_entropy_with_logits(erred, wrong.float(), pos_weight=torch.tensor(WRONG_WEIGHT))
        )


def next_token_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the next tokens of their loss, weighted."""
    ids, weights = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def scaled(states: Tensor) -> Tensor:
    """States (..., width) of root mean square 1."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


# --- the recipe ----------------------------------------------------------------------------------------------------


def untrained(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reasoner, wider and deeper, which writes almost the same as before."""
    start, tokenizer = load(START, device="cpu")
    width, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    shape = {**SHAPE, "hidden_size": width + EXTRA, "num_hidden_layers": layers + ADDED}
    model, _ = reasoner.untrained(seed, {**shape, "head_dim": width // SHAPE["num_attention_heads"]})
    old, wider = start.state_dict(), (width / (width + EXTRA)) ** 0.5
    with torch.no_grad():
        for name, weights in model.state_dict().items():
            if name in old:
                widen(weights, old[name])
                weights *= wider if name.endswith("norm.weight") else 1  # it divides by the mean over more numbers now
        tokens = cast(Tensor, model.get_input_embeddings().weight)
        size = tokens[:, :width].square().mean(-1).sqrt().mean()
        tokens[:, width:] = torch.randint(0, 2, (len(tokens), EXTRA)).float() * 2 - 1
        first = model.model.layers[0].input_layernorm.weight  # the one that sees nothing but tokens
        first[:width] *= ((width * size**2 + EXTRA) / width).sqrt() / size
        for layer in model.model.layers[layers:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.input_layernorm.weight[width:] = LOUD
            layer.post_attention_layernorm.weight[width:] = LOUD
    return model, tokenizer


def widen(wide: Tensor, narrow: Tensor) -> None:
    """Copy the weights, and leave what is new at zero."""
    wide.zero_()
    wide[tuple(map(slice, narrow.shape))] = narrow


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Teach it from the seed, with examples that the reasoner has not had."""
    model, tokenizer = untrained(seed)
    pad = cast(int, tokenizer.pad_token_id)
    for number, phase in enumerate(PHASES, seed + 1):
        taught = Taught(model, tokenizer)  # with new readers
        batches = batches_by_length(examples(tokenizer, number, phase), BATCH_TOKENS, pad, collate=taught.collate)
        fit(taught, batches, phase.steps, phase.learning_rate, loss=Taught.loss, progress=progress)
    return model, tokenizer


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """What zoo/reasoner is measured by, and `doubts` on test problems."""
    problems = draw_problems(Arithmetic(), PROBLEMS, levels=LEVELS)
    return reasoner.measure(model, cast(PreTrainedTokenizerFast, tokenizer)) | doubts(model, tokenizer, problems)


def doubts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> dict[str, float]:
    """How it doubts the steps that it writes at temperature 0.8.

    Returns `errs`, the share of steps with a wrong value; `doubts_wrong` and `doubts_right`, the shares of wrong and of
    right ones that `wait` follows; `doubts_ratio` of these two; and `mends`, the share of doubted wrong steps that are
    right when they are done again.
    """
    found = [step for text in written(model, tokenizer, problems) for step in doubted(text)]
    wrong = [step for step in found if not step[0]]
    right = [doubt for good, doubt, _ in found if good]
    again = [after for _, doubt, after in wrong if doubt]
    shares = {"doubts_wrong": mean([doubt for _, doubt, _ in wrong]), "doubts_right": mean(right)}
    ratio = shares["doubts_wrong"] / max(shares["doubts_right"], 1 / max(1, len(right)))
    return {"errs": len(wrong) / len(found), **shares, "doubts_ratio": ratio, "mends": mean(again)}


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[str]:
    """The solutions that it draws for these problems."""
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": MAX_NEW_TOKENS}
    questions = [problem.question for problem in problems]
    batches = (questions[start : start + ROWS] for start in range(0, len(questions), ROWS))
    outputs = [generate(model, tokenizer, batch, seed=i, **options) for i, batch in enumerate(batches)]
    return [text for output in outputs for text in cast(list[str], output.texts)]


def doubted(text: str) -> list[tuple[bool, bool, bool]]:
    """Of every step that a line follows: whether its value is right, whether `wait` follows, and whether then a step
    with a right value does."""
    lines = text.split("\n")
    marks = [rightly(line) for line in lines] + [None]
    return [
        (mark, lines[i + 1] == "wait", lines[i + 1] == "wait" and bool(marks[i + 2]))
        for i, mark in enumerate(marks[: len(lines) - 1])
        if mark is not None
    ]


def rightly(line: str) -> bool | None:
    """Whether the value of a step is right; None for another line."""
    step = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", line)
    return step and int(step[4]) == apply_sign(int(step[1]), step[2], int(step[3]))


def mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
