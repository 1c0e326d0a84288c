"""How much of a model is left when later tokens run fewer layers, and does training for it bring the rest back?

Texts are read by the model that is given, as it is. Training and its controls are small: the reasoner of the zoo, whose
sums are right or wrong. Trained models are kept in the cache folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..data.problems import Arithmetic, draw_problems
from ..decode.skipdecode import SkipDecode
from ..hooks.skip_schedule import SkipSchedule
from ..measure.build_cache import built_folder, digest, kept_folder
from ..measure.claims import Contrast, Finding, above, all_of, at_least, describe, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm, Role
from ..measure.tasks.depth import (
    LEVELS,
    PLANNED,
    PROBLEM_DEPTHS,
    TEXT_DEPTHS,
    DepthTask,
    EarlyExit,
    RandomLayers,
    smallest_depth,
)
from ..models.anatomy import decoder_layers
from ..models.load import Loaded, load
from ..models.prompts import prompt_ids
from ..zoo.reasoner import solution

__all__ = ["build"]

PLAIN, EXIT, RANDOM, OTHER, SHORT, LONG, METHOD = (
    "all layers",
    "early exit",
    "random layers",
    "other random layers",
    "skipdecode, warm-up 1",
    "skipdecode, warm-up 4",
    "skipdecode",
)
CONTROLS = (EXIT, RANDOM, OTHER)
TRAINED = (PLAIN, *CONTROLS, METHOD)
STEPS, BATCH, RATE = 200, 32, 1e-3
FASTER, LOST = 2.0, 0.02  # the claim: times as fast, share of the sums that may be lost
CLOSED = 0.5  # share of the gap that training must close


@experiment("skipdecode", SkipDecode, samples=240, quick=2)
def build(run: Run[SkipDecode]) -> Design:
    """The same cost spent in four ways: the lower middle left out, the top, and two random choices of layers.

    Samples are problems; there are at most 12 texts. Seeds have no effect, nothing is drawn. The `warmup` of `method`
    takes the place of 2.
    """
    if run.given.keys() - {"warmup"}:
        others = ", ".join(sorted(run.given.keys() - {"warmup"}))
        raise InputError(f"this comparison sets {others} itself; give warmup alone")
    warmup, count = run.method.warmup if run.method else 2, run.count
    reasoner = load("zoo/reasoner", device=run.model.device)
    schedules: dict[str, Callable[..., SkipSchedule]] = {
        PLAIN: partial(schedule, SkipSchedule, warmup, plain=True),
        EXIT: partial(schedule, EarlyExit, warmup),
        RANDOM: partial(schedule, RandomLayers, warmup, draw=2),
        OTHER: partial(schedule, RandomLayers, warmup, draw=3),
        SHORT: partial(schedule, SkipSchedule, 1),
        LONG: partial(schedule, SkipSchedule, 4),
        METHOD: partial(schedule, SkipSchedule, warmup),
    }
    steps = min(STEPS, count)
    trained = {name: train(reasoner, schedules[name], steps) for name in TRAINED}
    roles: dict[str, Role] = {PLAIN: "plain", **dict.fromkeys(CONTROLS, "control")}
    return Design(
        task=DepthTask(run.model, run.tokenizer, reasoner, min(12, count), count),
        arms=[
            Arm(
                name,
                role=roles.get(name, "method"),
                setting=describe_schedule(made),
                apply={"schedule": made, "trained": trained.get(name), "problems": name in TRAINED},
            )
            for name, made in schedules.items()
        ],
        baseline=PLAIN,
        batch=count,
        seeds=(0,),
        models={"reasoner": reasoner.model},
        notes=f"Texts: the model as it is. Sums: zoo/reasoner, {len(decoder_layers(reasoner.model))} layers, levels "
        f"{LEVELS[0]} to {LEVELS[-1]}, depth planned to fall over {PLANNED} tokens. Training: {steps} steps of {BATCH} "
        f"solutions, AdamW at {RATE}, the smallest depth drawn for every step, for all alike; '{PLAIN}' is trained on "
        "at full depth. Each schedule is trained once: the intervals do not contain the variance of training. Speed is "
        "measured by benchmarks/bench_skipdecode.py.",
    )


def schedule(
    kind: type[SkipSchedule],
    warmup: int,
    layers: int,
    average: int,
    prompt: int,
    planned: int,
    plain: bool = False,
    **settings: Any,
) -> SkipSchedule:
    """From all layers down to the depth that gives this average, in percent."""
    low = layers if plain else max(warmup + 1, smallest_depth(layers, average))
    return kind(layers, layers, low, warmup, prompt, planned, **settings)


def describe_schedule(made: Callable[..., SkipSchedule]) -> dict[str, Any]:
    """What identifies a schedule in the store."""
    kind, warmup = made.args
    return {"skips": kind.__name__, "warmup": warmup, **made.keywords}


# --- before the comparison -----------------------------------------------------------------------------------------


def solutions(reasoner: Loaded, count: int) -> list[dict[str, list[int]]]:
    """Problems of the training split with a written solution: ids, and labels that leave the question out."""
    tokenizer, rng, rows = reasoner.tokenizer, random.Random("solutions for skipdecode"), []
    for problem in draw_problems(Arithmetic(), count, seed=7, split="train", levels=LEVELS):
        prompt = prompt_ids(tokenizer, problem.question)
        answer = [*tokenizer.encode(solution(problem, rng), add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def train(reasoner: Loaded, made: Callable[..., SkipSchedule], steps: int) -> PreTrainedModel:
    """The reasoner trained with this schedule; from the cache folder where it has been before."""
    settings = [describe_schedule(made), steps, BATCH, RATE, LEVELS, PLANNED, PROBLEM_DEPTHS]

    def saving() -> Callable[[Path], Any]:
        trainer = make_trainer(reasoner, made, steps)
        trainer.train()
        return lambda part: (trainer.model.save_pretrained(part), reasoner.tokenizer.save_pretrained(part))

    folder = built_folder(kept_folder("skipdecode", *reasoner) / digest(settings), saving)
    return load(folder, device=reasoner.model.device).model


def make_trainer(reasoner: Loaded, made: Callable[..., SkipSchedule], steps: int) -> Any:
    """A trainer of a copy of the reasoner, silent and with its files in a folder that goes away."""
    from copy import deepcopy

    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    from ..train import SkipDecodeConfig, SkipDecodeTrainer

    layers = len(decoder_layers(reasoner.model))
    wanted = made(layers, min(PROBLEM_DEPTHS), 1, PLANNED)
    with TemporaryDirectory() as scratch:
        config = SkipDecodeConfig(
            output_dir=str(Path(scratch)),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            warmup_steps=0.1,
            e_min=wanted.e_min,
            warmup=wanted.warmup,
            planned_new_tokens=PLANNED,
            sample_e_min=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = Dataset.from_list(solutions(reasoner, steps * BATCH))
        trainer = SkipDecodeTrainer(
            deepcopy(reasoner.model), config, train_dataset=rows, processing_class=reasoner.tokenizer
        )
    trainer.schedule = wanted  # its layers, which for a control are others
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- afterwards ----------------------------------------------------------------------------------------------------


def closed(c: Comparison, arm: str, average: int) -> Contrast:
    """The share of what skipping loses of the sums solved that training brings back."""
    plain = c.values(PLAIN, f"untrained_{average}")
    before, after = (c.values(arm, f"{state}_{average}") for state in ("untrained", "trained"))
    known = np.flatnonzero(~np.isnan(plain))  # texts have no sums

    def share(pick) -> float:
        lost = (plain[known][pick] - before[known][pick]).sum()
        return float((after[known][pick] - before[known][pick]).sum() / lost) if lost > 0 else float("nan")

    return Contrast(bootstrap_statistic(share, len(known)), f"gap closed, {arm}", ".0%")


def fewer_layers(c: Comparison) -> Contrast:
    """How many times as many layers a token of the plain model runs: the speed that there can be at most."""
    depth = c.values(METHOD, f"depth_{PROBLEM_DEPTHS[-1]}")
    depth = depth[~np.isnan(depth)]  # texts have none
    return Contrast(
        bootstrap_statistic(lambda pick: float(1 / depth[pick].mean()), len(depth)),
        f"layers, {PLAIN} / {METHOD}",
        ".2f",
    )


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Speed and loss, what training brings back, which layers can go, and how fast an untrained model degrades."""
    least, middle = PROBLEM_DEPTHS[-1], f"nll_{TEXT_DEPTHS[1]}"
    solved = "; ".join(
        f"{s} {c.mean(s, f'untrained_{least}'):.3f}, {c.mean(s, f'trained_{least}'):.3f}" for s in TRAINED
    )
    nll = {s: [c.mean(s, f"nll_{d}") for d in TEXT_DEPTHS] for s in c.arms}
    depths = ", ".join(f"{d}%" for d in TEXT_DEPTHS)
    return [
        Finding(
            f"trained for it, it runs one of {FASTER:g} layers at most, and loses {LOST:.0%} of the sums at most",
            all_of(
                at_least(fewer_layers(c), FASTER),
                loses_at_most(c.gap(f"trained_{least}", METHOD, PLAIN), LOST),
            ),
            main=True,
            note=f"sums solved before and after training: {solved}",
        ),
        Finding(
            f"training closes at least half of the gap to all layers, at an average depth of "
            f"{c.mean(METHOD, f'depth_{least}'):.0%}",
            at_least(closed(c, METHOD, least), CLOSED),
            note="; ".join(str(closed(c, arm, least)) for arm in CONTROLS),
        ),
        Finding(
            "equally trained, no random choice of as many layers and no early exit does as well",
            beats(c, f"trained_{least}", METHOD, CONTROLS),
        ),
        Finding(
            "without training, skipping the lower middle is better than leaving out the top, at every depth",
            all_of(*(above(c.gap(f"nll_{d}", EXIT, METHOD, "+.2f"), 0) for d in TEXT_DEPTHS)),
        ),
        Finding(
            "layer 1 is indispensable: a warm-up of 1 is worse by more than 2 nats",
            above(c.gap(middle, SHORT, METHOD, "+.2f"), 2),
        ),
        describe(
            "an untrained model degrades with the layers that are skipped",
            f"nats per token at average depths {depths}: "
            + "; ".join(f"{s} " + ", ".join(f"{v:.2f}" for v in values) for s, values in nll.items()),
        ),
    ]
