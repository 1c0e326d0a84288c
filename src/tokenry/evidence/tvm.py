"""Do labels counted over shared prefixes teach more about unfinished solutions than the outcome as label of all tokens?

The reasoner of the zoo draws the solutions. Value models are trained on the same ones from the same weights, with both
kinds of labels, by numbers of samples per question; position alone and random numbers stand beside them. Then both
kinds lead a search, and rank whole solutions, against a plain vote with as many tokens. On a process whose values can
be enumerated, the labels are compared with the truth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

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
from ..measure.tasks.values import SAMPLING, SHARES, Choice, Drawn, ValuesTask, Verifier
from ..models.load import shared
from ..models.prompts import prompt_ids
from ..train.token_values.solutions import GradedQuestion, ValueExample, shared_tokens, value_examples
from ..train.token_values.trainer import ValueConfig, ValueTrainer
from ..zoo.reasoner import LEVELS

__all__ = ["build"]

BACKBONE = "zoo/speculator"  # smaller than the reasoner and of the same texts: twenty-four of them are trained
QUESTIONS, COUNTS, HELD = 48, (4, 8, 16, 32), 32  # training questions, samples of each, samples of a test question
BATCH, STEPS, RATE, MAX_NEW_TOKENS = 16, 64, 1e-3, 160  # the same number of steps, whatever the samples
SHAPE = TreeShape(beams=2, candidates=8)
POSITION, RANDOM, VOTE = "position only", "random values", "majority vote"
TVMS = {n: f"tvm, {n} samples" for n in COUNTS}
OUTCOMES = {n: f"outcome labels, {n} samples" for n in COUNTS}
FEWEST, MOST = COUNTS[0], COUNTS[-1]
BEST, BEST_OUTCOME = "best of n, tvm", "best of n, outcome labels"
SEARCH, SEARCH_OUTCOME, SEARCH_POSITION, SEARCH_RANDOM = (
    f"search, {what}" for what in ("tvm", "outcome labels", POSITION, RANDOM)
)


@experiment("tvm", TVM, model="zoo/reasoner", samples=40, seeds=(0, 1, 2), batch=8, quick=6, limit=192)
def build(run: Run[TVM]) -> Design:
    """Draw solutions, train every verifier once for each seed, then compare. `method` has no setting that changes a
    number."""
    model, tokenizer, folder = run.model, run.tokenizer, run.folder("tvm")
    backbone = shared(BACKBONE, like=model).model
    train = problems_of("train", run.size(QUESTIONS, 4))
    test = problems_of("test", run.count)
    learned_from = graded(train, drawn(model, tokenizer, train, folder, "train", MOST), tokenizer)
    make = partial(trained, tokenizer, backbone, learned_from, folder, run.size(STEPS, 2))
    by_position = position_table(learned_from)
    verifiers: dict[str, dict[int, Verifier]] = {
        **{TVMS[n]: {seed: make(n, False, seed) for seed in run.seeds} for n in COUNTS},
        **{OUTCOMES[n]: {seed: make(n, True, seed) for seed in run.seeds} for n in COUNTS},
        POSITION: dict.fromkeys(run.seeds, by_position),
        RANDOM: dict.fromkeys(run.seeds, at_random),
    }
    task = ValuesTask(
        model,
        tokenizer,
        Arithmetic(),
        test,
        drawn(model, tokenizer, test, folder, "test", run.size(HELD, 8)),
        verifiers[TVMS[MOST]],
        SHAPE,
        MAX_NEW_TOKENS,
    )
    return Design(
        task=task,
        arms=arms(verifiers),
        baseline=VOTE,
        models={"backbone": backbone},
        facts={"chain": enumerable_chain()},
        notes=f"{len(train)} training questions; {shared_tokens(learned_from):.0%} of the tokens of their {MOST} "
        f"solutions share their prefix with another solution. Each verifier starts from {BACKBONE} and takes "
        f"{STEPS} steps of {BATCH} solutions, whatever the number of samples; mean squared error. All draw at "
        f"temperature 1. Search: {SHAPE.beams} beams, {SHAPE.candidates} candidates. Vote and best of n take as many "
        f"of a problem's {HELD} solutions as fit into the tokens that the search led by `{TVMS[MOST]}` has fed to both "
        "models. Three trainings each; a seed of the comparison is a training.",
        tried="Learning rate and backbone were looked at once on dev questions of seed 0 (96 training questions, 32 "
        "samples, one pass: AUROC 0.75 with both kinds of labels). A first run of 6 test questions with 2 steps was "
        "undecided; after it steps went from 96 to 64 and questions from 48 to 40, for time.",
    )


def arms(verifiers: dict[str, dict[int, Verifier]]) -> list[Arm]:
    """Verifiers that tell the value of prefixes, then what chooses an answer."""

    def choice(name: str, how: str, verifier: str, role: Role = "control") -> Arm:
        setting = {"how": how, "verifier": verifier}
        return Arm(name, role=role, setting=setting, apply=Choice(how, verifiers[verifier]))

    return [
        Arm(VOTE, role="plain", setting={"how": "vote"}, apply=Choice("vote")),
        *(
            Arm(name, role="method" if name in TVMS.values() else "control", setting=about(name), apply=one)
            for name, one in verifiers.items()
        ),
        choice(BEST, "best", TVMS[MOST], "method"),
        choice(BEST_OUTCOME, "best", OUTCOMES[MOST]),
        choice(SEARCH, "search", TVMS[MOST], "method"),
        choice(SEARCH_OUTCOME, "search", OUTCOMES[MOST]),
        choice(SEARCH_POSITION, "search", POSITION),
        choice(SEARCH_RANDOM, "search", RANDOM),
    ]


def about(name: str) -> dict[str, object]:
    """What identifies a verifier."""
    return {"verifier": name, "questions": QUESTIONS, "steps": STEPS, "batch": BATCH, "rate": RATE, "base": BACKBONE}


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
    steps: int,
    samples: int,
    outcome: bool,
    seed: int,
) -> TokenValueModel:
    """A verifier of the first `samples` solutions to each question; trained where it is not kept yet."""
    setting = digest([[q._asdict() for q in questions], steps, BATCH, RATE, BACKBONE, samples, outcome, seed])

    def make() -> Callable[[Path], object]:
        few = [GradedQuestion(q.prompt_ids, q.solutions[:samples], q.correct[:samples]) for q in questions]
        examples = value_examples(few)
        if outcome:
            grades = [grade for q in few for grade in q.correct]
            examples = [with_outcome(example, grade) for example, grade in zip(examples, grades, strict=True)]
        return fitted(tokenizer, backbone, examples, steps, seed).save_pretrained

    return TokenValueModel.opened(built_folder(folder / f"verifier-{setting}", make))


def with_outcome(example: ValueExample, grade: float) -> ValueExample:
    """The label of an outcome verifier: the grade of the whole, at every token."""
    return {**example, "labels": [grade] * len(example["labels"])}


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    backbone: PreTrainedModel,
    examples: Sequence[ValueExample],
    steps: int,
    seed: int,
) -> TokenValueModel:
    """A value model after so many steps."""
    with TemporaryDirectory() as output:
        options = {"max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "seed": seed}
        config = ValueConfig(output, use_cpu=True, disable_tqdm=True, **options)
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
        Finding("Search solves more than a vote for the same tokens.", above(c.gap("accuracy", SEARCH, VOTE), 0)),
        Finding(
            "Search solves more than the best of n for the same tokens.", above(c.gap("accuracy", SEARCH, BEST), 0)
        ),
        Finding(
            "Search solves more with it than with position alone or random values.",
            beats(c, "accuracy", SEARCH, [SEARCH_POSITION, SEARCH_RANDOM]),
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

    return "; ".join(line(arm) for arm in (*TVMS.values(), *OUTCOMES.values(), POSITION, RANDOM))


def brier_table(c: Comparison) -> str:
    def line(arm: str) -> str:
        return f"{arm}: " + ", ".join(f"{s} % {c.mean(arm, f'brier_{s}'):.3f}" for s in SHARES)

    return "; ".join(line(arm) for arm in (*TVMS.values(), *OUTCOMES.values(), POSITION, RANDOM))
