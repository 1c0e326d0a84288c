"""Banned regular expressions, with what each has read of a row already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from time import thread_time
from typing import Any

import regex

from ...core.errors import InputError
from ...core.fields import shown
from ...text.words import listed
from ..generation.monitor import Violation
from ..generation.sequence import SequenceState
from .ban import Ban

__all__ = ["RegexBan"]

LONGEST = 20_000  # characters of all expressions together; the package compiles about 100,000 in a second
SECONDS, SECONDS_PER_TOKEN = 1.0, 0.01  # of computing that the expressions may take in a text: many times the usual
REREAD = 256  # characters of the end that a regular expression without a span always looks at again


class RegexBan(Ban):
    """Ban regular expressions (ignoring case; `.` matches newlines, `^` and `$` at lines).

    The syntax is that of the package `regex`, which knows whether the end of a text may be the beginning of a match.

    Args:
        patterns: expressions to ban; they see the text as it is, not folded.
        max_span: longest match in characters that is looked for. Needed for streaming: without it nothing can be
            shown before the end.

    Raises:
        InputError: an expression is malformed or matches the empty text, or all are too long together; and while a text
            is checked, where they take too much time for it.
    """

    def __init__(
        self, patterns: str | Sequence[str], max_span: int | None = None, strength: float = 1.0, **repair: Any
    ) -> None:
        super().__init__(strength, **repair)
        if max_span is not None and max_span < 1:
            raise InputError(f"max_span={max_span} is not allowed; give a number of characters >= 1")
        self.max_span = max_span
        self.written = listed(patterns, "regular expression")
        size = sum(map(len, self.written))
        if size > LONGEST:
            raise InputError(
                f"the regular expressions have {size} characters together; give at most {LONGEST}, and plain words as "
                "phrases"
            )
        self.patterns = [self._compile(p) for p in self.written]

    @staticmethod
    def _compile(pattern: str) -> regex.Pattern[str]:
        try:
            compiled = regex.compile(pattern, regex.IGNORECASE | regex.MULTILINE | regex.DOTALL)
        except regex.error as error:
            raise InputError(f"the regular expression {pattern!r} does not compile: {error}") from None
        except RecursionError:
            raise InputError(
                f"the regular expression {shown(pattern)} has too many groups inside one another; write it flatter"
            ) from None
        if compiled.search(""):
            raise InputError(f"the regular expression {pattern!r} matches the empty text; make part of it obligatory")
        return compiled

    def check(self, row: SequenceState) -> Violation | None:
        text = row.text
        if not self.active or len(text) <= row.checked:
            return None
        clock = row.note((self, "clock"), _Clock)
        clock.left += SECONDS_PER_TOKEN
        read = [row.note((self, number), _Read) for number in range(len(self.patterns))]
        best: tuple[int, int, str] | None = None
        for pattern, known in zip(self.patterns, read):
            first = known.first if self.max_span is None else max(0, row.checked - self.max_span + 1)
            for match in clock.matches(pattern, text, first):
                start, stop = match.span()
                too_long = self.max_span is not None and stop - start > self.max_span
                ignored = (row.token_at(start), f"regex:{pattern.pattern}") in row.ignored
                if stop <= row.checked or start == stop or too_long or ignored:
                    continue
                if best is None or start < best[0]:
                    best = (start, stop, pattern.pattern)
                break
        if best is not None:
            return self.violation(row, f"regex:{best[2]}", best[0], best[1])
        for pattern, known in zip(self.patterns, read):
            known.go_on(pattern, text, clock)
        return None

    def hold(self, row: SequenceState) -> int | None:
        """Tokens from the earliest place where a match may have begun."""
        if not self.active or not self.patterns:
            return 0
        if self.max_span is None:
            return None
        text, clock = row.text, row.note((self, "clock"), _Clock)
        first = max(0, len(text) - self.max_span + 1)
        begun = [
            match.start()
            for pattern in self.patterns
            for match in clock.matches(pattern, text, first, partial=True, overlapped=True)
            if match.partial and match.start() < len(text)
        ]
        return self.tokens_from(row, min(begun, default=None))


class _Clock:
    """What the expressions have cost in a text. An expression whose cost grows without bound, such as `(a|aa)+$`, would
    hold everything that is written in the same thread."""

    def __init__(self) -> None:
        self.left = SECONDS  # of this thread

    def truncate(self, size: int) -> None:
        """Time does not come back."""

    def matches(self, pattern: regex.Pattern[str], text: str, first: int, **how: bool) -> Iterator[regex.Match[str]]:
        """`pattern.finditer`.

        Raises:
            InputError: the expressions have taken too long.
        """
        found = pattern.finditer(text, first, timeout=self.left, **how)
        while True:
            with self._running(pattern):
                match = next(found, None)
            if match is None:
                return
            yield match

    @contextmanager
    def _running(self, pattern: regex.Pattern[str]) -> Iterator[None]:
        began = thread_time()
        try:
            yield
        except TimeoutError:
            self.left = 0.0
        self.left -= thread_time() - began
        if self.left <= 0:
            raise InputError(
                f"the regular expression {shown(pattern.pattern)} takes more than {SECONDS:g} s on this text; give it "
                "fewer ways to match the same characters, such as a+ for (a|aa)+"
            )


class _Read:
    """How far an expression has looked through a text: no match can begin before `first`, whatever follows."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = [(0, 0)]  # (length of the text then, first)

    @property
    def first(self) -> int:
        return self.marks[-1][1]

    def truncate(self, size: int) -> None:
        self.marks = [(0, 0), *takewhile(lambda mark: mark[0] <= size, self.marks[1:])]

    def go_on(self, pattern: regex.Pattern[str], text: str, clock: _Clock) -> None:
        """Pass over what is over: matches that end early, and what no match can begin in."""
        if len(text) - self.marks[-1][0] < REREAD or pattern.flags & regex.REVERSE:
            return
        first, last = self.first, len(text) - REREAD  # not the end: `partial` does not see to \B, $ and (?!...)
        for match in clock.matches(pattern, text, first):
            if match.end() > last:
                break
            first = match.end()
        else:
            begun = next(clock.matches(pattern, text, first, partial=True), None)
            first = max(first, min(last, begun.start() if begun else last))
        self.marks.append((len(text), first))
