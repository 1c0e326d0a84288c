"""KL3M: training against a naive trainer and Hugging Face's own, losslessness, measures, report, task, command line."""

import importlib.util
import json
import random
import re
import sysconfig
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.data import corpora
from tokenry.evidence import kl3m as experiment
from tokenry.measure import claims
from tokenry.measure.claims import verdict
from tokenry.measure.compare import compare
from tokenry.measure.experiment import Experiment
from tokenry.measure.task import Arm
from tokenry.measure.tasks.tokens import TokensTask
from tokenry.tokenize import (
    KL3M,
    boundary_stability,
    custom_tokens,
    load_tokenizer,
    ocr_errors,
    term_lengths,
    token_pieces,
    token_size_profile,
    tokenizer_report,
    tokens_per_character,
)
from tokenry.tokenize.kl3m import BYTES, SPECIAL_TOKENS
from tokenry.tokenize.text.kl3m_tokens import GROUPS
from tokenry.tokenize.text.measures import align, shared_boundaries
from tokenry.tokenize.text.report import render

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LICENCE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
CODE = (LIBRARY / "argparse.py").read_text(encoding="utf-8")
BARE = {"custom_tokens": (), "normalization": "none", "pad_to_power_of_two": False}


def train_domain(texts, vocab_size=None, **options):
    return KL3M(vocab_size=vocab_size, **options).train(texts)


def train_char(texts, vocab_size=None, **options):
    return KL3M(kind="char", vocab_size=vocab_size, **options).train(texts)


def state(tokenizer):
    """(merges, vocabulary) of the BPE."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return [tuple(pair) for pair in model["merges"]], model["vocab"]


def back(tokenizer, text):
    return tokenizer.decode(tokenizer(text).input_ids)


@pytest.fixture(scope="module")
def domain():
    """All custom tokens."""
    return train_domain([LICENCE, CODE], 8192)


@pytest.fixture(scope="module")
def char():
    return train_char([LICENCE, CODE], 1024)


@pytest.fixture(scope="module")
def bare():
    return train_domain([LICENCE], 1000, **BARE)


# --- training --------------------------------------------------------------------------------------------------


def naive_merges(text, count, longest=None, least=2):
    """Byte-pair encoding by the book: the most frequent pair, on ties the one with the smallest ids."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    words = Counter(word for word, _ in cut)
    ids = {c: i for i, c in enumerate(sorted(BYTES))}
    parts, merges = {word: list(word) for word in words}, []
    while len(merges) < count:
        pairs = Counter()
        for word, times in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                if longest is None or len(pair[0] + pair[1]) <= longest:
                    pairs[pair] += times
        best = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]), default=None)
        if best is None or pairs[best] < least:
            break
        merges.append(best)
        ids.setdefault(best[0] + best[1], len(ids))
        for cut in parts.values():
            at = 0
            while at < len(cut) - 1:
                if (cut[at], cut[at + 1]) == best:
                    cut[at : at + 2] = [best[0] + best[1]]
                at += 1
    return merges


@pytest.mark.parametrize("longest", [None, 2, 3, 4])
def test_merges_are_those_of_a_naive_trainer(longest):
    text = LICENCE[:4000]
    size = len(SPECIAL_TOKENS) * 2 + 256 + 120
    if longest is None:
        tokenizer = train_domain([text], size, **BARE)
    else:
        tokenizer = train_char([text], size, max_chars=longest, normalization="none", pad_to_power_of_two=False)
    merges, _ = state(tokenizer)
    assert 110 < len(merges) <= 120
    assert merges == naive_merges(text, 120, longest)


def test_without_extras_it_is_the_trainer_of_tokenizers(bare):
    peer = ByteLevelBPETokenizer(add_prefix_space=False)
    peer.train_from_iterator([LICENCE], 1000 - 13, 2, show_progress=False, special_tokens=list(SPECIAL_TOKENS))
    model = json.loads(peer._tokenizer.to_str())["model"]
    merges, vocab = state(bare)
    assert merges == [tuple(pair) for pair in model["merges"]] and vocab == model["vocab"]
    assert bare(CODE[:3000]).input_ids == peer.encode(CODE[:3000]).ids


