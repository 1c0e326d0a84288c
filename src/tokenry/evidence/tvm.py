"""Do labels counted over shared prefixes teach more about unfinished solutions than the outcome as label of all tokens?

The reasoner of the zoo draws the solutions. Value models are trained on the same ones from the same weights, with both
kinds of labels, by numbers of samples per question; position alone and random numbers stand beside them. Then both
kinds lead a search, and rank whole solutions, against a plain vote with as many tokens. A small model learns from the
labels how hard a question is, and not which of two steps is wrong; so those that lead the search start from a larger
one, which can tell. What the search itself is able to find is shown by true values: whether all that stands is right.
On a process whose values can be enumerated, the labels are compared with the truth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import auroc
from ..core.hashes import digest
from ..data.problems import Arithmetic, Problem, Split, draw_problems
from ..decode.api import generate
from ..decode.reasoning.tree_search import TreeShape
from ..judge.tvm import TVM
from ..learned.token_values import TokenValueModel
from ..learned.value_labels import prefix_values
from ..measure.build_cache import built_folder, built_json
from ..measure.claims import Contrast, Finding, above, all_of, below, describe
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Arm, Role
from ..measure.tasks.steps import lines_stand
from ..measure.tasks.values import SAMPLING, SHARES, Choice, Drawn, ValuesTask, Verifier
from ..models.load import shared
from ..models.prompts import prompt_ids
from ..train.token_values.solutions import GradedQuestion, ValueExample, shared_tokens, value_examples
from ..train.token_values.trainer import ValueConfig, ValueTrainer
from ..zoo.reasoner import LEVELS

__all__ = ["build"]


class Base(NamedTuple):
    """What a verifier starts from, and how it is trained."""

    name: str
    steps: int
    rate: float


SMALL = Base("zoo/speculator", 64, 1e-3)  # of the same texts as the reasoner: twenty-four of them are trained
CHECKER = Base("zoo/reasoner-2", 96, 1.5e-4)  # tells wrong steps from right ones, as the reasoner itself cannot
QUESTIONS, COUNTS, HELD = 48, (4, 8, 16, 32), 32  # training questions, samples of each, samples of a test question
BATCH, MAX_NEW_TOKENS = 16, 160
SHAPE = TreeShape(beams=2, candidates=8)
POSITION, RANDOM, CHECKED, VOTE = "position only", "random values", "right so far", "majority vote"
TVMS = {n: f"tvm, {n} samples" for n in COUNTS}
OUTCOMES = {n: f"outcome labels, {n} samples" for n in COUNTS}
FEWEST, MOST = COUNTS[0], COUNTS[-1]
LED, LED_OUTCOME = f"tvm, {CHECKER.name}", f"outcome labels, {CHECKER.name}"
TOLD = (*TVMS.values(), *OUTCOMES.values(), LED, LED_OUTCOME, POSITION, RANDOM)
BEST, BEST_OUTCOME = "best of n, tvm", "best of n, outcome labels"
SEARCH, SEARCH_OUTCOME, SEARCH_SMALL, SEARCH_POSITION, SEARCH_RANDOM, SEARCH_CHECKED = (
    f"search, {what}" for what in ("tvm", "outcome labels", f"tvm of {SMALL.name}", POSITION, RANDOM, CHECKED)
)

TRIED = (
    "Learning rate and backbone of the small verifiers were looked at once on dev questions of seed 0 (96 training "
    "questions, 32 samples, one pass: AUROC 0.75 with both kinds of labels). A first run of 6 test questions with 2 "
    "steps was undecided; after it steps went from 96 to 64 and questions from 48 to 40, for time. In a run of 40 "
    "test questions whose search was led by verifiers from zoo/speculator, the search solved 0.41, the best of n "
    "0.57, a vote 0.88. Why was looked into on 36 dev questions, with one training each, at temperature 1 with 2 "
    "beams and 8 candidates. Of the solutions 0.65 are right, a vote for the tokens of a search solves 0.93 to 0.96. "
    "A search by right so far (a wrong last line counted half there) solves 1.00, by random values 0.53 (4 beams, 16 "
    "candidates: 0.61). From zoo/speculator it solves 0.39; the AUROC of whole solutions within questions is 0.47. "
    "From zoo/reasoner (96 steps, rate 5e-4) 0.58, AUROC 0.54: behind its own wrong steps it doubts as often as "
    "behind right ones (AUROC 0.53 of the probability of `wait`), zoo/reasoner-2 tells them apart (0.93). Led by that"
    " doubt itself a search solves 0.75. From zoo/reasoner-2, 48 training questions with 32 samples: 48 steps at 5e-4"
    " 0.61, AUROC 0.71; 192 steps at 5e-4 0.56, 0.70; 48 steps at 1e-3 with cross-entropy AUROC 0.60, search not run;"
    " 96 steps at 1.5e-4 0.67, 0.77, which was chosen. With 192 training questions of 8 samples, 192 steps at 5e-4: "
    "0.53, AUROC 0.57. At temperature 0.7 0.85 of the solutions are right and a vote solves 0.97; the verifier of 192"
    " steps then leads to 0.78 with 4 beams and 16 candidates, 0.81 with 2 and 8."
)


@experiment("tvm", TVM, model="zoo/reasoner", samples=40, seeds=(0, 1, 2), batch=8, quick=6, limit=192, revision=2)
def build(run: Run[TVM]) -> Design:
    """Draw solutions, train every verifier once for each seed, then compare. `method` has no setting that changes a
    number."""
    model, tokenizer, folder = run.model, run.tokenizer, run.folder("tvm")
    backbones = {base: shared(base.name, like=model).model for base in (SMALL, CHECKER)}
    train = problems_of("train", run.size(QUESTIONS, 4))
    test = problems_of("test", run.count)
    learned_from = graded(train, drawn(model, tokenizer, train, folder, "train", MOST), tokenizer)

    def make(base: Base, samples: int, outcome: bool) -> dict[int, Verifier]:
        given = tokenizer, backbones[base], learned_from, folder
        base = base._replace(steps=run.size(base.steps, 2))
        return {seed: trained(*given, base, samples, outcome, seed) for seed in run.seeds}

    verifiers: dict[str, dict[int, Verifier]] = {
        **{TVMS[n]: make(SMALL, n, False) for n in COUNTS},
        **{OUTCOMES[n]: make(SMALL, n, True) for n in COUNTS},
        LED: make(CHECKER, MOST, False),
        LED_OUTCOME: make(CHECKER, MOST, True),
        POSITION: dict.fromkeys(run.seeds, position_table(learned_from)),
        RANDOM: dict.fromkeys(run.seeds, at_random),
    }
    solved = drawn(model, tokenizer, test, folder, "test", run.size(HELD, 8))
    task = ValuesTask(
        model,
        tokenizer,
        Arithmetic(),
        test,
        solved,
        verifiers[LED],
        SHAPE,
        MAX_NEW_TOKENS,
    )
    return Design(
        task=task,
        arms=arms(verifiers, dict.fromkeys(run.seeds, right_so_far(tokenizer, test))),
        baseline=VOTE,
        on="zoo/speculator, trained further",
        models={base.name: backbone for base, backbone in backbones.items()},
        facts={"chain": enumerable_chain()},
        notes=f"{len(train)} training questions; {shared_tokens(learned_from):.0%} of the tokens of their {MOST} "
        f"solutions share their prefix with another solution. Verifiers start from {SMALL.name} and take "
        f"{SMALL.steps} steps of {BATCH} solutions, whatever the number of samples; those that choose answers start "
        f"from {CHECKER.name} and take {CHECKER.steps}. Mean squared error. All draw at temperature 1. Search: "
        f"{SHAPE.beams} beams, {SHAPE.candidates} candidates. Vote and best of n take as many of a problem's {HELD} "
        f"solutions as fit into the tokens that the search led by `{LED}` has fed to both models. `{CHECKED}` is 1 "
        "while every line that was not taken back is right, and 0 behind a wrong one. Of the test solutions "
        f"{np.mean([right for one in solved for right in one.right]):.0%} are right. Three trainings each; a seed of "
        "the comparison is a training.",
        tried=TRIED,
    )


def arms(verifiers: dict[str, dict[int, Verifier]], checked: dict[int, Verifier]) -> list[Arm]:
    """Verifiers that tell the value of prefixes, then what chooses an answer."""
    leaders = {**verifiers, CHECKED: checked}

    def choice(name: str, how: str, verifier: str, role: Role = "control") -> Arm:
        setting = {"how": how, **about(verifier)}
        return Arm(name, role=role, setting=setting, apply=Choice(how, leaders[verifier]))

    return [
        Arm(VOTE, role="plain", setting={"how": "vote"}, apply=Choice("vote")),
        *(
            Arm(name, role="method" if name in (*TVMS.values(), LED) else "control", setting=about(name), apply=one)
            for name, one in verifiers.items()
        ),
        choice(BEST, "best", LED, "method"),
        choice(BEST_OUTCOME, "best", LED_OUTCOME),
        choice(SEARCH, "search", LED, "method"),
        choice(SEARCH_OUTCOME, "search", LED_OUTCOME),
        choice(SEARCH_SMALL, "search", TVMS[MOST]),
        choice(SEARCH_POSITION, "search", POSITION),
        choice(SEARCH_RANDOM, "search", RANDOM),
        choice(SEARCH_CHECKED, "search", CHECKED),
    ]


def about(name: str) -> dict[str, object]:
    """What identifies a verifier: only the trained ones have a base."""
    setting: dict[str, object] = {"verifier": name, "questions": QUESTIONS}
    if name in (POSITION, RANDOM, CHECKED):
        return setting
    base = CHECKER if name in (LED, LED_OUTCOME) else SMALL
    return setting | {"batch": BATCH, "base": base.name, "steps": base.steps, "rate": base.rate}


# --- before the comparison -------------------------------------------------------------------------------------------


def problems_of(split: Split, count: int | None) -> list[Problem]:
    """Sorted by length, so that few rows of a batch wait for the last one."""
    found = draw_problems(Arithmetic(), count or 1, 0, split, LEVELS)
    return sorted(found, key=lambda problem: len(problem.question))


def drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    folder: Path,
    name: str,
    count: int,
    batch: int = 8,
) -> list[Drawn]:
    """`count` solutions to each problem, drawn where they are not kept yet; one that was cut off is wrong."""
    setting = digest([[p.id for p in problems], count, SAMPLING, MAX_NEW_TOKENS])

    def draw() -> list[list[list[int]]]:
        found: list[list[list[int]]] = []
        for first in range(0, len(problems), batch):
            asked = [p.question for p in problems[first : first + batch] for _ in range(count)]
            new = generate(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS, seed=first, **SAMPLING).new_ids
            found += [new[i : i + count] for i in range(0, len(new), count)]
        return found

    kept = built_json(folder / f"{name}-{setting}.json", draw)
    return [graded_one(problem, solutions, tokenizer) for problem, solutions in zip(problems, kept, strict=True)]


def graded_one(problem: Problem, solutions: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> Drawn:
    """The solutions with their answers and grades."""
    answers, right = [], []
    for ids in solutions:
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        ended = ids[-1] == tokenizer.eos_token_id
        answers.append(text.rsplit("</think>", 1)[-1].strip() if ended else None)
        right.append(ended and Arithmetic().check(problem, text))
    return Drawn(solutions, answers, right)


def graded(
    problems: Sequence[Problem], found: Sequence[Drawn], tokenizer: PreTrainedTokenizerBase
) -> list[GradedQuestion]:
    """As the training reads them."""
    return [
        GradedQuestion(prompt_ids(tokenizer, p.question), one.solutions, list(map(float, one.right)))
        for p, one in zip(problems, found)
    ]


def trained(
    tokenizer: PreTrainedTokenizerBase,
    backbone: PreTrainedModel,
    questions: Sequence[GradedQuestion],
    folder: Path,
    base: Base,
    samples: int,
    outcome: bool,
    seed: int,
) -> TokenValueModel:
    """A verifier of the first `samples` solutions to each question; trained where it is not kept yet."""
    setting = digest([[q._asdict() for q in questions], base._asdict(), BATCH, samples, outcome, seed])

    def make() -> Callable[[Path], object]:
        few = [GradedQuestion(q.prompt_ids, q.solutions[:samples], q.correct[:samples]) for q in questions]
        examples = value_examples(few)
        if outcome:
            grades = [grade for q in few for grade in q.correct]
            examples = [with_outcome(example, grade) for example, grade in zip(examples, grades, strict=True)]
        return fitted(tokenizer, backbone, examples, base, seed).save_pretrained

    return TokenValueModel.opened(built_folder(folder / f"verifier-{setting}", make))


def with_outcome(example: ValueExample, grade: float) -> ValueExample:
    """The label of an outcome verifier: the grade of the whole, at every token."""
    return {**example, "labels": [grade] * len(example["labels"])}


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    backbone: PreTrainedModel,
    examples: Sequence[ValueExample],
    base: Base,
    seed: int,
) -> TokenValueModel:
    """A value model after its steps."""
    with TemporaryDirectory() as output:
        options = {"max_steps": base.steps, "learning_rate": base.rate, "seed": seed}
        config = ValueConfig(output, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=BATCH, **options)
        model = TokenValueModel.from_language_model(backbone, tokenizer)
        trainer = ValueTrainer(model, config, examples, processing_class=tokenizer)
        trainer.train()
    return trainer.model.eval()


def position_table(questions: Sequence[GradedQuestion]) -> Verifier:
    """The mean label at each number of tokens, and that of the last one beyond."""
    labels = [row for q in questions for row in prefix_values(q.solutions, q.correct).labels]
    longest = max(map(len, labels))
    table = np.full((len(labels), longest), np.nan)
    for line, row in zip(table, labels):
        line[: len(row)] = row
    means = np.nanmean(table, axis=0).tolist()
    return lambda prompt, ids: means[min(len(ids), longest) - 1]


def at_random(prompt: list[int], ids: list[int]) -> float:
    """A number in [0, 1) that says nothing, the same for the same prefix."""
    return random.Random(repr((prompt, ids))).random()


def right_so_far(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> Verifier:
    """1 while every line that was not taken back is right, and the answer where there is one; else 0."""
    of_prompt = {tuple(prompt_ids(tokenizer, p.question)): p for p in problems}

    def value(prompt: list[int], ids: list[int]) -> float:
        problem, text = of_prompt[tuple(prompt)], str(tokenizer.decode(ids, skip_special_tokens=True))
        *lines, _ = text.split("\n")
        ended = ids[-1:] == [tokenizer.eos_token_id]
        return float(lines_stand(problem.question, lines) and (not ended or Arithmetic().check(problem, text)))

    return value


# --- a process whose values can be enumerated ------------------------------------------------------------------------


def enumerable_chain(depth: int = 6, repeats: int = 100) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Texts of six tokens 0 or 1, each 1 with probability 0.6, right if the last three hold more 1 than 0.

    Returns:
        {samples: squared errors of the labels, and of the outcome as label, to the true values, (repeats,)}.
    """
    rng = np.random.default_rng(0)
    found = {}
    for n in COUNTS:
        errors = []
        for _ in range(repeats):
            texts = (rng.random((n, depth)) < 0.6).astype(int)
            right = texts[:, -3:].sum(1) > 1
            labels = np.array(prefix_values(texts.tolist(), right.astype(float).tolist()).labels)
            truth = np.array([[chain_value(text[: k + 1], depth) for k in range(depth)] for text in texts.tolist()])
            errors.append([((labels - truth) ** 2).mean(), ((right[:, None] - truth) ** 2).mean()])
        first, second = np.array(errors).T
        found[n] = first, second
    return found


