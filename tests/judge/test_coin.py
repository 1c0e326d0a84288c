"""CoIn: the tree against the RFC's definition and vectors, what an audit opens, what it refuses, what it sees."""

import base64
import hashlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.judge import (
    Auditor,
    Coin,
    Fingerprinter,
    HiddenReasoning,
    Inflater,
    MatchingHeads,
    MerkleTree,
    Provider,
    Receipt,
    fit_heads,
    invalid_seen,
    verify_proof,
)
from tokenry.judge.receipts import training
from tokenry.judge.receipts.auditor import Examination, repeated
from tokenry.judge.receipts.fingerprints import blocks_of
from tokenry.judge.receipts.inflate import KINDS
from tokenry.judge.receipts.provider import Record
from tokenry.judge.receipts.receipt import AuditSetting, OpenedLeaf, Request, draw, plan_of
from tokenry.models.embedders import Embedder, input_embedder
from tokenry.models.load import Loaded
from tokenry.trace.trace import capture

SETTING = AuditSetting(block_size=16, samples=4, exposure_budget=0.4, token_budget=0.04, certain=0.95)
TOPICS = ("abcdef", "ghijkl", "mnopqr", "stuvwx")


def sha256(data):
    return hashlib.sha256(data).digest()


# --- the tree --------------------------------------------------------------------------------------------------------


def by_definition(leaves):
    """RFC 6962, section 2.1."""
    n = len(leaves)
    if n == 1:
        return sha256(b"\0" + leaves[0])
    k = 2 ** ((n - 1).bit_length() - 1)
    return sha256(b"\1" + by_definition(leaves[:k]) + by_definition(leaves[k:]))


def path_by_definition(i, leaves):
    """RFC 6962, section 2.1.1."""
    n = len(leaves)
    if n == 1:
        return []
    k = 2 ** ((n - 1).bit_length() - 1)
    if i < k:
        return [*path_by_definition(i, leaves[:k]), by_definition(leaves[k:])]
    return [*path_by_definition(i - k, leaves[k:]), by_definition(leaves[:k])]


VECTORS = {  # of the reference implementation of certificate transparency
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    4: "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    6: "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]


@pytest.mark.parametrize("n", VECTORS)
def test_known_roots(n):
    assert MerkleTree(LEAVES[:n]).root.hex() == VECTORS[n]


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=70), st.data())
@settings(max_examples=60, deadline=None)
def test_roots_and_paths_are_those_of_the_definition(leaves, data):
    tree, i = MerkleTree(leaves), data.draw(st.integers(0, len(leaves) - 1))
    assert tree.root == by_definition(leaves) and tree.proof(i) == path_by_definition(i, leaves)
    assert tree.commitment == sha256(b"\2" + len(leaves).to_bytes(8, "big") + tree.root)
    assert verify_proof(leaves[i], i, len(leaves), tree.proof(i), tree.commitment)


@pytest.mark.parametrize("hash", ["sha256", "blake2b"])
def test_every_leaf_of_every_size_is_proven_and_nothing_else_is(hash):
    for n in range(1, 41):
        leaves = [f"leaf {i}".encode() for i in range(n)]
        tree = MerkleTree(leaves, hash)
        for i in range(n):
            proof, right = tree.proof(i), tree.commitment
            assert verify_proof(leaves[i], i, n, proof, right, hash)
            for j in {(i + 1) % n, i ^ 1, n - 1 - i, -1, n} - {i}:
                assert not verify_proof(leaves[i], j, n, proof, right, hash)
            for m in {n - 1, n + 1, 2 * n, n ^ 1} - {n}:
                assert not verify_proof(leaves[i], i, m, proof, right, hash)
            assert not verify_proof(leaves[i], i, n, [*proof, b"\0" * 32], right, hash)
            assert not proof or not verify_proof(leaves[i], i, n, proof[:-1], right, hash)
            assert not verify_proof(leaves[i], i, n, proof, right, "blake2b" if hash == "sha256" else "sha256")


