"""Trace credit by hand, its two forms, its neutral settings, and what resets and moves it."""

import math
from typing import ClassVar

import pytest
import torch
from support.denoisers import Characters, Scripted, V, prompts, small, state_of

from tokenry import catalog
from tokenry.core.errors import InputError
from tokenry.decode import generate
from tokenry.decode.creditdecoding import CreditDecoding, CreditFusion
from tokenry.decode.denoising.contract import DiffusionMethod, DiffusionMethods, DiffusionParts
from tokenry.decode.denoising.loop import LengthPolicy, LogitsTransform, MaskedDiffusionModel, diffusion_generate
from tokenry.decode.denoising.state import DiffusionState, Edit
from tokenry.decode.denoising.unmask import FixedCount, Threshold
from tokenry.decode.specreason import SpecReason


@pytest.fixture(scope="module")
def denoiser():
    return MaskedDiffusionModel(small())


def logits_of(state, rows):
    """Logits (1, time, V): these in the window, -inf elsewhere in the vocabulary, zeros outside the window."""
    logits = torch.zeros(*state.x.shape, V)
    logits[0, state.start :] = float("-inf")
    for i, row in enumerate(rows):
        logits[0, state.start + i, : len(row)] = torch.tensor(row)
    return logits


def run(fusion, state, steps):
    """The fused logits of each step, the state staying as it is but for its counters."""
    found = []
    for rows in steps:
        found.append(fusion(logits_of(state, rows), state))
        state.block_step = state.block_step + 1
    return found


@pytest.mark.parametrize("slots", [None, 1, 2])
def test_two_steps_by_hand(slots):
    fusion = CreditFusion(alpha=0.65, gamma=0.5, beta=0.7, slots=slots)
    state = state_of([None])
    first, second = run(fusion, state, [[(1.0, 0.0)]] * 2)
    assert first[0, 2, :2].tolist() == pytest.approx([1.401632, 0.0], abs=1e-6)
    assert second[0, 2, :2].tolist() == pytest.approx([1.583394, 0.0], abs=1e-6)
    assert fusion.credit[0, 2, 0].item() == pytest.approx(1.453533, abs=1e-6)
    assert first[0, 2].softmax(-1)[0].item() == pytest.approx(0.802443, abs=1e-6)
    assert second[0, 2].softmax(-1)[0].item() == pytest.approx(0.829685, abs=1e-6)


def test_constant_logits_follow_the_geometric_sum():
    fusion, state = CreditFusion(alpha=0.7, gamma=0.2, beta=0.8), state_of([None])
    row = (0.7, 0.1, -0.4)
    p = torch.tensor(row).softmax(0)[0].item()
    confidence = 0.0
    for n in range(1, 12):
        (fused,) = run(fusion, state, [[row]])
        assert fusion.credit[0, 2, 0].item() == pytest.approx(p**0.2 * (1 - 0.8**n) / 0.2, rel=1e-5)
        assert fusion.credit[0, 2, 0] < 1 / (1 - 0.8)
        assert fused[0, 2].argmax() == 0 and fused[0, 2].softmax(-1)[0] > confidence
        confidence = fused[0, 2].softmax(-1)[0].item()
    assert (fused - logits_of(state, [row])).nan_to_num().max() < 0.7 * math.log(1 + 1 / (1 - 0.8))


def test_without_memory_the_best_token_gets_log_two():
    """beta = 0 and gamma -> 0: C is 1 at the best token alone."""
    fusion, state = CreditFusion(alpha=0.7, gamma=1e-9, beta=0.0), state_of([None])
    for row, best in (((2.0, 1.0), 0), ((1.0, 2.0), 1)):
        (fused,) = run(fusion, state, [[row]])
        boost = fused[0, 2, :2] - torch.tensor(row)
        assert boost[best].item() == pytest.approx(0.7 * math.log(2), abs=1e-5) and boost[1 - best] == 0