def chain_value(prefix: list[int], depth: int, p: float = 0.6) -> float:
    """The probability that a text with this prefix ends right."""
    if len(prefix) == depth:
        return float(sum(prefix[-3:]) > 1)
    return p * chain_value([*prefix, 1], depth) + (1 - p) * chain_value([*prefix, 0], depth)


# --- findings --------------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, chain: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[Finding]:
    """Early prefixes against outcome labels, the controls, ranks, search at equal tokens, the chain."""
    return [
        Finding(
            f"With {FEWEST} samples per question its values of unfinished solutions err less than those of outcome "
            "labels.",
            above(c.gap("brier_early", OUTCOMES[FEWEST], TVMS[FEWEST]), 0),
            main=True,
            note="; ".join(str(c.gap("brier_early", OUTCOMES[n], TVMS[n])) for n in COUNTS[1:]),
        ),
        Finding(
            f"With {MOST} samples they err less than position alone and random values.",
            beats(c, "brier_early", TVMS[MOST], [POSITION, RANDOM]),
        ),
        *(
            Finding(
                f"With {MOST} samples it ranks solutions after {share} % better than position alone.",
                above(auroc_gap(c, TVMS[MOST], POSITION, share), 0),
                note=str(auroc_gap(c, TVMS[MOST], OUTCOMES[MOST], share)),
            )
            for share in SHARES
        ),
        Finding(
            f"From {CHECKER.name} it tells right from wrong solutions to a question better than from {SMALL.name}.",
            above(ranking_gap(c, LED, TVMS[MOST]), 0),
            note=str(ranking_gap(c, LED, LED_OUTCOME)),
        ),
        Finding(
            "Search that is told which lines are right solves more than a vote for the same tokens.",
            above(c.gap("accuracy", SEARCH_CHECKED, VOTE), 0),
        ),
        Finding("Search solves more than a vote for the same tokens.", above(c.gap("accuracy", SEARCH, VOTE), 0)),
        Finding(
            "Search solves more than the best of n for the same tokens.", above(c.gap("accuracy", SEARCH, BEST), 0)
        ),
        Finding(
            f"Search solves more with it than with position alone, random values or values of {SMALL.name}.",
            beats(c, "accuracy", SEARCH, [SEARCH_POSITION, SEARCH_RANDOM, SEARCH_SMALL]),
            note=f"{c.gap('accuracy', SEARCH, SEARCH_OUTCOME)}; {c.gap('accuracy', BEST, BEST_OUTCOME)}",
        ),
        Finding(
            "On a chain whose values can be enumerated, labels err less than outcomes, and less with more samples.",
            all_of(
                below(ratio(chain[FEWEST], f"squared error, labels / outcomes, {FEWEST} samples"), 1),
                below(ratio((chain[MOST][0], chain[FEWEST][0]), f"squared error, {MOST} / {FEWEST} samples"), 0.5),
            ),
        ),
        describe("AUROC by share of the solution and samples per question.", auroc_table(c)),
        describe("AUROC among the solutions to one question.", ranking_table(c)),
        describe("Brier score by share of the solution and samples per question.", brier_table(c)),
    ]