@given(st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_a_single_bit_is_enough_to_be_refused(n, data):
    leaves = [bytes([i, 7, i]) for i in range(n)]
    tree, i = MerkleTree(leaves), data.draw(st.integers(0, n - 1))
    parts = [leaves[i], tree.commitment, *tree.proof(i)]
    which = data.draw(st.integers(0, len(parts) - 1))
    bit = data.draw(st.integers(0, 8 * len(parts[which]) - 1))
    changed = bytearray(parts[which])
    changed[bit // 8] ^= 1 << bit % 8
    parts[which] = bytes(changed)
    assert not verify_proof(parts[0], i, n, parts[2:], parts[1])


def test_a_repeated_last_leaf_is_another_tree():
    """With padding by the last node it would be the same one, and the bill one token longer."""
    for n in range(1, 20):
        leaves = [bytes([i]) for i in range(n)]
        assert MerkleTree(leaves).root != MerkleTree([*leaves, leaves[-1]]).root


def test_a_node_is_no_leaf():
    tree = MerkleTree([b"a", b"b", b"c", b"d"])
    inner = b"".join(tree.levels[1])  # what the root hashes
    assert not verify_proof(inner, 0, 1, [], tree.commitment)
    assert MerkleTree([inner]).root != tree.root


def test_what_a_tree_refuses():
    with pytest.raises(InputError, match="at least 1 leaf, not 0"):
        MerkleTree([])
    for i in (-1, 3):
        with pytest.raises(InputError, match=f"leaf {i} is not in a tree of 3; give 0 to 2"):
            MerkleTree([b"a", b"b", b"c"]).proof(i)
    with pytest.raises(InputError, match="'md5' is not known; give one of sha256, blake2b"):
        MerkleTree([b"a"], "md5")


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_draw_is_an_order_that_anybody_can_draw_again():
    assert sorted(draw("x", "block", 50)) == list(range(50)) and draw("x", "block", 50) == draw("x", "block", 50)
    assert draw("x", "block", 50) != draw("y", "block", 50) and draw("x", "block", 50) != draw("x", "position", 50)
    first = min(range(50), key=lambda i: hashlib.sha256(f"x block {i}".encode()).hexdigest())
    assert draw("x", "block", 50)[0] == first


def test_samples_hit_invalid_leaves_as_often_as_the_formula_says():
    """20,000 draws of 3 of 20 positions, 4 of them invalid."""
    draws, n, invalid, q = 20_000, 20, 4, 3
    hits = sum(any(i < invalid for i in draw(str(seed), "position", n)[:q]) for seed in range(draws))
    p = invalid_seen(n, invalid, q)
    assert abs(hits / draws - p) <= 3 * math.sqrt(p * (1 - p) / draws)


def test_the_formula_counts():
    for n, q in ((5, 2), (6, 3)):
        for invalid in range(n + 1):
            chosen = list(itertools.combinations(range(n), q))
            assert invalid_seen(n, invalid, q) == pytest.approx(sum(min(c) < invalid for c in chosen) / len(chosen))
    with pytest.raises(InputError, match="6 invalid and 1 sampled of 5 positions are not allowed"):
        invalid_seen(5, 6, 1)


@pytest.mark.parametrize("n", [60, 100, 333])
def test_a_plan_stays_within_its_budgets(n):
    for seed in range(20):
        plan = plan_of(n, SETTING, str(seed))
        opened = {*plan.positions}.union(*(blocks_of(n, 16)[b] for b in plan.blocks))
        assert len(opened) <= 0.4 * n and len(plan.ids) <= 0.04 * n and set(plan.ids) <= set(plan.positions)
        assert len(set(plan.positions)) == 4 and len(set(plan.blocks)) == len(plan.blocks) >= 1


def test_a_budget_that_opens_nothing_is_refused():
    with pytest.raises(
        InputError, match=r"a block of 16 and 4 samples of 30 tokens are more than .* 0.4; give smaller"
    ):
        plan_of(30, SETTING, "x")


# --- a small world ---------------------------------------------------------------------------------------------------


def embed(texts):
    """A vector for each byte, and their sum: texts of the same letters are alike."""
    table = np.random.default_rng(0).normal(size=(256, 24))
    return torch.tensor(np.stack([table[list(text.encode())].sum(0) + 1e-3 for text in texts]))


def traces(count, seed=0, topics=TOPICS):
    """Reasoning and answer of the letters of one topic."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        letters = list(topics[i % len(topics)] + " ")
        texts = ("".join(rng.choice(letters, n)).strip() for n in (rng.integers(200, 320), 40, 12))
        made.append(HiddenReasoning(**dict(zip(("reasoning", "answer", "prompt"), texts))))
    return made


@pytest.fixture(scope="module")
def fingerprinter(tokenizer):
    return Fingerprinter(Embedder("letters", "1", embed), tokenizer)


@pytest.fixture(scope="module")
def heads(fingerprinter):
    """The small world takes fewer steps than English does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "VERDICT_STEPS", 200)
        return fit_heads(fingerprinter, traces(100), SETTING)


@pytest.fixture
def provider(fingerprinter):
    return Provider(fingerprinter, 16, secret=b"of the tests")


@pytest.fixture
def auditor(fingerprinter, heads):
    return Auditor(fingerprinter, heads)


@pytest.fixture
def trace():
    return traces(1, seed=9)[0]


NONCE = "ab" * 16


def forget(provider, receipt):
    """As if it had never been audited."""
    provider.records[receipt.digest].opened.clear()
    provider.records[receipt.digest].shown.clear()


def inspect(auditor, provider, trace, nonce=NONCE):
    receipt = provider.commit(trace)
    forget(provider, receipt)
    return auditor.audit(receipt, trace.answer, provider.open, receipt.tokens, nonce)


def test_honest_bills_pass_and_padded_ones_do_not(auditor, provider, fingerprinter):
    """Traces that nothing was learned from."""
    fresh = traces(40, seed=5)
    inflater = Inflater(fingerprinter, fresh)
    found = Counter(inspect(auditor, provider, trace).verdict for trace in fresh)
    assert found["inflated"] <= 4 and found["invalid"] == 0
    for kind in ("random", "off-topic", "copy"):
        padded = [inflater.inflate(trace, kind, 1.0, i) for i, trace in enumerate(fresh)]
        verdicts = [inspect(auditor, provider, trace).verdict for trace in padded]
        assert verdicts.count("inflated") >= 30, kind


def test_what_is_rare_in_the_calibration_is_convicted(heads):
    """p values by counting; of 40 honest audits none may be as bad for a half of 0.05."""
    values = heads.calibration[:, 0].tolist()
    for value in (0.0, sorted(values)[1], 1.0):
        assert heads.p_value(0, value, low=True) == pytest.approx((1 + sum(v <= value for v in values)) / 41)
    heads.check_calibrated(0.05)
    with pytest.raises(InputError, match=r"false_alarm=0.01 takes 199 honest audits to calibrate, the heads have 40"):
        heads.check_calibrated(0.01)


def test_zero_padding_is_never_flagged_by_an_oracle(fingerprinter, heads):
    """A matcher that knows which blocks are the provider's own."""

    class Oracle(MatchingHeads):
        def features(self, tokens, blocks, answer):
            return torch.ones(len(blocks), 4)

    oracle = Oracle(24, SETTING, 50).bind(fingerprinter.embedder)
    oracle.thresholds, oracle.calibration = torch.full((2,), 0.5), torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 50)
    provider = Provider(fingerprinter, 16)
    for trace in traces(10, seed=3):
        report = Auditor(fingerprinter, oracle, rule="rule").audit(provider.commit(trace), trace.answer, provider.open)
        assert report.verdict == "honest" and report.flagged == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_blocks_does_not_matter(heads, fingerprinter, seed):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(-60, 60, (16, 24)).astype(np.int8) for _ in range(6)]
    features = heads.features(tokens, rng.integers(-60, 60, (6, 24)).astype(np.int8), fingerprinter.answer("a cab"))
    said = []
    for order in (range(6), rng.permutation(6)):
        exam = Examination(heads)
        for i in order:
            exam.add(tokens[i], features[i])
        said.append((exam.probability, exam.flagged, exam.repeated))
    assert said[0] == pytest.approx(said[1], abs=1e-6)


