"""The hybrid morphological tokenizer: the cascade against its definition, lossless round trips, ids of the official
package, shared forms, files, refusals, the command line."""

import json
import random
import re
import string
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.tokenize import MorphDictionary, Morphological, MorphTokenizer, harmonize, load_tokenizer, token_pieces
from tokenry.tokenize.morphological import tokenizer_of
from tokenry.tokenize.morphology.dictionary import Morpheme
from tokenry.tokenize.morphology.forms import choice, choices
from tokenry.tokenize.morphology.subwords import learn_subwords, word_counts

TEXTS = [
    "Kitaplarımızdan birini evlerinden alıp okudular. Kitabı, kitaba; saatler ve evler. İstanbul'da ILIK bir gündü.",
    "Anlayabildiklerimizden gelmek için geldik; gelecekler, geleceğim, yapacağım.\r\n\tÇocuklar ağaçları görmüş müydü?",
    "Zxqwv zxqwv zxqwv qwxv blorkt blorkt 日本語 naïve Straße €5,90",
]
LETTERS = "abcçdefgğhıijklmnoöprsştuüvyz"
WORDS = st.text(alphabet="abck", min_size=1, max_size=4)


@pytest.fixture(scope="module")
def turkish():
    return Morphological().train(TEXTS)


@pytest.fixture(scope="module")
def official():
    return pytest.importorskip("turkish_tokenizer").TurkishTokenizer()


def bare(**tables):
    return MorphDictionary.of(**{"case": {}, **tables})


def cascade(tables, word):
    """The definition: at each place the longest string of the first table that has one, else one character."""
    out, at = [], 0
    while at < len(word):
        ends = (end for table in tables for end in range(len(word), at, -1) if word[at:end] in table)
        end = next(ends, at + 1)
        out.append(word[at:end])
        at = end
    return out


def shown(tokenizer, text):
    """The pieces as they are written."""
    return [piece.text for piece in token_pieces(tokenizer, text)]


# --- the cascade ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.text("abckz", max_size=12)
)
def test_one_longest_match_without_dead_strings_is_the_cascade(roots, suffixes, subwords, word):
    roots = set(roots) | {"zz"}
    suffixes = set(suffixes) - roots
    subwords = set(subwords) - roots - suffixes
    dictionary = bare(roots=sorted(roots), suffixes=sorted(suffixes), subwords=sorted(subwords))
    tokenizer = tokenizer_of(dictionary)
    assert [p.decode() for p in tokenizer.pieces(tokenizer(word).input_ids)] == cascade(
        [roots, suffixes, subwords], word
    )
    assert tokenizer([word]).input_ids == [tokenizer(word).input_ids]
    for dead, by in dictionary.dead().items():
        assert dead.startswith(by) and dead != by and cascade([roots, suffixes, subwords], dead) != [dead]


def test_a_dictionary_without_strings_for_the_text_gives_bytes():
    tokenizer = tokenizer_of(bare(roots=["q"]))
    text = "Ağaç 日本"
    ids = tokenizer(text).input_ids
    assert [tokenizer.decode([id]) for id in ids if tokenizer.kinds([id]) == ["mark"]] == [" "]
    assert b"".join(tokenizer.pieces(ids)) == text.encode() and len(ids) == len(text.encode())


def test_pieces_of_turkish(turkish):
    assert shown(turkish, "evlerinden") == ["ev", "ler", "in", "den"]
    assert shown(turkish, "kitaplarımızdan") == ["kitap", "lar", "ımız", "dan"]
    ids = turkish("kitaplarımızdan").input_ids
    assert turkish.kinds(ids) == ["root", "suffix", "suffix", "suffix"]


# --- the rule that looks ahead -------------------------------------------------------------------------------------


def scored(tables, word):
    """The definition: of all entries that begin the rest the highest length + 5 at the end of the word, else + the
    longest suffix behind it of two characters and more; then the higher table, then the longer entry."""
    out, at = [], 0
    while at < len(word):
        found = [(at + 1, (-1,))]
        for rank, table in enumerate(tables):
            for entry in table:
                rest = word[at + len(entry) :]
                if word.startswith(entry, at):
                    ahead = max((len(s) for s in tables[1] if rest.startswith(s)), default=0)
                    score = len(entry) + (5 if not rest else ahead if ahead >= 2 else 0)
                    found.append((at + len(entry), (score, -rank, len(entry))))
        end, _ = max(found, key=lambda one: one[1])
        out.append(word[at:end])
        at = end
    return out


