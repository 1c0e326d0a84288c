"""CyclicReflex: a triangular wave on the logits of reflection words, with TIP and budget forcing as baselines.

Paper: CyclicReflex: Improving (Large) Reasoning Models via Cyclical Reflection Token Scheduling, arXiv 2506.11077.
"Wait", "but", "alternatively" begin a reconsideration. The wave raises and lowers their logits by turns along the
generated text until thinking ends. TIP (arXiv 2501.18585) only lowers them, near the start of each thought; budget
forcing (s1, arXiv 2501.19393) leaves the logits alone and edits the end of thinking instead.

Everything is computed from the ids of the row, never from a counter: rewinds and unequal rows need no care.
The bias is added to raw logits, before temperature and top-p. The odds of a reflection token against any other token
are multiplied by exp(bias).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ..errors import InputError
from ..method import Lines
from .core import Row, Violation
from .method import DecodeMethod, Plugins

__all__ = [
    "REFLECTION_WORDS",
    "BudgetForcing",
    "BudgetForcingMonitor",
    "CyclicReflectionLogitsProcessor",
    "CyclicReflex",
    "ThoughtSwitchPenalty",
    "ThoughtSwitchPenaltyLogitsProcessor",
    "constant_schedule",
    "linear_decay_schedule",
    "noise_schedule",
    "reflection_token_ids",
    "triangular_wave",
]

REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")
IGNORED, AGAIN, CLOSED = "budget:ignore", "budget:again", "budget:close"  # rules of BudgetForcingMonitor

Schedule = Callable[[int], float]


# --- the wave and the other schedules --------------------------------------------------------------------------


def triangular_wave(t: Any, A: Any, C: Any, s: Any = 0.0) -> Any:
    """The bias at position `t` in logits: 0 at t = 0, +A at C/4, 0 at C/2, -A at 3C/4 (arXiv 2506.11077).

    Args:
        t: generated tokens so far, number, numpy array or torch tensor; all four broadcast.
        A: amplitude in logits, >= 0.
        C: period in tokens, > 0, not necessarily whole.
        s: shift as a fraction of a period, in [0, 1).

    Returns:
        A tensor if any argument is one, else a numpy array (float64) of the broadcast shape.

    Raises:
        InputError: A, C or s out of range.
    """
    if not any(isinstance(x, Tensor) for x in (t, A, C, s)):
        t, A, C, s = (np.asarray(x, dtype=float) for x in (t, A, C, s))
    _check(A >= 0, "amplitude", A, "a number >= 0")
    _check(C > 0, "period", C, "a number of tokens > 0")
    _check((s >= 0) & (s < 1), "shift", s, "a fraction of a period in [0, 1)")
    return A * (abs(4 * ((t / C + s - 0.25) % 1) - 2) - 1)


def constant_schedule(value: float) -> Schedule:
    """The same bias everywhere; above 0 this is "positive TIP" once `windows` says where."""
    return lambda t: value


def linear_decay_schedule(amplitude: float, budget: int) -> Schedule:
    """From +amplitude at the first token down to -amplitude at token `budget`, and -amplitude from there on."""
    _check(budget > 0, "budget", budget, "a number of tokens > 0")
    return lambda t: amplitude * (1 - 2 * min(t / budget, 1.0))


def noise_schedule(amplitude: float, seed: int = 0) -> Schedule:
    """Uniform noise in [-amplitude, amplitude), a function of the position so that rewinds see the same noise."""
    _check(amplitude >= 0, "amplitude", amplitude, "a number >= 0")
    return lambda t: float(np.random.default_rng((seed, t)).uniform(-amplitude, amplitude))


# --- tokens ----------------------------------------------------------------------------------------------------


def reflection_token_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = REFLECTION_WORDS, leading_space: bool = True
) -> list[int]:
    """The token ids of the words, each once, in order.

    Args:
        words: each must be one token. A word that begins with a space is taken as it is.
        leading_space: also the form after a space (" wait"), which is the usual one inside a sentence. The official
            code has only the forms without it.

    Raises:
        InputError: no words, or a form that is not exactly one token; its pieces are shown.
    """
    _check_words(words)
    forms = [form for word in words for form in ((word, " " + word) if leading_space and word[0] != " " else (word,))]
    ids: dict[int, None] = {}
    for form in forms:
        pieces = _pieces(tokenizer, form)
        if len(pieces) != 1:
            hint = " or leave out its form after a space (leading_space=False)" if form not in words else ""
            raise InputError(f"{form!r} is not one token here but {_show(pieces)}; choose another word{hint}")
        ids.update(pieces)
    return list(ids)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[int, str]:
    """Token ids of `text` with what each decodes to. One entry means: exactly this text is one token.

    `convert_tokens_to_ids` would give None or the unknown token for a text that is not in the vocabulary; an
    encoding that does not decode to the text again is shown as such instead.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids}
    if len(ids) == 1 and shown[ids[0]] != text:
        return {ids[0]: shown[ids[0]], -1: "(not the same text)"}
    return shown if len(shown) == len(ids) else {**shown, -1: "(repeated)"}