def test_untrained_heads_are_cosines():
    rng = np.random.default_rng(0)
    heads, (x, y) = MatchingHeads(24, SETTING), torch.tensor(rng.normal(size=(2, 5, 24)), dtype=torch.float32)
    cosines = (x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)
    with torch.no_grad():
        assert torch.allclose(heads.block_answer(x, y), 5 * cosines - 2, atol=1e-5)


def test_the_number_of_blocks_does_not_matter(heads):
    """The same blocks twice say the same: a long bill is not doubted for its length."""
    rows = torch.rand(5, 4)
    assert heads.probability(list(rows)) == pytest.approx(heads.probability([*rows, *rows]), abs=1e-6)


def test_features_by_their_definition(heads, fingerprinter):
    """Blocks together, the last one shorter, are each alone and by a loop over tokens and parts of the answer."""
    ids = fingerprinter.tokenizer("abcdef " * 6, add_special_tokens=False)["input_ids"]
    blocks, answer = fingerprinter.blocks(ids, 16), fingerprinter.answer("abc " * 130)
    tokens = [fingerprinter.tokens([ids[i] for i in block]) for block in blocks_of(len(ids), 16)]
    found = heads.features(tokens, blocks, answer)
    assert len(answer) == 2 and len(tokens[-1]) == len(ids) % 16
    for own, block, row in zip(tokens, blocks, found):
        x, b, a = (torch.from_numpy(rows / np.float32(127)) for rows in (own, block, answer))
        with torch.no_grad():
            matches = [float(heads.token_block(one, b).sigmoid()) for one in x]
            best = max(float(heads.block_answer(b, part).sigmoid()) for part in a)
        wanted = [sum(matches) / len(matches), min(matches), best, len(own) / 16]
        assert row.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_padded_row_of_blocks_is_the_row_alone(heads):
    rows = torch.rand(3, 4)
    together = torch.stack([rows, torch.cat([rows[:2], torch.full((1, 4), 9.0)])])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        assert torch.allclose(heads.logit(together, mask)[1], heads.logit(rows[:2]), atol=1e-5)


