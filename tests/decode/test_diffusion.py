"""Masked-diffusion sampling: schedules and commit rules by hand, whole loops on scripted predictors, caches, edits."""

import json
from itertools import pairwise

import pytest
import torch
from support.denoisers import EOS, MASK, PAD, Remember, Scripted, V, chosen, prompts, small, state_of

from tokenry.core.errors import InputError
from tokenry.decode.denoising.cache import DiffusionCache
from tokenry.decode.denoising.loop import (
    LengthPolicy,
    MaskedDiffusionModel,
    diffusion_generate,
    sampling_warpers,
)
from tokenry.decode.denoising.state import FRESH, DiffusionState, Edit, Prediction
from tokenry.decode.denoising.transforms import Forbid, Guidance
from tokenry.decode.denoising.unmask import (
    Factor,
    FixedCount,
    RandomUnmask,
    RunAnchors,
    Threshold,
    best_first,
    transfer_schedule,
)
from tokenry.models.llada_dream import load_diffusion_checkpoint
from tokenry.models.masks import make_bidirectional


@pytest.fixture(scope="module")
def denoiser():
    return MaskedDiffusionModel(small())


def commits(stats):
    """How many tokens each forward of a row committed."""
    return [[steps.count(i + 1) for i in range(n)] for steps, n in zip(stats.commit_step, stats.nfe)]


# --- schedules and commit rules ------------------------------------------------------------------------------------


def test_schedules_sum_to_the_masks():
    assert transfer_schedule(7, 4) == [2, 2, 2, 1]
    for masks in range(12):
        for steps in range(1, 9):
            counts = transfer_schedule(masks, steps)
            assert sum(counts) == masks and len(counts) == steps and max(counts) - min(counts) <= 1
            assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(("masks", "steps"), [(7, 4), (8, 3), (8, 8), (5, 1), (6, 4)])
def test_fixed_counts_follow_the_schedule(masks, steps, denoiser):
    ids, _ = prompts(3)
    out = diffusion_generate(denoiser, ids, gen_length=masks, block_length=None, unmask=FixedCount(steps))
    assert commits(out.stats) == [transfer_schedule(masks, steps)] and out.stats.nfe == [steps]


def test_ranks_break_ties_by_the_lower_column():
    scores = torch.tensor([[0.5, 0.9, 0.9, 0.5, 0.99]])
    candidates = torch.tensor([[True, True, True, True, False]])
    assert best_first(scores, candidates).tolist() == [[2, 0, 1, 3, 4]]


C = [0.6, 0.95, 0.3, 0.91]  # sorted: .95, .91, .6, .3


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (FixedCount(), [1]),
        (FixedCount(2), [1, 3]),
        (FixedCount(1), [0, 1, 2, 3]),
        (Threshold(0.9), [1, 3]),
        (Threshold(0.95), [1]),
        (Threshold(0.99), [1]),
        (Threshold(0.5), [0, 1, 3]),
        (Threshold(0.0), [0, 1, 2, 3]),
        (Threshold(1.5), [1]),
        (Factor(1.0), [1, 3]),  # thresholds .5, .667, .75, .8
        (Factor(1e-6), [1]),
        (Factor(1.7), [0, 1, 3]),  # .15, .433, .575, .66
        (Factor(100), [0, 1, 2, 3]),
    ],
)
def test_commit_rules_by_hand(policy, expected):
    assert chosen(policy, state_of([None] * 4), C) == expected


def test_the_best_of_each_run_is_committed():
    """Runs of masks: columns 0 to 1, 3 to 5 and 7; a tie goes to the lower column."""
    confidence = [0.5, 0.45, 1, 0.6, 0.95, 0.9, 1, 0.3]
    window = [None, None, 5, None, None, None, 5, None]
    assert chosen(RunAnchors(0.9, 0.4), state_of(window), confidence) == [0, 4, 5]
    assert chosen(RunAnchors(0.9, 0.0), state_of(window), confidence) == [0, 4, 5, 7]
    assert chosen(RunAnchors(0.9, 0.9), state_of(window), confidence) == [4, 5]
    assert chosen(RunAnchors(0.9, 0.4), state_of([None] * 3), [0.5, 0.5, 0.5]) == [0]
    assert chosen(RunAnchors(0.9, 0.4), state_of([None] * 3), [0.1, 0.3, 0.2]) == [1]