def _show(pieces: dict[int, str]) -> str:
    return " + ".join(repr(p) if i >= 0 else p for i, p in pieces.items()) or "nothing"


def _end_think_ids(tokenizer: PreTrainedTokenizerBase, end_think: str | Sequence[int] | None) -> Sequence[int] | None:
    """The ids of the end-of-thinking mark: one vocabulary entry if it is text, else what was given."""
    if not isinstance(end_think, str):
        return end_think
    pieces = _pieces(tokenizer, end_think)
    if len(pieces) != 1:
        raise InputError(
            f"end_think={end_think!r} is not in this vocabulary (it would be {_show(pieces)}); give the mark of your "
            "model, its token ids (end_think=12,34), or end_think=none to a logits rule if the model does not think"
        )
    return list(pieces)


# --- where the prompt ends -------------------------------------------------------------------------------------


class _PromptLength:
    """How many of a call's columns are the prompt: P.

    The decode loop says so with `begin`. Under plain `generate` nobody does, so a call continues the generation of the
    call before if all but its newest column are known from there (for beams: from any row; for assisted decoding: a
    shorter part of it), and starts a new one otherwise. A new prompt that is a part of the previous output therefore
    counts as its continuation, unless `prompt_length` or `begin` says otherwise.
    """

    def __init__(self, fixed: int | None) -> None:
        if fixed is not None and fixed < 1:
            raise InputError(f"prompt_length={fixed} is not allowed; give the number of prompt columns, >= 1")
        self.length = fixed
        self.fixed = fixed is not None
        self.looped = False  # the decode loop runs: rows come alone and jump to and fro
        self.prompts: Tensor | None = None
        self.last: Tensor | None = None
        self.warned = False

    def begin(self, prompt_length: int) -> None:
        self.length, self.looped = prompt_length, True
        self.fixed = self.warned = False
        self.prompts = self.last = None

    def end(self) -> None:
        self.looped = False
        self.prompts = self.last = None

    def __call__(self, input_ids: Tensor) -> int:
        width = input_ids.shape[1]
        if self.fixed:
            if width < self.length:
                raise InputError(f"prompt_length={self.length} is more than the {width} tokens given; leave it out")
        elif self.looped:
            self._follow_loop(input_ids, width)
        else:
            self._follow_generate(input_ids, width)
        return self.length

    def _follow_loop(self, input_ids: Tensor, width: int) -> None:
        if self.prompts is None and width == self.length:
            self.prompts = input_ids.clone()
        known = self.prompts is not None and width >= self.length
        if not known or not _rows_in(input_ids[:, : self.length], self.prompts):
            self.looped = False  # another generation, outside the loop
            self._follow_generate(input_ids, width)

    def _follow_generate(self, input_ids: Tensor, width: int) -> None:
        known = self.last is not None and self.length < width <= self.last.shape[1] + 1
        before = self.last[:, : width - 1] if known else None
        if not known or not _rows_in(input_ids[:, :-1], before):
            self.length, self.warned = width, False
        elif not self.warned and input_ids.shape[0] == before.shape[0] and not torch.equal(input_ids[:, :-1], before):
            self.warned = True
            warnings.warn(
                "beam search gives log-probabilities; the bias is added to them and they no longer sum to 1. "
                "Set renormalize_logits=True.",
                stacklevel=2,
            )
        self.last = input_ids.clone()


def _rows_in(rows: Tensor, table: Tensor) -> bool:
    """Whether every row of (n, length) is a row of (m, length)."""
    if rows.shape == table.shape and torch.equal(rows, table):
        return True
    return bool((rows[:, None] == table[None]).all(-1).any(1).all())


# --- logits processors -----------------------------------------------------------------------------------------


