"""The provider: commits to the tokens that it hides, and opens what an audit has drawn."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field

from ...core.errors import InputError
from ...core.fields import Portion, Tokens, check
from ...core.schemas import Exchanged, checked
from ...trace.trace import Trace
from .fingerprints import Fingerprinter
from .merkle import HashName, MerkleTree
from .receipt import REMEDY, EmbedderName, HiddenReasoning, OpenedLeaf, Opening, Receipt, Request, plan_of

__all__ = ["Provider", "Record", "hidden_ids", "hidden_of"]

SALT = 16  # bytes


@dataclass
class Record:
    """What stays with the provider: without it a receipt cannot be opened.

    Every leaf is hashed with a salt of its own, made of `secret`: proofs hold hashes of neighbors that nobody opened,
    and a token's fingerprint alone could be found by hashing the vocabulary.

    Attributes:
        tokens, blocks: fingerprints (n, width) and (blocks, width), int8.
        opened, shown: positions whose fingerprint, or token, any audit has seen.
    """

    receipt: Receipt
    ids: list[int]
    tokens: np.ndarray
    blocks: np.ndarray
    secret: bytes
    opened: set[int] = field(default_factory=set)
    shown: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.token_leaves = self._leaves("token", self.tokens)
        self.block_leaves = self._leaves("block", self.blocks)
        self.token_tree = MerkleTree(self.token_leaves, self.receipt.hash)
        self.block_tree = MerkleTree(self.block_leaves, self.receipt.hash)

    def _leaves(self, what: str, rows: np.ndarray) -> list[bytes]:
        return [self._salt(what, i) + row.tobytes() for i, row in enumerate(rows)]

    def _salt(self, what: str, i: int) -> bytes:
        return hmac.digest(self.secret, f"{what} {i}".encode(), hashlib.sha256)[:SALT]

    def token(self, i: int, shown: bool = False) -> OpenedLeaf:
        """Position i with its proof, and the token itself if it is shown."""
        return self._opened(i, self.token_leaves[i], self.token_tree, self.ids[i] if shown else None)

    def block(self, i: int) -> OpenedLeaf:
        """Block i with its proof."""
        return self._opened(i, self.block_leaves[i], self.block_tree)

    def _opened(self, i: int, leaf: bytes, tree: MerkleTree, token: int | None = None) -> OpenedLeaf:
        fingerprint = base64.b64encode(leaf[SALT:]).decode()
        salt, proof = leaf[:SALT].hex(), [step.hex() for step in tree.proof(i)]
        return OpenedLeaf(position=i, salt=salt, fingerprint=fingerprint, proof=proof, id=token)

    def to_json(self) -> dict[str, Any]:
        """As JSON values: the receipt, the tokens, what each fingerprint is, and what was opened."""
        distinct = {id: base64.b64encode(row.tobytes()).decode() for id, row in zip(self.ids, self.tokens)}
        return Stored(
            receipt=self.receipt,
            secret=self.secret.hex(),
            ids=self.ids,
            fingerprints={str(id): row for id, row in distinct.items()},
            blocks=[base64.b64encode(row.tobytes()).decode() for row in self.blocks],
            opened=sorted(self.opened),
            shown=sorted(self.shown),
        ).model_dump(mode="json")

    @classmethod
    def from_json(cls, value: Any, where: str = "the record") -> Record:
        """What `to_json` gave.

        Raises:
            InputError: a field that is missing or wrong, or contents that do not have the receipt's commitments.
        """
        receipt = Receipt.from_json(value.get("receipt") if isinstance(value, dict) else None, where)
        stored = checked(Stored, {**value, "receipt": receipt}, where, REMEDY)
        width = receipt.embedder.width
        try:
            tokens = _rows([stored.fingerprints[str(id)] for id in stored.ids], width)
            record = cls(
                receipt,
                stored.ids,
                tokens,
                _rows(stored.blocks, width),
                bytes.fromhex(stored.secret),
                set(stored.opened),
                set(stored.shown),
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{where} is damaged ({error}); {REMEDY}") from None
        made = [tree.commitment.hex() for tree in (record.token_tree, record.block_tree)]
        if made != [receipt.token_commitment, receipt.block_commitment]:
            raise InputError(f"{where} does not have the commitments of its receipt; {REMEDY}")
        return record


class Stored(Exchanged):
    """A record as JSON."""

    model_config = ConfigDict(strict=True)

    receipt: Receipt
    secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    ids: list[int] = Field(min_length=1)
    fingerprints: dict[str, str]
    blocks: list[str] = Field(min_length=1)
    opened: list[int]
    shown: list[int]


def _rows(texts: Iterable[str], width: int) -> np.ndarray:
    rows = [np.frombuffer(base64.b64decode(text, validate=True), np.int8) for text in texts]
    if any(len(row) != width for row in rows):
        raise ValueError(f"a fingerprint that is not of width {width}")
    return np.stack(rows)


class Provider:
    """Makes receipts and answers audits.

    provider = Provider(Fingerprinter(load_minilm(), tokenizer), block_size=64)
    receipt = provider.commit(HiddenReasoning(reasoning=..., answer=...))
    Auditor(...).audit(receipt, answer, provider.open)

    Args:
        exposure_budget: share of a receipt's fingerprints that are opened, in all audits of it together.
        token_budget: share of its tokens that are shown, in all of them.
        secret: what salts are made of; default: drawn now. The same secret and tokens give the same receipt.

    Attributes:
        records: what stays here, by the digest of the receipt.
    """

    def __init__(
        self,
        fingerprinter: Fingerprinter,
        block_size: int = 256,
        hash: HashName = "sha256",
        exposure_budget: float = 0.4,
        token_budget: float = 0.04,
        secret: bytes | None = None,
    ) -> None:
        check("block_size", block_size, Tokens)
        check("exposure_budget", exposure_budget, Portion)
        self.fingerprinter, self.block_size = fingerprinter, block_size
        self.hash: HashName = hash
        self.exposure_budget, self.token_budget = exposure_budget, token_budget
        self.secret = secret or secrets.token_bytes(32)
        self.records: dict[str, Record] = {}

    def commit(self, trace: HiddenReasoning | Trace) -> Receipt:
        """A receipt of the hidden tokens of a generation, text or trace.

        Raises:
            InputError: no hidden token, an empty answer, or embeddings that cannot be used.
        """
        hidden = hidden_of(trace)
        if not hidden.answer.strip():
            raise InputError(f"the answer {hidden.answer[:20]!r} is empty; give the text that the user saw")
        return self.commit_ids(hidden_ids(hidden, self.fingerprinter))

    def commit_ids(self, ids: Sequence[int]) -> Receipt:
        """A receipt of hidden tokens."""
        if not ids:
            raise InputError("there are 0 hidden tokens; a receipt needs at least 1")
        made = self.fingerprinter
        tokens, blocks = made.tokens(ids), made.blocks(ids, self.block_size)
        receipt = Receipt(
            tokens=len(ids),
            block_size=self.block_size,
            hash=self.hash,
            token_commitment="00",
            block_commitment="00",
            embedder=EmbedderName(name=made.embedder.name, revision=made.embedder.revision, width=made.width),
            tokenizer=made.tokenizer_hash,
            exposure_budget=self.exposure_budget,
        )
        secret = hmac.digest(self.secret, " ".join(map(str, ids)).encode(), hashlib.sha256)
        record = Record(receipt, list(ids), tokens, blocks, secret)
        commitments = {
            "token_commitment": record.token_tree.commitment.hex(),
            "block_commitment": record.block_tree.commitment.hex(),
        }
        record.receipt = receipt.model_copy(update=commitments)
        self.records[record.receipt.digest] = record
        return record.receipt

    def open(self, request: Request) -> Opening:
        """What follows from the receipt and the nonce, and nothing else: who asks chooses no position.

        Raises:
            InputError: a receipt that is not from here, blocks of another size, or more than the budgets allow.
        """
        record = self.records.get(request.receipt)
        if record is None:
            raise InputError(f"the receipt {request.receipt[:16]} is not from this provider; ask the one who made it")
        n, setting = record.receipt.tokens, request.setting
        if setting.block_size != record.receipt.block_size:
            raise InputError(
                f"blocks of {setting.block_size} tokens are asked for, the receipt has blocks of "
                f"{record.receipt.block_size}; ask for these"
            )
        plan = plan_of(n, setting, f"{request.receipt} {request.nonce}")
        if request.block is None:
            shown = record.shown.union(plan.ids)
            if len(shown) > int(self.token_budget * n):
                raise InputError(
                    f"{len(shown)} of {n} tokens would have been shown, token_budget is {self.token_budget:g}; ask for "
                    "fewer"
                )
            self._spend(record, plan.positions)
            record.shown = shown
            return Opening(leaves=[record.token(i, i in set(plan.ids)) for i in plan.positions])
        if request.block >= len(plan.blocks):
            raise InputError(
                f"block {request.block} of the draw is not among the {len(plan.blocks)} that may be opened"
            )
        number = plan.blocks[request.block]
        self._spend(record, record.receipt.blocks[number])
        leaves = [record.token(i) for i in record.receipt.blocks[number]]
        return Opening(leaves=leaves, block=record.block(number))

    def _spend(self, record: Record, positions: Iterable[int]) -> None:
        """Count positions as seen, unless the budget ends before."""
        seen, n = record.opened.union(positions), record.receipt.tokens
        if len(seen) > int(record.receipt.exposure_budget * n):
            raise InputError(
                f"{len(seen)} of {n} fingerprints would have been opened, the exposure budget of this receipt is "
                f"{record.receipt.exposure_budget:g}; it cannot be audited further"
            )
        record.opened = seen


def hidden_of(trace: HiddenReasoning | Trace) -> HiddenReasoning:
    """The thinking, the answer and the prompt of a trace; hidden reasoning as it is."""
    if isinstance(trace, HiddenReasoning):
        return trace
    ids, texts = trace.ids.tolist(), {}
    for role in ("prompt", "answer"):
        spans = [(trace.offsets[start, 0], trace.offsets[stop - 1, 1]) for start, stop in trace.spans[role]]
        texts[role] = "".join(trace.text[int(first) : int(last)] for first, last in spans)
    thought = [id for start, stop in trace.spans["think"] for id in ids[start:stop]]
    return HiddenReasoning(reasoning=thought, **texts)


def hidden_ids(hidden: HiddenReasoning, fingerprinter: Fingerprinter) -> list[int]:
    """The hidden tokens.

    Raises:
        InputError: ids that the tokenizer does not have.
    """
    if isinstance(hidden.reasoning, str):
        return fingerprinter.tokenizer(hidden.reasoning, add_special_tokens=False)["input_ids"]
    beyond = next((id for id in hidden.reasoning if not 0 <= id < len(fingerprinter.tokenizer)), None)
    if beyond is not None:
        raise InputError(f"the token {beyond} is not in the vocabulary; give ids below {len(fingerprinter.tokenizer)}")
    return hidden.reasoning
