"""A language server that completes code in an editor, over standard input and output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..decode.completion.context import typed_before
from ..decode.completion.offers import Completion
from ..decode.contract import CompletionMethod
from ..models.load import Loaded

try:
    from lsprotocol import types
    from pygls.lsp.server import LanguageServer
except ModuleNotFoundError:
    raise InputError("a language server needs the package pygls; run `pip install tokenry[lsp]`") from None

if TYPE_CHECKING:
    from pygls.workspace import TextDocument

__all__ = ["language_server"]

KINDS = {"name": types.CompletionItemKind.Variable, "statement": types.CompletionItemKind.Snippet}


def language_server(method: CompletionMethod, opening: Callable[[], Loaded]) -> LanguageServer:
    """A server; its `start_io()` serves until the editor says goodbye. The model is opened at the first completion.

    Of several requests that wait, the last one alone is answered; what the method refuses is shown as a message.
    """
    server, offering = LanguageServer("tokenry", version("tokenry")), _Offering(method, opening)

    @server.feature(types.TEXT_DOCUMENT_COMPLETION, types.CompletionOptions(trigger_characters=["."]))
    @server.thread()
    def complete(ls: LanguageServer, params: types.CompletionParams) -> types.CompletionList:
        document = ls.workspace.get_text_document(params.text_document.uri)
        # half a pair of surrogates, which no tokenizer takes, can come in JSON
        left = document.source[: document.offset_at_position(params.position)]
        left = left.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            found = offering(left, document.path or "the source")
        except InputError as refusal:
            ls.window_show_message(types.ShowMessageParams(types.MessageType.Warning, str(refusal)))
            found = []
        items = [_item(document, params.position, typed_before(left), rank, one) for rank, one in enumerate(found)]
        return types.CompletionList(is_incomplete=True, items=items)

    return server


class _Offering:
    """The completions of one model, one request at a time."""

    def __init__(self, method: CompletionMethod, opening: Callable[[], Loaded]) -> None:
        self.method, self.opening = method, opening
        self.lock, self.newest = threading.Lock(), 0

    @cached_property
    def loaded(self) -> Loaded:
        return self.opening()

    def __call__(self, source: str, name: str) -> Sequence[Completion]:
        self.newest += 1
        own = self.newest
        with self.lock:
            if own != self.newest:  # somebody has typed on meanwhile
                return []
            model, tokenizer = self.loaded
            return self.method.complete(model, tokenizer, source, None, name)


def _item(
    document: TextDocument, cursor: types.Position, typed: str, rank: int, one: Completion
) -> types.CompletionItem:
    """A completion as editors take it; it replaces what is typed of its name."""
    start = types.Position(cursor.line, cursor.character - document.position_codec.client_num_units(typed))
    return types.CompletionItem(
        label=one.text,
        kind=KINDS[one.kind],
        detail=f"{one.source}, {one.scope}" if one.source == "re-ranked" else one.source,
        sort_text=f"{rank:04}",
        filter_text=one.text,
        text_edit=types.TextEdit(types.Range(start, cursor), one.text),
    )
