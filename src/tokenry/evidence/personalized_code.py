"""Does a model tuned to one project foretell that project's code better, by more than it does any other code?

SmolLM2 is tuned to Python's `asyncio` in five ways. Another package, `xml`, is the control of what is measured; as many
files of the rest of the library, drawn at random, are the control of what is learned from.
"""

from __future__ import annotations

import copy
import gc
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.corpora import library_files
from ..measure.claims import Contrast, Finding, above, all_of, describe
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.project import CONTROL, PROJECT, ProjectTask, Tuned
from ..measure.training import training
from ..train.personalized_code import PersonalizedCode
from ..train.projects.files import SourceFile, read_project
from ..train.projects.ways import WAYS

__all__ = ["build"]

PLAIN, RANDOM, UNTRAINED = "plain", "custom, random files", "untrained prefix"
METHOD, BLOCK = "custom", "last_block"
NAMES = {PROJECT: "asyncio", CONTROL: "xml"}
LEARNED = 16  # files; the first of them is for validation
STRETCH = 2  # windows of each file that is learned from
WINDOW = 192

Files = Callable[[int], Sequence[SourceFile]]


@experiment("personalized-code", PersonalizedCode, samples=12, seeds=(0, 1, 2), quick=2)
def build(run: Run[PersonalizedCode]) -> Design:
    """Tunes the model six times for each seed, about a minute each. Samples are held-out files of the project, and as
    many of the control; `method` sets what all ways share.
    """
    method = run.settings(PersonalizedCode, window=run.size(WINDOW, 32), batch_size=1, max_epochs=1.0)
    long, count = STRETCH * method.window, run.count
    project, other = (long_files(run.tokenizer, NAMES[side], long) for side in (PROJECT, CONTROL))
    held = {PROJECT: stretches(project[:count], method.window), CONTROL: stretches(other[:count], method.window)}
    kept = project[count : count + run.size(LEARNED, 12)]
    unlike = random_files(run.tokenizer, long, len(kept))

    def of_project(seed: int) -> Sequence[SourceFile]:
        return stretches(random.Random(seed).sample(kept, len(kept)), long, seed)

    def arm(name: str, role: Any = "method", way: str = "", files: Files = of_project, train: bool = True) -> Arm:
        own = method.model_copy(update={"way": way or name})
        setting = {**own.model_dump(mode="json", exclude={"seed"}), "arm": name, "files": [f.name for f in kept]}
        return Arm(name, role=role, setting=setting, apply=partial(tuned, run, own, files, train))

    return Design(
        task=ProjectTask(run.tokenizer, held),
        arms=[
            Arm(PLAIN, role="plain", apply=lambda seed: Tuned(run.model)),
            arm(RANDOM, "control", METHOD, unlike),
            arm(UNTRAINED, "control", "prefix", train=False),
            *(arm(way) for way in WAYS),
        ],
        baseline=PLAIN,
        batch=2 * count,  # one training for all of them
        notes=f"The project is Python's {NAMES[PROJECT]}, the control {NAMES[CONTROL]}; {count} files of each are held "
        f"out and a window of {method.window} tokens of each is measured. {len(kept)} other files of the project are "
        f"learned from, {long} tokens of each, in one pass with one window a step: about {STRETCH * (len(kept) - 1)} "
        "steps, as one file is for validation. That is little, chosen so that eighteen trainings of a model of 135M "
        "weights take under half an hour on one core. Rates are the defaults of each way. A seed draws the stretches, "
        "their order, the file for validation, the random files and the first weights of LoRA. The model has most "
        "likely seen the library before. Seconds are those of one core. Intervals are over files.",
        tried="Sizes and steps were fixed by the time of a step, before anything was measured. A run on two of the "
        "held-out files, with windows of 32 tokens, only tried the code. Rates are those of an earlier run on lib2to3 "
        "with email as the control, one seed.",
    )


def long_files(tokenizer: PreTrainedTokenizerBase, package: str, tokens: int) -> list[SourceFile]:
    """The files of a package that are long enough, in an order that never changes."""
    files = read_project(Path(sysconfig.get_paths()["stdlib"]) / package, tokenizer)
    return [file for file in files if len(file.ids) >= tokens]


def stretches(files: Sequence[SourceFile], tokens: int, seed: int = 0) -> list[SourceFile]:
    """That many tokens of each file, at a random place."""
    found = []
    for name, ids in files:
        start = random.Random(f"{seed} {name}").randrange(len(ids) - tokens + 1)
        found.append(SourceFile(name, ids[start : start + tokens]))
    return found


