"""The language server, asked over standard input and output by a client of the protocol."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import torch
from lsprotocol import types
from pygls.lsp.client import LanguageClient
from transformers import LlamaConfig, LlamaForCausalLM

import tokenry
from tokenry.decode import CodeFillCompletion
from tokenry.text.code.views import code_views
from tokenry.train.completion.vocabulary import value_tokenizer

SOURCE = "class Store:\n    def __init__(self, folder):\n        self.folder = folder\n        é = '𝒙'; self.fo\n"
LINE, COLUMN = 3, len("        é = '𝒙'; self.fo") + 1  # in UTF-16, where 𝒙 is two
JAVASCRIPT = """class Store {
  constructor(folder) { this.folder = folder; }
  save(name) {
    const é = "𝒙"; return this.fo
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coder")
    words = value_tokenizer([code_views(SOURCE).values] * 4, 330)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(path)
    words.save_pretrained(path)
    return path


async def talk(folder, documents, language="python", ending="py"):
    """What the server offers at (text, line, column) of each document, and what it shows."""
    client, shown, answers = LanguageClient("test", "1"), [], []
    client.feature(types.WINDOW_SHOW_MESSAGE)(lambda params: shown.append(params.message))
    command = [
        "-m",
        "tokenry",
        "decode",
        "--method",
        "codefill",
        "-o",
        "statement_tokens=4",
        "--model",
        folder,
        "--lsp",
    ]
    await client.start_io(sys.executable, *map(str, command))
    opened = await client.initialize_async(types.InitializeParams(capabilities=types.ClientCapabilities()))
    client.initialized(types.InitializedParams())
    for number, (text, line, column) in enumerate(documents):
        uri = f"file:///x{number}.{ending}"
        document = types.TextDocumentItem(uri, language, 1, text)
        client.text_document_did_open(types.DidOpenTextDocumentParams(document))
        params = types.CompletionParams(types.TextDocumentIdentifier(uri), types.Position(line, column))
        answers.append(await client.text_document_completion_async(params))
    await client.shutdown_async(None)
    client.exit(None)
    await client.stop()
    return opened.capabilities, answers, shown


@pytest.fixture
def ours(monkeypatch):
    """The server's process imports what is tested."""
    path = str(Path(tokenry.__file__).parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", path)


def test_an_editor_is_offered_what_complete_gives(folder, ours):
    broken = ("def f(:\n  x = (\nself.", 2, 5)
    half = ("x = '\ud800'\nself.", 1, 5)
    notebook = ('{"cells": [], "nbformat": 4, "x": x', 0, 35)
    inside = ("x = 'self.", 0, 10)
    documents = [(SOURCE, LINE, COLUMN), broken, half, notebook, inside]
    capabilities, answers, shown = asyncio.run(asyncio.wait_for(talk(folder, documents), 120))
    assert capabilities.completion_provider.trigger_characters == (".",)
    items = [*answers[0].items]
    found = CodeFillCompletion(statement_tokens=4).complete(*tokenry.load(folder), SOURCE.rstrip("\n"))
    assert [item.label for item in items] == [one.text for one in found] and found
    assert sorted(items, key=lambda item: item.sort_text) == items
    start, end = types.Position(LINE, COLUMN - 2), types.Position(LINE, COLUMN)
    assert all(item.text_edit.range == types.Range(start, end) for item in items)
    assert (
        next(item for item in items if item.label == "folder").detail == "re-ranked, function"
    )  # the parameter is nearer than the attribute
    assert answers[1].items and answers[2].items
    assert not answers[3].items and not answers[4].items
    assert len(shown) == 1 and "is a notebook" in shown[0]


def test_an_editor_is_offered_javascript_by_the_ending_of_its_file(folder, ours):
    """As `complete` gives it for a file of that name; nothing in a comment or a template string."""
    comment = ("x = 1 // self.", 0, 14)
    column = len('    const é = "𝒙"; return this.fo') + 1
    documents = [(JAVASCRIPT, 3, column), comment, ("`${this.", 0, 8), ("class A { m( { x = (\nthis.", 1, 5)]
    _, answers, shown = asyncio.run(asyncio.wait_for(talk(folder, documents, "javascript", "js"), 120))
    items = [*answers[0].items]
    complete = CodeFillCompletion(statement_tokens=4).complete
    found = complete(*tokenry.load(folder), JAVASCRIPT.rstrip("\n"), name="x.js")
    assert [item.label for item in items] == [one.text for one in found] and found
    start, end = types.Position(3, column - 2), types.Position(3, column)
    assert all(item.text_edit.range == types.Range(start, end) for item in items)
    assert next(item for item in items if item.label == "folder").detail == "re-ranked, class"
    assert not answers[1].items and not answers[2].items and not shown
    assert answers[3].items  # of what is broken
