"""Budget forcing of s1: ignore the end of thinking a few times, or close thinking at a limit.

Paper: s1: Simple test-time scaling, arXiv 2501.19393. A baseline of CyclicReflex.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Times, TokenId, Tokens, read_ids, read_none, require
from .contract import LogitsMethod, MonitorMethod
from .generation.continuation import ContinuationLogitsProcessor
from .generation.monitor import Violation
from .generation.sequence import SequenceState
from .reasoning.bias import checked_ids
from .reasoning.reflection import end_think_ids

__all__ = ["BudgetForcing", "BudgetForcingLogitsProcessor", "BudgetForcingMonitor"]

Limit = Annotated[Tokens | None, BeforeValidator(read_none)]


class BudgetForcing(MonitorMethod, LogitsMethod):
    """Budget forcing: ignore the end of thinking a few times, or close thinking at a limit.

    Where nothing can be taken back it is a logits processor, see `BudgetForcingLogitsProcessor`:
    `model.generate(**inputs, logits_processor=[BudgetForcing().processor(tokenizer)])`.
    """

    slug: ClassVar[str] = "budget-forcing"
    title: ClassVar[str] = "Budget forcing (s1)"
    paper: ClassVar[str] = "s1: Simple test-time scaling, arXiv 2501.19393"
    claim: ClassVar[str] = "Longer thinking, forced by 'Wait', solves more problems; a limit keeps the length in hand."

    end_think: Annotated[str | tuple[TokenId, ...], BeforeValidator(read_ids)] = Field(
        default="</think>", description="mark that ends thinking: text, or token ids"
    )
    min_ignores: Times = Field(default=1, description="how often the end of thinking is ignored")
    ignore_text: str = Field(default="Wait", description="what stands in place of an ignored end")
    max_thinking_tokens: Limit = Field(default=None, description="tokens of thinking after which it is closed, or none")
    close_text: str = Field(default="</think>\nFinal Answer:", description="what closes it")

    def monitors(self, tokenizer: PreTrainedTokenizerBase) -> list[BudgetForcingMonitor]:
        idle = self.min_ignores == 0 and self.max_thinking_tokens is None
        return [] if idle else [self._monitor(tokenizer)]

    def processor(
        self, tokenizer: PreTrainedTokenizerBase | None = None, prompt_length: int | None = None
    ) -> BudgetForcingLogitsProcessor:
        if tokenizer is None:
            raise InputError(f"{self.slug} puts texts into the answer; write BudgetForcing(...).processor(tokenizer)")
        return BudgetForcingLogitsProcessor(self._monitor(tokenizer), tokenizer, prompt_length)

    def _monitor(self, tokenizer: PreTrainedTokenizerBase) -> BudgetForcingMonitor:
        end_ids = cast(Sequence[int], end_think_ids(tokenizer, self.end_think))  # of an end there is
        return BudgetForcingMonitor(
            end_ids, tokenizer, self.min_ignores, self.ignore_text, self.max_thinking_tokens, self.close_text
        )


IGNORED, AGAIN, CLOSED = "budget:ignore", "budget:again", "budget:close"  # rules of the monitor


class BudgetForcingMonitor:
    """Budget forcing of s1 (arXiv 2501.19393) as a monitor of the decode loop: its state is the row itself.

    The end of thinking is ignored `min_ignores` times: the mark is taken back, `ignore_text` put there instead, and at
    least one new token must follow before the mark may come again. When thinking has lasted `max_thinking_tokens`
    tokens, ignored text included, `close_text` is appended, on a new line if the limit cut one in the middle. The end
    is not ignored any more when there is no room for the text and one new token below that limit.

    Args:
        end_ids: the token ids that together end thinking; may be the end-of-text token.
        max_thinking_tokens: None for no limit. `max_new_tokens` of the call must leave room for the answer.

    Raises:
        InputError: a negative count, a limit < 1, a text without tokens, or an `ignore_text` that ends thinking.
    """

    def __init__(
        self,
        end_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        min_ignores: int = 1,
        ignore_text: str = "Wait",
        max_thinking_tokens: int | None = None,
        close_text: str = "</think>\nFinal Answer:",
    ) -> None:
        self.end_ids = list(checked_ids("end_ids", end_ids))
        require(min_ignores >= 0, "min_ignores", min_ignores, "a whole number >= 0")
        if max_thinking_tokens is not None:
            require(max_thinking_tokens >= 1, "max_thinking_tokens", max_thinking_tokens, "a number >= 1, or none")
        self.min_ignores, self.limit = min_ignores, max_thinking_tokens
        self.ignore_ids, self.close_ids, self.newline_ids = (
            tokenizer.encode(text, add_special_tokens=False) for text in (ignore_text, close_text, "\n")
        )
        if min_ignores and not self.ignore_ids:
            raise InputError(f"ignore_text={ignore_text!r} has no token; give a word such as 'Wait'")
        if max_thinking_tokens is not None and not self.close_ids:
            raise InputError(f"close_text={close_text!r} has no token; give the text that ends thinking")
        if min_ignores and _find(self.ignore_ids, self.end_ids):
            raise InputError(f"ignore_text={ignore_text!r} ends thinking itself; give a word such as 'Wait'")

    def check(self, row: SequenceState) -> Violation | None:
        start = len(row.ids) - len(self.end_ids)
        if row.ids[-len(self.end_ids) :] == self.end_ids:
            return None if self._over(row, start) else self._ended(row, start)
        if self.limit is None or len(row.ids) < self.limit or row.finished or self._over(row, len(row.ids)):
            return None
        index = len(row.ids) - self.hold(row)  # a mark that has begun is replaced by the forced one
        text = row.text[: row.starts[index]] if index < len(row.ids) else row.text
        return Violation(index, CLOSED, force=self.closing(text))

    def closing(self, text: str) -> list[int]:
        """What closes thinking after `text`."""
        return [*(self.newline_ids if text and not text.endswith("\n") else []), *self.close_ids]

    def hold(self, row: SequenceState) -> int:
        """Tokens of an end mark that has begun; a whole one has passed `check`."""
        for size in range(min(len(self.end_ids) - 1, len(row.ids)), 0, -1):
            if row.ids[-size:] == self.end_ids[:size]:
                return size
        return 0

    def _ended(self, row: SequenceState, start: int) -> Violation | None:
        """What to do about the end mark at `start`: nothing, draw another token, or ignore it."""
        if any(stop == start for _, stop, rule in row.forced if rule == IGNORED):
            if (start, AGAIN) in row.ignored:
                return None
            return Violation(start, AGAIN, {self.end_ids[0]: 0.0})
        used = sum(rule == IGNORED for _, _, rule in row.forced)
        return Violation(start, IGNORED, force=self.ignore_ids) if self.ignores(start, used) else None

    def ignores(self, start: int, used: int) -> bool:
        """Whether an end of thinking at `start` is ignored, after `used` that were."""
        room = self.limit is None or self.limit - start > len(self.ignore_ids)
        return used < self.min_ignores and room

    def _over(self, row: SequenceState, before: int) -> bool:
        """Whether thinking had ended before position `before`."""
        return any(rule == CLOSED for _, _, rule in row.forced) or _find(row.ids[:before], self.end_ids)


class BudgetForcingLogitsProcessor(ContinuationLogitsProcessor):
    """The same where nothing can be taken back: each token is a function of the ids before it.

    Where the end of thinking is ignored, its score goes to `ignore_text` before anything is drawn. Greedy text is that
    of the monitor, but for an `ignore_text` that the model writes by itself: it counts as an ignored end.

    Args:
        monitor: with the parameters; its texts are forced here, too.

    Raises:
        InputError: an end mark, or a text that stands in place of it, of more than one token: only half of it would be
            written when it is seen.
    """

    def __init__(
        self, monitor: BudgetForcingMonitor, tokenizer: PreTrainedTokenizerBase, prompt_length: int | None = None
    ) -> None:
        super().__init__(prompt_length)
        for name, ids in (("end_think", monitor.end_ids), ("ignore_text", monitor.ignore_ids)):
            if len(ids) != 1 and (name == "end_think" or monitor.min_ignores):
                raise InputError(f"{name} is {len(ids)} tokens here; as a logits processor give one that is a token")
        self.monitor, self.tokenizer = monitor, tokenizer

    def change(self, generated: Tensor, scores: Tensor) -> Tensor:
        changed = scores.clone()
        for row, ids in enumerate(generated.tolist()):
            self._change(ids, changed[row])
        return changed

    def _change(self, ids: list[int], scores: Tensor) -> None:
        """Change the scores (vocab,) of what follows `ids`, in place."""
        monitor, end = self.monitor, self.monitor.end_ids[0]
        before = ids if monitor.limit is None else ids[: monitor.limit]
        if end in before:
            return
        if len(before) == monitor.limit:
            closing = monitor.closing(cast(str, self.tokenizer.decode(before)))[len(ids) - len(before) :]
            if closing:
                scores[torch.arange(len(scores), device=scores.device) != closing[0]] = -torch.inf
        elif monitor.min_ignores:
            ignore = monitor.ignore_ids[0]
            used = ids.count(ignore)
            if ids[-1:] == [ignore] and used <= monitor.min_ignores:
                scores[end] = -torch.inf
            elif monitor.ignores(len(ids), used):
                scores[ignore] = torch.maximum(scores[ignore], scores[end])
                scores[end] = -torch.inf


def _find(ids: list[int], mark: list[int]) -> bool:
    """Whether `mark` is a run of `ids`."""
    if mark[0] not in ids:  # nearly always, and fast
        return False
    return any(ids[i : i + len(mark)] == mark for i in range(len(ids) - len(mark) + 1))