def ratio(pair: tuple[np.ndarray, np.ndarray], what: str) -> Contrast:
    """Of two means over repeats."""
    a, b = pair
    interval = bootstrap_statistic(lambda pick: float(a[pick].mean() / b[pick].mean()), len(a))
    return Contrast(interval, what, ".2f")


def scored(c: Comparison, arm: str) -> list[np.ndarray]:
    """(solutions, shares + 1) of every question: values by share, then whether it is right; all trainings together."""
    details, count = c.details(arm), len(c.samples)
    parts = [[np.array(one["scored"], float) for one in details[i::count]] for i in range(count)]
    return [np.stack(of_question) for of_question in parts]  # (seeds, solutions, shares + 1)


def pooled(questions: Sequence[np.ndarray], pick: np.ndarray, column: int) -> float:
    """AUROC over the solutions of these questions, the mean of the trainings."""
    rows = np.concatenate([questions[i] for i in pick], axis=1)
    return float(np.mean([auroc(one[:, column], one[:, -1]) for one in rows]))


def auroc_gap(c: Comparison, first: str, second: str, share: int) -> Contrast:
    column, a, b = SHARES.index(share), scored(c, first), scored(c, second)
    interval: Interval = bootstrap_statistic(
        lambda pick: pooled(a, pick, column) - pooled(b, pick, column), len(a), 300
    )
    return Contrast(interval, f"AUROC after {share} %, {first} - {second}", "+.3f")


