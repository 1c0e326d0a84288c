"""What counts as equal and as a word, in every script, for bans, n-grams and counts alike; and text that grows."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenry.decode import NGramBan, PhraseBan, RegexBan, SequenceState
from tokenry.decode.generation.monitor import held_tokens
from tokenry.judge import Reference, SlopProfile
from tokenry.judge.text.slop import Pattern
from tokenry.text.words import FoldedText, WordList, content_words, fold, words
from tokenry.train.preference.pairs import pairs_from_rewinds

# --- what a person calls equal ---------------------------------------------------------------------------------------

EQUAL = {
    "marks apart": ("the cafe\u0301 terrace", "the café terrace"),
    "marks in another order": ("the ca\u0323\u0302n tower", "the cậ\u006e tower"),
    "Hangul apart": (unicodedata.normalize("NFD", "오래된 등대"), "오래된 등대"),
    "kana apart": (unicodedata.normalize("NFD", "ガラス"), "ガラス"),
    "apostrophe": ("can’t help feeling", "can't help feeling"),
    "no-break space": ("a testament\u00a0to time", "a testament to time"),
    "narrow space": ("a testament\u202fto time", "a testament to time"),
    "sharp s": ("die STRASSE entlang", "die straße entlang"),
    "capital sharp s": ("die STRAẞE entlang", "die Strasse entlang"),
    "dotted I": ("İstanbul nights", "istanbul nights"),
    "dotted I apart": ("I\u0307stanbul nights", "istanbul nights"),
    "final sigma": ("ΤΟ ΦΩΣ ΤΟΥ", "το φως του"),
    "ligature": ("the ﬁnal dance", "the final dance"),
}
LONGER = {"marks apart", "dotted I apart", "Hangul apart", "kana apart"}


def row_of(tokenizer, text):
    row = SequenceState(0, [], tokenizer)
    for token in tokenizer.encode(text, add_special_tokens=False):
        row.append(token)
    return row


def spans(tokenizer, text, monitor):
    """What the monitor rejects in the whole text, one after the other."""
    row, found = row_of(tokenizer, text), []
    while violation := monitor.check(row):
        found.append(row.text[slice(*violation.span)])
        row.ignored.add((violation.index, violation.rule))
    return found


@pytest.mark.parametrize("one, other", EQUAL.values(), ids=EQUAL)
def test_what_a_person_calls_equal_is_equal_everywhere(tokenizer, one, other):
    for text, pattern in ((one, other), (other, one)):
        whole = f"so {text}, and"
        assert spans(tokenizer, whole, PhraseBan([pattern])) == [text]
        assert spans(tokenizer, whole, NGramBan([pattern])) == [text]
        assert [w.text for w in words(text)] == [w.text for w in words(pattern)]
        grams = [w.text for w in words(pattern)]
        listed = SlopProfile(bigrams=[Pattern(" ".join(grams[:2]), 1, 1.0)])
        assert len(grams) < 2 or listed.score(text) == 1000 * 2 / len(grams)
        assert Reference.count("x", [text], 1).bigrams == Reference.count("x", [pattern], 1).bigrams
        assert SlopProfile(phrases=[Pattern(pattern, 1, 1.0)]).ban_list({"phrases": 1}, [text])["phrases"] == []


@given(st.text(st.characters(codec="utf-8"), max_size=20))
@example("ᾳ\u0316")
@example("i\u0307\u0323")
@settings(max_examples=300, deadline=None)
def test_composed_and_decomposed_fold_alike(text):
    assert fold(unicodedata.normalize("NFC", text)) == fold(unicodedata.normalize("NFD", text))


# --- word boundaries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, pattern, found",
    [
        ("小刚喜欢吃苹果", "苹果", True),
        ("我用Python编程", "Python", True),
        ("我用Pythonic编程", "Python", False),
        ("ガラスの灯台", "灯台", True),
        ("ガラスの灯台", "ガラ", False),  # within a run of katakana
        ("これはガラスです", "ガラス", True),
        ("ความเงียบงัน", "เงียบ", True),
        ("मैं हिन्दी बोलता हूँ", "हिन्दी", True),
        ("मैं हिन्दी बोलता हूँ", "हिन", False),  # would part a letter from its vowel sign
        ("오래된 등대", "등대", True),
        ("a tomcat sat", "cat", False),
        ("the cafe\u0301", "cafe", False),
        ("l’homme seul", "homme", True),
        ("the _sea_ rose", "sea", True),
        ("👩‍💻 and 👩", "👩‍💻", True),
    ],
)
def test_words_begin_and_end_where_unicode_says(tokenizer, text, pattern, found):
    assert spans(tokenizer, text, PhraseBan([pattern])) == ([pattern] if found else [])


def test_words_of_any_script():
    def texts(text):
        return [word.text for word in words(text)]

    assert texts("我爱Python编程3") == ["我", "爱", "python", "编", "程", "3"]
    assert texts("Don’t stop_the end.Next") == ["don't", "stop", "the", "end", "next"]
    assert [w.text for w in content_words("मैं हिन्दी 12 बोलता")] == ["मैं", "हिन्दी", "बोलता"]
    text = "naïve — İstanbul ß"
    assert [text[w.start : w.stop] for w in words(text)] == ["naïve", "İstanbul", "ß"]


# --- stop words in n-grams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ngram, text, found",
    [
        ("could feel", "it makes me feel", []),
        ("could feel", "you could not feel it", ["could not feel"]),
        ("could feel", "could it, could they feel it", ["could they feel"]),
        ("one would", "one of them would", ["one of them would"]),
        ("one would", "no one", []),
        ("sun dipped", "the sun had then dipped", ["sun had then dipped"]),
        ("24 hours", "in 24 long hours", []),
        ("24 hours", "in 24 hours or 36 hours", ["24 hours"]),
        ("24 hours", "24 of the hours", ["24 of the hours"]),
        ("don’t stop", "don't you stop", ["don't you stop"]),
        ("苹果", "小刚喜欢吃苹果", ["苹果"]),
    ],
)
def test_ngrams_keep_every_word_that_was_written(tokenizer, ngram, text, found):
    assert spans(tokenizer, text, NGramBan([ngram])) == found
    assert spans(tokenizer, text, NGramBan([ngram, "sun horizon", "could see", "the end of it"])) == found


def test_pairs_are_kept_from_what_the_bans_reject(tokenizer):
    """Stop words that an n-gram has, and what is folded, count for training pairs as they do for the sampler."""
    (sea,) = tokenizer.encode(" sea")

    def chosen(rule, text):
        rewind = {"context_ids": tokenizer.encode(text), "rejected": 50, "candidates": [(sea, 0.5)], "rule": rule}
        return [pair["chosen_ids"] for pair in pairs_from_rewinds([rewind], tokenizer)]

    assert chosen("ngram:could sea", "the whisper of the") == [[sea]]
    assert chosen("ngram:could sea", "you could not") == []
    assert chosen("phrase:CAFÉ sea", "the cafe\u0301") == []
    assert chosen("phrase:CAFÉ sea", "the cafe") == [[sea]]


# --- text that grows and shrinks -------------------------------------------------------------------------------------

PIECES = [*" e'’I_.3ßé苹果ガカ한👩💻क", *map(chr, (0x301, 0x323, 0x307, 0x3099, 0x94D, 0xD, 0xA, 0xA0, 0x200D))]
PIECES += ["sun", "The", "dipped", "had", "could"]
EDITS = st.lists(st.sampled_from(PIECES) | st.integers(0, 6), max_size=24)


@given(EDITS)
@settings(max_examples=300, deadline=None)
def test_a_text_that_grows_and_shrinks_is_read_as_if_it_were_new(edits):
    text, folded, found = "", FoldedText(), WordList()
    for edit in edits:
        if isinstance(edit, int):
            text = text[: len(text) - edit]
            folded.truncate(len(text))
            found.truncate(len(text))
        else:
            text += edit
        folded.follow(text)
        assert (folded.text, folded.starts) == (FoldedText(text).text, FoldedText(text).starts)
        assert found.follow(folded).words == words(text)


BANS = {
    "phrases": lambda: PhraseBan(["sun", "the sun", "é3", "苹果", "ガ", "한", "İ", "ss", "e'e", "cafe\u0301"]),
    "n-grams": lambda: NGramBan(["sun dipped", "could dipped", "had sun", "sun sun", "苹果", "é dipped"]),
    "regexes": lambda: RegexBan(["sun.*dipped", r"\bhad\b", "e\u0301", r"3\B."]),
}


class Letters:
    """A tokenizer whose token ids are characters."""

    all_special_ids = ()

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("kind", BANS)
@given(edits=EDITS)
@settings(max_examples=150, deadline=None)
def test_a_row_that_was_rewound_is_judged_as_a_new_one(kind, edits):
    """Whatever a monitor remembers of a row, it says what it would say of the same row read for the first time."""
    monitor, row = BANS[kind](), SequenceState(0, [], Letters())
    for edit in edits:
        if isinstance(edit, int):
            row.truncate(max(0, len(row.ids) - edit))
            continue
        for token in map(ord, edit):
            row.append(token)
        new = SequenceState(0, [], Letters())
        for token in row.ids:
            new.append(token)
        new.checked, new.ignored = row.checked, row.ignored
        assert monitor.hold(row) == BANS[kind]().hold(new)
        assert monitor.check(row) == BANS[kind]().check(new)
        if violation := monitor.check(row):
            row.ignored.add((violation.index, violation.rule))
        else:
            row.checked = len(row.text)


@pytest.mark.parametrize("kind", ["phrases", "n-grams"])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=16))
@settings(max_examples=300, deadline=None)
def test_no_rewind_reaches_what_was_settled(kind, pieces):
    """A token that was said to be settled is never part of what is rejected later."""
    monitor, row, known, settled = BANS[kind](), SequenceState(0, [], Letters()), {}, 0
    for token in map(ord, "".join(pieces)):
        row.append(token)
        while violation := monitor.check(row):
            assert violation.index >= settled
            row.ignored.add((violation.index, violation.rule))
        row.checked = len(row.text)
        settled = max(settled, len(row.ids) - held_tokens(row, [monitor], known))
        assert held_tokens(row, [monitor]) == held_tokens(row, [monitor], known)


# --- cost ------------------------------------------------------------------------------------------------------------


class Counting:
    """A compiled expression that counts the characters it is given to look through."""

    def __init__(self, compiled):
        self.compiled, self.pattern, self.flags, self.characters = compiled, compiled.pattern, compiled.flags, 0

    def finditer(self, text, first, **how):
        self.characters += len(text) - first
        return self.compiled.finditer(text, first, **how)


def test_an_expression_without_a_span_looks_at_the_end_alone():
    monitor, row = RegexBan([r"\bnot [^.]{1,40}, but\b"]), SequenceState(0, [], Letters())
    counting = monitor.patterns[0] = Counting(monitor.patterns[0])
    for token in map(ord, "It was not so much the sea. The wind had gone. " * 100):
        row.append(token)
        assert monitor.check(row) is None
        row.checked = len(row.text)
    assert counting.characters < 1000 * len(row.text)  # 2,350 on average when read from the start


def test_few_words_and_characters_are_read_again(monkeypatch):
    """The steps of the n-grams, and the characters that are folded, grow with the text and not with its square."""
    monitor, row = NGramBan(["sun dipped horizon", "could feel"]), SequenceState(0, [], Letters())
    steps = 0
    step = monitor.ngrams.step

    def counted(begun, word):
        nonlocal steps
        steps += 1
        return step(begun, word)

    monkeypatch.setattr(monitor.ngrams, "step", counted)
    known = {}
    for token in map(ord, "The sun had gone, and she could see the horizon. " * 40):
        row.append(token)
        assert monitor.check(row) is None
        row.checked = len(row.text)
        held_tokens(row, [monitor], known)
    assert steps < 5 * len(row.ids)
