"""Difficulty probe: from the state of a question's last token, how hard the model will find it.

Paper: DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669. The labels that it
learns from are the model's own: how sure it was of its samples, and how often right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Count, Probability, Rate, Temperature, Tokens, Weight, check
from ..core.progress import Progress
from ..learned.difficulty_probe import CLASSES, DifficultyProbe, Prompt, read_questions
from ..models.load import Loaded
from ..models.prompts import listed_prompts
from ..text.answers import check_marker
from .contract import Fitted, Reading, ReadMethod
from .samples.entropy import EntropyProfile, entropy_profile
from .samples.problems import Problems, problems_in, sums

__all__ = ["DifficultyProbeMethod", "label_by_entropy", "question_states"]


class DifficultyProbeMethod(ReadMethod):
    """Train a difficulty probe: profile the model's own samples, label by entropy and correctness, fit."""

    slug: ClassVar[str] = "difficulty-probe"
    title: ClassVar[str] = "Difficulty probe"
    paper: ClassVar[str] = (
        "DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669"
    )
    claim: ClassVar[str] = "The state of a question's last token tells how hard the model will find it."

    takes: ClassVar = ("text",)
    artifact: ClassVar[type] = DifficultyProbe
    learns_from: ClassVar[str] = "a file with lines of {question: ..., answer: ...}, or arithmetic:N for N sums"

    n_samples: int = Field(default=10, ge=2, le=10_000, description="samples drawn of each question")
    temperature: Temperature = Field(default=0.8, description="of these samples")
    alpha: Probability = Field(default=0.7, description="correctness from which a question is solved")
    beta: Weight | None = Field(
        default=None, description="entropy in nats up to which a solved question is normal; none: 60 % of them"
    )
    gamma: Probability = Field(default=0.3, description="correctness below which a question is hard")
    hidden: int = Field(
        default=256, ge=0, le=2**16, description="width of the probe's hidden layer; 0 for a linear probe"
    )
    learning_rate: Rate = Field(default=1e-3, description="of AdamW")
    epochs: Count = Field(default=100, description="passes over the questions")
    max_new_tokens: Tokens = Field(default=256, description="the budget of an answer")
    marker: str = Field(
        default="boxed",
        description="where the answer of a sample is: boxed, answer (after 'A:', 'The answer is' or '####'), number "
        "(the last), or a regex with one group",
    )
    fit_options: ClassVar[tuple[str, ...]] = (
        *("n_samples", "temperature", "alpha", "beta", "gamma", "hidden", "learning_rate", "epochs"),
        *("max_new_tokens", "marker"),
    )

    @field_validator("marker")
    @classmethod
    def _is_marker(cls, marker: str) -> str:
        check_marker(marker)
        return marker

    @model_validator(mode="after")
    def _in_order(self) -> DifficultyProbeMethod:
        if self.alpha < self.gamma:
            raise InputError(f"alpha={self.alpha} is below gamma={self.gamma}; give 0 <= gamma <= alpha <= 1")
        return self

    def examples(self, source: str, text: str | None) -> Problems:
        """The problems of a file, or sums for arithmetic:N."""
        if text is not None:
            return problems_in(text, source, self.marker)
        task, _, count = source.partition(":")
        if task != "arithmetic" or not count.isdecimal():
            raise InputError(f"{source!r} is no file and no known task; give {self.learns_from}")
        if "marker" in self.model_fields_set:
            raise InputError("marker would have no effect with arithmetic:N; leave it out")
        check("N of arithmetic:N", int(count), Count)
        return sums(int(count))

    def fit(self, loaded: Loaded, data: Problems | None = None, progress: Progress | None = None) -> Fitted:
        """Profile the model's samples of the problems, label them, and train on the labels."""
        if data is None:
            raise InputError(f"{self.slug} has nothing to learn from; give problems, see `examples`")
        profile = self.profile(*loaded, *data, progress=progress)
        labels = self.labels(profile)
        probe = self.probe(*loaded, data.questions, labels)
        rows = [{"class": CLASSES[row.pop("level")], **row} for row in profile.reading(labels).rows]
        quality = f"right on {probe.held_out_accuracy:.0%} of the questions held out"
        return Fitted(probe, [Reading("the model's own samples, by class", rows)], quality)

    def load(self, path: str, loaded: Loaded) -> DifficultyProbe:
        """See `DifficultyProbe.load` and `check`."""
        probe = DifficultyProbe.load(path)
        probe.check(*loaded)
        return probe

    def read(self, given: str, artifact: DifficultyProbe | None = None, loaded: Loaded | None = None) -> Reading:
        """The class of a question and the probability of each."""
        if artifact is None or loaded is None:
            raise InputError("the difficulty of a question needs a probe and its model; give artifact= and loaded=")
        (probabilities,) = artifact.probabilities(read_questions(*loaded, [given]).states).tolist()
        best = CLASSES[int(np.argmax(probabilities))]
        row = {"question": given, "class": best, **dict(zip(CLASSES, probabilities))}
        return Reading("how hard the model will find the question", [row])

    def profile(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        is_correct: Callable[[int, str], bool],
        **options: object,
    ) -> EntropyProfile:
        """`entropy_profile` with these settings; `options` replace some of them."""
        settings = {name: getattr(self, name) for name in ("n_samples", "temperature", "max_new_tokens")}
        return entropy_profile(model, tokenizer, prompts, is_correct, **{**settings, **options})

    def labels(self, profile: EntropyProfile) -> np.ndarray:
        """`label_by_entropy` with these settings."""
        return label_by_entropy(profile.entropy, profile.correctness, self.alpha, self.beta, self.gamma)

    def probe(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        labels: Sequence[int] | np.ndarray,
        chat: bool = True,
        seed: int = 0,
    ) -> DifficultyProbe:
        """A probe of these prompts and their classes, bound to the model."""
        states = question_states(model, tokenizer, prompts, chat)
        probe = DifficultyProbe(states.shape[1], self.hidden)
        probe.fit(states, torch.as_tensor(labels), learning_rate=self.learning_rate, epochs=self.epochs, seed=seed)
        return probe.bind(model, tokenizer, chat)