def test_repeated_runs_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(30):
        blocks = [rng.integers(0, 2, (rng.integers(5, 30), 1)).astype(np.int8) for _ in range(3)]
        texts = ["".join(map(str, block[:, 0])) for block in blocks]
        marked = set()
        for (a, x), (b, y) in itertools.product(enumerate(texts), repeat=2):
            for i, j in itertools.product(range(len(x) - 7), range(len(y) - 7)):
                if (a, i) != (b, j) and x[i : i + 8] == y[j : j + 8]:
                    marked.update((a, i + k) for k in range(8))
        assert repeated(blocks) == pytest.approx(len(marked) / sum(map(len, texts)))


@pytest.mark.parametrize("rule", ["learned", "rule"])
def test_a_report_counts_what_was_opened(rule, fingerprinter, heads, provider, trace):
    report = inspect(Auditor(fingerprinter, heads, rule=rule), provider, trace)
    record = next(iter(provider.records.values()))
    n = record.receipt.tokens
    assert report.exposed == len(record.opened) / n <= 0.4 and report.shown <= 0.04 and report.tokens == n
    assert report.proofs == 4 + sum(block.tokens + 1 for block in report.blocks)
    assert report.invalid_seen == pytest.approx(invalid_seen(n, math.ceil(n / 10), 4))
    assert (report.probability is None) == (rule == "rule") and set(report.p_values) == {"meaning", "repeated"}
    assert all(words in report.table() for words in (report.verdict, f"{n} tokens billed", "a cheaper model passes"))
    plan = plan_of(n, SETTING, f"{record.receipt.digest} {NONCE}")
    assert [block.block for block in report.blocks] == plan.blocks[: len(report.blocks)]
    assert rule == "learned" or len(report.blocks) == len(plan.blocks)
    assert json.loads(json.dumps(report.model_dump())) == report.model_dump()


def test_kinds_that_mostly_pass_are_named_with_their_rates(fingerprinter, heads, provider, trace, monkeypatch):
    assert set(heads.rates) == set(KINDS) and all(0 <= rate <= 1 for rate in heads.rates.values())
    monkeypatch.setattr(heads, "rates", {"random": 1.0, "answer": 0.125, "prompt": 0.5})
    report = inspect(Auditor(fingerprinter, heads), provider, trace)
    assert report.unseen == {"answer": 0.125} and "what mostly passes: answer (12% convicted)" in report.table()


def test_a_nonce_is_drawn_for_every_audit(auditor, provider, trace):
    receipt = provider.commit(trace)
    asked = []

    def listening(request):
        asked.append(request.nonce)
        return provider.open(request)

    for _ in range(2):
        forget(provider, receipt)
        auditor.audit(receipt, trace.answer, listening)
    assert len(set(asked)) == 2 and all(len(nonce) == 32 for nonce in asked)


# --- cheats ----------------------------------------------------------------------------------------------------------


def cheat(kind, opening, request):
    """An opening that is not what was committed to."""
    leaves, block = list(opening.leaves), opening.block
    first = leaves[0]
    other = base64.b64encode(bytes(24)).decode()
    if kind == "token":
        leaves[0] = first.model_copy(update={"fingerprint": other})
    elif kind == "salt":
        leaves[0] = first.model_copy(update={"salt": "00" * 16})
    elif kind == "path":
        leaves[0] = first.model_copy(update={"proof": ["00" * 32, *first.proof[1:]]})
    elif kind == "other positions":
        leaves[0] = leaves[1]
    elif kind == "fewer":
        leaves = leaves[1:]
    elif kind == "id":
        leaves[0] = first.model_copy(update={"id": None if first.id is None else (first.id + 1) % 200})
    elif kind == "no block" and block is not None:
        block = None
    elif kind == "block" and block is not None:
        block = block.model_copy(update={"fingerprint": other})
    return opening.model_copy(update={"leaves": leaves, "block": block})


