"""What the two sides exchange, as JSON: what was hidden, the receipt, requests and openings; and which openings follow
from a receipt and a nonce."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from ...core.errors import InputError
from ...core.files import explained
from ...core.schemas import Exchanged, Fields, checked
from .fingerprints import blocks_of
from .merkle import HashName

__all__ = [
    "AuditSetting",
    "Bill",
    "HiddenReasoning",
    "OpenedLeaf",
    "Opening",
    "Plan",
    "Receipt",
    "Request",
    "draw",
    "plan_of",
]

FORMAT = 1  # of receipts, the newest that is read
RECEIPT = b"\3"  # what a hash is of, beside those of the tree
REMEDY = "give what Provider.commit or `tokenry judge --method coin commit` has made"
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=128)]
Count = Annotated[int, Field(ge=1, lt=2**40)]


class HiddenReasoning(Exchanged):
    """What a provider has generated: the reasoning that it hides and bills, and what the user sees."""

    reasoning: str | list[int] = Field(description="text, or token ids")
    answer: str
    prompt: str = ""


class AuditSetting(Fields):
    """What decides which openings an audit asks for."""

    block_size: int = Field(ge=1, lt=2**20)
    samples: int = Field(ge=1, lt=2**40)
    exposure_budget: float = Field(gt=0, le=1)
    token_budget: float = Field(ge=0, le=1)
    certain: float = Field(gt=0.5, le=1)


class EmbedderName(Fields):
    """Whose fingerprints were committed to."""

    name: str
    revision: str
    width: int = Field(ge=1, lt=2**24)


class Receipt(Exchanged):
    """What a provider commits to, before anybody says which positions will be looked at. It holds no text."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format: int = Field(default=FORMAT, ge=1)
    tokens: Count = Field(description="hidden tokens: the number that is billed")
    block_size: int = Field(ge=1, lt=2**20)
    hash: HashName
    token_commitment: Hex
    block_commitment: Hex
    embedder: EmbedderName
    tokenizer: str = Field(description="hash of the tokenizer that counts")
    exposure_budget: float = Field(gt=0, le=1, description="share of the fingerprints that the provider will open")

    @property
    def digest(self) -> str:
        """A hash of all of it: what a nonce is joined to."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(RECEIPT + text.encode()).hexdigest()

    @property
    def blocks(self) -> list[range]:
        """The positions of each block."""
        return blocks_of(self.tokens, self.block_size)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Any, where: str = "the receipt") -> Receipt:
        """What `to_json` gave.

        Raises:
            InputError: a newer format, or a field that is missing or wrong.
        """
        found = value.get("format") if isinstance(value, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise InputError(f"{where} has format {found}, this version reads {FORMAT}; update tokenry")
        return checked(cls, value, where, REMEDY)


class Bill(Exchanged):
    """What a user holds: the answer, what is to be paid for, and the receipt."""

    receipt: Receipt
    answer: str
    billed: int | None = Field(default=None, ge=1, description="hidden tokens on the bill; default: the receipt's")


class OpenedLeaf(Exchanged):
    """A leaf with all that proves it: salt and fingerprint are what was hashed."""

    position: int = Field(ge=0)
    salt: Hex
    fingerprint: str = Field(description="whole numbers of a byte each, base64")
    proof: list[Hex] = Field(max_length=64)
    id: int | None = Field(default=None, description="the token, where it was asked for")

    @property
    def leaf(self) -> bytes:
        """What was hashed."""
        with explained(f"the fingerprint at position {self.position} is no base64", REMEDY):
            return bytes.fromhex(self.salt) + base64.b64decode(self.fingerprint, validate=True)

    @property
    def vector(self) -> np.ndarray:
        """(width,) int8."""
        return np.frombuffer(self.leaf[len(self.salt) // 2 :], np.int8)


class Request(Exchanged):
    """What an auditor asks for: the sampled positions (no block), or the block that is drawn as number `block`."""

    receipt: Hex = Field(description="the receipt's digest")
    nonce: Hex = Field(min_length=32, description="drawn after the receipt was there")
    setting: AuditSetting
    block: int | None = Field(default=None, ge=0)


class Opening(Exchanged):
    """The answer: token leaves, and the leaf of their block where one was asked for."""

    leaves: list[OpenedLeaf]
    block: OpenedLeaf | None = None


# --- what is opened --------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What an audit may open: positions whose proofs are checked, those of them whose tokens are shown, and blocks in
    the order in which they are opened, as many as the budget allows."""

    positions: list[int]
    ids: list[int]
    blocks: list[int]


def draw(seed: str, what: str, n: int) -> list[int]:
    """0 to n - 1 in the order of their hashes with a seed and a word: anybody can draw it again, in any language."""
    prefix = f"{seed} {what} ".encode()
    return sorted(range(n), key=lambda i: hashlib.sha256(prefix + str(i).encode()).digest())


def plan_of(n: int, setting: AuditSetting, seed: str) -> Plan:
    """The openings of n tokens for a seed, which is a receipt's digest with a nonce.

    Raises:
        InputError: not a single block is within the budget.
    """
    blocks, most = blocks_of(n, setting.block_size), int(setting.exposure_budget * n)
    positions = draw(seed, "position", n)[: min(setting.samples, n)]
    shown, opened = set(positions), []
    for number in draw(seed, "block", len(blocks)):
        after = shown.union(blocks[number])
        if len(after) > most:
            break
        shown = after
        opened.append(number)
    if not opened:
        raise InputError(
            f"a block of {setting.block_size} and {len(positions)} samples of {n} tokens are more than the exposure "
            f"budget of {setting.exposure_budget:g}; give smaller blocks, fewer samples or a larger budget"
        )
    return Plan(positions, positions[: int(setting.token_budget * n)], opened)
