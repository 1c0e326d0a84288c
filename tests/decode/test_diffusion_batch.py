"""A batch gives each row what it would get alone, whatever decides, acts on the logits, moves columns or is drawn; and
seeds mean what they mean everywhere else."""

import random
import warnings
from functools import cache as once
from itertools import product

import pytest
import torch
from support.denoisers import Characters, prompts, random_filter, small

from tokenry.core.errors import InputError
from tokenry.decode import (
    CreditFusion,
    DaedalLength,
    EndOfTextTruncation,
    Factor,
    FixedCount,
    LearnedFilter,
    MaskedDiffusion,
    MaskedDiffusionModel,
    Threshold,
    diffusion_generate,
    generate,
    sampling_warpers,
)
from tokenry.decode.denoising.loop import LengthPolicy
from tokenry.decode.denoising.state import FRESH, Edit
from tokenry.decode.denoising.transforms import Guidance
from tokenry.decode.denoising.unmask import RandomUnmask, RunAnchors
from tokenry.decode.generation.sampler import row_seed

LENGTHS = (3, 7, 5)
BLOCK, STEPS = 4, 12  # windows have 1, 2, 3, 4 or 6 blocks
POLICIES = {
    "one": FixedCount,
    "fixed": lambda: FixedCount(STEPS),
    "random": lambda: FixedCount(STEPS, confidence="random"),
    "positions": lambda: FixedCount(STEPS, temperature=0.5),
    "chance": lambda: RandomUnmask(STEPS),
    "threshold": lambda: Threshold(0.7),
    "factor": lambda: Factor(0.9),
    "runs": lambda: RunAnchors(0.7, 0.3),
    "learned": lambda: LearnedFilter(random_filter(BLOCK), 0.55),
}
TRANSFORMS = {
    "none": lambda: (),
    "block": lambda: (CreditFusion(alpha=3.0),),
    "sequence": lambda: (CreditFusion(alpha=3.0, scope="sequence"),),
    "slots": lambda: (CreditFusion(alpha=3.0, scope="sequence", slots=2),),
    "guidance": lambda: (Guidance(0.5),),
}


class Uneven(LengthPolicy):
    """Unequal windows from the start; later, masks that the step has left give way to several, in some rows."""

    def initial(self, model, state):
        state.apply(Edit.resize(state, state.gen_length - BLOCK * (state.x[:, state.start - 1] % 3)))

    def edit(self, prediction, commit, state):
        left = state.candidates & ~commit
        growing = left.any(1) & (state.nfe % 3 == 1) & (state.gen_length < 16)
        column = torch.where(growing, left.int().argmax(1), FRESH)
        return Edit.insert(state, column, 3, state.gen_length + 2 * growing) if bool(growing.any()) else None


WINDOWS = {
    "fixed": lambda: None,
    "uneven": Uneven,
    "daedal": lambda: DaedalLength(24, 12, low_conf=0.6, eos_threshold=0.3, eos_check_tokens=8),
    "eotp": lambda: EndOfTextTruncation(0.3),
}
CACHES = ("none", "prefix", "dual")
WARPERS = {"greedy": None, "sampled": sampling_warpers(do_sample=True, temperature=1.3, top_k=8)}
ALL = sorted(product(POLICIES, TRANSFORMS, WINDOWS, CACHES, WARPERS))


