"""Does a rectifier lower the rate of undesired stories at less cost than bans and biases on words?

Undesired is a property of a whole story (see tokenry.zoo.storyteller). Everything is learned from stories that the
model told after openings of the split "train"; the strength of the bias is chosen on "dev"; reported is "test".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..decode.api import generate
from ..decode.rectification import Rectification, RectifierLogitsProcessor
from ..measure.build_cache import built_json, digest, write
from ..measure.claims import Contrast, Finding, above, all_of, at_least, below, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
from ..measure.tasks.discourse import SAMPLING, DiscourseTask
from ..train.rectifier import Rectifier
from ..zoo import storyteller

__all__ = ["build"]

PLAIN, BAN, BIAS, SHUFFLED, WHOLE, PUBLISHED, PASSES, PURE, LOOSE, STRICT, METHOD = (
    "plain",
    "word ban",
    "word bias of equal cost",
    "shuffled q",
    "rectification without min-p",
    "rectification as published",
    "rectification, published passes",
    "rectification, eps 0",
    "rectification, eps 0.05",
    "rectification, eps 0.3",
    "rectification",
)
AGAIN = tuple(f"rectification, training {n}" for n in (2, 3))
STEPS = (PURE, LOOSE, METHOD, STRICT)  # the larger eps, the later
EPISODES, BATCH, SEED = 6000, 250, 0
RECTIFIER = Rectifier(layers=3, width=64, learning_rate=2e-3, warmup_steps=50, epochs=8, seed=SEED)
WORDS = 8  # that are banned or biased
DEV, STRENGTHS, HALVINGS = 150, 12.0, 6  # openings, largest bias in logits, steps of the search
FLOOR = 0.01  # of the share of undesired stories: a step of eps may leave as many more, where hardly any are left


class ShuffledRectifier(RectifierLogitsProcessor):
    """The same caps on other tokens: dealt out anew at every position."""

    def caps(self, input_ids: Tensor) -> Tensor:
        caps = super().caps(input_ids)
        generator = torch.Generator().manual_seed(input_ids.shape[1])  # the same again after a rewind
        return caps[:, torch.randperm(caps.shape[1], generator=generator)]


@experiment(
    "rectification",
    Rectification,
    model="zoo/storyteller",
    samples=500,
    seeds=range(4),
    batch=100,
    quick=10,
    limit=1000,
)
def build(run: Run[Rectification]) -> Design:
    """Sample stories, train the rectifier three times, tune the bias, then compare. Samples are openings for each arm
    and seed.

    `method` has settings that replace the defaults; its `rectifier` is a folder used instead of training one.
    """
    model, tokenizer, folder = run.model, run.tokenizer, run.folder("rectification")
    episodes = sample_episodes(model, tokenizer, folder, run.size(EPISODES, 8 * BATCH))
    trainings = 0 if run.method else run.size(3, 1)
    learned = [train_rectifier(model, tokenizer, episodes, folder, SEED + i) for i in range(trainings)]
    method, *again = [run.method] if run.method else [Rectification(rectifier=cast(Any, str(path))) for path in learned]
    words = characteristic_words(tokenizer, episodes)
    shuffled = method.processor(model, tokenizer)
    shuffled = ShuffledRectifier(shuffled.rectifier, method.eps, method.mode, method.p_min, method.p_max)
    bias = tune_bias(model, tokenizer, method, words, folder, run.size(DEV, 20))
    passes = method.model_copy(update={"mode": "iterate"})
    steps = {PURE: 0.0, LOOSE: 0.05, STRICT: 0.3}
    methods = {
        PASSES: passes,
        **{name: method.model_copy(update={"eps": eps}) for name, eps in steps.items()},
        METHOD: method,
        **dict(zip(AGAIN, again)),
    }
    named, setting = {"words": tokenizer.convert_ids_to_tokens(words)}, method.model_dump(mode="json")
    return Design(
        task=DiscourseTask(model, tokenizer, run.count),
        arms=[
            Arm(PLAIN, role="plain"),
            Arm(BAN, role="control", setting=named, apply={"bad_words_ids": [[word] for word in words]}),
            Arm(
                BIAS,
                role="control",
                setting={**named, "bias": bias},
                apply={"sequence_bias": biases(words, bias)},
            ),
            Arm(SHUFFLED, role="control", setting=setting, apply={"final_processors": [shuffled]}),
            *(
                Arm(name, one, setting={**one.model_dump(mode="json"), "min_p": None}, apply={"min_p": None})
                for name, one in ((WHOLE, method), (PUBLISHED, passes))
            ),
            *(Arm(name, one) for name, one in methods.items()),
        ],
        baseline=PLAIN,
        notes=f"The rectifier learned from {len(episodes)} stories of the model itself, all of them and not only the "
        f"extremes of each opening, so that its values are the model's risks. Words: the {WORDS} with the highest log "
        "odds ratio, in standard errors, of being in an undesired rather than another story of these. `word bias of "
        f"equal cost` lowers them by {bias:.2f} logits, at which the model's dev stories have the nats per token of "
        "rectification. All sample with min-p 0.05 before the caps, except `rectification as published`, which also "
        "has the published two passes for the exact projection, and `rectification without min-p`: where only one word "
        "can follow, a cap on it moves probability to words that cannot, unless these have been cut off. "
        "The rectifier is trained three times; the controls are compared with the first.",
    )


# --- before the comparison -----------------------------------------------------------------------------------------


def sample_episodes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, count: int
) -> list[dict[str, Any]]:
    """Stories of the model after training openings, with their rewards; sampled where they are not there yet."""

    def sample() -> list[dict[str, Any]]:
        prompts, found = storyteller.openings(count, "train", SEED), []
        for start in tqdm(range(0, count, BATCH), desc="sampling stories"):
            batch = prompts[start : start + BATCH]
            output = generate(model, tokenizer, batch, **SAMPLING, seed=start)
            for prompt, text, before, ids in zip(batch, output.texts, output.prompt_ids, output.new_ids):
                reward = -float(storyteller.undesired(f"{prompt} {text}"))
                found.append({"prompt_ids": before, "continuation_ids": ids, "reward": reward})
        return found

    episodes = built_json(folder / f"episodes-{digest([count, BATCH, SEED, SAMPLING])}.json", sample)
    if len({e["reward"] for e in episodes}) < 2:
        raise InputError("the model's stories are all desired or all undesired; use the model zoo/storyteller")
    return episodes


def train_rectifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    episodes: Sequence[dict[str, Any]],
    folder: Path,
    seed: int,
) -> Path:
    """The folder of the rectifier; trained where it is not there yet."""
    rectifier = RECTIFIER.model_copy(update={"seed": seed})
    path = folder / f"rectifier-{digest([rectifier.model_dump(), episodes])}"
    if not path.exists():
        with TemporaryDirectory() as scratch:
            trainer = rectifier.trainer(model, tokenizer, episodes, scratch, progress=lambda *_: None)
            trainer.train()
        write(path, partial(rectifier.save, trainer))
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
    folder: Path,
    count: int = DEV,
) -> float:
    """The bias on the words at which dev stories have the nats per token that rectification has there."""

    def tune() -> float:
        task = DiscourseTask(model, tokenizer, count, "dev")

        def cost(arm: Arm) -> float:
            return float(np.mean([o.metrics["nll"] for o in task.run(arm, task.samples(), SEED)]))

        wanted, low, high = cost(Arm("dev", method)), 0.0, STRENGTHS
        for _ in tqdm(range(HALVINGS), desc="tuning the bias"):
            middle = (low + high) / 2
            biased = Arm("dev", role="control", apply={"sequence_bias": biases(words, middle)})
            low, high = (middle, high) if cost(biased) < wanted else (low, middle)
        return high

    setting = [method.model_dump(mode="json"), list(words), count, SEED, STRENGTHS, HALVINGS, SAMPLING]
    return built_json(folder / f"bias-{digest(setting)}.json", tune)


# --- afterwards ----------------------------------------------------------------------------------------------------


def perplexity_ratio(c: Comparison, arm: str) -> Contrast:
    return Contrast(c.difference(arm, PLAIN, "nll").map(math.exp), f"perplexity, {arm} / {PLAIN}")


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Fewer undesired stories, their price, the published setting, the controls, and the strictness."""
    trained = [METHOD, *(arm for arm in AGAIN if arm in c.arms)]
    others = [arm for arm in c.arms if arm != PLAIN and arm not in trained]

    def whole(arm: str) -> Contrast:
        return c.gap("sound", arm, PLAIN, "+.4f")

    return [
        Finding(
            "at eps 0.1 at least 40 % fewer stories are undesired, by every training of the rectifier",
            all_of(*(at_least(c.saved("undesired", arm, PLAIN), 0.4) for arm in trained)),
            main=True,
            note=f"share of the plain model {c.mean(PLAIN, 'undesired'):.3f}; "
            + "; ".join(f"{arm} {c.saved('undesired', arm, PLAIN).shown}" for arm in others),
        ),
        Finding(
            "their perplexity under the plain model is less than 20 % higher",
            all_of(*(below(perplexity_ratio(c, arm), 1.2) for arm in trained)),
            note="; ".join(f"{arm} {perplexity_ratio(c, arm).shown}" for arm in others),
        ),
        Finding(
            "the stories stay whole: the share of sentences that the language has falls by at most 0.02",
            all_of(*(loses_at_most(whole(arm), 0.02) for arm in trained)),
            note="; ".join(f"{arm} {whole(arm).shown}" for arm in others),
        ),
        Finding(
            "perplexity and sentences are as little hurt as published, with the caps on the whole distribution",
            all_of(below(perplexity_ratio(c, PUBLISHED), 1.2), loses_at_most(whole(PUBLISHED), 0.02)),
        ),
        Finding(
            "a bias on characteristic words that costs as much perplexity leaves more undesired stories",
            beats(c, "undesired", METHOD, [BIAS]),
            note=str(c.gap("undesired", BAN, METHOD)),
        ),
        Finding(
            "the same caps on other tokens leave more undesired stories", beats(c, "undesired", METHOD, [SHUFFLED])
        ),
        Finding(
            "a larger eps leaves fewer undesired stories, over 0, 0.05, 0.1 and 0.3: no step more, and fewer in all",
            all_of(
                above(c.gap("undesired", PURE, STRICT), 0),
                *(loses_at_most(c.gap("undesired", *step), FLOOR) for step in pairwise(STEPS)),
            ),
        ),
    ]
