"""CoIn: counting invisible reasoning tokens. A provider commits to what it bills, an auditor opens a little of it.

Paper: CoIn: Counting the Invisible Reasoning Tokens in Commercial Opaque LLM APIs, arXiv 2505.13778. The provider puts
a fingerprint (an embedding) of every hidden token and of every block of tokens into a hash tree whose number of leaves
is what it bills. The auditor then draws positions with a fresh nonce, checks their proofs, opens a few blocks, and asks
two matching heads whether tokens belong to their block and blocks to the visible answer.

The method's section of the paper and its code could not be read: details of bytes, heads and attacks are this
implementation's own. Beyond the paper, leaves are salted (a proof holds hashes of neighbors, and the fingerprint of one
token is soon found by hashing the vocabulary), runs of tokens that are opened twice count, and verdicts are calibrated
by audits of honest reasoning, so that at most a wanted share of honest bills is convicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from ..core.artifact import ArtifactField
from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Count, Portion, Probability, Seed
from ..core.progress import Progress
from ..models.embedders import MINILM, input_embedder, load_minilm
from ..models.load import Loaded
from .contract import ReceiptMethod
from .receipts.auditor import Auditor, Rule
from .receipts.fingerprints import Fingerprinter
from .receipts.heads import MatchingHeads
from .receipts.merkle import HashName
from .receipts.provider import Provider
from .receipts.receipt import AuditSetting, HiddenReasoning
from .receipts.training import fit_heads

__all__ = ["Coin"]

BlockSize = Annotated[int, Ge(16), Le(2048)]
FalseAlarm = Annotated[float, Ge(1e-4), Lt(0.5)]
Certainty = Annotated[float, Gt(0.5), Le(1)]
INPUTS = "input-embeddings"


class Coin(ReceiptMethod):
    """Audits bills for hidden reasoning by a hash tree over fingerprints of the tokens.

    coin = Coin(block_size=64)
    heads = coin.fit(load(), honest_traces)
    provider, auditor = coin.provider(load()), Coin(block_size=64, heads=heads).auditor(load())
    report = auditor.audit(provider.commit(trace), trace.answer, provider.open)
    """

    slug: ClassVar[str] = "coin"
    title: ClassVar[str] = "CoIn"
    paper: ClassVar[str] = (
        "CoIn: Counting the Invisible Reasoning Tokens in Commercial Opaque LLM APIs, arXiv 2505.13778"
    )
    claim: ClassVar[str] = (
        "A bill for hidden reasoning that is padded to twice its tokens is noticed by opening less than half of their "
        "fingerprints."
    )
    published: ClassVar[Claim] = Claim(
        "94.7 %", "of padded bills detected, at most", "reasoning of several models, four domains"
    )
    caution: ClassVar[str] = (
        "it counts what was committed to, not what a model generated: plausible text of a cheaper model passes"
    )

    block_size: BlockSize = Field(default=256, description="tokens that are opened together; smaller detects better")
    samples: Count = Field(default=16, description="positions whose proofs are checked before any block is opened")
    hash: HashName = Field(default="sha256", description="of the tree")
    embedder: Literal["all-MiniLM-L6-v2", "input-embeddings"] = Field(
        default=MINILM, description="who makes fingerprints: a sentence encoder, or the model's own input embeddings"
    )
    rule: Rule = Field(default="learned", description="the verdict that was learned, or thresholds on each block")
    false_alarm: FalseAlarm = Field(default=0.05, description="share of honest bills that may be convicted")
    exposure_budget: Portion = Field(default=0.4, description="share of the fingerprints that is opened at most")
    token_budget: Probability = Field(default=0.04, description="share of the tokens that is shown at most")
    certain: Certainty = Field(
        default=0.95, description="the learned verdict opens no further block when it is so sure"
    )
    seed: Seed = Field(default=0, description="of what is learned")
    heads: ArtifactField[MatchingHeads] | None = Field(default=None, description="folder of what `fit` has saved")

    @property
    def setting(self) -> AuditSetting:
        """What decides which openings an audit asks for."""
        return AuditSetting(**{name: getattr(self, name) for name in AuditSetting.model_fields})

    def provider(self, loaded: Loaded) -> Provider:
        """Who commits to tokens of the model's tokenizer, and opens them within the budgets."""
        made = self.fingerprinter(loaded)
        return Provider(made, self.block_size, self.hash, self.exposure_budget, self.token_budget)

    def auditor(self, loaded: Loaded) -> Auditor:
        """Who audits, with `heads`.

        Raises:
            InputError: no heads, or heads for another setting, embedder or rate of false alarms.
        """
        if self.heads is None:
            raise InputError("coin audits with heads that were fitted before; give heads, see Coin.fit")
        if self.heads.setting != self.setting:
            raise InputError(
                f"the heads were calibrated for audits with {differences(self.heads.setting, self.setting)}; give the "
                "same options, or fit heads for these"
            )
        return Auditor(self.fingerprinter(loaded), self.heads, self.rule, self.false_alarm)

    def fit(self, loaded: Loaded, traces: Sequence[HiddenReasoning], progress: Progress | None = None) -> MatchingHeads:
        """Heads, verdict and calibration from honest reasoning, 100 traces or more."""
        return fit_heads(self.fingerprinter(loaded), traces, self.setting, self.false_alarm, self.seed, progress)

    def fingerprinter(self, loaded: Loaded) -> Fingerprinter:
        """The embedder with the model's tokenizer."""
        model, tokenizer = loaded
        return Fingerprinter(input_embedder(model, tokenizer) if self.embedder == INPUTS else load_minilm(), tokenizer)


def differences(made: AuditSetting, asked: AuditSetting) -> str:
    """The first option that is another one."""
    name = next(n for n in AuditSetting.model_fields if getattr(made, n) != getattr(asked, n))
    return f"{name}={getattr(made, name)}, not {getattr(asked, name)}"
