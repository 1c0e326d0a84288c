"""The task `receipts`: bills for hidden tokens, honest ones and padded ones, are audited."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...core.calibration import auroc
from ...data.corpora import docstrings
from ...judge.receipts.auditor import Auditor, AuditReport
from ...judge.receipts.fingerprints import Fingerprinter
from ...judge.receipts.inflate import Inflater, Kind
from ...judge.receipts.provider import Provider
from ...judge.receipts.receipt import HiddenReasoning, Receipt
from ...models.embedders import Embedder
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["BILLS", "Bill", "ReceiptTask", "documents", "remembering"]

PROMPT, LEAST, MOST, ANSWER = 24, 256, 768, 64  # tokens of a document's parts
HONEST = "honest"


class Bill(NamedTuple):
    """A kind of padding."""

    kind: Kind
    ratio: float
    place: Literal["end", "spread"]


BILLS = {
    "random": Bill("random", 1.0, "end"),
    "random_half": Bill("random", 0.5, "end"),
    "random_spread": Bill("random", 1.0, "spread"),
    "off_topic": Bill("off-topic", 1.0, "end"),
    "same_topic": Bill("same-topic", 1.0, "end"),
    "reasoning": Bill("reasoning", 1.0, "end"),
    "answer": Bill("answer", 1.0, "end"),
    "prompt": Bill("prompt", 1.0, "end"),
    "copy": Bill("copy", 1.0, "end"),
}


def documents(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[HiddenReasoning]:
    """The docstrings of modules of Python's library, shuffled: a module's first 24 tokens are the prompt, then come 256
    to 768 of hidden reasoning, as many as are drawn, and 64 of the answer. One trace a module. Lengths differ by more
    than padding doubles, so that length says little."""
    found, rng = [], random.Random(seed)
    for text in docstrings():
        ids = tokenizer(text[:12_000], add_special_tokens=False)["input_ids"]
        end = min(PROMPT + rng.randint(LEAST, MOST), len(ids) - ANSWER)
        if end >= PROMPT + LEAST:
            prompt, answer = (cast(str, tokenizer.decode(part)) for part in (ids[:PROMPT], ids[end : end + ANSWER]))
            found.append(HiddenReasoning(prompt=prompt, reasoning=ids[PROMPT:end], answer=answer))
    rng.shuffle(found)
    return found


def remembering(embedder: Embedder) -> Embedder:
    """The same embedder; a text is embedded once."""
    known: dict[str, Tensor] = {}

    def embed(texts: Sequence[str]) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            known.update(zip(missing, torch.as_tensor(embedder.embed(missing)).cpu()))
        return torch.stack([known[text] for text in texts])

    return Embedder(embedder.name, embedder.revision, embed)


def separation(name: str) -> Statistic:
    """How well the score of an audit tells this bill from honest ones."""

    def compute(values) -> float:
        honest, padded = values[f"score_{HONEST}"], values[f"score_{name}"]
        kept = ~np.isnan(honest) & ~np.isnan(padded)
        scores = np.concatenate([padded[kept], honest[kept]])
        return auroc(scores.tolist(), [True] * int(kept.sum()) + [False] * int(kept.sum()))

    return Statistic(f"auroc_{name}", "higher", f"AUROC of the audit's score, {name} against honest", compute)


class ReceiptTask:
    """Reasoning, billed honestly and padded in nine ways; each bill is committed to, opened and judged.

    An arm's `apply(seed)` gives (heads, rule), or None for proofs alone, which say nothing of what was committed to.

    Args:
        traces: nothing was learned from them; padding takes passages from one another's.
    """

    slug: ClassVar[str] = "receipts"
    stage: ClassVar[str] = "judge"
    metrics: ClassVar[Sequence[Metric]] = (
        *(Metric(f"score_{name}", None, f"suspicion, {name}") for name in (HONEST, *BILLS)),
        Metric(f"convicted_{HONEST}", "lower", "honest bills that are convicted"),
        *(Metric(f"convicted_{name}", "higher", f"padded bills that are convicted, {name}") for name in BILLS),
        Metric("exposed", "lower", "share of an honest trace's fingerprints that is opened"),
        Metric("shown", "lower", "share of an honest trace's tokens that is shown"),
    )
    statistics: ClassVar[Sequence[Statistic]] = tuple(separation(name) for name in BILLS)

    def __init__(
        self,
        fingerprinter: Fingerprinter,
        traces: Sequence[HiddenReasoning],
        false_alarm: float,
        block_size: int,
    ) -> None:
        self.fingerprinter, self.traces, self.false_alarm = fingerprinter, traces, false_alarm
        self.provider = Provider(fingerprinter, block_size, secret=b"receipts")
        self.inflater = Inflater(fingerprinter, traces)
        self.setting = {"false_alarm": false_alarm, "block_size": block_size, "traces": len(traces)}
        self._receipts: dict[tuple[int, str], Receipt] = {}

    def samples(self) -> list[Sample]:
        return [Sample(f"{i:03}", trace.prompt, {"index": i}) for i, trace in enumerate(self.traces)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        made = arm.apply(seed)
        auditor = Auditor(self.fingerprinter, made[0], made[1], self.false_alarm) if made else None
        return [self._outcome(auditor, sample.data["index"], seed) for sample in samples]

    def _outcome(self, auditor: Auditor | None, index: int, seed: int) -> Outcome:
        start, metrics = time.perf_counter(), {"exposed": 0.0, "shown": 0.0}
        for name in (HONEST, *BILLS):
            report = self._audit(auditor, index, name, seed) if auditor else None
            metrics[f"score_{name}"] = suspicion(report) if report else 0.0
            metrics[f"convicted_{name}"] = float(report is not None and report.verdict != "honest")
            if report and name == HONEST:
                metrics |= {"exposed": report.exposed, "shown": report.shown}
        return Outcome(metrics, {"seconds": time.perf_counter() - start})

    def _audit(self, auditor: Auditor, index: int, name: str, seed: int) -> AuditReport:
        receipt, nonce = self._receipt(index, name), hashlib.sha256(f"{index} {name} {seed}".encode()).hexdigest()
        record = self.provider.records[receipt.digest]
        record.opened, record.shown = set(), set()  # every arm audits for the first time
        return auditor.audit(receipt, self.traces[index].answer, self.provider.open, receipt.tokens, nonce)

    def _receipt(self, index: int, name: str) -> Receipt:
        """Of a bill; all arms and seeds audit the same one."""
        if (index, name) not in self._receipts:
            trace = self.traces[index]
            if name != HONEST:
                kind, ratio, place = BILLS[name]
                trace = self.inflater.inflate(trace, kind, ratio, index, place)
            self._receipts[index, name] = self.provider.commit(trace)
        return self._receipts[index, name]


def suspicion(report: AuditReport) -> float:
    """What the meaning of the opened blocks says, without repetitions: the probability of padding, or the share of
    flagged blocks."""
    return 1 - report.probability if report.probability is not None else report.flagged or 0.0
