"""How much of a model is left when later tokens run fewer layers, and does training for it bring the rest back?

Texts are read by the model that is given, as it is. Training and its controls are small: the reasoner of the zoo, whose
sums are right or wrong. Trained models are kept in the cache folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.outputs import write_folder
from ..data.problems import Arithmetic, draw_problems
from ..decode.skipdecode import SkipDecode
from ..hooks.skip_schedule import SkipSchedule
from ..measure.build_cache import digest, kept_folder
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
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
CLOSED = 0.5  # share of the gap that training must close


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: SkipDecode | None = None,
) -> Experiment:
    """The same cost spent in four ways: the lower middle left out, the top, and two random choices of layers.

    Args:
        samples: problems; default 240. There are at most 12 texts.
        seeds: has no effect, nothing is drawn.
        method: its `warmup` takes the place of 2.
    """
    if method is not None and method.model_fields_set - {"warmup"}:
        others = ", ".join(sorted(method.model_fields_set - {"warmup"}))
        raise InputError(f"this comparison sets {others} itself; give warmup alone")
    warmup, count = method.warmup if method else 2, samples or 240
    reasoner = load("zoo/reasoner", device=model.device)
    schedules: dict[str, Callable[..., SkipSchedule]] = {
        PLAIN: partial(schedule, SkipSchedule, warmup, plain=True),
        EXIT: partial(schedule, EarlyExit, warmup),
        RANDOM: partial(schedule, RandomLayers, warmup, draw=2),
        OTHER: partial(schedule, RandomLayers, warmup, draw=3),
        SHORT: partial(schedule, SkipSchedule, 1),
        LONG: partial(schedule, SkipSchedule, 4),
        METHOD: partial(schedule, SkipSchedule, warmup),
    }
    steps = STEPS if samples is None else min(STEPS, samples)
    trained = {name: train(reasoner, schedules[name], steps) for name in TRAINED}
    roles = {PLAIN: "plain", **dict.fromkeys(CONTROLS, "control")}
    subjects = [
        Subject(
            name,
            roles.get(name, "method"),
            describe(made),
            {"schedule": made, "trained": trained.get(name), "problems": name in TRAINED},
        )
        for name, made in schedules.items()
    ]
    return Experiment(
        slug=SkipDecode.slug,
        claim=SkipDecode.claim,
        task=DepthTask(model, tokenizer, reasoner, min(12, count), count),
        subjects=subjects,
        baseline=PLAIN,
        judge=judge,
        batch=count,
        models={"reasoner": reasoner.model},
        notes=f"Texts: the model as it is. Sums: zoo/reasoner, {len(decoder_layers(reasoner.model))} layers, levels "
        f"{LEVELS[0]} to {LEVELS[-1]}, depth planned to fall over {PLANNED} tokens. Training: {steps} steps of {BATCH} "
        f"solutions, AdamW at {RATE}, the smallest depth drawn for every step, for all alike; '{PLAIN}' is trained on "
        "at full depth. Speed is measured by benchmarks/bench_skipdecode.py.",
    )


def schedule(
    kind: type[SkipSchedule],
    warmup: int,
    layers: int,
    average: int,
    prompt: int,
    planned: int,
    plain: bool = False,
    **settings: int,
) -> SkipSchedule:
    """From all layers down to the depth that gives this average, in percent."""
    low = layers if plain else max(warmup + 1, smallest_depth(layers, average))
    return kind(layers, layers, low, warmup, prompt, planned, **settings)


def describe(made: Callable[..., SkipSchedule]) -> dict[str, Any]:
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
    settings = [describe(made), steps, BATCH, RATE, LEVELS, PLANNED, PROBLEM_DEPTHS]
    name = digest(settings)
    folder = kept_folder("skipdecode", *reasoner) / name
    if not folder.exists():
        trainer = make_trainer(reasoner, made, steps)
        trainer.train()
        write_folder(
            folder, lambda part: (trainer.model.save_pretrained(part), reasoner.tokenizer.save_pretrained(part))
        )
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


def closed(comparison: Comparison, subject: str, average: int) -> Interval:
    """The share of what skipping loses of the sums solved that training brings back."""
    plain = comparison.values(PLAIN, f"untrained_{average}")
    before, after = (comparison.values(subject, f"{state}_{average}") for state in ("untrained", "trained"))
    known = np.flatnonzero(~np.isnan(plain))  # texts have no sums

    def share(pick) -> float:
        lost = (plain[known][pick] - before[known][pick]).sum()
        return float((after[known][pick] - before[known][pick]).sum() / lost) if lost > 0 else float("nan")

    return bootstrap_statistic(share, len(known))


def judge(comparison: Comparison) -> list[Finding]:
    """Which layers can go, how fast an untrained model degrades, and what training brings back."""
    mean, least = comparison.mean, PROBLEM_DEPTHS[-1]
    nll = {s: [mean(s, f"nll_{d}") for d in TEXT_DEPTHS] for s in comparison.subjects}
    before = {s: mean(s, f"untrained_{least}") for s in TRAINED}
    after = {s: mean(s, f"trained_{least}") for s in TRAINED}
    back = closed(comparison, METHOD, least)
    ahead = {s: comparison.difference(METHOD, s, f"trained_{least}") for s in CONTROLS}
    saved = {s: comparison.difference(s, METHOD, f"nll_{TEXT_DEPTHS[1]}") for s in (EXIT, SHORT)}
    return [
        Finding(
            f"training closes at least half of the gap to all layers, at an average depth of {least}%",
            back.mean >= CLOSED,
            f"gap closed: {_interval(back, '.0%')}; sums solved before and after: "
            + "; ".join(f"{s} {before[s]:.3f}, {after[s]:.3f}" for s in TRAINED),
        ),
        Finding(
            "equally trained, no random choice of as many layers and no early exit does as well",
            all(gap.low > 0 for gap in ahead.values()),
            "sums solved, skipdecode - " + "; ".join(f"{s} {_interval(gap, '+.3f')}" for s, gap in ahead.items()),
        ),
        Finding(
            "without training, skipping the lower middle is better than leaving out the top, at every depth",
            all(skip < top for skip, top in zip(nll[METHOD], nll[EXIT])),
            f"nats per token at average depths {', '.join(f'{d}%' for d in TEXT_DEPTHS)}: "
            + "; ".join(f"{s} {_numbers(nll[s])}" for s in comparison.subjects)
            + f"; at {TEXT_DEPTHS[1]}%, early exit - skipdecode {_interval(saved[EXIT], '+.2f')}",
        ),
        Finding(
            "an untrained model degrades with every layer that is skipped",
            all(a < b for a, b in zip([nll[PLAIN][0], *nll[METHOD]], nll[METHOD])),
            f"nats per token: all layers {nll[PLAIN][0]:.2f}, skipdecode {_numbers(nll[METHOD])}",
        ),
        Finding(
            "layer 1 is indispensable: a warm-up of 1 is worse by more than 2 nats",
            saved[SHORT].low > 2,
            f"warm-up 1 - skipdecode at {TEXT_DEPTHS[1]}%: {_interval(saved[SHORT], '+.2f')} nats per token",
        ),
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.2f}" for v in values)


def _interval(found: Interval, form: str) -> str:
    mean, low, high = (format(v, form) for v in found[:3])
    return f"{mean} [{low}, {high}]"
