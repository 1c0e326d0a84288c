"""DCSQE: training data for estimators of translation quality, made by two translation models from parallel text.

Paper: Alleviating Distribution Shift in Synthetic Data for Machine Translation Quality Estimation, arXiv 2502.19941.
One model translates the source again while it is pulled towards the reference, so that what differs are natural errors
(constrained beam search of CBSQE). A second one, which must not be the first, says how bad each differing word is.
Errors are widened to whole phrases by a dependency tree. An encoder learns from that to tag words and score sentences.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, WithJsonSchema, field_validator
from torch import Tensor

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Batch, Passes, Positive, Probability, Rate, Seed, Weight
from ..core.method import Local
from ..core.progress import Progress
from ..models.anatomy import fingerprint
from ..models.load import Loaded, load, shared
from ..models.positions import fixed_positions
from .contract import TranslationMethod
from .quality.answer import JudgedTranslation, TranslationRow
from .quality.constrained import Constraint, ReferenceConstrainedLogitsProcessor
from .quality.estimator import load_estimator, trained_estimator
from .quality.phrases import ORDER, Phrase, Severity, heads_of, mqm_score, phrase_labels, worst
from .quality.tags import annotate_severity, check_room, check_translator, encoded, ter_tags

__all__ = ["DCSQE"]

logger = logging.getLogger(__name__)

Parse = Callable[[list[str]], Any]
Model = Annotated[Any, Local(), WithJsonSchema({"type": "string"})]
BATCH = 32  # sentences that are translated together
ENCODER = "an estimator is trained from an encoder; give -o encoder=xlm-roberta-base, or a folder"


class DCSQE(TranslationMethod):
    """Labels translations by a reference and a second model, teaches an estimator with them, and estimates others.

    judged = DCSQE(annotator="zoo/translator-b", phrase_rule="run").label(rows, load("zoo/translator-a"))
    """

    slug: ClassVar[str] = "dcsqe"
    title: ClassVar[str] = "DCSQE"
    paper: ClassVar[str] = (
        "Alleviating Distribution Shift in Synthetic Data for Machine Translation Quality Estimation, arXiv 2502.19941"
    )
    claim: ClassVar[str] = (
        "Errors that a translation model makes close to a reference, judged by another model, teach a better quality "
        "estimator than other synthetic data."
    )
    published: ClassVar[Claim] = Claim(
        "43.17", "% Spearman (CometKiwi 40.47), MCC 27.11 (21.50)", "XLM-R-large, WMT23 English-German"
    )

    annotator: Model = Field(
        default=None,
        description="the second translation model, which says how bad a word is: a name or folder as for --model, or "
        "in Python what tokenry.load returns",
    )
    estimator: Model = Field(
        default=None, description="the folder of a trained estimator; with it translations are estimated"
    )
    encoder: Annotated[str | None, Local()] = Field(
        default=None, description="folder or hub id of the encoder that an estimator is trained from"
    )
    theta: Probability = Field(default=0.05, description="the reference pulls where its next token is likelier")
    lam: Probability = Field(default=0.2, description="share of the model where it pulls; 1 is plain beam search")
    tau: Positive = Field(default=0.2, description="temperature of the reference's share")
    window: int = Field(default=3, ge=0, le=64, description="tokens too many, or left out, that are seen through")
    beams: int = Field(default=5, ge=1, le=256, description="beams of the search")
    severity_rule: Literal["rank", "probability"] = Field(
        default="rank", description="a differing token's severity by its rank (4, 8, 30) or its probability"
    )
    phrase_rule: Literal["spce", "run"] = Field(
        default="spce", description="widen errors to whole phrases of the dependency tree, or take them as they are"
    )
    weights: tuple[Weight, Weight, Weight] = Field(
        default=(0.1, 1.0, 5.0), description="weights of minor, major and critical phrases"
    )
    thresholds: tuple[Probability, Probability, Probability] = Field(
        default=(0.5, 0.2, 0.05),
        description="an estimated word is minor, major or critical below these probabilities of being right",
    )
    epochs: Passes = Field(default=3, description="passes over the labeled translations")
    batch_size: Batch = Field(default=32, description="labeled translations in a step of training")
    learning_rate: Rate = Field(default=1e-5, description="of the estimator")
    seed: Seed = Field(default=0, description="of the estimator's heads and of the order of training")

    @field_validator("weights", "thresholds", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("weights")
    @classmethod
    def _weights_grow(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a <= b for a, b in pairwise(value)):
            raise ValueError(f"{value} is not allowed; give three numbers that do not fall")
        return value

    @field_validator("thresholds")
    @classmethod
    def _thresholds_fall(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a >= b for a, b in pairwise(value)):
            raise ValueError(f"{value} is not allowed; give three numbers that do not grow")
        return value

    # --- what a user does --------------------------------------------------------------------------------------------

    @property
    def estimates(self) -> bool:
        return self.estimator is not None

    def label(
        self,
        rows: Sequence[TranslationRow],
        generator: Loaded | None = None,
        parse: Parse | None = None,
        progress: Progress | None = None,
    ) -> list[JudgedTranslation]:
        """Translations with errors, by references.

        Args:
            generator: writes the translations that rows lack, see `translate`.
            parse: the dependency tree of a list of words, see `heads_of`; for rows without `heads`.
            progress: called with (translations done, all).

        Raises:
            InputError: a row without reference, no annotator, no tree where phrases are asked for, or a translation
                without a generator.
        """
        self._check_labels(rows, parse)
        if generator is None and (missing := [i for i, row in enumerate(rows, 1) if row.translation is None]):
            raise InputError(f"row {missing[0]} has no translation; give 'translation', or a model that translates")
        annotator = self._annotator(generator)
        judged: list[JudgedTranslation] = []
        for first in range(0, len(rows), BATCH):
            part = self._translated(rows[first : first + BATCH], generator)
            judged += self._labeled(part, annotator, parse)
            if progress:
                progress(len(judged), len(rows))
        return judged

    def estimate(self, rows: Sequence[TranslationRow]) -> list[JudgedTranslation]:
        """What the estimator says of translations.

        Raises:
            InputError: no estimator, a row without a translation, or one that it cannot read.
        """
        if self.estimator is None:
            raise InputError("dcsqe estimates by a trained estimator; give -o estimator=FOLDER")
        self.check(rows)
        model, tokenizer = load_estimator(self.estimator)
        texts = [cast(str, row.translation) for row in rows]
        found = model.estimate(tokenizer, [row.source for row in rows], texts)
        return [
            JudgedTranslation(
                source=row.source,
                translation=text,
                bad=one.bad,
                severities=[ORDER[sum(1 - bad < bound for bound in self.thresholds)] for bad in one.bad],
                score=one.score,
            )
            for row, text, one in zip(rows, texts, found)
        ]

    def fit(self, judged: Sequence[JudgedTranslation], progress: Progress | None = None) -> Loaded:
        """An estimator that has learned from labeled translations, and its tokenizer.

        Raises:
            InputError: no encoder, or no wrong word to learn from.
        """
        if self.encoder is None:
            raise InputError(ENCODER)
        schedule = {"num_train_epochs": self.epochs, "learning_rate": self.learning_rate, "seed": self.seed}
        schedule["per_device_train_batch_size"] = self.batch_size
        return trained_estimator(self.encoder, judged, schedule, progress)

    # --- the steps ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def translate(self, generator: Loaded, sources: Sequence[str], references: Sequence[str]) -> list[str]:
        """Translations by beam search that is pulled towards references, all in one batch.

        Raises:
            InputError: a model that does not translate, an empty source or reference, unequal numbers of them, or a
                source of more tokens than the model has positions.
        """
        check_translator(generator, "generator")
        if isinstance(sources, str) or isinstance(references, str) or len(sources) != len(references):
            raise InputError("sources and references are not as many; give two lists with one text each")
        model, tokenizer = generator
        for name, texts in (("source", sources), ("reference", references)):
            for i, text in enumerate(texts, 1):
                if not text.strip():
                    raise InputError(f"{name} {i} is empty; give one with words")
        ids = cast(list[list[int]], tokenizer(text_target=list(references)).input_ids)
        constraint = Constraint(self.theta, self.lam, self.tau, self.window)
        pull = ReferenceConstrainedLogitsProcessor(ids, tokenizer, constraint)
        batch = encoded(tokenizer, sources).to(model.device)
        check_room(generator, batch, "source")
        longest, room = 2 * max(map(len, ids)) + 10, fixed_positions(model)
        if room is not None:
            longest = min(longest, room - 1)  # the first position is the start token's
        options = {"num_beams": self.beams, "do_sample": False, "max_new_tokens": longest, "logits_processor": [pull]}
        written = cast(Tensor, cast(Any, model).generate(**batch, **options))
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    def check(self, rows: Sequence[TranslationRow], learns: bool = False) -> None:
        """See `TranslationMethod.check`."""
        if learns and self.encoder is None:
            raise InputError(ENCODER)
        if not self.estimates:
            self._check_labels(rows, None)
        for i, row in enumerate(rows, 1):
            if self.estimates and not (row.translation or "").strip():
                raise InputError(f"row {i} has no translation to estimate; give 'translation'")

    def _check_labels(self, rows: Sequence[TranslationRow], parse: Parse | None) -> None:
        """Refuse rows that cannot be labeled, before anything runs."""
        if self.annotator is None:
            raise InputError(
                "dcsqe labels by a second translation model; give -o annotator=NAME, or -o estimator=FOLDER"
            )
        for i, row in enumerate(rows, 1):
            if not (row.reference or "").strip():
                raise InputError(f"row {i} has no reference, by which translations are labeled; give 'reference'")
            if row.translation is not None and not row.translation.strip():
                raise InputError(f"the translation of row {i} is empty; give one with words")
            if row.heads is not None and row.translation is None:
                raise InputError(f"row {i} has heads but no translation that they are of; give 'translation', too")
            if self.phrase_rule == "spce" and row.heads is None and parse is None:
                raise InputError(
                    f"row {i} has no dependency tree, by which phrases are found; give 'heads' of a 'translation', a "
                    "parser in Python, or -o phrase_rule=run"
                )

    def _annotator(self, generator: Loaded | None) -> Loaded:
        annotator = self.annotator
        if not isinstance(annotator, Loaded):
            annotator = Loaded(*annotator) if isinstance(annotator, tuple) else self._named(annotator, generator)
        check_translator(annotator, "annotator")
        if generator is not None and fingerprint(annotator.model) == fingerprint(generator.model):
            logger.warning(
                "generator and annotator have the same weights: a model finds next to nothing wrong with what it wrote "
                "itself; use another annotator"
            )
        return annotator

    def _named(self, name: str, generator: Loaded | None) -> Loaded:
        return load(name) if generator is None else shared(name, generator.model)

    def _translated(self, rows: Sequence[TranslationRow], generator: Loaded | None) -> list[TranslationRow]:
        """Rows that all have a translation."""
        missing = [row for row in rows if row.translation is None]
        if not missing or generator is None:
            return list(rows)
        pairs = [row.source for row in missing], [cast(str, row.reference) for row in missing]
        made = iter(self.translate(generator, *pairs))
        return [
            row if row.translation is not None else row.model_copy(update={"translation": next(made)}) for row in rows
        ]

    def _labeled(
        self, rows: Sequence[TranslationRow], annotator: Loaded, parse: Parse | None
    ) -> list[JudgedTranslation]:
        """Tags by the references, severities by the annotator, phrases, scores."""
        words = [cast(str, row.translation).split() for row in rows]
        tags = [ter_tags(mine, cast(str, row.reference).split()) for mine, row in zip(words, rows)]
        found = annotate_severity(annotator, [row.source for row in rows], words, tags, self.severity_rule)
        return [self._judged(row, mine, severities, parse) for row, mine, severities in zip(rows, words, found)]

    def _judged(
        self, row: TranslationRow, words: list[str], severities: list[Severity], parse: Parse | None
    ) -> JudgedTranslation:
        """The last severity is that of the end, where words may be missing: a phrase without words."""
        *own, end = severities
        heads = None
        if self.phrase_rule == "spce":
            heads = heads_of(cast(Parse, parse)(words) if row.heads is None else row.heads, words)
        phrases = phrase_labels(own, heads)
        for phrase in phrases:  # a widened one may reach into the one before
            for i in range(phrase.start, phrase.stop):
                own[i] = worst((own[i], phrase.severity))
        missing = [] if end == "ok" else [Phrase(len(words), len(words), end)]
        return JudgedTranslation(
            source=row.source,
            translation=cast(str, row.translation),
            bad=[float(severity != "ok") for severity in own],
            severities=own,
            score=mqm_score([*phrases, *missing], len(words), self.weights),
        )
