"""Learn2PD: the filter by hand, its extremes, the oracle, the end of text, and whole loops against a plain replay."""

import json
import math
import random

import pytest
import torch
from support.denoisers import (
    EOS,
    MASK,
    PAD,
    Characters,
    Scripted,
    V,
    chosen,
    predicted,
    prompts,
    random_filter,
    sharp,
    small,
    state_of,
)
from torch import nn

from tokenry import catalog, load
from tokenry.cli.options import parse_methods
from tokenry.core.errors import InputError
from tokenry.decode import generate
from tokenry.decode.creditdecoding import CreditDecoding, CreditFusion
from tokenry.decode.denoising.blocks import block_values, in_columns
from tokenry.decode.denoising.contract import DiffusionMethod, DiffusionMethods, DiffusionParts
from tokenry.decode.denoising.loop import LengthPolicy, LogitsTransform, MaskedDiffusionModel, diffusion_generate
from tokenry.decode.denoising.oracle import OraclePolicy
from tokenry.decode.denoising.state import DiffusionState, Edit
from tokenry.decode.denoising.unmask import FixedCount, Threshold
from tokenry.decode.learn2pd import EndOfTextTruncation, Learn2PD, LearnedFilter
from tokenry.evidence import learn2pd as experiment
from tokenry.learned.confidence_filter import ConfidenceFilter, TraceDataset
from tokenry.measure.compare import compare
from tokenry.measure.tasks import filters

CACHES = ("none", "prefix", "dual")
NEVER, ALWAYS = -100.0, 100.0


@pytest.fixture(scope="module")
def denoiser():
    return MaskedDiffusionModel(sharp())


def constant(length, logit):
    """A filter that says the same of every position."""
    made = ConfidenceFilter(length)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.layers[2].bias.fill_(logit)
    return made


def threshold_filter(length, tau, k=2.0**20):
    """k (c - tau) of each position alone."""
    made = constant(length, 0.0)
    with torch.no_grad():
        made.layers[0].weight.copy_(torch.eye(length))
        made.layers[2].weight.copy_(k * torch.eye(length))
        made.layers[2].bias.fill_(-k * tau)
    return made


def same(first, second):
    a, b = first.stats, second.stats
    assert first.windows == second.windows
    assert (a.commit_step, a.nfe, a.tokens_processed) == (b.commit_step, b.nfe, b.tokens_processed)
    assert a.commit_confidence == b.commit_confidence


# --- the filter ----------------------------------------------------------------------------------------------------


def test_the_filter_has_2112_parameters():
    assert sum(p.numel() for p in ConfidenceFilter().parameters()) == 2112
    assert sum(p.numel() for p in ConfidenceFilter(4, 3).parameters()) == 4 * 3 + 3 + 3 * 4 + 4


def test_the_filter_by_hand():
    made = ConfidenceFilter(2, 2)
    with torch.no_grad():
        made.layers[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
        made.layers[0].bias.copy_(torch.tensor([0.0, -0.5]))
        made.layers[2].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 3.0]]))
        made.layers[2].bias.copy_(torch.tensor([0.1, 0.2]))
    # relu(0.4 - 0.9) = 0, relu(0.8 - 0.5) = 0.3
    assert made(torch.tensor([[0.4, 0.9]]))[0].tolist() == pytest.approx([0.4, 1.1])


def test_gradients():
    made = ConfidenceFilter(3, 4)
    parameters = [p.detach().double().requires_grad_() for p in made.parameters()]
    conf = torch.rand(5, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))

    def logits(w1, b1, w2, b2):
        return nn.functional.linear(nn.functional.linear(conf, w1, b1).relu(), w2, b2)

    assert torch.autograd.gradcheck(logits, parameters)
    assert torch.allclose(made(conf), logits(*parameters).float(), atol=1e-6)