WIDE = st.text(alphabet="abçkü", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(WIDE, max_size=8), st.lists(WIDE, max_size=8), st.lists(WIDE, max_size=8), st.text("abçküz", max_size=12)
)
def test_the_rule_that_looks_ahead_is_its_definition(roots, suffixes, subwords, word):
    roots = set(roots) | {"zz"}
    suffixes = set(suffixes) - roots
    subwords = set(subwords) - roots - suffixes
    dictionary = bare(roots=sorted(roots), suffixes=sorted(suffixes), subwords=sorted(subwords))
    tokenizer = tokenizer_of(dictionary, rule="score")
    ids = tokenizer(word).input_ids
    expected = [piece.encode() for piece in scored([roots, suffixes, subwords], word)]
    known = {entry.encode() for entry in roots | suffixes | subwords}
    assert [*tokenizer.pieces(ids)] == [p for e in expected for p in ([e] if e in known else [bytes([b]) for b in e])]
    assert tokenizer([word]).input_ids == [ids]


@pytest.fixture(scope="module")
def ahead():
    return Morphological(rule="score").train(TEXTS)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet=LETTERS + "KITABÇĞİÖŞÜ'⇧│ \t\n.2", max_size=40))
def test_every_text_comes_back_from_the_rule_that_looks_ahead(ahead, text):
    ids = ahead(text).input_ids
    assert ahead.decode(ids) == text and ahead([text]).input_ids == [ids]


def test_looking_ahead_cuts_where_a_suffix_follows(turkish, ahead):
    for word, near, far in (
        ("okumalar", "oku mala r", "oku ma lar"),
        ("anlayabildiklerimizden", "anla yabil dikle r imiz den", "anla yabil dik ler imiz den"),
        ("yapılması", "yapı l ma sı", "yap ıl ma sı"),
    ):
        assert (shown(turkish, word), shown(ahead, word)) == (near.split(), far.split())
    found = ahead("Kitabı okudular", return_offsets_mapping=True)
    assert "".join("Kitabı okudular"[a:b] for a, b in found.offset_mapping if b > a).count("okudular") == 1


def test_the_rule_is_saved_and_loaded(ahead, tmp_path):
    ahead.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS).input_ids == ahead(TEXTS).input_ids == [ahead(text).input_ids for text in TEXTS]
    assert loaded.batch_decode(loaded(TEXTS).input_ids) == TEXTS
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_plain_tokenizer_cannot_look_ahead():
    with pytest.raises(InputError, match="leave out rule=score"):
        Morphological(rule="score", share_ids=False)


# --- shared ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "one, other",
    [
        ("kitaplar", "kitabı"),
        ("evler", "saatler"),
        ("evde", "okulda"),
        ("kitapta", "evde"),
        ("gelecek", "geleceğim"),
    ],
)
def test_forms_of_a_morpheme_share_their_id(turkish, one, other):
    assert set(turkish(one).input_ids) & set(turkish(other).input_ids)


def test_an_id_is_that_of_a_form_only_where_decoding_would_choose_another(turkish):
    plural = turkish("evler").input_ids[-1]
    assert turkish("okullar").input_ids[-1] == plural == turkish("saatler").input_ids[-1]  # saat takes front vowels
    odd = turkish("evlar").input_ids
    assert odd[-1] != plural and turkish.decode(odd) == "evlar"
    assert turkish.decode([turkish("okul").input_ids[0], plural]) == "okullar"


def test_without_the_guard_forms_always_share(turkish):
    loose = Morphological(guard=False).train(TEXTS)
    assert loose.decode(loose("okuller").input_ids) == "okullar"
    assert loose("okuller").input_ids == loose("okullar").input_ids
    assert loose.decode(loose("Kitaplarımızdan").input_ids) == "Kitaplarımızdan"


