"""The one decode loop: prefill, steps, and the repair of what monitors reject.

Plug-ins do not know of each other:

* processors: `LogitsProcessor(input_ids, scores)`, pure in the row's ids; `begin(prompt_length)` and `end()` are
  called around a generation where a processor has them;
* final_processors: logits processors that act last, on what the warpers have left, and so on the very distribution that
  is drawn from; their `begin` also gets the attention mask (batch, prompt). A rewind asks them again for the shorter
  row;
* monitors: `check(row) -> Violation | None` and `hold(row) -> tokens from the earliest place where a problem may have
  begun, None = all`, which depends on the row's tokens alone; `begin(tokenizer)` is called before a generation where
  a monitor has it;
* a layer policy and interventions (context managers), which act inside the engine's forward;
* whoever takes the steps, streamers among them: they see only tokens that no rewind can remove.

A rewind costs no forward pass: the scores of every position that may be taken back are kept, the rejected token
is lowered or banned there, and the replacement is drawn before the next forward. One draw per accepted token, so
that plug-ins that do nothing give exactly the tokens of `model.generate` at the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ...core.errors import InputError
from ...models.batch import left_padded
from ...text.token_text import special_tokens
from ...text.words import listed
from .engine import Engine
from .job import Job
from .logprobs import KnownLogprobs, Ranked
from .monitor import ReadsText, RewindEvent, Violation, held_tokens
from .output import DecodeOutput
from .plugins import NO_PLUGINS, BeginsLast, BeginsWithPrompt, Ends, Plugins
from .sampler import Sampler, of_row
from .sequence import SequenceState

__all__ = ["DecodeLoop"]

CANDIDATES = 20  # alternatives recorded with every rewind
FULL_ROWS = 32  # newest positions whose scores are kept whole when a monitor may rewind without bound
COMPACT_ROW = 1024  # best scores kept of older positions in that case


class DecodeLoop:
    """One generation, step by step. Most callers want `tokenry.generate` or `custom_generate=tokenry.decode.loop`.

    `generate` runs it to the end. Who wants to look in between, to stop in time or to give up a row takes the steps:

        loop = DecodeLoop(engine, job, tokenizer, plugins)
        deadline = time.monotonic() + 5
        for settled in loop.steps():
            if time.monotonic() > deadline:
                loop.cancel(0)
        output = loop.output()

    Who feeds the model in another way asks for each block, and hands its logits in:

        with loop.running():
            while loop.active:
                settled = loop.receive(feed(*loop.pending()))

    Attributes:
        active: the rows that have not ended.
        chunk: how many columns of the prompts are read in one step; None: all. Steps before the last of these settle
            nothing. Not for loops that draft.
        ranked: for each row one `Ranked` for each settled token, if the job wants log-probabilities.

    Args:
        engine: anything with the methods of `Engine`; a new one for every loop, as it holds what was fed.
        job: the prompts, how tokens are drawn, when rows end.
        tokenizer: needed as soon as there are monitors or stop strings.
    """

    def __init__(
        self,
        engine: Engine,
        job: Job,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Plugins = NO_PLUGINS,
    ) -> None:
        if tokenizer is None and plugins.monitors:
            raise InputError("monitors read text; pass processing_class=tokenizer")
        self.engine, self.job, self.tokenizer, self.plugins = engine, job, tokenizer, plugins
        self.processors: list[Callable[..., Tensor]] = list(plugins.processors)
        self.monitors = list(plugins.monitors)
        self.do_sample, self.limits, self.criteria = job.do_sample, job.limits, list(job.stopping_criteria)
        self.stop, stop_ids = self._stops(job.stop)
        self.eos = {*job.eos_ids, *stop_ids}
        ids = job.input_ids
        self.batch, self.prompt_length, self.device = *ids.shape, ids.device
        self.ids = ids.new_zeros(self.batch, self.prompt_length + job.max_new_tokens + 64, dtype=torch.long)
        self.ids[:, : self.prompt_length] = ids
        self.rows = [self._sequence(row, prompt) for row, prompt in enumerate(_without_padding(job))]
        self.active = set(range(self.batch))
        self.started = False  # it runs, or has run
        self.prefilled = False  # the prompts are read
        self.chunk: int | None = None
        self.unread = job.input_ids.shape[1]  # columns of the prompts
        self.fresh: list[list[int]] = [[] for _ in self.rows]  # what has settled in this step
        self.ranked: list[list[Ranked]] = [[] for _ in self.rows]
        self.events: list[RewindEvent] = []
        self.finish: Callable[[DecodeOutput], DecodeOutput] | None = None  # what a plan adds to the output
        self.sampler = Sampler(job.warpers, job.do_sample, job.seed, self.batch, self.device, plugins.final_processors)
        for monitor in self.monitors:
            if isinstance(monitor, ReadsText):
                monitor.begin(cast(PreTrainedTokenizerBase, tokenizer))

    # --- from outside --------------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self) -> Generator[list[list[int]], None, None]:
        """Step until every row has ended. Each step yields the new ids of each row that are settled: no rewind can
        remove them any more. Together they are the row's `new_ids`.

        Interventions and processors are in force until the last step, or until the generator is closed.
        """
        with self.running():
            while self.active:
                self._advance() if self.prefilled else self._prefill()
                yield self._settled()

    @contextmanager
    def running(self) -> Iterator[None]:
        """For the time of the block, interventions and processors are in force. Possible once."""
        if self.started:
            raise InputError("this decode loop has run, and its engine holds what was fed; make new ones")
        self.started = True
        with ExitStack() as stack:
            self._enter(stack)
            yield

    def pending(self) -> tuple[Tensor, Tensor | None]:
        """What is to be fed next: a block (batch, k), and where it has tokens (None: everywhere). The first one is the
        prompts, or a chunk of them."""
        if self.prefilled:
            return self._next_block()
        start = self.prompt_length - self.unread
        columns = slice(start, None if self.chunk is None else start + self.chunk)
        mask = self.job.attention_mask
        return self.job.input_ids[:, columns], None if mask is None else mask[:, columns]

    @torch.no_grad()
    def receive(self, logits: Tensor) -> list[list[int]]:
        """Go on from the float32 logits (batch, vocabulary) after what was pending; returns what has settled, as
        `steps` does."""
        self._go_on(logits)
        return self._settled()

    def cancel(self, row: int) -> None:
        """End a row between two steps. It stays as it was yielded, its part of the cache is given back, and the other
        rows go on as if nothing had happened. A row that has ended stays as it is.

        Raises:
            InputError: there is no such row.
        """
        if not 0 <= row < self.batch:
            raise InputError(f"row {row} is not in this generation; give one from 0 to {self.batch - 1}")
        state = self.rows[row]
        if state.finished:
            return
        state.truncate(state.emitted)
        state.cancelled = state.finished = True
        self.active.discard(row)
        if self.prefilled:
            self._free(state)

    def generate(self, streamers: Sequence[BaseStreamer] = ()) -> DecodeOutput:
        """Run to the end. `streamers`, one per row, get the prompt, and every token as soon as it is settled."""
        self._check_streamers(streamers)
        for streamer, prompt in zip(streamers, self.job.input_ids):
            streamer.put(prompt[None].cpu())
        with closing(self.steps()) as steps:
            for settled in steps:
                for streamer, tokens in zip(streamers, settled):
                    for token in tokens:
                        streamer.put(torch.tensor([token]))
        for streamer in streamers:
            streamer.end()
        return self.output()

    def output(self) -> DecodeOutput:
        """What was written so far; rows that have not ended count as cancelled, with what is settled of them."""
        written = self._written()
        return written if self.finish is None else self.finish(written)

    # --- beginning and end ---------------------------------------------------------------------------------

    def _written(self) -> DecodeOutput:
        rows = [row.ids if row.finished else row.ids[: row.emitted] for row in self.rows]
        sequences = self.job.input_ids.new_full(
            (self.batch, self.prompt_length + max(map(len, rows))), self.job.pad_id or 0
        )
        sequences[:, : self.prompt_length] = self.job.input_ids
        for number, ids in enumerate(rows):
            new = torch.tensor(ids, dtype=torch.long, device=self.device)
            sequences[number, self.prompt_length : self.prompt_length + len(ids)] = new
        texts: Any = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
        return DecodeOutput(
            sequences=sequences,
            new_ids=rows,
            prompt_ids=[row.prompt for row in self.rows],
            texts=texts,
            events=self.events,
            forward_calls=self.engine.calls,
            tokens_processed=self.engine.tokens_processed,
            past_key_values=self.engine.cache,
            stop_reasons=[self._stop_reason(row) for row in self.rows],
            logprobs=None if self.job.logprobs is None else self.ranked,
        )

    def _sequence(self, number: int, prompt: list[int]) -> SequenceState:
        return SequenceState(number, prompt, self.tokenizer if self.monitors or self.stop else None)

    def _enter(self, stack: ExitStack) -> None:
        """Enter the interventions, and tell processors that it begins; the stack undoes it."""
        for intervention in self.plugins.interventions:
            stack.enter_context(intervention)
        for processor in self.processors:
            if isinstance(processor, BeginsWithPrompt):
                processor.begin(self.prompt_length)
            if isinstance(processor, Ends):
                stack.callback(processor.end)
        for processor in self.plugins.final_processors:
            if isinstance(processor, BeginsLast):
                mask = self.job.attention_mask
                processor.begin(self.prompt_length, torch.ones_like(self.job.input_ids) if mask is None else mask)
            if isinstance(processor, Ends):
                stack.callback(processor.end)

    def _check_streamers(self, streamers: Sequence[BaseStreamer]) -> None:
        if streamers and len(streamers) != self.batch:
            raise InputError(f"{len(streamers)} streamers for {self.batch} rows; give one streamer per row")
        for monitor in self.monitors if streamers else ():
            if monitor.hold(self.rows[0]) is None:
                name = type(monitor).__name__
                raise InputError(f"{name} may go back without bound, so nothing can be streamed; set max_span")

    def _stop_reason(self, row: SequenceState) -> str:
        if row.cancelled or not row.finished:
            return "cancelled"
        wanted, limit = self.job.wanted[row.number], self.limits[row.number]
        if len(row.ids) < limit or row.ids[-1] in self.job.eos_ids:
            return "finished"
        return "context" if limit < wanted else "budget"

    def _free(self, row: SequenceState) -> None:
        """Give back what is held for a row that was cancelled."""
        self.engine.free(row.number)

    def _stops(self, stop: str | Sequence[str]) -> tuple[list[str], list[int]]:
        """Stop strings, and the ids of those that are special tokens: the text does not have them."""
        stop = listed(stop, "stop string")
        if not all(stop):
            raise InputError("an empty stop string would end every row at once; remove it")
        if stop and self.tokenizer is None:
            raise InputError("stop strings read text; pass processing_class=tokenizer")
        special = special_tokens(self.tokenizer) if stop and self.tokenizer is not None else {}
        texts = [text for text in stop if text not in special]
        for text, token in ((text, token) for text in texts for token in special if token in text):
            raise InputError(f"the stop string {text!r} holds the special token {token!r}; give {token!r} alone")
        return texts, [special[text] for text in stop if text in special]

    # --- one step ------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """The first step, which reads the prompts."""
        self._feed_pending()

    def _advance(self) -> None:
        """Another step."""
        self._feed_pending()

    def _feed_pending(self) -> None:
        self._go_on(self.engine.forward(*self.pending()))

    def _go_on(self, logits: Tensor) -> None:
        """Choose, repair and emit after what was fed."""
        if self.chunk is not None and self.unread > self.chunk:
            return
        for row in self.rows:
            row.fed = len(row.ids)
        self._choose(logits)
        for row in self.rows:
            if row.number in self.active:
                self._repair(row)
                self._emit(row)
        self.active = {row.number for row in self.rows if not row.finished}

    def _settled(self) -> list[list[int]]:
        """What has settled in a step that ends here."""
        if not self.prefilled:
            self.unread -= min(self.unread, self.chunk or self.unread)
            self.prefilled = self.unread == 0
            for row in self.rows:
                if row.cancelled and self.prefilled:
                    self._free(row)
        fresh, self.fresh = self.fresh, [[] for _ in self.rows]
        return fresh

    def _choose(self, logits: Tensor) -> None:
        """Score and draw for every row at once, or one by one after rewinds have left rows of unequal length."""
        lengths = {len(self.rows[b].ids) for b in self.active}
        if len(lengths) == 1:
            width = self.prompt_length + lengths.pop()
            ids = self.ids[:, :width]
            scores = logits
            for processor in self.processors:
                scores = processor(ids, scores)
            tokens = self.sampler.draw(self.sampler.warp(ids, scores))
            self._extend_ids(width, tokens)
            picked = tokens.tolist()
            for row in self.rows:
                if row.number in self.active:
                    self._accept(row, picked[row.number], scores[row.number], logits[row.number])
            return
        for row in self.rows:
            if row.number in self.active:
                scores = self._score(row, logits[row.number])
                token, _ = self.sampler.redraw(row.number, self._row_ids(row), scores, 0, False)
                self._accept(row, token, scores, logits[row.number])
                self._write(row, len(row.ids) - 1)

    def _accept(self, row: SequenceState, token: int, scores: Tensor, logits: Tensor) -> None:
        if self.monitors:
            row.scores[len(row.ids)] = scores
        if self.job.logprobs is not None:
            row.known[len(row.ids)] = KnownLogprobs(logits, self.job.logprobs)
        row.append(token)
        self._finish(row)

    def _finish(self, row: SequenceState) -> None:
        row.finished = (
            row.ids[-1] in self.eos
            or len(row.ids) >= self.limits[row.number]
            or any(row.text.find(s, max(0, row.starts[-1] - len(s))) >= 0 for s in self.stop)
            or any(bool(criterion(self._row_ids(row), None)[0]) for criterion in self.criteria)
        )

    def _score(self, row: SequenceState, logits: Tensor) -> Tensor:
        return self._processed(row, self._row_ids(row), logits[None])[0]

    def _processed(self, row: SequenceState, ids: Tensor, scores: Tensor) -> Tensor:
        """What the processors make of the scores (1, vocabulary) after `ids` (1, columns) of one row."""
        for processor in self.processors:
            scores = of_row(processor, row.number, self.batch)(ids, scores)
        return scores

    def _extend_ids(self, column: int, tokens: Tensor) -> None:
        if column < self.ids.shape[1]:
            self.ids[:, column] = tokens

    def _row_ids(self, row: SequenceState) -> Tensor:
        return self.ids[row.number : row.number + 1, : self.prompt_length + len(row.ids)]

    def _write(self, row: SequenceState, start: int) -> None:
        first = self.prompt_length + start
        new = torch.tensor(row.ids[start:], dtype=torch.long, device=self.device)
        if first + len(new) > self.ids.shape[1]:
            self.ids = torch.nn.functional.pad(self.ids, (0, len(new) + 64))
        self.ids[row.number, first : first + len(new)] = new

    # --- repair --------------------------------------------------------------------------------------------

    def _repair(self, row: SequenceState) -> None:
        """Rewind and redraw until no monitor objects. Costs no forward pass."""
        while self.monitors:
            found = [v for v in (monitor.check(row) for monitor in self.monitors) if v is not None]
            if not found:
                break
            self._apply(row, min(found, key=lambda v: v.index))
        row.checked = len(row.text)
        held_tokens(row, self.monitors, row.settled)  # asked while the row is as long as this, to be known later

    def _apply(self, row: SequenceState, violation: Violation) -> None:
        index = violation.index
        if violation.force:
            self._force(row, violation)
            return
        level = self._level(row, violation)
        scores = None if level is None else self._lowered(row, violation)
        if level is None or scores is None:
            self._ignore(row, violation, "given up")
            return
        row.scores[index], row.tries[index] = scores, row.tries.get(index, 0) + 1
        if violation.soft and int(scores.argmax()) == row.ids[index]:
            self._ignore(row, violation, "kept")
            return
        gone = row.ids[index:]
        self._take_back(row, index)
        token, probabilities = self.sampler.redraw(row.number, self._row_ids(row), scores, level, violation.invert)
        self._log(row, violation, "rewind", gone, probabilities, [token])
        row.append(token)
        self._write(row, index)
        self._finish(row)

    def _level(self, row: SequenceState, violation: Violation) -> int | None:
        """How many warpers the replacement goes without; None if the violation is given up."""
        index, tries = violation.index, row.tries.get(violation.index, 0)
        inside_forced = any(start <= index < stop for start, stop, _ in row.forced)
        too_often = tries >= violation.retries * (5 if violation.relax else 1)
        if inside_forced or too_often:
            return None
        return min(tries // violation.retries, 4) if violation.relax else 0

    def _ignore(self, row: SequenceState, violation: Violation, kind: str) -> None:
        """Leave the text as it is, and do not look at this rule there again."""
        row.ignored.add((violation.index, violation.rule))
        self._log(row, violation, kind, [], None)

    def _lowered(self, row: SequenceState, violation: Violation) -> Tensor | None:
        """The stored scores at the violation with its factors applied; None if nothing would be left to choose."""
        stored = row.scores.get(violation.index)
        if stored is None:
            return None
        if isinstance(stored, tuple):  # an old row of which only the best scores were kept
            values, tokens = stored
            whole = values.new_full((self.vocabulary,), -torch.inf)
            stored = whole.scatter(0, tokens, values)
        scores = stored.clone()
        tokens = torch.tensor(list(violation.factors), device=scores.device)
        logs = torch.tensor(list(violation.factors.values()), dtype=scores.dtype, device=scores.device).log()
        scores[tokens] += logs
        return scores if bool(torch.isfinite(scores).any()) else None

    def _force(self, row: SequenceState, violation: Violation) -> None:
        gone = row.ids[violation.index :]
        if gone:
            self._take_back(row, violation.index)
        force = list(violation.force)[: max(self.limits[row.number] - violation.index, 0)]
        self._log(row, violation, "rewind", gone, None, force)
        for token in force:
            row.append(token)
        row.forced.append((violation.index, len(row.ids), violation.rule))
        self._write(row, violation.index)
        self._finish(row)

    def _take_back(self, row: SequenceState, index: int) -> None:
        if row.fed > index:
            self.engine.rollback(row.number, row.fed - index)
            row.fed = index
        row.truncate(index)
        row.checked = len(row.text)

    def _log(
        self,
        row: SequenceState,
        violation: Violation,
        kind: str,
        gone: list[int],
        probabilities: Tensor | None,
        replacement: Sequence[int] = (),
    ) -> None:
        candidates: list[tuple[int, float]] = []
        if probabilities is not None:
            best = probabilities.topk(min(CANDIDATES, probabilities.numel()))
            candidates = [(t, p) for t, p in zip(best.indices.tolist(), best.values.tolist()) if p > 0]
        text = cast(Any, self.tokenizer).decode(gone) if gone else ""
        context = row.prompt + row.ids[: violation.index]
        self.events.append(
            RewindEvent(
                row.number,
                violation.index,
                kind,
                violation.rule,
                gone,
                text,
                list(replacement),
                candidates,
                context,
            )
        )

    # --- what is settled -----------------------------------------------------------------------------------

    def _emit(self, row: SequenceState) -> None:
        """Note what no rewind can remove any more, and forget the scores that kept it removable."""
        settled = len(row.ids) - (0 if row.finished else held_tokens(row, self.monitors, row.settled))
        for index in range(row.emitted, settled):
            row.scores.pop(index, None)
            if self.job.logprobs is not None:
                self.ranked[row.number].append(Ranked.of(row.ids[index], row.known.pop(index, None)))
        self.fresh[row.number] += row.ids[row.emitted : settled]
        self._shrink_old_scores(row)
        row.emitted = max(row.emitted, settled)

    def _shrink_old_scores(self, row: SequenceState) -> None:
        old = len(row.ids) - FULL_ROWS - 1
        stored = row.scores.get(old)
        if isinstance(stored, Tensor) and stored.numel() > COMPACT_ROW:
            self.vocabulary = stored.numel()
            best = stored.topk(COMPACT_ROW)
            row.scores[old] = best.values, best.indices
            if old in row.known:
                row.known[old].keep([*best.indices.tolist(), row.ids[old]])

    def _next_block(self) -> tuple[Tensor, Tensor | None]:
        """The tokens that were not fed yet, right-aligned; finished rows are padding."""
        pending = [row.ids[row.fed :] if row.number in self.active else [] for row in self.rows]
        if {len(new) for new in pending} == {1}:
            return torch.tensor(pending, device=self.device), None
        return left_padded(pending, self.device)


def _without_padding(job: Job) -> list[list[int]]:
    """The ids of each prompt."""
    prompts = job.input_ids.tolist()
    if job.attention_mask is None:
        return prompts
    return [[t for t, m in zip(ids, mask) if m] for ids, mask in zip(prompts, job.attention_mask.tolist())]