def test_min_frequency_and_vocabulary_bound_the_merges():
    least = 25
    merges, _ = state(train_domain([LICENCE], 4096, **BARE, min_frequency=least))
    assert merges == naive_merges(LICENCE, 10_000, least=least) and len(merges) > 20
    assert len(train_domain([LICENCE], 700, **BARE)) == 700 - len(SPECIAL_TOKENS)


@pytest.mark.parametrize("longest", [2, 3, 4])
def test_char_tokens_are_short(longest):
    tokenizer = train_char([LICENCE, CODE], 2048, max_chars=longest)
    merges, vocab = state(tokenizer)
    learned = set(vocab) - set(SPECIAL_TOKENS)
    assert max(map(len, learned)) == longest
    assert len(merges) >= len(vocab) - len(SPECIAL_TOKENS) - 256 > 100  # two merges may make the same token
    assert len(tokenizer).bit_count() == 1


def test_special_tokens_come_first_and_none_is_added(domain, char):
    for tokenizer in (domain, char):
        assert tokenizer.convert_ids_to_tokens(range(13)) == list(SPECIAL_TOKENS)
        assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
        assert tokenizer("<|user|>x").input_ids == [9, *tokenizer("x").input_ids]
        assert tokenizer("x").input_ids == tokenizer("x", add_special_tokens=False).input_ids
        padded = tokenizer(["a", "a b c"], padding=True).input_ids
        assert padded[0][0] == 2 and len(padded[0]) == len(padded[1])


def test_training_reads_a_generator_once_and_repeats(char):
    again = train_char((text for text in ["", LICENCE, CODE]), 1024)
    assert state(again) == state(char) and again.get_vocab() == char.get_vocab()


# --- losslessness ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_nothing_is_lost_but_what_normalization_changes(domain, char, bare, text):
    if any(unicodedata.category(c) == "Cn" for c in text):
        return  # unassigned here, and perhaps assigned in the Unicode tables of tokenizers
    normal = unicodedata.normalize("NFKC", text)
    assert back(domain, text) == normal and back(char, text) == normal
    assert back(bare, text) == text


def test_every_byte_comes_back(domain, char):
    for tokenizer in (domain, char):
        for value in range(128):
            assert back(tokenizer, f"a{chr(value)}b") == f"a{chr(value)}b"
        assert back(tokenizer, "日本 🙂 née") == "日本 🙂 née"


def test_the_official_alphabet_loses_unseen_bytes(char):
    official = train_char([LICENCE], 1024, official_alphabet=True)
    assert back(official, "tab\x18end") == "tabend" and back(official, "日本") != "日本"
    assert back(char, "tab\x18end") == "tab\x18end"
    dead = {chr(value) for value in range(255)} - BYTES
    assert len(dead) == 68 and dead <= set(state(official)[1])


def test_custom_tokens_decode_to_themselves(domain):
    for token in custom_tokens():
        assert back(domain, token) == token


@pytest.mark.parametrize("normalization", ["none", "nfc", "nfd", "nfkc", "nfkd"])
def test_normal_forms(normalization):
    text = "née ½ ™ ﬁ 10²"
    tokenizer = train_char([LICENCE], 600, normalization=normalization)
    expected = text if normalization == "none" else unicodedata.normalize(normalization.upper(), text)
    assert back(tokenizer, text) == expected
    lower = train_char([LICENCE], 600, normalization=normalization, lowercase=True)
    assert (
        back(lower, text.upper())
        == (
            text.upper() if normalization == "none" else unicodedata.normalize(normalization.upper(), text.upper())
        ).lower()
    )


def test_it_loads_anywhere(domain, tmp_path):
    domain.save_pretrained(tmp_path)
    text = LICENCE[:2000] + "  12345 U.S.C. <|user|> ½"
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded(text).input_ids == domain(text).input_ids == raw.encode(text).ids
        assert loaded.padding_side == "left" and loaded.special_tokens_map == domain.special_tokens_map
        assert loaded.decode(loaded("<|user|> a").input_ids, skip_special_tokens=True) == " a"