def auroc_table(c: Comparison) -> str:
    def line(arm: str) -> str:
        rows, every = scored(c, arm), np.arange(len(c.samples))
        return f"{arm}: " + ", ".join(f"{s} % {pooled(rows, every, i):.3f}" for i, s in enumerate(SHARES))

    return "; ".join(line(arm) for arm in TOLD)


def ranking(c: Comparison, arm: str) -> np.ndarray:
    """(questions, shares): AUROC among the solutions to each question that are not all right or all wrong, the mean of
    the trainings."""
    mixed = [one for one in scored(c, arm) if 0 < one[0, :, -1].mean() < 1]
    return np.array([[[auroc(v[:, i], v[:, -1]) for i in range(len(SHARES))] for v in one] for one in mixed]).mean(1)


def ranking_gap(c: Comparison, first: str, second: str) -> Contrast:
    """Of whole solutions."""
    gaps = (ranking(c, first) - ranking(c, second))[:, -1]
    interval = bootstrap_statistic(lambda pick: float(gaps[pick].mean()), len(gaps))
    return Contrast(interval, f"AUROC within questions, {first} - {second}", "+.3f")


def ranking_table(c: Comparison) -> str:
    def line(arm: str) -> str:
        return f"{arm}: " + ", ".join(f"{s} % {v:.3f}" for s, v in zip(SHARES, ranking(c, arm).mean(0)))

    return "; ".join(line(arm) for arm in (TVMS[MOST], OUTCOMES[MOST], LED, LED_OUTCOME, POSITION, RANDOM))


def brier_table(c: Comparison) -> str:
    def line(arm: str) -> str:
        return f"{arm}: " + ", ".join(f"{s} % {c.mean(arm, f'brier_{s}'):.3f}" for s in SHARES)

    return "; ".join(line(arm) for arm in TOLD)