def test_saved_and_read(tmp_path):
    model = small()
    made = random_filter(6).bind(model)
    made.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"filter.json", "filter.safetensors"}
    again = ConfidenceFilter.load(tmp_path)
    conf = torch.rand(4, 6)
    assert torch.equal(again(conf), made(conf)) and not again.training
    assert again.made_for == made.made_for and again.made_for["temperature"] == 0
    assert (again.block_length, again.hidden) == (6, 6)
    again.check(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(InputError, match=r"trained for .* not for the weights .*; train one for this model"):
        again.check(model)


# --- blocks --------------------------------------------------------------------------------------------------------


def test_blocks_are_read_and_written_in_their_columns():
    """Windows of 5 and 6 in blocks of 4; the first row is in its last, short block."""
    ids, mask = prompts(2, 3)
    state = DiffusionState.begin(Scripted(), ids, mask.bool(), 4, 4)
    state.apply(Edit.resize(state, torch.tensor([5, 6])))
    state.x[0, 3:7] = 7
    state.advance()
    values = torch.arange(18.0).reshape(2, 9)
    assert block_values(values, state, 4, 1.0).tolist() == [[7, 1, 1, 1], [12, 13, 14, 15]]
    columns = in_columns(torch.tensor([[True] * 4, [True, False, True, False]]), state)
    assert columns.nonzero().tolist() == [[0, 7], [1, 3], [1, 5]]


def test_the_filter_sees_committed_positions_and_padding_of_ones():
    class See(ConfidenceFilter):
        def forward(self, conf):
            self.seen = conf
            return super().forward(conf)

    made = See(4)
    state = state_of([None, 5, None], block_length=None)
    state.block_length = 4
    chosen(LearnedFilter(made), state, [0.3, 0.6, 0.9])
    assert made.seen.tolist() == [pytest.approx([0.3, 0.6, 0.9, 1.0])]


@pytest.mark.parametrize(
    ("logit", "accept", "least", "expected"),
    [
        (NEVER, 0.5, 1, [1]),
        (NEVER, 0.5, 2, [1, 3]),
        (NEVER, 0.5, 9, [0, 1, 3]),
        (ALWAYS, 0.99, 1, [0, 1, 3]),
        (1.0, 0.73, 1, [0, 1, 3]),  # sigmoid(1) = 0.731
        (1.0, 0.74, 1, [1]),
    ],
)
def test_what_is_committed(logit, accept, least, expected):
    policy = LearnedFilter(constant(4, logit), accept, least)
    assert chosen(policy, state_of([None, None, 5, None]), [0.2, 0.9, 1.0, 0.3]) == expected


# --- extremes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7])
def test_a_filter_of_each_position_alone_is_threshold_decoding(denoiser, tau, cache):
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 12, "block_length": 6, "cache": cache}
    plain = diffusion_generate(denoiser, ids, mask, unmask=Threshold(tau), **options)
    policy = LearnedFilter(threshold_filter(6, tau), accept_threshold=0.5)
    same(plain, diffusion_generate(denoiser, ids, mask, unmask=policy, **options))
    assert max(plain.stats.nfe) < 12


@pytest.mark.parametrize("cache", CACHES)
def test_extreme_filters(denoiser, cache):
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 4, "cache": cache}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    never = diffusion_generate(denoiser, ids, mask, unmask=LearnedFilter(constant(4, NEVER)), **options)
    same(plain, never)
    assert never.stats.nfe == [12, 12]
    pairs = diffusion_generate(denoiser, ids, mask, unmask=LearnedFilter(constant(4, NEVER), min_per_step=2), **options)
    same(pairs, diffusion_generate(denoiser, ids, mask, unmask=FixedCount(6), **options))
    once = diffusion_generate(denoiser, ids, mask, unmask=LearnedFilter(constant(4, ALWAYS)), **options)
    assert once.stats.nfe == [3, 3]
    assert [[steps.count(i) for i in (1, 2, 3)] for steps in once.stats.commit_step] == [[4, 4, 4]] * 2


def test_a_window_that_is_one_block(denoiser):
    ids, mask = prompts(3, 7)
    runs = [
        diffusion_generate(
            denoiser, ids, mask, gen_length=12, block_length=length, unmask=LearnedFilter(random_filter(12), 0.6)
        )
        for length in (12, None)
    ]
    same(*runs)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("eotp", [False, True])
