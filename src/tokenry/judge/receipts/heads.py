"""What an auditor has learned: does a token belong to its block, a block to the answer, and are opened blocks those of
an honest provider?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.artifact import Artifact, Folder, Header
from ...core.errors import InputError
from ...core.schemas import Fields
from ...core.tensors import with_weights
from ...models.embedders import Embedder
from .fingerprints import STEPS
from .receipt import AuditSetting

__all__ = ["FEATURES", "Match", "MatchingHeads"]

FEATURES = 4  # of a block: mean and least score of its tokens, score with the answer, size as a share of a full block
HIDDEN, POOLED = 256, 16
BLOCK_ALARM = 0.05  # share of honest blocks that each threshold of the rule flags


class Embeds(Fields):
    """Whose fingerprints are read."""

    model: str
    fingerprint: str


class HeadsHeader(Header):
    """What saved heads say of themselves."""

    width: int = Field(ge=1, lt=2**24)
    honest: int = Field(ge=0, lt=2**24)
    setting: AuditSetting
    rates: dict[str, float]
    made_for: Embeds


class Shift(nn.Module):
    """x + P x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(HIDDEN, width)
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Match(nn.Module):
    """sigmoid(a cos(x + P x, y + Q y) + c), P and Q of two layers that begin at 0: untrained, it compares fingerprints
    as they are, and little data bends that little."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = Shift(width), Shift(width)
        self.scale, self.shift = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits (...) of fingerprints (..., width)."""
        return self.compare(self.first(x), self.second(y))

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits of what was shifted."""
        return self.scale * F.cosine_similarity(first, second, dim=-1) + self.shift


class MatchingHeads(Artifact, nn.Module):
    """Two matching heads, a verdict over sets of blocks, and what honest providers score.

    Args:
        width: of a fingerprint.
        honest: how many honest audits the verdict is calibrated by.
        setting: of the audits that it is made for.

    Attributes:
        thresholds: (2,) the token-block and block-answer scores under which the rule flags a block.
        calibration: (honest, 4) of honest audits: probability and share of repeated tokens where the learned verdict
            stops; shares of flagged blocks and of repeated tokens in all blocks of the budget.
        rates: share of padded bills that were convicted, by the kind of padding, when this was fitted.
    """

    kind = "matching heads"
    layout = Folder("heads.safetensors", "heads.json")
    fields: ClassVar[type[Header]] = HeadsHeader
    remedy = "give a folder written by MatchingHeads.save"
    stranger = (
        "the {kind} were fitted for fingerprints of {model!r} ({fingerprint}), not for the weights {found}; fit "
        "heads for this embedder"
    )
    unbound = "the {kind} belong to no embedder yet; call bind(embedder) before save"
    named = "the {kind} in {path!r}"
    thresholds: Tensor
    calibration: Tensor

    def __init__(self, width: int, setting: AuditSetting, honest: int = 0) -> None:
        super().__init__()
        self.width, self.setting = width, setting
        self.token_block, self.block_answer = Match(width), Match(width)
        self.each = nn.Sequential(nn.Linear(FEATURES, POOLED), nn.GELU(), nn.Linear(POOLED, POOLED))
        self.pooled = nn.Sequential(nn.Linear(POOLED, POOLED), nn.GELU(), nn.Linear(POOLED, 1))
        self.register_buffer("thresholds", torch.zeros(2))
        self.register_buffer("calibration", torch.zeros(honest, 4))
        self.rates: dict[str, float] = {}
        self.made_for: dict[str, Any] | None = None

    def bind(self, embedder: Embedder) -> MatchingHeads:
        """Say whose fingerprints it reads."""
        self.made_for = {"model": embedder.name, "fingerprint": embedder.revision}
        return self

    @torch.no_grad()
    def features(self, tokens: Sequence[np.ndarray], blocks: np.ndarray, answer: np.ndarray) -> Tensor:
        """(blocks, 4) of blocks with fingerprints of their tokens (size, width) each, of themselves (blocks, width) and
        of the answer (parts, width)."""
        sizes = torch.tensor([len(own) for own in tokens])
        whole, parts, head = as_unit(blocks), as_unit(answer), self.token_block
        matches = head.compare(
            head.first(as_unit(np.concatenate(tokens))), head.second(whole).repeat_interleave(sizes, 0)
        )
        each = matches.sigmoid().split(sizes.tolist())
        head = self.block_answer
        answered = head.compare(head.first(whole)[:, None], head.second(parts)[None]).sigmoid().amax(1)
        means, least = (torch.stack([getattr(rows, name)() for rows in each]) for name in ("mean", "min"))
        return torch.stack([means, least, answered, sizes / self.setting.block_size], dim=1)

    def logit(self, blocks: Tensor, mask: Tensor | None = None) -> Tensor:
        """(...) logit of an honest provider, from features (..., blocks, 4); a mean over blocks, so that neither their
        order nor their number matters: a long bill is no reason to doubt it.

        Args:
            mask: (..., blocks) 1 where there is a block.
        """
        there = torch.ones(blocks.shape[:-1]) if mask is None else mask
        mean = (self.each(blocks) * there[..., None]).sum(-2) / there.sum(-1, keepdim=True)
        return self.pooled(mean)[..., 0]

    @torch.no_grad()
    def probability(self, blocks: Sequence[Tensor]) -> float:
        """Of an honest provider."""
        return float(self.logit(torch.stack(list(blocks))).sigmoid())

    def flagged(self, blocks: Sequence[Tensor]) -> float:
        """The share of blocks under one of the thresholds."""
        found = torch.stack(list(blocks))
        return float((found[:, [0, 2]] < self.thresholds).any(1).float().mean())

    def p_value(self, column: int, value: float, low: bool) -> float:
        """The share of honest audits, this one counted among them, that look at least as bad."""
        honest = self.calibration[:, column]
        worse = honest <= value + 1e-6 if low else honest >= value - 1e-6
        return float((1 + worse.sum()) / (1 + len(honest)))

    def check_calibrated(self, false_alarm: float) -> None:
        """Refuse a rate of false alarms that so few honest audits cannot tell.

        Raises:
            InputError: with the number that it takes.
        """
        wanted = int(np.ceil(2 / false_alarm)) - 1
        if len(self.calibration) < wanted:
            raise InputError(
                f"false_alarm={false_alarm:g} takes {wanted} honest audits to calibrate, the heads have "
                f"{len(self.calibration)}; fit them with more traces or give a larger one"
            )

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        about = {"width": self.width, "honest": len(self.calibration), "setting": self.setting.model_dump()}
        return self.state_dict(), {**about, "rates": self.rates, "made_for": self.made_for}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> MatchingHeads:
        setting = AuditSetting.model_validate(header["setting"])
        heads = with_weights(lambda: cls(header["width"], setting, header["honest"]), tensors)
        heads.rates, heads.made_for = header["rates"], header["made_for"]
        return heads


def as_unit(rows: np.ndarray) -> Tensor:
    """Fingerprints as numbers."""
    return torch.from_numpy(rows.astype(np.float32) / STEPS)
