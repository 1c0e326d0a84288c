"""dcsqe: constrained search against its recursion, tags, phrases, scores and the estimator."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.data.translation import draw_sentences
from tokenry.judge import (
    DCSQE,
    Constraint,
    JudgedTranslations,
    QualityEstimator,
    ReferenceConstrainedLogitsProcessor,
    Tags,
    TranslationRow,
    annotate_severity,
    heads_of,
    mqm_score,
    phrase_labels,
    qe_metrics,
    shortest_phrase_cover,
    ter_tags,
)
from tokenry.judge.quality.constrained import Near, pointers
from tokenry.judge.quality.estimator import QECollator, trained_estimator
from tokenry.models.load import Loaded, load

EOS, PAD = 0, 1
TOKENS = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)


def processor(references, constraint=None):
    return ReferenceConstrainedLogitsProcessor(references, TOKENS, constraint)


# --- the pointer ---------------------------------------------------------------------------------------------------


def recursion(written, reference, window=3):
    """The rule as it is written down, one token after the other."""
    r = c = 0
    last = len(reference) - 1
    for y in written:
        match = y == reference[min(r, last)]
        r, c = r + 1, 0 if match else c + 1
        for w in range(window):
            if c > 1 + w and y == reference[min(max(r - w - 2, 0), last)]:
                r, c = r - (w + 1), 0
        for w in range(window):
            if c > 0 and y == reference[min(r + w, last)]:
                r, c = r + w + 1, 0
    return r, c


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=8), min_size=1, max_size=3), st.data(), st.integers(0, 3)
)
def test_pointers_are_those_of_the_recursion(references, data, window):
    references = [[*ids, EOS] for ids in references]
    time = data.draw(st.integers(0, 10))
    written = [data.draw(st.lists(st.integers(2, 6), min_size=time, max_size=time)) for _ in references]
    rows = [ids + [EOS] * (9 - len(ids)) for ids in references]
    near = Near.of(np.array(rows), np.array([len(ids) for ids in references]), window)
    found = pointers(np.array(written, int).reshape(len(references), 1, time), near)
    expected = [recursion(*pair, window) for pair in zip(written, references)]
    assert list(zip(found.r.ravel().tolist(), found.c.ravel().tolist())) == expected


def definition(logprob, written, reference, constraint, first):
    """The scores of one row by loops over the reference and the vocabulary."""
    theta, lam, tau, window = constraint
    r, c = recursion(written, reference, window)
    r_a, size = min(r, len(reference) - 1), len(logprob)
    weights = [0.0] * size
    for i, token in enumerate(reference):
        a = 1 / (i - r_a + 1) ** 2 if i >= r_a else 0
        b = 1 / (i - (r - c) + 1) ** 2 if i >= r - c else 0
        weights[token] += (a + b) / 2
    q = [math.exp(w / tau) if w and i != PAD else 0 for i, w in enumerate(weights)]
    p = [math.exp(value) for value in logprob]
    mixed = p
    if p[reference[r_a]] > theta:
        mixed = [lam * x + (1 - lam) * y / sum(q) for x, y in zip(p, q)]
    banned = {PAD} | ({EOS} if first else set())
    return [-math.inf if i in banned else math.log(x) if x else -math.inf for i, x in enumerate(mixed)]


@pytest.mark.parametrize("constraint", [Constraint(), Constraint(0.0, 0.0), Constraint(0.02, 0.55, 1.0, 1)])
def test_scores_are_those_of_the_definition_for_every_beam_and_step(constraint):
    """Beams that change places between steps, repeated words, references of unequal length."""
    rng, draw = random.Random(0), torch.Generator().manual_seed(0)
    references, beams = [[3, 4, 3, 5, 6, 7, EOS], [8, 2, EOS], [5, 5, 5, 9, EOS]], 4
    one, rows = processor(references, constraint), torch.full((len(references) * beams, 1), 10)
    for _ in range(8):
        scores = (2 * torch.randn(len(rows), 11, generator=draw)).log_softmax(-1)
        given = scores.clone()
        found = one(rows, scores)
        assert torch.equal(scores, given), "generate may still want them as they were"
        assert torch.equal(found, processor(references, constraint)(rows, scores)), "nothing but the tokens counts"
        for i, row in enumerate(rows.tolist()):
            args = (scores[i].tolist(), row[1:], references[i // beams], constraint, rows.shape[1] == 1)
            torch.testing.assert_close(found[i], torch.tensor(definition(*args)), rtol=1e-4, atol=1e-5)
        parents = [i // beams * beams + rng.randrange(beams) for i in range(len(rows))]
        after = [rng.choice([*references[i // beams][:-1], 2, 3]) for i in range(len(rows))]
        rows = torch.cat([rows[parents], torch.tensor(after)[:, None]], 1)


# --- phrases -------------------------------------------------------------------------------------------------------


@st.composite
def trees(draw):
    """Heads of a random tree of one root."""
    count = draw(st.integers(1, 9))
    order = draw(st.permutations(range(1, count + 1)))
    heads = [0] * count
    for place, word in enumerate(order[1:], 1):
        heads[word - 1] = order[draw(st.integers(0, place - 1))]
    return heads


@given(trees(), st.data())
def test_a_cover_is_the_smallest_span_that_is_connected(heads, data):
    first = data.draw(st.integers(0, len(heads) - 1))
    last = data.draw(st.integers(first, len(heads) - 1))

    def connected(start, stop):
        inside = range(start, stop + 1)
        return sum(heads[i] == 0 or heads[i] - 1 not in inside for i in inside) == 1

    found = shortest_phrase_cover(heads, first, last)
    spans = [(a, b) for a in range(first + 1) for b in range(last, len(heads)) if connected(a, b)]
    assert found == min(spans, key=lambda span: span[1] - span[0])
    assert shortest_phrase_cover(heads, *found) == found


def test_on_a_chain_the_cover_is_the_run():
    for heads in ([0, 1, 2, 3, 4], [2, 3, 4, 5, 0]):
        assert all(shortest_phrase_cover(heads, a, b) == (a, b) for a in range(5) for b in range(a, 5))


def test_phrases_take_the_worst_severity_and_their_sum_is_the_score():
    severities = ["ok", "minor", "major", "ok", "critical", "ok"]
    assert phrase_labels(severities) == [(1, 3, "major"), (4, 5, "critical")]
    assert phrase_labels(severities, [2, 5, 2, 5, 0, 5]) == [(1, 3, "major"), (4, 5, "critical")]
    wide = phrase_labels(severities, [0, 5, 5, 5, 1, 5])
    assert wide == [(1, 5, "critical")], "its path leads over word 5"
    assert mqm_score(phrase_labels(severities), 6) == pytest.approx(1 - 6 / 6)
    assert mqm_score(wide, 6) == pytest.approx(1 - 5 / 6)
    assert mqm_score(phrase_labels(["ok"] * 4), 4) == 1


class Token:
    """As spaCy has them: a token knows its place in the document and its head."""

    def __init__(self, text, i):
        self.text, self.i, self.head = text, i, self


def spacy_span(words, heads, first=0):
    tokens = [Token(word, first + i) for i, word in enumerate(words)]
    for token, head in zip(tokens, heads):
        token.head = tokens[head - 1] if head else token
    return tokens


def test_trees_of_parsers_are_read():
    words, heads = ["lo", "bela", "dor"], [2, 3, 0]
    sentence = SimpleNamespace(words=[SimpleNamespace(text=w, head=h) for w, h in zip(words, heads)])
    document = SimpleNamespace(sentences=[sentence])
    for tree in (heads, sentence, document, spacy_span(words, heads), spacy_span(words, heads, 7)):
        assert heads_of(tree, words) == heads
    for tree in (sentence, spacy_span(words, heads)):
        with pytest.raises(
            InputError, match="the tree is of the words 'lo bela dor', the translation has 'lo bel dor'"
        ):
            heads_of(tree, ["lo", "bel", "dor"])
    with pytest.raises(InputError, match="the tree has 2 sentences"):
        heads_of(SimpleNamespace(sentences=[sentence, sentence]), words)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([0, 1], "2 heads for 3 words"),
        ([0, 0, 1], "2 roots"),
        ([2, 3, 1], "0 roots"),
        ([0, 3, 2], "run in a circle"),
        ([0, 4, 1], "head of word 2 is 4"),
        ([0, -1, 1], "head of word 2 is -1"),
        ([0, 1.5, 1], "head of word 2 is 1.5"),
    ],
)
def test_heads_that_are_no_tree_are_refused(heads, message):
    with pytest.raises(InputError, match=message):
        heads_of(heads, ["a", "b", "c"])


# --- search --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    return load("zoo/translator-a")


@pytest.fixture(scope="module")
def annotator():
    return load("zoo/translator-b")


@pytest.fixture(scope="module")
def sentences():
    return draw_sentences(12, "test")


def plain(loaded, sentences, **options):
    model, tokenizer = loaded
    batch = tokenizer([s.source for s in sentences], return_tensors="pt", padding=True, padding_side="right")
    batch.pop("token_type_ids", None)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=30, **options)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def pairs(sentences):
    return [s.source for s in sentences], [s.target for s in sentences]


@pytest.mark.parametrize("setting", [{"lam": 1.0}, {"theta": 1.0}])
@pytest.mark.parametrize("beams", [1, 4])
def test_without_a_pull_it_is_plain_beam_search(generator, sentences, setting, beams):
    made = DCSQE(**setting, beams=beams).translate(generator, *pairs(sentences))
    assert made == plain(generator, sentences, num_beams=beams)


def test_a_full_pull_copies_the_reference(generator, sentences):
    made = DCSQE(theta=0.0, lam=0.0, beams=1).translate(generator, *pairs(sentences))
    assert made == [s.target for s in sentences]


def test_a_reference_beyond_the_positions_is_copied_as_far_as_they_go(generator):
    made = DCSQE(theta=0.0, lam=0.0, beams=1).translate(generator, ["the pasune"], ["ul " * 40])
    assert made == [" ".join(["ul"] * 31)]


def test_a_batch_is_searched_as_its_rows_alone(generator, sentences):
    method = DCSQE()
    together = method.translate(generator, *pairs(sentences))
    assert together == [method.translate(generator, [s.source], [s.target])[0] for s in sentences]


def test_the_closer_the_more_pull(generator, sentences):
    """Words that differ from the reference become fewer as lam falls."""

    def differing(lam):
        made = DCSQE(lam=lam).translate(generator, *pairs(sentences))
        return sum(sum(ter_tags(text.split(), s.target.split()).words) for text, s in zip(made, sentences))

    plain, some, strong = differing(1.0), differing(0.5), differing(0.05)
    assert plain > some >= strong


def test_other_models_are_pulled_too(make_model, tokenizer):
    """A decoder behind its prompt, in plain generate with logits instead of log-probabilities."""
    model = make_model("llama")
    prompt = tokenizer(["the sea", "a stone on"], return_tensors="pt", padding=True, padding_side="left")
    references = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in ("is green and", "a road")]
    start = prompt.input_ids.shape[1]
    pull = ReferenceConstrainedLogitsProcessor(references, tokenizer, Constraint(0.0, 0.0), start)
    ids = model.generate(**prompt, logits_processor=[pull], do_sample=False, max_new_tokens=12)
    for row, reference in zip(ids[:, start:].tolist(), references):
        assert row[: len(reference)] == reference


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: processor([]), "there are no references"),
        (lambda: processor([[3, EOS], [EOS]]), "reference 2 is empty"),
        (lambda: processor([[3, 4]]), "does not end with the end-of-text token 0"),
        (lambda: processor([[3, EOS]], Constraint(theta=1.5)), r"theta=1.5 is not allowed; give a number in \[0, 1\]"),
        (lambda: processor([[3, EOS]], Constraint(lam=-0.1)), r"lam=-0.1 is not allowed; give a number in \[0, 1\]"),
        (lambda: processor([[3, EOS]], Constraint(tau=0)), "tau=0 is not allowed"),
        (lambda: processor([[3, EOS]], Constraint(window=-1)), "window=-1 is not allowed"),
        (lambda: processor([[3, EOS], [4, EOS]])(torch.ones(3, 1).long(), torch.ones(3, 9)), "3 rows .* 2 references"),
        (
            lambda: ReferenceConstrainedLogitsProcessor([[3]], SimpleNamespace(eos_token_id=None, pad_token_id=0)),
            "no end-of-text token",
        ),
        (lambda: DCSQE(theta=2), r"theta=2 is not allowed .* \[0, 1\]"),
        (lambda: DCSQE(tau=0), "tau=0 is not allowed"),
        (lambda: DCSQE(weights=(1, 0.5, 5)), "do not fall"),
        (lambda: DCSQE(thresholds="0.1,0.5,0.9"), "do not grow"),
        (lambda: DCSQE(weights="1,2"), "weights"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- tags and severities -------------------------------------------------------------------------------------------


def edits(first, second):
    """The fewest insertions, deletions and substitutions."""
    table = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, table[0] = table[0], i
        for j, b in enumerate(second, 1):
            before, table[j] = table[j], min(table[j] + 1, table[j - 1] + 1, before + (a != b))
    return table[-1]


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)
)
def test_tags_leave_a_common_subsequence_of_the_fewest_edits(translation, reference):
    tags = ter_tags(translation, reference)
    kept = [word for word, wrong in zip(translation, tags.words) if not wrong]
    rest = iter(reference)
    assert all(word in rest for word in kept), "what is right comes in the reference in this order"
    wrong, missing = len(translation) - len(kept), len(reference) - len(kept)
    assert max(wrong, missing) <= edits(translation, reference)


def test_tags_by_hand():
    assert ter_tags("a x c".split(), "a b c".split()) == ([False, True, False], False)
    assert ter_tags("a b".split(), "a b c".split()) == ([False, False], True)
    assert ter_tags("a b c".split(), "a b c".split()) == ([False] * 3, False)
    for translation, reference, message in (([], ["a"], "translation is empty"), (["a"], [], "reference is empty")):
        with pytest.raises(InputError, match=message):
            ter_tags(translation, reference)
    with pytest.raises(InputError, match="is one text; give a list of words"):
        ter_tags("a b", ["a"])


@pytest.mark.parametrize("rule", ["rank", "probability"])
def test_severities_are_by_what_the_annotator_expects(annotator, sentences, rule):
    """Against one forward for each sentence and a loop over its words; a batch is padded."""
    model, tokenizer = annotator
    rng = random.Random(1)
    words = [[*s.target.split()[: rng.randint(2, 9)], rng.choice(["zoge", "un"])] for s in sentences]
    tags = [Tags([rng.random() < 0.7 for _ in row], rng.random() < 0.5) for row in words]
    found = annotate_severity(annotator, [s.source for s in sentences], words, tags, rule, batch_size=5)
    for s, row, tag, severities in zip(sentences, words, tags, found):
        labels = torch.tensor([[*tokenizer.convert_tokens_to_ids(row), tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=tokenizer(s.source, return_tensors="pt").input_ids, labels=labels).logits[0]
        for place, (label, wrong, severity) in enumerate(zip(labels[0], [*tag.words, tag.end], severities)):
            if rule == "rank":
                rank = 1 + int((logits[place] > logits[place, label]).sum())
                level = "ok" if rank <= 4 else "minor" if rank <= 8 else "major" if rank <= 30 else "critical"
            else:
                p = float(logits[place].softmax(-1)[label])
                level = "ok" if p >= 0.2 else "minor" if p >= 0.04 else "major" if p >= 0.004 else "critical"
            assert severity == (level if wrong else "ok")
    assert len({one for row in found for one in row}) == 4


def test_a_word_is_as_bad_as_its_worst_token(tokenizer):
    """Subwords: a byte-level tokenizer and a random model of its vocabulary."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": 0}
    config = BartConfig(
        vocab_size=len(tokenizer), encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.5, **shape, **ids
    )
    model = BartForConditionalGeneration(config).eval()
    words = ["lighthouse", "of", "unexpectedness"]
    (found,) = annotate_severity(Loaded(model, tokenizer), ["sea"], [words], [Tags([True] * 3, False)])
    targets = tokenizer([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokenizer("sea", return_tensors="pt"), labels=targets.input_ids).logits[0]
    ranks = (logits > logits.gather(1, targets.input_ids[0][:, None])).sum(-1).tolist()
    for i, severity in enumerate(found[:3]):
        worst = max(rank for rank, word in zip(ranks, targets.word_ids(0)) if word == i)
        assert severity == ("ok" if worst < 4 else "minor" if worst < 8 else "major" if worst < 30 else "critical")
    assert len(targets.word_ids(0)) > 3 and found[3] == "ok"


def test_a_model_finds_less_wrong_with_what_it_wrote_itself(generator, annotator, caplog):
    sentences = draw_sentences(48, "train", 1)
    rows = [TranslationRow(source=s.source, reference=s.target) for s in sentences]

    def marked(by):
        judged = DCSQE(annotator=by, phrase_rule="run").label(rows, generator)
        return sum(sum(one.bad) for one in judged)

    other = marked(annotator)
    assert not caplog.records
    assert marked(generator) < 0.5 * other
    assert "generator and annotator have the same weights" in caplog.text


# --- labels, the estimator -----------------------------------------------------------------------------------------


def test_labels_take_whole_phrases_and_count_what_is_missing(annotator):
    """A given translation: two wrong words whose path leads over a right one, and a missing end."""
    (s,) = draw_sentences(1, "test")
    words = s.target.split()
    wrong = [words[0], "gar", "gar", *words[3:-1]]
    row = TranslationRow(source=s.source, reference=s.target, translation=" ".join(wrong))
    method = DCSQE(annotator=annotator, phrase_rule="run")
    (run,) = method.label([row])
    assert run.words == wrong and run.severities[1] == run.severities[2] == "critical" and run.score < 0
    heads = [0, 1, 1, *[1] * (len(wrong) - 3)]
    (whole,) = method.model_copy(update={"phrase_rule": "spce"}).label([row.model_copy(update={"heads": heads})])
    assert whole.severities[0] == "critical" and whole.bad[0] == 1
    (parsed,) = DCSQE(annotator=annotator).label([row], parse=lambda words: heads)
    assert parsed == whole


@pytest.fixture(scope="module")
def encoder(generator):
    """Small, with random weights, and the tokens of the translators."""
    torch.manual_seed(0)
    tokenizer = generator.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape, **ids)), tokenizer


