"""A program as two aligned sequences: the values of its tokens, and their types.

Paper: CodeFill: Multi-token Code Completion by Jointly Learning from Structure and Naming Sequences, arXiv 2202.06689.
Names of Python are typed by its own parser and symbol tables at exact positions, those of JavaScript by a syntax tree;
the authors' converter replaces text.
"""

from __future__ import annotations

import ast
import keyword
import symtable
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...core.errors import InputError
from ..token_text import check_encodable
from .javascript import WORDS, tokens_of
from .languages import language_of
from .lexer import CodeToken, statements, strict_tokens
from .scopes import Scope, VisibleNames, imported

__all__ = ["TYPES", "CodeViews", "check_source", "code_views"]

NAMES = ("MODULE", "LIBRARY", "LIB", "ALIAS", "GLOBAL_VARIABLE", "FUNCTION_CALL", "LOCAL_VARIABLE")
PYTHON = (*NAMES, "NUMBER", "STRING", "OP", "INDENT", "DEDENT", "EOS", *sorted(word.upper() for word in keyword.kwlist))
TYPES = (*PYTHON, *sorted({word.upper() for word in WORDS} - set(PYTHON)))
COMPREHENSIONS = {
    ast.ListComp: "listcomp",
    ast.SetComp: "setcomp",
    ast.DictComp: "dictcomp",
    ast.GeneratorExp: "genexpr",
}
UNREADABLE = (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError)

Place = tuple[int, int]


@dataclass(frozen=True)
class CodeViews:
    """A program, token by token. All have the same length.

    Attributes:
        values: names, operators and keywords as they stand; strings, numbers, borders of blocks and ends of statements
            as marks, see `lexer`.
        types: of `TYPES`.
        lines, positions: the line of each token and its place there; both count from 1.
        scopes: where a value was visible from, at its place; None: nowhere.
    """

    values: tuple[str, ...]
    types: tuple[str, ...]
    lines: tuple[int, ...]
    positions: tuple[int, ...]
    scopes: tuple[Scope | None, ...]


def code_views(source: str, name: str = "the source") -> CodeViews:
    """The two views of a program.

    Args:
        name: of the file, in refusals; its ending tells the language, Python where it says nothing.

    Raises:
        InputError: it is no text or a notebook, it cannot be parsed, or it has no statement.
    """
    source = check_source(source, name)
    if language_of(name) == "javascript":
        read = tokens_of(source, name)
        return _views([(one.value, one.type, one.line, one.scope) for one in read], name)
    try:
        loads = _global_loads(source)
        tokens = strict_tokens(source)
    except UNREADABLE as error:
        raise InputError(f"{name} is no Python that can be parsed ({_why(error)}); mend it, or leave it out") from None
    columns = ([token.value for token in tokens], _types(tokens, loads), [t.line for t in tokens], _scopes(tokens))
    return _views(list(zip(*columns)), name)


def _views(rows: Sequence[tuple[str, str, int, Scope | None]], name: str) -> CodeViews:
    """Views from the value, type, line and scope of each token."""
    if not rows:
        raise InputError(f"{name} has no statement; give a file with some")
    values, types, lines, scopes = zip(*rows)
    return CodeViews(values, types, lines, tuple(_positions(lines)), scopes)


def check_source(source: str, name: str) -> str:
    """Source with line feeds alone; what is no text, or a notebook, is refused."""
    check_encodable(source, name)
    if name.endswith(".ipynb") or (source.lstrip().startswith("{") and '"nbformat"' in source):
        raise InputError(f"{name} is a notebook; export it with `jupyter nbconvert --to script`")
    return source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _why(error: BaseException) -> str:
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deeply"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    return str(error)


def _positions(lines: Sequence[int]) -> Iterator[int]:
    before = count = 0
    for line in lines:
        before, count = line, count + 1 if line == before else 1
        yield count


def _scopes(tokens: list[CodeToken]) -> Iterator[Scope | None]:
    visible = VisibleNames()
    for token in tokens:
        yield visible.scope(token.value) if token.kind == "NAME" else None
        visible.feed(token.value)


