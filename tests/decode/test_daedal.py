"""DAEDAL: the confidence by hand, both stages on scripted predictors, and whole loops against a plain reference."""

import json
import math
import warnings
import zlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import EOS, MASK, PAD, Characters, Remember, V, predicted, prompts, small, state_of

import tokenry
from tokenry import InputError, catalog
from tokenry.cli import main
from tokenry.data.puzzles import Listing
from tokenry.decode import generate
from tokenry.decode.creditdecoding import CreditDecoding, CreditFusion
from tokenry.decode.daedal import Daedal
from tokenry.decode.denoising.growth import DaedalLength, eos_confidence
from tokenry.decode.denoising.loop import MaskedDiffusionModel, diffusion_generate
from tokenry.decode.denoising.state import FRESH
from tokenry.decode.denoising.unmask import Threshold
from tokenry.evidence import daedal as experiment
from tokenry.measure.compare import compare
from tokenry.measure.report import render
from tokenry.measure.tasks.denoising import WindowTask
from tokenry.models.load import Loaded


def sharp(layers=3):
    """A random model that is sure of some tokens."""
    model = small(layers)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    return model


@pytest.fixture(scope="module")
def denoiser():
    return MaskedDiffusionModel(sharp())


class Told:
    """A predictor that says, of prompt and window of each row, the logits (time, V) of all their columns."""

    shift, mask_token_id, eos_token_id, pad_token_id = False, MASK, EOS, PAD
    device = torch.device("cpu")

    def __init__(self, say):
        self.say, self.seen, self.counted = say, [], []
        self.model = small()

    def predict(self, state, cache=None, rows=None):
        rows = state.working if rows is None else rows
        state.count(0, state.x.shape[1], rows)
        logits = torch.zeros(*state.x.shape, V)
        texts = [x[real].tolist() for x, real in zip(state.x, state.present)]
        for row, (text, real) in enumerate(zip(texts, state.present)):
            logits[row, real] = self.say(text, len(text) - int(state.gen_length[row]))
        self.seen.append(texts)
        self.counted.append(rows.tolist())
        return logits


def speak(window, prompt):
    """Logits of these (token, probability) in the window; all others share the rest, but for the mask token."""
    logits = torch.zeros(prompt + len(window), V)
    logits[:, MASK] = float("-inf")
    for i, (token, p) in enumerate(window):
        logits[prompt + i, :MASK] = torch.tensor((1 - p) / (V - 2) + 1e-30).log()
        logits[prompt + i, token] = torch.tensor(p).log()
    return logits


def window_of(text, prompt=2):
    return text[prompt:]


# --- the confidence in the end -------------------------------------------------------------------------------------


def test_confidence_by_hand():
    """W = 4: the last four are EOS .9, EOS .8 and two others."""
    logits = speak([(3, 0.9), (4, 0.8), (EOS, 0.9), (5, 0.7), (EOS, 0.8)], 2)[None]
    c = eos_confidence(logits, 2, torch.tensor([5]), EOS, 4)
    assert c.tolist() == pytest.approx([(0.9 + 0.8) / 4])


def test_confidence_counts_the_last_ones_and_skips_others():
    window = [(EOS, 0.5), (EOS, 0.6), (3, 0.9), (EOS, 0.7), (4, 0.9), (EOS, 0.8)]
    logits = speak(window, 2)[None]
    width = torch.tensor([6])
    found = [eos_confidence(logits, 2, width, EOS, w).item() for w in (1, 2, 3, 4, 5, 8)]
    assert found == pytest.approx([0.8, 1.5 / 2, 2.1 / 3, 2.6 / 4, 2.6 / 5, 2.6 / 8])
    assert eos_confidence(logits, 2, torch.tensor([4]), EOS, 2).item() == pytest.approx((0.7 + 0.6) / 2)
    assert eos_confidence(logits, 4, torch.tensor([4]), EOS, 4).item() == pytest.approx((0.8 + 0.7) / 4)


def test_a_row_reads_its_own_window():
    logits = torch.cat([speak([(EOS, 0.9)] * 4, 2)[None], speak([(EOS, 0.5), *[(EOS, 0.9)] * 3], 2)[None]])
    c = eos_confidence(logits, 2, torch.tensor([2, 1]), EOS, 2)
    assert c.tolist() == pytest.approx([0.9, 0.25])


# --- the first stage -----------------------------------------------------------------------------------------------


def ends_at(width, token=3, p=0.95):
    """Says end-of-text in the last 8 positions of windows that are at least this wide."""

    def say(text, prompt):
        n = len(text) - prompt
        ends = 8 if n >= width else 0
        return speak([(token, p)] * (n - ends) + [(EOS, p)] * ends, prompt)

    return say


