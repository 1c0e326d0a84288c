"""The auditor: opens a few blocks of a receipt and says whether an honest provider would look like that."""

from __future__ import annotations

import math
import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from ...core.errors import InputError
from ...core.schemas import Exchanged
from .fingerprints import Fingerprinter
from .heads import MatchingHeads
from .merkle import verify_proof
from .receipt import AuditSetting, OpenedLeaf, Opening, Plan, Receipt, Request, plan_of

__all__ = ["AuditReport", "Auditor", "BlockScore", "Examination", "invalid_seen", "p_values_of", "repeated"]

RUN = 8  # tokens in a row that are the same twice
TOLERANCE = 1  # steps that an embedding may differ by on another machine
LIMITS = (
    "The number of leaves says how many tokens were committed to, not that a model generated them: text made by a "
    "cheaper model passes.",
    "Opened fingerprints tell about hidden text; what was opened is gone from the provider's privacy budget.",
)
Rule = Literal["learned", "rule"]


class BlockScore(Exchanged):
    """An opened block.

    Attributes:
        flagged: under a threshold of the rule.
    """

    block: int
    tokens: int
    token_block: float
    token_block_least: float
    block_answer: float
    flagged: bool


class AuditReport(Exchanged):
    """What an audit found: `honest`, `inflated` by the scores, or `invalid` by the openings."""

    verdict: Literal["honest", "inflated", "invalid"]
    reasons: list[str]
    tokens: int = Field(description="billed and committed to")
    nonce: str
    probability: float | None = Field(default=None, description="of an honest provider, by the learned verdict")
    flagged: float | None = Field(default=None, description="share of opened blocks under a threshold of the rule")
    repeated: float | None = Field(default=None, description="share of opened tokens that are in a run seen twice")
    p_values: dict[str, float] = Field(default_factory=dict, description="how rare that is with honest providers")
    blocks: list[BlockScore] = Field(default_factory=list)
    proofs: int = Field(default=0, description="leaves whose proof was checked")
    exposed: float = Field(default=0.0, description="share of the fingerprints that was opened")
    shown: float = Field(default=0.0, description="share of the tokens that was shown")
    invalid_seen: float = Field(default=0.0, description="chance that the samples hit one of 10 % invalid leaves")
    unseen: dict[str, float] = Field(
        default_factory=dict, description="kinds of padding that mostly pass, with the share that is convicted"
    )
    limits: list[str] = Field(default=list(LIMITS))

    def table(self) -> str:
        """As lines of text."""
        lines = [f"{self.verdict}: {'; '.join(self.reasons) or 'nothing speaks against the bill'}"]
        lines.append(
            f"{self.tokens} tokens billed; {self.proofs} proofs checked, {self.exposed:.1%} of the fingerprints "
            f"opened, {self.shown:.1%} of the tokens shown"
        )
        if self.blocks:
            learned = "" if self.probability is None else f"P(honest) {self.probability:.3f}, "
            rare = ", ".join(f"{name} p {value:.3f}" for name, value in self.p_values.items())
            lines.append(f"{learned}flagged {self.flagged:.1%}, repeated {self.repeated:.1%} ({rare})")
        for one in self.blocks:
            mark = ", flagged" if one.flagged else ""
            lines.append(
                f"  block {one.block}: {one.tokens} tokens, in their block {one.token_block:.3f} (least "
                f"{one.token_block_least:.3f}), with the answer {one.block_answer:.3f}{mark}"
            )
        if self.unseen:
            kinds = ", ".join(f"{kind} ({rate:.0%} convicted)" for kind, rate in self.unseen.items())
            lines.append(f"what mostly passes: {kinds}")
        return "\n".join([*lines, *self.limits])


class Examination:
    """Blocks of one receipt as they are opened, and what they say together."""

    def __init__(self, heads: MatchingHeads) -> None:
        self.heads = heads
        self.features: list[Tensor] = []
        self.opened: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, features: Tensor) -> None:
        """A block with fingerprints of its tokens (size, width) and its features (4,)."""
        self.features.append(features)
        self.opened.append(tokens)

    @property
    def decided(self) -> bool:
        """Whether the learned verdict is as certain as the setting asks, either way."""
        certain = self.heads.setting.certain
        return not 1 - certain < self.probability < certain

    @property
    def probability(self) -> float:
        """Of an honest provider."""
        return self.heads.probability(self.features)

    @property
    def flagged(self) -> float:
        """The share of blocks under a threshold of the rule."""
        return self.heads.flagged(self.features)

    @property
    def repeated(self) -> float:
        """The share of tokens that are in a run seen twice."""
        return repeated(self.opened)


