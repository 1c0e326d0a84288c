"""A text where a list of texts is expected: a list of one, or refused; never a list of its letters."""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from transformers import BertConfig, BertModel

import tokenry
from tokenry import InputError
from tokenry.data.translation import draw_sentences, errors_of, parse
from tokenry.decode import (
    Antislop,
    NGramBan,
    PhraseBan,
    RegexBan,
    acceptance_report,
    encode_prompts,
    loop,
    reflection_token_ids,
)
from tokenry.decode.reasoning.step_prompts import StepPrompts
from tokenry.decode.reasoning.steps import StepModel
from tokenry.judge import (
    DCSQE,
    CRewScorer,
    Fingerprinter,
    QualityEstimator,
    Reference,
    Results,
    SlopProfile,
    Tags,
    TokenValueModel,
    TVMScorer,
    annotate_severity,
    heads_of,
    overused,
    ter_tags,
)
from tokenry.judge.text.slop import Pattern
from tokenry.learned.difficulty_probe import read_questions
from tokenry.learned.hyper_probe import Codebook, HyperProbe
from tokenry.models.embedders import input_embedder
from tokenry.models.load import Loaded
from tokenry.read.anchors.rollouts import Rollouts
from tokenry.read.cliff.examples import end_states, traced
from tokenry.read.difficulty_probe import question_states
from tokenry.read.hyper.states import read_states
from tokenry.read.lm_head_neurons import clamp_effect
from tokenry.represent import Causal2Vec, Causal2VecTransformer, PromptEmbedder, train_contrastive
from tokenry.represent.text.sentence_transformer import TokenPrependingTransformer
from tokenry.tokenize import KL3M, LinguisticIntegrity, Morphological, SetLexicon
from tokenry.tokenize.text.boundaries import cuts_in_text
from tokenry.tokenize.text.measures import boundary_stability, term_lengths, token_counts, tokens_per_character

TEXT = "the old lighthouse"
BOOK = Codebook([TEXT, "a"], 256)
PROBE = HyperProbe(BOOK, 4, 0)
VALUING = TokenValueModel.from_language_model
PROFILE = SlopProfile(words=[Pattern(TEXT, 3, 1.0), Pattern("t", 3, 1.0)])