# --- custom tokens and padding ---------------------------------------------------------------------------------


def test_custom_tokens_are_those_of_the_code():
    plain = [g for g in GROUPS if g != "citations"]
    assert len(custom_tokens(plain)) == 1655 and len(custom_tokens(plain, lowercase=True)) == 1579
    every = custom_tokens()
    assert every == sorted(set(every)) and min(map(len, every)) == 2
    assert {"2049", "(viii)", "U.S.C.", "Atl.", "</tbody>", "\r\n", " href="} <= set(every) and "1775" not in every
    assert set(custom_tokens(["years"])) == {str(year) for year in range(1776, 2050)}
    assert len(every) > 4000
    with pytest.raises(InputError, match=r"'jsn'.*choose from whitespace"):
        custom_tokens(["jsn"])


def test_custom_tokens_of_letters_and_digits_match_whole_words_only():
    own = ["Lea", "123", "2d", "(a)", "years"]
    ours = train_domain([LICENCE], 1024, custom_tokens=own)
    official = train_domain([LICENCE], 1024, custom_tokens=own, single_word_alpha=False)
    assert ours.tokenize("Lea 123 2d")[0::2] == ["Lea", "123", "2d"]
    for text, token in (("Leader", "Lea"), ("12345", "123"), ("91234", "123"), ("12d", "2d")):
        assert token not in ours.tokenize(text) and token in official.tokenize(text)
    assert "(a)" in ours.tokenize("x(a)y")
    assert "1790" in ours.tokenize("in 1790,") and len(ours.get_added_vocab()) > 274


def test_custom_tokens_that_bpe_learnt_are_not_added_twice():
    own = ["copyright", "zyxw"]
    tokenizer = train_domain(["copyright"] * 50, 512, custom_tokens=own, pad_to_power_of_two=False)
    assert "copyright" in state(tokenizer)[1] and "copyright" not in tokenizer.get_added_vocab()
    assert tokenizer.tokenize("copyrights") == ["copyright", "s"]
    assert tokenizer.tokenize("zyxw") == ["zyxw"]


def test_lowercase_custom_tokens():
    tokenizer = train_domain([LICENCE], 8192, lowercase=True)
    assert tokenizer.tokenize("see U.S.C. or <TABLE")[-1] == "<table" and "u.s.c." in tokenizer.tokenize("42 U.S.C. 1")


def test_padding_is_short_and_ends_at_the_next_power():
    unpadded = train_char([LICENCE], 600, pad_to_power_of_two=False)
    padded = train_char([LICENCE], 600)
    missing = 1024 - len(unpadded)
    extra = [padded.convert_ids_to_tokens(i) for i in range(len(unpadded), len(padded))]
    assert len(padded) == 1024 and len(extra) == missing > 30
    assert extra[:4] == ["  ", "\n\n", "   ", "\n\n\n"] and extra[29] == "\n" * 16
    assert extra[30:] == [f"<|reserved_{i}|>" for i in range(missing - 30)]
    assert padded.tokenize("a    b") == ["a", "    ", "b"]
    exact = train_char([LICENCE], 512 + 13)  # 512 entries need no padding
    assert len(exact) == 512 and not [t for t in exact.get_vocab() if t.isspace()]


# --- measures --------------------------------------------------------------------------------------------------


def test_tokens_per_character_is_sum_over_sum_and_counts_no_special_tokens(bare):
    texts = ["a", LICENCE[:500], "née"]
    expected = sum(len(bare(t).input_ids) for t in texts) / sum(map(len, texts))
    adding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bare.backend_tokenizer.to_str()))
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 0), ("<|end|>", 1)]
    )
    assert len(adding("a").input_ids) == 3
    for tokenizer in (bare, adding):
        assert tokens_per_character(tokenizer, texts) == pytest.approx(expected)
        assert term_lengths(tokenizer, ["a", "née"]) == {"a": 1, "née": 4}


def test_token_size_profile(char):
    profile = token_size_profile(char)
    words = [token for token in char.get_vocab() if not token.startswith(("<|", "</|"))]
    assert sum(profile.values()) == pytest.approx(1)
    assert profile[1] == pytest.approx(256 / len(words))
    assert profile[8] == pytest.approx(1 / len(words)) and max(profile) == 8  # 13 runs: 2 to 8 spaces, 2 to 7 newlines