def run(model, ids=((1, 2),), mask=None, gen_length=8, block_length=None, tau=0.9, **options):
    length = DaedalLength(**options)
    ids = torch.tensor(ids)
    out = diffusion_generate(
        model, ids, mask, gen_length=gen_length, block_length=block_length, unmask=Threshold(tau), length=length
    )
    return out, length.trace


def test_windows_grow_until_their_end_is_certain():
    model = Told(ends_at(32))
    out, trace = run(model, maximum=64, expansion_factor=4, eos_check_tokens=8)
    widths = [n.item() for n in trace.gen_length]
    assert widths == [8, 12, 16, 20, 24, 28, 32, 36]
    assert [c.item() for c in trace.eos_confidence] == pytest.approx([0.0] * 6 + [0.95] * 2)
    assert all(i.item() == -1 for i in trace.inserted)
    assert [len(window_of(text)) for (text,) in model.seen] == widths
    assert all(set(window_of(text)) == {MASK} for (text,) in model.seen[:-1])
    assert window_of(model.seen[-1][0]) == [MASK] * 32 + [EOS] * 4
    assert out.windows == [[3] * 28 + [EOS] * 8] and out.new_ids == [[3] * 28]
    assert out.stats.commit_step == [[8] * 32 + [0] * 4] and out.stats.nfe == [8]
    assert out.stats.tokens_processed == [sum(widths) + 2 * 8]


@pytest.mark.parametrize(("tail", "after"), [("eos", [EOS] * 3), ("mask", [MASK] * 3), ("none", [])])
def test_what_comes_after_a_window_that_has_grown(tail, after):
    model = Told(ends_at(12))
    _, trace = run(model, maximum=64, expansion_factor=4, eos_check_tokens=7, tail=tail)
    assert window_of(model.seen[2][0]) == [MASK] * 12 + after
    assert [n.item() for n in trace.gen_length][:3] == [8, 12, 12 + len(after)]


def test_windows_end_at_the_maximum():
    """The last step, and the tail, give what is left of it; a window of the maximum is not asked again."""
    model = Told(ends_at(99))
    with pytest.warns(UserWarning, match="grown to maximum=13"):
        _, trace = run(model, maximum=13, expansion_factor=4, eos_check_tokens=8)
    assert [n.item() for n in trace.gen_length] == [8, 12, 13]
    model = Told(ends_at(12))
    run(model, maximum=13, expansion_factor=4, eos_check_tokens=8)
    assert window_of(model.seen[2][0]) == [MASK] * 12 + [EOS]


def test_rows_grow_alone():
    """A row stops at 12, another at 20; forwards count for the row that is still growing."""

    def say(text, prompt):
        return ends_at(12 if text[0] == 1 else 20)(text, prompt)

    model = Told(say)
    out, trace = run(model, ids=((1, 2), (5, 6)), maximum=64, expansion_factor=4, eos_check_tokens=8, eos_threshold=0.7)
    assert [n.tolist() for n in trace.gen_length] == [[8, 8], [12, 12], [12, 16], [12, 20], [16, 24]]
    assert model.counted == [[True, True], [True, True], [False, True], [False, True], [True, True]]
    assert [len(w) for w in out.windows] == [16, 24] and out.stats.nfe == [3, 5]


def test_a_row_that_is_wide_enough_stays_so():
    """Whatever the predictor says when it is asked again for others."""
    calls = []

    def say(text, prompt):
        calls.append(text[0])
        certain = text[0] == 1 and calls.count(1) == 1
        return ends_at(0 if certain or len(text) > 16 else 99)(text, prompt)

    _, trace = run(Told(say), ids=((1, 2), (5, 6)), maximum=64, expansion_factor=4, eos_check_tokens=8, tail="none")
    assert [n.tolist() for n in trace.gen_length[:4]] == [[8, 8], [8, 12], [8, 16], [8, 16]]


