"""Fit what an auditor needs: matching heads on one part of honest reasoning, the verdict on another, false alarms on a
third."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import InputError
from ...core.progress import Progress
from .auditor import Examination, p_values_of
from .fingerprints import Fingerprinter, blocks_of
from .heads import BLOCK_ALARM, MatchingHeads, as_unit
from .inflate import KINDS, Inflater, Kind
from .provider import hidden_ids
from .receipt import AuditSetting, HiddenReasoning, plan_of

__all__ = [
    "Committed",
    "calibrate",
    "committed",
    "fit_heads",
    "measure_rates",
    "new_heads",
    "train_heads",
    "train_verdict",
]

LEARNED_FROM: tuple[Kind, ...] = ("random", "off-topic", "same-topic", "reasoning")
RATIOS = (0.5, 1.0, 2.0)
SHARES = (0.4, 0.6)  # of the traces: the heads end at the first, the verdict at the second, the rest calibrates
LEAST = 10  # traces of a part
STEPS, TOKENS, BLOCKS, RATE = 100, 256, 64, 1e-3  # of the heads: more steps learn few traces by heart
VERDICT_STEPS, SETS, VERDICT_RATE = 800, 64, 3e-3


class Committed(NamedTuple):
    """Fingerprints of a trace: tokens (n, width), blocks (blocks, width), answer (parts, width), int8."""

    tokens: np.ndarray
    blocks: np.ndarray
    answer: np.ndarray


def committed(fingerprinter: Fingerprinter, trace: HiddenReasoning, block_size: int) -> Committed:
    """What a provider commits to, and the answer."""
    ids = hidden_ids(trace, fingerprinter)
    blocks = fingerprinter.blocks(ids, block_size)
    return Committed(fingerprinter.tokens(ids), blocks, fingerprinter.answer(trace.answer))


def fit_heads(
    fingerprinter: Fingerprinter,
    traces: Sequence[HiddenReasoning],
    setting: AuditSetting,
    false_alarm: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> MatchingHeads:
    """Heads, verdict, calibration and rates, each from traces of its own, the last two from the same.

    Raises:
        InputError: too few traces.
    """
    order = random.Random(seed).sample(list(traces), len(traces))
    first, second = (int(share * len(order)) for share in SHARES)
    parts = order[:first], order[first:second], order[second:]
    if min(map(len, parts)) < LEAST:
        raise InputError(f"{len(traces)} traces are too few; give at least {5 * LEAST}, half of them calibrate")
    heads = new_heads(fingerprinter, order[0], setting, seed, honest=len(parts[2]))
    heads.check_calibrated(false_alarm)
    tell = progress or (lambda done, total, *_: None)
    train_heads(heads, fingerprinter, parts[0], seed)
    tell(1, 4)
    train_verdict(heads, fingerprinter, parts[1], seed)
    tell(2, 4)
    calibrate(heads, fingerprinter, parts[2])
    tell(3, 4)
    heads.rates = measure_rates(heads, fingerprinter, parts[2], false_alarm)
    tell(4, 4)
    return heads


def new_heads(
    fingerprinter: Fingerprinter, trace: HiddenReasoning, setting: AuditSetting, seed: int, honest: int = 0
) -> MatchingHeads:
    """Untrained, for the width of the embedder."""
    fingerprinter.answer(trace.answer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MatchingHeads(fingerprinter.width, setting, honest).bind(fingerprinter.embedder)


# --- heads -----------------------------------------------------------------------------------------------------------


class Pool(NamedTuple):
    """Traces as rows.

    Attributes:
        tokens (tokens, width), block_of (tokens,), blocks (blocks, width), trace_of (blocks,), answers (traces, width).
        names: (tokens,) a number for each different fingerprint.
        holds: (blocks, names) whether a block has such a token.
    """

    tokens: Tensor
    block_of: np.ndarray
    blocks: Tensor
    trace_of: np.ndarray
    answers: Tensor
    names: np.ndarray
    holds: np.ndarray


def pooled(traces: Sequence[Committed], size: int) -> Pool:
    tokens = np.concatenate([one.tokens for one in traces])
    starts = np.cumsum([0, *(len(one.blocks) for one in traces)])
    block_of = np.concatenate([start + np.arange(len(one.tokens)) // size for start, one in zip(starts, traces)])
    trace_of = np.repeat(np.arange(len(traces)), np.diff(starts))
    known: dict[bytes, int] = {}
    names = np.array([known.setdefault(row.tobytes(), len(known)) for row in tokens])
    holds = np.zeros((int(starts[-1]), len(known)), bool)
    holds[block_of, names] = True
    blocks, answers = (
        as_unit(np.concatenate(rows)) for rows in ([t.blocks for t in traces], [t.answer[:1] for t in traces])
    )
    return Pool(as_unit(tokens), block_of, blocks, trace_of, answers, names, holds)


def train_heads(
    heads: MatchingHeads, fingerprinter: Fingerprinter, traces: Sequence[HiddenReasoning], seed: int = 0
) -> None:
    """Binary cross-entropy on true pairs and on false ones: tokens of other blocks and of the vocabulary, blocks of
    other traces and of padding."""
    size, rng = heads.setting.block_size, np.random.default_rng(seed)
    inflater = Inflater(fingerprinter, traces)
    pool = pooled([committed(fingerprinter, trace, size) for trace in traces], size)
    padding = [_padding(inflater, trace, "random", i) for i, trace in enumerate(traces)]
    added = [committed(fingerprinter, one, size) for one in padding]
    strangers, gibberish = (as_unit(np.concatenate([one[i] for one in added])) for i in (0, 1))
    parameters = [*heads.token_block.parameters(), *heads.block_answer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (token_loss(heads, pool, strangers, rng) + answer_loss(heads, pool, gibberish, rng)).backward()
        optimizer.step()


def _padding(inflater: Inflater, trace: HiddenReasoning, kind: Kind, seed: int) -> HiddenReasoning:
    """The padding alone, half as long as the trace."""
    n = len(hidden_ids(trace, inflater.fingerprinter))
    padded = inflater.inflate(trace, kind, 0.5, seed)
    return trace.model_copy(update={"reasoning": padded.reasoning[n:]})


def token_loss(heads: MatchingHeads, pool: Pool, strangers: Tensor, rng: np.random.Generator) -> Tensor:
    """Of tokens with their block, with other blocks of the same trace, with any block, and of random tokens."""
    true = rng.integers(len(pool.tokens), size=TOKENS)
    blocks = pool.block_of[true]
    near = np.clip(blocks + rng.choice([-3, -2, -1, 1, 2, 3], TOKENS), 0, len(pool.blocks) - 1)
    far = rng.integers(len(pool.blocks), size=TOKENS)
    random_tokens = strangers[torch.from_numpy(rng.integers(len(strangers), size=TOKENS // 2))]
    own = pool.tokens[torch.from_numpy(true)]
    x = torch.cat([own, own, own, random_tokens])
    y = pool.blocks[torch.from_numpy(np.concatenate([blocks, near, far, blocks[: TOKENS // 2]]))]
    label = torch.zeros(len(x))
    label[:TOKENS] = 1
    there = np.concatenate(
        [np.zeros(TOKENS, bool), pool.holds[near, pool.names[true]], pool.holds[far, pool.names[true]]]
    )
    weight = 1 - F.pad(torch.from_numpy(there).float(), (0, TOKENS // 2))  # a token that the other block has too
    return F.binary_cross_entropy_with_logits(heads.token_block(x, y), label, weight)


def answer_loss(heads: MatchingHeads, pool: Pool, gibberish: Tensor, rng: np.random.Generator) -> Tensor:
    """Of blocks with their answer, with another one, and of padding with the answer."""
    picked = rng.integers(len(pool.blocks), size=BLOCKS)
    own = pool.trace_of[picked]
    other = (own + rng.integers(1, len(pool.answers), size=BLOCKS)) % len(pool.answers)
    padding = torch.from_numpy(rng.integers(len(gibberish), size=BLOCKS // 2))
    x = torch.cat([pool.blocks[picked], pool.blocks[picked], gibberish[padding]])
    y = pool.answers[np.concatenate([own, other, own[: BLOCKS // 2]])]
    label = torch.zeros(len(x))
    label[:BLOCKS] = 1
    return F.binary_cross_entropy_with_logits(heads.block_answer(x, y), label)


# --- verdict ---------------------------------------------------------------------------------------------------------


def train_verdict(
    heads: MatchingHeads, fingerprinter: Fingerprinter, traces: Sequence[HiddenReasoning], seed: int = 0
) -> None:
    """Learn to tell opened blocks of honest bills from those of padded ones, as many as an audit may open of each."""
    rng, drawn, size = random.Random(seed), random.Random(0), heads.setting.block_size
    inflater = Inflater(fingerprinter, traces)
    sets = []
    for i, trace in enumerate(traces):
        sets.append((features_of(heads, committed(fingerprinter, trace, size)), 1.0))
        for kind in LEARNED_FROM:
            place = drawn.choice(("end", "spread"))
            padded = inflater.inflate(trace, kind, drawn.choice(RATIOS), i, place)
            sets.append((features_of(heads, committed(fingerprinter, padded, size)), 0.0))
    honest, padded = ([rows for rows, label in sets if label == which] for which in (1.0, 0.0))
    optimizer = torch.optim.Adam([*heads.each.parameters(), *heads.pooled.parameters()], lr=VERDICT_RATE)
    for _ in range(VERDICT_STEPS):
        pairs = [draw_pair(rng.choice(honest), rng.choice(padded), heads.setting, rng) for _ in range(SETS)]
        batch = [*(pair[0] for pair in pairs), *(pair[1] for pair in pairs)]
        rows = nn.utils.rnn.pad_sequence(batch, batch_first=True)
        lengths = torch.tensor([len(one) for one in batch])
        mask = (torch.arange(rows.shape[1]) < lengths[:, None]).float()
        label = (torch.arange(2 * SETS) < SETS).float()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(heads.logit(rows, mask), label).backward()
        optimizer.step()


def features_of(heads: MatchingHeads, made: Committed) -> Tensor:
    """(blocks, 4) of all blocks."""
    return heads.features(token_blocks(heads, made), made.blocks, made.answer)


def token_blocks(heads: MatchingHeads, made: Committed) -> list[np.ndarray]:
    """The fingerprints of tokens (size, width) of each block."""
    return [made.tokens[block.start : block.stop] for block in blocks_of(len(made.tokens), heads.setting.block_size)]


def draw_pair(honest: Tensor, padded: Tensor, setting: AuditSetting, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Some blocks of each, as many of one as of the other and at most what the exposure budget allows of both: padded
    bills are longer, and that must not be what tells them apart."""
    most = max(1, int(setting.exposure_budget * min(len(honest), len(padded))))
    count = rng.randint(1, most)
    first, second = (rows[rng.sample(range(len(rows)), count)] for rows in (honest, padded))
    return first, second


