"""Programs in JavaScript as values and types, the names visible in them, and sources that end anywhere."""

import sys
import time

import pytest

from tokenry.core.errors import InputError
from tokenry.text.code.cardinal import cardinal_points
from tokenry.text.code.javascript import left_of_cursor
from tokenry.text.code.languages import language_of
from tokenry.text.code.lexer import DEDENT, EOS, INDENT, statements
from tokenry.text.code.views import TYPES, code_views

PROGRAM = """#!/usr/bin/env node
// what it is
import fs, { readFile as read, join } from "fs";
import * as path from 'path';

const limit = 0x10, { a, b: inner = 2 } = load(`t${limit}`);

class Store extends Base {
  #size = 1;
  static pattern = /re\\/x/g;
  constructor(folder) {
    super();
    this.folder = folder;
  }
  get size() { return this.#size }
  async save(name, ...rest) {
    const place = join(this.folder, name) /* why */
    for (const one of rest) await read(place, one);
    return { place, limit, name: late ? rest[0] : null };
    var late = 3
  }
}

export function total(rows) {
  let sum = 0
  for (let i = 0; i < rows.length; i++) { sum += rows[i] }
  if (sum > limit) { throw new Error("much") } else if (!sum) return
  rows.forEach((row) => { path.push({ row, get: hoisted }) });
  switch (sum) { case 1: break; default: fs.exit() }
  while (true) { }
}
var hoisted = (x) => x * 2
"""
PIECES = {
    "loop": "for (let i = 0; i < 3; i++) { go({ i, a: [1] }) }",
    "labels": "label: while (true) { break label }",
    "do": "do { x() } while (y);",
    "catch": "try { a() } catch { b() } finally { }",
    "class": "export default class { static get\n x() { } }",
    "function": "const f = function g(u) { return g(u) };",
}


def rows(source, *names):
    views = code_views(source, "x.js")
    return list(zip(*(getattr(views, name) for name in names)))


def of(source, value, name="types"):
    return [kind for one, kind in rows(source, "values", name) if one == value]


def values(source):
    return " ".join(code_views(source, "x.js").values)


# --- values and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "language"),
    [("a.js", "javascript"), ("b/c.MJS", "javascript"), ("d.jsx", "javascript"), ("e.py", "python"), ("f", "python")],
)
def test_the_ending_tells_the_language(name, language):
    assert language_of(name) == language


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (PIECES["loop"], "for ( let i = <NUMBER> ; i < <NUMBER> ; i ++ ) { <EOS> <INDENT> go ( { i , a : [ <NUMBER> ] "
         "} ) <EOS> <DEDENT> } <EOS>"),
        (PIECES["labels"], "label : while ( true ) { <EOS> <INDENT> break label <EOS> <DEDENT> } <EOS>"),
        (PIECES["do"], "do { <EOS> <INDENT> x ( ) <EOS> <DEDENT> } while ( y ) <EOS>"),
        (PIECES["catch"], "try { <EOS> <INDENT> a ( ) <EOS> <DEDENT> } catch { <EOS> <INDENT> b ( ) <EOS> <DEDENT> } "
         "finally { } <EOS>"),
        (PIECES["class"], "export default class { <EOS> <INDENT> static get x ( ) { } <EOS> <DEDENT> } <EOS>"),
        (PIECES["function"], "const f = function g ( u ) { <EOS> <INDENT> return g ( u ) <EOS> <DEDENT> } <EOS>"),
        ("x = `a ${f(b)} c` + /[/]/.source", "x = <STRING> + <STRING> . source <EOS>"),
        ("<A b={c}>text &amp; {d}</A>", "< A b = { c } > <STRING> <STRING> { d } </ A > <EOS>"),
        ("a\n(b)\n// words\n\nc", "a ( b ) <EOS> c <EOS>"),
        (";;a;;", "a <EOS>"),
    ],
)  # fmt: skip
def test_values_are_what_stands_there_with_marks_for_statements_and_blocks(source, expected):
    assert values(source) == expected


def test_semicolons_and_line_ends_change_nothing():
    with_them = "let a = 1;\r\nif (a) {\r\n  go();\r\n}\r\n"
    without = "let a = 1\nif (a) { go() }\n"
    assert values(with_them) == values(without)


