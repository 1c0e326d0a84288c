"""Programs in JavaScript: their tokens, what each name is and which names are visible, from tree-sitter's syntax tree.

Blocks and statements have the marks that Python's have: the braces of a block, which are values, stand around those for
its borders, and the end of a statement is a mark whether a semicolon stands there or not. What does not parse is read
token by token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ...core.errors import InputError
from .languages import KEYWORDS
from .lexer import DEDENT, EOS, INDENT, NUMBER, STRING
from .scopes import Frame, Names, Scope

if TYPE_CHECKING:
    from tree_sitter import Node, Parser, Tree

__all__ = ["WORDS", "JavaScriptToken", "check_reader", "left_of_cursor", "tokens_of"]

WORDS = (*sorted(KEYWORDS["javascript"]), *"as async from get let meta of set static target undefined using".split())
FUNCTIONS = {
    "function_declaration",
    "generator_function_declaration",
    "function_expression",
    "generator_function",
    "arrow_function",
    "method_definition",
}
CLASSES = {"class_declaration", "class"}
BLOCKS = {"statement_block", "class_body", "switch_body"}
BEFORE_BLOCK = {")", "=>", "else", "try", "finally", "do"}  # where what is broken opens one
ENDED = {"method_definition", "field_definition", "class_static_block"}  # beside declarations and statements
STRINGS = {"string", "template_string", "regex", "jsx_text", "html_character_reference"}
STRING_PARTS = {"string_fragment", "regex_pattern"}  # of a string that is not closed
DROPPED = {"comment", "html_comment", "hash_bang_line", "escape_sequence", "regex_flags", '"', "'", "`", "ERROR"}
NAMES = {
    "identifier",
    "property_identifier",
    "private_property_identifier",
    "shorthand_property_identifier",
    "shorthand_property_identifier_pattern",
    "statement_identifier",
}
PATTERNS = {  # {pattern: the part that may bind; None: all}
    "array_pattern": None,
    "object_pattern": None,
    "rest_pattern": None,
    "pair_pattern": "value",
    "assignment_pattern": "left",
    "object_assignment_pattern": "left",
}
BINDING = {("arrow_function", "parameter"), ("catch_clause", "parameter"), ("for_in_statement", "left")}
CLOSING = {"(": ")", "[": "]", "{": "}"}
CURSOR = "_"
IN_WORD = re.compile(r"[\w$#]\Z")


class JavaScriptToken(NamedTuple):
    """A token: its value and type, see `tokenry.text.code.views`, its line, and where its name was visible from."""

    value: str
    type: str
    line: int
    scope: Scope | None


def check_reader() -> None:
    """Refuse where what reads JavaScript is not installed."""
    _parser()


def _parser() -> Parser:
    try:
        import tree_sitter
        import tree_sitter_javascript
    except ModuleNotFoundError:
        raise InputError(
            "JavaScript needs the packages tree-sitter and tree-sitter-javascript; run `pip install tokenry[code]`"
        ) from None
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_javascript.language()))


def tokens_of(source: str, name: str) -> list[JavaScriptToken]:
    """The tokens of a program.

    Raises:
        InputError: nothing of it can be parsed, or tree-sitter is not installed.
    """
    tree = _parsed(source)
    if tree.root_node.type == "ERROR":
        raise InputError(f"{name} is no JavaScript that can be parsed; mend it, or leave it out")
    reader = _Reader(source)
    reader.read(tree)
    return list(reader.typed())


def left_of_cursor(source: str) -> tuple[tuple[str, ...] | None, Names]:
    """The values of a source that ends anywhere, and the names visible at its end; values are None where it ends in a
    string, comment or name."""
    if IN_WORD.search(source):
        return None, Names()
    marked = source + CURSOR  # a name at the cursor
    cursor = len(marked.encode()) - len(CURSOR)
    closed = _closing(_parsed(marked))
    reader = _Reader(marked)
    if closed is None:
        return None, reader.names
    reader.read(_parsed(marked + closed), until=cursor)
    last = reader.found[-1] if reader.found else None
    at_cursor = last is not None and last.start == cursor and last.value == CURSOR
    return tuple(one.value for one in reader.found[:-1]) if at_cursor else None, reader.names


def _parsed(source: str) -> Tree:
    return _parser().parse(source.encode())


def _steps(tree: Tree) -> Iterator[tuple[Node, str | None, bool]]:
    """(node, its field of the node above, whether it is entered or left) in the order of the text. Strings are whole;
    no depth is too much."""
    cursor = tree.walk()
    while True:
        node: Node = cursor.node  # pyright: ignore[reportAssignmentType]  # there is one where the cursor stands
        yield node, cursor.field_name, True
        if node.type not in STRINGS and cursor.goto_first_child():
            continue
        yield node, None, False
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return
            yield cursor.node, None, False  # pyright: ignore[reportReturnType]


def _is_token(node: Node) -> bool:
    """Whether it is one as it stands in the text; what the parser misses has no width."""
    return (node.child_count == 0 or node.type in STRINGS) and node.end_byte > node.start_byte


def _closing(tree: Tree) -> str | None:
    """What closes the brackets that are open at the end; None inside a template string."""
    waiting: list[str] = []
    for node, _, entering in _steps(tree):
        if not entering or not _is_token(node):
            continue
        if node.type == "`":
            return None
        if node.type in CLOSING:
            waiting.append(CLOSING[node.type])
        elif waiting and node.type == waiting[-1]:
            waiting.pop()
    return "".join(reversed(waiting))


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A node that is being read, which part it is of the node above, and what is bound when it has been read."""

    type: str
    part: str | None
    bound: list[tuple[Frame, str]] = field(default_factory=list)


