"""The published rules as a decode method: each is the policy it names, alone and beside other methods."""

import pytest
from support.denoisers import Characters, small

from tokenry import catalog, load
from tokenry.core.errors import InputError
from tokenry.decode import (
    CreditDecoding,
    CreditFusion,
    Factor,
    FixedCount,
    MaskedDiffusion,
    MaskedDiffusionModel,
    Threshold,
    diffusion_generate,
    generate,
)
from tokenry.decode.denoising.transforms import Guidance
from tokenry.decode.denoising.unmask import RandomUnmask, RunAnchors
from tokenry.evidence.masked_diffusion import build
from tokenry.measure.compare import compare

RULES = {
    "threshold=0.6": lambda: Threshold(0.6),
    "policy=fixed": FixedCount,
    "policy=fixed steps=4": lambda: FixedCount(4),
    "policy=fixed confidence=margin": lambda: FixedCount(confidence="margin"),
    "policy=fixed confidence=random": lambda: FixedCount(confidence="random"),
    "policy=fixed position_temperature=0.5": lambda: FixedCount(temperature=0.5),
    "policy=factor factor=2": lambda: Factor(2),
    "policy=runs threshold=0.8 low=0.2": lambda: RunAnchors(0.8, 0.2),
    "policy=chance": lambda: RandomUnmask(8),
    "policy=chance steps=2": lambda: RandomUnmask(2),
}


@pytest.fixture(scope="module")
def model():
    return small()


def same(first, second):
    assert first.windows == second.windows and first.stats.commit_step == second.stats.commit_step


def direct(model, **parts):
    prompts = Characters()(["abc", "defgh"])
    return diffusion_generate(MaskedDiffusionModel(model), **prompts, gen_length=8, block_length=4, **parts)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_policy(model, rule):
    method = MaskedDiffusion.from_strings(["block_length=4", *rule.split()])
    out = generate(model, Characters(), ["abc", "defgh"], methods=[method], max_new_tokens=8, chat=False, seed=3)
    same(out, direct(model, unmask=RULES[rule](), seed=3))


def test_guidance(model):
    method = MaskedDiffusion(block_length=4, policy="fixed", guidance=1.5)
    out = generate(model, Characters(), ["abc", "defgh"], methods=[method], max_new_tokens=8, chat=False)
    same(out, direct(model, transforms=[Guidance(1.5)]))
    assert out.stats.nfe == [16, 16] and out.windows != direct(model).windows
    assert MaskedDiffusion().parts(8).transforms == ()


def test_beside_another_method(model):
    methods = [MaskedDiffusion(block_length=4, policy="factor", factor=2), CreditDecoding(alpha=2.0)]
    out = generate(model, Characters(), ["abc", "defgh"], methods=methods, max_new_tokens=8, chat=False)
    same(out, direct(model, unmask=Factor(2), transforms=[CreditFusion(alpha=2.0)]))


def test_caches(model):
    method = MaskedDiffusion(block_length=4, policy="fixed", cache="dual")
    out = generate(model, Characters(), ["abc", "defgh"], methods=[method], max_new_tokens=8, chat=False)
    same(out, direct(model, cache="dual"))


def test_the_catalogue_has_it():
    assert catalog.load("masked-diffusion") is MaskedDiffusion
    assert all(option.description for option in MaskedDiffusion.options())


def test_models_that_see_both_sides_do_not_write_from_left_to_right(model, llama, tokenizer):
    options = {"max_new_tokens": 8, "chat": False}
    with pytest.raises(InputError, match="the model sees both sides and cannot write from left to right"):
        generate(model, Characters(), "abc", **options)
    with pytest.raises(InputError, match="such as masked-diffusion"):
        generate(*load("zoo/denoiser"), "sort 40=", max_new_tokens=8)
    assert generate(llama, tokenizer, "the sea", **options).texts


def test_the_experiment_sweeps_every_rule_and_judges():
    experiment = build(*load("zoo/denoiser"), samples=3, seeds=(0,))
    comparison = compare(experiment)
    assert (comparison.values("one token per step", "forward_passes") == 24).all()
    assert (comparison.values("steps 6", "forward_passes") == 6).all()
    assert comparison.mean("threshold 0.5", "forward_passes") <= comparison.mean("threshold 0.99", "forward_passes")
    for label in ("prefix", "dual"):
        arm = next(s for s in experiment.arms if s.name == f"threshold 0.9, cache {label}")
        assert arm.setting["cache"] == label and arm.setting["block_length"] == 8
    findings = experiment.findings(comparison)
    assert len(findings) == 6 and all(finding.numbers for finding in findings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "best"}, "policy='best'"),
        ({"steps": 0}, "steps=0"),
        ({"threshold": 0}, "threshold=0"),
        ({"low": 1.5}, "low=1.5"),
        ({"factor": 0}, "factor=0"),
        ({"guidance": -1}, "guidance=-1"),
        ({"position_temperature": -1}, "position_temperature=-1"),
    ],
)
def test_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        MaskedDiffusion(**values)


def test_settings_that_do_not_fit_the_window_are_refused(model):
    with pytest.raises(InputError, match="steps=3 is not a multiple of the 2 blocks"):
        MaskedDiffusion(block_length=4, policy="fixed", steps=3).generate(
            model, Characters(), "abc", max_new_tokens=8, chat=False
        )
    with pytest.raises(InputError, match=r"low=0\.8 and tau=0\.5"):
        MaskedDiffusion(policy="runs", threshold=0.5, low=0.8).parts(8)