@pytest.fixture(scope="module")
def judged(generator, annotator):
    rows = [TranslationRow(source=s.source, reference=s.target) for s in draw_sentences(40, "train", 1)]
    return DCSQE(annotator=annotator, phrase_rule="run", lam=1.0).label(rows, generator)


def test_the_loss_is_the_sum_over_words_and_the_mean_over_sentences(encoder, judged):
    model, tokenizer = QualityEstimator.from_encoder(encoder[0]).eval(), encoder[1]
    model.config.ok_weight = 0.3
    batch = QECollator(tokenizer, 64)(judged[:5])
    output = model(**batch)
    found = model.estimate(tokenizer, [one.source for one in judged[:5]], [one.translation for one in judged[:5]])
    tags = sum(
        -math.log(p) if severity != "ok" else -0.3 * math.log(1 - p)
        for one, estimate in zip(judged, found)
        for severity, p in zip(one.severities, estimate.bad, strict=True)
    )
    squares = [(one.score - estimate.score) ** 2 for one, estimate in zip(judged, found)]
    assert output.loss.item() == pytest.approx(tags + sum(squares) / 5, rel=1e-4)
    alone = [model.estimate(tokenizer, [one.source], [one.translation])[0] for one in judged[:5]]
    for one, other in zip(alone, found):
        assert one.bad == pytest.approx(other.bad, abs=1e-5) and one.score == pytest.approx(other.score, abs=1e-5)