def test_comparisons_are_strict():
    """c is exactly .5 with 8 of 16 positions and probability 1."""

    def say(text, prompt):
        return ends_at(0, p=1.0)(text, prompt)

    options = {"maximum": 64, "expansion_factor": 4, "eos_check_tokens": 16, "tail": "none"}
    _, trace = run(Told(say), gen_length=12, eos_threshold=0.5, **options)
    assert len(trace.gen_length) == 1 + 1 and trace.eos_confidence[0].item() == pytest.approx(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, trace = run(Told(say), gen_length=12, eos_threshold=0.51, **options)
    assert trace.gen_length[-1].item() == 64


# --- the second stage ----------------------------------------------------------------------------------------------

KEEP = {"eos_threshold": 0.0, "tail": "none"}  # no first stage


def scripted(*calls):
    """A predictor that says these windows, call by call, the last one again and again; 3 surely where they end."""
    said = []

    def say(text, prompt):
        said.append(calls[min(len(said), len(calls) - 1)])
        n = len(text) - prompt
        return speak((said[-1] + [(3, 0.95)] * n)[:n], prompt)

    return Told(say)


def test_an_insertion_with_factor_four_adds_three():
    model = scripted(
        [(3, 0.95), (4, 0.3), (5, 0.2), (6, 0.95)],
        [(3, 1.0), (7, 0.95), (8, 0.95), (9, 0.95), (10, 0.95), (11, 0.95), (6, 1.0)],
    )
    out, trace = run(model, gen_length=4, maximum=16, expansion_factor=4, low_conf=0.4, **KEEP)
    assert window_of(model.seen[1][0]) == [3, MASK, MASK, MASK, MASK, MASK, 6]
    assert out.windows == [[3, 7, 8, 9, 10, 11, 6]] and out.stats.nfe == [2]
    assert out.stats.commit_step == [[1, 2, 2, 2, 2, 2, 1]]
    assert [i.item() for i in trace.inserted] == [2, -1] and [n.item() for n in trace.gen_length] == [4, 7]


def test_one_mask_at_a_time_and_not_the_one_that_is_committed():
    """Nothing passes the threshold: the best one is committed, and the least of the others gives way."""
    model = scripted([(3, 0.35), (4, 0.3), (5, 0.3), (6, 0.34)], [(3, 0.95)] * 5)
    run(model, gen_length=4, maximum=16, expansion_factor=2, low_conf=0.4, **KEEP)
    assert window_of(model.seen[1][0]) == [3, MASK, MASK, MASK, MASK]  # ties go to the lower column: that of token 4
    alone = scripted([(3, 0.35)])
    out, trace = run(alone, gen_length=1, maximum=16, expansion_factor=2, low_conf=0.4, **KEEP)
    assert out.windows == [[3]] and trace.inserted[0].item() == -1


@pytest.mark.parametrize(
    ("change", "inserted"),
    [
        ({}, 1),
        ({"low_conf": 0.3}, -1),  # strictly below
        ({"low_conf": 0.0}, -1),
        ({"expand_eos_threshold": 0.4}, -1),  # c is 0.45: one of two end-of-text tokens, with 0.9
        ({"expand_eos_threshold": 0.46}, 1),
        ({"maximum": 3}, -1),
    ],
)
def test_when_a_mask_gives_way(change, inserted):
    options = {"maximum": 16, "expansion_factor": 2, "low_conf": 0.31, "eos_check_tokens": 2, **KEEP, **change}
    model = scripted([(3, 0.95), (4, 0.3), (EOS, 0.9)], [(3, 0.95)] * 4)
    _, trace = run(model, gen_length=3, **options)
    assert trace.inserted[0].item() == inserted and trace.eos_confidence[0].item() == pytest.approx(0.45)


def test_insertions_need_less_than_the_bounds():
    """Exact numbers: a confidence or a c at its bound is not below it."""
    state = state_of([None, None])
    length = DaedalLength(maximum=9, low_conf=0.25, expand_eos_threshold=0.5)
    found = []
    for confidence, c in ((0.25, 0.0), (0.24, 0.5), (0.24, 0.49)):
        prediction = predicted(state, [0.3, confidence])
        found.append(length.insertions(prediction, torch.zeros_like(state.masked), state, torch.tensor([c])).item())
    assert found == [FRESH, FRESH, 3]


def test_only_the_block_is_looked_at():
    model = scripted([(3, 0.95), (4, 0.4), (5, 0.1), (6, 0.1)], [(3, 0.95)] * 5)
    _, trace = run(model, gen_length=4, block_length=2, maximum=16, expansion_factor=2, low_conf=0.5, **KEEP)
    assert trace.inserted[0].item() == 1
    assert window_of(model.seen[1][0]) == [3, MASK, MASK, MASK, MASK]


def test_what_an_insertion_pushes_out_of_the_block_falls_to_the_next():
    """Blocks of two: after an insertion at 1 with factor 3 the first block is done when its two columns are."""
    model = scripted(
        [(3, 0.95), (4, 0.2), (5, 0.95)],
        [(3, 1.0), (6, 0.95), (7, 0.95), (8, 0.95), (5, 0.95)],
    )
    out, _ = run(model, gen_length=3, block_length=2, maximum=9, expansion_factor=3, low_conf=0.4, **KEEP)
    assert out.windows == [[3, 6, 7, 8, 5]] and out.stats.commit_step == [[1, 2, 3, 3, 4]]


def test_two_rows_insert_in_different_calls():
    def say(text, prompt):
        n, left = len(text) - prompt, text.count(MASK)
        unsure = left == (2 if text[0] == 1 else 3)
        window = [(3 + i, 0.5) for i in range(n)]
        if n == 4 and unsure:
            window[3] = (9, 0.2)
        return speak(window, prompt)

    out, trace = run(
        Told(say), ids=((1, 2), (5, 6)), gen_length=4, tau=1.0, maximum=16, expansion_factor=3, low_conf=0.3, **KEEP
    )
    assert [i.tolist() for i in trace.inserted][:4] == [[-1, -1], [-1, 3], [3, -1], [-1, -1]]
    assert [n.tolist() for n in trace.gen_length][:4] == [[4, 4], [4, 4], [4, 6], [6, 6]]
    assert [len(w) for w in out.windows] == [6, 6] and out.stats.nfe == [6, 6]


def test_the_tail_is_cut_at_the_maximum():
    """Five columns, at most six: an insertion of three masks pushes a committed token out, and none follows."""
    model = scripted(
        [(3, 0.95), (4, 0.2), (5, 0.95), (6, 0.95), (7, 0.95)],
        [(3, 1.0), (8, 0.1), (9, 0.2), (10, 0.3), (5, 1.0), (6, 1.0)],
    )
    out, trace = run(model, gen_length=5, maximum=6, expansion_factor=3, low_conf=0.4, **KEEP)
    assert window_of(model.seen[1][0]) == [3, MASK, MASK, MASK, 5, 6]
    assert out.windows == [[3, 8, 9, 10, 5, 6]] and [i.item() for i in trace.inserted] == [1, -1, -1, -1]


def test_the_cut_may_hit_the_new_masks():
    model = scripted([(3, 0.95), (4, 0.95), (5, 0.2), (6, 0.3)], [(3, 1.0)] * 5)
    run(model, gen_length=4, maximum=5, expansion_factor=4, low_conf=0.4, tau=0.9, **KEEP)
    assert window_of(model.seen[1][0]) == [3, 4, MASK, MASK, MASK]


# --- neutral -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("neutral", [{"eos_threshold": 0.0, "low_conf": 0.0, "tail": "none"}, {"maximum": 12}])
def test_neutral_settings_are_threshold_decoding(denoiser, neutral, cache):
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 12, "block_length": 4, "unmask": Threshold(0.6), "cache": cache}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    same = diffusion_generate(denoiser, ids, mask, length=DaedalLength(**neutral), **options)
    assert torch.equal(same.sequences, plain.sequences)
    plain.stats.seconds = same.stats.seconds = 0
    assert same.stats == plain.stats