def test_batch_equals_single(cache, eotp):
    model = MaskedDiffusionModel(sharp(ends=11))
    ids, mask = prompts(3, 7, 5, 4)
    options = {
        "gen_length": 18,
        "block_length": 6,
        "cache": cache,
        "unmask": LearnedFilter(random_filter(6), 0.6),
        "length": EndOfTextTruncation() if eotp else None,
    }
    both = diffusion_generate(model, ids, mask, **options)
    for row, n in enumerate((3, 7, 5, 4)):
        one = diffusion_generate(model, ids[row : row + 1, 7 - n :], **options)
        assert one.windows[0] == both.windows[row]
        assert one.stats.nfe[0] == both.stats.nfe[row]
        assert one.stats.commit_step[0] == both.stats.commit_step[row]
        assert one.stats.tokens_processed[0] == both.stats.tokens_processed[row]
    widths = {len(window) for window in both.windows}
    assert len(widths) > 1 if eotp else widths == {18}
    assert 3 <= min(both.stats.nfe) < 18 or eotp


# --- the oracle ----------------------------------------------------------------------------------------------------


class Steps(OraclePolicy):
    """Keeps the ids before each step."""

    def reset(self, state):
        super().reset(state)
        self.seen = []

    def select(self, prediction, state):
        self.seen.append(state.x.clone())
        return super().select(prediction, state)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [4, 12])
def test_the_oracle_reaches_the_answer_in_no_more_steps(seed, block):
    torch.manual_seed(seed)
    model = small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter)) if parameter.dim() > 1 else None
    model = MaskedDiffusionModel(model)
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 12, "block_length": block}
    plain = diffusion_generate(model, ids, mask, **options)
    oracle = Steps(torch.tensor(plain.windows))
    fast = diffusion_generate(model, ids, mask, unmask=oracle, **options)
    assert fast.windows == plain.windows
    assert all(a <= b for a, b in zip(fast.stats.nfe, plain.stats.nfe)) and sum(fast.stats.nfe) < sum(plain.stats.nfe)
    answer = plain.sequences
    assert all(((x == answer) | (x == MASK)).all() for x in oracle.seen)


def test_the_oracle_commits_all_that_agrees_and_copies_where_it_is_stuck():
    script = [(3, 0.8), (4, 0.4), (5, 0.9), (6, 0.5)]
    changed = [(3, 0.8), (9, 0.4), (5, 0.9), (6, 0.5)]
    answer = torch.tensor([[3, 7, 5, 8]])
    ids, options = torch.tensor([[1, 2]]), {"gen_length": 4}
    out = diffusion_generate(Scripted(script), ids, unmask=OraclePolicy(answer), **options)
    assert out.windows == [[3, 7, 5, 8]] and out.stats.commit_step == [[1, 2, 1, 2]]
    out = diffusion_generate(Scripted(script, changed), ids, unmask=OraclePolicy(answer), **options)
    assert out.windows == [[3, 7, 5, 8]] and out.stats.commit_step == [[1, 3, 1, 3]]  # the second step has changed
    twice = OraclePolicy(torch.tensor([[3, 4, 7, 8]]))
    out = diffusion_generate(Scripted(script), ids, unmask=twice, gen_length=4, block_length=2)
    assert out.stats.commit_step == [[1, 1, 3, 3]]  # a new block is not stuck at once


def test_the_oracle_moves_with_its_columns():
    answer = torch.tensor([[3, 4, EOS, 9, 9, 9]])
    script = [(3, 0.8), (4, 0.6), (EOS, 0.7), (9, 0.5), (7, 0.5), (7, 0.5)]
    out = diffusion_generate(
        Scripted(script, script[:3]),
        torch.tensor([[1, 2]]),
        gen_length=6,
        block_length=2,
        unmask=OraclePolicy(answer),
        length=EndOfTextTruncation(),
    )
    assert out.windows == [[3, 4, EOS]] and out.stats.nfe == [2]


# --- the end of the text -------------------------------------------------------------------------------------------


