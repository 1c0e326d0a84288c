"""codefill: what stands left of a cursor, beam search against all segmentations, the table of weights, and the verb."""

import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import tokenry
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.decode import Antislop, Candidate, CodeFillCompletion, CyclicReflex, mrr_at_k, offset_of, rerank
from tokenry.decode.completion.context import left_of, rendered
from tokenry.decode.completion.ranking import WEIGHTS, weights_of
from tokenry.decode.completion.search import next_values, rest_of_statement, vocabulary_of
from tokenry.models.anatomy import vocabulary_size
from tokenry.text.code.views import code_views
from tokenry.train.completion.vocabulary import value_tokenizer

SOURCE = """import os
class Store:
    def __init__(self, folder):
        self.folder = folder
        self.entries = {'a': 1}

    def save(self, name):
        return os.path.join(self.folder, name)
"""
HERE = SOURCE.index("self.folder, name)") + len("self.fo")
EVEN_OPTION = ",".join("1" * 9)


@pytest.fixture(scope="module")
def words():
    return value_tokenizer([code_views(SOURCE).values] * 4, 330)


@pytest.fixture(scope="module")
def coder(words):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=256, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(coder, words, tmp_path_factory):
    path = tmp_path_factory.mktemp("coder")
    coder.save_pretrained(path)
    words.save_pretrained(path)
    return path


# --- a second language ---------------------------------------------------------------------------------------------

JAVASCRIPT = """import fs from "fs";
class Store {
  constructor(folder) { this.folder = folder; }
  save(name) {
    if (this.folder === name) {
      return fs.join(this.fo"""


def test_javascript_is_completed_by_the_ending_of_its_file(words, coder):
    complete = CodeFillCompletion(statement_tokens=4).complete
    found = complete(coder, words, JAVASCRIPT, name="x.js")
    assert {one.text: one.scope for one in found if one.kind == "name"}["folder"] == "class"
    assert complete(coder, words, JAVASCRIPT + "lder) // thi", name="x.js") == []
    assert complete(coder, words, "x = /* ", name="x.js") == [] != complete(coder, words, "x = /* ", name="x.py")


def test_what_javascript_knows_left_of_a_cursor():
    left = left_of("class A { m() { } n() { function f() { } this.", language="javascript")
    assert [left.kind(value) for value in ("m", "delete", "w")] == ["attribute"] * 3
    left = left_of("function f(v) { retu", language="javascript")
    assert (left.typed, left.values[-2:]) == ("retu", ("<EOS>", "<INDENT>"))
    assert [left.kind(value) for value in ("return", "f", "v", "def")] == [
        "keyword",
        "function",
        "variable",
        "variable",
    ]


def test_the_verb_completes_javascript(folder, tmp_path):
    (tmp_path / "x.js").write_text(JAVASCRIPT)
    place = ["--file", f"{tmp_path / 'x.js'}:6:29", "--model", str(folder), "-o", "statement_tokens=4"]
    result = CliRunner().invoke(main, ["decode", "--method", "codefill", *place])
    assert result.exit_code == 0 and "folder  (name; re-ranked, class)" in result.output, result.output


def test_without_the_reader_of_javascript_the_extra_is_named(words, coder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.raises(InputError, match=r"run `pip install tokenry\[code\]`"):
        CodeFillCompletion().complete(coder, words, JAVASCRIPT, name="x.js")


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_table_is_the_papers():
    assert [*WEIGHTS["attribute"].values()] == [1.625, 1.25, 1.125]
    assert [*WEIGHTS["variable"].values()] == [1.625, 1.125, 1.5]
    assert [*WEIGHTS["function"].values()] == [1.125, 1.625, 1.5]
    assert [*WEIGHTS["function"]] == ["function", "class", "file"]


def test_a_visible_variable_overtakes_a_likelier_unseen_one():
    one, other = Candidate("seen", 0.30, "variable"), Candidate("unseen", 0.40, "variable")
    first, second = rerank([one, other], {"seen": "function"})
    assert (first.candidate, first.score, first.scope) == (one, pytest.approx(0.4875), "function")
    assert (second.candidate, second.score, second.scope) == (other, 0.40, None)


@pytest.mark.parametrize(
    ("kind", "scope", "score"),
    [("attribute", "class", 0.5), ("variable", "class", 0.45), ("function", "file", 0.6), ("keyword", "file", 0.4)],
)
def test_a_score_is_the_probability_times_its_weight(kind, scope, score):
    assert rerank([Candidate("x", 0.4, kind)], {"x": scope})[0].score == pytest.approx(score)


def test_scores_may_exceed_one_and_equal_ones_keep_their_order():
    ranked = rerank([Candidate(n, 0.8, "variable") for n in "abc"], {"a": "file", "b": "file"})
    assert [one.candidate.value for one in ranked] == ["a", "b", "c"] and ranked[0].score == pytest.approx(1.2)


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.floats(0, 1)), max_size=12))
def test_weights_of_one_are_the_identity(found):
    """But for the order by probability, in which a beam search gives them anyway."""
    candidates = sorted((Candidate(v, p, "variable") for v, p in found), key=lambda one: -one.probability)
    ranked = rerank(candidates, {"a": "function", "b": "class"}, weights_of([1.0] * 9))
    assert [one.candidate for one in ranked] == candidates[:10]
    assert [one.score for one in ranked] == [one.probability for one in candidates[:10]]