@pytest.mark.parametrize("kind", ["token", "salt", "path", "other positions", "fewer", "id", "no block", "block"])
def test_a_cheat_is_invalid(kind, auditor, provider, trace):
    receipt = provider.commit(trace)
    report = auditor.audit(receipt, trace.answer, lambda request: cheat(kind, provider.open(request), request))
    assert report.verdict == "invalid" and len(report.reasons) == 1 and report.probability is None
    assert ("is not in the commitment" in report.reasons[0]) == (kind in ("token", "salt", "path", "block"))


def test_a_fingerprint_that_is_one_step_off_is_the_same_token(auditor, provider, trace, fingerprinter, tokenizer):
    """Another machine embeds almost alike; two steps are another token."""

    def moved(by):
        shifted = Fingerprinter(fingerprinter.embedder, tokenizer)
        exact = shifted.tokens

        def tokens(ids):
            rows = exact(ids).astype(int)
            return (rows + by * (rows < 100)).astype(np.int8)

        shifted.tokens = tokens
        return Auditor(shifted, auditor.heads)

    receipt = provider.commit(trace)
    assert moved(1).audit(receipt, trace.answer, provider.open, nonce=NONCE).verdict == "honest"
    assert moved(2).audit(receipt, trace.answer, provider.open, nonce=NONCE).verdict == "invalid"


def test_leaves_of_the_same_token_do_not_look_alike(provider):
    """Else who sees a neighbor's hash in a proof finds its token by hashing the vocabulary."""
    receipt = provider.commit(HiddenReasoning(reasoning="a" * 64, answer="b"))
    record = provider.records[receipt.digest]
    assert len(set(record.token_tree.levels[0])) == 64 and len({row.tobytes() for row in record.tokens}) == 1
    bare = {sha256(b"\0" + row.tobytes()) for row in record.tokens}
    assert bare.isdisjoint(record.token_tree.levels[0])


# --- the provider ----------------------------------------------------------------------------------------------------


def test_a_receipt_holds_no_text_and_comes_back_from_json(provider, trace):
    receipt = provider.commit(trace)
    text = json.dumps(receipt.to_json())
    again = Receipt.from_json(json.loads(text))
    assert again == receipt and again.digest == receipt.digest
    assert receipt.tokens == len(provider.records[receipt.digest].ids) > 100
    assert trace.answer not in text and trace.reasoning[:8] not in text
    for name, value in (("tokens", receipt.tokens + 1), ("block_size", 17), ("exposure_budget", 0.5)):
        assert receipt.model_copy(update={name: value}).digest != receipt.digest


def test_the_same_secret_gives_the_same_receipt(fingerprinter, trace):
    made = [Provider(fingerprinter, 16, secret=secret).commit(trace) for secret in (b"x", b"x", b"y", None, None)]
    assert made[0] == made[1] and len({receipt.digest for receipt in made}) == 4


def test_another_number_cannot_be_billed(provider, auditor, trace):
    receipt = provider.commit(trace)
    more = receipt.model_copy(update={"tokens": receipt.tokens + 1})
    record = provider.records[receipt.digest]
    forged = Record(more, record.ids, record.tokens, record.blocks, record.secret)
    provider.records[more.digest] = forged
    found = {auditor.audit(more, trace.answer, provider.open, nonce=f"{i:032x}").verdict for i in range(1)}
    assert found == {"invalid"}


def test_a_provider_opens_what_was_drawn_and_within_its_budget(provider, trace):
    receipt = provider.commit(trace)
    plan = plan_of(receipt.tokens, SETTING, f"{receipt.digest} {NONCE}")
    ask = {"receipt": receipt.digest, "nonce": NONCE, "setting": SETTING}
    opened = provider.open(Request(**ask))
    assert [leaf.position for leaf in opened.leaves] == plan.positions
    assert [leaf.position for leaf in opened.leaves if leaf.id is not None] == plan.ids
    block = provider.open(Request(**ask, block=0))
    assert block.block.position == plan.blocks[0] and all(leaf.id is None for leaf in block.leaves)
    with pytest.raises(InputError, match=f"block 99 of the draw is not among the {len(plan.blocks)} that may be"):
        provider.open(Request(**ask, block=99))
    with pytest.raises(InputError, match="is not from this provider; ask the one who made it"):
        provider.open(Request(**{**ask, "receipt": "00" * 32}))
    with pytest.raises(InputError, match="blocks of 8 tokens are asked for, the receipt has blocks of 16; ask for"):
        provider.open(Request(**{**ask, "setting": SETTING.model_copy(update={"block_size": 8})}))
    for name, value in (("block_size", 0), ("samples", 0), ("exposure_budget", 1.1), ("token_budget", -1)):
        with pytest.raises(ValidationError, match=name):
            AuditSetting.model_validate({**SETTING.model_dump(), name: value})
    greedy = SETTING.model_copy(update={"token_budget": 1.0})
    with pytest.raises(InputError, match=r"4 of \d+ tokens would have been shown, token_budget is 0; ask for fewer"):
        Provider.open(_with_budget(provider, 0.0), Request(**{**ask, "setting": greedy}))


