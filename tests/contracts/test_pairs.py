"""Any two methods of the catalogue act together in one generation, or are refused with the reason."""

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, product

import pytest
import torch
from support.families import SIZES, build, own_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry import catalog, generate
from tokenry.core.errors import InputError
from tokenry.decode.reasoning.step_prompts import StepPrompts
from tokenry.decode.reasoning.strategies import Strategy
from tokenry.learned.confidence_filter import ConfidenceFilter
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.learned.difficulty_probe import CLASSES, DifficultyProbe
from tokenry.learned.token_values import TokenValueModel
from tokenry.models.anatomy import decoder_layers
from tokenry.models.load import Loaded
from tokenry.models.masks import make_bidirectional

SLOT, MASK, NEW = 3, 4, 16
PROMPTS = ["the old lighthouse stood on the cliff and the sea was", "Elara walked along"]
REFLECT = {"token_ids": tuple(range(2, 320, 2)), "end_think": None}
DIFFUSION = {"masked-diffusion", "creditdecoding", "daedal", "learn2pd"}
DRAFTING = {"spectr", "optimal-mdsd", "tidar"}
GREEDY = {*DRAFTING, "learn2pd", "codefill"}  # drafts change what is drawn, the others take the best tokens
BLOCKS = {"block_length": 4}


@dataclass(frozen=True)
class Use:
    """How a method is used here.

    Attributes:
        acts: options with which it changes the text.
        neutral: those with which it does nothing; None: it has no such setting.
        words: what a refusal calls it, or what it brings.
        needs: {option: which of the things that were learned}.
        again: what differs in the second one of a pair of the same method; none: two do what one does.
    """

    acts: dict
    neutral: dict | None
    words: str
    needs: dict = field(default_factory=dict)
    again: dict = field(default_factory=dict)


def strategies(suffix, temperature, budget):
    return {"strategies": tuple(Strategy(name, suffix, temperature, budget) for name in CLASSES)}


DRAFTS = {"num_drafts": 2, "draft_length": 2}
DAEDAL = {"block_length": 4, "low_conf_threshold": 0, "eos_confidence_threshold": 0}
KEEP = {"window": 3, "heads": "all", "adaptive": False}
USES = {
    "antislop": Use(
        {"regexes": ["[A-z]"]}, {"regexes": ["[A-z]"], "strength": 0}, "monitor", again={"regexes": ["[^A-z]"]}
    ),
    "cyclicreflex": Use(
        {**REFLECT, "amplitude": 40, "period": 8},
        {**REFLECT, "amplitude": 0},
        "processor",
        again={"token_ids": tuple(range(2, 160))},
    ),
    "tip": Use(
        {**REFLECT, "alpha": 40}, {**REFLECT, "alpha": 0}, "processor", again={"token_ids": tuple(range(2, 160))}
    ),
    "budget-forcing": Use(
        {"end_think": (40,), "max_thinking_tokens": 5, "close_text": "the sea"},
        {"end_think": (40,), "min_ignores": 0},
        "monitor",
    ),
    "rectification": Use({}, {"eps": 0.0, "p_min": 1.0}, "final_processor", {"rectifier": "rectifier"}),
    "diffadapt": Use(strategies(" was", 0.5, 0.6), strategies("", 1.0, 1.0), "diffadapt", {"probe": "probe"}),
    "skipdecode": Use({"e_min": 2, "warmup": 1}, {"e_min": 4}, "layer"),
    "spectr": Use({"drafter": "ngram", **DRAFTS}, None, "draft|speculation"),
    "optimal-mdsd": Use({"drafter": "early-exit", **DRAFTS}, None, "draft|speculation"),
    "tidar": Use({"mask_token_id": MASK, "block_size": 3}, None, "tidar|draft|speculation"),
    "specreason": Use(
        {"max_step_tokens": 4, "first_n_base_steps": 1, "threshold": 0.0, "prompts": StepPrompts(chat=False)},
        None,
        "specreason",
        {"small": "small"},
    ),
    "tvm-search": Use({"beams": 2, "candidates": 6, "max_step_tokens": 3}, None, "tvm-search", {"values": "values"}),
    "masked-diffusion": Use({"block_length": 4, "guidance": 2.0}, {"block_length": 4}, "masked-diffusion"),
    "creditdecoding": Use({"block_length": 4, "alpha": 9.0}, {"block_length": 4, "alpha": 0}, "creditdecoding"),
    "daedal": Use(
        {**DAEDAL, "initial_gen_length": 8},
        {**DAEDAL, "initial_gen_length": NEW},
        "daedal|window",
    ),
    "learn2pd": Use({}, None, "learn2pd|window|commit", {"filter": "filter"}),
    "codefill": Use({"statement_tokens": NEW}, None, "codefill"),
}
CONTEXTS = {
    "compresskv": Use({**KEEP, "budget": 5}, {**KEEP, "budget": 512}, "compress|both ways"),
    "token-prepending": Use({}, None, "token prepending|TP"),
    "skipdecode in a context": Use(
        {"e_min": 3, "warmup": 1, "schedule": "constant", "planned_new_tokens": NEW},
        {"e_min": 4, "planned_new_tokens": 99},
        "skip",
        again={"e_min": 2},
    ),
}
ALL = {**USES, **CONTEXTS}


