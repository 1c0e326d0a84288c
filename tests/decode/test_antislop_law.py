"""The distribution of the sampler: on small random chains every text has exactly the probability that enumeration gives
it.

The loop runs once for every sequence of draws it can make, so that nothing here is left to chance.
"""

import re
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenry.decode import Antislop, DecodeLoop, Job, NGramBan, PhraseBan, Plugins, RegexBan

RARE = 1e-5  # a soft ban may be overridden ever again; what is less probable than this is not followed


class Chain:
    """A model whose next token depends on the last one alone, and its tokenizer. `table`: (vocabulary + 1, vocabulary),
    the last row for the first token."""

    def __init__(self, pieces, table):
        self.pieces, self.table = pieces, np.asarray(table)
        raw = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
        raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        raw.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)

    @classmethod
    def random(cls, pieces, seed):
        return cls(pieces, np.random.default_rng(seed).dirichlet(np.ones(len(pieces)), size=len(pieces) + 1))

    def text(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def row(self, ids):
        return self.table[ids[-1] if ids else -1]


class ChainEngine:
    calls = tokens_processed = 0
    cache = None

    def __init__(self, chain):
        self.chain, self.ids = chain, None

    def forward(self, tokens, mask=None):
        new = tokens[0].tolist() if mask is None else tokens[0][mask[0].bool()].tolist()
        self.ids = [] if self.ids is None else self.ids + new
        return torch.tensor(self.chain.row(self.ids), dtype=torch.float64).log()[None]

    def rollback(self, row, count):
        del self.ids[-count:]


class Rare(Exception):
    pass


class Script:
    """Stands for `torch.multinomial`: takes the choices it was given, then the first ones, and remembers all."""

    def __init__(self, choices):
        self.choices, self.taken, self.mass = choices, [], 1.0

    def __call__(self, probabilities, count, generator=None):
        flat = probabilities.reshape(-1)
        alive = flat.nonzero()[:, 0]
        number = len(self.taken)
        choice = self.choices[number] if number < len(self.choices) else 0
        self.taken.append((choice, len(alive)))
        self.mass *= float(flat[alive[choice]] / flat.sum())
        if self.mass < RARE:
            raise Rare
        return alive[choice].reshape((*probabilities.shape[:-1], 1))

    def next(self):
        """The choices after these in alphabetical order; None after the last ones."""
        while self.taken and self.taken[-1][0] + 1 == self.taken[-1][1]:
            self.taken.pop()
        return [choice + (n == len(self.taken)) for n, (choice, _) in enumerate(self.taken, 1)] or None


def distribution_of_the_loop(monkeypatch, chain, monitor, length):
    """Probability of every text, from one run of the loop for each sequence of draws."""
    distribution, choices = Counter(), []
    while choices is not None:
        script = Script(choices)
        monkeypatch.setattr(torch, "multinomial", script)
        job = Job(torch.zeros(1, 1, dtype=torch.long), length, do_sample=True)
        runner = DecodeLoop(ChainEngine(chain), job, chain.tokenizer, Plugins(monitors=[monitor]))
        with suppress(Rare):
            text = runner.generate().texts[0]
            distribution[text] += script.mass
        choices = script.next()
    return distribution


def distribution_of_the_page(chain, find, length, factor, also=frozenset()):
    """The process as the method's page has it. `find(text)` gives all (start, rule) of a text; the rejected token is
    lowered at its position, with `also` where given, and nothing else is.
    """
    distribution = Counter()

    def index_of(ids, character):
        return max(i for i in range(len(ids)) if len(chain.text(ids[:i])) <= character)

    def choose(ids, lowered, ignored, mass):
        p = chain.row(ids) * lowered[len(ids)]
        for token, share in enumerate(p / p.sum()):
            if mass * share >= RARE:
                look([*ids, token], lowered, ignored, mass * share)

    def look(ids, lowered, ignored, mass):
        found = sorted((index_of(ids, start), start, rule) for start, rule in find(chain.text(ids)))
        found = [(i, rule) for i, _, rule in found if (i, rule) not in ignored]
        if not found:
            if len(ids) == length:
                distribution[chain.text(ids)] += mass
            else:
                choose(ids, lowered, ignored, mass)
            return
        index, rule = found[0]
        factors = lowered[index].copy()
        factors[[ids[index], *also]] *= factor
        p = chain.row(ids[:index]) * factors
        if p.sum() == 0:
            look(ids, lowered, ignored | {(index, rule)}, mass)
            return
        lowered = [*lowered[:index], factors, *[np.ones(len(p))] * (length - index)]
        if factor > 0 and p.argmax() == ids[index]:
            look(ids, lowered, ignored | {(index, rule)}, mass)
        else:
            choose(ids[:index], lowered, frozenset(k for k in ignored if k[0] < index), mass)

    choose([], [np.ones(len(chain.pieces))] * (length + 1), frozenset(), 1.0)
    return distribution


def distance(one, other):
    """Total variation."""
    return 0.5 * sum(abs(one[text] - other[text]) for text in {*one, *other})


# --- oracles, written without the code under test ------------------------------------------------------------------


def phrases_in(*phrases):
    def find(text):
        for phrase in phrases:
            for match in re.finditer(rf"(?i)(?=(?<!\w){re.escape(phrase)}(?!\w))", text):
                yield match.start(), phrase

    return find


def expressions_in(expression):
    return lambda text: [(match.start(), expression) for match in re.finditer(expression, text)]


STOPS = {"had", "could"}


def ngrams_in(*ngrams):
    """Without the stop words that an n-gram does not have itself, its words stand side by side; longer ones first."""

    def find(text):
        for ngram in sorted(ngrams, key=lambda n: -len(n.split())):
            needed = ngram.split()
            words = [(m.group(), m.start()) for m in re.finditer(r"\w+", text)]
            words = [w for w in words if w[0] not in STOPS or w[0] in needed]
            for i in range(len(words) - len(needed) + 1):
                if [w for w, _ in words[i : i + len(needed)]] == needed:
                    yield words[i][1], ngram

    return find


CASES = {
    "phrase": (["a", "A", " ", "b"], 3, lambda s: PhraseBan(["a b", "b"], s), phrases_in("a b", "b")),
    "joined": (["a", "A", "b"], 3, lambda s: PhraseBan(["ab"], s), phrases_in("ab")),
    "regex": (["a", "b", "c"], 3, lambda s: RegexBan(["a.?b"], strength=s), expressions_in("a.?b")),
    "n-gram": (
        [" sun", " had", " set"],
        3,
        lambda s: NGramBan(["sun set", "had sun"], s),
        ngrams_in("sun set", "had sun"),
    ),
    "n-gram with a stop word": (
        [" could", " had", " feel"],
        3,
        lambda s: NGramBan(["could feel"], s),
        ngrams_in("could feel"),
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("strength", [1.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_the_sampled_distribution_is_the_enumerated_one(monkeypatch, case, strength, seed):
    pieces, length, ban, find = CASES[case]
    chain = Chain.random(pieces, seed)
    factor = 0.0 if strength == 1 else 10 ** (-10 * strength)
    expected = distribution_of_the_page(chain, find, length, factor)
    plain = distribution_of_the_page(chain, lambda text: [], length, factor)
    assert distance(expected, plain) > 0.01 or strength < 1  # the ban matters
    unfollowed = 1 - expected.total()
    assert unfollowed < 0.005
    assert distance(distribution_of_the_loop(monkeypatch, chain, ban(strength), length), expected) <= unfollowed + 1e-9


def test_only_the_rejected_token_is_lowered_unless_every_start_is_asked_for(monkeypatch):
    chain = Chain(["a", "A", "b"], [[0.5, 0.3, 0.2]] * 4)
    found, both = (
        distribution_of_the_loop(monkeypatch, chain, Antislop(phrases=["ab"], **options).monitors()[0], 2)
        for options in ({}, {"start_tokens": True})
    )
    page = distribution_of_the_page(chain, phrases_in("ab"), 2, 0.0)
    local = distribution_of_the_page(chain, phrases_in("ab"), 2, 0.0, also=[0, 1])
    assert distance(found, page) < 1e-9 and distance(both, local) < 1e-9
    assert distance(page, local) > 0.08
