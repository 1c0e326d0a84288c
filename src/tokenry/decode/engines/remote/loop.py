"""The decode loop over another server: it writes a few tokens at a time, and here they are checked and repaired.

A request asks for a chunk, which is read while the server writes it, where it streams. The tokens are appended one by
one, and after each one the monitors look. At a violation the request is closed, so that the server writes no further,
the rest of the chunk is dropped, and the token at its place is replaced in one of two ways:

* ask: the server writes one token there, with what the monitors have lowered as `logit_bias`;
* local: the likeliest of the tokens that the server has told for this place, after they were lowered. No request is
  needed. For greedy decoding it is the server's own choice; where too few tokens were told to be sure, it is asked.

Texts are greedily the same as those of `DecodeLoop` on the same weights, whatever the chunks. Of sampling less can be
promised: see `tokenry.decode.remote`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....core.errors import InputError
from ....core.fields import Chunk, check
from ...generation.engine import Engine
from ...generation.job import Job
from ...generation.loop import DecodeLoop
from ...generation.monitor import Violation, held_tokens
from ...generation.output import DecodeOutput
from ...generation.plugins import NO_PLUGINS, Plugins
from ...generation.sampler import row_seed
from ...generation.sequence import SequenceState
from .client import RemoteServer
from .dialects import TOP, Continuation, Likeliest, Request, Sampling
from .streams import Stream

__all__ = ["RemoteLoop", "RemoteOptions", "RemoteStats"]

STREAMED = 64  # tokens of adaptive chunks that can be closed; no more, as not every server looks whether it was
SHORT, LONG = 6, 10  # of those that are read whole: violations come in groups
CALM = 2  # of these chunks without a violation, after which they are long
PATIENCE = 32  # tokens without a whole character

# Yields how to ask, and is sent what came; what it returns says whether the text was changed.
Asking = Generator[Callable[[], Future[Any]], Any, Any]


@dataclass(frozen=True)
class RemoteOptions:
    """How the server is used.

    Attributes:
        sampling: how it draws; the job says whether.
        chunk: tokens of a request; None asks for 64 where the server streams, otherwise for 6 at first and after a
            violation, and for 10 after two chunks without one.
        repair: "ask" or "local"; None is local for greedy decoding and ask for sampling, for which local only knows the
            likeliest tokens.
        logit_bias: {token: what is added to its score everywhere}.
        top: the likeliest tokens that are wanted at each position.
    """

    sampling: Sampling = field(default_factory=Sampling)
    chunk: int | None = None
    repair: Literal["ask", "local"] | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top: int = 0

    def __post_init__(self) -> None:
        if self.chunk is not None:
            check("chunk", self.chunk, Chunk)
        if self.repair not in (None, "ask", "local"):
            raise InputError(f"repair={self.repair!r} is unknown; use 'ask', 'local' or None")
        if not 0 <= self.top <= TOP:
            raise InputError(
                f"{self.top} log-probabilities of a token are more than servers tell; ask for {TOP} at most"
            )


@dataclass
class RemoteStats:
    """What it has cost: requests, tokens that the server wrote, and those of them that are not in the texts."""

    requests: int = 0
    written: int = 0
    wasted: int = 0

    def summary(self) -> dict[str, Any]:
        """The counts, for JSON."""
        return {"remote": vars(self)}

    def in_words(self) -> str | None:
        """What the command line says."""
        return f"{self.requests} requests, {self.written} tokens written there, {self.wasted} of them dropped"


class RemoteRow(SequenceState):
    """A row with what is known of its positions: the likeliest tokens there, and what was lowered."""

    def __init__(self, number: int, prompt: list[int], tokenizer: PreTrainedTokenizerBase, chunk: int | None) -> None:
        super().__init__(number, prompt, tokenizer)
        self.chunk = chunk  # None: adaptive
        self.clean = 0  # chunks since the last violation
        self.requests = 0
        self.streams = True  # until its stream has lost something
        self.stream: Stream | None = None  # what is being read
        self.tops: dict[int, Likeliest] = {}
        self.lowered: dict[int, dict[int, float]] = {}

    def truncate(self, count: int) -> None:
        for store in (self.tops, self.lowered):
            for index in range(count + 1, len(self.ids) + 1):
                store.pop(index, None)
        super().truncate(count)


class RemoteLoop(DecodeLoop):
    """A `DecodeLoop` whose tokens come from a server. All rows are asked for at the same time.

    Args:
        server: the server, which stays open.
        job: as of `DecodeLoop`; what it says of warpers is for repairs that are made here.
        tokenizer: that of the server's model.
        plugins: monitors alone. The scores stay with the server, and so does the model.
        options: how the server is used.

    Raises:
        InputError: other plug-ins, and what `RemoteServer.dialect` raises.
    """

    rows: list[RemoteRow]

    def __init__(
        self,
        server: RemoteServer,
        job: Job,
        tokenizer: PreTrainedTokenizerBase,
        plugins: Plugins = NO_PLUGINS,
        options: RemoteOptions = RemoteOptions(),
    ) -> None:
        _check_plugins(plugins)
        self.options = options
        super().__init__(cast(Engine, _Elsewhere()), job, tokenizer, plugins)
        self.server, self.dialect = server, server.dialect(tokenizer)
        self.stats = RemoteStats()
        self.repairs_here = self.dialect.tells and not options.logit_bias and options.sampling.repetition_penalty == 1
        self.repairs_here &= (options.repair or ("ask" if job.do_sample else "local")) == "local"
        if options.repair == "local" and not self.repairs_here:
            raise InputError(
                "repair='local' needs token ids from the server, no logit_bias and no penalty; use repair='ask'"
            )
        if options.top and not self.dialect.tells:
            raise InputError("this server tells no token ids, and so no log-probabilities; do not ask for them")
        self.vocabulary = len(tokenizer)
        self.end_id = cast("int | None", tokenizer.eos_token_id)
        self.ends = {*self.eos, *tokenizer.all_special_ids}
        self.asked: dict[Future[Any], RemoteRow] = {}
        self.writers = {row.number: self._writing(row) for row in self.rows}

    # --- from outside --------------------------------------------------------------------------------------

    def steps(self) -> Generator[list[list[int]], None, None]:
        """Ask until every row has ended. Each step yields the new ids of each row that are settled, as soon as an
        answer has come for any of them. A row may be cancelled from another thread, too."""
        if self.started:
            raise InputError("this decode loop has run; make a new one")
        self.started = True
        try:
            for row in self.rows:
                self._pass_on(row, None)
            while self.asked:
                done, _ = wait(self.asked, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda future: self.asked[future].number):
                    row = self.asked.pop(future)
                    if row.cancelled:
                        self.writers[row.number].close()
                    else:
                        self._pass_on(row, future.result())
                yield self._fresh_ids()
        finally:
            for future in self.asked:
                future.cancel()
            for writer in self.writers.values():
                writer.close()

    def cancel(self, row: int) -> None:
        """End a row. It stays as it was yielded, and its request is given up; a row that has ended stays as it is.

        Raises:
            InputError: there is no such row.
        """
        if not 0 <= row < self.batch:
            raise InputError(f"row {row} is not in this generation; give one from 0 to {self.batch - 1}")
        state = self.rows[row]
        if not state.finished:
            state.cancelled = True
            for future, asking in list(self.asked.items()):
                if asking is state:
                    future.cancel()

    def output(self) -> DecodeOutput:
        output = super().output()
        output.events = sorted(self.events, key=lambda event: event.row)
        output.forward_calls, output.tokens_processed = self.stats.requests, self.stats.written
        output.stats = self.stats
        return output

    # --- one row -------------------------------------------------------------------------------------------

    def _fresh_ids(self) -> list[list[int]]:
        fresh, self.fresh = self.fresh, [[] for _ in self.rows]
        return fresh

    def _sequence(self, number: int, prompt: list[int]) -> RemoteRow:
        return RemoteRow(number, prompt, cast(Any, self.tokenizer), self.options.chunk)

    def _pass_on(self, row: RemoteRow, came: Continuation | None) -> None:
        """Hand a row what came for it, and ask for what it needs next."""
        writer = self.writers[row.number]
        try:
            ask = writer.send(came)  # a new writer is sent None
        except StopIteration:
            return
        if row.cancelled:
            writer.close()
            return
        future = ask()
        self.asked[future] = row
        if row.cancelled:  # from another thread, just now
            future.cancel()

    def _next_chunk(self, row: RemoteRow) -> int:
        """How many tokens are asked for next."""
        if row.chunk is not None:
            return row.chunk
        return STREAMED if self._streams(row) else LONG if row.clean >= CALM else SHORT

    def _streams(self, row: RemoteRow) -> bool:
        return self.server.streams and row.streams

    def _writing(self, row: RemoteRow) -> Asking:
        """Write a row to its end."""
        count = self._next_chunk(row)
        while not row.finished:
            request = self._request(row, len(row.ids), min(count, self.limits[row.number] - len(row.ids)))
            changed = yield from self._read(row, request)
            if changed is None:
                if count >= PATIENCE:
                    raise InputError(f"the server wrote nothing {count} tokens long; look at what it says of it itself")
                count *= 2  # text that is not whole yet
                continue
            row.clean = 0 if changed else row.clean + 1
            count = self._next_chunk(row)

    def _read(self, row: RemoteRow, request: Request) -> Asking:
        """Take what comes for a request, until the text was changed: whether it was, or None where nothing came."""
        stream = row.stream = self.server.stream(self.dialect, request, self._streams(row))
        last, changed = None, None
        try:
            while not row.finished and (came := (yield stream.next)) is not None:
                came = self._counted(came, last)
                last = came.ids[-1] if came.ids else last
                if last is not None or came.ended or came.lost:
                    changed = False
                changed = (yield from self._take(row, came)) or changed
                self._emit(row)
                row.streams = row.streams and not came.lost
                if changed or came.lost:
                    break
        finally:
            row.stream = None
            stream.close()
        return changed

    def _request(self, row: RemoteRow, index: int, count: int, level: int = 0) -> Request:
        """Ask for tokens from `index` on; what was lowered there holds for that position, and so for one token."""
        lowered = row.lowered.get(index, {})
        bias = dict(self.options.logit_bias)
        for token, value in lowered.items() if count == 1 else ():
            bias[token] = bias.get(token, 0.0) + value
        seed = self.job.seed
        if seed is not None:
            seed = (row_seed(seed, row.number) + 0x632BE59B * row.requests) % 2**31
        top = TOP if self.repairs_here or (lowered and self.dialect.tells) else self.options.top
        sampling = self.options.sampling.relaxed(level)
        row.requests += 1
        self.stats.requests += 1
        return Request(row.prompt, row.ids[:index], count, sampling, bias, seed, top)

    def _counted(self, came: Continuation, last: int | None = None) -> Continuation:
        """What came after `last`, with the token that ended it if the server does not tell that."""
        ends = came.by_token and (came.ids[-1] if came.ids else last) not in self.ends
        ids = [*came.ids, *([self.end_id] if ends and self.end_id is not None else [])]
        self.stats.written += len(ids)
        return replace(came, ids=ids)

    def _take(self, row: RemoteRow, came: Continuation) -> Asking:
        """Append what came, token by token, until the monitors have something changed."""
        for place, token in enumerate(came.ids):
            if place < len(came.tops) and came.tops[place]:
                row.tops[len(row.ids)] = came.tops[place]
            row.append(token)
            self._write(row, len(row.ids) - 1)
            self._finish(row)
            changed = yield from self._mended(row)
            if changed or row.finished:
                self.stats.wasted += len(came.ids) - place - 1
                return changed
        if came.ended:
            row.finished = True
        return False

    # --- repair --------------------------------------------------------------------------------------------

    def _mended(self, row: RemoteRow) -> Asking:
        """Go back and replace until no monitor objects."""
        changed = False
        while True:
            found = [v for v in (monitor.check(row) for monitor in self.monitors) if v is not None]
            if not found:
                break
            changed |= yield from self._replaced(row, min(found, key=lambda v: v.index))
        row.checked = len(row.text)
        held_tokens(row, self.monitors, row.settled)  # asked while the row is as long as this, to be known later
        return changed

    def _replaced(self, row: RemoteRow, violation: Violation) -> Asking:
        """Do what a violation asks for."""
        index = violation.index
        if violation.force:
            self.stats.wasted += len(row.ids) - index
            self._force(row, violation)
            return True
        level = self._level(row, violation)
        if level is None:
            self._ignore(row, violation, "given up")
            return False
        row.tries[index] = row.tries.get(index, 0) + 1
        lowered = row.lowered.setdefault(index, {})
        for token, factor in violation.factors.items():
            lowered[token] = lowered.get(token, 0.0) + float(torch.tensor(factor).log())
        ids, probabilities = self._chosen_here(row, violation, level) if self.repairs_here else ([], None)
        if not ids:
            if row.stream is not None and not violation.soft:
                row.stream.close()
            request = self._request(row, index, 1, level)
            came = self._counted((yield partial(self.server.complete, self.dialect, request)))
            ids, probabilities = self._chosen_there(row, violation, level, came)
        if violation.soft and self._stays(row, index, ids):
            self._ignore(row, violation, "kept")
            return False
        gone = row.ids[index:]
        self.stats.wasted += len(gone)
        self._take_back(row, index)
        self._log(row, violation, "rewind", gone, probabilities, ids)
        for token in ids:
            row.append(token)
        self._write(row, index)
        if ids:
            self._finish(row)
        else:  # the end, for which there is no token here
            row.finished = True
        return True

    def _chosen_here(self, row: RemoteRow, violation: Violation, level: int) -> tuple[list[int], Tensor | None]:
        """The replacement among the tokens that were told, and their probabilities; nothing if that is not enough."""
        index = violation.index
        scores = self._scores(row, index)
        if scores is None or not bool(torch.isfinite(scores).any()):
            return [], None
        last_told = sorted(row.tops[index].values())[-TOP:][0]
        if self.options.sampling.greedy and float(scores.max()) < last_told:
            return [], None  # a token that was not told may be likelier
        token, probabilities = self.sampler.redraw(row.number, self._row_ids(row), scores, level, violation.invert)
        return [token], probabilities

    def _chosen_there(
        self, row: RemoteRow, violation: Violation, level: int, came: Continuation
    ) -> tuple[list[int], Tensor | None]:
        """The replacement that the server has written, and the probabilities of the tokens that it has told."""
        index = violation.index
        if any(came.tops):
            row.tops[index] = {**row.tops.get(index, {}), **came.tops[0]}
        if came.ids and row.lowered[index].get(came.ids[0]) == -torch.inf:
            raise InputError(
                f"the server writes the token {came.ids[0]} although logit_bias bans it; use one that knows logit_bias"
            )
        scores = self._scores(row, index)
        if violation.invert and not self.options.sampling.greedy:
            if scores is None:
                raise InputError("invert_probs needs log-probabilities, which this server does not tell; leave it out")
            token, probabilities = self.sampler.redraw(row.number, self._row_ids(row), scores, level, True)
            return [token], probabilities
        if scores is None:
            return came.ids, None
        return came.ids, self.sampler.warp(self._row_ids(row), scores[None], level)[0].softmax(-1)

    def _stays(self, row: RemoteRow, index: int, ids: list[int]) -> bool:
        """Whether the model keeps the token at `index`, although it was lowered."""
        scores = self._scores(row, index)
        if self.options.sampling.greedy or scores is None:
            return self.options.sampling.greedy and ids[:1] == [row.ids[index]]
        return int(scores.argmax()) == row.ids[index]

    def _scores(self, row: RemoteRow, index: int) -> Tensor | None:
        """The scores (vocabulary,) of the tokens that were told at a position, after what was lowered; others have
        -inf. None where nothing was told."""
        tops, lowered = row.tops.get(index), row.lowered.get(index, {})
        if not tops:
            return None
        scores = torch.full((max(self.vocabulary, *(token + 1 for token in (*tops, *lowered))),), -torch.inf)
        scores[list(tops)] = torch.tensor(list(tops.values()))
        for change in (self.options.logit_bias, lowered):
            for token, value in change.items():
                scores[token] += value
        return scores


class _Elsewhere:
    """What stands in the place of an engine: nothing is computed here."""

    calls = tokens_processed = 0
    cache = None


def _check_plugins(plugins: Plugins) -> None:
    further = [f.name for f in fields(Plugins) if f.name != "monitors" and getattr(plugins, f.name)]
    if further:
        raise InputError(
            f"{further[0]} cannot act here, where the model and its scores are another server's; give monitors alone"
        )