def test_words_of_several_tokens_are_tagged_at_their_first(tokenizer, judged):
    collator = QECollator(tokenizer, None)
    words = ["lighthouse", "of", "unexpectedness"]
    batch = collator.encoded(["the sea"], [words])
    kept = batch["input_ids"][0][batch["starts"][0]]
    encoding = tokenizer([words], is_split_into_words=True)
    assert kept.tolist() == [encoding.input_ids[0][encoding.word_to_tokens(0, i).start] for i in range(3)]


def test_an_estimator_learns_saves_and_loads(encoder, judged, tmp_path):
    """It overfits what it was shown, whose right words weigh little; a second one from the seed is the same."""
    ticks = []
    method = DCSQE(epochs=30, learning_rate=1e-2, batch_size=8).model_copy(update={"encoder": encoder})
    model, tokenizer = method.fit(judged, lambda done, total: ticks.append((done, total)))
    assert ticks[-1] == (150, 150)
    words = [severity != "ok" for one in judged for severity in one.severities]
    assert model.config.ok_weight == pytest.approx(2 * sum(words) / (len(words) - sum(words)))
    rows = [TranslationRow(source=one.source, translation=one.translation) for one in judged]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "qe")
    found = DCSQE(estimator=str(tmp_path / "qe")).estimate(rows)
    assert found == method.model_copy(update={"estimator": (model, tokenizer)}).estimate(rows)
    flat = [[severity != "ok" for one in side for severity in one.severities] for side in (judged, found)]
    measures = qe_metrics(*flat, [one.score for one in judged], [one.score for one in found])
    assert measures["mcc"] > 0.8 and measures["spearman"] > 0.5
    again, _ = method.fit(judged)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_metrics_are_those_of_scikit_learn_and_scipy():
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = random.Random(0)
    true = [rng.random() < 0.3 for _ in range(200)]
    found = [tag if rng.random() < 0.7 else not tag for tag in true]
    scores = [round(rng.random(), 1) for _ in range(50)]
    near = [score + rng.gauss(0, 0.3) for score in scores]
    got = qe_metrics(true, found, scores, near)
    assert got["mcc"] == pytest.approx(metrics.matthews_corrcoef(true, found))
    assert got["f1_bad"] == pytest.approx(metrics.f1_score(true, found))
    assert got["f1_ok"] == pytest.approx(metrics.f1_score(true, found, pos_label=False))
    assert got["f1_mult"] == pytest.approx(got["f1_bad"] * got["f1_ok"])
    assert got["spearman"] == pytest.approx(stats.spearmanr(scores, near).statistic)
    assert got["pearson"] == pytest.approx(stats.pearsonr(scores, near).statistic)
    assert qe_metrics([True, True], [True, True], [1], [1])["mcc"] == 0
    with pytest.raises(InputError, match="2 words and 1 estimates"):
        qe_metrics([True, True], [True], [1], [1])


