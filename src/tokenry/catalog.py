"""The list of methods. Importing it imports no method and no torch, so that `tokenry list` is instant."""

from __future__ import annotations

import difflib
import importlib
import re
from dataclasses import dataclass

from .core.errors import InputError

STAGES = {
    "tokenize": "how does raw input become tokens?",
    "select": "which tokens are kept?",
    "represent": "what do the tokens amount to?",
    "decode": "which token comes next?",
    "read": "what does a token carry?",
    "judge": "what is an answer worth?",
    "train": "how to teach with token-level signal?",
}


@dataclass(frozen=True)
class Entry:
    """One method: where it lives and how to find it."""

    slug: str
    stage: str
    target: str
    summary: str
    keywords: str = ""
    experiment: str | None = None  # module that declares `build`, see `measure.experiment`
    further: tuple[str, ...] = ()  # modules of more experiments; each has the name of its module

    def load(self) -> type:
        """Import the method's class."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)

    @property
    def experiments(self) -> dict[str, str]:
        """The module of every experiment by its name; the first one is called like the method."""
        first = {self.slug: self.experiment} if self.experiment else {}
        return first | {module.rpartition(".")[2].replace("_", "-"): module for module in self.further}


METHODS: tuple[Entry, ...] = (
    Entry(
        "kl3m",
        "tokenize",
        "tokenry.tokenize.kl3m:KL3M",
        "train a tokenizer for a domain, or one of short tokens for text correction",
        "bpe vocabulary legal financial domain character ocr spelling train tokenizer",
        "tokenry.evidence.kl3m",
    ),
    Entry(
        "morphological",
        "tokenize",
        "tokenry.tokenize.morphological:Morphological",
        "cut words into roots and suffixes of a dictionary, whose forms share an id, and lose no byte",
        "morphology morpheme turkish agglutinative vowel harmony dictionary subword train tokenizer lossless",
        "tokenry.evidence.morphological",
    ),
    Entry(
        "linguistic-integrity",
        "tokenize",
        "tokenry.tokenize.linguistic_integrity:LinguisticIntegrity",
        "score tokenizers by the share of their tokens that are words, morphemes and roots of a language",
        "morphology turkish evaluate tokenizer benchmark purity boundary fertility compare correlation",
        "tokenry.evidence.linguistic_integrity",
    ),
    Entry(
        "compresskv",
        "select",
        "tokenry.select.compresskv:CompressKV",
        "keep the cache entries that semantic retrieval heads look at, with a budget for each layer",
        "kv cache compression memory long context prompt eviction retrieval heads",
        "tokenry.evidence.compresskv",
    ),
    Entry(
        "token-prepending",
        "represent",
        "tokenry.represent.token_prepending:TokenPrepending",
        "sentence embeddings from a decoder whose early layers see the last state before the sentence",
        "sentence embedding similarity sts retrieval prompt eol training-free",
        "tokenry.evidence.token_prepending",
    ),
    Entry(
        "causal2vec",
        "represent",
        "tokenry.represent.causal2vec:Causal2Vec",
        "text embeddings of a decoder that reads one token with a small encoder's summary before the text",
        "sentence text embedding retrieval contextual token encoder contrastive infonce sentence-transformers lora",
        "tokenry.evidence.causal2vec",
    ),
    Entry(
        "antislop",
        "decode",
        "tokenry.decode.antislop:Antislop",
        "rewind when a banned phrase, regex or n-gram appears, and sample again from its first token",
        "slop ban phrases cliche repetition words backtrack creative writing style",
        "tokenry.evidence.antislop",
    ),
    Entry(
        "cyclicreflex",
        "decode",
        "tokenry.decode.cyclicreflex:CyclicReflex",
        "a triangular wave on the logits of reflection words, so that reasoning neither stops early nor loops",
        "reasoning wait reflection thinking overthinking budget logits schedule",
        "tokenry.evidence.cyclicreflex",
        ("tokenry.evidence.cyclicreflex_reasoner", "tokenry.evidence.cyclicreflex_reasoner_2"),
    ),
    Entry(
        "tip",
        "decode",
        "tokenry.decode.tip:ThoughtSwitchPenalty",
        "a penalty on thought-switching words near the start of each thought",
        "reasoning underthinking penalty switch alternatively baseline",
    ),
    Entry(
        "budget-forcing",
        "decode",
        "tokenry.decode.budget_forcing:BudgetForcing",
        "ignore the end of thinking and append 'Wait', or close thinking at a token limit (s1)",
        "reasoning s1 thinking budget length limit wait baseline",
    ),
    Entry(
        "rectification",
        "decode",
        "tokenry.decode.rectification:Rectification",
        "cap every next token by the risk, known to a small model, that the text it leads to ends undesired",
        "safety detoxification toxic harmful leak dead end value risk controlled decoding guardrail api",
        "tokenry.evidence.rectification",
    ),
    Entry(
        "diffadapt",
        "decode",
        "tokenry.decode.diffadapt:DiffAdapt",
        "a probe reads the question; easy, normal and hard ones get their own prompt, temperature and budget",
        "reasoning difficulty probe adaptive budget overthinking save tokens cost",
        "tokenry.evidence.diffadapt",
    ),
    Entry(
        "skipdecode",
        "decode",
        "tokenry.decode.skipdecode:SkipDecode",
        "later tokens run fewer of the lower middle layers, so that decoding is faster; needs training to keep quality",
        "speed faster layers skip early exit depth schedule batching cache latency inference",
        "tokenry.evidence.skipdecode",
    ),
    Entry(
        "spectr",
        "decode",
        "tokenry.decode.spectr:Spectr",
        "draft several tokens ahead, check them in one forward pass, and keep the model's own distribution exactly",
        "speculative decoding speed faster latency draft model prompt lookup assisted generation lossless multi-draft",
        "tokenry.evidence.spectr",
    ),
    Entry(
        "optimal-mdsd",
        "decode",
        "tokenry.decode.optimal_mdsd:OptimalMDSD",
        "greedy drafts whose verifier accepts as often as can be, and the highest acceptance rate of any drafts",
        "speculative decoding multi-draft optimal transport ceiling acceptance rate verifier draft lossless",
        "tokenry.evidence.optimal_mdsd",
    ),
    Entry(
        "tidar",
        "decode",
        "tokenry.decode.tidar:TiDAR",
        "a model drafts the next tokens by masked diffusion in the forward pass that checks its last draft",
        "speculative decoding speed faster self-drafting diffusion block multi-token prediction latency lossless",
        "tokenry.evidence.tidar",
    ),
    Entry(
        "specreason",
        "decode",
        "tokenry.decode.specreason:SpecReason",
        "a small model writes the reasoning steps, the base model scores each and rewrites those below a threshold",
        "reasoning speculative step draft judge two models faster latency cheap",
        "tokenry.evidence.specreason",
        ("tokenry.evidence.specreason_reasoner_2",),
    ),
    Entry(
        "tvm-search",
        "decode",
        "tokenry.decode.tvm_search:TVMSearch",
        "write several next steps, and go on with those that a token value model trusts most",
        "reasoning tree beam search verifier process reward value guided rebase test-time compute math",
    ),
    Entry(
        "masked-diffusion",
        "decode",
        "tokenry.decode.masked_diffusion:MaskedDiffusion",
        "sample from a masked-diffusion model, by a fixed number of tokens per step, a threshold, or other rules",
        "diffusion masked llada dream fast-dllm parallel decoding threshold factor margin entropy guidance cfg cache",
        "tokenry.evidence.masked_diffusion",
    ),
    Entry(
        "creditdecoding",
        "decode",
        "tokenry.decode.creditdecoding:CreditDecoding",
        "commit tokens of a masked-diffusion model earlier when they have been the best for some steps",
        "diffusion masked llada dream parallel decoding threshold unmask faster credit history",
        "tokenry.evidence.creditdecoding",
    ),
    Entry(
        "daedal",
        "decode",
        "tokenry.decode.daedal:Daedal",
        "let a masked-diffusion model find the length of its answer: the window starts short and grows",
        "diffusion masked llada dream variable length window expand insert end-of-text tokens",
        "tokenry.evidence.daedal",
    ),
    Entry(
        "learn2pd",
        "decode",
        "tokenry.decode.learn2pd:Learn2PD",
        "a tiny trained filter says which tokens of a masked-diffusion model are final; windows end with the text",
        "diffusion masked llada dream parallel decoding learned filter unmask faster eos truncate length eotp",
        "tokenry.evidence.learn2pd",
    ),
    Entry(
        "codefill",
        "decode",
        "tokenry.decode.codefill:CodeFillCompletion",
        "complete names and statements of Python code, those first that are declared in the function, class or file",
        "code completion autocomplete editor lsp python programming source rerank scope beam",
    ),
    Entry(
        "lm-head-neurons",
        "read",
        "tokenry.read.lm_head_neurons:LMHeadNeurons",
        "name every MLP neuron after the tokens its weights point at, and clamp it",
        "interpretability neuron unembedding logit lens feature map clamp steer",
        "tokenry.evidence.lm_head_neurons",
    ),
    Entry(
        "difficulty-probe",
        "read",
        "tokenry.read.difficulty_probe:DifficultyProbeMethod",
        "learn from a model's own samples to tell from the state of a question how difficult it will be",
        "difficulty probe classifier hidden state entropy correctness easy hard reasoning",
    ),
    Entry(
        "hyperdimensional-probe",
        "read",
        "tokenry.read.hyperdimensional_probe:HyperdimensionalProbe",
        "read concepts of one's own list out of a state, and which belongs to which, by hypervectors",
        "interpretability probe concept vector symbolic architecture hypervector binding analogy codebook vsa",
        "tokenry.evidence.hyperdimensional_probe",
    ),
    Entry(
        "refusal-cliff",
        "read",
        "tokenry.read.refusal_cliff:RefusalCliff",
        "follow a model's intent to refuse along its thinking, find where it falls and which heads push it down",
        "safety refusal reasoning alignment probe linear direction attention head ablation curve data selection",
        "tokenry.evidence.refusal_cliff",
        ("tokenry.evidence.select_by_cliff", "tokenry.evidence.probe_along_tokens"),
    ),
    Entry(
        "uqac",
        "read",
        "tokenry.read.uqac:UQAC",
        "walk back along attention from the answer to the tokens that carried it, and say how sure the model is",
        "uncertainty confidence calibration attention chain reasoning answer trust",
        "tokenry.evidence.uqac",
    ),
    Entry(
        "thought-anchors",
        "read",
        "tokenry.read.thought_anchors:ThoughtAnchors",
        "score the sentences of a chain of thought by receiver heads, by hiding them, and by writing them anew",
        "reasoning sentences importance attribution receiver heads attention suppression counterfactual resampling",
        "tokenry.evidence.thought_anchors",
    ),
    Entry(
        "crew",
        "judge",
        "tokenry.judge.crew:CRew",
        "score a solution by the probability of its final answer, and build preference pairs from that",
        "confidence reward verifier best-of-n vote self-consistency math answer dpo",
        "tokenry.evidence.crew",
    ),
    Entry(
        "arise",
        "judge",
        "tokenry.judge.arise:Arise",
        "score how well a model turns more thinking tokens into right answers, question by question",
        "test-time scaling reasoning effort overthinking budget evaluation metric levels",
        "tokenry.evidence.arise",
    ),
    Entry(
        "tvm",
        "judge",
        "tokenry.judge.tvm:TVM",
        "score a solution, and every prefix of it, by a model that learned from shared prefixes which end right",
        "verifier value model reward process outcome orm prm best-of-n vote math token",
        "tokenry.evidence.tvm",
    ),
    Entry(
        "coin",
        "judge",
        "tokenry.judge.coin:Coin",
        "audit a bill for hidden reasoning tokens: receipts from a hash tree, and a few blocks that are opened",
        "hidden reasoning tokens billing audit receipt merkle hash tree commitment inflation provider api trust",
        "tokenry.evidence.coin",
    ),
    Entry(
        "dcsqe",
        "judge",
        "tokenry.judge.dcsqe:DCSQE",
        "mark wrong words of translations and score them, by an estimator that learns from synthetic errors",
        "machine translation quality estimation qe mqm error spans synthetic data constrained beam search seq2seq",
        "tokenry.evidence.dcsqe",
    ),
    Entry(
        "ftpo",
        "train",
        "tokenry.train.ftpo:FTPO",
        "train banned patterns out: at each rewind the chosen tokens must beat the rejected one by a margin",
        "preference optimization dpo lora slop unlearn repetition finetune",
        "tokenry.evidence.ftpo",
    ),
    Entry(
        "personalized-code",
        "train",
        "tokenry.train.personalized_code:PersonalizedCode",
        "tune a model to one software project: all weights, embeddings, the last block, a prefix, or LoRA",
        "code completion project repository finetune prefix tuning lora peft last layer adaptation delta",
        "tokenry.evidence.personalized_code",
    ),
    Entry(
        "rectifier",
        "train",
        "tokenry.train.rectifier:Rectifier",
        "train the small model that rectification reads, from texts labeled desired or undesired",
        "safety dead end value function sarsa offline reinforcement risk toxic",
    ),
    Entry(
        "tvm",
        "train",
        "tokenry.train.tvm:TVMTraining",
        "train the token value model that tvm and tvm-search read, from graded solutions",
        "verifier value reward process supervision labels prefix trie math reasoning",
    ),
    Entry(
        "learn2pd",
        "train",
        "tokenry.train.learn2pd:Learn2PDTraining",
        "train the filter that learn2pd decodes with, from prompts alone",
        "diffusion masked llada dream parallel decoding filter confidence oracle traces",
    ),
    Entry(
        "codefill",
        "train",
        "tokenry.train.codefill:CodeFill",
        "train a small completion model of code on values, token types and statements in models drawn together",
        "code completion python programming source multi-task soft parameter sharing ast syntax",
        "tokenry.evidence.codefill",
    ),
)


def get(slug: str, stage: str | None = None) -> Entry:
    """The entry named `slug`, of this stage if it has one there; an unknown name is refused with the nearest known one.

    A method that is trained and then used has an entry in both stages.
    """
    named = [entry for entry in METHODS if entry.slug == slug]
    if named:
        return next((entry for entry in named if entry.stage == stage), named[0])
    near = difflib.get_close_matches(slug, [e.slug for e in METHODS], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "see `tokenry list`"
    raise InputError(f"there is no method {slug!r}; {hint}")


def load(slug: str) -> type:
    """Import and return the method class named `slug`."""
    return get(slug).load()


def experiment(name: str) -> tuple[Entry, str]:
    """The method that the experiment `name` is about, and the experiment's module; see `Entry.experiments`."""
    for entry in METHODS:
        if name in entry.experiments:
            return entry, entry.experiments[name]
    raise InputError(f"{get(name).slug} has no comparison of its own; it is a part or baseline of another method's")


def experiments() -> list[str]:
    """The names of all experiments, in catalogue order."""
    return [name for entry in METHODS for name in entry.experiments]


def by_stage(stage: str | None = None) -> list[Entry]:
    """The methods of one stage, or all, in catalogue order."""
    if stage is not None and stage not in STAGES:
        raise InputError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
    return [e for e in METHODS if stage in (None, e.stage)]


def find(question: str, limit: int = 5) -> list[Entry]:
    """Methods whose description shares the most word stems with `question`, best first."""
    wanted = _stems(question)
    if not wanted:
        raise InputError("say in a few words what you are looking for, for example 'shorter kv cache'")
    score = {e: len(wanted & _stems(f"{e.slug} {e.stage} {e.summary} {e.keywords}")) for e in METHODS}
    hits = [e for e in METHODS if score[e]]
    return sorted(hits, key=lambda e: -score[e])[:limit]


def _stems(text: str) -> set[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {re.sub(r"(ing|ed|es|s)$", "", w)[:8] for w in words if len(w) > 2}
