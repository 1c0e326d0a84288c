"""The estimator: an encoder of a translation and its source, which tags each word and scores the sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.generic import ModelOutput

from ...core.errors import InputError
from ...core.progress import Progress
from ...models.checkpoint_files import check_weights, read_config, read_tokenizer, reading
from ...models.load import Loaded
from ...models.positions import context_window
from .answer import JudgedTranslation
from .tags import word_tokens

__all__ = [
    "Estimate",
    "QETrainer",
    "QualityEstimator",
    "QualityEstimatorConfig",
    "QualityOutput",
    "load_estimator",
    "trained_estimator",
]

UNTAGGED = -100


class QualityEstimatorConfig(PreTrainedConfig):
    """An encoder's config, and the weight of right words in the loss."""

    model_type = "tokenry_quality_estimator"
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]  # as transformers does

    def __init__(self, encoder: Any = None, ok_weight: float = 1.0, **kwargs: Any) -> None:
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder, self.ok_weight = encoder, ok_weight
        super().__init__(**kwargs)


@dataclass
class QualityOutput(ModelOutput):
    """`loss`; `logits` (batch, words, 2) of right and wrong; `score` (batch,) in [0, 1]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    score: Tensor | None = None


class Estimate(NamedTuple):
    """Of a translation: the probability that each word is wrong, and the sentence's score."""

    bad: list[float]
    score: float


class QualityEstimator(PreTrainedModel):
    """Tags words, by two classes on each word's first token, and scores sentences, by the mean of these states and the
    state of the first token of all.

    estimator = QualityEstimator.from_encoder(AutoModel.from_pretrained("xlm-roberta-base"))
    """

    config_class = QualityEstimatorConfig
    config: QualityEstimatorConfig
    base_model_prefix = "encoder"

    def __init__(self, config: QualityEstimatorConfig) -> None:
        super().__init__(config)
        width = config.encoder.hidden_size
        self.encoder = AutoModel.from_config(config.encoder, trust_remote_code=False)
        self.tagger, self.scorer = nn.Linear(width, 2), nn.Linear(2 * width, 1)
        self.post_init()

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel) -> QualityEstimator:
        """With the weights of an encoder, and new heads."""
        tokens: dict[str, Any] = {
            name: getattr(encoder.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        }
        made = cls(QualityEstimatorConfig(encoder=encoder.config, **tokens))
        missing, _ = made.encoder.load_state_dict(encoder.state_dict(), strict=False)
        check_whole(type(encoder).__name__, missing)
        return made

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        starts: Tensor,
        labels: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> QualityOutput:
        """The loss is the cross-entropy, summed over words, and the mean squared error of scores.

        Args:
            starts: (batch, words) the column of each word's first token, -1 where a row has no more words.
            labels: (batch, words) 1 for wrong words, 0 for others, -100 for none; scores: (batch,).
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = (starts >= 0)[..., None]
        words = states.gather(1, starts.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])) * there
        mean = words.sum(1) / there.sum(1)
        first = states[torch.arange(len(states)), attention_mask.int().argmax(1)]
        logits, score = self.tagger(words), self.scorer(torch.cat([mean, first], -1)).squeeze(-1).sigmoid()
        loss = None
        if labels is not None and scores is not None:
            weight = torch.tensor([self.config.ok_weight, 1.0], device=logits.device)
            tags = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), weight, ignore_index=UNTAGGED, reduction="sum"
            )
            loss = tags + F.mse_loss(score, scores)
        return QualityOutput(loss=loss, logits=logits, score=score)

    @torch.no_grad()
    def estimate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sources: Sequence[str],
        translations: Sequence[str],
        batch_size: int = 64,
    ) -> list[Estimate]:
        """What is wrong with translations, whose words are those between blanks.

        Raises:
            InputError: an empty one, one beyond the encoder's window, or unequal numbers of sources and translations.
        """
        if isinstance(sources, str) or isinstance(translations, str) or len(sources) != len(translations):
            raise InputError("sources and translations are not as many; give two lists with one text each")
        self.eval()
        collator, found = QECollator(tokenizer, context_window(self.encoder)), []
        for first in range(0, len(sources), batch_size):
            part = slice(first, first + batch_size)
            batch = collator.encoded(sources[part], [text.split() for text in translations[part]])
            output = self(**{name: value.to(self.device) for name, value in batch.items()})
            bad = output.logits.float().softmax(-1)[..., 1]
            for row, starts, score in zip(bad.tolist(), batch["starts"], output.score.tolist()):
                found.append(Estimate(row[: int((starts >= 0).sum())], score))
        return found


def check_whole(name: str, missing: Iterable[str]) -> None:
    """Refuse an encoder without weights that count; a pooler's do not."""
    needed = sorted(weight for weight in missing if "pooler" not in weight)
    if needed:
        raise InputError(f"the encoder {name!r} lacks the weight {needed[0]!r}; give one that is whole")


class QECollator:
    """Batches of labeled translations: translation and source as a pair, in this order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int | None) -> None:
        self.tokenizer, self.window = tokenizer, window

    def __call__(self, rows: Sequence[JudgedTranslation]) -> dict[str, Tensor]:
        batch = self.encoded([row.source for row in rows], [row.words for row in rows])
        labels = torch.full_like(batch["starts"], UNTAGGED)
        for i, row in enumerate(rows):
            labels[i, : len(row.severities)] = torch.tensor([severity != "ok" for severity in row.severities])
        return {**batch, "labels": labels, "scores": torch.tensor([row.score for row in rows])}

    def encoded(self, sources: Sequence[str], translations: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `starts`, see `QualityEstimator.forward`."""
        if not all(translations):
            raise InputError(f"translation {list(map(bool, translations)).index(False) + 1} is empty; give words")
        batch = word_tokens(
            self.tokenizer,
            text=[list(words) for words in translations],
            text_pair=[source.split() for source in sources],
        )
        width = batch["input_ids"].shape[1]
        if self.window is not None and width > self.window:
            raise InputError(
                f"a translation and its source have {width} tokens, the encoder's window {self.window}; shorten them"
            )
        starts = torch.full((len(sources), max(map(len, translations))), -1)
        for row, words in enumerate(translations):
            for i in range(len(words)):
                starts[row, i] = _first_token(batch, row, i, words[i])
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "starts": starts}