GIVEN = {"source": "the nama", "reference": "dobuzu ul", "translation": "dobuzu ula"}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {}, "dcsqe labels by a second translation model; give -o annotator=NAME"),
        ({"reference": None}, {"annotator": 1}, "row 1 has no reference"),
        ({"reference": " "}, {"annotator": 1}, "row 1 has no reference"),
        ({"translation": None}, {"annotator": 1}, "row 1 has no translation; give 'translation', or a model"),
        ({"translation": " "}, {"annotator": 1}, "the translation of row 1 is empty"),
        ({"translation": None, "heads": [0, 1]}, {"annotator": 1}, "row 1 has heads but no translation"),
        ({}, {"annotator": 1, "phrase_rule": "spce"}, "row 1 has no dependency tree"),
        ({"heads": [0]}, {"annotator": 1, "phrase_rule": "spce"}, "1 heads for 2 words"),
    ],
)
def test_rows_that_cannot_be_labeled_are_refused(annotator, change, options, message):
    given = {"phrase_rule": "run", **options, **({"annotator": annotator} if "annotator" in options else {})}
    with pytest.raises(InputError, match=message):
        DCSQE(**given).label([TranslationRow(**{**GIVEN, **change})])


def test_other_refusals(annotator, generator, encoder, judged, tmp_path, make_model, tokenizer):
    row = TranslationRow(**GIVEN)
    causal = Loaded(make_model("llama"), tokenizer)
    for make, message in (
        (lambda: DCSQE(annotator=causal, phrase_rule="run").label([row]), "the annotator is a LlamaForCausalLM"),
        (lambda: DCSQE().translate(causal, ["a"], ["b"]), "the generator is a LlamaForCausalLM of the kind causal"),
        (lambda: DCSQE().translate(generator, ["a"], [" "]), "reference 1 is empty"),
        (lambda: DCSQE().translate(generator, [""], ["b"]), "source 1 is empty"),
        (lambda: DCSQE().translate(generator, ["a " * 40], ["b"]), "a source has 41 tokens, the translation model 32"),
        (
            lambda: annotate_severity(annotator, ["a"], [["b"] * 40], [Tags([True] * 40, False)]),
            "a translation has 41 tokens, the translation model 32 positions",
        ),
        (lambda: DCSQE().estimate([row]), "give -o estimator=FOLDER"),
        (lambda: DCSQE(estimator=str(tmp_path)).estimate([row]), "there is no estimator in"),
        (lambda: DCSQE(estimator="x").estimate([row.model_copy(update={"translation": None})]), "no translation to"),
        (lambda: DCSQE().fit(judged), "give -o encoder="),
        (
            lambda: trained_estimator(encoder, [one for one in judged if not any(one.bad)], {"seed": 0}),
            "is wrong; label",
        ),
        (lambda: annotate_severity(annotator, ["a"], [["b", "c"]], [Tags([True], False)]), "2 words and 1 tags"),
        (lambda: mqm_score([], 0), "the translation is empty"),
        (lambda: phrase_labels(["ok"], [0, 1]), "2 heads for 1 words"),
        (
            lambda: QualityEstimator.from_encoder(encoder[0]).estimate(encoder[1], ["a", "b"], ["c"]),
            "sources and translations are not as many",
        ),
        (
            lambda: QualityEstimator.from_encoder(encoder[0]).estimate(encoder[1], ["a"], [" "]),
            "translation 1 is empty",
        ),
        (
            lambda: QualityEstimator.from_encoder(encoder[0]).estimate(encoder[1], ["a " * 70], ["c"]),
            "the encoder's window 64",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make()
    encoder[0].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a model of the type 'bert' and no quality estimator"):
        DCSQE(estimator=str(tmp_path)).estimate([row])


# --- the command line ----------------------------------------------------------------------------------------------


def run(*args, code=0):
    result = CliRunner().invoke(main, ["judge", "--method", "dcsqe", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_from_parallel_text_to_estimates_on_the_command_line(encoder, tmp_path, generator, annotator):
    for part in encoder:
        part.save_pretrained(tmp_path / "encoder")
    sentences = draw_sentences(12, "train", 1)
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("\n".join(json.dumps({"source": s.source, "reference": s.target}) for s in sentences))
    labeling = ("-o", "annotator=zoo/translator-b", "-o", "phrase_rule=run", "-o", "lam=1", lines)
    model = ("--model", "zoo/translator-a")
    learning = ("-o", f"encoder={tmp_path / 'encoder'}", "--save", tmp_path / "qe")
    labels = json.loads(run(*labeling, *model, "--json", *learning))
    rows = [TranslationRow(source=s.source, reference=s.target) for s in sentences]
    method = DCSQE(annotator=annotator, phrase_rule="run", lam=1.0)
    assert labels == JudgedTranslations(method.label(rows, generator)).to_json()
    lines.write_text(
        "\n".join(json.dumps({"source": one["source"], "translation": one["translation"]}) for one in labels)
    )
    estimates = json.loads(run("-o", f"estimator={tmp_path / 'qe'}", lines, "--json"))
    DCSQE.output.model_validate(estimates)
    assert [one["translation"] for one in estimates] == [one["translation"] for one in labels]
    assert "12 translations, mean score" in run("-o", f"estimator={tmp_path / 'qe'}", lines)
    for args, message in (
        ((*labeling, "--raw"), "--raw would have no effect"),
        ((*labeling, "--report", "x.svg"), "--report would have no effect"),
        ((*labeling, *model, "--save", tmp_path / "new"), "give -o encoder="),
        (("-o", f"estimator={tmp_path / 'qe'}", *model, lines), "--model would have no effect"),
        (labeling, "row 1 has no reference"),
    ):
        assert message in run(*args, code=2)