# --- against a reference -------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """The page's pseudo code for one row, in lists of numbers."""

    say: object
    maximum: int
    block: int
    factor: int
    high: float
    low: float
    eos_threshold: float
    expand_threshold: float
    window: int
    tail: str
    forwards: int = 0
    grown: list = field(default_factory=list)  # widths at the forwards of the first stage
    steps: list = field(default_factory=list)  # (width, c, inserted position) at those of the second one

    def probabilities(self, x, prompt):
        self.forwards += 1
        rows = []
        for logits in self.say(x, prompt).double().tolist():
            top = max(logits)
            weights = [math.exp(value - top) for value in logits]
            rows.append([w / sum(weights) for w in weights])
        return rows

    def confidence(self, p, prompt):
        found = []
        for row in reversed(p[prompt:]):
            if row.index(max(row)) == EOS and len(found) < self.window:
                found.append(row[EOS])
        return sum(found) / self.window

    def first(self, prompt, width):
        while self.eos_threshold > 0 and width < self.maximum:
            x = prompt + [MASK] * width
            c = self.confidence(self.probabilities(x, len(prompt)), len(prompt))
            self.grown.append(width)
            if not c < self.eos_threshold:
                break
            width = min(width + self.factor, self.maximum)
        more = 0 if self.tail == "none" else min(width + self.window // 2, self.maximum) - width
        return prompt + [MASK] * width + [EOS if self.tail == "eos" else MASK] * more

    def generate(self, prompt, width):
        x, cur, start = self.first(prompt, width), len(prompt), len(prompt)
        while cur < len(x):
            block = range(cur, min(cur + self.block, len(x)))
            if all(x[i] != MASK for i in block):
                cur += self.block
                continue
            width = len(x) - start
            p = self.probabilities(x, start)
            token = [row.index(max(row)) for row in p]
            conf = [max(row) for row in p]
            masks = [i for i in block if x[i] == MASK]
            fill = [i for i in masks if conf[i] > self.high] or [max(masks, key=lambda i: conf[i])]
            c, inserted = self.confidence(p, start), None
            unsure = [i for i in masks if i not in fill and conf[i] < self.low]
            if c < self.expand_threshold and width < self.maximum and unsure:
                inserted = min(unsure, key=lambda i: conf[i])
            for i in fill:
                x[i] = token[i]
            if inserted is not None:
                x[inserted : inserted + 1] = [MASK] * self.factor
                del x[start + min(width + self.factor - 1, self.maximum) :]
            self.steps.append((width, c, -1 if inserted is None else inserted - start))
        return x[start:]


def dreamer(seed):
    """Random logits that depend on all the tokens of a row; most rows end somewhere, some of them unsurely."""

    def say(text, prompt):
        generator = torch.Generator().manual_seed(zlib.crc32(bytes(text)) + seed)
        logits = torch.randn(len(text), V, generator=generator)
        logits *= 6 * torch.rand(len(text), 1, generator=generator)
        own = torch.Generator().manual_seed(zlib.crc32(bytes(text[:prompt])) + seed)
        end, lead = int(torch.randint(2, 30, (1,), generator=own)), 12 * torch.rand(1, generator=own)
        logits[prompt + end :, EOS] += lead
        logits[:, MASK] = float("-inf")
        return logits

    return say


class Counting(Threshold):
    """Threshold that counts what it commits, also what is cut off later (batch,)."""

    def reset(self, state):
        self.committed = torch.zeros_like(state.gen_length)

    def select(self, prediction, state):
        commit = super().select(prediction, state)
        self.committed += commit.sum(1)
        return commit


SETTINGS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "width": st.integers(1, 10),
        "room": st.integers(0, 22),
        "block": st.sampled_from([1, 3, 4, 8, 100]),
        "factor": st.integers(2, 5),
        "high": st.sampled_from([0.3, 0.6, 0.9]),
        "low": st.sampled_from([0.0, 0.2, 0.5, 0.95]),
        "eos_threshold": st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
        "expand_threshold": st.sampled_from([0.0, 0.4, 0.9, 1.0]),
        "window": st.integers(1, 8),
        "tail": st.sampled_from(["eos", "mask", "none"]),
    }
)