def cut(tokens, confidence, commit, window=None, min_confidence=0.0):
    """The width of the window after a step that predicts these tokens; `commit` are the positions it commits."""
    state = state_of(window or [None] * len(tokens))
    state.block_length = 2
    policy = EndOfTextTruncation(min_confidence)
    policy.initial(Scripted(), state)
    prediction = predicted(state, confidence)
    prediction.tokens[0, state.start :] = torch.tensor(tokens)
    committed = torch.zeros_like(state.present)
    committed[0, [state.start + i for i in commit]] = True
    edit = policy.edit(prediction, committed, state)
    return None if edit is None else int(edit.gen_length)


def test_the_window_ends_after_the_first_committed_end():
    assert cut([7, EOS, EOS, EOS], [0.5, 0.6, 0.7, 0.9], [0, 1]) == 2
    assert cut([EOS, EOS, 7, EOS], [0.5, 0.6, 0.7, 0.9], [0, 1]) == 1
    assert cut([EOS, EOS, 7, EOS], [0.5, 0.6, 0.7, 0.9], [1], min_confidence=0.95) == 2
    assert cut([7, 7, 7, EOS], [0.5, 0.6, 0.7, 0.9], [1]) is None  # it ends there already


def test_else_after_the_surest_mask_that_predicts_it():
    assert cut([7, EOS, EOS, EOS, 7], [0.5, 0.6, 0.8, 0.7, 0.9], [0]) == 3
    assert cut([7, EOS, EOS, EOS, 7], [0.5, 0.6, 0.7, 0.7, 0.9], [0]) == 3  # of equals the first
    assert cut([7, EOS, EOS, EOS, 7], [0.5, 0.6, 0.8, 0.7, 0.9], [0], [None, None, 5, None, None]) == 4
    assert cut([7, 7, 7, 7], [0.5] * 4, [0]) is None
    assert cut([7, EOS, EOS, 7], [0.5, 0.6, 0.8, 0.7], [0], min_confidence=0.8) == 3
    assert cut([7, EOS, EOS, 7], [0.5, 0.6, 0.8, 0.7], [0], min_confidence=0.81) is None


class Watched(EndOfTextTruncation):
    """Keeps what the window would be without the cut, and checks that the cut keeps its beginning."""

    def initial(self, model, state):
        super().initial(model, state)
        self.uncut, self.cuts = None, 0

    def edit(self, prediction, commit, state):
        if self.uncut is not None:
            kept = state.in_window
            assert torch.equal(state.x[kept], self.uncut[:, : state.x.shape[1]][kept])
            assert torch.equal(state.x[:, : state.start], self.uncut[:, : state.start])
        self.uncut = torch.where(commit, prediction.tokens, state.x)
        edit = super().edit(prediction, commit, state)
        self.cuts += edit is not None
        return edit


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_before_the_cut_stays(cache):
    model = MaskedDiffusionModel(sharp(ends=11))
    ids, mask = prompts(3, 7, 5)
    length = Watched()
    out = diffusion_generate(model, ids, mask, gen_length=18, block_length=6, cache=cache, length=length)
    assert length.cuts and min(map(len, out.windows)) >= 1
    assert torch.equal(out.sequences[:, :7], ids)
    for window in out.windows:
        assert MASK not in window


class NoEnd(LogitsTransform):
    def __call__(self, logits, state):
        logits[..., EOS] = float("-inf")
        return logits


def test_without_a_predicted_end_nothing_changes(denoiser):
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 6, "unmask": Threshold(0.4), "transforms": [NoEnd()]}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    same(plain, diffusion_generate(denoiser, ids, mask, length=EndOfTextTruncation(), **options))


def test_a_minimum_of_one_cuts_only_at_committed_ends():
    model = MaskedDiffusionModel(sharp(ends=11))
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 18, "block_length": 6, "unmask": Threshold(0.4)}
    plain = diffusion_generate(model, ids, mask, **options)
    safe = diffusion_generate(model, ids, mask, length=EndOfTextTruncation(1.0), **options)
    assert any(EOS in window for window in plain.windows)
    assert all(EOS not in window[:-1] for window in safe.windows)
    assert all(a <= b for a, b in zip(safe.stats.tokens_processed, plain.stats.tokens_processed))


# --- narrower windows in caches ------------------------------------------------------------------------------------