class _BiasLogitsProcessor(LogitsProcessor):
    """Adds one number per row to the logits of a few tokens, until the row has ended thinking."""

    def __init__(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None = None
    ) -> None:
        self.token_ids = tuple(dict.fromkeys(_checked_ids("token_ids", token_ids)))  # each biased once
        self.end_think_ids = None if end_think_ids is None else _checked_ids("end_think_ids", end_think_ids)
        self.prompt_length = _PromptLength(prompt_length)

    def begin(self, prompt_length: int) -> None:
        """A new generation starts; its prompts fill the first `prompt_length` columns."""
        self.prompt_length.begin(prompt_length)

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self.prompt_length.end()

    def bias(self, generated: Tensor) -> Tensor:
        """What to add, in logits, for each row of generated ids (batch, t): (batch,), float32."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocab) with the bias added; a new tensor, or `scores` itself where there is no bias."""
        if max(self.token_ids) >= scores.shape[-1]:
            raise InputError(
                f"token id {max(self.token_ids)} is outside the model's vocabulary of {scores.shape[-1]}; "
                "take the ids from this model's tokenizer"
            )
        generated = input_ids[:, self.prompt_length(input_ids) :]
        bias = self.bias(generated).masked_fill(self._ended(generated), 0.0)
        if not bool(bias.any()):
            return scores
        ids = torch.tensor(self.token_ids, device=scores.device)
        return scores.float().index_add(1, ids, bias[:, None].expand(-1, len(ids)))

    def _ended(self, generated: Tensor) -> Tensor:
        """Rows (batch,) whose generated ids hold the whole end mark. In a prompt it does not count."""
        if self.end_think_ids is None or generated.shape[1] < len(self.end_think_ids):
            return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)
        mark = torch.tensor(self.end_think_ids, device=generated.device)
        return (generated.unfold(1, len(mark), 1) == mark).all(-1).any(-1)


class CyclicReflectionLogitsProcessor(_BiasLogitsProcessor):
    """Adds `triangular_wave` of the position to the logits of reflection tokens (arXiv 2506.11077).

    Args:
        token_ids: the reflection tokens, see `reflection_token_ids`.
        amplitude, period, shift: see `triangular_wave`.
        windows: half-open ranges [start, end) of generated positions where the bias acts; None everywhere.
        end_think_ids: the token ids that together end thinking; the row is left alone after them. None: never.
        prompt_length: prompt columns of every call; None finds out.
        schedule: bias by position instead of the wave, for ablations.

    Raises:
        InputError: ids empty or negative, a parameter out of range, windows reversed or overlapping; when called, an
            id outside the vocabulary.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        amplitude: float = 3.0,
        period: float = 600.0,
        shift: float = 0.0,
        windows: Sequence[tuple[int, int]] | None = None,
        end_think_ids: Sequence[int] | None = None,
        prompt_length: int | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(token_ids, end_think_ids, prompt_length)
        triangular_wave(0, amplitude, period, shift)  # refuses what is out of range
        _check_windows(windows)
        self.windows = windows
        self.schedule = schedule or (lambda t: float(triangular_wave(t, amplitude, period, shift)))

    def bias(self, generated: Tensor) -> Tensor:
        batch, t = generated.shape
        inside = self.windows is None or any(start <= t < end for start, end in self.windows)
        return torch.full((batch,), self.schedule(t) if inside else 0.0, device=generated.device)


class ThoughtSwitchPenaltyLogitsProcessor(_BiasLogitsProcessor):
    """TIP: takes `alpha` off the logits of thought-switching tokens for `beta` tokens (arXiv 2501.18585).

    Args:
        token_ids: the switch tokens.
        alpha: penalty in logits, >= 0.
        beta: how long it lasts, in tokens, >= 0.
        per_thought: count from the last switch token (the paper); False counts from the first token only, as the
            re-implementation in the CyclicReflex code does.
        end_think_ids: as for the wave.

    Raises:
        InputError: ids empty or negative, alpha or beta out of range.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        alpha: float = 3.0,
        beta: float = 600,
        per_thought: bool = True,
        end_think_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__(token_ids, end_think_ids)
        _check(alpha >= 0, "alpha", alpha, "a number >= 0")
        _check(beta >= 0, "beta", beta, "a number of tokens >= 0")
        self.alpha, self.beta, self.per_thought = alpha, beta, per_thought

    def bias(self, generated: Tensor) -> Tensor:
        age = generated.shape[1] - self._thought_start(generated)
        return torch.where(age < self.beta, -float(self.alpha), 0.0).to(torch.float32)

    def _thought_start(self, generated: Tensor) -> Tensor:
        """Position (batch,) of the newest switch token; 0 before the first."""
        batch, t = generated.shape
        if not self.per_thought or t == 0:
            return torch.zeros(batch, dtype=torch.long, device=generated.device)
        switch = torch.isin(generated, torch.tensor(self.token_ids, device=generated.device))
        return (switch * torch.arange(t, device=generated.device)).amax(-1)