def _first_token(batch: BatchEncoding, row: int, word: int, text: str) -> int:
    span = batch.word_to_tokens(row, word, 0)
    if span is None:
        raise InputError(f"the encoder's tokenizer has no token for the word {text!r}; use another encoder")
    return span.start


class QETrainer(Trainer):
    """A `transformers.Trainer` of a `QualityEstimator` on labeled translations.

    Right words weigh 2 / (right words / wrong words), so that the many right ones do not hide the wrong ones.

    Raises:
        InputError: no translations, or none with a wrong word.
    """

    def __init__(
        self,
        model: QualityEstimator,
        args: TrainingArguments,
        train_dataset: Sequence[JudgedTranslation],
        processing_class: PreTrainedTokenizerBase,
        **options: Any,
    ) -> None:
        model.config.ok_weight = ok_weight(train_dataset)
        args.remove_unused_columns = False
        collator = QECollator(processing_class, context_window(model.encoder))
        super().__init__(
            model, args, collator, train_dataset=cast(Any, train_dataset), processing_class=processing_class, **options
        )
        self.model_accepts_loss_kwargs = False


def ok_weight(rows: Sequence[JudgedTranslation]) -> float:
    """See `QETrainer`."""
    words = [severity != "ok" for row in rows for severity in row.severities]
    if not any(words):
        raise InputError(f"none of the {len(words)} words of {len(rows)} translations is wrong; label more of them")
    return 2 * sum(words) / max(1, len(words) - sum(words))


# --- in one call -----------------------------------------------------------------------------------------------------


def load_estimator(place: Any) -> tuple[QualityEstimator, PreTrainedTokenizerBase]:
    """An estimator and its tokenizer from the folder where they were saved; both given comes back as it is.

    Raises:
        InputError: nothing there, or something else.
    """
    if isinstance(place, tuple):
        return cast(tuple[QualityEstimator, PreTrainedTokenizerBase], place)
    folder = Path(place).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"there is no estimator in {str(place)!r}; give a folder that `tokenry judge --save` has written"
        )
    with reading(str(place), "estimator"):
        found = read_config(folder).get("model_type")
        if found != QualityEstimatorConfig.model_type:
            raise InputError(f"{str(place)!r} holds a model of the type {found!r} and no quality estimator; give one")
        model, info = cast(Any, QualityEstimator.from_pretrained(folder, output_loading_info=True))
        check_weights(info, "QualityEstimator")
        return model.eval(), read_tokenizer(folder)


def trained_estimator(
    encoder: str | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    judged: Sequence[JudgedTranslation],
    schedule: dict[str, Any],
    progress: Progress | None = None,
) -> Loaded:
    """An estimator that has learned from labeled translations, and its tokenizer.

    Args:
        encoder: folder or hub id, or a model and its tokenizer; its weights are copied.
        schedule: arguments of `TrainingArguments`, with a seed.
        progress: called with (steps done, steps).
    """
    model, tokenizer = _encoder(encoder)
    set_seed(schedule["seed"])
    estimator = QualityEstimator.from_encoder(model).to(model.device)  # pyright: ignore[reportArgumentType]
    with TemporaryDirectory() as work:
        quiet = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
        pin = torch.cuda.is_available()
        args = TrainingArguments(
            work, use_cpu=model.device.type == "cpu", dataloader_pin_memory=pin, **quiet, **schedule
        )
        trainer = QETrainer(estimator, args, judged, tokenizer)
        trainer.remove_callback(PrinterCallback)
        if progress:
            trainer.add_callback(_Progress(progress))
        trainer.train()
    return Loaded(estimator.eval(), tokenizer)


def _encoder(place: str | tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> tuple[Any, PreTrainedTokenizerBase]:
    if not isinstance(place, str):
        return place
    with reading(place, "encoder"):
        model, found = AutoModel.from_pretrained(place, output_loading_info=True, trust_remote_code=False)
        check_whole(place, found["missing_keys"])
        return model, read_tokenizer(place)


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