def test_boundaries_of_the_published_example():
    """The cuts of the released char-4k tokenizer, counted by hand."""
    wrong, right = "Thc Vnited S tates", "The United States"
    aligned = align(wrong, right)
    assert aligned == {**{i: i for i in range(12)}, **{i: i - 1 for i in range(13, 18)}}
    wrong_ends = np.cumsum([len(t) for t in "Th|c| V|n|it|ed| S| t|at|es".split("|")])
    right_ends = np.cumsum([len(t) for t in "The| Un|it|ed| St|at|es".split("|")])
    assert shared_boundaries(aligned, wrong_ends.tolist(), right_ends.tolist()) == 7 / 10


def test_boundary_stability_of_known_tokenizers(bare):
    letters = experiment.first_merges(bare, 0)
    assert boundary_stability(bare, [(LICENCE[:300], LICENCE[:300])]) == 1
    assert boundary_stability(letters, [("The 5enate of Rorne", "The Senate of Rome")]) == 1
    words = train_domain(["copyright holder"] * 50, 512, **BARE)
    assert words.tokenize("copyright") == ["copyright"]
    # copyr1ght has the ends of c o p y r 1 g h t or of what is left of them; copyright only its last one
    ends = len(words.tokenize("copyr1ght"))
    assert ends > 1 and boundary_stability(words, [("copyr1ght", "copyright")]) == 1 / ends
    assert boundary_stability(words, [("copyr1ght", "copyright"), ("a", "a")]) == (1 / ends + 1) / 2


def test_alignment_leaves_out_what_has_no_partner():
    assert align("abcd", "abXYcd") == {0: 0, 1: 1, 2: 4, 3: 5}
    assert align("modem", "modern") == {0: 0, 1: 1, 2: 2, 3: 3}  # m for rn is of another length
    assert shared_boundaries({}, [1, 2], [1]) == 1


def test_recognition_errors():
    text = LICENCE[:5000]
    assert ocr_errors(text, 0) == text
    assert ocr_errors(text, 0.05, 1) == ocr_errors(text, 0.05, 1) != ocr_errors(text, 0.05, 2)
    letters = "e" * 20_000
    for rate in (0.02, 0.2):
        errors = 20_000 - ocr_errors(letters, rate).count("e") + ocr_errors(letters, rate).count("e ")
        assert errors / 20_000 == pytest.approx(rate, rel=0.1)
    assert set(ocr_errors("e" * 300, 1, 0)) == {"c", "e", " "}
    with pytest.raises(InputError, match=r"rate=1\.5"):
        ocr_errors(text, 1.5)


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 4000}, r"vocab_size=4000 .* give at least \d+ or fewer custom tokens"),
        ({"kind": "char", "vocab_size": 281}, "vocab_size=281 is not allowed .* give a number in \\[282, "),
        ({"kind": "char", "vocab_size": 282, "official_alphabet": True}, "give at least 350$"),
        ({"kind": "char", "max_chars": 1}, "max_chars=1 is not allowed .* give a number in \\[2, "),
        ({"max_chars": 3}, "max_chars=3 bounds tokens of kind=char only"),
        ({"kind": "char", "custom_tokens": ["x"]}, "kind=char has no custom tokens"),
        ({"min_frequency": 0}, "min_frequency=0 is not allowed"),
        ({"normalization": "nfx"}, "one of none, nfc, nfd, nfkc, nfkd"),
        ({"custom_tokens": [""]}, "a custom token is empty"),
        ({"custom_tokens": ["<|pad|>"]}, "is a special token already"),
        ({"custom_tokens": ["x½"]}, "'x½' becomes 'x1⁄2' .* give 'x1⁄2'"),
        ({"custom_tokens": ["Whereas"], "lowercase": True}, "'Whereas' becomes 'whereas'"),
        ({"custom_tokens": ["née"]}, "'née' would decode to .* leave it to BPE"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        KL3M(**options)


def test_the_smallest_vocabulary_is_the_bytes_alone():
    tokenizer = train_char([LICENCE], 282, pad_to_power_of_two=False)
    assert len(tokenizer) == 13 + 256 and tokens_per_character(tokenizer, ["abc"]) == 1


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "there is no training text"),
        (["", ""], "there is no training text"),
        ("one string", "texts is one string"),
        ([b"bytes"], "document 0 is of type bytes"),
        (["good", [5, 6]], "document 1 is of type list"),
    ],
)
def test_bad_training_text_is_refused(texts, message):
    with pytest.raises(InputError, match=message):
        train_char(texts)


