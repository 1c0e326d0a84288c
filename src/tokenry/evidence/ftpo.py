"""Does training on the rewinds of Antislop remove the banned words from plain sampling, and at what price?

The whole story: words that the model overuses (profiled beforehand), rewinds sampled under a ban of them, training, and
plain sampling on other prompts. Rewinds and adapters are kept in the cache folder, so that a run can be repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm.auto import tqdm

from ..core.errors import InputError
from ..core.outputs import write_folder
from ..decode.antislop import Antislop
from ..decode.api import generate
from ..measure.build_cache import built_once, digest
from ..measure.claims import Check, Contrast, Finding, above, all_of, at_least, at_most, below, describe, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.stories import SAMPLING
from ..measure.tasks.unlearning import UnlearningTask
from ..measure.training import training
from ..models.prompts import prompt_ids
from ..train.adapters import save_adapter, without_adapter
from ..train.ftpo import FTPO
from ..train.preference.pairs import read_pairs
from ..train.preference.trainer import FinalTokenDPOTrainer, FTPOTrainer

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["build"]

PLAIN, BAN, DPO, SLOW, UNTIED, STRONG, METHOD = (
    "plain",
    "antislop while sampling",
    "dpo",
    "dpo, a quarter of the rate",
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
TRAINED = (METHOD, STRONG, DPO, SLOW, UNTIED)
ROUNDS, BATCH, NEW_TOKENS = 2, 24, 110  # how rewinds are sampled
HELD_OUT = 96  # pairs that are only measured
PASSAGES = 40


@experiment("ftpo", FTPO, samples=40, seeds=(0, 1), batch=20, quick=2)
def build(run: Run[FTPO]) -> Design:
    """Sample the rewinds, train FTPO, FTPO with a stronger tie to the reference and with none, and DPO, then compare.
    Samples are stories for each arm and seed; `method` has settings that replace DEFAULT.
    """
    method = run.settings(FTPO, **{**DEFAULT, "max_examples": run.size(DEFAULT["max_examples"], 16)})
    words, held_out = lines("slop_words_smollm2.txt"), run.size(HELD_OUT, 8)
    folder = run.folder("ftpo")  # of the bare model: adapters come later
    prompts = lines("training_prompts.txt")
    prompts = prompts[: run.size(len(prompts), BATCH)]
    pairs = training_pairs(run, folder, method, words, prompts)
    held, kept = split(pairs, [prompt_ids(run.tokenizer, prompt) for prompt in prompts], held_out)
    if len(kept) < len(held):
        raise InputError(
            f"only {len(pairs)} pairs are left of the rewinds; this model hardly writes the {len(words)} words, or "
            "min_chosen is too high"
        )
    untied = method.model_copy(update={"lambda_nontarget": 0.0, "lambda_target": 0.0})
    strong = method.model_copy(update={"lambda_nontarget": 20 * method.lambda_nontarget})
    slow = method.model_copy(update={"learning_rate": (method.learning_rate or DEFAULT["learning_rate"]) / 4})
    trainings = {
        METHOD: (method, FTPOTrainer),
        STRONG: (strong, FTPOTrainer),
        UNTIED: (untied, FTPOTrainer),
        DPO: (method, FinalTokenDPOTrainer),
        SLOW: (slow, FinalTokenDPOTrainer),
    }
    setting = {
        name: {**settings.model_dump(mode="json"), "pairs": len(kept)} for name, (settings, _) in trainings.items()
    }
    wrapped = with_adapters(run, folder, trainings, kept)
    return Design(
        task=UnlearningTask(
            wrapped.eval(),
            run.tokenizer,
            words,
            held,
            run.count,
            min(PASSAGES, 2 * run.count),
            min(method.max_length, 512),
        ),
        arms=[
            Arm(PLAIN, role="plain", apply={"adapter": None}),
            Arm(BAN, Antislop(phrases=tuple(words)), "control", {"phrases": words}, {"adapter": None}),
            Arm(DPO, role="control", setting={**setting[DPO], "loss": "dpo"}, apply={"adapter": DPO}),
            Arm(SLOW, role="control", setting={**setting[SLOW], "loss": "dpo"}, apply={"adapter": SLOW}),
            Arm(UNTIED, role="control", setting=setting[UNTIED], apply={"adapter": UNTIED}),
            Arm(STRONG, setting=setting[STRONG], apply={"adapter": STRONG}),
            Arm(METHOD, setting=setting[METHOD], apply={"adapter": METHOD}),
        ],
        baseline=PLAIN,
        notes=f"{len(words)} words that the model overuses; {len(kept)} pairs from stories to other prompts, and "
        f"{len(held)} held out, from prompts of their own. All are trained on the same pairs in the same order, with "
        "the same LoRA, learning rate and stopping rule (choice_win 0.5), each once: the intervals do not contain the "
        "variance of training.",
        tried="These, and the strong tie (20 times the published weight), were chosen on the first 24 prompts of the "
        "task `stories`, which are left out here. DPO at a quarter of the rate came after a record in which DPO had "
        "ended at a choice_win of 0.70 on held-out pairs, and FTPO at 0.53; no other rate was looked at.",
    )


# --- before the comparison -----------------------------------------------------------------------------------------


def lines(name: str) -> list[str]:
    return (files("tokenry.data") / "prompts" / name).read_text(encoding="utf-8").splitlines()


def training_pairs(
    run: Run[FTPO], folder: Path, method: FTPO, words: Sequence[str], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Pairs from rewinds under a ban of `words` on the prompts; sampled where they are not there yet."""
    ban, rounds, new_tokens = Antislop(phrases=tuple(words)), run.size(ROUNDS, 1), run.size(NEW_TOKENS, 60)

    def sample() -> list[dict[str, Any]]:
        found = []
        starts = [(r, i) for r in range(rounds) for i in range(0, len(prompts), BATCH)]
        for r, i in tqdm(starts, desc="sampling rewinds"):
            batch = prompts[i : i + BATCH]
            options = {**SAMPLING, "max_new_tokens": new_tokens, "seed": 1000 * r + i}
            found += generate(run.model, run.tokenizer, batch, methods=[ban], **options).pairs
        return found

    setting = [ban.model_dump(mode="json"), prompts, SAMPLING, rounds, BATCH, new_tokens]
    rewinds = built_once(folder / f"rewinds-{digest(setting)}.jsonl", sample, _write_lines, read_pairs)
    return method.pairs(rewinds, run.tokenizer)