def test_the_form_that_asks_most_is_written():
    asked = choices(
        {"a": {"after": "x"}, "b": {"before": "y"}, "s": {"stems": ["word"]}}, {"r": [[], ["a"], ["a", "b"], ["s"]]}
    )
    forms = choice(("0", "1", "2", "3"), asked["r"])
    cases = {("", ""): "0", ("x", ""): "1", ("x", "y"): "2", ("", "y"): "0", ("word", ""): "3", ("aword", ""): "0"}
    assert {case: harmonize(case[0], forms, case[1]) for case in cases} == cases
    assert harmonize("x", choice(("0", "1"), ()), "y") == "0"


def test_plain_tokenizer_gives_each_form_its_id():
    plain = Morphological(share_ids=False).train(TEXTS)
    assert type(plain) is PreTrainedTokenizerFast
    assert plain("evler").input_ids[-1] != plain("okullar").input_ids[-1]
    for text in TEXTS:
        assert plain.decode(plain(text).input_ids) == text


# --- lossless ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_every_text_comes_back(turkish, text):
    ids = turkish(text).input_ids
    assert turkish.decode(ids) == text
    assert turkish([text, text]).input_ids == [ids, ids]  # the way of known words is that of the pipeline


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=LETTERS + LETTERS.replace("i", "").upper() + "İI'⇧│Âî \t\r\n.2", max_size=40))
def test_every_text_of_turkish_letters_comes_back(turkish, text):
    ids = turkish(text).input_ids
    assert turkish.decode(ids) == text and turkish([text]).input_ids == [ids]


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(
        st.sampled_from("ev kitap kitab ler lar in den ığ acak ECEK İ ı yor çocuk saat de Ta ğ é".split()), max_size=8
    )
)
def test_every_word_of_wrong_forms_comes_back(turkish, words):
    text = "".join(words)
    assert turkish.decode(turkish(text).input_ids) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_the_pipeline_alone_loses_nothing(turkish, text):
    backend = turkish.backend_tokenizer
    ids = backend.encode(text).ids
    assert backend.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "   ", "\r\n\r\n", "\t\t", "a\r\nb", "<pad> x <eos>", "<PAD>", "İIıi", "\x00", "\ufeffa", "⇧│Ġ"),
        *("<eos>du", "<eos>dı", "kitap<pad>lar", "ev<eos>ler"),  # what follows a special token is a word of its own
    ],
)
def test_odd_texts_come_back(turkish, text):
    assert turkish.decode(turkish(text).input_ids) == text
    assert turkish.decode(turkish([text]).input_ids[0]) == text


def test_long_texts_take_linear_time(turkish):
    for text in ("kitap" * 40_000, "x" * 200_000, "ler" * 60_000 + " ev"):
        start = time.perf_counter()
        ids = turkish(text).input_ids
        assert turkish.decode(ids) == text and turkish([text]).input_ids == [ids]
        assert time.perf_counter() - start < 20


# --- as other tokenizers -------------------------------------------------------------------------------------------


def test_offsets_are_those_of_the_text(turkish):
    text = "Kitabı İstanbul'da okudular"
    found = turkish(text, return_offsets_mapping=True)
    assert len(found.offset_mapping) == len(found.input_ids)
    assert "".join(text[a:b] for a, b in found.offset_mapping if b > a).count("Kitabı"[1:]) == 1
    assert "".join(piece.text for piece in token_pieces(turkish, text)) == text


def test_a_batch_is_padded_cut_and_explained_as_single_texts_are(turkish):
    texts = ["Kitaplarımızdan", "ev", "Çok <eos> uzun", ""]
    rows = [turkish(text).input_ids for text in texts]
    assert turkish(texts).input_ids == rows and turkish(texts[:2]).input_ids == rows[:2]
    padded = turkish(texts[:2], padding=True, return_tensors="pt")
    assert padded.input_ids.shape == padded.attention_mask.shape == (2, len(rows[0]))
    assert padded.input_ids[1].tolist() == rows[1] + [turkish.pad_token_id] * (len(rows[0]) - len(rows[1]))
    assert padded.attention_mask[1].sum() == len(rows[1])
    assert turkish(texts[:2], truncation=True, max_length=2).input_ids == [row[:2] for row in rows[:2]]
    one, many = turkish(texts[0]), turkish(texts[:2])
    assert many.word_ids(0) == one.word_ids() and many.char_to_token(0, 7) == one.char_to_token(7)
    assert turkish(texts[0], return_tensors="pt").input_ids.tolist() == [rows[0]]
    pair = turkish("ev", "kitap").input_ids
    assert pair == rows[1] + turkish("kitap").input_ids