def test_measures_refuse_what_they_cannot_count(bare):
    with pytest.raises(InputError, match="no text to count"):
        tokens_per_character(bare, [""])
    with pytest.raises(InputError, match="one string"):
        tokens_per_character(bare, "abc")
    with pytest.raises(InputError, match="not token ids"):
        term_lengths(bare, [5])
    with pytest.raises(InputError, match="no pairs"):
        boundary_stability(bare, [])
    for name, message in (("/nowhere/at all", "there is no tokenizer"), (str(LIBRARY), r"no tokenizer\.json")):
        with pytest.raises(InputError, match=message):
            load_tokenizer(name)


# --- report ----------------------------------------------------------------------------------------------------


def test_report_numbers(bare, char):
    text = LICENCE + "½ \x18"
    first, twin, other = tokenizer_report({"a": bare, "b": bare, "c": char}, text)
    assert first.tokens_per_character == twin.tokens_per_character and twin.saved == (0, 0, 0)
    assert other.tokens_per_character.value == pytest.approx(other.tokens / len(text))
    assert other.tokens_per_word.value == pytest.approx(other.tokens / len(text.split()))
    assert other.saved.value == pytest.approx(1 - other.tokens / first.tokens)
    for report in (first, other):
        for low, high in (report.tokens_per_character[1:], report.boundary_stability[1:]):
            assert low < high
        assert report.tokens_per_character.low < report.tokens_per_character.value < report.tokens_per_character.high
    assert other.boundary_stability.low > first.boundary_stability.value  # short tokens
    assert first.lossy == {} and other.lossy == {"½": 1}
    with pytest.raises(InputError, match="text is empty"):
        tokenizer_report({"a": bare}, " \n")
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_report({}, "x")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text(bare, char, text):
    for tokenizer in (bare, char):
        pieces = token_pieces(tokenizer, text)
        assert "".join(piece.text for piece in pieces) == text
        assert [i for piece in pieces for i in piece.ids] == tokenizer(text).input_ids


def test_pieces_show_lost_text():
    official = train_char([LICENCE], 600, official_alphabet=True)
    lost = [piece.text for piece in token_pieces(official, "tab\x18end") if not piece.ids]
    assert lost == ["\x18"]


def test_the_page_is_self_contained_and_escaped(bare):
    text = "<script>alert(1)</script> the license"
    page = render(tokenizer_report({"<b>": bare}, text), {"<b>": token_pieces(bare, text)})
    assert "<script" not in page and "<b>" not in page and "http" not in page
    assert re.search(r'class="c1" title="\d+"', page)


# --- corpora, task, experiment ---------------------------------------------------------------------------------


def test_corpora():
    train, held_out = corpora.split([str(i) for i in range(50)])
    assert len(train) == 40 and sorted(train + held_out, key=int) == [str(i) for i in range(50)]
    assert (train, held_out) == corpora.split([str(i) for i in range(50)])
    assert corpora.up_to_bytes(["ab", "née", "x"], 4) == ["ab", "n"]
    words = [str(i) for i in range(40)]
    seen = corpora.word_grams(" ".join(words[:30]))
    assert len(seen) == 11 and corpora.overlap(" ".join(words), seen) == 11 / 21
    assert corpora.overlap("short", corpora.word_grams("Short")) == 1
    if importlib.util.find_spec("licensedcode") is None:
        with pytest.raises(InputError, match="pip install --no-deps scancode-toolkit-mini"):
            corpora.license_texts()
    else:
        texts = corpora.license_texts()
        assert len(set(texts)) == len(texts) > 2000 and not any(text.startswith("---\nkey:") for text in texts)
    sources = corpora.library_source()
    assert CODE in sources and len(sources) > 300