def _with_budget(provider, token_budget):
    provider.token_budget = token_budget
    return provider


def test_the_budget_is_of_all_audits_together(auditor, provider, trace):
    receipt = provider.commit(trace)
    with pytest.raises(
        InputError, match=r"would have been (opened|shown), .* 0.04?; (it cannot|ask)|of this receipt is 0.4; it cannot"
    ):
        for i in range(20):
            auditor.audit(receipt, trace.answer, provider.open, nonce=f"{i:032x}")
    record = provider.records[receipt.digest]
    assert len(record.opened) <= 0.4 * receipt.tokens


def test_a_record_comes_back_and_remembers_what_was_opened(auditor, provider, fingerprinter, trace):
    receipt = provider.commit(trace)
    record = provider.records[receipt.digest]
    record.opened, record.shown = {3, 5}, {5}
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert (
        (again.opened, again.shown) == ({3, 5}, {5}) and again.receipt == receipt and again.token(7) == record.token(7)
    )
    other = Provider(fingerprinter, 16)
    other.records[receipt.digest] = again
    assert auditor.audit(receipt, trace.answer, other.open, nonce=NONCE).verdict == "honest"


def test_a_trace_of_a_generation_is_committed_to(llama, tokenizer):
    text = "<think>so it goes on</think>the sea"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with capture(llama, tokenizer) as cap:
        llama(ids, use_cache=False, logits_to_keep=1)
    made = Fingerprinter(input_embedder(llama, tokenizer), tokenizer)
    provider = Provider(made, 16)
    receipt = provider.commit(cap.trace.with_prompt(0))
    thought = [i for start, stop in cap.trace.with_prompt(0).spans["think"] for i in cap.trace.ids[start:stop].tolist()]
    assert provider.records[receipt.digest].ids == thought and receipt.tokens == len(thought) > 10


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprints_are_unit_vectors_in_whole_numbers(fingerprinter):
    rows = fingerprinter.texts(["abc", "xyz"])
    exact = embed(["abc", "xyz"]).numpy()
    exact = 127 * exact / np.linalg.norm(exact, axis=1, keepdims=True)
    assert rows.dtype == np.int8 and np.abs(rows - exact).max() <= 0.5
    ids = fingerprinter.tokenizer("abcabc", add_special_tokens=False)["input_ids"]
    assert np.array_equal(fingerprinter.tokens(ids)[:3], fingerprinter.tokens(ids)[3:])
    assert np.array_equal(fingerprinter.blocks(ids, 4)[1], fingerprinter.texts(["bc"])[0])


def test_input_embeddings_are_the_mean_over_tokens(llama, tokenizer):
    ids = tokenizer("the sea", add_special_tokens=False)["input_ids"]
    made = input_embedder(llama, tokenizer).embed(["the sea", ""])
    assert torch.allclose(made[0], llama.get_input_embeddings().weight[ids].mean(0), atol=1e-6)
    assert made[1].abs().max() == 0


def test_padding_is_what_its_kind_says(fingerprinter):
    world = traces(20)
    inflater, own = Inflater(fingerprinter, world), world[0]
    ids = fingerprinter.tokenizer(own.reasoning, add_special_tokens=False)["input_ids"]
    for kind in KINDS:
        for ratio in (0.5, 2.0):
            padded = inflater.inflate(own, kind, ratio, 3).reasoning
            assert padded[: len(ids)] == ids and len(padded) == len(ids) + round(ratio * len(ids))
            assert padded == inflater.inflate(own, kind, ratio, 3).reasoning
            spread = inflater.inflate(own, kind, ratio, 3, "spread").reasoning
            assert Counter(spread) == Counter(padded) and spread != padded
    letters = {
        kind: set(fingerprinter.text(inflater.inflate(own, kind, 1.0, 0).reasoning[len(ids) :])) for kind in KINDS
    }
    assert letters["same-topic"] <= set(TOPICS[0] + " ") and not letters["off-topic"] <= set(TOPICS[0] + " ")
    assert letters["reasoning"] <= set(own.reasoning) and letters["prompt"] <= set(own.prompt)
    assert len(letters["random"]) > 40
    assert inflater.inflate(own, "copy", 1.0, 0).reasoning == ids * 2


