"""Do errors close to a reference, judged by another model, teach a better estimator than other synthetic ones?

Three translation models of the zoo: one writes, one judges, and the translations of the third, whose true errors are
known from the lexicon, are what estimators are measured on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from tokenizers import processors
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaForMaskedLM

from ..data.translation import Sentence, draw_sentences
from ..judge.dcsqe import DCSQE
from ..judge.quality.answer import JudgedTranslation
from ..measure.build_cache import built_folder
from ..measure.claims import Contrast, Finding, above, all_of, below, describe
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.translation import REPLACED, STATISTICS, Synthesis, TranslationQualityTask, check_pair
from ..models.load import Loaded, load
from ..zoo.training import fit
from ..zoo.translators import SPECIAL, build_tokenizer

__all__ = ["build"]

PLAIN, RANDOM, SELF, METHOD = "plain beam", "random replacement", "self-annotation", "constrained beam"
ARMS = {
    PLAIN: Synthesis("plain"),
    RANDOM: Synthesis("random"),
    SELF: Synthesis("constrained", "generator"),
    METHOD: Synthesis("constrained"),
}
PAIRS = 2000  # sentences that training data are made of
TRAINING = {"learning_rate": 1e-3, "epochs": 4}
SHAPE = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
READ, STEPS, BATCH = 4000, 1000, 48  # sentence pairs of each of two parts that the encoder reads beforehand
MASKED = 0.5  # of the translation


@experiment("dcsqe", DCSQE, model="zoo/translator-a", samples=600, seeds=(0, 1, 2), batch=200, quick=8, limit=2400)
def build(run: Run[DCSQE]) -> Design:
    """`method` sets search, severities, phrases and training."""
    check_pair(run.tokenizer)
    method = run.settings(DCSQE, **TRAINING)
    others = {name: load(f"zoo/translator-{letter}") for name, letter in (("annotator", "b"), ("held_out", "c"))}
    models = {"generator": Loaded(run.model, run.tokenizer), **others}
    steps = run.size(STEPS, 20)
    folder = built_folder(run.folder("dcsqe") / f"encoder-{steps}", partial(read_encoder, steps))
    encoder = (
        AutoModel.from_pretrained(folder, add_pooling_layer=False, trust_remote_code=False),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    task = TranslationQualityTask(models, encoder, method, run.count, run.size(PAIRS, 1000))
    setting = method.model_dump(mode="json")
    roles: dict[str, Any] = {PLAIN: "plain", METHOD: "method"}
    return Design(
        task=task,
        arms=[
            Arm(name, role=roles.get(name, "control"), setting={**setting, **how._asdict()}, apply=how)
            for name, how in ARMS.items()
        ],
        baseline=PLAIN,
        statistics=STATISTICS,
        models={name: one.model for name, one in others.items()},
        facts={"labels": {name: task.labels(how) for name, how in ARMS.items()}},
        notes="zoo/translator-a writes, -b judges, and -c, whose errors are known from the lexicon, writes what is "
        f"estimated, by a beam of 5. Training data are made from {PAIRS} sentence pairs of the part that -b has "
        f"learned from; random replacement changes {REPLACED:.0%} of the words of references and is judged as the "
        "others are. Estimators start from one encoder that has filled in hidden words of translations beside their "
        "sources; a seed draws their heads and the order of training. True errors are single words, not phrases.",
        tried="On 400 sentences of dev with one seed: an encoder that filled in hidden words on both sides gave 0.21 "
        "by words and 0.29 by sentences with plain beam search; the present one 0.28 and 0.30, constrained beam search "
        "0.24 and 0.31, random replacement 0.13 and 0.09, self-annotation 0.16 and 0.07. The encoder's steps then went "
        "from 1500 to 1000 and its rate from 2e-3 to 3e-3, for time. A run with one seed was stopped half way, when "
        "constrained beam search was below plain beam by words; nothing was changed after it. That the "
        "translators learn from 500 sentences each was chosen by their measures on test, so that they are wrong in "
        "some words: with 5000 they make no errors. Why constrained beam search is below plain beam search by words "
        "was then asked on 600 sentences of dev with two seeds. Its labels are as good: of the words that it marks 60 "
        "% are truly wrong and 82 % of the wrong ones are marked, with plain beam search 62 % and 81 %. But fewer "
        "words are wrong, 4.5 % against 6.1 %, since the reference repairs them, and what is estimated was written by "
        "plain beam search, too. By words and sentences it gave 0.243 and 0.306, plain beam search 0.273 and 0.296; "
        "without widening errors to phrases (65 % and 66 % of the marked words are wrong) 0.246 and 0.324, and 0.273 "
        "and 0.313. Nothing was changed.",
    )


# --- the encoder -----------------------------------------------------------------------------------------------------


def read_encoder(steps: int) -> Any:
    """What fills in hidden words of translations beside their sources: it knows both languages, as XLM-R knows many."""
    torch.manual_seed(0)
    tokenizer = pair_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, type_vocab_size=1, **SHAPE, **cast(Any, ids)
    )
    model = XLMRobertaForMaskedLM(config)
    sentences = [sentence for third in (0, 1) for sentence in draw_sentences(READ, "train", third)]
    batches = _masked(tokenizer, sentences)
    fit(model, batches, steps, learning_rate=3e-3, warmup=100, loss=lambda m, batch: m(**batch).loss)

    def save(place: Any) -> None:
        model.roberta.save_pretrained(place)
        tokenizer.save_pretrained(place)

    return save


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The translators' tokenizer, whose pairs have a token before the first word."""
    tokenizer = build_tokenizer()
    marks = [(mark, SPECIAL.index(mark)) for mark in ("<begin>", "<eos>")]
    template = processors.TemplateProcessing("<begin> $A <eos>", "<begin> $A <eos> $B <eos>", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def _masked(tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence]) -> Iterator[dict[str, Tensor]]:
    """Endless batches of translation and source with some words hidden."""
    rng, draw = random.Random(0), torch.Generator().manual_seed(0)
    while True:
        chosen = rng.sample(sentences, BATCH)
        batch = tokenizer(
            [s.target for s in chosen],
            [s.source for s in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        ids = cast(Tensor, batch["input_ids"])
        hidden = (torch.rand(ids.shape, generator=draw) < MASKED) & (ids >= len(SPECIAL)) & (_side(ids) == 0)
        yield {
            "input_ids": ids.masked_fill(hidden, cast(int, tokenizer.mask_token_id)),
            "attention_mask": cast(Tensor, batch["attention_mask"]),
            "labels": ids.masked_fill(~hidden, -100),
        }


def _side(ids: Tensor) -> Tensor:
    """0 for the translation, 1 and more behind its end (rows, time)."""
    return (ids == SPECIAL.index("<eos>")).cumsum(1)


# --- findings --------------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, labels: dict[str, list[JudgedTranslation]]) -> list[Finding]:
    """Estimators against each other, and what share of words is marked in the data that they learn from."""
    marked = {name: _wrong(rows) for name, rows in labels.items()}
    words = {name: np.array([len(row.severities) for row in rows]) for name, rows in labels.items()}
    return [
        Finding(
            "It teaches a better estimator than random replacement, by words and by sentences.",
            all_of(above(c.gap("mcc", METHOD, RANDOM), 0), above(c.gap("spearman", METHOD, RANDOM), 0)),
            main=True,
            note=_all(c),
        ),
        Finding(
            "A model marks less than half as many of its own words as another model does.",
            below(_ratio(marked[SELF], marked[METHOD]), 0.5),
            note="; ".join(f"{name} {marked[name].sum() / words[name].sum():.1%} of words" for name in labels),
        ),
        Finding(
            "It teaches a better estimator than plain beam search, by words and by sentences.",
            all_of(above(c.gap("mcc", METHOD, PLAIN), 0), above(c.gap("spearman", METHOD, PLAIN), 0)),
        ),
        Finding(
            "It teaches a better estimator than self-annotation, by words and by sentences.",
            all_of(above(c.gap("mcc", METHOD, SELF), 0), above(c.gap("spearman", METHOD, SELF), 0)),
        ),
        describe("How much is truly wrong in what is estimated.", _truth(c)),
    ]


def _wrong(rows: Sequence[JudgedTranslation]) -> np.ndarray:
    return np.array([sum(severity != "ok" for severity in row.severities) for row in rows])


def _ratio(first: np.ndarray, second: np.ndarray) -> Contrast:
    interval = bootstrap_statistic(lambda pick: float(first[pick].sum() / max(1, second[pick].sum())), len(first))
    return Contrast(interval, f"words marked, {SELF} / {METHOD}", ".2f")


def _all(c: Comparison) -> str:
    return "; ".join(f"{arm} {c.mean(arm, 'mcc'):.3f} and {c.mean(arm, 'spearman'):.3f}" for arm in c.arms)


def _truth(c: Comparison) -> str:
    table = c.table(PLAIN)
    wrong = table["hits"].sum() + table["missed"].sum()
    share = wrong / (wrong + table["false"].sum() + table["passed"].sum())
    return f"{share:.1%} of words; mean score {table['score'].mean():.3f}"