def test_credit_decays_when_another_token_leads():
    fusion, state = CreditFusion(alpha=1.0, gamma=1.0, beta=0.5), state_of([None])
    run(fusion, state, [[(math.log(3), 0.0)], [(0.0, math.log(3))]])  # the leader has 3 / 4 each time
    assert fusion.credit[0, 2, :2].tolist() == pytest.approx([0.375, 0.75])


def test_ties_go_to_the_lower_token():
    fusion, state = CreditFusion(), state_of([None])
    run(fusion, state, [[(1.0, 1.0, 0.0)]])
    assert fusion.credit[0, 2, 0] > 0 and fusion.credit[0, 2, 1] == 0


@pytest.mark.parametrize("slots", [None, 3])
def test_only_masks_of_the_block_gather_credit(slots):
    fusion, state = CreditFusion(slots=slots), state_of([None, 5, None, None], block_length=2)
    rows = [(1.0, 0.0)] * 4
    (fused,) = run(fusion, state, [rows])
    credit = fusion.credit[0, 2:]
    assert credit[0, 0] > 0 and (credit[1:] == 0).all() and (fusion.credit[0, :2] == 0).all()
    assert torch.equal(fused[0, 3:], logits_of(state, rows)[0, 3:])


@pytest.mark.parametrize("slots", [None, 3])
def test_a_new_block_begins_without_credit(slots):
    fusion, state = CreditFusion(slots=slots), state_of([None] * 4, block_length=2)
    run(fusion, state, [[(1.0, 0.0)] * 4] * 2)
    state.x[0, 2:4] = 7
    state.advance()
    assert state.block_step.tolist() == [0]
    run(fusion, state, [[(1.0, 0.0)] * 4])
    p = torch.tensor([1.0, 0.0]).softmax(0)[0].item()
    assert (fusion.credit[0, :4] == 0).all() and fusion.credit[0, 4:, 0].tolist() == pytest.approx([p**0.2] * 2)


def test_in_the_sequence_credit_outlives_the_block():
    fusion, state = CreditFusion(scope="sequence"), state_of([None] * 4, block_length=2)
    run(fusion, state, [[(1.0, 0.0)] * 4])
    before = fusion.credit[0, 4, 0].item()
    state.x[0, 2:4] = 7
    state.advance()
    run(fusion, state, [[(1.0, 0.0)] * 4])
    p = torch.tensor([1.0, 0.0]).softmax(0)[0].item()
    assert before == pytest.approx(p**0.2) and fusion.credit[0, 4, 0].item() == pytest.approx(1.8 * p**0.2)


def test_rows_do_not_share_credit(denoiser):
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 4, "unmask": Threshold(0.5)}
    both = diffusion_generate(denoiser, ids, mask, transforms=[CreditFusion()], **options)
    for row, n in enumerate((3, 7)):
        one = diffusion_generate(denoiser, ids[row : row + 1, 7 - n :], transforms=[CreditFusion()], **options)
        assert one.windows[0] == both.windows[row] and one.stats.commit_step[0] == both.stats.commit_step[row]