class Narrow(LengthPolicy):
    """Takes some columns off each window after the second step."""

    def __init__(self, *less):
        self.less = torch.tensor(less)

    def edit(self, prediction, commit, state):
        return Edit.resize(state, state.gen_length - self.less) if state.forward_calls == 2 else None


class Seen(LogitsTransform):
    def __init__(self):
        self.seen = []

    def __call__(self, logits, state):
        self.seen.append(torch.where(state.in_block[..., None], logits, 0.0))
        return logits


@pytest.mark.parametrize("less", [(5, 5), (5, 2), (0, 7)])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_what_is_cut_off_is_not_seen_from_the_cache(less, cache):
    """With one layer a cache is exact, so the logits must be those of no cache."""
    model, seen = MaskedDiffusionModel(small(layers=1)), {}
    ids, mask = prompts(3, 6)
    for kind in ("none", cache):
        seen[kind] = Seen()
        options = {"length": Narrow(*less), "transforms": [seen[kind]], "cache": kind}
        out = diffusion_generate(model, ids, mask, gen_length=12, block_length=4, **options)
        assert [len(window) for window in out.windows] == [12 - n for n in less]
    for a, b in zip(seen["none"].seen[:4], seen[cache].seen[:4], strict=True):
        assert torch.allclose(a.nan_to_num(neginf=-9), b.nan_to_num(neginf=-9), atol=1e-4)


def test_padding_after_a_narrower_window_is_no_change():
    ids, mask = prompts(2, 3)
    state = DiffusionState.begin(Scripted(), ids, mask.bool(), 6, 3)
    assert Edit.resize(state, torch.tensor([2, 5])).first_change.tolist() == [8, 8]
    assert Edit.resize(state, torch.tensor([2, 8])).first_change.tolist() == [11, 9]
    assert Edit.insert(state, torch.tensor([4, -1]), 2, torch.tensor([5, 5])).first_change.tolist() == [4, 8]


# --- whole loops ---------------------------------------------------------------------------------------------------


class Dice:
    """A predictor whose tokens and confidences depend on the row, the number of its call and the column."""

    shift, mask_token_id, eos_token_id, pad_token_id = False, MASK, EOS, PAD
    device = torch.device("cpu")

    def __init__(self, seeds, width, ends):
        self.seeds, self.width, self.ends, self.model = seeds, width, ends, small()

    def script(self, row, call):
        """(token, confidence) of each position."""
        rng = random.Random(f"{self.seeds[row]} {call}")
        tokens = [EOS if rng.random() < self.ends else rng.randint(0, 12) for _ in range(self.width)]
        return [(token, 0.4 + 0.599 * rng.random()) for token in tokens]

    def predict(self, state, cache=None):
        calls = state.nfe.tolist()
        state.count(0, state.x.shape[1], state.working)
        logits = torch.full((*state.x.shape, V), float("-inf"))
        logits[:, :, 0] = 0.0
        for row in range(len(state.x)):
            for i, (token, p) in enumerate(self.script(row, calls[row])[: state.x.shape[1] - state.start]):
                logits[row, state.start + i] = float("-inf")
                logits[row, state.start + i, token] = math.log(p)
                logits[row, state.start + i, 14:16] = math.log((1 - p) / 2)
        return logits


