"""Programs as values and types, the names visible in them, and cardinal points."""

import keyword
from pathlib import Path

import pytest

from tokenry.core.errors import InputError
from tokenry.data.corpora import library_files
from tokenry.text.code.cardinal import cardinal_points
from tokenry.text.code.lexer import EOS, INDENT, lenient_tokens, statements, strict_tokens
from tokenry.text.code.scopes import VisibleNames
from tokenry.text.code.views import TYPES, code_views

PROGRAM = '''"""What it is."""
import os, numpy as np
from a.b import c as d, e
from f import *

def f(x, y=3):  # a comment
    """What it does."""
    z = os.path.join(x, f"{y} {'q'}")
    return [z for z in e(d) if np and z is not None]
class A:
    k = 1
    def m(self, q):
        self.w = q
        self.k = f(q)
    def n(self):
        return self.w, len
'''


def rows(source, *names):
    views = code_views(source)
    return list(zip(*(getattr(views, name) for name in names)))


def of(source, value, name="types"):
    views = code_views(source)
    return [kind for one, kind in zip(views.values, getattr(views, name)) if one == value]


# --- values and types ------------------------------------------------------------------------------------------------


def test_values_are_what_stands_there_without_comments_docstrings_and_literals():
    views = code_views("def f(a):  # why\n    '''Doc.'''\n\n    return a + 1.5, 'x' 'y'\nx = f\n")
    text = "def f ( a ) : <EOS> <INDENT> return a + <NUMBER> , <STRING> <STRING> <EOS> <DEDENT> x = f <EOS>"
    assert " ".join(views.values) == text
    assert views.lines == (1,) * 7 + (4,) * 9 + (5,) * 5
    assert views.positions[:8] == (1, 2, 3, 4, 5, 6, 7, 1)


def test_both_views_have_one_length_and_known_types():
    views = code_views(PROGRAM)
    assert len({len(part) for part in vars(views).values()}) == 1
    assert set(views.types) <= set(TYPES)


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("os", ["LIBRARY", "LIBRARY"]),
        ("numpy", ["LIB"]),
        ("np", ["ALIAS", "ALIAS"]),
        ("a", ["MODULE"]),
        ("c", ["LIB"]),
        ("d", ["ALIAS", "ALIAS"]),
        ("e", ["LIBRARY", "LIBRARY"]),
        ("path", ["LOCAL_VARIABLE"]),
        ("join", ["FUNCTION_CALL"]),
        ("len", ["GLOBAL_VARIABLE"]),
        ("None", ["NONE"]),
        ("is", ["IS"]),
        ("z", ["LOCAL_VARIABLE"] * 4),
        ("self", ["LOCAL_VARIABLE"] * 5),
    ],
)
def test_each_name_has_the_type_of_its_place(value, types):
    assert of(PROGRAM, value) == types


def test_a_name_is_global_where_python_loads_it_as_one():
    """`os` inside other words, a local of the same name, closures, defaults, comprehensions and columns in bytes."""
    source = "g = 1\ndef f(a=g):\n    def h():\n        return a, g, close\n    é = [g for g in a]; print(é, g)\n"
    views = code_views(source)
    found = [
        (v, line, t) for v, line, t in zip(views.values, views.lines, views.types) if v in ("g", "a", "é", "close")
    ]
    assert found == [
        ("g", 1, "LOCAL_VARIABLE"),
        ("a", 2, "LOCAL_VARIABLE"),
        ("g", 2, "GLOBAL_VARIABLE"),
        ("a", 4, "LOCAL_VARIABLE"),
        ("g", 4, "GLOBAL_VARIABLE"),
        ("close", 4, "GLOBAL_VARIABLE"),
        ("é", 5, "LOCAL_VARIABLE"),
        ("g", 5, "LOCAL_VARIABLE"),
        ("g", 5, "LOCAL_VARIABLE"),
        ("a", 5, "LOCAL_VARIABLE"),
        ("é", 5, "LOCAL_VARIABLE"),
        ("g", 5, "GLOBAL_VARIABLE"),
    ]


def test_imports_inside_functions_and_shadowed_ones():
    source = "import os\ndef f(os):\n    import re\n    return os, re\nos, closed\n"
    assert of(source, "os") == ["LIBRARY", "LOCAL_VARIABLE", "LOCAL_VARIABLE", "LIBRARY"]
    assert of(source, "re") == ["LIBRARY", "LIBRARY"]


