"""Does training on the rewinds of Antislop remove the banned words from plain sampling, and at what price?

The whole story: words that the model overuses (profiled beforehand), rewinds sampled under a ban of them, training, and
plain sampling on other prompts. Rewinds and adapters are kept in the cache folder, so that a run can be repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.outputs import write_folder
from ..decode.antislop import Antislop
from ..decode.api import generate
from ..measure.build_cache import digest, kept_folder, write
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.stories import SAMPLING
from ..measure.tasks.unlearning import UnlearningTask
from ..train.adapters import save_adapter, without_adapter
from ..train.ftpo import FTPO
from ..train.preference.pairs import read_pairs
from ..train.preference.trainer import FinalTokenDPOTrainer, FTPOTrainer

__all__ = ["build"]

PLAIN, BAN, DPO, UNTIED, STRONG, METHOD = (
    "plain",
    "antislop while sampling",
    "dpo",
    "ftpo without the tie",
    "ftpo, strong tie",
    "ftpo",
)
DEFAULT = {  # the paper's schedule is for larger models and more pairs; the terms of the loss are the paper's
    "rank": 64,
    "learning_rate": 2e-4,
    "batch_size": 8,
    "dropout": 0.0,
    "max_length": 128,
    "max_examples": 700,
    "early_stop_choice_win": 0.5,
}
TRAINED = (METHOD, STRONG, DPO, UNTIED)
ROUNDS, BATCH, NEW_TOKENS = 2, 24, 110  # how rewinds are sampled
HELD_OUT = 96  # pairs that are only measured
PASSAGES = 40


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: FTPO | None = None,
) -> Experiment:
    """Sample the rewinds, train FTPO, FTPO with a stronger tie to the reference and with none, and DPO, then compare.

    Args:
        samples: stories for each subject and seed; default 40.
        method: settings that replace the defaults of this experiment, see DEFAULT.
    """
    try:
        from peft import PeftModel
    except ModuleNotFoundError:
        raise InputError("this comparison needs the package peft; run `pip install tokenry[train]`") from None
    method = FTPO(**{**DEFAULT, **(method.model_dump(exclude_unset=True) if method else {})})
    words = lines("slop_words_smollm2.txt")
    folder = kept_folder("ftpo", model, tokenizer)
    pairs = method.pairs(read_pairs(sample_rewinds(model, tokenizer, words, folder)), tokenizer)
    held, kept = pairs[:HELD_OUT], pairs[HELD_OUT:]
    if len(kept) < len(held):
        raise InputError(
            f"only {len(pairs)} pairs are left of the rewinds; this model hardly writes the {len(words)} words, or "
            "min_chosen is too high"
        )
    untied = method.model_copy(update={"lambda_nontarget": 0.0, "lambda_target": 0.0})
    strong = method.model_copy(update={"lambda_nontarget": 20 * method.lambda_nontarget})
    trainings = {
        METHOD: (method, FTPOTrainer),
        STRONG: (strong, FTPOTrainer),
        UNTIED: (untied, FTPOTrainer),
        DPO: (method, FinalTokenDPOTrainer),
    }
    adapters = {
        name: train_adapter(model, tokenizer, settings, trainer, kept, folder)
        for name, (settings, trainer) in trainings.items()
    }
    wrapped = PeftModel.from_pretrained(model, adapters[METHOD], adapter_name=METHOD)
    for name in TRAINED[1:]:  # only now: an adapter that is loaded would be trained on, and unloaded, with the next
        wrapped.load_adapter(adapters[name], name)
    ban = {"adapter": None, "methods": [Antislop(phrases=words)]}
    shared = {"pairs": len(kept)}
    subjects = [
        Subject(PLAIN, "plain", {}, {"adapter": None}),
        Subject(BAN, "control", {"phrases": words}, ban),
        Subject(DPO, "control", {**method.model_dump(mode="json"), **shared, "loss": "dpo"}, {"adapter": DPO}),
        Subject(UNTIED, "control", {**untied.model_dump(mode="json"), **shared}, {"adapter": UNTIED}),
        Subject(STRONG, "method", {**strong.model_dump(mode="json"), **shared}, {"adapter": STRONG}),
        Subject(METHOD, "method", {**method.model_dump(mode="json"), **shared}, {"adapter": METHOD}),
    ]
    count = samples or 40
    task = UnlearningTask(
        wrapped.eval(), tokenizer, words, held, count, min(PASSAGES, 2 * count), min(method.max_length, 512)
    )
    return Experiment(
        slug="ftpo",
        claim=FTPO.claim,
        task=task,
        subjects=subjects,
        baseline=PLAIN,
        judge=judge,
        seeds=tuple(seeds or (0, 1)),
        batch=20,
        notes=f"{len(words)} words that the model overuses; {len(kept)} pairs from stories to other prompts. All are "
        "trained on the same pairs in the same order, with the same LoRA, learning rate and stopping rule (choice_win "
        "0.5). These, and the strong tie (20 times the published weight), were chosen on the first 24 prompts of the "
        "task `stories`, which are left out here.",
    )


# --- before the comparison -----------------------------------------------------------------------------------------


def lines(name: str) -> list[str]:
    return (files("tokenry.data") / "prompts" / name).read_text(encoding="utf-8").splitlines()


def sample_rewinds(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], folder: Path
) -> Path:
    """The file of rewinds under a ban of `words` on the training prompts; sampled where it is not there yet."""
    prompts, ban, found = lines("training_prompts.txt"), Antislop(phrases=words), []
    setting = [ban.model_dump(mode="json"), prompts, SAMPLING, ROUNDS, BATCH, NEW_TOKENS]
    path = folder / f"rewinds-{digest(setting)}.jsonl"
    if path.exists():
        return path
    starts = [(r, i) for r in range(ROUNDS) for i in range(0, len(prompts), BATCH)]
    for r, i in tqdm(starts, desc="sampling rewinds"):
        batch = prompts[i : i + BATCH]
        options = {**SAMPLING, "max_new_tokens": NEW_TOKENS, "seed": 1000 * r + i}
        found += generate(model, tokenizer, batch, methods=[ban], **options).pairs
    write(path, lambda part: part.write_text("".join(json.dumps(p) + "\n" for p in found), encoding="utf-8"))
    return path


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: FTPO,
    trainer_class: type[FTPOTrainer],
    pairs: Sequence[dict[str, Any]],
    folder: Path,
) -> Path:
    """The folder of a trained adapter; trained where it is not there yet. The model is left as it was."""
    path = folder / f"{trainer_class.__name__}-{digest([method.model_dump(mode='json'), pairs])}"
    if not path.exists():
        with tqdm(desc=f"training, {trainer_class.__name__}") as bar, TemporaryDirectory() as scratch:

            def advance(completed: int, total: int) -> None:
                bar.total = total
                bar.update(completed - bar.n)

            trainer = method.trainer(model, tokenizer, pairs, scratch, trainer_class, progress=advance)
            trainer.train()
        write_folder(path, partial(save_adapter, trainer.model))
        without_adapter(trainer.model)
    return path


# --- afterwards ----------------------------------------------------------------------------------------------------


def fewer_hits(comparison: Comparison, subject: str) -> Interval:
    """1 - hits per word / hits per word of the plain model, over all stories."""

    def rates(name: str) -> tuple[Any, Any]:
        hits, words = (comparison.values(name, n) for n in ("hits_per_1000_words", "words"))
        stories = ~np.isnan(hits)
        return (hits * words)[stories], words[stories]

    (hits, words), (plain_hits, plain_words) = rates(subject), rates(PLAIN)

    def fewer(p: np.ndarray) -> float:
        before = plain_hits[p].sum() / plain_words[p].sum()
        return 1 - (hits[p].sum() / words[p].sum()) / before if before else math.nan

    return bootstrap_statistic(fewer, len(hits))


def judge(comparison: Comparison) -> list[Finding]:
    """Fewer hits, the price in ordinary text and in variety, and whether DPO or no tie would do as well."""
    fewer = {s: fewer_hits(comparison, s) for s in comparison.subjects if s != PLAIN}
    ratios = {}
    for subject in TRAINED:
        gap = comparison.difference(subject, PLAIN, "text_nll")
        ratios[subject] = Interval(*(math.exp(v) for v in gap[:3]), gap.n)
    variety = {s: comparison.difference(s, PLAIN, "distinct_2") for s in TRAINED}
    wins = {s: comparison.mean(s, "choice_win") for s in TRAINED}
    drift = {s: comparison.difference(s, METHOD, "drift") for s in (DPO, UNTIED)}
    own_drift = comparison.mean(METHOD, "drift")
    dearer = comparison.difference(DPO, METHOD, "text_nll")
    duller = comparison.difference(DPO, METHOD, "distinct_2")
    return [
        Finding(
            "plain sampling of the trained model has at least 60 % fewer hits on held-out prompts",
            fewer[METHOD].mean >= 0.6,
            "fewer hits: " + _list(fewer, "{:.1%}"),
        ),
        Finding(
            "perplexity on ordinary text is at most 5 % higher",
            ratios[METHOD].mean <= 1.05,
            "perplexity / plain: " + _list(ratios, "{:.3f}"),
        ),
        Finding(
            "variety (distinct-2) is not lower",
            variety[METHOD].high >= 0,
            "distinct-2 - plain: " + _list(variety, "{:+.4f}"),
        ),
        Finding(
            "the tie to the reference keeps the other logits: without it, and with DPO, they move further",
            all(gap.low > 0 for gap in drift.values()),
            f"drift of ftpo {own_drift:.3f}; more than that: {_list(drift, '{:+.3f}')}; choice_win at held-out pairs: "
            + ", ".join(f"{s} {w:.2f}" for s, w in wins.items()),
        ),
        Finding(
            "DPO on the same pairs avoids fewer patterns and costs more",
            fewer[DPO].mean < fewer[METHOD].mean and dearer.low > 0 and duller.high < 0,
            f"fewer hits: dpo {fewer[DPO].mean:.1%}, ftpo {fewer[METHOD].mean:.1%}; dpo - ftpo: "
            + _list({"nats per token of ordinary text": dearer, "distinct-2": duller}, "{:+.4f}"),
        ),
    ]


def _list(intervals: dict[str, Interval], form: str) -> str:
    shown = ((name, [form.format(v) for v in found[:3]]) for name, found in intervals.items())
    return "; ".join(f"{name} {mean} [{low}, {high}]" for name, (mean, low, high) in shown)
