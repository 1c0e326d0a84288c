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
* streamers: one `transformers` streamer per row, fed only with tokens that no rewind can remove.

A rewind costs no forward pass: the scores of every position that may be taken back are kept, the rejected token
is lowered or banned there, and the replacement is drawn before the next forward. One draw per accepted token, so
that plug-ins that do nothing give exactly the tokens of `model.generate` at the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ...core.errors import InputError
from ...models.batch import left_padded
from ...text.token_text import special_tokens
from ...text.words import listed
from .engine import Engine
from .monitor import Monitor, RewindEvent, Violation, held_tokens
from .sampler import Sampler, of_row
from .sequence import SequenceState

__all__ = ["DecodeLoop", "DecodeOutput"]

CANDIDATES = 20  # alternatives recorded with every rewind
FULL_ROWS = 32  # newest positions whose scores are kept whole when a monitor may rewind without bound
COMPACT_ROW = 1024  # best scores kept of older positions in that case


@dataclass
class DecodeOutput(ModelOutput):
    """Result of the loop. `sequences` (batch, prompt + new) is padded on the right as `generate` pads; `new_ids` and
    `prompt_ids` are the same without any padding, a list per row. `stop_reasons` says why each row ended: "finished" by
    itself or a stop string, "budget" after as many tokens as were asked for, or "context": the model has no more
    positions."""

    sequences: Tensor | None = None
    new_ids: list[list[int]] | None = None
    prompt_ids: list[list[int]] | None = None
    texts: list[str] | None = None
    events: list[RewindEvent] | None = None
    forward_calls: int | None = None
    tokens_processed: int | None = None
    past_key_values: Any | None = None
    stop_reasons: list[str] | None = None

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Preference data from the rewinds: context, the rejected token with the text that went with it, and the
        candidates at its place.

        A soft ban may draw the rejected token again; that is no preference and left out.
        """
        return [
            {
                "context_ids": e.context_ids,
                "rejected": e.rejected[0],
                "rejected_text": e.rejected_text,
                "chosen": e.replacement[0],
                "candidates": e.candidates,
                "rule": e.rule,
            }
            for e in self.events or []
            if e.kind == "rewind" and e.rejected and e.replacement and e.rejected[0] != e.replacement[0]
        ]


class DecodeLoop:
    """See the module docstring. Most callers want `tokenry.generate` or `custom_generate=tokenry.decode.loop`.

    Args:
        engine: anything with the methods of `Engine`.
        tokenizer: needed as soon as there are monitors, streamers or stop strings.
        processors: change the scores that are stored; `warpers` (temperature, top-k, ...) only the draw, and
            `final_processors` what the warpers have left.
        streamers: one per row.
        seed: None uses torch's global generator exactly as `generate` does.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        warpers: Sequence[LogitsProcessor] = (),
        final_processors: Sequence[LogitsProcessor] = (),
        monitors: Sequence[Monitor] = (),
        interventions: Sequence[AbstractContextManager] = (),
        streamers: Sequence[BaseStreamer] = (),
        do_sample: bool = False,
        seed: int | None = None,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.processors, self.warpers, self.final_processors = list(processors), list(warpers), list(final_processors)
        self.monitors, self.interventions, self.streamers = list(monitors), list(interventions), list(streamers)
        self.do_sample, self.seed = do_sample, seed
        if tokenizer is None and self.monitors:
            raise InputError("monitors read text; pass processing_class=tokenizer")

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        budgets: Sequence[int] | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        stop: str | Sequence[str] = (),
        stopping_criteria: Sequence[Callable] = (),
    ) -> DecodeOutput:
        """Continue `input_ids` (batch, prompt), padding where `attention_mask` is 0; its last column has none.

        `budgets` (batch,) are limits of single rows below `max_new_tokens`. `stop` are texts, or special tokens, that
        end a row.
        """
        self._prepare(input_ids, attention_mask, max_new_tokens, budgets, eos_ids, stop, stopping_criteria)
        if self.streamers:
            for streamer, prompt in zip(self.streamers, input_ids):
                streamer.put(prompt[None].cpu())
        with ExitStack() as stack:
            for intervention in self.interventions:
                stack.enter_context(intervention)
            for processor in self.processors:
                if hasattr(processor, "begin"):
                    processor.begin(self.prompt_length)
                if hasattr(processor, "end"):
                    stack.callback(processor.end)
            for cap in self.final_processors:
                if hasattr(cap, "begin"):
                    whole = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                    cap.begin(self.prompt_length, whole)
                if hasattr(cap, "end"):
                    stack.callback(cap.end)
            self._run(input_ids, attention_mask)
        for streamer in self.streamers:
            streamer.end()
        return self._output(input_ids, pad_id)

    def _run(self, block: Tensor, mask: Tensor | None) -> None:
        """Step until every row has ended."""
        self._step(block, mask)
        while self.active:
            self._step(*self._next_block())

    # --- one step ------------------------------------------------------------------------------------------

    def _step(self, block: Tensor, mask: Tensor | None) -> None:
        """Feed, choose, repair and emit."""
        logits = self.engine.forward(block, mask)
        for row in self.rows:
            row.fed = len(row.ids)
        self._choose(logits)
        for row in self.rows:
            if row.number in self.active:
                self._repair(row)
                self._emit(row)
        self.active = {row.number for row in self.rows if not row.finished}

    def _prepare(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        limit: int,
        budgets: Sequence[int] | None,
        eos_ids: Sequence[int],
        stop: str | Sequence[str],
        criteria: Sequence[Callable],
    ) -> None:
        batch, self.prompt_length = input_ids.shape
        if self.prompt_length == 0:
            raise InputError("the prompt is empty; give at least one token")
        if limit <= 0:
            raise InputError(f"max_new_tokens={limit} leaves nothing to generate; give a number >= 1")
        if self.streamers and len(self.streamers) != batch:
            raise InputError(f"{len(self.streamers)} streamers for {batch} rows; give one streamer per row")
        stop, stop_ids = self._stops(stop)
        if budgets is not None and (len(budgets) != batch or min(budgets) < 1):
            raise InputError(f"budgets={list(budgets)} is not allowed for {batch} rows; give a number >= 1 for each")
        self.limits = [min(limit, budget) for budget in budgets or [limit] * batch]
        self.eos, self.stop, self.criteria = {*eos_ids, *stop_ids}, stop, list(criteria)
        self.batch, self.device = batch, input_ids.device
        self.ids = torch.zeros(batch, self.prompt_length + limit + 64, dtype=torch.long, device=self.device)
        self.ids[:, : self.prompt_length] = input_ids
        needs_text = self.monitors or self.stop
        prompts = input_ids.tolist()
        masks = mask.tolist() if mask is not None else [[1] * self.prompt_length] * batch
        live = [[t for t, m in zip(p, k) if m] for p, k in zip(prompts, masks)]
        self.rows = [SequenceState(b, live[b], self.tokenizer if needs_text else None) for b in range(batch)]
        for monitor in self.monitors:
            if hasattr(monitor, "begin"):
                monitor.begin(self.tokenizer)
        for monitor in self.monitors if self.streamers else ():
            if monitor.hold(self.rows[0]) is None:
                name = type(monitor).__name__
                raise InputError(f"{name} may go back without bound, so nothing can be streamed; set max_span")
        self.active = set(range(batch))
        self.events: list[RewindEvent] = []
        self.sampler = Sampler(self.warpers, self.do_sample, self.seed, batch, self.device, self.final_processors)

    def _stops(self, stop: str | Sequence[str]) -> tuple[list[str], list[int]]:
        """Stop strings, and the ids of those that are special tokens: the text does not have them."""
        stop = listed(stop, "stop string")
        if not all(stop):
            raise InputError("an empty stop string would end every row at once; remove it")
        if stop and self.tokenizer is None:
            raise InputError("stop strings read text; pass processing_class=tokenizer")
        special = special_tokens(self.tokenizer) if stop else {}
        texts = [text for text in stop if text not in special]
        for text, token in ((text, token) for text in texts for token in special if token in text):
            raise InputError(f"the stop string {text!r} holds the special token {token!r}; give {token!r} alone")
        return texts, [special[text] for text in stop if text in special]

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
                    self._accept(row, picked[row.number], scores[row.number])
            return
        for row in self.rows:
            if row.number in self.active:
                scores = self._score(row, logits[row.number])
                token, _ = self.sampler.redraw(row.number, self._row_ids(row), scores, 0, False)
                self._accept(row, token, scores)
                self._write(row, len(row.ids) - 1)

    def _accept(self, row: SequenceState, token: int, scores: Tensor) -> None:
        if self.monitors:
            row.scores[len(row.ids)] = scores
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
        tries = row.tries.get(index, 0)
        level = min(tries // violation.retries, 4) if violation.relax else 0
        inside_forced = any(start <= index < stop for start, stop, _ in row.forced)
        too_often = tries >= violation.retries * (5 if violation.relax else 1)
        scores = None if inside_forced or too_often else self._lowered(row, violation)
        if scores is None:
            row.ignored.add((index, violation.rule))
            self._log(row, violation, "given up", [], None)
            return
        row.scores[index], row.tries[index] = scores, tries + 1
        rejected = row.ids[index]
        soft = violation.factors and min(violation.factors.values()) > 0
        if soft and int(scores.argmax()) == rejected:
            row.ignored.add((index, violation.rule))
            self._log(row, violation, "kept", [], None)
            return
        gone = row.ids[index:]
        self._take_back(row, index)
        token, probabilities = self.sampler.redraw(row.number, self._row_ids(row), scores, level, violation.invert)
        self._log(row, violation, "rewind", gone, probabilities, [token])
        row.append(token)
        self._write(row, index)
        self._finish(row)

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
        text = self.tokenizer.decode(gone) if gone else ""
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

    # --- output --------------------------------------------------------------------------------------------

    def _emit(self, row: SequenceState) -> None:
        """Stream what no rewind can remove any more, and forget the scores that kept it removable."""
        settled = len(row.ids) - (0 if row.finished else held_tokens(row, self.monitors, row.settled))
        for index in range(row.emitted, settled):
            row.scores.pop(index, None)
            if self.streamers:
                self.streamers[row.number].put(torch.tensor([row.ids[index]]))
        self._shrink_old_scores(row)
        row.emitted = max(row.emitted, settled)

    def _shrink_old_scores(self, row: SequenceState) -> None:
        old = len(row.ids) - FULL_ROWS - 1
        stored = row.scores.get(old)
        if isinstance(stored, Tensor) and stored.numel() > COMPACT_ROW:
            self.vocabulary = stored.numel()
            row.scores[old] = tuple(stored.topk(COMPACT_ROW))

    def _next_block(self) -> tuple[Tensor, Tensor | None]:
        """The tokens that were not fed yet, right-aligned; finished rows are padding."""
        pending = [row.ids[row.fed :] if row.number in self.active else [] for row in self.rows]
        if {len(new) for new in pending} == {1}:
            return torch.tensor(pending, device=self.device), None
        return left_padded(pending, self.device)

    def _output(self, input_ids: Tensor, pad_id: int | None) -> DecodeOutput:
        width = max(len(row.ids) for row in self.rows)
        sequences = input_ids.new_full((self.batch, self.prompt_length + width), 0 if pad_id is None else pad_id)
        sequences[:, : self.prompt_length] = input_ids
        for row in self.rows:
            new = torch.tensor(row.ids, dtype=torch.long, device=self.device)
            sequences[row.number, self.prompt_length : self.prompt_length + len(row.ids)] = new
        texts = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(row.ids, skip_special_tokens=True) for row in self.rows]
        return DecodeOutput(
            sequences=sequences,
            new_ids=[row.ids for row in self.rows],
            prompt_ids=[row.prompt for row in self.rows],
            texts=texts,
            events=self.events,
            forward_calls=self.engine.calls,
            tokens_processed=self.engine.tokens_processed,
            past_key_values=getattr(self.engine, "cache", None),
        )
