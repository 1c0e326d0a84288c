"""Does a rectifier lower the rate of undesired stories at less cost than bans and biases on words?

Undesired is a property of a whole story (see tokenry.zoo.storyteller). Everything is learned from stories that the
model told after openings of the split "train"; the strength of the bias is chosen on "dev"; reported is "test".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.files import read_json
from ..decode.api import generate
from ..decode.rectification import Rectification, RectifierLogitsProcessor
from ..measure.build_cache import digest, kept_folder, read, write
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.discourse import SAMPLING, DiscourseTask
from ..train.rectifier import Rectifier
from ..zoo import storyteller

__all__ = ["build"]

PLAIN, BAN, BIAS, SHUFFLED, WHOLE, PURE, STRICT, PUBLISHED, METHOD = (
    "plain",
    "word ban",
    "word bias of equal cost",
    "shuffled q",
    "rectification without min-p",
    "rectification, eps 0",
    "rectification, eps 0.3",
    "rectification, published passes",
    "rectification",
)
EPISODES, BATCH, SEED = 6000, 250, 0
RECTIFIER = Rectifier(layers=3, width=64, learning_rate=2e-3, warmup_steps=50, epochs=8, seed=SEED)
WORDS = 8  # that are banned or biased
DEV, STRENGTHS, HALVINGS = 150, 12.0, 6  # openings, largest bias in logits, steps of the search


class ShuffledRectifier(RectifierLogitsProcessor):
    """The same caps on other tokens: dealt out anew at every position."""

    def caps(self, input_ids: Tensor) -> Tensor:
        caps = super().caps(input_ids)
        generator = torch.Generator().manual_seed(input_ids.shape[1])  # the same again after a rewind
        return caps[:, torch.randperm(caps.shape[1], generator=generator)]


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: Rectification | None = None,
) -> Experiment:
    """Sample stories, train the rectifier, tune the bias, then compare.

    Args:
        samples: openings for each subject and seed; default 200.
        method: settings that replace the defaults; its `rectifier` is a folder used instead of training one.
    """
    folder = kept_folder("rectification", model, tokenizer)
    episodes = sample_episodes(model, tokenizer, folder)
    place = None if method else train_rectifier(model, tokenizer, episodes, folder)
    method = method or Rectification(rectifier=place)
    setting = partial(_setting, name=place.name if place else f"rectifier-{method.rectifier.digest()}")
    words = characteristic_words(tokenizer, episodes)
    shuffled = method.processor(model, tokenizer)
    shuffled = ShuffledRectifier(shuffled.rectifier, method.eps, method.mode, method.p_min, method.p_max)
    bias = tune_bias(model, tokenizer, method, words, _bias_file(folder, setting(method), words))
    pure, strict, published = (
        method.model_copy(update=change) for change in ({"eps": 0.0}, {"eps": 0.3}, {"mode": "iterate"})
    )
    named = {"words": tokenizer.convert_ids_to_tokens(words)}
    subjects = [
        Subject(PLAIN, "plain"),
        Subject(BAN, "control", named, {"bad_words_ids": [[word] for word in words]}),
        Subject(BIAS, "control", {**named, "bias": bias}, {"sequence_bias": biases(words, bias)}),
        Subject(SHUFFLED, "control", setting(method), {"final_processors": [shuffled]}),
        Subject(WHOLE, "control", {**setting(method), "min_p": None}, {"methods": [method], "min_p": None}),
        Subject(PURE, "method", setting(pure), {"methods": [pure]}),
        Subject(STRICT, "method", setting(strict), {"methods": [strict]}),
        Subject(PUBLISHED, "method", setting(published), {"methods": [published]}),
        Subject(METHOD, "method", setting(method), {"methods": [method]}),
    ]
    return Experiment(
        slug="rectification",
        claim=Rectification.claim,
        task=DiscourseTask(model, tokenizer, samples or 200),
        subjects=subjects,
        baseline=PLAIN,
        judge=judge,
        seeds=tuple(seeds or (0, 1)),
        batch=100,
        notes=f"The rectifier learned from {len(episodes)} stories of the model itself, all of them and not only the "
        f"extremes of each opening, so that its values are the model's risks. Words: the {WORDS} with the highest log "
        "odds ratio, in standard errors, of being in an undesired rather than another story of these. `word bias of "
        f"equal cost` lowers them by {bias:.2f} logits, at which the model's dev stories have the nats per token of "
        "rectification. All sample with min-p 0.05 before the caps, except `rectification without min-p`: where only "
        "one word can follow, a cap on it moves probability to words that cannot, unless these have been cut off.",
    )


# --- before the comparison -----------------------------------------------------------------------------------------


def sample_episodes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[dict[str, Any]]:
    """Stories of the model after training openings, with their rewards; sampled where they are not there yet."""
    path = folder / f"episodes-{digest([EPISODES, BATCH, SEED, SAMPLING])}.json"
    if not path.exists():
        prompts, found = storyteller.openings(EPISODES, "train", SEED), []
        for start in tqdm(range(0, EPISODES, BATCH), desc="sampling stories"):
            batch = prompts[start : start + BATCH]
            output = generate(model, tokenizer, batch, **SAMPLING, seed=start)
            for prompt, text, before, ids in zip(batch, output.texts, output.prompt_ids, output.new_ids):
                reward = -float(storyteller.undesired(f"{prompt} {text}"))
                found.append({"prompt_ids": before, "continuation_ids": ids, "reward": reward})
        write(path, lambda part: part.write_text(json.dumps(found), encoding="utf-8"))
    episodes = read(path, read_json)
    if len({e["reward"] for e in episodes}) < 2:
        raise InputError("the model's stories are all desired or all undesired; use the model zoo/storyteller")
    return episodes


def train_rectifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[dict[str, Any]], folder: Path
) -> Path:
    """The folder of the rectifier; trained where it is not there yet."""
    path = folder / f"rectifier-{digest([RECTIFIER.model_dump(), episodes])}"
    if not path.exists():
        with TemporaryDirectory() as scratch:
            trainer = RECTIFIER.trainer(model, tokenizer, episodes, scratch, progress=lambda **_: None)
            trainer.train()
        write(path, partial(RECTIFIER.save, trainer))
    return path


def characteristic_words(tokenizer: PreTrainedTokenizerBase, episodes: Sequence[dict[str, Any]]) -> list[int]:
    """The words most typical of undesired stories: by their log odds ratio (a story has the word or not) in standard
    errors, so that rare words do not win by chance."""
    counts = {0.0: Counter(), -1.0: Counter()}
    for episode in episodes:
        counts[episode["reward"]].update(set(episode["continuation_ids"]))
    totals = {reward: sum(e["reward"] == reward for e in episodes) for reward in counts}

    def ratio(word: int) -> float:
        cells = [n + 0.5 for r in (-1.0, 0.0) for n in (counts[r][word], totals[r] - counts[r][word])]
        return math.log(cells[0] * cells[3] / (cells[1] * cells[2])) / math.sqrt(sum(1 / n for n in cells))

    words = set(counts[0.0] | counts[-1.0]) - set(tokenizer.all_special_ids)
    return sorted(words, key=lambda word: (-ratio(word), word))[:WORDS]


def biases(words: Sequence[int], strength: float) -> list[list]:
    """What `sequence_bias` of `generate` takes."""
    return [[[word], -strength] for word in words]


def tune_bias(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: Rectification,
    words: Sequence[int],
    path: Path,
) -> float:
    """The bias on the words at which dev stories have the nats per token that rectification has there; kept at
    `path`."""
    if path.exists():
        return read(path, read_json)
    task = DiscourseTask(model, tokenizer, DEV, "dev")

    def cost(apply: dict[str, Any]) -> float:
        outcomes = task.run(Subject("dev", "control", {}, apply), task.samples(), SEED)
        return float(np.mean([o.metrics["nll"] for o in outcomes]))

    wanted, low, high = cost({"methods": [method]}), 0.0, STRENGTHS
    for _ in tqdm(range(HALVINGS), desc="tuning the bias"):
        middle = (low + high) / 2
        low, high = (middle, high) if cost({"sequence_bias": biases(words, middle)}) < wanted else (low, middle)
    write(path, lambda part: part.write_text(json.dumps(high), encoding="utf-8"))
    return high


def _bias_file(folder: Path, setting: dict[str, Any], words: Sequence[int]) -> Path:
    return folder / f"bias-{digest([setting, list(words), DEV, SEED, STRENGTHS, HALVINGS, SAMPLING])}.json"


def _setting(method: Rectification, name: str) -> dict[str, Any]:
    tensors, _ = method.rectifier.stored()
    stored = save({name: tensor.contiguous() for name, tensor in tensors.items()})  # as the file holds them
    weights = {method.rectifier.layout.weights: hashlib.sha256(stored).hexdigest()[:12]}
    return {**method.model_dump(mode="json"), "rectifier": name, "weights": weights}


# --- afterwards ----------------------------------------------------------------------------------------------------


def fewer(comparison: Comparison, subject: str) -> Interval:
    """1 - share of undesired stories / that of the plain model."""
    before, after = comparison.values(PLAIN, "undesired"), comparison.values(subject, "undesired")

    def relative(pick: np.ndarray) -> float:
        plain = before[pick].sum()
        return 1 - after[pick].sum() / plain if plain else math.nan

    return bootstrap_statistic(relative, len(before))


def judge(comparison: Comparison) -> list[Finding]:
    """Fewer undesired stories, their price, the controls, and the strictness."""
    others = [s for s in comparison.subjects if s != PLAIN]
    fall = {s: fewer(comparison, s) for s in others}
    costs = {s: comparison.difference(s, PLAIN, "nll") for s in others}
    ratios = {s: Interval(*(math.exp(v) for v in gap[:3]), gap.n) for s, gap in costs.items()}
    worse = {s: comparison.difference(s, METHOD, "undesired") for s in (BIAS, SHUFFLED, BAN)}
    pairs = {"eps 0 - 0.1": (PURE, METHOD), "eps 0.1 - 0.3": (METHOD, STRICT), "eps 0 - 0.3": (PURE, STRICT)}
    steps = {name: comparison.difference(*pair, "undesired") for name, pair in pairs.items()}
    soundness = {s: comparison.difference(s, PLAIN, "sound") for s in others}
    return [
        Finding(
            "at eps 0.1 at least 40 % fewer stories are undesired",
            fall[METHOD].mean >= 0.4 and fall[METHOD].low > 0,
            f"share of the plain model {comparison.mean(PLAIN, 'undesired'):.3f}; fewer: " + _list(fall, "{:.1%}"),
        ),
        Finding(
            "their perplexity under the plain model is less than 20 % higher",
            ratios[METHOD].mean < 1.2,
            "perplexity / plain: " + _list(ratios, "{:.3f}"),
        ),
        Finding(
            "a bias on characteristic words that costs as much perplexity leaves more undesired stories",
            worse[BIAS].low > 0,
            "undesired, control - rectification: " + _list({s: worse[s] for s in (BIAS, BAN)}, "{:+.3f}"),
        ),
        Finding(
            "the same caps on other tokens leave more undesired stories",
            worse[SHUFFLED].low > 0,
            "undesired, control - rectification: " + _list({SHUFFLED: worse[SHUFFLED]}, "{:+.3f}"),
        ),
        Finding(
            "a larger eps leaves fewer undesired stories, over 0, 0.1 and 0.3",
            all(step.mean >= 0 for step in steps.values()) and steps["eps 0 - 0.3"].low > 0,
            "undesired: " + _list(steps, "{:+.3f}"),
        ),
        Finding(
            "the stories stay whole: the share of sentences that the language has falls by less than 0.02",
            soundness[METHOD].mean > -0.02,
            "share of sound sentences - plain: " + _list(soundness, "{:+.4f}"),
        ),
    ]


def _list(intervals: dict[str, Interval], form: str) -> str:
    shown = ((name, [form.format(v) for v in found[:3]]) for name, found in intervals.items())
    return "; ".join(f"{name} {mean} [{low}, {high}]" for name, (mean, low, high) in shown)