def test_all_views_have_one_length_known_types_and_balanced_blocks():
    views = code_views(PROGRAM, "x.js")
    assert len({len(part) for part in vars(views).values()}) == 1
    assert set(views.types) <= set(TYPES)
    assert views.values.count(INDENT) == views.values.count(DEDENT) == 9
    assert views.values[-1] == EOS and not any(" " in value for value in views.values)
    assert views.lines[:2] == (3, 3) and views.positions[:3] == (1, 2, 3)
    assert [list(views.values[a:b]) for a, b in statements(views.values)][1] == [
        *("import", "*", "as", "path", "from", "<STRING>", EOS)
    ]


@pytest.mark.parametrize(
    ("value", "types"),
    [
        ("fs", ["LIBRARY", "LIBRARY"]),
        ("readFile", ["LIB"]),
        ("read", ["ALIAS", "ALIAS"]),
        ("join", ["LIBRARY", "LIBRARY"]),
        ("path", ["ALIAS", "ALIAS"]),
        ("load", ["FUNCTION_CALL"]),
        ("limit", ["LOCAL_VARIABLE", "GLOBAL_VARIABLE", "GLOBAL_VARIABLE"]),
        ("folder", ["LOCAL_VARIABLE"] * 4),
        ("late", ["LOCAL_VARIABLE"] * 2),  # bound behind its place, in the same function
        ("hoisted", ["GLOBAL_VARIABLE", "LOCAL_VARIABLE"]),
        ("row", ["LOCAL_VARIABLE"] * 2),
        ("Base", ["GLOBAL_VARIABLE"]),
        ("#size", ["LOCAL_VARIABLE"] * 2),
        ("push", ["FUNCTION_CALL"]),
        ("this", ["THIS"] * 3),
        ("null", ["NULL"]),
        ("true", ["TRUE"]),
        ("const", ["CONST"] * 3),
        ("get", ["GET", "LOCAL_VARIABLE"]),
    ],
)
def test_each_name_has_the_type_of_its_place(value, types):
    assert of(PROGRAM, value) == types


def test_types_of_python_keep_their_numbers():
    assert TYPES.index("YIELD") == 47 and TYPES[48:] == tuple(sorted(TYPES[48:])) and "FUNCTION" in TYPES[48:]


def test_cardinal_points_of_javascript():
    points = cardinal_points([code_views(PROGRAM, "x.js")] * 2, 0.99)
    assert {".", "(", "return", "="} <= points and not {"const", "function", "this", "null", ")", "class"} & points


# --- names and cursors -----------------------------------------------------------------------------------------------


def at_cursor(source, name):
    return left_of_cursor(source)[1].scope(name)


@pytest.mark.parametrize(
    ("source", "name", "scope"),
    [
        ("const x = ", "x", None),  # behind the declaration alone
        ("const x = 1; ", "x", "file"),
        ("let { a, b: c, ...d } = e; ", "c", "file"),
        ("let { a, b: c, ...d } = e; ", "d", "file"),
        ("let { a, b: c, ...d } = e; ", "b", None),
        ("let [a, [b = q]] = e; ", "b", "file"),
        ("let [a, [b = q]] = e; ", "q", None),
        ("import a, { b as c } from 'm'; ", "a", "file"),
        ("import a, { b as c } from 'm'; ", "b", None),
        ("function f(a, { b }, c = d, ...e) { ", "b", "function"),
        ("function f(a, { b }, c = d, ...e) { ", "c", "function"),
        ("function f(a, { b }, c = d, ...e) { ", "d", None),
        ("function f(a) { ", "f", "file"),
        ("function f(a) { } ", "a", None),
        ("const f = (a) => { ", "a", "function"),
        ("const f = a => a.b + ", "a", "function"),
        ("const f = function g() { ", "g", "function"),
        ("for (const k of ks) { ", "k", "file"),
        ("try { } catch (e) { ", "e", "file"),
        ("class A { k = 1; m() { this.", "k", "class"),
        ("class A { m() { this.w = 1 } n() { this.", "w", "class"),
        ("class A { m() { other.w = 1; this.", "w", None),
        ("class A { m() { } n() { this.", "m", "class"),
        ("class A { k = 1 } ", "k", None),
        ("class A { k = 1; m() { class B { n() { ", "k", None),  # of another class
        ("f(a, (b) => { g([", "b", "function"),
        ("broken ( [ {\nfunction f(a) { a.", "a", "function"),
    ],
)
def test_where_a_name_is_visible_from(source, name, scope):
    assert at_cursor(source, name) == scope