def test_a_run_ends_with_the_block():
    assert chosen(RunAnchors(0.9, 0.4), state_of([None] * 4, block_length=2), [0.5, 0.6, 0.99, 0.99]) == [1]


def test_by_chance_every_step_keeps_its_share():
    """Each of the n steps commits its nth part of the window, on average."""
    counts = [0] * 4
    for seed in range(40):
        options = {"gen_length": 90, "block_length": None, "unmask": RandomUnmask(4), "seed": seed}
        out = diffusion_generate(Scripted([(3, 0.9)] * 90), torch.tensor([[1, 2]]), **options)
        assert out.stats.nfe == [4]
        counts = [a + b for a, b in zip(counts, commits(out.stats)[0])]
    assert counts == pytest.approx([900] * 4, abs=5 * (3600 * 3 / 16) ** 0.5)


def test_drawn_positions_follow_their_confidence():
    """With temperature .5 the position with confidence .9 is drawn first e^(.8 / .5) times as often as that with .1."""
    first = 0
    for seed in range(400):
        policy, state = FixedCount(temperature=0.5), state_of([None, None], seed=seed)
        first += chosen(policy, state, [0.9, 0.1]) == [0]
    p = 1 / (1 + torch.tensor(-1.6).exp().item())
    assert first / 400 == pytest.approx(p, abs=5 * (p * (1 - p) / 400) ** 0.5)
    cold = [chosen(FixedCount(temperature=1e-4), state_of([None, None], seed=seed), [0.1, 0.9]) for seed in range(20)]
    assert cold == [[1]] * 20


def test_guidance_by_hand(denoiser):
    ids, mask = prompts(3, 6)
    state = DiffusionState.begin(denoiser, ids, mask.bool(), 4, None)
    logits = denoiser.predict(state)
    hidden = state.x.clone()
    hidden[:, :6] = torch.where(mask.bool(), MASK, PAD)
    without = denoiser.logits(hidden, state.present)
    guidance = Guidance(1.5)
    guidance.model = denoiser
    guided = guidance(logits, state)
    assert torch.allclose(guided[..., :MASK], (without + 2.5 * (logits - without))[..., :MASK], atol=1e-5)
    assert guided[..., MASK].isneginf().all() and state.nfe.tolist() == [2, 2] and state.forward_calls == 2
    assert state.tokens_processed.tolist() == [14, 20]
    assert Guidance(0)(logits, state) is logits and state.forward_calls == 2
    options = {"gen_length": 6, "block_length": 3}
    both = diffusion_generate(denoiser, ids, mask, transforms=[Guidance(1.0)], **options)
    one = diffusion_generate(denoiser, ids[:1, 3:], transforms=[Guidance(1.0)], **options)
    assert both.windows[0] == one.windows[0] and both.stats.nfe == [12, 12]


def test_forbidden_tokens_are_not_written(denoiser):
    ids, mask = prompts(3, 6)
    plain = diffusion_generate(denoiser, ids, mask, gen_length=8)
    gone = set(plain.windows[0][:2])
    out = diffusion_generate(denoiser, ids, mask, gen_length=8, transforms=[Forbid(sorted(gone))])
    assert not gone & {token for window in out.windows for token in window}


def test_only_masks_of_the_block_are_candidates():
    state = state_of([None, 5, None, None], block_length=2)
    assert chosen(Threshold(0.0), state, [0.1, 1.0, 1.0, 1.0]) == [0]
    state.advance()
    assert state.block_start.tolist() == [2]


def test_confidence_by_margin_and_entropy():
    """Probabilities (.5, .5, 0), (.45, .3, .25), (.4, .3, .3): the order differs between the three."""
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.3, 0.25], [0.4, 0.3, 0.3]])
    state = state_of([None] * 3)
    logits = torch.full((1, 5, V), float("-inf"))
    logits[0, 2:, :3] = rows.log()
    prediction = Prediction(logits, logits.argmax(-1), logits.softmax(-1).max(-1).values.nan_to_num())

    def order(confidence):
        policy = FixedCount(confidence=confidence)
        policy.reset(state)
        return policy._score(prediction, state)[0, 2:].argsort(descending=True).tolist()

    assert order("probability") == [0, 1, 2]
    assert order("margin") == [1, 2, 0]
    assert order("entropy") == [0, 1, 2]
    entropy = FixedCount(confidence="entropy")._score(prediction, state)[0, 2]
    assert entropy == pytest.approx(-torch.tensor(2.0).log().item(), abs=1e-6)