# --- budget forcing --------------------------------------------------------------------------------------------


class BudgetForcingMonitor:
    """Budget forcing of s1 (arXiv 2501.19393) as a monitor of the decode loop: its state is the row itself.

    The end of thinking is ignored `min_ignores` times: the mark is taken back, `ignore_text` put there instead, and at
    least one new token must follow before the mark may come again. When thinking has lasted `max_thinking_tokens`
    tokens, ignored text included, `close_text` is appended, on a new line if the limit cut one in the middle. The end
    is not ignored any more when there is no room for the text and one new token below that limit.

    Args:
        end_ids: the token ids that together end thinking; may be the end-of-text token.
        max_thinking_tokens: None for no limit. `max_new_tokens` of the call must leave room for the answer.

    Raises:
        InputError: a negative count, a limit < 1, a text without tokens, or an `ignore_text` that ends thinking.
    """

    def __init__(
        self,
        end_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        min_ignores: int = 1,
        ignore_text: str = "Wait",
        max_thinking_tokens: int | None = None,
        close_text: str = "</think>\nFinal Answer:",
    ) -> None:
        self.end_ids = list(_checked_ids("end_ids", end_ids))
        _check(min_ignores >= 0, "min_ignores", min_ignores, "a whole number >= 0")
        if max_thinking_tokens is not None:
            _check(max_thinking_tokens >= 1, "max_thinking_tokens", max_thinking_tokens, "a number >= 1, or none")
        self.min_ignores, self.limit = min_ignores, max_thinking_tokens
        self.ignore_ids, self.close_ids, self.newline_ids = (
            tokenizer.encode(text, add_special_tokens=False) for text in (ignore_text, close_text, "\n")
        )
        if min_ignores and not self.ignore_ids:
            raise InputError(f"ignore_text={ignore_text!r} has no token; give a word such as 'Wait'")
        if max_thinking_tokens is not None and not self.close_ids:
            raise InputError(f"close_text={close_text!r} has no token; give the text that ends thinking")
        if min_ignores and _find(self.ignore_ids, self.end_ids):
            raise InputError(f"ignore_text={ignore_text!r} ends thinking itself; give a word such as 'Wait'")

    def check(self, row: Row) -> Violation | None:
        start = len(row.ids) - len(self.end_ids)
        if row.ids[-len(self.end_ids) :] == self.end_ids:
            return None if self._over(row, start) else self._ended(row, start)
        if self.limit is None or len(row.ids) < self.limit or row.finished or self._over(row, len(row.ids)):
            return None
        index = len(row.ids) - self.hold(row)  # a mark that has begun is replaced by the forced one
        text = row.text[: row.starts[index]] if index < len(row.ids) else row.text
        newline = self.newline_ids if text and not text.endswith("\n") else []
        return Violation(index, CLOSED, force=[*newline, *self.close_ids])

    def hold(self, row: Row) -> int:
        """Tokens of an end mark that has begun; a whole one has passed `check`."""
        for size in range(min(len(self.end_ids) - 1, len(row.ids)), 0, -1):
            if row.ids[-size:] == self.end_ids[:size]:
                return size
        return 0

    def _ended(self, row: Row, start: int) -> Violation | None:
        """What to do about the end mark at `start`: nothing, draw another token, or ignore it."""
        if any(stop == start for _, stop, rule in row.forced if rule == IGNORED):
            if (start, AGAIN) in row.ignored:
                return None
            return Violation(start, AGAIN, {self.end_ids[0]: 0.0})
        used = sum(rule == IGNORED for _, _, rule in row.forced)
        room = self.limit is None or self.limit - start > len(self.ignore_ids)
        return Violation(start, IGNORED, force=self.ignore_ids) if used < self.min_ignores and room else None

    def _over(self, row: Row, before: int) -> bool:
        """Whether thinking had ended before position `before`."""
        return any(rule == CLOSED for _, _, rule in row.forced) or _find(row.ids[:before], self.end_ids)


def _find(ids: list[int], mark: list[int]) -> bool:
    """Whether `mark` is a run of `ids`."""
    if mark[0] not in ids:  # nearly always, and fast
        return False
    return any(ids[i : i + len(mark)] == mark for i in range(len(ids) - len(mark) + 1))


