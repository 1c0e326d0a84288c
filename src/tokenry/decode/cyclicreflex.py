"""CyclicReflex: a triangular wave on the logits of reflection words.

Paper: CyclicReflex: Improving (Large) Reasoning Models via Cyclical Reflection Token Scheduling, arXiv 2506.11077.
"Wait", "but", "alternatively" begin a reconsideration. The wave raises and lowers their logits by turns along the
generated text until thinking ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Logits, Share, read_none, require
from .reasoning.bias import BiasLogitsProcessor
from .reasoning.reflection import ReflectionMethod

__all__ = ["CyclicReflectionLogitsProcessor", "CyclicReflex", "constant_schedule", "triangular_wave"]


class CyclicReflex(ReflectionMethod):
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
    published: ClassVar[Claim] = Claim(
        "0.89", "accuracy (plain 0.86)", "DeepSeek-R1-Distill-Qwen-7B, MATH500", "cyclicreflex-reasoner-2"
    )

    amplitude: Logits = Field(default=3.0, description="height of the wave in logits; 0 does nothing")
    period: float = Field(default=600.0, ge=0.01, le=2**20, description="length of one wave in tokens")
    shift: Share = Field(default=0.0, description="start of the wave, as a fraction of a period")
    windows: tuple[tuple[int, int], ...] | None = Field(
        default=None, description="positions where the wave acts, as START:END,START:END; none for all"
    )

    @field_validator("windows", mode="before")
    @classmethod
    def _from_text(cls, windows: Any) -> Any:
        return _read_windows(windows)

    @field_validator("windows")
    @classmethod
    def _are_ranges(cls, windows: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
        _check_windows(windows)
        return windows

    def _build(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None
    ) -> BiasLogitsProcessor:
        return CyclicReflectionLogitsProcessor(
            token_ids, self.amplitude, self.period, self.shift, self.windows, end_think_ids, prompt_length
        )


Schedule = Callable[[int], float]


class CyclicReflectionLogitsProcessor(BiasLogitsProcessor):
    """Adds `triangular_wave` of the position to the logits of reflection tokens (arXiv 2506.11077).

    Args:
        token_ids: the reflection tokens, see `reflection_token_ids`.
        amplitude, period, shift: see `triangular_wave`.
        windows: half-open ranges [start, end) of generated positions where the bias acts; None everywhere.
        end_think_ids: the token ids that together end thinking; the row is left alone after them. None: never.
        prompt_length: columns of the prompts in plain `generate`; None: those of the first call.
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
        return torch.full((batch,), float(self.schedule(t)) if inside else 0.0, device=generated.device)


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
    require((A >= 0) & (A <= 1e30), "amplitude", A, "a number in [0, 1e30], which float32 holds")
    require(C > 0, "period", C, "a number of tokens > 0")
    require((s >= 0) & (s < 1), "shift", s, "a fraction of a period in [0, 1)")
    return A * (abs(4 * ((t / C + s - 0.25) % 1) - 2) - 1)


def constant_schedule(value: float) -> Schedule:
    """The same bias everywhere; above 0 this is "positive TIP" once `windows` says where."""
    return lambda t: value


def _read_windows(value: Any) -> Any:
    """Windows from the command line: '0:8192,9000:9500'. Other values pass."""
    value = read_none(value)
    if not isinstance(value, str):
        return value
    if not re.fullmatch(r"\s*-?\d+:-?\d+(\s*,\s*-?\d+:-?\d+)*\s*", value):
        raise ValueError(f"{value!r} is not a list of ranges; write START:END,START:END, for example 0:8192")
    return tuple(tuple(int(n) for n in part.split(":")) for part in value.split(","))


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