# --- whole loops ---------------------------------------------------------------------------------------------------


def test_a_scripted_loop():
    """Two blocks of two; what is committed, when, and how surely."""
    model = Scripted(
        [(3, 0.8), (4, 0.95), (5, 0.99), (6, 0.99)],
        [(8, 0.7), (9, 0.9), (5, 0.99), (6, 0.99)],
        [(0, 0.9), (0, 0.9), (5, 0.96), (EOS, 0.93)],
    )
    out = diffusion_generate(model, torch.tensor([[1, 2]]), gen_length=4, block_length=2, unmask=Threshold(0.9))
    assert out.windows == [[8, 4, 5, EOS]] and out.new_ids == [[8, 4, 5]]
    assert [x[0].tolist() for x in model.seen] == [
        [1, 2, MASK, MASK, MASK, MASK],
        [1, 2, MASK, 4, MASK, MASK],
        [1, 2, 8, 4, MASK, MASK],
    ]
    stats = out.stats
    assert stats.nfe == [3] and stats.forward_calls == 3 and stats.tokens_processed == [18]
    assert stats.commit_step == [[2, 1, 3, 3]] and commits(stats) == [[1, 1, 2]]
    assert stats.commit_confidence[0] == pytest.approx([0.7, 0.95, 0.96, 0.93])
    assert stats.effective_tokens == [3] and stats.tokens_per_forward == [4 / 3]


def test_extreme_thresholds(denoiser):
    ids, mask = prompts(3, 6)
    options = {"gen_length": 12, "block_length": 4}
    plain = diffusion_generate(denoiser, ids, mask, **options)
    for policy in (Threshold(2.0), Factor(1e-9), FixedCount(12)):
        same = diffusion_generate(denoiser, ids, mask, unmask=policy, **options)
        assert torch.equal(same.sequences, plain.sequences) and same.stats.nfe == [12, 12]
        assert same.stats.commit_step == plain.stats.commit_step
    once = diffusion_generate(denoiser, ids, mask, unmask=Threshold(0.0), **options)
    assert once.stats.nfe == [3, 3] and commits(once.stats) == [[4, 4, 4]] * 2


def test_blocks_are_finished_in_order_and_prompts_stay(denoiser):
    ids, mask = prompts(2, 7)
    out = diffusion_generate(denoiser, ids, mask, gen_length=12, block_length=4, unmask=Threshold(0.3))
    assert torch.equal(out.sequences[:, :7], ids)
    for steps in out.stats.commit_step:
        blocks = [steps[i : i + 4] for i in range(0, 12, 4)]
        assert all(max(a) < min(b) for a, b in pairwise(blocks))
    assert MASK not in out.sequences


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("policy", [FixedCount(6), Threshold(0.4), Factor(0.9)])
def test_batch_equals_single(denoiser, policy, cache):
    ids, mask = prompts(3, 7, 5)
    options = {"gen_length": 12, "block_length": 4, "unmask": policy, "cache": cache}
    both = diffusion_generate(denoiser, ids, mask, **options)
    for row, n in enumerate((3, 7, 5)):
        one = diffusion_generate(denoiser, ids[row : row + 1, 7 - n :], **options)
        assert one.windows[0] == both.windows[row]
        assert one.stats.nfe[0] == both.stats.nfe[row]
        assert one.stats.tokens_processed[0] == both.stats.tokens_processed[row]
        assert one.stats.commit_step[0] == both.stats.commit_step[row]


def test_sampling_does_not_depend_on_the_batch_and_follows_the_distribution(denoiser):
    ids, mask = prompts(3, 6)
    warpers = sampling_warpers(do_sample=True)
    options = {"gen_length": 8, "warpers": warpers, "seed": 5}
    both = diffusion_generate(denoiser, ids, mask, **options)
    one = diffusion_generate(denoiser, ids[:1, 3:], **options)
    assert one.windows[0] == both.windows[0]
    logits = denoiser.logits(torch.cat([ids[1:], torch.full((1, 1), MASK)], 1), torch.ones(1, 7, dtype=torch.bool))
    expected = logits[0, -1].softmax(-1)
    drawn = [
        diffusion_generate(denoiser, ids[1:], gen_length=1, warpers=warpers, seed=s).windows[0][0] for s in range(400)
    ]
    found = torch.bincount(torch.tensor(drawn), minlength=V) / 400
    assert (found - expected).abs().max() < 4 * (0.25 / 400) ** 0.5