def split(
    pairs: Sequence[dict[str, Any]], prompts: Sequence[list[int]], count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """At least `count` pairs, and the rest. All pairs of a prompt are on one side: contexts of a story nest."""
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for pair in pairs:
        begins = [i for i, ids in enumerate(prompts) if pair["prompt_ids"][: len(ids)] == ids]
        by_prompt.setdefault(max(begins, key=lambda i: len(prompts[i])), []).append(pair)
    held: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for group in by_prompt.values():
        (held if len(held) < count else kept).extend(group)
    return held, kept


def _write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def with_adapters(
    run: Run[FTPO], folder: Path, trainings: dict[str, tuple[FTPO, type[FTPOTrainer]]], pairs: Sequence[dict[str, Any]]
) -> PeftModel:
    """The model with a trained adapter for each of `TRAINED`."""
    try:
        import peft
    except ModuleNotFoundError:
        raise InputError("this comparison needs the package peft; run `pip install tokenry[train]`") from None
    folders = {name: train_adapter(run, folder, *training, pairs) for name, training in trainings.items()}
    wrapped = peft.PeftModel.from_pretrained(run.model, folders[METHOD], adapter_name=METHOD)
    for name in TRAINED[1:]:  # only now: an adapter that is loaded would be trained on, and unloaded, with the next
        wrapped.load_adapter(folders[name], name)
    return wrapped


def train_adapter(
    run: Run[FTPO], folder: Path, method: FTPO, trainer_class: type[FTPOTrainer], pairs: Sequence[dict[str, Any]]
) -> Path:
    """The folder of a trained adapter; trained where it is not there yet. The model is left as it was."""
    path = folder / f"{trainer_class.__name__}-{digest([method.model_dump(mode='json'), pairs])}"
    if not path.exists():
        with training(f"training, {trainer_class.__name__}") as (scratch, advance):
            trainer = method.trainer(run.model, run.tokenizer, pairs, scratch, trainer_class, progress=advance)
            trainer.train()
        write_folder(path, partial(save_adapter, cast(Any, trainer.model)))
        without_adapter(cast(Any, trainer.model))
    return path


# --- afterwards ----------------------------------------------------------------------------------------------------


def fewer_hits(c: Comparison, arm: str) -> Contrast:
    """1 - hits per word / hits per word of the plain model, over all stories."""

    def rates(name: str) -> tuple[np.ndarray, np.ndarray]:
        table = c.table(name)
        words = table["words"]
        stories = ~np.isnan(words).all(1)
        return (table["hits_per_1000_words"] * words)[stories].sum(1), words[stories].sum(1)

    (hits, words), (plain_hits, plain_words) = rates(arm), rates(PLAIN)

    def fewer(p: np.ndarray) -> float:
        before = plain_hits[p].sum() / plain_words[p].sum()
        return 1 - (hits[p].sum() / words[p].sum()) / before if before else math.nan

    return Contrast(bootstrap_statistic(fewer, len(hits)), f"fewer hits, {arm}", ".1%")


def perplexity_ratio(c: Comparison, arm: str) -> Contrast:
    return Contrast(c.difference(arm, PLAIN, "text_nll").map(math.exp), f"perplexity of ordinary text, {arm} / {PLAIN}")


def at_equal_win(c: Comparison) -> str:
    """Read off the line through both trainings of DPO."""
    low, high, wanted = (c.mean(arm, "choice_win") for arm in (SLOW, DPO, METHOD))
    part = (wanted - low) / (high - low) if low != high else math.nan
    if not 0 <= part <= 1:
        return f"it is {low:.2f} and {high:.2f}, and {wanted:.2f} is not between"

    def read(of: Callable[[Comparison, str], Contrast]) -> float:
        slow, fast = (of(c, arm).interval.mean for arm in (SLOW, DPO))
        return slow + part * (fast - slow)

    return (
        f"{read(fewer_hits):.1%} fewer hits (ftpo {fewer_hits(c, METHOD).interval.mean:.1%}), perplexity of ordinary "
        f"text {read(perplexity_ratio):.3f} (ftpo {perplexity_ratio(c, METHOD).interval.mean:.3f})"
    )


def costs_more(c: Comparison, arm: str) -> Check:
    """Than the method, in ordinary text and in variety."""
    return all_of(above(c.gap("text_nll", arm, METHOD, "+.4f"), 0), below(c.gap("distinct_2", arm, METHOD, "+.4f"), 0))


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Fewer hits, the price in ordinary text and in variety, and whether DPO or no tie would do as well."""

    def others(of: Callable[[Comparison, str], Contrast], arms: Sequence[str]) -> str:
        return "; ".join(f"{arm} {of(c, arm).shown}" for arm in arms if arm not in (PLAIN, METHOD))

    wins = ", ".join(f"{s} {c.mean(s, 'choice_win'):.2f}" for s in TRAINED)
    return [
        Finding(
            "plain sampling of the trained model has at least 60 % fewer hits on held-out prompts",
            at_least(fewer_hits(c, METHOD), 0.6),
            main=True,
            note=others(fewer_hits, c.arms),
        ),
        Finding(
            "perplexity on ordinary text is at most 5 % higher",
            at_most(perplexity_ratio(c, METHOD), 1.05),
            note=others(perplexity_ratio, TRAINED),
        ),
        Finding(
            "variety (distinct-2) falls by at most 0.01",
            loses_at_most(c.gap("distinct_2", METHOD, PLAIN, "+.4f"), 0.01),
            note=others(lambda c, arm: c.gap("distinct_2", arm, PLAIN, "+.4f"), TRAINED),
        ),
        Finding(
            "the tie to the reference keeps the other logits: without it, and with DPO, they move further",
            beats(c, "drift", METHOD, [DPO, SLOW, UNTIED]),
            note=f"drift of ftpo {c.mean(METHOD, 'drift'):.3f}; choice_win at held-out pairs: {wins}",
        ),
        Finding("DPO on the same pairs costs more, in ordinary text and in variety", costs_more(c, DPO)),
        Finding("so it does at a quarter of the rate", costs_more(c, SLOW)),
        Finding("and it avoids fewer patterns", above(c.saved("hits_per_1000_words", METHOD, DPO), 0)),
        describe("what DPO gives between its two rates, where its choice_win is that of ftpo", at_equal_win(c)),
    ]