def replay(script, width, made, accept, least, eotp, min_confidence):
    """One row, in plain Python: the window and the number of calls."""
    w1, b1, w2, b2 = (p.double().tolist() for p in made.parameters())
    length, window, start, calls = made.block_length, [None] * width, 0, 0

    def final(conf):
        inner = [max(0.0, sum(w * c for w, c in zip(row, conf)) + b) for row, b in zip(w1, b1)]
        return [1 / (1 + math.exp(-sum(w * h for w, h in zip(row, inner)) - b)) > accept for row, b in zip(w2, b2)]

    while None in window:
        block = range(start, min(start + length, len(window)))
        masks = [i for i in block if window[i] is None]
        if not masks:
            start += length
            continue
        tokens, conf = zip(*script(calls))
        calls += 1
        accepted = final([*(conf[i] for i in block), *[1.0] * (length - len(block))])
        best = sorted(masks, key=lambda i: (-conf[i], i))[:least]
        committed = [i for i in masks if accepted[i - start] or i in best]
        for i in committed:
            window[i] = tokens[i]
        ends = [i for i in committed if tokens[i] == EOS]
        masked = [i for i, token in enumerate(window) if token is None]
        guessed = [i for i in masked if tokens[i] == EOS and conf[i] >= min_confidence]
        if eotp and ends:
            window = window[: ends[0] + 1]
        elif eotp and guessed:
            window = window[: max(guessed, key=lambda i: (conf[i], -i)) + 1]
    return window, calls


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("eotp", "min_confidence", "ends"),
    [(False, 0.0, 0.1), (True, 0.0, 0.02), (True, 0.8, 0.05), (True, 0.97, 0.1)],
)
def test_loops_equal_a_replay(seed, eotp, min_confidence, ends):
    made, accept, least = random_filter(5, seed), 0.55, 1 + seed % 2
    seeds = [100 * seed + row for row in range(5)]
    model = Dice(seeds, 20, ends)
    ids, mask = prompts(2, 4, 3, 4, 1)
    options = {"gen_length": 20, "block_length": 5, "unmask": LearnedFilter(made, accept, least)}
    out = diffusion_generate(model, ids, mask, length=EndOfTextTruncation(min_confidence) if eotp else None, **options)
    expected = [
        replay(lambda call, row=row: model.script(row, call), 20, made, accept, least, eotp, min_confidence)
        for row in range(5)
    ]
    assert out.windows == [window for window, _ in expected]
    assert out.stats.nfe == [calls for _, calls in expected]
    assert eotp or max(out.stats.nfe) < 20


# --- the method ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    random_filter(4).bind(small()).save(tmp_path)
    return str(tmp_path)


def test_the_method_generates(folder):
    model, tokenizer = small(), Characters()
    method = Learn2PD(filter=folder, accept_threshold=0.6)
    assert method.block_length == 4
    out = method.generate(model, tokenizer, ["abc", "defgh"], max_new_tokens=8)
    direct = diffusion_generate(
        MaskedDiffusionModel(model),
        **tokenizer(["abc", "defgh"]),
        gen_length=8,
        block_length=4,
        unmask=LearnedFilter(random_filter(4), 0.6),
        length=EndOfTextTruncation(),
        tokenizer=tokenizer,
    )
    same(out, direct)
    assert out.texts == direct.texts
    off = Learn2PD(filter=folder, eotp=False, min_per_step=3, accept_threshold=0.9).parts(8)
    assert off.length is None and off.unmask.min_per_step == 3 and off.unmask.accept_threshold == 0.9
    assert Learn2PD(filter=folder, eotp_min_confidence=0.9).parts(8).length.min_confidence == 0.9


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("order", [0, 1])
def test_credit_and_filter_act_together(folder, cache, order):
    model, tokenizer = small(), Characters()
    methods = [CreditDecoding(alpha=2.0), Learn2PD(filter=folder, accept_threshold=0.6, cache=cache)]
    out = generate(model, tokenizer, ["abc", "defgh"], methods=methods[:: 1 - 2 * order], max_new_tokens=12, chat=False)
    direct = diffusion_generate(
        MaskedDiffusionModel(model),
        **tokenizer(["abc", "defgh"]),
        gen_length=12,
        block_length=4,
        unmask=LearnedFilter(random_filter(4), 0.6),
        transforms=[CreditFusion(alpha=2.0)],
        length=EndOfTextTruncation(),
        cache=cache,
    )
    same(out, direct)
    alone = generate(model, tokenizer, ["abc", "defgh"], methods=methods[1:], max_new_tokens=12, chat=False)
    assert alone.stats.commit_confidence != out.stats.commit_confidence


def test_the_filter_sees_what_credit_has_made_of_the_confidences(denoiser):
    """A threshold filter behind credit is a threshold behind credit."""
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 6}
    runs = [
        diffusion_generate(denoiser, ids, mask, unmask=unmask, transforms=[CreditFusion(alpha=1.5)], **options)
        for unmask in (Threshold(0.6), LearnedFilter(threshold_filter(6, 0.6), 0.5))
    ]
    same(*runs)