def test_functions_are_known():
    names = left_of_cursor("function f() { } class A { } const v = 1; ")[1]
    assert names.is_function("f") and names.is_function("A") and not names.is_function("v")


def test_every_cursor_sees_what_the_whole_program_has_left_of_it():
    for source in (PROGRAM, *PIECES.values()):
        views, found = code_views(source, "x.js"), 0
        starts = [i for i in range(len(source)) if source[i].isidentifier() and not source[i - 1 : i].isidentifier()]
        for start in starts:
            read, names = left_of_cursor(source[:start])
            place = len(read or ())
            if read == views.values[:place] and read and source.startswith(views.values[place], start):
                found += 1
                scope = views.scopes[place]
                assert scope is None or names.scope(views.values[place]) == scope
        assert found >= 0.8 * len(starts) if source == PROGRAM else found >= 2


@pytest.mark.parametrize(
    "source",
    ["x = 'a ", 'x = "a ', "x = `a ", "x = `a ${b", "// a ", "/* a ", "x = /a ", "<p>a ", "this.#", "$", "1"],
)
def test_nothing_is_read_inside_strings_comments_and_other_tokens(source):
    assert left_of_cursor(source)[0] is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", ""),
        ("x = 'open\ny.", "x = <STRING> y ."),
        ("foo(bar, ", "foo ( bar ,"),
        ("if (a) { b(", "if ( a ) { <EOS> <INDENT> b ("),
        ("for (let i = 0; i < ", "for ( let i = <NUMBER> ; i <"),
        ("a = { b: c, d: ", "a = { b : c , d :"),
        (") ] }\nx.", ") ] } x ."),
        ("def f(:\n  x = (\nself.", "def f ( : x = ( self ."),
    ],
)
def test_what_is_broken_is_read_as_far_as_it_goes(source, expected):
    assert " ".join(left_of_cursor(source)[0]) == expected


def test_every_beginning_of_a_program_is_read():
    for end in range(0, len(PROGRAM) + 1, 3):
        left_of_cursor(PROGRAM[:end])


def test_a_program_with_an_error_keeps_its_other_statements():
    broken = "let a = 1;\nlet = = 2;\nfunction f(b) { return a + b }\n"
    assert values(broken).endswith(values("function f(b) { return a + b }"))
    assert values(broken).startswith("let a = <NUMBER> <EOS>")


def test_deep_and_large_programs_are_read_in_seconds():
    begun = time.perf_counter()
    assert code_views("(" * 5_000 + "1" + ")" * 5_000, "x.js").values.count("(") == 5_000
    assert len(left_of_cursor("[" * 5_000)[0]) == 5_000
    assert len(code_views("f(a.b, 'text');\n" * 20_000, "x.js").values) == 180_000
    assert time.perf_counter() - begun < 60


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("", "c.js", "c.js has no statement"),
        ("// only words\n", "c.js", "c.js has no statement"),
        ("foo(function() { a.b", "d.js", "d.js is no JavaScript that can be parsed; mend it"),
        ("x = 'a\ud800'\n", "e.js", "half a surrogate pair"),
    ],
)
def test_source_that_is_no_program_is_refused(source, name, words):
    with pytest.raises(InputError, match=words):
        code_views(source, name)


def test_without_the_reader_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_sitter_javascript", None)
    with pytest.raises(InputError, match=r"JavaScript needs .* run `pip install tokenry\[code\]`"):
        code_views("x = 1", "x.js")
    with pytest.raises(InputError, match=r"tokenry\[code\]"):
        left_of_cursor("x = ")
    assert code_views("x = 1\n", "x.py").values[0] == "x"