@pytest.mark.parametrize("shift", [False, True])
def test_shift_reads_the_row_before(shift):
    model = small()
    denoiser = MaskedDiffusionModel(model, shift=shift)
    ids, _ = prompts(6)
    raw = model(input_ids=ids).logits
    found = denoiser.logits(ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(found[0, 3, :MASK], raw[0, 2 if shift else 3, :MASK])
    assert (found[..., MASK] == float("-inf")).all()


# --- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_caches_are_exact_where_nothing_they_keep_has_changed(kind, shift):
    """With one layer keys and values depend on nothing but their own token, and only the block's tokens change."""
    model = MaskedDiffusionModel(small(layers=1), shift=shift)
    ids, mask = prompts(3, 6)
    options = {"gen_length": 12, "block_length": 4, "unmask": Threshold(0.3)}
    plain = diffusion_generate(model, ids, mask, **options)
    cached = diffusion_generate(model, ids, mask, cache=kind, **options)
    assert torch.equal(plain.sequences, cached.sequences) and plain.stats.nfe == cached.stats.nfe
    assert plain.stats.commit_step == cached.stats.commit_step
    assert all(a > b for a, b in zip(plain.stats.tokens_processed, cached.stats.tokens_processed))


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_a_cache_that_is_always_fresh_changes_nothing(kind, impl):
    model = MaskedDiffusionModel(small(impl=impl))
    ids, mask = prompts(3, 6)
    for blocks in (1, 3):
        options = {"gen_length": 12, "block_length": 12 // blocks, "unmask": FixedCount(blocks)}
        plain = diffusion_generate(model, ids, mask, **options)
        cached = diffusion_generate(model, ids, mask, cache=kind, **options)
        assert torch.equal(plain.sequences, cached.sequences)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_unchanged_tokens_give_the_same_logits_from_the_cache(kind, impl):
    model = MaskedDiffusionModel(small(impl=impl))
    ids, mask = prompts(4, 6)
    state = DiffusionState.begin(model, ids, mask.bool(), 8, 4)
    cache = DiffusionCache.named(kind)
    first = model.predict(state, cache)
    state.block_step += 1
    again = model.predict(state, cache)
    assert cache.first.tolist() == [6, 6] and cache.last.tolist() == [10 if kind == "dual" else 14] * 2
    assert torch.allclose(first[mask.bool().any(1)][:, 6:], again[:, 6:], atol=1e-4)


# --- edits ---------------------------------------------------------------------------------------------------------


def test_insertion_and_cut_move_every_part():
    state = state_of([3, None, 4, None, 5], block_length=None)
    state.commit_step[0, 2:] = torch.tensor([1, -1, 2, -1, 3])
    state.commit_confidence[0, 2:] = torch.tensor([0.1, 0, 0.2, 0, 0.3])
    edit = Edit.insert(state, torch.tensor([3]), 3, torch.tensor([7]))
    assert edit.source_index.tolist() == [[0, 1, 2, FRESH, FRESH, FRESH, 4, 5, 6]] and edit.first_change.tolist() == [3]
    state.apply(edit)
    assert state.x.tolist() == [[1, 2, 3, MASK, MASK, MASK, 4, MASK, 5]]
    assert state.commit_step[0, 2:].tolist() == [1, -1, -1, -1, 2, -1, 3]
    assert state.commit_confidence[0, 2:].tolist() == pytest.approx([0.1, 0, 0, 0, 0.2, 0, 0.3])
    state.apply(Edit.insert(state, torch.tensor([5]), 4, torch.tensor([7])))  # no room: the tail is cut off
    assert state.x.tolist() == [[1, 2, 3, MASK, MASK, MASK, MASK, MASK, MASK]]
    state.apply(Edit.resize(state, torch.tensor([2])))
    assert state.x.tolist() == [[1, 2, 3, MASK]] and state.present.all() and state.gen_length.tolist() == [2]


def test_rows_of_unequal_windows():
    model = Scripted()
    ids, mask = prompts(2, 3)
    state = DiffusionState.begin(model, ids, mask.bool(), 4, 2)
    state.apply(Edit.resize(state, torch.tensor([3, 6])))
    assert state.x.shape == (2, 9) and state.masked.sum(1).tolist() == [3, 6]
    assert state.present.long().tolist() == [[0, *[1] * 5, 0, 0, 0], [1] * 9]
    state.x[0, 3:5] = 7
    state.advance()
    assert state.block_start.tolist() == [5, 3] and state.block_end.tolist() == [6, 5]
    state.apply(Edit.insert(state, torch.tensor([5, FRESH]), 3, torch.tensor([5, 6])))
    assert state.masked.sum(1).tolist() == [3, 6] and state.x[0].tolist()[3:] == [7, 7, MASK, MASK, MASK, PAD]


class Widen(LengthPolicy):
    """Inserts masks at a column after the first step, and cuts the window after the third."""

    def __init__(self, at, cut):
        self.at, self.cut = at, cut

    def edit(self, prediction, commit, state):
        batch = len(state.x)
        if state.forward_calls == 1:
            return Edit.insert(state, torch.full((batch,), self.at), 3, state.gen_length + 2)
        return Edit.resize(state, state.gen_length - self.cut) if state.forward_calls == 3 else None


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_loop_moves_every_part(cache):
    """With one layer a cache is exact, so what it keeps must have followed the edits."""
    model = MaskedDiffusionModel(small(layers=1))
    ids, _ = prompts(4)
    options = {"gen_length": 8, "block_length": 4, "unmask": FixedCount()}
    plain = diffusion_generate(model, ids, length=Widen(9, 1), transforms=[Remember()], **options)
    cached = diffusion_generate(model, ids, length=Widen(9, 1), transforms=[Remember()], cache=cache, **options)
    assert plain.windows == cached.windows and len(plain.windows[0]) == 9
    assert MASK not in plain.windows[0]


def test_forwards_are_counted_for_the_rows_they_are_for(denoiser):
    ids, mask = prompts(2, 4)
    state = DiffusionState.begin(denoiser, ids, mask.bool(), 3, None)
    denoiser.predict(state)
    denoiser.predict(state, rows=torch.tensor([False, True]))
    assert state.nfe.tolist() == [1, 2] and state.tokens_processed.tolist() == [5, 14] and state.forward_calls == 2


def test_first_written_tokens_have_no_step():
    class Tail(LengthPolicy):
        def initial(self, model, state):
            state.apply(Edit.resize(state, state.gen_length + 2))
            state.write(state.columns >= state.x.shape[1] - 2, EOS)

    out = diffusion_generate(MaskedDiffusionModel(small()), torch.tensor([[1, 2]]), gen_length=4, length=Tail())
    assert out.windows[0][4:] == [EOS, EOS] and out.stats.commit_step[0][4:] == [0, 0] and out.stats.nfe == [4]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_causal_model_is_refused():
    model = small()
    model.config.is_causal = True
    with pytest.raises(InputError, match="position 0 do not depend on later tokens: the model is causal"):
        MaskedDiffusionModel(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_token_id": EOS}, "end-of-text or padding"),
        ({"mask_token_id": PAD}, "end-of-text or padding"),
        ({"mask_token_id": V}, "outside the vocabulary of 20"),
        ({"mask_token_id": -1}, "outside the vocabulary"),
    ],
)
def test_mask_tokens_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        MaskedDiffusionModel(small(), **values)


def test_a_model_without_mask_token_is_refused():
    model = small()
    model.config.mask_token_id = None
    with pytest.raises(InputError, match="no mask token"):
        MaskedDiffusionModel(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gen_length": 0}, "gen_length=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"gen_length": 10, "block_length": 4}, "gen_length=10 is not a multiple of block_length=4"),
        ({"gen_length": 96}, "98 tokens, the model's context window 96"),
        ({"unmask": FixedCount(3), "block_length": 4}, "steps=3 is not a multiple of the 2 blocks"),
        ({"cache": "triple"}, "cache='triple' is unknown"),
    ],
)
def test_generation_refuses(denoiser, values, message):
    with pytest.raises(InputError, match=message):
        diffusion_generate(denoiser, torch.tensor([[1, 2]]), **{"gen_length": 8, **values})


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, MASK]], None, "contains the mask token"),
        ([[PAD, 2], [1, 2]], None, "have no attention mask"),
        ([[2, PAD], [1, 2]], None, "have no attention mask"),
        ([[2, PAD], [1, 2]], [[1, 0], [1, 1]], "padded on the right"),
        ([[1, 2]], [[1]], "attention_mask has shape"),
        ([[]], None, "at least one token"),
    ],
)
def test_prompts_are_refused(denoiser, ids, mask, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(InputError, match=message):
        diffusion_generate(denoiser, torch.tensor(ids, dtype=torch.long), mask, gen_length=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(-0.1), "tau=-0.1"),
        (lambda: Threshold(float("nan")), "tau=nan"),
        (lambda: Factor(0), "factor=0"),
        (lambda: sampling_warpers(do_sample=True, temperature=0), "temperature=0"),
        (lambda: sampling_warpers(do_sample=True, temperature=float("nan")), "temperature=nan"),
        (lambda: FixedCount(0), "steps=0"),
        (lambda: FixedCount(confidence="certainty"), "'certainty' is unknown"),
        (lambda: FixedCount(temperature=-1), "temperature=-1"),
        (lambda: RandomUnmask(0), "steps=0"),
        (
            lambda: RandomUnmask(3).reset(state_of([None] * 4, block_length=2)),
            "steps=3 is not a multiple of the 2 blocks",
        ),
        (lambda: RandomUnmask(4, last=1), "last=1"),
        (lambda: RunAnchors(0.4, 0.5), "low=0.5 and tau=0.4"),
        (lambda: Guidance(-1), "scale=-1"),
        (lambda: Forbid([]), "token_ids is empty"),
        (lambda: Forbid([V])(torch.zeros(1, 2, V), None), "not all inside the vocabulary of 20"),
    ],
)
def test_policies_refuse(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_edits_are_refused():
    state = state_of([None, None])
    with pytest.raises(InputError, match="changes the prompt"):
        state.apply(Edit(torch.tensor([[0, FRESH, 2, 3]]), torch.tensor([2])))
    with pytest.raises(InputError, match="without tokens"):
        state.apply(Edit.resize(state, torch.tensor([0])))
    with pytest.raises(InputError, match="context window"):
        state.apply(Edit.resize(state, torch.tensor([200])))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def saved_llada(model, folder, **change):
    """The model as LLaDA checkpoints are saved."""
    from safetensors.torch import save_file

    names = {
        "model.embed_tokens.": "model.transformer.wte.",
        "model.norm.": "model.transformer.ln_f.",
        "lm_head.": "model.transformer.ff_out.",
        "model.layers.": "model.transformer.blocks.",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = weight.contiguous()
    c = model.config
    config = {
        "model_type": "llada",
        "block_type": "llama",
        "d_model": c.hidden_size,
        "mlp_hidden_size": c.intermediate_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "embedding_size": V,
        "vocab_size": V,
        "max_sequence_length": 96,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"],
        "weight_tying": False,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "mask_token_id": MASK,
        **change,
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_llada_checkpoint(tmp_path):
    model = small()
    saved_llada(model, tmp_path)
    loaded = load_diffusion_checkpoint(tmp_path, torch.float32)
    ids, _ = prompts(9)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    denoiser = MaskedDiffusionModel(loaded)
    assert (denoiser.mask_token_id, denoiser.eos_token_id, denoiser.shift) == (MASK, EOS, False)


def test_a_dream_checkpoint(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=V, num_hidden_layers=2, eos_token_id=EOS, pad_token_id=EOS, mask_token_id=MASK, **sizes
    )
    model = make_bidirectional(Qwen2ForCausalLM(config)).eval()
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": "Dream", "rope_theta": theta}))
    loaded = load_diffusion_checkpoint(tmp_path, torch.float32)
    ids, _ = prompts(9)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert MaskedDiffusionModel(loaded).shift and MaskedDiffusionModel(loaded).mask_token_id == MASK


def test_other_checkpoints(tmp_path):
    assert load_diffusion_checkpoint("no/such/folder", torch.float32) is None
    model = small()
    saved_llada(model, tmp_path, block_type="sequential")
    with pytest.raises(InputError, match="block_type='sequential'"):
        load_diffusion_checkpoint(tmp_path, torch.float32)
    saved_llada(model, tmp_path, n_layers=4)
    with pytest.raises(InputError, match=r"not those of the LlamaForCausalLM .* it lacks model\.layers\.3"):
        load_diffusion_checkpoint(tmp_path, torch.float32)
    model.save_pretrained(tmp_path)
    assert load_diffusion_checkpoint(tmp_path, torch.float32) is None
