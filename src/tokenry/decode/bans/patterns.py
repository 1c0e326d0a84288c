"""Banned regular expressions, with what each has read of a row already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import regex

from ...core.errors import InputError
from ...text.words import listed
from ..generation.monitor import Violation
from ..generation.sequence import SequenceState
from .ban import Ban

__all__ = ["RegexBan"]

REREAD = 256  # characters of the end that a regular expression without a span always looks at again


class RegexBan(Ban):
    """Ban regular expressions (ignoring case; `.` matches newlines, `^` and `$` at lines).

    The syntax is that of the package `regex`, which knows whether the end of a text may be the beginning of a match.

    Args:
        patterns: expressions to ban; they see the text as it is, not folded.
        max_span: longest match in characters that is looked for. Needed for streaming: without it nothing can be
            shown before the end.
    """

    def __init__(
        self, patterns: str | Sequence[str], max_span: int | None = None, strength: float = 1.0, **repair: object
    ) -> None:
        super().__init__(strength, **repair)
        if max_span is not None and max_span < 1:
            raise InputError(f"max_span={max_span} is not allowed; give a number of characters >= 1")
        self.max_span = max_span
        self.written = listed(patterns, "regular expression")
        self.patterns = [self._compile(p) for p in self.written]

    @staticmethod
    def _compile(pattern: str) -> regex.Pattern[str]:
        try:
            compiled = regex.compile(pattern, regex.IGNORECASE | regex.MULTILINE | regex.DOTALL)
        except regex.error as error:
            raise InputError(f"the regular expression {pattern!r} does not compile: {error}") from None
        if compiled.search(""):
            raise InputError(f"the regular expression {pattern!r} matches the empty text; make part of it obligatory")
        return compiled

    def check(self, row: SequenceState) -> Violation | None:
        text = row.text
        if not self.active or len(text) <= row.checked:
            return None
        read = [row.note((self, number), _Read) for number in range(len(self.patterns))]
        best: tuple[int, int, str] | None = None
        for pattern, known in zip(self.patterns, read):
            first = known.first if self.max_span is None else max(0, row.checked - self.max_span + 1)
            for match in pattern.finditer(text, first):
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
            known.go_on(pattern, text)
        return None

    def hold(self, row: SequenceState) -> int | None:
        """Tokens from the earliest place where a match may have begun."""
        if not self.active or not self.patterns:
            return 0
        if self.max_span is None:
            return None
        text = row.text
        first = max(0, len(text) - self.max_span + 1)
        begun = [
            match.start()
            for pattern in self.patterns
            for match in pattern.finditer(text, first, partial=True, overlapped=True)
            if match.partial and match.start() < len(text)
        ]
        return self.tokens_from(row, min(begun, default=None))


class _Read:
    """How far an expression has looked through a text: no match can begin before `first`, whatever follows."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = [(0, 0)]  # (length of the text then, first)

    @property
    def first(self) -> int:
        return self.marks[-1][1]

    def truncate(self, size: int) -> None:
        self.marks = [(0, 0), *takewhile(lambda mark: mark[0] <= size, self.marks[1:])]

    def go_on(self, pattern: regex.Pattern[str], text: str) -> None:
        """Pass over what is over: matches that end early, and what no match can begin in."""
        if len(text) - self.marks[-1][0] < REREAD or pattern.flags & regex.REVERSE:
            return
        first, last = self.first, len(text) - REREAD  # not the end: `partial` does not see to \B, $ and (?!...)
        for match in pattern.finditer(text, first):
            if match.end() > last:
                break
            first = match.end()
        else:
            begun = pattern.search(text, first, partial=True)
            first = max(first, min(last, begun.start() if begun else last))
        self.marks.append((len(text), first))