# --- parameters ------------------------------------------------------------------------------------------------


def _read_ids(value: Any) -> Any:
    """Ids from the command line: '12,34'. Other values pass."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        return tuple(int(part) for part in value.split(","))
    return _read_none(value)


def _read_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _read_windows(value: Any) -> Any:
    """Windows from the command line: '0:8192,9000:9500'. Other values pass."""
    value = _read_none(value)
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\s*-?\d+:-?\d+(\s*,\s*-?\d+:-?\d+)*\s*", value):
        raise ValueError(f"{value!r} is not a list of ranges; write START:END,START:END, for example 0:8192")
    return tuple(tuple(int(n) for n in part.split(":")) for part in value.split(","))


TokenIds = Annotated[tuple[int, ...] | None, BeforeValidator(_read_ids)]
EndThink = Annotated[str | tuple[int, ...] | None, BeforeValidator(_read_ids)]
Windows = Annotated[tuple[tuple[int, int], ...] | None, BeforeValidator(_read_windows)]
Limit = Annotated[int | None, BeforeValidator(_read_none)]


class _ReflectionMethod(DecodeMethod):
    """What the wave and TIP share: whose logits they change, until when, and how they act as a logits processor.

    With `tokenizer=` (or `token_ids=` and `end_think` given as ids or None) the method itself is a logits processor:
    `model.generate(**inputs, logits_processor=[CyclicReflex(tokenizer=tokenizer)])`.
    """

    words: Lines = Field(REFLECTION_WORDS, description="reflection words, one token each; or a file with one a line")
    leading_space: bool = Field(True, description="also the form of each word that follows a space")
    token_ids: TokenIds = Field(None, description="token ids instead of words")
    end_think: EndThink = Field(
        "</think>", description="mark after which a row is left alone: text, ids, or none for models without one"
    )

    _tokenizer: PreTrainedTokenizerBase | None = PrivateAttr(None)
    _processor: _BiasLogitsProcessor | None = PrivateAttr(None)

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase | None = None, **values: Any) -> None:
        super().__init__(**values)
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._processor = self.processor(tokenizer)

    @model_validator(mode="after")
    def _has_tokens(self) -> _ReflectionMethod:
        if self.token_ids is None:
            _check_words(self.words)
        else:
            _checked_ids("token_ids", self.token_ids)
        if isinstance(self.end_think, tuple):
            _checked_ids("end_think", self.end_think)
        return self

    def processor(self, tokenizer: PreTrainedTokenizerBase | None) -> _BiasLogitsProcessor:
        """A new logits processor with these parameters."""
        if tokenizer is None and (self.token_ids is None or isinstance(self.end_think, str)):
            raise InputError(
                f"{self.slug} as a logits processor must look up its words and end_think={self.end_think!r}; "
                f"write {type(self).__name__}(tokenizer=tokenizer), or give token_ids and end_think as ids or None"
            )
        ids = self.token_ids
        if ids is None:
            ids = reflection_token_ids(tokenizer, self.words, self.leading_space)
        return self._build(ids, _end_think_ids(tokenizer, self.end_think))

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(processors=[self.processor(tokenizer)])

    def begin(self, prompt_length: int) -> None:
        """A new generation starts (the decode loop says so); see `_BiasLogitsProcessor.begin`."""
        self._running().begin(prompt_length)

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self._running().end()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Act as a logits processor."""
        return self._running()(input_ids, scores)

    def __copy__(self) -> _ReflectionMethod:
        copied = super().__copy__()
        copied._processor = None  # `model_copy(update=...)` must not run on with the old parameters
        return copied

    def _running(self) -> _BiasLogitsProcessor:
        if self._processor is None:
            self._processor = self.processor(self._tokenizer)
        return self._processor

    def _build(self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None) -> _BiasLogitsProcessor:
        raise NotImplementedError


class CyclicReflex(_ReflectionMethod):
    """A triangular wave on the logits of reflection words."""

    slug: ClassVar[str] = "cyclicreflex"
    title: ClassVar[str] = "CyclicReflex"
    paper: ClassVar[str] = (
        "CyclicReflex: Improving (Large) Reasoning Models via Cyclical Reflection Token Scheduling, arXiv 2506.11077"
    )
    claim: ClassVar[str] = (
        "Reasoning models solve more problems at about the same length when reflection words are encouraged and "
        "discouraged by turns."
    )

    amplitude: float = Field(3.0, ge=0, allow_inf_nan=False, description="height of the wave in logits; 0 does nothing")
    period: float = Field(600.0, gt=0, allow_inf_nan=False, description="length of one wave in tokens")
    shift: float = Field(0.0, ge=0, lt=1, description="start of the wave, as a fraction of a period")
    windows: Windows = Field(None, description="positions where the wave acts, as START:END,START:END; none for all")

    @field_validator("windows")
    @classmethod
    def _are_ranges(cls, windows: Windows) -> Windows:
        _check_windows(windows)
        return windows

    def _build(self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None) -> _BiasLogitsProcessor:
        return CyclicReflectionLogitsProcessor(
            token_ids, self.amplitude, self.period, self.shift, self.windows, end_think_ids
        )