def random_files(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> Files:
    """Draws stretches of as many files from the library without the project and the control."""
    paths = [path for path, package in library_files().items() if package not in NAMES.values()]

    def drawn(seed: int) -> list[SourceFile]:
        found: list[SourceFile] = []
        for path in random.Random(f"files {seed}").sample(paths, len(paths)):
            ids = tokenizer(path.read_text("utf-8", "replace"), add_special_tokens=False, verbose=False).input_ids
            if len(ids) >= tokens:
                found.append(SourceFile(str(path), ids))
            if len(found) == count:
                break
        return stretches(found, tokens, seed)

    return drawn


def tuned(run: Run[PersonalizedCode], method: PersonalizedCode, files: Files, train: bool, seed: int) -> Tuned:
    """A copy of the model, tuned to these files; without training only with what training begins with."""
    gc.collect()  # the trainer before and its callbacks hold each other, and gigabytes of gradients
    one, model = method.model_copy(update={"seed": seed}), copy.deepcopy(run.model)
    with training(f"{one.way}, seed {seed}") as (scratch, advance):
        trainer = one.trainer(model, run.tokenizer, files(seed), scratch, progress=advance)
        if not train:
            return Tuned(trainer.model.eval(), bytes=one.costs(trainer)["bytes"])
        start = time.process_time()  # others use the machine, too
        trainer.train()
        seconds, costs = time.process_time() - start, one.costs(trainer)
    return Tuned(trainer.model.eval(), seconds, costs["flops"], costs["bytes"])


# --- afterwards ----------------------------------------------------------------------------------------------------


def excess(c: Comparison, arm: str) -> Contrast:
    """Gain at the project, in nats per token, above that at the control."""
    mine, other = (c.values(PLAIN, name) - c.values(arm, name) for name in ("loss", "control_loss"))

    def over(pick: np.ndarray) -> float:
        with warnings.catch_warnings():  # a resample without files of one side is left out
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(np.nanmean(mine[pick]) - np.nanmean(other[pick]))

    sides = [int((~np.isnan(side)).sum()) for side in (mine, other)]
    interval = bootstrap_statistic(over, len(mine))._replace(n=min(sides))
    return Contrast(interval, f"nats gained, project - control, {arm}", "+.3f")


def gain(c: Comparison, arm: str, than: str = PLAIN) -> Contrast:
    """Nats per token that an arm loses less than another, at the project."""
    return Contrast(c.difference(than, arm, "loss"), f"nats gained at the project, {arm} against {than}", "+.3f")


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Gains at the project, above those at the control and of random files; order of the ways; what each costs."""
    ways = [arm for arm in c.arms if arm in WAYS]
    return [
        Finding(
            "The project gains more than another one, of the same language and library, when all weights are tuned.",
            above(excess(c, METHOD), 0),
            main=True,
            note="; ".join(f"{arm} {excess(c, arm).shown}" for arm in (*ways, RANDOM, UNTRAINED) if arm != METHOD),
        ),
        Finding(
            "All five ways foretell held-out files of the project better than the plain model.",
            all_of(*(above(gain(c, way), 0) for way in ways)),
        ),
        Finding(
            "As many random files of the library help the project less than its own.",
            above(gain(c, METHOD, RANDOM), 0),
        ),
        Finding(
            "A trained prefix helps the project more than the text that it begins as.",
            above(gain(c, "prefix", UNTRAINED), 0),
        ),
        Finding(
            "All weights gain more than the last block alone.",
            above(gain(c, METHOD, BLOCK), 0),
            note="; ".join(f"{way} {gain(c, way).shown}" for way in ways),
        ),
        describe("What a project costs.", "; ".join(cost(c, way) for way in ways)),
        describe(
            "Lines that would be completed exactly, at the project.",
            "; ".join(f"{arm} {c.mean(arm, 'exact_match'):.1%}" for arm in c.arms),
        ),
    ]


def cost(c: Comparison, way: str) -> str:
    """A row of the table of costs."""
    loss, seconds, flops, size = (c.mean(way, name) for name in ("loss", "training_seconds", "flops", "bytes"))
    return f"{way} {loss:.3f} nats, {seconds:.0f} s, {flops / 1e12:.1f} TFLOP, {size / 1e6:.1f} MB"