def sees_both(*names):
    """The models on which a pair is tried: True for one that sees both sides."""
    return sorted({name in DIFFUSION for name in names if name not in CONTEXTS} or {False})


DECODE = list(combinations_with_replacement(USES, 2))
MIXED = list(product(CONTEXTS, USES))
OUTER = list(combinations_with_replacement(CONTEXTS, 2))
PAIRS = [(one, other, both) for one, other in DECODE + MIXED + OUTER for both in sees_both(one, other)]


def test_every_method_that_acts_in_a_generation_is_here():
    entries = [entry for stage in ("select", "represent", "decode") for entry in catalog.by_stage(stage)]
    slugs = {e.slug for e in entries if e.stage != "represent" or "__call__" in vars(e.load())}  # others are no context
    assert {name.partition(" ")[0] for name in ALL} == slugs


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=4, num_attention_heads=4, bos_token_id=None, eos_token_id=0)
    denoiser = make_bidirectional(LlamaForCausalLM(config)).eval()
    denoiser.config.mask_token_id, denoiser.config.pad_token_id = MASK, 1
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return {False: build("llama"), True: denoiser}


@pytest.fixture(scope="module")
def learned(models, tokenizer):
    """What methods have learned; random, since it only has to act."""
    torch.manual_seed(3)
    rectifier = DeadEndValueModel(build("qwen2")).bind(tokenizer).eval()
    with torch.no_grad():
        rectifier.q_head[-1].bias.copy_(-torch.randint(2, (320,)))
    random_filter = ConfidenceFilter(4)
    with torch.no_grad():
        for parameter in random_filter.parameters():
            parameter.mul_(6.0)
    values = TokenValueModel.from_language_model(build("qwen2"), tokenizer).eval()
    with torch.no_grad():
        values.head.weight.normal_()
    return {
        "rectifier": rectifier,
        "values": values,
        "filter": random_filter.bind(models[True]),
        "probe": DifficultyProbe(32, 8).bind(models[False], tokenizer),
        "small": Loaded(build("qwen2"), tokenizer),
    }