class ThoughtSwitchPenalty(_ReflectionMethod):
    """TIP: a penalty on thought-switching words near the start of each thought."""

    slug: ClassVar[str] = "tip"
    title: ClassVar[str] = "TIP (thought switching penalty)"
    paper: ClassVar[str] = "Thoughts Are All Over the Place: On the Underthinking of o1-Like LLMs, arXiv 2501.18585"
    claim: ClassVar[str] = "Reasoning models solve more problems when they are kept from switching thoughts too early."

    alpha: float = Field(3.0, ge=0, allow_inf_nan=False, description="penalty in logits; 0 does nothing")
    beta: float = Field(600, ge=0, allow_inf_nan=False, description="tokens of a thought that it lasts; 0 does nothing")
    per_thought: bool = Field(True, description="start again at every switch word; false: only at the first token")

    def _build(self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None) -> _BiasLogitsProcessor:
        return ThoughtSwitchPenaltyLogitsProcessor(token_ids, self.alpha, self.beta, self.per_thought, end_think_ids)


class BudgetForcing(DecodeMethod):
    """Budget forcing: ignore the end of thinking a few times, or close thinking at a limit."""

    slug: ClassVar[str] = "budget-forcing"
    title: ClassVar[str] = "Budget forcing (s1)"
    paper: ClassVar[str] = "s1: Simple test-time scaling, arXiv 2501.19393"
    claim: ClassVar[str] = "Longer thinking, forced by 'Wait', solves more problems; a limit keeps the length in hand."

    end_think: Annotated[str | tuple[int, ...], BeforeValidator(_read_ids)] = Field(
        "</think>", description="mark that ends thinking: text, or token ids"
    )
    min_ignores: int = Field(1, ge=0, description="how often the end of thinking is ignored")
    ignore_text: str = Field("Wait", description="what stands in place of an ignored end")
    max_thinking_tokens: Limit = Field(None, ge=1, description="tokens of thinking after which it is closed, or none")
    close_text: str = Field("</think>\nFinal Answer:", description="what closes it")

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        if self.min_ignores == 0 and self.max_thinking_tokens is None:
            return Plugins()
        end_ids = _end_think_ids(tokenizer, self.end_think)
        monitor = BudgetForcingMonitor(
            end_ids, tokenizer, self.min_ignores, self.ignore_text, self.max_thinking_tokens, self.close_text
        )
        return Plugins(monitors=[monitor])


# --- refusals --------------------------------------------------------------------------------------------------


def _check(holds: Any, name: str, value: Any, allowed: str) -> None:
    """Refuse unless `holds` (a bool, array or tensor) and the value is finite."""
    if isinstance(value, Tensor):
        good = bool((holds & torch.isfinite(value)).all())
    else:
        good = bool(np.all(holds) and np.all(np.isfinite(value)))
    if not good:
        raise InputError(f"{name}={value} is not allowed; give {allowed}")


def _check_words(words: Sequence[str]) -> None:
    if not words or any(not word.strip() for word in words):
        raise InputError(f"the reflection words {list(words)} are empty or hold an empty one; give at least one word")


def _checked_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids in order, as a tuple; refused if there are none or one is negative."""
    if not ids:
        raise InputError(f"{name} is empty; give at least one token id")
    if any(i < 0 for i in ids):
        raise InputError(f"{name} has {min(ids)}; give token ids >= 0")
    return tuple(ids)


def _check_windows(windows: Sequence[tuple[int, int]] | None) -> None:
    before = (0, 0)
    for window in sorted(windows or ()):
        start, end = window
        if start < 0 or start >= end:
            raise InputError(f"the window {window} is not a range; give 0 <= start < end")
        if start < before[1]:
            raise InputError(f"the windows {before} and {window} overlap; join them")
        before = window
    if windows is not None and not windows:
        raise InputError("windows is empty, so nothing would ever change; give one, or none for all positions")