def test_the_catalogue_has_it_in_two_stages():
    assert catalog.load("learn2pd") is Learn2PD
    decode, train = (catalog.get("learn2pd", stage) for stage in ("decode", "train"))
    assert (decode.stage, train.stage) == ("decode", "train") and catalog.get("learn2pd") is decode
    assert catalog.get("learn2pd", "read") is decode
    assert catalog.find("windows that end with the text, learned filter")[0] is decode
    assert catalog.find("train a filter from prompts alone")[0] is train
    assert [type(m).__name__ for m in parse_methods(["learn2pd"], [], "train")] == ["Learn2PDTraining"]
    with pytest.raises(InputError, match="learn2pd belongs to the stage 'decode'"):
        parse_methods(["learn2pd"], [], "select")
    with pytest.raises(InputError, match="learn2pd needs the option 'filter'"):
        parse_methods(["learn2pd"], [], "decode")


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, float("nan")])
def test_accept_thresholds_are_refused(folder, value):
    with pytest.raises(InputError, match=r"accept_threshold=.* not allowed"):
        LearnedFilter(ConfidenceFilter(4), value)
    with pytest.raises(InputError, match=r"accept_threshold=.* not allowed"):
        Learn2PD(filter=folder, accept_threshold=value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedFilter(ConfidenceFilter(4), min_per_step=0), "min_per_step=0"),
        (lambda: EndOfTextTruncation(-0.1), "min_confidence=-0.1"),
        (lambda: EndOfTextTruncation(1.1), r"min_confidence=1.1 .*\[0, 1\]"),
        (lambda: ConfidenceFilter(0), "block_length=0"),
        (lambda: ConfidenceFilter(4, 0), "hidden=0"),
        (lambda: ConfidenceFilter(32)(torch.rand(2, 16)), "filter was trained for blocks of 32, not 16"),
        (lambda: ConfidenceFilter(4).save("/nowhere"), "belongs to no model yet"),
        (lambda: ConfidenceFilter.load("/nowhere"), "there is no filter in '/nowhere'"),
        (lambda: Learn2PD(filter="/nowhere"), "learn2pd: there is no filter in '/nowhere'"),
        (lambda: Learn2PD(filter=3), "filter=3 is not allowed"),
    ],
)
def test_parameters_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_another_block_length_is_refused(denoiser, folder):
    ids, _ = prompts(3)
    with pytest.raises(InputError, match="filter was trained for blocks of 4, the window has blocks of 6"):
        diffusion_generate(denoiser, ids, gen_length=12, block_length=6, unmask=LearnedFilter(ConfidenceFilter(4)))
    with pytest.raises(InputError, match="filter was trained for blocks of 16, the window has blocks of 12"):
        diffusion_generate(denoiser, ids, gen_length=12, block_length=None, unmask=LearnedFilter(ConfidenceFilter(16)))
    with pytest.raises(InputError, match="filter was trained for blocks of 4, block_length is 8; leave it out"):
        Learn2PD(filter=folder, block_length=8)
    with pytest.raises(InputError, match="different values of block_length"):
        DiffusionMethods([Learn2PD(filter=folder), CreditDecoding(block_length=8)]).options(8)


def test_another_model_and_drawn_tokens_are_refused(folder):
    method, other = Learn2PD(filter=folder), small()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(InputError, match="train one for this model"):
        method.generate(other, Characters(), "abc", max_new_tokens=8)
    with pytest.raises(InputError, match="trained at temperature 0; decode with do_sample=False"):
        method.generate(small(), Characters(), "abc", max_new_tokens=8, do_sample=True)
    with pytest.raises(InputError, match="temperature 0"):
        generate(small(), Characters(), "abc", methods=[CreditDecoding(), method], max_new_tokens=8, do_sample=True)


def test_damaged_filters_are_refused(tmp_path):
    ConfidenceFilter(4).bind(small()).save(tmp_path)
    header = json.loads((tmp_path / "filter.json").read_text())
    (tmp_path / "filter.json").write_text(json.dumps({**header, "format": 9}))
    with pytest.raises(InputError, match="format 9, this version reads 1; update"):
        ConfidenceFilter.load(tmp_path)
    (tmp_path / "filter.json").write_text(json.dumps({**header, "hidden": 5}))
    with pytest.raises(InputError, match="no filter"):
        ConfidenceFilter.load(tmp_path)
    (tmp_path / "filter.json").write_text("{")
    with pytest.raises(InputError, match="no filter"):
        ConfidenceFilter.load(tmp_path)