def test_stopping_early_is_training_less(bare):
    shorter = experiment.first_merges(bare, 200)
    trained = train_domain([LICENCE], 26 + 256 + 200, **BARE)
    assert state(shorter)[0] == state(trained)[0]
    text = CODE[:5000]
    assert shorter.convert_ids_to_tokens(shorter(text).input_ids) == trained.convert_ids_to_tokens(
        trained(text).input_ids
    )


def test_paragraphs():
    long, short = "word " * 30, "too short"
    assert experiment.paragraphs([f"{short}\n\n {long}\n{short}\n\n{long}", short]) == [f"{long}{short}"]


def small_experiment():
    """The experiment on a few files of the library: its code is the domain, its license the general text."""
    files = ["argparse", "tarfile", "zipfile", "subprocess", "shutil", "inspect", "pathlib", "typing"]
    code = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in files]
    train, held_out = code[:5], [text[:20_000] for text in code[5:]]
    other = [LICENCE[:4000], LICENCE[4000:]]  # learned by heart, so that the general vocabulary wins there
    texts = experiment.Texts([LICENCE] * 3, train, train, held_out, other, other)
    sets = {"licenses": texts.licenses, "docstrings": texts.docstrings, "code": texts.code}
    lines = [line.strip() for text in held_out for line in text.splitlines() if len(line.strip()) > 40][:40]
    return texts, TokensTask(sets, [True, False, True], lines)


def test_experiment_on_a_few_files(bare, monkeypatch):
    monkeypatch.setattr(claims, "UNITS", 2)  # so that few documents decide
    texts, task = small_experiment()
    arms = [*experiment.domain_arms(texts, bare), *experiment.correction_arms(texts)]
    roles = {arm.name: arm.role for arm in arms}
    assert [name for name, role in roles.items() if role == "plain"] == [experiment.GENERAL]
    run = Experiment("kl3m", "", task, arms, experiment.GENERAL, experiment.findings, batch=7)
    result = compare(run)
    tokenizers = {arm.name: arm.apply for arm in arms}
    for name, tokenizer in tokenizers.items():
        assert result.mean(name, "licenses") == pytest.approx(tokens_per_character(tokenizer, texts.licenses))
        new = [texts.licenses[0], texts.licenses[2]]
        assert result.mean(name, "new_licenses") == pytest.approx(tokens_per_character(tokenizer, new))
    saved = result.saved("licenses", experiment.METHOD, experiment.GENERAL).interval
    a, b = (tokens_per_character(tokenizers[n], texts.licenses) for n in (experiment.METHOD, experiment.GENERAL))
    assert saved.mean == pytest.approx((b - a) / b) and saved.low <= saved.mean <= saved.high
    assert result.mean(experiment.BYTES, "boundary_stability") == pytest.approx(1, abs=0.01)
    sample = corpora.up_to_bytes(texts.correction, 200_000)
    equal = tokens_per_character(tokenizers[experiment.EQUAL], sample)
    assert equal == pytest.approx(tokens_per_character(tokenizers[experiment.CHAR], sample), rel=0.005)
    findings = experiment.findings(result)
    assert len(findings) == 6 and findings[0].holds and findings[1].holds and findings[4].holds
    assert f"{a:.3f}" in findings[0].numbers


def test_the_findings_refuse_a_swap(bare, monkeypatch):
    """With the general and the domain vocabulary exchanged the claim must fail."""
    monkeypatch.setattr(claims, "UNITS", 2)
    texts, task = small_experiment()
    arms = {arm.name: arm for arm in experiment.domain_arms(texts, bare)}
    swapped = {
        **arms,
        experiment.METHOD: arms[experiment.GENERAL],
        experiment.GENERAL: arms[experiment.METHOD],
    }
    names = (experiment.CHAR, experiment.PLAIN, experiment.LARGE, experiment.EQUAL, experiment.BYTES)
    char = [Arm(name, role="control", apply=bare) for name in names]
    named = [replace(s, name=name) for name, s in swapped.items()] + char
    run = Experiment("kl3m", "", task, named, experiment.GENERAL, experiment.findings, batch=50)
    findings = experiment.findings(compare(run))
    assert not any(findings[i].holds for i in (0, 1, 4, 5)) and verdict(findings) == "not reproduced"