class Auditor:
    """Audits receipts of one embedder and one tokenizer.

    report = Auditor(Fingerprinter(load_minilm(), tokenizer), heads).audit(receipt, answer, provider.open)

    Args:
        heads: fitted for the embedder and calibrated for the setting with which they audit.
        rule: by the learned verdict, which stops as soon as it is certain, or by thresholds on all blocks it may open.
        false_alarm: share of honest bills that may be convicted; half of it for repeated tokens.
    """

    def __init__(
        self, fingerprinter: Fingerprinter, heads: MatchingHeads, rule: Rule = "learned", false_alarm: float = 0.05
    ) -> None:
        heads.check_made_for(fingerprinter.embedder.revision)
        heads.check_calibrated(false_alarm)
        self.fingerprinter, self.heads, self.false_alarm = fingerprinter, heads, false_alarm
        self.rule: Rule = rule

    def audit(
        self,
        receipt: Receipt,
        answer: str,
        open: Callable[[Request], Opening],
        billed: int | None = None,
        nonce: str | None = None,
    ) -> AuditReport:
        """Ask for openings, check them, and judge what they show.

        Args:
            answer: what the user saw.
            open: the provider's answer to a request, such as `Provider.open`.
            billed: what the bill says, if that is another paper.
            nonce: 32 to 128 hexadecimal digits; default: drawn now, as it must be where the provider is not trusted.

        Raises:
            InputError: a receipt of another version, embedder, tokenizer or block size, or of another number of tokens
                than billed; an empty answer; a nonce that is none; a budget that opens no block.
        """
        self._check(receipt, billed)
        nonce = secrets.token_hex(16) if nonce is None else nonce
        if not re.fullmatch("([0-9a-f]{2}){16,64}", nonce):
            raise InputError(f"the nonce {nonce[:40]!r} is not allowed; give 32 to 128 hexadecimal digits, or none")
        parts = self.fingerprinter.answer(answer)
        run = _Run(self, receipt, parts, open, nonce)
        return run.report()

    def _check(self, receipt: Receipt, billed: int | None) -> None:
        if billed is not None and billed != receipt.tokens:
            raise InputError(
                f"the bill says {billed} tokens, the receipt commits to {receipt.tokens}; ask for a receipt of what is "
                "billed"
            )
        mine, theirs = self.fingerprinter.embedder, receipt.embedder
        if (mine.name, mine.revision) != (theirs.name, theirs.revision):
            raise InputError(
                f"the receipt is of the embedder {theirs.name!r} ({theirs.revision}), the auditor has {mine.name!r} "
                f"({mine.revision}); agree on one"
            )
        if receipt.tokenizer != self.fingerprinter.tokenizer_hash:
            raise InputError(
                f"the receipt counts tokens of the tokenizer {receipt.tokenizer}, the auditor has "
                f"{self.fingerprinter.tokenizer_hash}; agree on one"
            )
        setting = self.heads.setting
        if receipt.block_size != setting.block_size:
            raise InputError(
                f"the receipt has blocks of {receipt.block_size} tokens, the heads were fitted for "
                f"{setting.block_size}; fit heads for this size"
            )
        if receipt.exposure_budget < setting.exposure_budget:
            raise InputError(
                f"the provider opens {receipt.exposure_budget:g} of the fingerprints, the audit takes "
                f"{setting.exposure_budget:g}; fit heads for a smaller exposure budget"
            )