EASY, NORMAL, HARD = range(len(CLASSES))
BETA_PERCENTILE = 60  # of the entropy of questions that are mostly solved


def label_by_entropy(
    entropy: Sequence[float] | np.ndarray,
    correctness: Sequence[float] | np.ndarray,
    alpha: float = 0.7,
    beta: float | None = None,
    gamma: float = 0.3,
) -> np.ndarray:
    """The class of each question (arXiv 2510.19669): normal if correctness >= alpha and entropy <= beta; else hard if
    correctness < gamma; else easy. Indices into `CLASSES`, int64.

    Args:
        beta: in nats; None for the 60th percentile of entropy among questions with correctness >= alpha.

    Raises:
        InputError: alpha < gamma or outside [0, 1], unequal lengths, entropies that are not finite.
    """
    e, r = np.asarray(entropy, float), np.asarray(correctness, float)
    if not 0 <= gamma <= alpha <= 1:
        raise InputError(f"alpha={alpha}, gamma={gamma} is not allowed; give 0 <= gamma <= alpha <= 1")
    if e.shape != r.shape or not (np.isfinite(e).all() and np.isfinite(r).all()):
        raise InputError("entropy and correctness must be finite and as many; leave out questions without samples")
    solved = r >= alpha
    if beta is None:
        beta = np.percentile(e[solved], BETA_PERCENTILE) if solved.any() else -np.inf
    return np.where(solved & (e <= beta), NORMAL, np.where(r < gamma, HARD, EASY))


def question_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """The states (questions, width) a probe reads, see `read_questions`."""
    prompts = listed_prompts(prompts)
    parts = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    return torch.cat([read_questions(model, tokenizer, part, chat).states.cpu() for part in parts])