def test_soft_keywords_stay_names():
    assert of("match = case = 1\nmatch\n", "match") == ["LOCAL_VARIABLE", "GLOBAL_VARIABLE"]
    assert {word.upper() for word in keyword.kwlist} < set(TYPES)


def test_tabs_line_ends_and_marks_of_bytes_change_nothing():
    plain = code_views("if x:\n    y = 1\n    if z:\n        w\nv\n")
    assert code_views("if x:\n\ty = 1\n\tif z:\n\t\tw\nv\n").values == plain.values
    assert code_views("\ufeffif x:\r\n    y = 1\r\n    if z:\r\n        w\r\nv\r\n") == plain
    assert code_views("if x:\n    y = 1\n\tif z:\n\t\tw\nv\n".replace("    ", "\t")).values == plain.values


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def f(:\n", "a.py", "a.py is no Python that can be parsed .line 1"),
        ("print 'hello'\n", "two.py", "two.py is no Python that can be parsed"),
        ("x = 1\n  y = 2\n", "b.py", "unindent|unexpected indent"),
        ("", "c.py", "c.py has no statement"),
        ("# only words\n", "c.py", "c.py has no statement"),
        ("nonlocal x\n", "d.py", "d.py is no Python"),
        ("x = 'a\ud800'\n", "e.py", "half a surrogate pair"),
        ("x\0", "f.py", "f.py is no Python"),
        ("-" * 5_000 + "1", "g.py", "g.py is no Python"),
        ('{"cells": [], "nbformat": 4}', "n.py", "n.py is a notebook; export it"),
        ("x = 1\n", "n.ipynb", "n.ipynb is a notebook"),
    ],
)
def test_source_that_is_no_program_is_refused(source, name, words):
    with pytest.raises(InputError, match=words) as refusal:
        code_views(source, name)
    assert "\n" not in str(refusal.value)


# --- reading what is broken ------------------------------------------------------------------------------------------


def test_the_lenient_lexer_reads_what_pythons_own_reads():
    """On whole files of the library, among the largest there are."""
    files = [f for f in library_files() if f.name in ("typing.py", "argparse.py", "cmd.py", "dis.py", "ast.py")]
    assert len(files) >= 5
    for file in files:
        source = file.read_text()
        assert lenient_tokens(source) == strict_tokens(source)


@pytest.mark.parametrize(
    ("source", "values"),
    [
        ("x = 'open\ny = 1", "x = <STRING> <EOS> y = <NUMBER>"),
        ("f(a, [\ndef g():\n    return b", "f ( a , [ <EOS> def g ( ) : <EOS> <INDENT> return b"),
        ("if x:\n        a\n   b", "if x : <EOS> <INDENT> a <EOS> <DEDENT> <INDENT> b"),
        ("a = $ ? 3", "a = <NUMBER>"),
        (") ] }\nx", ") ] } <EOS> x"),
        ('x\n"""never\nclosed', "x <EOS>"),
    ],
)
def test_what_is_broken_is_read_as_far_as_it_goes(source, values):
    assert " ".join(token.value for token in lenient_tokens(source)) == values


def test_every_beginning_of_a_program_is_read():
    for end in range(len(PROGRAM) + 1):
        VisibleNames(tuple(token.value for token in lenient_tokens(PROGRAM[:end])))


def test_a_megabyte_is_read_in_seconds():
    source = "def f(value):\n    return other.attribute[value] + 'text'\n" * 20_000
    assert len(source) > 1_000_000
    assert len(lenient_tokens(source)) > 300_000


def test_statements():
    values = "if x : <EOS> <INDENT> a = b <EOS> <DEDENT> c <EOS> d".split()
    assert [values[a:b] for a, b in statements(tuple(values))] == [
        ["if", "x", ":", EOS],
        ["a", "=", "b", EOS],
        ["c", EOS],
    ]
    assert INDENT in values


# --- visible names ---------------------------------------------------------------------------------------------------


def scope_at(source, name):
    return VisibleNames(tuple(token.value for token in lenient_tokens(source + "_")[:-1])).scope(name)