def context_embedder(model, tokenizer):
    """Without a token that needs an encoder of its own."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    encoder = BertModel(BertConfig(hidden_size=16, **sizes))
    return Causal2Vec().untrained(model, tokenizer, (encoder, tokenizer))


def write(model, tokenizer, stop):
    inputs = encode_prompts(tokenizer, [TEXT])
    options = {"custom_generate": loop, "processing_class": tokenizer, "pad_token_id": 1, "max_new_tokens": 12}
    return model.generate(**inputs, stop=stop, **options)


ONE = {  # a single text is a list of one
    "PhraseBan.phrases": lambda m, t, x: PhraseBan(x).written,
    "RegexBan.patterns": lambda m, t, x: [p.pattern for p in RegexBan(x).patterns],
    "NGramBan.ngrams": lambda m, t, x: [sorted(n.root.children) for n in [NGramBan(x).ngrams]],
    "loop.stop": lambda m, t, x: write(m, t, x),
    "generate.stop": lambda m, t, x: tokenry.generate(m, t, TEXT, stop=x, max_new_tokens=9, pad_token_id=1).new_ids,
    "generate.prompts": lambda m, t, x: tokenry.generate(m, t, x, max_new_tokens=4, pad_token_id=1).new_ids,
    "encode_prompts.prompts": lambda m, t, x: encode_prompts(t, x)["input_ids"],
    "read_questions.prompts": lambda m, t, x: read_questions(m, t, x).states,
    "Codebook.encode_pairs": lambda m, t, x: BOOK.encode_pairs([], x),
    "HyperProbe.read": lambda m, t, x: PROBE.read(torch.ones(4), x, 2),
    "end_states": lambda m, t, x: end_states(m, t, x, -1),
    "traced": lambda m, t, x: [trace.ids.tolist() for trace in traced(m, t, x, -1)],
    "read_states": lambda m, t, x: read_states(m, t, x),
    "question_states.prompts": lambda m, t, x: question_states(m, t, x),
    "clamp_effect.prompts": lambda m, t, x: [row["prompt"] for row in clamp_effect(m, t, x, (0, 0), [0.0]).rows],
    "CRewScorer.read": lambda m, t, x: [s.text for s in CRewScorer(m, t).read(x, x)],
    "TVMScorer.token_values": lambda m, t, x: TVMScorer(VALUING(m, t), t).token_values(x, x),
    "StepPrompts.judging": lambda m, t, x: StepPrompts(chat=False, think="").judging(t, TEXT, x, "so"),
    "StepModel.starts": lambda m, t, x: StepModel(Loaded(m, t), x).starts,
    "Reference.count": lambda m, t, x: Reference.count("x", x),
    "SlopProfile.fit": lambda m, t, x: SlopProfile.fit(x, Reference("x", 1, {}, {}), 1),
    "SlopProfile.ban_list": lambda m, t, x: PROFILE.ban_list(whitelist=x),
    "overused": lambda m, t, x: overused(x, x, 5, 5),
    "Fingerprinter.texts": lambda m, t, x: Fingerprinter(input_embedder(m, t), t).texts(x).tolist(),
    "ContextEmbedder.rows": lambda m, t, x: context_embedder(m, t).rows(x),
    "ContextEmbedder.tokenize": lambda m, t, x: context_embedder(m, t).tokenize(x)["input_ids"],
    "Causal2VecTransformer": lambda m, t, x: Causal2VecTransformer(context_embedder(m, t)).preprocess(x)["input_ids"],
    "PromptEmbedder.rows": lambda m, t, x: PromptEmbedder(m, t).rows(x),
    "PromptEmbedder.tokenize": lambda m, t, x: PromptEmbedder(m, t).tokenize(x)["input_ids"],
    "preprocess": lambda m, t, x: TokenPrependingTransformer(PromptEmbedder(m, t)).preprocess(x)["input_ids"],
}
REFUSED = {  # one text cannot be what is meant
    "Rollouts": lambda m, t, x: Rollouts(x, [[]], None),
    "Results": lambda m, t, x: Results([[0, 1]], [[1, 2]], x, [1, 2]),
    "ContextEmbedder.encode": lambda m, t, x: context_embedder(m, t).encode(x),
    "train_contrastive": lambda m, t, x: train_contrastive(None, [x, x]),
    "PromptEmbedder.encode": lambda m, t, x: PromptEmbedder(m, t).encode(x),
    "DCSQE.translate": lambda m, t, x: DCSQE().translate(tokenry.load("zoo/translator-a"), x, x),
    "annotate_severity": lambda m, t, x: annotate_severity(
        tokenry.load("zoo/translator-b"), x, [list(x)], [Tags([True] * len(x), False)]
    ),
    "QualityEstimator.estimate": lambda m, t, x: QualityEstimator.estimate(m, t, x, x),
    "heads_of": lambda m, t, x: heads_of([0, *[1] * (len(x) - 1)], x),
    "ter_tags": lambda m, t, x: ter_tags(x, x),
    "errors_of": lambda m, t, x: errors_of(draw_sentences(1, "dev")[0], x),
    "parse": lambda m, t, x: parse(x),
    "KL3M.train": lambda m, t, x: KL3M().train(x),
    "KL3M.train, kind=char": lambda m, t, x: KL3M(kind="char").train(x),
    "KL3M.custom_tokens": lambda m, t, x: KL3M(custom_tokens=x),  # a path
    "Morphological.train": lambda m, t, x: Morphological().train(x),
    "integrity.texts": lambda m, t, x: LinguisticIntegrity().score({"t": t}, x, SetLexicon(["a"])),
    "SetLexicon.words": lambda m, t, x: SetLexicon(words=x),
    "cuts_in_text.words": lambda m, t, x: cuts_in_text(x, [x], []),
    "token_counts": lambda m, t, x: token_counts(t, x),
    "tokens_per_character": lambda m, t, x: tokens_per_character(t, x),
    "term_lengths": lambda m, t, x: term_lengths(t, x),
    "boundary_stability": lambda m, t, x: boundary_stability(t, ("ab", "cd")),
    "Codebook.concepts": lambda m, t, x: Codebook(x),
    "Antislop.phrases": lambda m, t, x: Antislop(phrases=x),  # a path
    "from_strings": lambda m, t, x: Antislop.from_strings(x),
}


@pytest.mark.parametrize("case", ONE)
def test_a_text_is_a_list_of_one(llama, tokenizer, case):
    one, many = (ONE[case](llama, tokenizer, given) for given in (TEXT, [TEXT]))
    assert torch.equal(one, many) if isinstance(one, torch.Tensor) else one == many


@pytest.mark.parametrize("case", REFUSED)
def test_or_it_is_refused(llama, tokenizer, case):
    with pytest.raises(InputError):
        REFUSED[case](llama, tokenizer, TEXT)


def test_short_ones(tokenizer):
    assert reflection_token_ids(tokenizer, " the") == reflection_token_ids(tokenizer, [" the"])
    assert StepPrompts(answers="boxed") == StepPrompts(answers=["boxed"])
    p = torch.tensor([[0.5, 0.5]])
    assert acceptance_report(p, p, (1,), "naive") == acceptance_report(p, p, (1,), ["naive"])


@pytest.mark.parametrize("make", [PhraseBan, RegexBan, NGramBan])
def test_what_is_no_text_is_named(make):
    with pytest.raises(InputError, match="2 is of type int, not text"):
        make([TEXT, 5] if make is not NGramBan else [[TEXT, 5]])


def test_a_prompt_that_is_none_is_named(tokenizer):
    with pytest.raises(InputError, match="prompt 2 is of type float, not text"):
        encode_prompts(tokenizer, [TEXT, 5.0])


LIST_OF_TEXTS = re.compile(r"(Sequence|Iterable|list)\[(str\b|Prompt\b|Messages\b|tuple\[str, str\])")
KNOWN = {  # function: parameters; those without a case above hand on to one that has
    "check_floats": {"names"},
    "acceptance_report": {"verifiers"},
    "NGramBan.__init__": {"ngrams"},
    "PhraseBan.__init__": {"phrases"},
    "RegexBan.__init__": {"patterns"},
    "generate": {"stop"},
    "loop": {"stop"},
    "Job.__init__": {"stop"},
    "Words.__init__": {"stop"},
    "Work.__init__": {"stop"},
    "remote": {"stop"},
    "Plan.__init__": {"strategy"},
    "Call.__init__": {"stop"},
    "DiffAdapt.plan": {"prompts"},
    "DiffAdapt.generate": {"prompts"},
    "generate_by_strategy": {"prompts"},
    "EGPTraces.collect": {"prompts"},
    "TraceMethod.collect": {"prompts"},
    "collect_egp_traces": {"prompts"},
    "SpecReason.run": {"prompts"},
    "SpeculativeReasoner.generate_many": {"problems"},
    "SpeculativeReasoner.run": {"problems"},
    "StepModel.__init__": {"starts"},
    "StepPrompts.judging": {"steps"},
    "DigitScorer.score": {"steps"},
    "LikelihoodScorer.score": {"steps"},
    "StepScorer.score": {"steps"},
    "reflection_token_ids": {"words"},
    "read_questions": {"prompts"},
    "Results.__init__": {"questions", "levels"},
    "Codebook.__init__": {"concepts"},
    "Codebook.encode_pairs": {"words"},
    "HyperProbe.read": {"given"},
    "read_states": {"texts"},
    "traced": {"texts"},
    "end_states": {"texts"},
    "RefusalCliff.probe": {"texts"},
    "Rollouts.__init__": {"sentences"},
    "CRew.judge": {"gold"},
    "CRewScorer.score_batch": {"prompts", "solutions"},
    "CRewScorer.read": {"prompts", "solutions"},
    "TVMScorer.token_values": {"prompts", "solutions"},
    "Embedder.__init__": {"embed"},  # a function of such a list
    "DCSQE.translate": {"sources", "references"},
    "QualityEstimator.estimate": {"sources", "translations"},
    "annotate_severity": {"sources", "translations"},
    "errors_of": {"translation"},
    "heads_of": {"words"},
    "parse": {"words"},
    "ter_tags": {"translation", "reference"},
    "Reference.count": {"texts"},
    "SlopProfile.fit": {"texts"},
    "SlopProfile.ban_list": {"whitelist"},
    "overused": {"prompts", "texts"},
    "Fingerprinter.texts": {"texts"},
    "Method.from_strings": {"pairs"},
    "DifficultyProbeMethod.profile": {"prompts"},
    "DifficultyProbeMethod.probe": {"prompts"},
    "entropy_profile": {"prompts"},
    "question_states": {"prompts"},
    "clamp_effect": {"prompts"},
    "ContextEmbedder.rows": {"texts"},
    "ContextEmbedder.tokenize": {"texts"},
    "ContextEmbedder.encode": {"sentences"},
    "Causal2VecTransformer.preprocess": {"inputs"},
    "train_contrastive": {"rows"},
    "PromptEmbedder.rows": {"texts"},
    "PromptEmbedder.tokenize": {"texts"},
    "PromptEmbedder.encode": {"sentences"},
    "PromptEmbedder.encode_layers": {"sentences"},
    "TokenPrependingTransformer.preprocess": {"inputs"},
    "Encoder.encode": {"sentences"},
    "custom_tokens": {"groups"},
    "KL3M.train": {"texts"},
    "Morphological.train": {"texts"},
    "MorphTokenizer.convert_tokens_to_string": {"tokens"},
    "LinguisticIntegrity.score": {"texts"},
    "LinguisticIntegrity.train": {"texts"},
    "SetLexicon.__init__": {"morphemes", "roots", "words"},
    "boundary_f1": {"words"},
    "integrity": {"texts"},
    "IntegrityReport.__init__": {"examples"},
    "colored_by_kind": {"parts"},
    "render": {"kinds"},
    "word_counts": {"texts"},
    "inner_cuts": {"parts"},
    "cuts_in_text": {"words"},
    "TokenizeMethod.train": {"texts"},
    "token_counts": {"texts"},
    "tokens_per_character": {"texts"},
    "term_lengths": {"terms"},
    "boundary_stability": {"pairs"},
}


def public_functions():
    for info in pkgutil.walk_packages(tokenry.__path__, "tokenry."):
        if info.ispkg or re.search(r"\.(cli|evidence|measure|zoo|__main__|kvpress|corpora)\b", info.name):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__ == info.name:
                yield name, value
            elif inspect.isclass(value) and value.__module__ == info.name and not re.search("Config$|Output$", name):
                for method, inner in vars(value).items():
                    inner = getattr(inner, "__func__", inner)
                    if inspect.isfunction(inner) and not re.match("_(?!_init__)", method):
                        yield f"{name}.{method}", inner


def test_every_public_parameter_that_takes_texts_is_known():
    """A new one gets a case above, then a line in KNOWN."""
    found = {}
    for name, function in public_functions():
        for parameter, kind in function.__annotations__.items():
            if parameter != "return" and LIST_OF_TEXTS.search(str(kind)):
                found.setdefault(name, set()).add(parameter)
    assert found == KNOWN