def test_added_tokens_are_known_to_both_ways():
    tokenizer = Morphological().train(TEXTS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    text = "<|user|>evler <|user|> kitabı"
    ids = tokenizer(text).input_ids
    assert tokenizer([text]).input_ids == [ids] and tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "evler  kitabı"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 2


def test_what_follows_an_added_token_is_a_word_of_its_own():
    tokenizer = Morphological().train(TEXTS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["ev"]})
    for text in ("evler", "evlar", "ev lar evlerde"):
        ids = tokenizer(text).input_ids
        assert tokenizer([text, ""]).input_ids == [ids, []] and tokenizer.decode(ids) == text


def test_the_end_of_a_word_is_nothing_behind_a_form():
    """Not the space that follows, whichever way a text takes."""
    dictionary = bare(
        roots=["kap"],
        suffixes=[["end", "a", "e"]],
        contexts={"last": {"before": "\\Z"}},
        rules={"end": [[], ["last"]]},
    )
    tokenizer = tokenizer_of(dictionary)
    for text in ("kape kape", "kapa kapa", "kapakap kapekap"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and tokenizer([text]).input_ids == [ids]


def test_words_are_forgotten_when_they_are_many_or_long(turkish, monkeypatch):
    monkeypatch.setattr("tokenry.tokenize.morphology.tokenizer.MOST", 3)
    monkeypatch.setattr("tokenry.tokenize.morphology.sharing.MOST", 3)
    for text in (*TEXTS, "kitap" * 50 + " evler", "kitaplar", "kitaplar"):
        assert turkish([text]).input_ids == [turkish(text).input_ids]
        assert len(turkish._known) <= 3 and not any(len(word) > 64 for word in turkish._known)


def test_saved_and_loaded(turkish, tmp_path):
    turkish.save_pretrained(tmp_path)
    for loaded in (
        load_tokenizer(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        MorphTokenizer.from_pretrained(tmp_path),
    ):
        assert type(loaded) is MorphTokenizer and loaded.guard
        assert loaded(TEXTS).input_ids == turkish(TEXTS).input_ids
        assert loaded.batch_decode(loaded(TEXTS).input_ids) == TEXTS
    whole = json.loads((tmp_path / "morphology.json").read_text(encoding="utf-8"))
    (tmp_path / "morphology.json").write_text(json.dumps({**whole, "rule": "longest"}), encoding="utf-8")
    with pytest.raises(InputError, match="rule 'longest' is unknown"):
        load_tokenizer(tmp_path)
    (tmp_path / "morphology.json").write_text('{"guard": true}', encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "morphology.json").unlink()
    with pytest.raises(InputError, match=r"morphology\.json"):
        load_tokenizer(tmp_path)


# --- the official package ------------------------------------------------------------------------------------------


def official_dictionary():
    """The dictionary of the package turkish-tokenizer, each string with its id there; of two places the higher one."""
    import turkish_tokenizer

    folder = Path(turkish_tokenizer.__file__).parent
    names = ("kokler", "ekler", "bpe_tokenler")
    tables = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    marks = {"<pad>": "<pad>", "<eos>": "<eos>", "<uppercase>": "⇧", " ": " "}
    unused = re.compile("[ <A-ZÇĞİÖŞÜ]|special|ek_temp")
    groups, seen = {}, set()
    for kind, table in zip(("root", "suffix", "subword"), tables):
        for text, id in table.items():
            if text in marks:
                groups["mark", id] = [marks[text]]
            elif text not in seen and not unused.search(text):
                seen.add(text)
                groups.setdefault((kind, id), []).append(text)
    case = {c.upper(): c for c in LETTERS + "qwxâîû" if c not in "ıi"} | {"I": "ı", "İ": "i"}
    morphemes = tuple(Morpheme(kind, tuple(forms), "", id) for (kind, id), forms in groups.items())
    return MorphDictionary("Turkish", case, morphemes)


@pytest.fixture(scope="module")
def same_ids(official):
    return tokenizer_of(official_dictionary(), guard=False)


SENTENCES = [
    "Kitabı okuyan çocuklar anlayabildiklerimizden gelmek istemedi.",
    "HTML ve İstanbul ile IŞIK arasındaki fark nedir? 25 Kasım 2026, saat 14:30.",
    *TEXTS[:1],
]


def test_ids_are_those_of_the_official_package(official, same_ids):
    for text in SENTENCES:
        assert same_ids(text).input_ids == official.encode(text), text


def test_ids_are_those_of_the_official_package_on_random_words(official, same_ids):
    draw = random.Random(0)
    letters = LETTERS + LETTERS.replace("ı", "").replace("i", "").upper() + "Iİ"
    roots = draw.sample(sorted(official.roots), 400)
    for _ in range(400):
        word = "".join(draw.choices(letters, k=draw.randint(1, 14)))
        text = f"{word} {draw.choice(roots)}{draw.choice(roots)}ler  {word.lower()}"
        text = re.sub("[<>_0-9]", "", text)
        assert same_ids(text).input_ids == official.encode(text), text
    strict = tokenizer_of(official_dictionary())
    assert all(strict.decode(strict(text).input_ids) == text for text in SENTENCES)


# --- other languages -----------------------------------------------------------------------------------------------


def test_a_second_language_needs_its_dictionary_alone():
    texts = ["The happiest runners stopped making plans, boxes and hopeless tries.", "He hoped to carry the boxes."]
    tokenizer = Morphological(dictionary="english", vocab_size=1500).train(texts)
    assert shown(tokenizer, "happiest") == ["happi", "est"] and shown(tokenizer, "boxes") == ["box", "es"]
    assert tokenizer("boxes").input_ids[-1] == tokenizer("cats").input_ids[-1]
    assert tokenizer("making").input_ids[0] == tokenizer("make").input_ids[0]
    assert tokenizer("stopped").input_ids[0] == tokenizer("stop").input_ids[0]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_dictionary_of_ones_own(tmp_path):
    """Finnish: a vowel harmony of two, and a root with weak grade before a closed syllable."""
    parts = {
        "roots": [["weak", "katu", "kadu"], "talo", "metsä"],
        "suffixes": [["back", "ssä", "ssa"], "n"],
        "case": {"K": "k", "T": "t", "M": "m"},
        "contexts": {"back vowel": {"after": "[aou][^äöy]*\\Z"}, "closed": {"before": "n|ss"}},
        "rules": {"weak": [[], ["closed"]], "back": [[], ["back vowel"]]},
    }
    path = tmp_path / "finnish.json"
    path.write_text(json.dumps(parts), encoding="utf-8")
    tokenizer = Morphological(dictionary=str(path), vocab_size=400).train(["Kadulla talossa metsässä"])
    assert tokenizer("kadussa").input_ids[0] == tokenizer("katu").input_ids[0]
    assert tokenizer("kadussa").input_ids[1] == tokenizer("metsässä").input_ids[1]
    assert tokenizer.decode(tokenizer("Kadun kadussa metsässä").input_ids) == "Kadun kadussa metsässä"
    MorphDictionary.load(path).save(tmp_path / "again.json")
    assert MorphDictionary.load(tmp_path / "again.json") == MorphDictionary.load(path)


# --- training ------------------------------------------------------------------------------------------------------


def test_subwords_are_learned_from_what_roots_and_suffixes_leave():
    dictionary = MorphDictionary.load("turkish")
    counts = word_counts(["zxqw zxqw zxqw kitaplar kitaplar evler"])
    found = learn_subwords(dictionary, counts, 10)
    assert "zxqw" in found and not any("kitap" in text or "lar" in text for text in found)
    assert len(learn_subwords(dictionary, counts, 1)) == 1 and learn_subwords(dictionary, counts, 0) == []


def test_roots_of_the_text_are_kept_first():
    small = Morphological(n_roots=3, vocab_size=1200).train(["çocuk çocuk ağaç ağaç okul"])
    assert [small.kinds(small(word).input_ids)[0] for word in ("çocuk", "ağaç", "okul")] == ["root"] * 3
    assert small.kinds(small("kitap").input_ids)[0] != "root" and len(small) <= 1200


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, message",
    [
        ({}, "is empty; give at least one root"),
        ({"roots": ["ev"], "suffixes": ["ev"]}, "'ev' is a root and a suffix; keep it once"),
        ({"roots": ["Ev"], "case": {"E": "e"}}, "upper-case letter 'E'"),
        ({"roots": ["iki söz"]}, "holds a space"),
        ({"roots": [""]}, "is empty, holds a space"),
        ({"roots": ["a\ud800"]}, "is no text"),
        ({"roots": [["none", "a", "b"]]}, "rule 'none' is not among rules"),
        ({"roots": [["r", "a", "b"]], "rules": {"r": [[]]}}, "rule 'r' has 1"),
        ({"roots": ["a"], "rules": {"r": [["c"]]}}, "asks for the context 'c'"),
        ({"roots": ["a"], "contexts": {"c": {"after": "["}}}, "no regular expression"),
        ({"roots": ["a"], "contexts": {"c": {"near": "a"}}}, "context 'c' has near"),
        ({"roots": ["a"], "case": {"A": "a", "B": "a"}}, "not one to one"),
        ({"roots": ["b"], "letters": ["ab"]}, "longer than a letter"),
        (
            {"roots": [Morpheme("root", ("a",), "", 3), Morpheme("root", ("b",), "", 3)]},
            "the id 3 is that of 'a' and of 'b'",
        ),
    ],
)
def test_a_dictionary_that_cannot_be_is_refused(parts, message):
    with pytest.raises(InputError, match=re.escape(message)):
        bare(**parts)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "no object with a 'case'"),
        ('{"roots": ["a"]}', "no object with a 'case'"),
        ('{"case": {}, "roots": [1]}', "roots is no list"),
        ('{"case": {}, "roots": ["a"], "rules": []}', "rules or contexts"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        MorphDictionary.load(path)
    with pytest.raises(InputError, match="klingon"):
        MorphDictionary.load("klingon")


def test_bad_input_is_refused(turkish):
    for bad in ("a\ud800b", ["x", "\udfff"]):
        with pytest.raises(InputError, match="half a surrogate pair"):
            turkish(bad)
    with pytest.raises(InputError, match="is outside of the vocabulary"):
        turkish.decode([10**6])
    for texts, message in (
        ("a text", "give a list"),
        ([1], "of type int"),
        ([], "no training text"),
        ([" "], "no training text"),
        (["\ud800"], "surrogate"),
    ):
        with pytest.raises(InputError, match=message):
            Morphological().train(texts)
    with pytest.raises(InputError, match="no room for the dictionary"):
        Morphological(vocab_size=1000).train(TEXTS)
    with pytest.raises(InputError, match="guard=False has no effect"):
        Morphological(share_ids=False, guard=False)


# --- command line --------------------------------------------------------------------------------------------------


def run(*args, code=0):
    result = CliRunner().invoke(main, ["tokenize", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def test_command_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    method = ["train", "--method", "morphological", tmp_path / "a.txt", "--output", tmp_path / "made", "--json"]
    made = json.loads(run(*method, "-o", "n_roots=2000", "-o", "vocab_size=8192")[0])
    assert 2000 < made["vocabulary"] <= 8192
    shown = json.loads(run("encode", "--tokenizer", tmp_path / "made", "evlerinden", "--json")[0])
    assert [piece["text"] for piece in shown["pieces"]] == ["ev", "ler", "in", "den"]
    assert "tokens / word" in run("report", tmp_path / "made", "smollm2", "--text", tmp_path / "a.txt")[0]
    assert "give turkish, english or a JSON file" in run(*method, "-o", "dictionary=none.json", code=2)[1]


def test_letters_of_ascii_have_case_in_both_dictionaries():
    for name in ("turkish", "english"):
        assert set(string.ascii_uppercase) <= set(MorphDictionary.load(name).case)