def test_only_the_first_are_ranked():
    candidates = [Candidate(str(i), 1 / (i + 2), "variable") for i in range(12)]
    assert len(rerank(candidates, {"11": "function"})) == 10
    assert rerank(candidates, {"2": "function"}, top_k=2)[-1].candidate.value == "1"


def test_mean_reciprocal_rank():
    assert mrr_at_k([1, 2, None, 11]) == (1 + 1 / 2) / 4
    assert mrr_at_k([4], k=4) == 0.25 and mrr_at_k([5], k=4) == 0
    for ranks in ([], [0]):
        with pytest.raises(InputError, match="mrr_at_k needs ranks"):
            mrr_at_k(ranks)


def test_a_candidate_without_a_kind_is_refused():
    with pytest.raises(InputError, match="candidate 'x' has no kind; give attribute, variable, function"):
        rerank([Candidate("x", 0.5, "")], {})


@pytest.mark.parametrize("value", ["1,2", "1,1,1,1,1,1,1,1,0", "1,1,1,1,1,1,1,1,-1", "a", "1,1,1,1,1,1,1,1,inf"])
def test_a_table_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="rerank_weights"):
        CodeFillCompletion.from_strings([f"rerank_weights={value}"])
    assert weights_of((2.0,) * 9)["variable"]["file"] == 2


# --- left of the cursor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "typed", "last"),
    [
        ("x = self.na", "na", "."),
        ("x = ", "", "="),
        ("", "", None),
        ("if x:\n    ", "", "<INDENT>"),
        ("if x:\n    y\n", "", "<DEDENT>"),
        ("f(a,\n  b", "b", ","),
        ("x = 12", "", "in a number"),
        ("x = 'te", "te", "in a string"),
        ("x = 1  # wo", "wo", "in a comment"),
        ("'''\ndoc", "doc", "in a string"),
    ],
)
def test_what_stands_left(source, typed, last):
    left = left_of(source)
    if last and last.startswith("in a "):
        assert left.values is None
    else:
        assert (left.typed, left.before, left.source + left.typed) == (typed, last, source)


def test_a_place_is_counted_from_one():
    assert offset_of("ab\ncd", 1, 1, "x") == 0 and offset_of("ab\ncd", 2, 3, "x") == 5
    for line, column in ((0, 1), (3, 1), (1, 0), (1, 4)):
        with pytest.raises(InputError, match=r"x has no line|of x has no column"):
            offset_of("ab\ncd", line, column, "x")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ("self . x [ <NUMBER> ] . f ( a , b = <STRING> )", 'self.x[0].f(a, b = "")'),
        ("return not x if y else - <NUMBER>", "return not x if y else - 0"),
        ("for a in b :", "for a in b:"),
        ("x < y <EOS> z", "x < y"),
    ],
)
def test_values_read_as_code(values, text):
    assert rendered(tuple(values.split())) == text


# --- search ----------------------------------------------------------------------------------------------------------


def segmentations(texts, word):
    """All ways to write a word in tokens."""
    if not word:
        yield []
        return
    for i, text in enumerate(texts):
        if text and word.startswith(text):
            yield from ([i, *rest] for rest in segmentations(texts, word[len(text) :]))


@torch.no_grad()
def probability(model, vocabulary, context, value):
    """Over all ways to write the value: that of its tokens, and that the token behind belongs to another value."""
    total = 0.0
    for ids in segmentations(vocabulary.texts, " " + value):
        row = [*context, *ids]
        logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
        chance = sum(float(logp[len(context) - 1 + n, i]) for n, i in enumerate(ids))
        ends = 0.0 if vocabulary.whole[ids[-1]] else float(logp[-1][~vocabulary.goes_on].logsumexp(-1))
        total += math.exp(chance + ends)
    return total


def test_what_is_found_has_the_probability_of_all_its_spellings(coder, words):
    """With beams as wide as the vocabulary nothing is lost."""
    vocabulary = vocabulary_of(words, vocabulary_size(coder))
    context = words(" self . folder = ").input_ids
    found = next_values(coder, vocabulary, [context], 5000, 330, names_only=False)[0]
    assert [one.probability for one in found] == sorted((one.probability for one in found), reverse=True)
    for one in [*found[:6], *(one for one in found if one.value in ("name", "self", "os", "<STRING>"))]:
        assert one.probability == pytest.approx(probability(coder, vocabulary, context, one.value), rel=1e-3)