# --- honest providers ------------------------------------------------------------------------------------------------


def calibrate(heads: MatchingHeads, fingerprinter: Fingerprinter, traces: Sequence[HiddenReasoning]) -> None:
    """Thresholds of the rule, and the scores of audits of honest bills, to which others are compared."""
    made = [committed(fingerprinter, trace, heads.setting.block_size) for trace in traces]
    rows = torch.cat([features_of(heads, one) for one in made])
    heads.thresholds = torch.quantile(rows[:, [0, 2]], BLOCK_ALARM, dim=0)
    found = []
    for i, one in enumerate(made):
        learned, whole = (examined(heads, one, f"calibration {i}", stops) for stops in (True, False))
        found.append([learned.probability, learned.repeated, whole.flagged, whole.repeated])
    heads.calibration = torch.tensor(found)


def measure_rates(
    heads: MatchingHeads,
    fingerprinter: Fingerprinter,
    traces: Sequence[HiddenReasoning],
    false_alarm: float,
) -> dict[str, float]:
    """The share of bills that are convicted when each is padded to twice its tokens, by kind."""
    inflater, rates, size = Inflater(fingerprinter, traces), {}, heads.setting.block_size
    for kind in KINDS:
        able = [trace for trace in traces if kind != "prompt" or trace.prompt.strip()]
        convicted = 0
        for i, trace in enumerate(able):
            padded = committed(fingerprinter, inflater.inflate(trace, kind, 1.0, i), size)
            p_values = p_values_of(examined(heads, padded, f"{kind} {i}"), "learned")
            convicted += min(p_values.values()) <= false_alarm / 2
        if able:
            rates[kind] = convicted / len(able)
    return rates


def examined(heads: MatchingHeads, made: Committed, seed: str, stops: bool = True) -> Examination:
    """What an audit of a trace would open, without the proofs.

    Args:
        stops: end as soon as the learned verdict is certain.
    """
    exam, features, tokens = Examination(heads), features_of(heads, made), token_blocks(heads, made)
    for number in plan_of(len(made.tokens), heads.setting, seed).blocks:
        exam.add(tokens[number], features[number])
        if stops and exam.decided:
            break
    return exam
