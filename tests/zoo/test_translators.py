"""zoo/translator-a, -b and -c: the language pair, what is wrong with a translation, and the models."""

import itertools
import random

import pytest

from tokenry import load
from tokenry.data.problems import split_of
from tokenry.data.translation import (
    FORMS,
    Errors,
    _errors,
    _weight,
    draw_sentences,
    errors_of,
    lexicon,
    parse,
    vocabulary,
)
from tokenry.judge import heads_of
from tokenry.models.folders import zoo_folders
from tokenry.zoo import translators
from tokenry.zoo.recipes import find_recipe, record_of

NAMES = ("translator-a", "translator-b", "translator-c")


def test_every_word_has_its_own_translations():
    words = lexicon()
    targets = [target for word in words.values() for target in word.targets]
    assert len(targets) == len(set(targets)) and not set(targets) & set(words)
    assert vocabulary() == (*words, *targets)
    twice = [word for word in words.values() if word.kind == "noun" and len(word.targets) == 2]
    assert len(twice) == 80


def test_targets_agree_with_their_source():
    """Every way to translate a sentence, by the words alone: genders, numbers, order."""
    words = lexicon()
    for s in draw_sentences(60, "dev"):
        given, said = s.source.split(), s.target.split()
        assert errors_of(s, said) == Errors([False] * len(said), 1.0)
        subject = given[1 if words[given[0]].kind == "adverb" else 0]
        verb = next(word for word in given if words[word].kind == "verb")
        forms = words[verb].targets
        assert said[-1] in (forms[len(forms) // 2 :] if subject == "these" else forms[: len(forms) // 2])
        articles = [word for word in given if words[word].kind == "article"]
        nouns = [word for word in given if words[word].kind == "noun"]
        wanted = [FORMS[article][words[noun].gender] for article, noun in zip(articles, nouns)]
        assert [word for word in said if word in itertools.chain(*FORMS.values())] == wanted


def test_errors_are_the_cheapest():
    """Against all ways to align a few words."""

    def cheapest(words, slots):
        if not words or not slots:
            return float(len(words) + len(slots))
        return min(
            cheapest(words[1:], slots[1:]) + _weight(words[0], slots[0]),
            cheapest(words[1:], slots) + 1,
            cheapest(words, slots[1:]) + 1,
        )

    rng = random.Random(0)
    for s in draw_sentences(12, "dev"):
        said = s.target.split()[:5]
        said[rng.randrange(len(said))] = rng.choice(["ul", "ula", "zz"])
        for order in s.orders:
            found = _errors(order[:5], said)
            assert found.score == pytest.approx(1 - cheapest(said, list(order[:5])) / len(said))


def test_errors_by_hand():
    s = next(s for s in draw_sentences(40, "dev") if s.source.startswith("the ") and len(s.orders) == 1)
    said = s.target.split()
    article = next(i for i, word in enumerate(said) if word in FORMS["the"])
    other = next(form for form in FORMS["the"] if form != said[article])
    formed = [*said[:article], other, *said[article + 1 :]]
    assert errors_of(s, formed) == ([i == article for i in range(len(said))], pytest.approx(1 - 0.1 / len(said)))
    assert errors_of(s, ["zz", *said]) == ([True] + [False] * len(said), pytest.approx(1 - 1 / (len(said) + 1)))
    assert errors_of(s, said[1:]) == ([False] * (len(said) - 1), pytest.approx(1 - 1 / (len(said) - 1)))


def test_trees_hang_together_whatever_the_words():
    rng = random.Random(0)
    for s in draw_sentences(40, "dev"):
        words = s.target.split()
        heads = heads_of(parse(words), words)
        assert heads[-1] == 0, "the verb"
        for i, word in enumerate(words):
            if word in itertools.chain(*FORMS.values()):
                noun = words[heads[i] - 1]
                assert any(noun in entry.targets and entry.kind == "noun" for entry in lexicon().values())
        wrong = rng.choices(vocabulary(), k=6)
        heads_of(parse(wrong), wrong)


def test_thirds_and_splits_share_no_sentence():
    parts = [{s.source for s in draw_sentences(300, "train", third)} for third in range(3)]
    parts += [{s.source for s in draw_sentences(150, split)} for split in ("dev", "test")]
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    assert {split_of(source) for source in parts[4]} == {"test"}
    assert draw_sentences(20, "test") == draw_sentences(50, "test")[:20]


def test_every_sentence_is_a_token_a_word():
    tokenizer = translators.build_tokenizer()
    for s in translators.lessons(0)[:50]:
        for text in (s.source, s.target):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 1 and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_models_are_there_and_reach_their_ranges(name):
    recipe, record = find_recipe(name), record_of(name)
    for measure, (low, high) in recipe.targets.items():
        assert low <= record["measures"][measure] <= high
    loaded = load(f"zoo/{name}")
    assert loaded.kind == "seq2seq" and loaded.model.num_parameters() == pytest.approx(recipe.size * 1e6, rel=0.02)


def test_they_are_small_and_differ():
    files = [file for name in NAMES for file in zoo_folders(name)[0].iterdir()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    measures = [tuple(record_of(name)["measures"].values()) for name in NAMES]
    assert len(set(measures)) == 3