def test_rows_of_a_batch_are_found_as_alone(coder, words):
    vocabulary = vocabulary_of(words, vocabulary_size(coder))
    contexts = [words(text).input_ids for text in (" self .", " return os . path . join (", " x")]
    together = next_values(coder, vocabulary, contexts)
    for row, context in zip(together, contexts):
        (alone,) = next_values(coder, vocabulary, [context])
        assert [one.value for one in row] == [one.value for one in alone]
        assert [one.probability for one in row] == pytest.approx([one.probability for one in alone], rel=1e-4)


@pytest.mark.parametrize("typed", ["fo", "sel", "x", "na"])
def test_names_begin_with_what_was_typed(coder, words, typed):
    vocabulary = vocabulary_of(words, vocabulary_size(coder))
    found = next_values(coder, vocabulary, [words(" self .").input_ids], typed=typed)[0]
    assert found and all(one.value.startswith(typed) and one.value.isidentifier() for one in found)


def test_a_greedy_statement_is_what_generate_writes(coder, words):
    vocabulary = vocabulary_of(words, vocabulary_size(coder))
    context = words(" self .").input_ids
    rest = rest_of_statement(coder, vocabulary, context, 1, 6)
    plain = coder.generate(
        torch.tensor([context]),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    assert rest.ids == [i for i in plain[0, len(context) :].tolist() if i != words.eos_token_id]
    logp = coder(torch.tensor([context + rest.ids])).logits[0].log_softmax(-1)
    chance = math.prod(logp[len(context) - 1 + n, i].exp().item() for n, i in enumerate(rest.ids))
    assert len(rest.ids) < 6 or rest.probability == pytest.approx(chance, rel=1e-3)


def test_a_wider_beam_finds_no_less_likely_a_statement(coder, words):
    vocabulary = vocabulary_of(words, vocabulary_size(coder))
    context = words(" return").input_ids
    narrow, wide = (rest_of_statement(coder, vocabulary, context, beam, 4).probability for beam in (1, 40))
    assert wide >= narrow * (1 - 1e-5)


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads_values", [True, False])
def test_completions_are_ranked_and_say_where_from(coder, words, llama, tokenizer, reads_values):
    model, reader = (coder, words) if reads_values else (llama, tokenizer)
    found = CodeFillCompletion(statement_tokens=4).complete(model, reader, SOURCE, HERE)
    names = [one for one in found if one.kind == "name"]
    assert names and all(one.text.startswith("fo") for one in found)
    assert all(a.score >= b.score for a, b in pairwise(names))
    for one in names:
        assert one.source == ("re-ranked" if one.score != one.probability else "model")
        assert one.score == pytest.approx(one.probability * (1.25 if one.scope == "class" else 1))
    if reads_values:
        assert {one.text: one.scope for one in names}["folder"] == "class"
    even = CodeFillCompletion.from_strings([f"rerank_weights={EVEN_OPTION}"]).complete(model, reader, SOURCE, HERE)
    assert all(one.source == "model" and one.score == one.probability for one in even)
    assert {one.text for one in even if one.kind == "name"} == {one.text for one in names}


def test_what_stands_right_of_the_cursor_changes_nothing(coder, words):
    method = CodeFillCompletion(statement_tokens=4)
    found = method.complete(coder, words, SOURCE[:HERE])
    for right in ("", "\n)))broken '\n", "\ud800"):
        assert method.complete(coder, words, SOURCE[:HERE] + right, HERE) == found
    tabs = SOURCE.replace("    ", "\t")
    assert method.complete(coder, words, tabs, tabs.index("self.folder, name)") + len("self.fo")) == found
    crlf = SOURCE.replace("\n", "\r\n")
    assert method.complete(coder, words, crlf, crlf.index("self.folder, name)") + len("self.fo")) == found


def test_source_that_is_broken_is_completed_up_to_the_error(coder, words):
    method = CodeFillCompletion(statement_tokens=2)
    for source in ("def f(:\n  x = (\nself.", "print 'two'\nx", "  x = [\n 'open\ny.", "", "\n\n    ", "x = $ y."):
        assert method.complete(coder, words, source), source
    assert method.complete(coder, words, "x = 'in a string") == []


def test_a_file_of_a_megabyte_is_completed(coder, words):
    source = ("def f(value):\n    return value.attribute\n" * 26_000) + "f.attr"
    assert len(source) > 1_000_000
    found = CodeFillCompletion(statement_tokens=2, beam=2, top_k=2).complete(coder, words, source)
    assert all(one.text.startswith("attr") for one in found)


def test_a_prompt_is_continued_to_the_end_of_its_statement(coder, words, llama, tokenizer):
    method = CodeFillCompletion(statement_tokens=5)
    prompts = ["x = self.", "def f(a):\n    return "]
    both = tokenry.generate(coder, words, prompts, methods=[method])
    for row, prompt in enumerate(prompts):
        alone = tokenry.generate(coder, words, prompt, methods=[method])
        assert (alone.texts[0], alone.new_ids[0]) == (both.texts[row], both.new_ids[row])
    text = tokenry.generate(llama, tokenizer, "x = self.", methods=[method]).texts[0]
    assert "\n" not in text


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name", "words_of_it"),
    [
        ("x = '\ud800'\ny", "a.py", "a.py has half a surrogate pair"),
        ('{"cells": [], "nbformat": 4, "x": x', "a.py", "a.py is a notebook; export it"),
        ("x", "n.ipynb", "n.ipynb is a notebook"),
    ],
)
def test_source_that_is_no_text_is_refused(coder, words, source, name, words_of_it):
    with pytest.raises(InputError, match=words_of_it):
        CodeFillCompletion().complete(coder, words, source, None, name)