def test_a_model_without_end_of_text_is_refused(folder):
    model = small()
    model.config.eos_token_id = None
    with pytest.raises(InputError, match=r"no end-of-text token to cut windows at; .* eotp=False"):
        diffusion_generate(MaskedDiffusionModel(model), prompts(3)[0], gen_length=4, length=EndOfTextTruncation())


def test_answers_of_another_shape_are_refused(denoiser):
    with pytest.raises(InputError, match=r"reference has shape \(1, 5\), the windows \(1, 4\)"):
        diffusion_generate(denoiser, prompts(3)[0], gen_length=4, unmask=OraclePolicy(torch.zeros(1, 5)))


def test_two_length_policies_are_refused(folder):
    class Other(DiffusionMethod):
        def parts(self, max_new_tokens):
            return DiffusionParts(length=LengthPolicy())

    Other.slug = "other"
    with pytest.raises(InputError, match="both decide how wide the window is; use one of them, or switch it off in"):
        DiffusionMethods([Learn2PD(filter=folder), Other()]).options(8)
    assert DiffusionMethods([Learn2PD(filter=folder, eotp=False), Other()]).options(8)["unmask"] is not None


# --- the comparison ------------------------------------------------------------------------------------------------


def test_the_regression_knows_no_context():
    made = filters.OwnConfidence(4)
    with torch.no_grad():
        made.weight.fill_(2.0)
    conf = torch.tensor([[0.2, 0.5, 0.9, 1.0]])
    other = torch.tensor([[0.2, 0.1, 0.9, 0.3]])
    assert torch.equal(made(conf)[:, [0, 2]], made(other)[:, [0, 2]]) and (made(conf) != made(other)).sum() == 2
    assert made(conf)[0].diff().min() > 0 and made(conf).isfinite().all()


def test_the_threshold_of_equal_error():
    conf = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.99]])
    label = torch.tensor([[True, True, False, True, False, False]])
    traces = TraceDataset(conf, label, torch.tensor([[True] * 5 + [False]]), torch.tensor([0]))
    found = [filters.threshold_of_equal_error(traces, wrong) for wrong in (0.0, 0.25, 0.3, 0.4)]
    assert found == pytest.approx([0.8, 0.6, 0.6, 0.5])
    nothing = traces._replace(label=torch.zeros_like(label))
    assert filters.threshold_of_equal_error(nothing, 0.1) == 1.0


def test_the_oracle_of_the_comparison_finds_its_answers(denoiser):
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 6}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    oracle = diffusion_generate(denoiser, ids, mask, unmask=filters.PlainOracle(denoiser), **options)
    assert oracle.windows == plain.windows and sum(oracle.stats.nfe) < sum(plain.stats.nfe)
    for share, steps in ((0.0, 12), (1.0, 2)):
        out = diffusion_generate(denoiser, ids, mask, unmask=filters.AtRandom(share), **options)
        assert out.stats.nfe == [steps] * 2


def test_the_comparison_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "PROMPTS", 60)
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    monkeypatch.setattr(experiment, "EPOCHS", 200)
    model, tokenizer = load("zoo/denoiser")
    made = experiment.build(model, tokenizer, samples=3, seeds=(0,))
    kept = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert len(kept) == 7 and [s.name for s in made.arms].count(experiment.PLAIN) == 1
    again = experiment.build(model, tokenizer, samples=3, seeds=(0,))
    assert again.notes == made.notes and kept == sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    comparison = compare(made)
    assert comparison.mean(experiment.PLAIN, "forward_passes") == 32
    assert comparison.mean(experiment.ORACLE, "exact") == comparison.mean(experiment.PLAIN, "exact")
    findings = made.findings(comparison)
    assert len(findings) == 7 and all(f.numbers for f in findings)
    with pytest.raises(InputError, match="trains its own filters"):
        experiment.build(model, tokenizer, method=object())