# --- types ---------------------------------------------------------------------------------------------------------


def _types(tokens: list[CodeToken], loads: set[Place]) -> Iterator[str]:
    """The type of each token, given the places of names that are loaded as globals."""
    brought, inside = _imports(tokens)
    for i, (value, kind, *place) in enumerate(tokens):
        if kind != "NAME":
            yield kind
        elif keyword.iskeyword(value):
            yield value.upper()
        elif i in inside:
            yield inside[i]
        else:
            is_global = tuple(place) in loads
            if is_global and value in brought:
                yield brought[value]
            elif i + 1 < len(tokens) and tokens[i + 1].value == "(":
                yield "FUNCTION_CALL"
            else:
                yield "GLOBAL_VARIABLE" if is_global else "LOCAL_VARIABLE"


def _imports(tokens: list[CodeToken]) -> tuple[dict[str, str], dict[int, str]]:
    """{bound name: its type} of all imports, and {token: its type} of the names in the import statements."""
    brought: dict[str, str] = {}
    inside: dict[int, str] = {}
    values = tuple(token.value for token in tokens)
    for first, end in statements(values):
        words = values[first : end - 1]
        if words[:1] not in (("import",), ("from",)):
            continue
        begins = first + words.index("import") if "import" in words else end
        bound = dict(imported(words))
        aliased = {name for name, alias in bound.items() if alias != name}
        brought |= {alias: "ALIAS" if name in aliased else "LIBRARY" for name, alias in bound.items()}
        for i in range(first, end - 1):
            if tokens[i].kind == "NAME":
                alias = values[i - 1] == "as"
                role = "ALIAS" if alias else "LIB" if values[i] in aliased else "LIBRARY"
                inside[i] = "MODULE" if i < begins and words[0] == "from" else role
    return brought, inside


def _global_loads(source: str) -> set[Place]:
    """Where names are loaded that belong to the module or to Python itself, or that an import in a function brings."""
    found = _Loads(source)
    found.visit(ast.parse(source))
    lines = source.split("\n")
    return {(line, _characters(lines[line - 1], column)) for line, column in found.places}


def _characters(line: str, column: int) -> int:
    """A column in bytes of UTF-8 as one in characters."""
    return column if line.isascii() else len(line.encode()[:column].decode())


class _Loads(ast.NodeVisitor):
    """Walks a program along its symbol tables, which are found by their names and lines."""

    def __init__(self, source: str) -> None:
        top = symtable.symtable(source, "<source>", "exec")
        self.open, self.tables = [top], {}
        waiting = [top]
        while waiting:
            children = waiting.pop().get_children()
            for table in children:
                self.tables.setdefault((table.get_name(), table.get_lineno()), []).append(table)
            waiting += children
        self.places: list[Place] = []

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and self._is_global(node.id):
            self.places.append((node.lineno, node.col_offset))

    def _is_global(self, name: str) -> bool:
        for table in reversed(self.open):
            try:
                symbol = table.lookup(name)
            except KeyError:  # a default or decorator, which belongs to the scope around
                continue
            return table.get_type() == "module" or symbol.is_global() or symbol.is_imported()
        return True

    def _inside(self, name: str, node: ast.AST, parts: list[ast.AST]) -> None:
        """Visit parts of a node that has a symbol table of its own."""
        tables = self.tables.get((name, getattr(node, "lineno", 0)))
        self.open += tables[:1] if tables else []
        for part in parts:
            self.visit(part)
        if tables:
            self.open.pop()
            if len(tables) > 1:
                tables.pop(0)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for part in (*node.decorator_list, node.args, *filter(None, [node.returns])):
            self.visit(part)
        self._inside(node.name, node, list(node.body))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._inside(node.name, node, list(node.body))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self._inside("lambda", node, [node.body])

    def generic_visit(self, node: ast.AST) -> None:
        name = COMPREHENSIONS.get(type(node))
        if name:
            self._inside(name, node, list(ast.iter_child_nodes(node)))
        else:
            super().generic_visit(node)