def test_what_does_not_go_with_it_is_refused(coder, words, llama, tokenizer):
    method = CodeFillCompletion()
    with pytest.raises(InputError, match="both read the prompts first"):
        tokenry.generate(coder, words, "x", methods=[method, method])
    with pytest.raises(InputError, match="takes no monitors"):
        tokenry.generate(llama, tokenizer, "x", methods=[method, Antislop(phrases=("a b",))])
    with pytest.raises(InputError, match="takes no processors"):
        tokenry.generate(llama, tokenizer, "x", methods=[method, CyclicReflex(token_ids=(3,), end_think=None)])
    with pytest.raises(InputError, match="takes no stop"):
        tokenry.generate(coder, words, "x", methods=[method], stop="y")
    with pytest.raises(InputError, match="leave sampling out"):
        tokenry.generate(coder, words, "x", methods=[method], do_sample=True)
    with pytest.raises(InputError, match="leaves no room in the model's window of 256"):
        CodeFillCompletion(statement_tokens=256).complete(coder, words, "x")


# --- the verb --------------------------------------------------------------------------------------------------------


def run(*args, code=0):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_the_verb_prints_what_complete_gives(coder, words, folder, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(SOURCE.replace("\n", "\r\n"), newline="")
    line, column = SOURCE[:HERE].count("\n") + 1, HERE - SOURCE.rindex("\n", 0, HERE)
    common = ["decode", "--method", "codefill", "-o", "statement_tokens=4", "--model", folder]
    answer = json.loads(run(*common, "--file", f"{path}:{line}:{column}", "--json"))
    found = CodeFillCompletion(statement_tokens=4).complete(coder, words, SOURCE, HERE)
    assert [one["text"] for one in answer["completions"]] == [one.text for one in found]
    assert [one["source"] for one in answer["completions"]] == [one.source for one in found]
    assert (answer["line"], answer["column"]) == (line, column)
    printed = run(*common, "--file", f"{path}:{line}:{column}").splitlines()
    assert len(printed) == len(found) and "folder  (name; re-ranked, class)" in "\n".join(printed)


@pytest.mark.parametrize(
    ("args", "words_of_it"),
    [
        (["--file", "x.py"], "is not FILE:LINE:COLUMN; give a place such as x.py:12:5"),
        (["--file", "x.py:a:1"], "is not FILE:LINE:COLUMN"),
        (["--file", "{x}:9:1"], "has no line 9; give one of 1 to 2"),
        (["--file", "{x}:1:9"], "has no column 9; give one of 1 to 6"),
        (["--file", "none.py:1:1"], "cannot be read"),
        (["--file", "{bytes}:1:1"], "not UTF-8 text"),
        (["--file", "{x}:1:1", "--temperature", "2"], "--temperature would have no effect with --file"),
        (["--lsp", "--raw"], "--raw would have no effect with --lsp"),
    ],
)
def test_the_verb_refuses(folder, tmp_path, args, words_of_it):
    (tmp_path / "x.py").write_text("x = 1\n")
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff'\n")
    places = {"x": tmp_path / "x.py", "bytes": tmp_path / "bytes.py"}
    given = [arg.format(**places) for arg in args]
    assert words_of_it in run("decode", "--method", "codefill", "--model", folder, *given, code=2)


def test_a_method_that_does_not_complete_is_refused(folder):
    message = run("decode", "--method", "tip", "--model", folder, "--file", "x.py:1:1", code=2)
    assert "give --method codefill" in message
