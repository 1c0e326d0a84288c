"""How much of a model is left when later tokens run fewer layers, and does training for it bring the rest back?

Texts are read by the model that is given, as it is. Training and its controls are small: the reasoner of the zoo, whose
sums are right or wrong, with its layers twice, one stack on the other. Trained models are kept in the cache folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

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
    SPREAD,
    TEXT_DEPTHS,
    DepthTask,
    EarlyExit,
    RandomLayers,
    depths,
)
from ..measure.training import training
from ..models.anatomy import decoder_layers
from ..models.load import Loaded, load
from ..models.prompts import prompt_ids
from ..train.contract import report_progress
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
BATCH, START, STEPS = 24, (400, 1e-3), (30, 1e-4)  # steps and rate of each arm, and then of each of its trainings
TEXTS = 6
MIX = (*PROBLEM_DEPTHS[1:] * 2, *PROBLEM_DEPTHS[:1])  # average depths of the steps, by turns
FASTER, LOST = 2.0, 0.02  # the claim: times as fast, share of the sums that may be lost
CLOSED = 0.5  # share of the gap that training must close


@experiment("skipdecode", SkipDecode, samples=240, seeds=(0, 1, 2), quick=2, revision=2)
def build(run: Run[SkipDecode]) -> Design:
    """The same cost spent in four ways: the lower middle left out, the top, and two random choices of layers.

    Samples are problems; there are at most 6 texts. The `warmup` of `method` takes the place of 2.
    """
    if run.given.keys() - {"warmup"}:
        others = ", ".join(sorted(run.given.keys() - {"warmup"}))
        raise InputError(f"this comparison sets {others} itself; give warmup alone")
    warmup, count = run.method.warmup if run.method else 2, run.count
    schedules: dict[str, Callable[..., SkipSchedule]] = {
        PLAIN: partial(schedule, SkipSchedule, warmup, plain=True),
        EXIT: partial(schedule, EarlyExit, warmup),
        RANDOM: partial(schedule, RandomLayers, warmup, draw=2),
        OTHER: partial(schedule, RandomLayers, warmup, draw=3),
        SHORT: partial(schedule, SkipSchedule, 1),
        LONG: partial(schedule, SkipSchedule, 4),
        METHOD: partial(schedule, SkipSchedule, warmup),
    }
    deep = stacked(load("zoo/reasoner", device=run.model.device))
    first, steps = run.size(START[0], 2), run.size(STEPS[0], 2)
    starts = {name: Loaded(train(deep, schedules[name], first, START[1], 0), deep.tokenizer) for name in TRAINED}
    models = {
        (name, seed): train(starts[name], schedules[name], steps, STEPS[1], seed)
        for seed in run.seeds
        for name in TRAINED
    }
    roles: dict[str, Role] = {PLAIN: "plain", **dict.fromkeys(CONTROLS, "control")}
    return Design(
        task=DepthTask(run.model, run.tokenizer, deep, run.seeds[0], min(TEXTS, count), count),
        arms=[
            Arm(
                name,
                role=roles.get(name, "method"),
                setting={**describe_schedule(made), "steps": steps},
                apply={"schedule": made, "trained": {s: models[name, s] for s in run.seeds if name in TRAINED}},
            )
            for name, made in schedules.items()
        ],
        baseline=PLAIN,
        on="zoo/reasoner, its layers twice",
        batch=count + TEXTS,
        models={"reasoner": deep.model, **{f"start, {name}": start.model for name, start in starts.items()}},
        notes=f"Texts: the model as it is. Sums: zoo/reasoner with its layers twice, one stack on the other, "
        f"{len(decoder_layers(deep.model))} layers in all, levels {LEVELS[0]} to {LEVELS[-1]}. Depth falls over "
        f"{PLANNED} tokens, from {SPREAD} layer more than the average to {SPREAD} less; the prompt runs as many as the "
        f"first token. Before training each stack is the reasoner, so what is skipped leaves nearly all of it to "
        f"'{METHOD}' and '{EXIT}', and less to random layers. From there each arm is trained with its own schedule, "
        f"'{PLAIN}' at full depth: {first} steps at a rate of {START[1]} once, and {steps} more at {STEPS[1]} for "
        f"every seed. {BATCH} solutions without errors a step, AdamW, a warm-up and a cosine; one step in {len(MIX)} "
        f"is at {MIX[-1]}% and the others at {MIX[0]}%. The numbers are means over seeds; the intervals, which are "
        "over problems, contain no variance of training. Speed is measured by benchmarks/bench_skipdecode.py.",
        tried="On dev problems, at an average depth of 50%, sums solved of 100 or more. Each layer followed by a copy "
        "that adds nothing at first, 400 steps of 32 solutions for an arm alone: all layers .911, skipdecode .244, "
        "random layers .215; 700 steps more at this depth: skipdecode .45. Each layer followed by a copy, both adding "
        "half: .083 with all layers before training. One stack on the other, all schedules by turns, 300 steps of "
        "about 25 solutions at a rate of 1e-3: all layers .865, skipdecode .670, early exit .485, random layers .115 "
        "and .260. About 13 solutions a step at 1.5e-3, after 200 steps (in brackets: about 25 at 1e-3, after 100, for "
        "the same work): all layers .41 (.57), skipdecode .22 (.40), early exit .28 (.32). Depth falls from 7 to 5 "
        "layers and not from 9 to 3, since late tokens of a sum are as hard as early ones; this was not tried. In a "
        "record in which 800 steps with all schedules by turns came before 30 of each arm alone at 1e-3, the main "
        "finding was undecided: skipdecode .603, all layers .646, where on dev they had .773 and .913 before those 30. "
        "Hence each arm is trained alone, and its last steps have a tenth of the rate.",
    )


def schedule(
    kind: type[SkipSchedule],
    warmup: int,
    layers: int,
    average: int,
    prompt: int,
    planned: int,
    spread: int | None = None,
    plain: bool = False,
    **settings: Any,
) -> SkipSchedule:
    """One of this average depth, in percent; see `depths`."""
    most, least = (layers, layers) if plain else depths(layers, average, spread)
    return kind(layers, most, max(warmup + 1, least), warmup, prompt, planned, **settings)


def describe_schedule(made: Callable[..., SkipSchedule]) -> dict[str, Any]:
    """What identifies a schedule in the store."""
    kind, warmup = made.args
    return {"skips": kind.__name__, "warmup": warmup, **made.keywords}


# --- before the comparison -----------------------------------------------------------------------------------------


def stacked(small: Loaded) -> Loaded:
    """A model with its layers twice, one stack on the other: how training of more layers may begin (depth up-scaling,
    arXiv 2312.15166, without overlap)."""
    model, config = small.model, deepcopy(small.model.config)
    config.num_hidden_layers *= 2
    deep = cast(Any, type(model)(config)).to(model.device).eval()
    deep.load_state_dict(model.state_dict(), strict=False)
    decoder_layers(deep)[len(decoder_layers(model)) :].load_state_dict(decoder_layers(model).state_dict())
    return Loaded(deep, small.tokenizer)


def solutions(reasoner: Loaded, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Problems of the training split with a written solution: ids, and labels that leave the question out."""
    tokenizer, rng, rows = reasoner.tokenizer, random.Random("solutions for skipdecode"), []
    for problem in draw_problems(Arithmetic(), count, seed=7 + seed, split="train", levels=LEVELS):
        prompt = prompt_ids(tokenizer, problem.question)
        written = solution(problem, rng, wrong=dict.fromkeys("+-*", 0.0))
        answer = [*tokenizer.encode(written, add_special_tokens=False), tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def train(reasoner: Loaded, made: Callable[..., SkipSchedule], steps: int, rate: float, seed: int) -> PreTrainedModel:
    """The reasoner trained with this schedule; from the cache folder where it has been before."""
    settings = [describe_schedule(made), steps, BATCH, rate, LEVELS, PLANNED, SPREAD, MIX, seed]

    def saving() -> Callable[[Path], Any]:
        with training(f"training, seed {seed}") as (scratch, advance):
            trainer = make_trainer(reasoner, made, steps, rate, seed, scratch)
            report_progress(trainer, advance)
            trainer.train()
        return lambda part: (trainer.model.save_pretrained(part), reasoner.tokenizer.save_pretrained(part))

    folder = built_folder(kept_folder("skipdecode", *reasoner) / digest(settings), saving)
    return load(folder, device=reasoner.model.device).model


def make_trainer(
    reasoner: Loaded, made: Callable[..., SkipSchedule], steps: int, rate: float, seed: int, scratch: str
) -> Any:
    """A trainer of a copy of the reasoner."""
    from datasets import Dataset

    from ..train import SkipDecodeConfig, SkipDecodeTrainer

    config = SkipDecodeConfig(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="group_by_length",
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_list(solutions(reasoner, steps * BATCH, seed))
    trainer = SkipDecodeTrainer(
        deepcopy(reasoner.model), config, train_dataset=rows, processing_class=reasoner.tokenizer
    )
    layers = len(decoder_layers(reasoner.model))
    turns = [made(layers, average, 1, PLANNED, SPREAD) for average in MIX]
    trainer.step_schedule = lambda: turns[trainer.state.global_step % len(turns)]
    return trainer


# --- afterwards ----------------------------------------------------------------------------------------------------


def closed(c: Comparison, arm: str, average: int) -> Contrast:
    """The share of the sums between an arm that is not trained and the plain one that is which its training brings."""
    plain, after = (c.values(name, f"trained_{average}") for name in (PLAIN, arm))
    before = c.values(arm, f"untrained_{average}")
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
    averages = ", ".join(f"{d}%" for d in TEXT_DEPTHS)
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
            f"nats per token at average depths {averages}: "
            + "; ".join(f"{s} " + ", ".join(f"{v:.2f}" for v in values) for s, values in nll.items()),
        ),
    ]