def loop_of(s):
    """The shared loop on a dreamer: predictor, output, length policy, unmask policy, prompts."""
    ids, mask = prompts(*s["lengths"])
    model, unmask = Told(dreamer(s["seed"])), Counting(s["high"])
    maximum = s["width"] + s["room"]
    length = DaedalLength(
        maximum, s["factor"], s["low"], s["eos_threshold"], s["expand_threshold"], s["window"], s["tail"]
    )
    options = {"gen_length": s["width"], "block_length": s["block"], "unmask": unmask, "length": length}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = diffusion_generate(model, ids, mask, **options)
    return model, out, length, unmask, [row[real.bool()].tolist() for row, real in zip(ids, mask)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(SETTINGS)
def test_the_loop_is_the_pseudo_code(s):
    _, out, length, _, texts = loop_of(s)
    names = ("block", "factor", "high", "low", "eos_threshold", "expand_threshold", "window", "tail")
    trace, expected = length.trace, []
    for text in texts:
        reference = Reference(dreamer(s["seed"]), s["width"] + s["room"], *(s[name] for name in names))
        expected.append((reference, reference.generate(text, s["width"])))
    rounds = max(len(reference.grown) for reference, _ in expected)
    for row, (reference, window) in enumerate(expected):
        assert out.windows[row] == window and out.stats.nfe[row] == reference.forwards
        assert [n[row].item() for n in trace.gen_length][: len(reference.grown)] == reference.grown
        for i, (width, c, inserted) in enumerate(reference.steps, start=rounds):
            assert trace.gen_length[i][row] == width and trace.inserted[i][row] == inserted
            assert trace.eos_confidence[i][row].item() == pytest.approx(c, abs=1e-5)
    assert len(trace.inserted) == rounds + max(len(reference.steps) for reference, _ in expected)


def committed(text):
    return [token for token in text if token != MASK]


def is_subsequence(short, long):
    rest = iter(long)
    return all(token in rest for token in short)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SETTINGS)
def test_what_is_committed_stays_in_order(s):
    model, out, length, unmask, texts = loop_of(s)
    maximum = s["width"] + s["room"]
    rounds = sum(1 for text in model.seen if all(set(window) <= {MASK} for window in _windows(text, texts)))
    for row, prompt in enumerate(texts):
        ended = prompt + out.windows[row]
        states = [*(seen[row] for seen in model.seen), ended]
        for before, after in pairwise(states):
            assert after[: len(prompt)] == prompt and len(after) - len(prompt) <= maximum
            assert len(after) >= len(before)
            kept = committed(before)
            while len(after) - len(prompt) == maximum and not is_subsequence(kept, committed(after)):
                kept.pop()  # cut off at the end
            assert len(kept) >= len(prompt) and is_subsequence(kept, committed(after))
        assert MASK not in ended and out.stats.nfe[row] <= rounds + unmask.committed[row]
    assert all((n <= maximum).all() for n in length.trace.gen_length)


def _windows(rows, texts):
    return [row[len(prompt) :] for row, prompt in zip(rows, texts)]


# --- with other parts ----------------------------------------------------------------------------------------------

LIVELY = {
    "maximum": 28,
    "expansion_factor": 3,
    "low_conf": 0.3,
    "eos_threshold": 0.0,
    "expand_eos_threshold": 1.0,
    "eos_check_tokens": 4,
}