class Bench:
    """Runs uses of methods, and remembers what each wrote alone."""

    def __init__(self, models, tokenizer, learned):
        self.models, self.tokenizer, self.learned = models, tokenizer, learned
        self.known = {}
        self.plain = {both: self.logits(both) for both in models}

    def logits(self, both):
        with torch.no_grad():
            return self.models[both](torch.arange(5, 30)[None]).logits

    def method(self, name, how):
        use = ALL[name]
        options = {"acts": use.acts, "neutral": use.neutral, "again": {**use.acts, **use.again}}[how]
        given = {option: self.learned[one] for option, one in use.needs.items()}
        return catalog.load(name.partition(" ")[0])(**given, **options)

    def entered(self, method, both):
        """The context of a method on a model; the slot is a token that a prompt can have."""
        slot = {"slot_token_id": SLOT} if method.stage == "represent" else {}
        return method(self.models[both], **slot)

    def run(self, uses, both, sample, rows):
        """Write with `uses` [(name, how)], in this order. The model is as before then, also when it is refused."""
        model, before, names = self.models[both], self.states(both), [name for name, _ in uses]
        prompts = self.tokenizer(PROMPTS[-rows:])["input_ids"]
        if "token-prepending" in names:
            prompts = [[SLOT, *ids] for ids in prompts]
        if {"diffadapt", "specreason", "codefill"} & {*names}:  # which take texts
            prompts = self.tokenizer.batch_decode(prompts)
        made = [(name in CONTEXTS, self.method(name, how)) for name, how in uses]
        try:
            with ExitStack() as stack:
                for is_context, method in made:
                    if is_context:
                        stack.enter_context(self.entered(method, both))
                methods = [method for is_context, method in made if not is_context]
                return generate(
                    model, self.tokenizer, prompts, methods=methods, max_new_tokens=NEW, do_sample=sample, seed=5
                )
        finally:
            assert own_hooks(model) == [] and self.states(both) == before
            assert torch.equal(self.logits(both), self.plain[both])

    def states(self, both):
        model = self.models[both]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        blocks = [id(block) for block in decoder_layers(model)]
        return hooks, blocks, model.config._attn_implementation, [sorted(vars(m)) for m in model.modules()]

    def alone(self, name, both, sample, rows):
        """What a method writes alone; None where it is refused."""
        key = name, both, sample, rows
        if key not in self.known:
            try:
                self.known[key] = self.run([(name, "acts")], both, sample, rows).new_ids
            except InputError:
                self.known[key] = None
        return self.known[key]


@pytest.fixture(scope="module")
def bench(models, tokenizer, learned):
    return Bench(models, tokenizer, learned)


def check_refusal(error, one, other):
    """One sentence that names both, or what they bring; or a context, which knows forwards but not whose they are."""
    sentence = str(error)
    assert "\n" not in sentence and len(sentence) < 300 and not re.search(r"[.!?] [A-Z]", sentence)
    named = [bool(re.search(ALL[name].words, sentence)) for name in (one, other)]
    assert all(named) or (one in CONTEXTS and any(named)), sentence


@pytest.mark.parametrize(("one", "other", "both"), PAIRS, ids=[f"{a}+{b}{'+denoiser' * c}" for a, b, c in PAIRS])
def test_two_methods_act_together_or_are_refused(one, other, both, bench):
    """Together means: each of them changes what the other one writes alone, and does not where it is neutral."""
    sample, rows = not GREEDY & {one, other}, 1 if "tidar" in (one, other) else 2
    second = "again" if one == other else "acts"
    try:
        written = bench.run([(one, "acts"), (other, second)], both, sample, rows)
    except InputError as refusal:
        check_refusal(refusal, one, other)
        return
    turned = bench.run([(other, second), (one, "acts")], both, sample, rows)
    assert turned.new_ids == written.new_ids or both  # transforms of denoisers act in order
    for name, rest in ((one, other), (other, one)):
        alone = bench.alone(rest, both, sample, rows)
        if name in DRAFTING:  # the same text, in fewer forwards
            assert written.new_ids == alone and written.stats.drafted > 0
        elif one != other or ALL[name].again:
            assert written.new_ids != alone, f"{name} does nothing beside {rest}"
        if ALL[name].neutral is not None:
            neutral = bench.run([(name, "neutral"), (rest, "acts")], both, sample, rows)
            assert neutral.new_ids == alone, f"{name} is not neutral beside {rest}"