@once
def denoiser():
    """Sure enough for thresholds, and not sure enough to be done in one step; often ends its text."""
    model = small(layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return MaskedDiffusionModel(model, eos_token_id=11)


def run(policy, transform, window, cache, drawn, ids, mask, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows that grow to the maximum
        return diffusion_generate(
            denoiser(),
            ids,
            mask,
            gen_length=12,
            block_length=BLOCK,
            unmask=POLICIES[policy](),
            transforms=TRANSFORMS[transform](),
            length=WINDOWS[window](),
            cache=cache,
            warpers=WARPERS[drawn],
            seed=seed,
        )


def row(output, i):
    """All that is known of a row, but for its confidences."""
    stats = output.stats
    return output.windows[i], stats.commit_step[i], stats.nfe[i], stats.tokens_processed[i]


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", random.Random(0).sample(ALL, 80), ids="-".join)
def test_a_row_alone_equals_the_row_in_a_batch(combination):
    ids, mask = prompts(*LENGTHS)
    together = run(*combination, ids, mask, seed=4)
    for i, n in enumerate(LENGTHS):
        start = ids.shape[1] - n
        alone = run(*combination, ids[i : i + 1, start:], mask[i : i + 1, start:], seed=row_seed(4, i))
        assert row(alone, 0) == row(together, i)
        assert alone.stats.commit_confidence[0] == pytest.approx(together.stats.commit_confidence[i], abs=1e-3)


def test_the_combinations_are_different_and_their_rows_wait():
    """Windows of unequal width, unequal numbers of forwards, and other texts with every cache."""
    ids, mask = prompts(*LENGTHS)
    for window in ("uneven", "daedal", "eotp"):
        out = run("threshold", "sequence", window, "dual", "greedy", ids, mask, seed=4)
        assert len({len(w) for w in out.windows}) > 1 and len(set(out.stats.nfe)) > 1
    caches = [run("threshold", "none", "uneven", cache, "greedy", ids, mask, seed=4).windows for cache in CACHES]
    assert caches[0] != caches[1] != caches[2] != caches[0]


# --- seeds ---------------------------------------------------------------------------------------------------------


def drawn_by(method, seed, prompts=("abc", "abc"), **options):
    """Windows and steps of two equal prompts."""
    out = generate(
        denoiser().model, Characters(), prompts, methods=[method], max_new_tokens=12, chat=False, seed=seed, **options
    )
    return list(zip(out.windows, out.stats.commit_step, strict=True))


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("policy=fixed confidence=random", {}),
        ("policy=fixed position_temperature=0.5", {}),
        ("policy=chance steps=12", {}),
        ("policy=threshold", {"do_sample": True}),
        ("policy=chance steps=12", {"do_sample": True}),
    ],
)
def test_seeds_mean_what_they_mean_everywhere(setting, options, cache):
    """A seed is repeatable and another one differs; rows differ; without a seed torch's generator decides."""
    method = MaskedDiffusion.from_strings([f"block_length={BLOCK}", f"cache={cache}", *setting.split()])
    first, again, other = (drawn_by(method, seed, **options) for seed in (1, 1, 2))
    assert first == again and first != other and first[0] != first[1]
    assert drawn_by(method, row_seed(1, 1), ("abc",), **options) == first[1:]
    torch.manual_seed(5)
    free, further = (drawn_by(method, None, **options) for _ in range(2))
    torch.manual_seed(5)
    assert drawn_by(method, None, **options) == free != further and free[0] != free[1]


def test_what_draws_nothing_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn_by(MaskedDiffusion(block_length=BLOCK), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_are_shared_out_row_by_row():
    """Alone and in a batch a window is refused whose blocks do not fit the steps, even if the widest one's do."""
    ids, mask = prompts(*LENGTHS)
    for rows in ((0, 1, 2), (0,), (1,), (2,)):
        blocks = 3 - ids[list(rows), -1] % 3
        fits = bool((2 % blocks == 0).all())
        options = {"gen_length": 12, "block_length": BLOCK, "length": Uneven(), "unmask": FixedCount(2)}
        if fits:
            assert diffusion_generate(denoiser(), ids[list(rows)], mask[list(rows)], **options).windows
        else:
            with pytest.raises(InputError, match="steps=2 is not a multiple of the"):
                diffusion_generate(denoiser(), ids[list(rows)], mask[list(rows)], **options)


def test_rows_that_are_done_are_not_fed_to_the_model():
    model, fed = MaskedDiffusionModel(small()), []
    seen = model.model.register_forward_pre_hook
    seen(lambda module, args, given: fed.append(len(given["input_ids"])), with_kwargs=True)
    ids, mask = prompts(*LENGTHS)
    stats = diffusion_generate(model, ids, mask, gen_length=8, block_length=BLOCK, length=Uneven()).stats
    assert len(fed) == stats.forward_calls and sum(fed) == sum(stats.nfe) < stats.forward_calls * len(ids)
