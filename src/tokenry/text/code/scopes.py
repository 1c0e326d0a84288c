"""Which names are visible at a place of a program, known from what stands left of it alone."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from .lexer import DEDENT, EOS, INDENT

__all__ = ["SCOPES", "Frame", "NameKind", "Names", "Scope", "VisibleNames", "name_kind"]

Scope = Literal["function", "class", "file"]
NameKind = Literal["attribute", "variable", "function"]
SCOPES: tuple[Scope, ...] = ("function", "class", "file")
OPENING = {"if", "elif", "else", "while", "for", "try", "except", "finally", "with", "async"}


@dataclass
class Frame:
    """A file, class or function: the names bound in it, and whether each is a function. `me`: what methods call the
    instance."""

    scope: Scope
    names: dict[str, bool] = field(default_factory=dict)
    me: str = ""


class Names:
    """The names bound in the file and in what is open in it, the innermost last.

    Of enclosing functions all are searched, of classes the innermost.
    """

    def __init__(self) -> None:
        self.frames = [Frame("file")]

    def scope(self, name: str) -> Scope | None:
        """Where a name is visible from, the innermost place first; None: it is not."""
        frame = self._find(name)
        return frame.scope if frame else None

    def is_function(self, name: str) -> bool:
        """Whether a visible name was bound as a function or class."""
        frame = self._find(name)
        return frame is not None and frame.names[name]

    def bind(self, *names: str, is_function: bool = False, frame: Frame | None = None) -> None:
        """Bind names in a frame, by default the innermost."""
        (frame or self.frames[-1]).names.update((name, is_function) for name in names)

    def _find(self, name: str) -> Frame | None:
        seen = False
        for frame in reversed(self.frames):
            if frame.scope == "class" and seen:
                continue
            seen = seen or frame.scope == "class"
            if name in frame.names:
                return frame
        return None


class VisibleNames(Names):
    """Reads values of Python one by one (see `lexer`) and knows which names were bound, and where.

    A name is bound behind the statement that binds it; methods and the attributes that they set on the instance belong
    to the class.
    """

    def __init__(self, values: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.blocks: list[Frame | None] = []  # the frame that each open block is the body of, if it is
        self.opened: Frame | None = None  # by the header just read
        self.statement: list[str] = []
        self.depth = 0
        for value in values:
            self.feed(value)

    def feed(self, value: str) -> None:
        """Read the next value."""
        if value == INDENT:
            self.blocks.append(self.opened)
            self.opened = None
        elif value == DEDENT:
            if self.blocks and self.blocks.pop() is not None:
                self.frames.pop()
        else:
            if not self.statement and self.opened is not None:  # it has no body
                self._close_frame()
            self._read(value)

    def _read(self, value: str) -> None:
        if value == EOS or (value == ";" and not self.depth):
            self._bind_statement()
            if self.opened is not None and self.statement[-1:] != [":"]:  # its body stood on the header's line
                self._close_frame()
            self.statement, self.depth = [], 0
            return
        self.statement.append(value)
        self.depth = max(0, self.depth + (value in ("(", "[", "{")) - (value in (")", "]", "}")))
        if value == ":" and "lambda" in self.statement:
            self.bind(*_parameters(self.statement[_last(self.statement, "lambda") + 1 : -1]))
        elif value == ":" and not self.depth and self.opened is None:
            self._open_frame()
        elif value == "in" and "for" in self.statement:
            self.bind(*_names(self.statement[_last(self.statement, "for") + 1 : -1]))
        elif value == ":=" and len(self.statement) > 1:
            self.bind(*self.statement[-2:-1])

    def _open_frame(self) -> None:
        """A class or function whose header ends here."""
        header = self.statement[self.statement[0] == "async" :]
        if len(header) < 3 or header[0] not in ("def", "class"):
            return
        self.bind(header[1], is_function=True)
        parameters = _parameters(header[3:-1]) if header[0] == "def" else []
        inside = self.frames[-1].scope == "class"
        frame = Frame("function" if header[0] == "def" else "class", me=parameters[0] if inside and parameters else "")
        self.bind(*parameters, frame=frame)
        self.frames.append(frame)
        self.opened = frame

    def _close_frame(self) -> None:
        self.frames.pop()
        self.opened = None

    def _bind_statement(self) -> None:
        words = self.statement
        if not words or words[0] in ("def", "class", "@"):
            return
        if words[0] in ("import", "from"):
            self.bind(*[bound for _, bound in imported(words) if bound])
            return
        self.bind(*[b for a, b in pairwise(words) if a == "as" and _is_name(b)])
        *targets, _ = _split(words, "=") if "=" in words else [words]
        if words[0] in OPENING and targets:
            targets[0] = _split(targets[0], ":")[-1]
        for target in targets:
            target = _split(target, ":")[0]
            self.bind(*_names(target))
            if len(target) == 3 and target[1] == "." and target[0] == self.frames[-1].me != "":
                self.bind(*target[2:], frame=self.frames[-2])
        if len(words) > 1 and words[1] == ":" and not targets and _is_name(words[0]):  # an annotation alone
            self.bind(*words[:1])


def name_kind(before: str | None, is_function: bool) -> NameKind:
    """What kind of name a completion is: behind a dot, called or bound as a function, or a variable."""
    return "attribute" if before in (".", "?.") else "function" if is_function else "variable"


def imported(words: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what it is bound to) of the names that an import statement brings; star imports bring none."""
    rest = list(words[_last(words, "import") + 1 :]) if "import" in words else []
    found = []
    for part in _split([word for word in rest if word not in "()"], ","):
        if part and _is_name(part[0]):
            found.append((part[0], part[_last(part, "as") + 1] if "as" in part[:-1] else part[0]))
    return found


def _is_name(word: str) -> bool:
    return word.isidentifier() and not keyword.iskeyword(word)


def _last(words: Sequence[str], word: str) -> int:
    return len(words) - 1 - list(reversed(words)).index(word)


def _split(words: Sequence[str], mark: str) -> list[list[str]]:
    """The parts between marks that stand in no bracket."""
    parts, depth = [[]], 0
    for word in words:
        depth += (word in ("(", "[", "{")) - (word in (")", "]", "}"))
        if word == mark and not depth:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _names(target: Sequence[str]) -> list[str]:
    """The names that an assignment to a target binds: no attributes, no subscripts, nothing that is called."""
    found, depth = [], 0
    for i, word in enumerate(target):
        before, after = (target[i - 1] if i else ""), (target[i + 1] if i + 1 < len(target) else "")
        taken = before == "." or after in (".", "(", "[") or depth
        depth += word in ("(", "[") and (bool(depth) or _is_name(before) or before in (")", "]"))
        depth -= word in (")", "]") and depth > 0
        if _is_name(word) and not taken:
            found.append(word)
    return found


def _parameters(words: Sequence[str]) -> list[str]:
    """The names of parameters, without annotations and defaults; what follows the closing bracket does not count."""
    found, depth, begins = [], 0, True
    for word in words:
        if word == ")" and not depth:
            break
        if begins and not depth and _is_name(word):
            found.append(word)
        depth += (word in ("(", "[", "{")) - (word in (")", "]", "}"))
        begins = word in (",", "*", "**") and not depth
    return found