def lively(denoiser, ids, mask, **more):
    """A random model, with insertions."""
    length = DaedalLength(**{**LIVELY, **more.pop("length", {})})
    options = {"gen_length": 6, "block_length": 4, "unmask": Threshold(0.6), "length": length, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = diffusion_generate(denoiser, ids, mask, **options)
    return out, sum(int((i != FRESH).sum()) for i in length.trace.inserted)


def test_batch_equals_single(denoiser):
    ids, mask = prompts(3, 7, 5)
    both, inserted = lively(denoiser, ids, mask)
    assert inserted > 3 and len(set(map(len, both.windows))) > 1
    for row, n in enumerate((3, 7, 5)):
        one, _ = lively(denoiser, ids[row : row + 1, 7 - n :], None)
        assert one.windows[0] == both.windows[row] and one.stats.commit_step[0] == both.stats.commit_step[row]
        assert one.stats.nfe[0] == both.stats.nfe[row]
        assert one.stats.tokens_processed[0] == both.stats.tokens_processed[row]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_every_part_moves_with_its_column(cache):
    """With one layer a cache is exact, so what it keeps must have followed the insertions. c, which reads columns that
    a cache does not renew, is made not to matter."""
    model = MaskedDiffusionModel(sharp(layers=1))
    ids, _ = prompts(5)
    first = {"eos_check_tokens": 30, "low_conf": 0.5}
    plain, inserted = lively(model, ids, None, length=first, transforms=[Remember()])
    cached, same = lively(model, ids, None, length=first, transforms=[Remember()], cache=cache)
    assert inserted == same > 2 and plain.windows == cached.windows
    assert plain.stats.commit_step == cached.stats.commit_step


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("scope", ["block", "sequence"])
def test_credit_moves_with_its_column(denoiser, cache, scope):
    """The two forms of credit keep it differently; they agree as long as both follow the insertions."""
    ids, mask = prompts(3, 6)
    options = {"cache": cache, "length": {"low_conf": 0.5}}
    found = [
        lively(denoiser, ids, mask, transforms=[CreditFusion(slots=slots, scope=scope), Remember()], **options)
        for slots in (None, 12)
    ]
    (dense, inserted), (sparse, same) = found
    assert inserted == same > 2 and dense.windows == sparse.windows
    assert dense.stats.commit_step == sparse.stats.commit_step


def test_a_second_generation_starts_anew(denoiser):
    ids, mask = prompts(3, 6)
    length = DaedalLength(**LIVELY)
    options = {"gen_length": 6, "block_length": 4, "unmask": Threshold(0.6), "length": length}
    first = diffusion_generate(denoiser, ids, mask, **options)
    calls = len(length.trace.inserted)
    again = diffusion_generate(denoiser, ids, mask, **options)
    assert first.windows == again.windows and len(length.trace.inserted) == calls == first.forward_calls


def test_a_window_of_one_block_stays_one():
    state = state_of([None] * 4, block_length=None)
    length = DaedalLength(maximum=40, expansion_factor=20)
    length.initial(Told(ends_at(24)), state)
    assert state.gen_length.tolist() == [40] and state.block_end.tolist() == [42]


# --- the method ----------------------------------------------------------------------------------------------------

METHOD = {
    "eos_confidence_threshold": 0,
    "expand_eos_confidence_threshold": 1,
    "initial_gen_length": 6,
    "max_gen_length": 40,
    "expansion_factor": 3,
    "high_conf_threshold": 0.6,
    "low_conf_threshold": 0.3,
    "eos_check_tokens": 4,
    "block_length": 4,
}


def test_the_method_generates():
    model, tokenizer = sharp(), Characters()
    inputs = tokenizer(["abc", "defgh"])
    out = Daedal(**METHOD).generate(model, tokenizer, ["abc", "defgh"], max_new_tokens=28)
    direct, inserted = lively(MaskedDiffusionModel(model), inputs["input_ids"], inputs["attention_mask"])
    assert inserted and out.windows == direct.windows and out.stats.commit_step == direct.stats.commit_step


def test_credit_and_daedal_act_together():
    model, tokenizer = sharp(), Characters()
    methods = [CreditDecoding(threshold=0.6, alpha=1.0), Daedal(**METHOD)]
    inputs = tokenizer(["abc", "defgh"])
    both = generate(model, tokenizer, ["abc", "defgh"], methods=methods, max_new_tokens=28, chat=False)
    direct, inserted = lively(
        MaskedDiffusionModel(model), inputs["input_ids"], inputs["attention_mask"], transforms=[CreditFusion(alpha=1.0)]
    )
    alone = methods[1].generate(model, tokenizer, ["abc", "defgh"], max_new_tokens=28)
    assert inserted and both.windows == direct.windows != alone.windows
    assert both.stats.commit_step == direct.stats.commit_step


def test_the_call_limits_the_window():
    method = Daedal(initial_gen_length=8, max_gen_length=40)
    assert method.parts(256).length.maximum == 40 and method.parts(16).length.maximum == 16
    assert method.parts(8).gen_length == 8
    with pytest.raises(InputError, match="max_new_tokens=7 is less than initial_gen_length=8"):
        method.parts(7)


def test_the_catalogue_finds_it():
    assert catalog.load("daedal") is Daedal and all(option.description for option in Daedal.options())
    default = Daedal()
    assert (default.initial_gen_length, default.max_gen_length, default.block_length) == (64, 2048, 32)
    assert (default.expansion_factor, default.eos_check_tokens, default.tail) == (8, 32, "eos")
    assert (default.high_conf_threshold, default.low_conf_threshold) == (0.9, 0.1)
    assert (default.eos_confidence_threshold, default.expand_eos_confidence_threshold) == (0.5, 0.9)


def test_the_command_line_decodes(monkeypatch):
    monkeypatch.setattr("tokenry.cli.decode.load_model", lambda *_, **engine: Loaded(sharp(), Characters()))
    options = [part for name, value in METHOD.items() for part in ("-o", f"{name}={value}")]
    run = ["decode", "--method", "daedal", *options, "--max-new-tokens", "28", "--greedy"]
    result = CliRunner().invoke(main, [*run, "--json", "abc"])
    assert result.exit_code == 0, result.output
    found, expected = (
        json.loads(result.stdout),
        Daedal(**METHOD).generate(sharp(), Characters(), "abc", max_new_tokens=28),
    )
    assert found["ids"] == expected.new_ids[0] and found["forward_calls"] == expected.forward_calls
    assert found["tokens_processed"] == expected.tokens_processed
    short = [part.replace(f"max_gen_length={METHOD['max_gen_length']}", "max_gen_length=5") for part in run]
    refused = CliRunner().invoke(main, [*short, "abc"])
    assert refused.exit_code == 2 and "max_gen_length=5 is less than initial_gen_length=6" in refused.stderr


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"maximum": 0}, "maximum=0"),
        ({"expansion_factor": 1}, "expansion_factor=1 is not allowed; .* a factor of 1 adds nothing"),
        ({"low_conf": -0.1}, "low_conf=-0.1"),
        ({"low_conf": float("nan")}, "low_conf=nan"),
        ({"eos_threshold": 1.1}, r"eos_threshold=1.1 .*\[0, 1\]"),
        ({"expand_eos_threshold": -1}, "expand_eos_threshold=-1"),
        ({"eos_check_tokens": 0}, "eos_check_tokens=0"),
        ({"tail": "pad"}, "tail='pad' .* eos, mask, none"),
    ],
)
def test_parameters_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        DaedalLength(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"initial_gen_length": 0}, "initial_gen_length=0"),
        ({"max_gen_length": 32}, "max_gen_length=32 is less than initial_gen_length=64"),
        ({"expansion_factor": 1}, r"expansion_factor=1 .*in \[2, "),
        ({"high_conf_threshold": 0}, "high_conf_threshold=0"),
        ({"low_conf_threshold": 0.9}, "low_conf_threshold=0.9 is not below high_conf_threshold=0.9"),
        ({"low_conf_threshold": -0.1}, "low_conf_threshold=-0.1"),
        ({"eos_confidence_threshold": 1.1}, "eos_confidence_threshold=1.1"),
        ({"expand_eos_confidence_threshold": -0.1}, "expand_eos_confidence_threshold=-0.1"),
        ({"eos_check_tokens": 0}, "eos_check_tokens=0"),
        ({"tail": "pad"}, "tail='pad'"),
        ({"block_length": 0}, "block_length=0"),
    ],
)
def test_options_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Daedal(**values)


