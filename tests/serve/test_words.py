"""The text of pieces: the same however tokens are cut, with no half character and nothing from a stop string on."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenry.serve.words import Words

LETTERS = "e the🙂é"


def ended(text, stop):
    """The text up to the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        found = [len(one) for one in stop if text[:end].endswith(one)]
        if found:
            return text[: end - max(found)]
    return text


@settings(max_examples=200, deadline=None)
@given(
    st.text(LETTERS, max_size=20),
    st.lists(st.integers(2, 319), max_size=8),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4),
    st.data(),
)
@example("the the", [], ["he th", "e"], None)
@example("🙂é🙂", [], ["é🙂", "🙂🙂"], None)
def test_the_text_does_not_depend_on_the_cuts(tokenizer, text, more, stop, data):
    ids = [*tokenizer.encode(text), *more]
    cut = st.lists(st.integers(0, len(ids)), max_size=len(ids))
    places = sorted(data.draw(cut)) if data else range(len(ids))
    words = Words(tokenizer, [5], stop)
    parts = [words.add(ids[a:b]) for a, b in itertools.pairwise([0, *places, len(ids)])]
    whole = ended(tokenizer.decode(ids), stop)
    assert all(whole.startswith("".join(parts[:count])) for count in range(len(parts) + 1))
    assert "".join(parts) + words.add((), last=True) == whole
    assert whole == Words(tokenizer, [5], stop).add(ids, last=True)
    assert words.offsets(len(ids)) == words.decoded.starts == sorted(words.decoded.starts)


def test_what_may_be_the_end_waits_until_it_is_known_not_to_be(tokenizer):
    words = Words(tokenizer, [1], ["END", "DUE"])
    shown = [words.add(tokenizer.encode(piece)) for piece in ("a E", "N", "x", "DE", "NDb")]
    assert shown == ["a ", "", "ENx", "D", ""]
    assert words.add(tokenizer.encode("more")) == words.add((), last=True) == ""
    assert Words(tokenizer, [1], ["END"]).add(tokenizer.encode("the E"), last=True) == "the E"


def test_a_special_token_that_stops_is_no_text(tokenizer):
    """The decode loop ends at its id, and not where a text spells it."""
    spelled = [token for letter in "a<eos>b" for token in tokenizer.encode(letter)]
    assert Words(tokenizer, [1], ["<eos>", "b"]).add(spelled, last=True) == "a<eos>"