# --- command line ----------------------------------------------------------------------------------------------


def tokenry(*args, code=0, stdin=None):
    result = CliRunner().invoke(main, ["tokenize", *args], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def test_command_line(tmp_path):
    texts = tmp_path / "texts" / "inside"
    texts.mkdir(parents=True)
    (texts / "a.txt").write_text(LICENCE, encoding="utf-8")
    (texts / "b.md").write_text(CODE, encoding="utf-8")
    (texts / "c.bin").write_bytes(b"\xff")
    folder, page = str(tmp_path / "made"), tmp_path / "report.html"
    small = ["-o", "vocab_size=1024", "-o", "custom_tokens=none"]
    made = json.loads(
        tokenry("train", "--method", "kl3m", str(tmp_path / "texts"), "--output", folder, *small, "--json")[0]
    )
    assert made == {"folder": folder, "vocabulary": 1024, "files": 2}
    expected = KL3M(vocab_size=1024, custom_tokens=()).train([LICENCE, CODE])
    assert load_tokenizer(folder).backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()

    text = "The Licence\nof née"
    shown = json.loads(tokenry("encode", "--tokenizer", folder, "-", "--json", stdin=text)[0])
    assert shown["ids"] == expected(text).input_ids and "".join(p["text"] for p in shown["pieces"]) == text
    assert tokenry("encode", "--tokenizer", folder, text)[0].replace("|", "").strip() == text

    (tmp_path / "t.txt").write_text(LICENCE[:3000], encoding="utf-8")
    named = [folder, "--text", str(tmp_path / "t.txt")]
    (row,) = json.loads(tokenry("report", *named, "--html", str(page), "--json")[0])
    assert row["tokens"] == pytest.approx(len(expected(LICENCE[:3000]).input_ids), rel=0.01)
    assert "tokens / character" in page.read_text(encoding="utf-8")
    assert "tokens saved" in re.sub(r"\s+", " ", tokenry("report", *named)[0])


def test_command_line_refusals(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").mkdir()
    bad = str(tmp_path / "bad.txt")
    out, kl3m = ["--output", str(tmp_path / "o")], ["--method", "kl3m"]
    for args, message in (
        (["train", *kl3m, str(tmp_path / "empty"), *out], "holds no .txt or .md file"),
        (["train", *kl3m, bad, *out], "not UTF-8 text"),
        (["train", *kl3m, str(tmp_path / "none.txt"), *out], "cannot be read"),
        (["train", *kl3m, bad, *out, "-o", "vocab_size=999"], "give at least"),
        (
            ["train", *kl3m, str(tmp_path / "bad.txt"), "--output", str(tmp_path / "bad.txt")],
            "is a file; give a folder",
        ),
        (["train", "--method", "antislop", "x", *out], "belongs to the stage 'decode'"),
        (["encode", "--tokenizer", str(tmp_path), "x"], "no tokenizer.json"),
        (["encode", "--tokenizer", "smollm2", ""], "the text is empty"),
        (["report", str(tmp_path), "--text", str(tmp_path / "none.txt")], "cannot be read"),
    ):
        _, err = tokenry(*args, code=2)
        lines = [line for line in err.strip().splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and message in lines[0], err


def test_help_has_examples():
    for command in ([], ["train"], ["encode"], ["report"]):
        assert "Example:" in tokenry(*command, "--help")[0]


def test_a_file_that_fails_late_is_refused(tmp_path):
    """The error passes through the Rust trainer."""
    draw = random.Random(0)
    (tmp_path / "a.txt").write_text(" ".join(draw.choices(LICENCE.split(), k=500)), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    out = ["--output", str(tmp_path / "o")]
    _, err = tokenry("train", "--method", "kl3m", str(tmp_path), *out, "-o", "kind=char", code=2)
    assert "not UTF-8 text" in err