def test_models_and_prompts_are_refused():
    model, tokenizer, method = small(), Characters(), Daedal(initial_gen_length=6, max_gen_length=12)
    endless = MaskedDiffusionModel(model)
    endless.eos_token_id = None
    with pytest.raises(InputError, match="no end-of-text token; give eos_token_id to MaskedDiffusionModel"):
        method.generate(endless, tokenizer, "abc")
    with pytest.raises(InputError, match="gen_length=16 is more than maximum=12"):
        run(Told(ends_at(0)), gen_length=16, maximum=12)
    with pytest.raises(InputError, match="have no attention mask"):
        run(MaskedDiffusionModel(model), ids=((PAD, 1), (2, 3)), maximum=12)
    with pytest.raises(InputError, match="both decide how wide the window is"):
        generate(model, tokenizer, "abc", methods=[method, Daedal()], chat=False)
    with pytest.raises(InputError, match="different thresholds"):
        generate(model, tokenizer, "abc", methods=[method, CreditDecoding(threshold=0.5)], chat=False)
    with pytest.raises(InputError, match="context window"):
        run(Told(ends_at(999)), maximum=200, expansion_factor=50)


def test_a_model_that_never_ends_is_warned_of():
    options = {"maximum": 16, "expansion_factor": 4, "eos_check_tokens": 8}
    with pytest.warns(UserWarning, match="grown to maximum=16, and nowhere does the model expect its end"):
        run(Told(ends_at(99)), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Told(ends_at(16)), **options)  # at the maximum it does
        run(Told(ends_at(99)), **{**options, "eos_threshold": 0.0, "tail": "none"})  # has not grown
        run(Told(ends_at(99)), gen_length=16, **options)
        run(Told(ends_at(99, token=EOS, p=0.4)), **options)


