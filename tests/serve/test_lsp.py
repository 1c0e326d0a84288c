"""The language server, asked over standard input and output by a client of the protocol."""

import asyncio
import os
import signal
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
WIDTH = len('    const é = "𝒙"; return this.fo') + 1
PYTHONS = (
    ("a.py", SOURCE, LINE, COLUMN),
    ("broken.py", "def f(:\n  x = (\nself.", 2, 5),
    ("half.py", "x = '\ud800'\nself.", 1, 5),
    ("notebook.py", '{"cells": [], "nbformat": 4, "x": x', 0, 35),
    ("inside.py", "x = 'self.", 0, 10),
)
JAVASCRIPTS = (
    ("a.js", JAVASCRIPT, LINE, WIDTH),
    ("comment.js", "x = 1 // self.", 0, 14),
    ("template.js", "`${this.", 0, 8),
    ("broken.js", "class A { m( { x = (\nthis.", 1, 5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("coder")
    words = value_tokenizer([code_views(SOURCE).values] * 4, 330)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(path)
    words.save_pretrained(path)
    return path


async def talk(folder, documents):
    """What the server can do, what it offers at (name, text, line, column) of each document, and what it shows."""
    client, shown, answers = LanguageClient("test", "1"), [], []
    client.feature(types.WINDOW_SHOW_MESSAGE)(lambda params: shown.append(params.message))
    arguments = "decode --method codefill -o statement_tokens=4 --lsp --model".split()
    try:
        async with asyncio.timeout(300):
            await client.start_io(sys.executable, "-X", "faulthandler", "-m", "tokenry", *arguments, str(folder))
            opened = await client.initialize_async(types.InitializeParams(capabilities=types.ClientCapabilities()))
            client.initialized(types.InitializedParams())
            for name, text, line, column in documents:
                uri, language = f"file:///{name}", "python" if name.endswith(".py") else "javascript"
                document = types.TextDocumentItem(uri, language, 1, text)
                client.text_document_did_open(types.DidOpenTextDocumentParams(document))
                params = types.CompletionParams(types.TextDocumentIdentifier(uri), types.Position(line, column))
                answers.append(await client.text_document_completion_async(params))
            await client.shutdown_async(None)
            client.exit(None)
            await client.stop()
    except TimeoutError:
        server = client._server
        server.send_signal(signal.SIGABRT)  # it says where each of its threads stands
        stacks = (await server.stderr.read()).decode()
        pytest.fail(f"no end after {len(answers)} answers; the server:\n{stacks}")
    return opened.capabilities, answers, shown


@pytest.fixture(scope="module")
def talked(folder):
    """(capabilities, answers, messages): one server for the files of both languages, which imports what is tested."""
    path = str(Path(tokenry.__file__).parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        return asyncio.run(talk(folder, [*PYTHONS, *JAVASCRIPTS]))


def test_an_editor_is_offered_what_complete_gives(folder, talked):
    capabilities, answers, shown = talked
    first, broken, half, notebook, inside = answers[: len(PYTHONS)]
    assert capabilities.completion_provider.trigger_characters == (".",)
    found = CodeFillCompletion(statement_tokens=4).complete(*tokenry.load(folder), SOURCE.rstrip("\n"))
    assert [item.label for item in first.items] == [one.text for one in found] and found
    assert sorted(first.items, key=lambda item: item.sort_text) == [*first.items]
    start, end = types.Position(LINE, COLUMN - 2), types.Position(LINE, COLUMN)
    assert all(item.text_edit.range == types.Range(start, end) for item in first.items)
    # the parameter is nearer than the attribute
    assert next(item for item in first.items if item.label == "folder").detail == "re-ranked, function"
    assert broken.items and half.items
    assert not notebook.items and not inside.items
    assert len(shown) == 1 and "is a notebook" in shown[0]


def test_an_editor_is_offered_javascript_by_the_ending_of_its_file(folder, talked):
    """As `complete` gives it for a file of that name; nothing in a comment or a template string."""
    _, answers, _ = talked
    first, comment, template, broken = answers[len(PYTHONS) :]
    complete = CodeFillCompletion(statement_tokens=4).complete
    found = complete(*tokenry.load(folder), JAVASCRIPT.rstrip("\n"), name="x.js")
    assert [item.label for item in first.items] == [one.text for one in found] and found
    start, end = types.Position(LINE, WIDTH - 2), types.Position(LINE, WIDTH)
    assert all(item.text_edit.range == types.Range(start, end) for item in first.items)
    assert next(item for item in first.items if item.label == "folder").detail == "re-ranked, class"
    assert not comment.items and not template.items
    assert broken.items