def test_what_padding_refuses(fingerprinter):
    inflater, own = Inflater(fingerprinter, traces(12)), traces(1)[0]
    with pytest.raises(InputError, match="the kind of padding 'lies' is not known; give one of random, "):
        inflater.inflate(own, "lies", 1.0, 0)
    with pytest.raises(InputError, match="ratio=0 is not allowed"):
        inflater.inflate(own, "copy", 0, 0)
    with pytest.raises(InputError, match="padding from the prompt needs some; the prompt is empty"):
        inflater.inflate(own.model_copy(update={"prompt": ""}), "prompt", 1.0, 0)
    with pytest.raises(InputError, match="padding takes more than 3 other texts"):
        Inflater(fingerprinter, traces(3))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_to_commit_to_is_refused(provider):
    with pytest.raises(InputError, match="there are 0 hidden tokens; a receipt needs at least 1"):
        provider.commit(HiddenReasoning(reasoning="", answer="b"))
    with pytest.raises(InputError, match="the answer ' ' is empty; give the text that the user saw"):
        provider.commit(HiddenReasoning(reasoning="a", answer=" "))
    with pytest.raises(InputError, match="the token 99999 is not in the vocabulary"):
        provider.commit(HiddenReasoning(reasoning=[1, 99999], answer="b"))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda texts: torch.full((len(texts), 4), math.nan), "embeddings that are not finite"),
        (lambda texts: torch.full((len(texts), 4), math.inf), "embeddings that are not finite"),
        (lambda texts: [[1.0] * (1 + i) for i in range(len(texts))], "the embedder 'broken' failed"),
        (lambda texts: torch.ones(len(texts), len(texts)), "embeddings of width 4 after 1; give one that keeps it"),
        (lambda texts: torch.ones(len(texts) + 1, 4), "give a vector \\(width,\\) for each"),
        (lambda texts: torch.ones(len(texts)), "give a vector \\(width,\\) for each"),
    ],
)
def test_embeddings_that_cannot_be_used_are_refused(broken, words, tokenizer):
    provider = Provider(Fingerprinter(Embedder("broken", "1", broken), tokenizer), 16)
    with pytest.raises(InputError, match=words):
        provider.commit(HiddenReasoning(reasoning="a" * 64, answer="b"))
        provider.commit(HiddenReasoning(reasoning="ab" * 64, answer="b"))


def test_another_bill_embedder_tokenizer_version_or_size_is_refused(auditor, provider, trace):
    receipt = provider.commit(trace)

    def refused(words, billed=None, answer=trace.answer, **changes):
        with pytest.raises(InputError, match=words) as found:
            auditor.audit(receipt.model_copy(update=changes), answer, provider.open, billed)
        assert str(found.value).count("; ") == 1

    refused(rf"the bill says 1 tokens, the receipt commits to {receipt.tokens}; ask", billed=1)
    refused(r"the answer '' is empty; give", answer="")
    refused("half a surrogate pair", answer="b\ud800")
    with pytest.raises(InputError, match="the nonce 'x' is not allowed; give 32 to 128 hexadecimal digits"):
        auditor.audit(receipt, trace.answer, provider.open, nonce="x")
    for changes in ({"name": "other"}, {"revision": "2"}):
        refused("the receipt is of the embedder .*; agree on one", embedder=receipt.embedder.model_copy(update=changes))
    refused("the receipt counts tokens of the tokenizer xyz, the auditor has", tokenizer="xyz")
    refused("the receipt has blocks of 32 tokens, the heads were fitted for 16; fit", block_size=32)
    refused("the provider opens 0.1 of the fingerprints, the audit takes 0.4; fit", exposure_budget=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "the receipt has format 2, this version reads 1; update tokenry"),
        ({"format": "1"}, "'format' is .*1"),
        ({"tokens": 0}, "'tokens' is 0, it should be greater than or equal to 1"),
        ({"tokens": 1.5}, "'tokens' is 1.5"),
        ({"hash": "md5"}, "'hash' is .*md5"),
        ({"token_commitment": "zz"}, "'token_commitment' is"),
        ({"more": 1}, "'more' is 1"),
        ({"embedder": {"name": "x"}}, "'embedder.revision' is missing"),
    ],
)
def test_a_receipt_that_is_none_is_refused(change, words, provider, trace):
    value = {**provider.commit(trace).to_json(), **change}
    with pytest.raises(InputError, match=words):
        Receipt.from_json(value)
    for value in (None, [], "x", {}):
        with pytest.raises(InputError):
            Receipt.from_json(value)