@dataclass
class _Read:
    """A token. Of names: the type if an import gives it, whether it is loaded, and in which frames."""

    value: str
    kind: str
    line: int
    start: int
    scope: Scope | None = None
    imported: str = ""
    is_load: bool = False
    frames: tuple[Frame, ...] = ()


@dataclass
class _Bracket:
    """An open one; `is_new`: of a block in which nothing stands yet."""

    value: str
    is_block: bool
    is_new: bool


class _Reader:
    """Reads a tree from left to right."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.names = Names()
        self.path: list[_Open] = []
        self.brackets: list[_Bracket] = []
        self.found: list[_Read] = []
        self.brought: dict[str, str] = {}  # {name: the type that an import gives it}

    def read(self, tree: Tree, until: int | None = None) -> None:
        """Read the tree, up to the first token that begins at or behind the byte `until`."""
        for node, part, entering in _steps(tree):
            if not entering:
                self._leave(node)
                continue
            self._enter(node, part)
            if _is_token(node):
                self._token(node)
                if until is not None and node.start_byte >= until:
                    return

    def typed(self) -> Iterator[JavaScriptToken]:
        """What was read, with types: a name of a function may be bound behind the place where it is loaded."""
        following = [*(one.value for one in self.found[1:]), ""]
        for one, after in zip(self.found, following):
            yield JavaScriptToken(one.value, self._type(one, after), one.line, one.scope)

    def _type(self, one: _Read, after: str) -> str:
        if one.kind != "NAME" or one.imported:
            return one.imported or one.kind
        is_global = one.is_load and not any(f.scope == "function" and one.value in f.names for f in one.frames)
        if is_global and one.value in self.brought:
            return self.brought[one.value]
        if after == "(":
            return "FUNCTION_CALL"
        return "GLOBAL_VARIABLE" if is_global else "LOCAL_VARIABLE"

    def _enter(self, node: Node, part: str | None) -> None:
        self.path.append(_Open(node.type, part))
        if scope := _frame_of(node):
            self.names.frames.append(Frame(scope))

    def _leave(self, node: Node) -> None:
        for frame, name in self.path.pop().bound:
            frame.names[name] = False
        if _frame_of(node):
            self.names.frames.pop()
        if node.is_named and (node.type.endswith(("_statement", "_declaration")) or node.type in ENDED):
            in_class = self.path[-1].type == "class_body" if self.path else False
            if node.type != "method_definition" or in_class:
                self._end_statement(node.end_point.row + 1)

    def _token(self, node: Node) -> None:
        kind, line = node.type, node.start_point.row + 1
        text = self.source[node.start_byte : node.end_byte].decode()
        if kind in DROPPED or not text.strip():
            return
        if kind == ";" and not self._in_parentheses():
            self._end_statement(line)
            return
        self._begin_block(kind, line)
        if kind in NAMES:
            self._name(node, text)
        elif kind == "number":
            self._add(NUMBER, "NUMBER", node)
        elif kind in STRINGS | STRING_PARTS:
            self._add(STRING, "STRING", node)
        else:
            for word in text.split():  # "static get" is one
                self._add(word, word.upper() if word in WORDS else "OP", node)
        self._bracket(kind)
        if kind == ":" and self.path[-2].type in ("switch_case", "switch_default"):
            self._end_statement(line)

    def _add(self, value: str, kind: str, node: Node, **more: Any) -> None:
        self.found.append(_Read(value, kind, node.start_point.row + 1, node.start_byte, **more))

    def _mark(self, value: str, line: int) -> None:
        self.found.append(_Read(value, value.strip("<>"), line, -1))

    # --- blocks and statements

    def _in_parentheses(self) -> bool:
        """As what stands in the header of a loop."""
        return bool(self.brackets) and self.brackets[-1].value == "("

    def _end_statement(self, line: int) -> None:
        marks = {EOS, INDENT, DEDENT}
        is_new = bool(self.brackets) and self.brackets[-1].is_new
        if self.found and self.found[-1].value not in marks and not is_new and not self._in_parentheses():
            self._mark(EOS, line)

    def _begin_block(self, kind: str, line: int) -> None:
        """The border of a block, before its first token or behind its last."""
        inner = self.brackets[-1] if self.brackets else None
        if inner is None or not inner.is_block:
            return
        if kind != "}" and inner.is_new:
            self._mark(EOS, line)
            self._mark(INDENT, line)
            inner.is_new = False
        elif kind == "}" and not inner.is_new:
            self._end_statement(line)
            self._mark(DEDENT, line)

    def _bracket(self, kind: str) -> None:
        if kind in CLOSING:
            above = self.path[-2].type
            before = self.found[-2].value if len(self.found) > 1 else ""
            is_block = kind == "{" and (above in BLOCKS or (above == "ERROR" and before in BEFORE_BLOCK))
            self.brackets.append(_Bracket(kind, is_block, is_block))
        elif self.brackets and kind == CLOSING[self.brackets[-1].value]:
            self.brackets.pop()

    # --- names

    def _name(self, node: Node, text: str) -> None:
        frames, scope = self.names.frames, self.names.scope(text)
        above, part, opened = self._bound_by(node)
        imported, is_load = "", node.type in ("identifier", "shorthand_property_identifier")
        if above in ("import_clause", "namespace_import", "import_specifier") and is_load:
            imported = self._import(node, text, above)
        elif above == "variable_declarator" and part == "name":
            opened.bound.append((frames[-1], text))
        elif above == "formal_parameters" or (above, part) in BINDING:
            self.names.bind(text)
        elif node.type in ("property_identifier", "private_property_identifier"):
            self._member(text, above, part)
        elif part == "name" and (above in FUNCTIONS or above in CLASSES):
            self._declare(text, above)
        elif (above, part) not in (("assignment_expression", "left"), ("export_specifier", "alias")):
            more = {"is_load": is_load, "frames": tuple(frames) if is_load else ()}
            self._add(text, "NAME", node, scope=scope, **more)
            return
        self._add(text, "NAME", node, scope=scope, imported=imported)

    def _bound_by(self, node: Node) -> tuple[str, str | None, _Open]:
        """The node whose part a name is, and which part; of names in patterns, that of the whole pattern."""
        place = len(self.path) - 1
        binds = node.type in ("identifier", "shorthand_property_identifier_pattern")
        while binds and place > 1 and self.path[place - 1].type in PATTERNS:
            asked = PATTERNS[self.path[place - 1].type]
            if asked is not None and self.path[place].part != asked:
                break
            place -= 1
        above = self.path[place - 1]
        return above.type, self.path[place].part, above

    def _import(self, node: Node, text: str, above: str) -> str:
        """The type of a name in an import."""
        role = "ALIAS" if above == "namespace_import" or self.path[-1].part == "alias" else "LIBRARY"
        if (
            role == "LIBRARY"
            and above == "import_specifier"
            and node.parent
            and node.parent.child_by_field_name("alias")
        ):
            return "LIB"
        self.brought[text] = role
        self.names.bind(text)
        return role

    def _declare(self, text: str, above: str) -> None:
        """A declaration binds outside of what it declares, an expression inside."""
        outside = self.names.frames[-2 if above.endswith("_declaration") else -1]
        self.names.bind(text, is_function=True, frame=outside)

    def _member(self, text: str, above: str, part: str | None) -> None:
        """Methods, fields, and what is set on the instance belong to the class."""
        frames = self.names.frames
        if above == "method_definition" and part == "name" and self.path[-3].type == "class_body":
            self.names.bind(text, is_function=True, frame=frames[-2])
        elif above == "field_definition" and part == "property":
            self.names.bind(text)
        elif [one.value for one in self.found[-2:]] == ["this", "."] and self.path[-2].part == "left":
            inside = next((frame for frame in reversed(frames) if frame.scope == "class"), None)
            if inside is not None and self.path[-3].type == "assignment_expression":
                self.path[-3].bound.append((inside, text))


def _frame_of(node: Node) -> Scope | None:
    """The scope that a node opens."""
    if not node.is_named or not node.child_count:
        return None
    return "function" if node.type in FUNCTIONS else "class" if node.type in CLASSES else None