class Record(LogitsTransform):
    """Keeps what it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, logits, state):
        self.seen.append(logits)
        return logits


@pytest.mark.parametrize("scope", ["block", "sequence"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_enough_slots_give_the_dense_form(denoiser, scope, cache):
    ids, mask = prompts(3, 7)
    options = {"gen_length": 12, "block_length": 6, "unmask": FixedCount(), "cache": cache}
    seen = {}
    for slots in (None, 12):
        seen[slots] = Record()
        fusion = CreditFusion(alpha=2.0, slots=slots, scope=scope)
        diffusion_generate(denoiser, ids, mask, transforms=[fusion, seen[slots]], **options)
    assert len(seen[None].seen) == len(seen[12].seen) == 12
    for dense, sparse in zip(seen[None].seen, seen[12].seen):
        assert torch.allclose(dense.nan_to_num(neginf=-99), sparse.nan_to_num(neginf=-99), atol=1e-5)


def test_the_slot_with_the_least_credit_gives_way():
    fusion, state = CreditFusion(gamma=1.0, beta=0.5, slots=2), state_of([None])
    lead = [[(3.0, 0, 0)], [(3.0, 0, 0)], [(0, 3.0, 0)], [(0, 0, 3.0)]]
    run(fusion, state, lead)
    p = torch.tensor([3.0, 0, 0]).softmax(0)[0].item()
    # Token 0 has (p / 2 + p) / 4, token 1 p / 2: token 0 gives way.
    assert fusion.credit[0, 2, :3].tolist() == pytest.approx([0.0, p / 2, p], abs=1e-6)


def test_alpha_zero_is_threshold_decoding(denoiser):
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 12, "block_length": 4, "unmask": Threshold(0.6)}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    seen = Record()
    same = diffusion_generate(denoiser, ids, mask, transforms=[CreditFusion(alpha=0.0), seen], **options)
    assert torch.equal(plain.sequences, same.sequences) and plain.stats.commit_step == same.stats.commit_step
    assert plain.stats.commit_confidence == same.stats.commit_confidence


def test_a_second_generation_starts_without_credit(denoiser):
    ids, _ = prompts(5)
    fusion = CreditFusion(alpha=2.0)
    options = {"gen_length": 8, "unmask": Threshold(0.5), "transforms": [fusion]}
    first = diffusion_generate(denoiser, ids, **options)
    again = diffusion_generate(denoiser, ids, **options)
    assert first.stats.commit_confidence == again.stats.commit_confidence


def test_credit_commits_stable_tokens_earlier():
    """All stay below 0.82 alone. By hand, token 3 has 0.787 with one step of credit, and 0.823 with two."""
    script, options = [(3, 0.7), (4, 0.75), (5, 0.74), (6, 0.73)], {"gen_length": 4, "unmask": Threshold(0.82)}
    plain = diffusion_generate(Scripted(script), torch.tensor([[1, 2]]), **options)
    assert plain.stats.commit_step == [[4, 1, 2, 3]]
    fused = diffusion_generate(Scripted(script), torch.tensor([[1, 2]]), transforms=[CreditFusion()], **options)
    assert fused.stats.commit_step == [[2, 1, 2, 2]] and fused.windows == plain.windows
    assert fused.stats.commit_confidence[0][0] == pytest.approx(0.8229, abs=1e-4)


@pytest.mark.parametrize("slots", [None, 2])
def test_credit_moves_with_its_column(slots):
    fusion, state = CreditFusion(slots=slots), state_of([None] * 3)
    run(fusion, state, [[(1.0, 0.0), (0.0, 2.0), (3.0, 0.0)]])
    before = fusion.credit
    edit = Edit.insert(state, torch.tensor([3]), 2, torch.tensor([4]))
    state.apply(edit)
    fusion.reindex(edit)
    after = fusion.credit
    assert after.shape == (1, 6, V)
    assert torch.equal(after[:, 2], before[:, 2]) and torch.equal(after[:, 5], before[:, 4])
    assert (after[:, 3:5] == 0).all()
    cut = Edit.resize(state, torch.tensor([1]))
    state.apply(cut)
    fusion.reindex(cut)
    assert torch.equal(fusion.credit, before[:, :3])


def test_credit_in_a_loop_that_widens(denoiser):
    class Widen(LengthPolicy):
        def edit(self, prediction, commit, state):
            if state.forward_calls == 2:
                return Edit.resize(state, state.gen_length + 3)
            return None

    ids, mask = prompts(3, 6)
    runs = [
        diffusion_generate(
            denoiser, ids, mask, gen_length=6, length=Widen(), transforms=[CreditFusion(alpha=1.5, slots=slots)]
        )
        for slots in (None, 9)
    ]
    assert runs[0].windows == runs[1].windows and len(runs[0].windows[0]) == 9


# --- the method ----------------------------------------------------------------------------------------------------


def test_the_method_generates():
    model, tokenizer = small(), Characters()
    method = CreditDecoding(threshold=0.6, block_length=4)
    out = method.generate(model, tokenizer, ["abc", "defgh"], max_new_tokens=8)
    direct = diffusion_generate(
        MaskedDiffusionModel(model),
        **tokenizer(["abc", "defgh"]),
        gen_length=8,
        block_length=4,
        unmask=Threshold(0.6),
        transforms=[CreditFusion()],
        tokenizer=tokenizer,
    )
    assert out.windows == direct.windows and out.texts == direct.texts and len(out.texts) == 2
    assert out.prompt_ids == [[0, 1, 2], [3, 4, 5, 6, 7]] and out.forward_calls == direct.stats.forward_calls
    assert method.generate(model, tokenizer, "abc", max_new_tokens=8).windows[0] == out.windows[0]
    plain = CreditDecoding(threshold=0.6, block_length=4, alpha=0).generate(model, tokenizer, "abc", max_new_tokens=8)
    assert (
        plain.windows
        == diffusion_generate(
            MaskedDiffusionModel(model), **tokenizer(["abc"]), gen_length=8, block_length=4, unmask=Threshold(0.6)
        ).windows
    )


def test_sampling_is_as_in_the_other_loop():
    model, tokenizer, method = small(), Characters(), CreditDecoding()
    options = {"max_new_tokens": 8, "temperature": 1.0}
    greedy = method.generate(model, tokenizer, "abc", **options)
    assert greedy.windows == method.generate(model, tokenizer, "abc", max_new_tokens=8).windows
    drawn = [method.generate(model, tokenizer, "abc", do_sample=True, seed=s, **options).windows for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert method.generate(model, tokenizer, "abc", do_sample=True, **options, **narrow).windows == greedy.windows


class Collect:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamers_get_the_finished_rows():
    streamers = [Collect(), Collect()]
    out = CreditDecoding().generate(small(), Characters(), ["abc", "de"], max_new_tokens=8, streamers=streamers)
    assert [s.pieces for s in streamers] == [[[0, 1, 2], out.new_ids[0]], [[3, 4], out.new_ids[1]]]
    assert all(s.ended for s in streamers)


def test_plug_ins_of_the_other_loop_are_refused():
    rest = {"processors": (), "monitors": [], "layer_policy": None, "stop": ()}
    CreditDecoding().generate(small(), Characters(), "abc", max_new_tokens=4, **rest)
    with pytest.raises(InputError, match="creditdecoding does not write from left to right and has no use for stop"):
        CreditDecoding().generate(small(), Characters(), "abc", max_new_tokens=4, **{**rest, "stop": ["b"]})


class Narrow(DiffusionMethod):
    """Brings a window, and what it commits."""

    slug: ClassVar[str] = "narrow"
    own: bool = False
    threshold: float = 0.9

    def parts(self, max_new_tokens):
        unmask = FixedCount() if self.own else None
        return DiffusionParts(unmask, self.threshold, length=LengthPolicy(), gen_length=max_new_tokens // 2)


def test_methods_act_together():
    model, tokenizer = small(), Characters()
    options = {"max_new_tokens": 8, "chat": False}
    both = generate(model, tokenizer, "abc", methods=[CreditDecoding(block_length=2), Narrow(own=True)], **options)
    direct = diffusion_generate(
        MaskedDiffusionModel(model), **tokenizer(["abc"]), gen_length=4, block_length=2, transforms=[CreditFusion()]
    )
    assert both.windows == direct.windows and both.stats.commit_step == direct.stats.commit_step
    joint = DiffusionMethods([CreditDecoding(threshold=0.6), Narrow(threshold=0.6)]).options(8)
    assert joint["unmask"].tau == 0.6 and joint["gen_length"] == 4 and joint["block_length"] == 32
    three = DiffusionMethods([CreditDecoding(), Narrow(), CreditDecoding(block_length=4)]).options(8)
    assert len(three["transforms"]) == 2 and three["block_length"] == 4


def test_methods_that_disagree_are_refused():
    credit = CreditDecoding()
    with pytest.raises(InputError, match=r"different thresholds, \[0.6, 0.9\]"):
        DiffusionMethods([credit, Narrow(threshold=0.6)]).options(8)
    assert DiffusionMethods([credit, Narrow(threshold=0.6, own=True)]).options(8)["unmask"] is not None
    with pytest.raises(InputError, match="both decide what is committed"):
        DiffusionMethods([Narrow(own=True), Narrow(own=True)]).options(8)
    with pytest.raises(InputError, match="both decide how wide the window is"):
        DiffusionMethods([Narrow(), Narrow()]).options(8)
    with pytest.raises(InputError, match=r"creditdecoding and narrow are given different values of block_length"):
        DiffusionMethods([CreditDecoding(block_length=2), Narrow(block_length=4)]).options(8)
    with pytest.raises(InputError, match="creditdecoding and specreason both read the prompts first"):
        generate(small(), Characters(), "abc", methods=[credit, SpecReason(small="zoo/speculator")])
    with pytest.raises(InputError, match="specreason and creditdecoding both read the prompts first"):
        generate(small(), Characters(), "abc", methods=[SpecReason(small="zoo/speculator"), credit])


def test_the_catalogue_finds_it():
    method = catalog.load("creditdecoding")
    assert method is CreditDecoding and all(option.description for option in method.options())
    default = CreditDecoding()
    assert (default.alpha, default.gamma, default.beta, default.threshold) == (0.7, 0.2, 0.8, 0.9)
    assert CreditDecoding.from_strings(["slots=none", "alpha=0"]).slots is None


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"gamma": 0}, r"gamma=0 .*\(0, 1\]"),
        ({"gamma": 1.1}, r"gamma=1.1"),
        ({"beta": 1.0}, r"beta=1.0 .*\[0, 1\)"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"slots": 0}, "slots=0"),
        ({"scope": "row"}, "scope='row'"),
    ],
)
def test_parameters_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        CreditFusion(**values)
    with pytest.raises(InputError, match=next(iter(values))):
        CreditDecoding(**values)


@pytest.mark.parametrize("threshold", [0, 1.1, -1])
def test_thresholds_are_refused(threshold):
    with pytest.raises(InputError, match="threshold"):
        CreditDecoding(threshold=threshold)


def test_another_shape_is_refused():
    fusion, state = CreditFusion(), state_of([None] * 3)
    run(fusion, state, [[(1.0, 0.0)] * 3])
    wider = DiffusionState.begin(Scripted(), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool), 5, None)
    with pytest.raises(InputError, match=r"credit has shape \(1, 5, 20\), logits \(1, 7, 20\); call reset or reindex"):
        fusion(torch.zeros(1, 7, V), wider)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(1, 5, V)
    logits[0, 3, 2] = value
    with pytest.raises(InputError, match="not finite"):
        CreditFusion()(logits, state_of([None] * 3))
    with pytest.raises(InputError, match="no credit yet"):
        _ = CreditFusion().credit


def test_models_and_prompts_are_refused():
    model, tokenizer, method = small(), Characters(), CreditDecoding()
    with pytest.raises(InputError, match="the prompt is empty"):
        method.generate(model, tokenizer, "")
    with pytest.raises(InputError, match="not a multiple of block_length=32"):
        method.generate(model, tokenizer, "abc", max_new_tokens=40)
    with pytest.raises(InputError, match="context window"):
        method.generate(model, tokenizer, "abc", max_new_tokens=256)
    with pytest.raises(InputError, match="temperature=-1"):
        method.generate(model, tokenizer, "abc", max_new_tokens=8, do_sample=True, temperature=-1)
    model.config.is_causal = True
    with pytest.raises(InputError, match="the model is causal"):
        method.generate(model, tokenizer, "abc", max_new_tokens=8)