@pytest.mark.parametrize(
    ("source", "name", "scope"),
    [
        ("x = 1\n", "x", "file"),
        ("x = ", "x", None),  # behind the statement alone
        ("import a.b as c, d.e\n", "c", "file"),
        ("import a.b as c, d.e\n", "d", "file"),
        ("import a.b as c, d.e\n", "a", None),
        ("from m import (a, b as c)\n", "a", "file"),
        ("from m import (a, b as c)\n", "b", None),
        ("from m import *\n", "m", None),
        ("def f(a, *b, c: int = d, **e): ", "a", "function"),
        ("def f(a, *b, c: int = d, **e):\n    ", "b", "function"),
        ("def f(a, *b, c: int = d, **e):\n    ", "c", "function"),
        ("def f(a, *b, c: int = d, **e):\n    ", "e", "function"),
        ("def f(a, *b, c: int = d, **e):\n    ", "d", None),
        ("def f(a, *b, c: int = d, **e):\n    ", "int", None),
        ("def f(a):\n    ", "f", "file"),
        ("def f(a):\n    x = 1\n", "x", None),  # the cursor is outside again
        ("def f(a):\n    x = 1\n    ", "x", "function"),
        ("def f(a): return a\n", "a", None),
        ("x = 1\ndef f():\n    x = 2\n    ", "x", "function"),
        ("class A:\n    k = 1\n    ", "k", "class"),
        ("class A:\n    k = 1\n    def m(self):\n        ", "k", "class"),
        ("class A:\n    def m(self):\n        self.w = 1\n    def n(self):\n        self.", "w", "class"),
        ("class A:\n    def m(self):\n        other.w = 1\n        ", "w", None),
        ("class A:\n    def m(self):\n        self.w[0] = 1\n        ", "w", None),
        ("class A:\n    k = 1\n", "k", None),
        ("class A:\n    k = 1\n    class B:\n        def m(self):\n            ", "k", None),  # of another class
        ("def f(a):\n    def g():\n        ", "a", "function"),
        ("(a, b), c = d\n", "b", "file"),
        ("a.b = a[i] = f(x=1) = 2\n", "i", None),
        ("a: int = 1\n", "a", "file"),
        ("a: int\n", "a", "file"),
        ("a: int = 1\n", "int", None),
        ("for i, (j, k) in x:\n    ", "k", "file"),
        ("with f(y) as g:\n    ", "g", "file"),
        ("with f(y) as g:\n    ", "y", None),
        ("[q for q in ", "q", "file"),
        ("if (n := f()) and ", "n", "file"),
        ("f = lambda u, v=w: ", "v", "file"),
        ("if a == b: c = 1\n", "c", "file"),
        ("a; b = 1; c = 2\n", "b", "file"),
        ("async def f(a):\n    ", "a", "function"),
        ("x = 1\nif x:\n    y = 1\n    ", "y", "file"),
        ("broken ( [\ndef f(a):\n    ", "a", "function"),
    ],
)
def test_where_a_name_is_visible_from(source, name, scope):
    assert scope_at(source, name) == scope


def test_views_carry_the_scopes():
    assert of(PROGRAM, "w", "scopes") == [None, "class"]
    assert of(PROGRAM, "q", "scopes") == [None, "function", "function"]
    assert of(PROGRAM, "f", "scopes")[-1] == "file"


# --- cardinal points -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    files = [file for file, package in library_files().items() if package in ("json", "argparse", "typing", "cmd")]
    return [code_views(Path(file).read_text()) for file in files]


def test_cardinal_points_of_the_library(library):
    points = cardinal_points(library)
    published = {".", "raise", "return", "for", "if", "in", "and", "not", "or", "is", ",", "[", "(", "{"}
    assert published <= points
    assert not {"def", "class", "True", "None", ")", "]", "}", "pass", "import"} & points


def test_what_always_has_the_same_follower_is_no_cardinal_point():
    one = code_views("a = b.c\n" + "x = y.c\n" * 30 + "z = y.d\nq = a + z\nq = a + y\n")
    assert "." not in cardinal_points([one]) and "." in cardinal_points([one], max_share=0.98)


@pytest.mark.parametrize(("corpus", "share"), [([], 0.95), (["x\n"], 0.95), (["x = y\nx = z\n"], 0.0), (["x"], 1.5)])
def test_a_corpus_without_cardinal_points_is_refused(corpus, share):
    with pytest.raises(InputError, match=r"cardinal point|max_share"):
        cardinal_points(map(code_views, corpus), share)