def test_a_record_of_another_receipt_is_refused(provider):
    first, second = (provider.commit(trace) for trace in traces(2))
    mixed = {**provider.records[first.digest].to_json(), "receipt": second.to_json()}
    with pytest.raises(InputError, match="does not have the commitments of its receipt"):
        Record.from_json(mixed)
    broken = {**provider.records[first.digest].to_json(), "fingerprints": {}}
    with pytest.raises(InputError, match="the record is damaged"):
        Record.from_json(broken)
    with pytest.raises(InputError, match="field 'secret' is missing"):
        Record.from_json({k: v for k, v in provider.records[first.digest].to_json().items() if k != "secret"})


def test_heads_of_another_embedder_or_setting_are_refused(heads, fingerprinter, llama, tokenizer):
    with pytest.raises(
        InputError, match=r"fitted for fingerprints of 'letters' \(1\), not for the weights 2; fit heads"
    ):
        Auditor(Fingerprinter(Embedder("letters", "2", embed), tokenizer), heads)
    loaded = Loaded(llama, tokenizer)
    with pytest.raises(InputError, match="coin audits with heads that were fitted before; give heads"):
        Coin().auditor(loaded)
    with pytest.raises(InputError, match="calibrated for audits with block_size=16, not 32; give the same options"):
        Coin(heads=heads, block_size=32, samples=4).auditor(loaded)
    with pytest.raises(InputError, match="20 traces are too few; give at least 50"):
        fit_heads(fingerprinter, traces(20), SETTING)
    with pytest.raises(InputError, match="takes 199 honest audits to calibrate, the heads have 24"):
        fit_heads(fingerprinter, traces(60), SETTING, false_alarm=0.01)


def test_a_leaf_that_is_no_base64_is_refused():
    with pytest.raises(InputError, match="the fingerprint at position 3 is no base64"):
        OpenedLeaf(position=3, salt="00", fingerprint="*", proof=[]).leaf  # noqa: B018


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model, and hidden reasoning."""
    from support.families import build

    folder = tmp_path_factory.mktemp("coin")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count, seed in (("honest", 100, 0), ("today", 3, 7)):
        lines = [json.dumps(trace.model_dump()) for trace in traces(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


OPTIONS = ("-o", "embedder=input-embeddings", "-o", "block_size=16", "-o", "samples=4")


def run(place, *args, code=0):
    words = ["judge", "--method", "coin", *OPTIONS, "--model", str(place / "model"), *map(str, args)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_fit_commit_and_audit_on_the_command_line(place, monkeypatch):
    monkeypatch.setattr(training, "STEPS", 20)
    monkeypatch.setattr(training, "VERDICT_STEPS", 40)
    run(place, "fit", place / "honest.jsonl", "--save", place / "heads")
    run(place, "commit", place / "today.jsonl", "--save", place / "bills")
    receipts, records = place / "bills" / "receipts.jsonl", place / "bills" / "records.jsonl"
    assert [json.loads(line)["answer"] for line in receipts.read_text().splitlines()] == [
        t.answer for t in traces(3, 7)
    ]
    heads = ("-o", f"heads={place / 'heads'}")
    found = json.loads(run(place, *heads, "--json", "audit", receipts, records))
    assert len(found) == 3 and all(report["verdict"] in ("honest", "inflated") for report in found)
    seen = [len(json.loads(line)["opened"]) for line in records.read_text().splitlines()]
    assert seen == [round(report["exposed"] * report["tokens"]) for report in found]
    lines = [json.loads(line) for line in receipts.read_text().splitlines()]
    receipts.write_text("".join(json.dumps({**line, "billed": 9}) + "\n" for line in lines))
    assert "the bill says 9 tokens" in run(place, *heads, "audit", receipts, records, code=2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["today.jsonl"], "coin cannot do '.*today.jsonl'; write one of fit, commit, audit before the files"),
        (["commit", "today.jsonl"], "commit needs --save; give a folder"),
        (["commit", "--save", "new"], "commit needs hidden reasoning; give a file of it"),
        (["audit", "today.jsonl"], "audit takes two files, not 1"),
        (["audit", "today.jsonl", "today.jsonl"], "line 1 of .*today.jsonl"),
        (["audit", "--save", "new", "today.jsonl", "today.jsonl"], "--save would have no effect with audit"),
        (["fit", "--trace", "--save", "new", "today.jsonl"], "--trace is for commit; give JSON lines"),
        (["commit", "--pairs", "x", "--save", "new", "today.jsonl"], "--pairs would have no effect with --method coin"),
        (["commit", "--save", "new", "nowhere.jsonl"], "the file of hidden reasoning .* cannot be read"),
    ],
)
def test_what_the_command_line_refuses(args, words, place):
    import re

    given = [str(place / arg) if "." in arg or arg == "new" else arg for arg in args]
    assert re.search(words, run(place, *given, code=2))
    assert not (place / "new").exists()