class _Run:
    """One audit."""

    def __init__(
        self,
        auditor: Auditor,
        receipt: Receipt,
        answer: np.ndarray,
        open: Callable[[Request], Opening],
        nonce: str,
    ) -> None:
        self.auditor, self.heads, self.receipt, self.open, self.nonce = auditor, auditor.heads, receipt, open, nonce
        self.setting: AuditSetting = auditor.heads.setting
        self.digest = receipt.digest
        self.plan: Plan = plan_of(receipt.tokens, self.setting, f"{self.digest} {nonce}")
        self.exam, self.answer = Examination(self.heads), answer
        self.reasons: list[str] = []
        self.proofs, self.seen = 0, set[int]()

    def report(self) -> AuditReport:
        self.samples()
        scores: list[BlockScore] = []
        for place, number in enumerate(self.plan.blocks):
            if self.reasons or not self.block(place, number):
                break
            scores.append(self.score(number))
            if self.auditor.rule == "learned" and self.exam.decided:
                break
        return self.judged(scores)

    def ask(self, block: int | None = None) -> Opening:
        return self.open(Request(receipt=self.digest, nonce=self.nonce, setting=self.setting, block=block))

    def samples(self) -> None:
        """Sampled positions are in the tree, and shown tokens are what their fingerprints say."""
        opening = self.ask()
        if not self.leaves(opening.leaves, self.plan.positions):
            return
        for leaf in opening.leaves[: len(self.plan.ids)]:
            if leaf.id is None or not self.is_token(leaf):
                self.reasons.append(f"the token shown at position {leaf.position} is not what its fingerprint says")
                return

    def is_token(self, leaf: OpenedLeaf) -> bool:
        made = self.auditor.fingerprinter
        if leaf.id is None or not 0 <= leaf.id < len(made.tokenizer):
            return False
        again = made.tokens([leaf.id])[0].astype(int)
        return int(np.abs(again - leaf.vector.astype(int)).max()) <= TOLERANCE

    def block(self, place: int, number: int) -> bool:
        """Open a block; whether all of it is proven."""
        opening, positions = self.ask(place), list(self.receipt.blocks[number])
        proven = self.leaves(opening.leaves, positions) and self.leaves([opening.block], [number], blocks=True)
        if proven and opening.block is not None:
            tokens = np.stack([leaf.vector for leaf in opening.leaves])
            self.exam.add(tokens, self.heads.features([tokens], opening.block.vector[None], self.answer)[0])
        return proven

    def leaves(self, leaves: Sequence[OpenedLeaf | None], positions: Sequence[int], blocks: bool = False) -> bool:
        """Whether these are the leaves at these positions; the reason if they are not."""
        found, what = [leaf.position for leaf in leaves if leaf is not None], "block" if blocks else "position"
        if found != list(positions):
            self.reasons.append(f"{what} {positions[0]} and those asked for with it were not opened as asked")
            return False
        for leaf in leaves:
            if leaf is None or not self.proven(leaf, blocks):
                self.reasons.append(
                    f"what was opened at {what} {found[0] if leaf is None else leaf.position} is not in the commitment"
                )
                return False
        self.proofs += len(found)
        if not blocks:
            self.seen.update(positions)
        return True

    def proven(self, leaf: OpenedLeaf, block: bool) -> bool:
        receipt = self.receipt
        n = len(receipt.blocks) if block else receipt.tokens
        commitment = bytes.fromhex(receipt.block_commitment if block else receipt.token_commitment)
        path = [bytes.fromhex(step) for step in leaf.proof]
        proven = verify_proof(leaf.leaf, leaf.position, n, path, commitment, receipt.hash)
        return proven and len(leaf.vector) == receipt.embedder.width

    def score(self, number: int) -> BlockScore:
        features = self.exam.features[-1]
        mean, least, answer, _ = features.tolist()
        return BlockScore(
            block=number,
            tokens=len(self.exam.opened[-1]),
            token_block=mean,
            token_block_least=least,
            block_answer=answer,
            flagged=self.heads.flagged([features]) > 0,
        )

    def judged(self, blocks: list[BlockScore]) -> AuditReport:
        n = self.receipt.tokens
        told = {
            "tokens": n,
            "nonce": self.nonce,
            "blocks": blocks,
            "proofs": self.proofs,
            "exposed": len(self.seen) / n,
            "shown": len(self.plan.ids) / n,
            "invalid_seen": invalid_seen(n, math.ceil(n / 10), len(self.plan.positions)),
            "unseen": {kind: rate for kind, rate in self.heads.rates.items() if rate < 0.5},
        }
        if self.reasons:
            return AuditReport(verdict="invalid", reasons=self.reasons, **told)
        p_values = p_values_of(self.exam, self.auditor.rule)
        texts = {
            "meaning": "the opened blocks do not belong together, or not to the answer",
            "repeated": f"{self.exam.repeated:.1%} of the opened tokens are in runs of {RUN} that were opened twice",
        }
        reasons = [texts[name] for name, value in p_values.items() if value <= self.auditor.false_alarm / 2]
        return AuditReport(
            verdict="inflated" if reasons else "honest",
            reasons=reasons,
            probability=self.exam.probability if self.auditor.rule == "learned" else None,
            flagged=self.exam.flagged,
            repeated=self.exam.repeated,
            p_values=p_values,
            **told,
        )


def p_values_of(exam: Examination, rule: Rule) -> dict[str, float]:
    """How rare what was opened is with honest providers, by what it means and by what is repeated."""
    heads = exam.heads
    if rule == "learned":
        meaning, column = heads.p_value(0, exam.probability, low=True), 1
    else:
        meaning, column = heads.p_value(2, exam.flagged, low=False), 3
    return {"meaning": meaning, "repeated": heads.p_value(column, exam.repeated, low=False)}


def repeated(blocks: Sequence[np.ndarray]) -> float:
    """The share of tokens that are in a run of 8 fingerprints which is there more than once, in the same block or in
    another."""
    names = [[row.tobytes() for row in block] for block in blocks]
    runs = [[tuple(block[i : i + RUN]) for i in range(len(block) - RUN + 1)] for block in names]
    counts = Counter(run for block in runs for run in block)
    twice = 0
    for block in runs:
        marked = {i + j for i, run in enumerate(block) if counts[run] > 1 for j in range(RUN)}
        twice += len(marked)
    return twice / max(1, sum(map(len, blocks)))


def invalid_seen(n: int, invalid: int, samples: int) -> float:
    """The chance that `samples` of n positions, each drawn once, hold one of the `invalid` ones:
    1 - C(n - invalid, samples) / C(n, samples).

    Raises:
        InputError: more invalid positions or samples than there are positions.
    """
    if not 0 <= invalid <= n or not 1 <= samples <= n:
        raise InputError(f"{invalid} invalid and {samples} sampled of {n} positions are not allowed; give at most {n}")
    return 1 - math.comb(n - invalid, samples) / math.comb(n, samples)