# --- the comparison ------------------------------------------------------------------------------------------------


def test_widths_of_other_rows():
    """The same widths, in other rows, still all masks before the tail."""

    def say(text, prompt):
        return ends_at(12 + 4 * text[0])(text, prompt)

    ids = torch.arange(5)[:, None]
    widths, first = [], []
    for kind in (DaedalLength, experiment.PermutedWidths):
        model = Told(say)
        length = kind(maximum=64, expansion_factor=4, eos_threshold=0.7, eos_check_tokens=8)
        diffusion_generate(model, ids, gen_length=8, unmask=Threshold(0.9), length=length)
        widths.append(length.trace.gen_length[-1].tolist())
        first.append(model.seen[len(length.trace.gen_length) - 1])
    assert widths[0] == [16, 20, 24, 28, 32] != widths[1] and sorted(widths[1]) == widths[0]
    assert all(set(text[1:-4]) == {MASK} and text[-4:] == [EOS] * 4 for text in first[1])


def test_the_experiment_runs(monkeypatch):
    monkeypatch.setattr(experiment, "WIDEST", 48)  # a token per step in 96 takes long
    monkeypatch.setattr(experiment, "FIXED", (8, 16, 40, 48))
    monkeypatch.setattr(Listing, "levels", (1, 8))
    model, tokenizer = tokenry.load("zoo/denoiser-2")
    made = experiment.build(model, tokenizer, samples=8, seeds=(0,))
    comparison = compare(made)
    assert {s.role for s in made.arms} == {"plain", "control", "method"}
    assert (comparison.values(experiment.PLAIN, "forward_passes") == 48).all()
    for arm in (arm for arm in made.arms if arm.name.startswith("threshold, ")):
        assert (comparison.values(arm.name, "window") == arm.setting["width"]).all()
    grown, answer = (comparison.values(experiment.METHOD, name) for name in ("window", "answer"))
    assert (grown >= answer).all() and answer.max() == 40 and grown[answer == 16].min() > grown[answer < 6].max()
    findings = made.findings(comparison)
    assert len(findings) == 10 and all(f.numbers for f in findings)
    long = comparison.values(experiment.METHOD, "exact_long")
    assert (np.isnan(long) == (answer <= 16)).all()
    html = render(comparison, findings, "x", model="m", command="c", versions="v")
    assert '"denoising"' in html and '"spearman"' in html and '"spearman_listing"' in html


def test_options_replace_those_of_the_experiment():
    made = experiment.build(*tokenry.load("zoo/denoiser-2"), samples=4, method=Daedal(expansion_factor=6))
    setting = next(s.setting for s in made.arms if s.name == experiment.METHOD)
    assert setting["expansion_factor"] == 6 and setting["initial_gen_length"] == 8


def test_neutral_windows_are_fixed_ones():
    """On the trained model, in the whole comparison."""
    model, tokenizer = tokenry.load("zoo/denoiser-2")
    task = WindowTask(model, tokenizer, (0,), 8, 64)
    method = Daedal(block_length=40, initial_gen_length=40, max_gen_length=40)
    made = {s.name: s for s in experiment.arms(method)}
    runs = [task.run(made[name], task.samples(), 0) for name in (experiment.fixed(40), experiment.METHOD)]
    for a, b in zip(*runs):
        assert a.metrics == b.metrics and a.detail == b.detail and a.cost["forward_passes"] == b.cost["forward_passes"]


def test_a_batch_of_puzzles_equals_single_ones():
    model, tokenizer = tokenry.load("zoo/denoiser")
    questions = ["add 843000+257000=", "sort 4092=", "sudoku 1.3..4.22.4..3.1="]
    method = Daedal(
        **{
            **experiment.DEFAULT,
            "expansion_factor": 4,
            "eos_check_tokens": 4,
            "expand_eos_confidence_threshold": 1,
            "low_conf_threshold": 0.7,
        }
    )
    both = method.generate(model, tokenizer, questions, max_new_tokens=32)
    assert len(set(map(len, both.windows))) > 1
    for question, window, nfe in zip(questions, both.windows, both.stats.nfe):
        one = method.generate(model, tokenizer, question, max_new_tokens=32)
        assert one.windows[0] == window and one.stats.nfe[0] == nfe
