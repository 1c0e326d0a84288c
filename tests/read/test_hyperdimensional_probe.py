"""The hyperdimensional probe: its algebra against closed forms, k-means against its definition, refusals, the verbs."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.learned import Codebook, HyperProbe
from tokenry.models.load import Loaded
from tokenry.read import ConceptReading, HyperdimensionalProbe, compress_states, documents_in, read_states
from tokenry.trace import Trace, capture

WORDS = [f"word{i:02d}" for i in range(60)]
LINES = "\n".join(f"{a} : {b} = {c} : {d}" for a, b, c, d in zip("abcdefgh", "bcdefgha", "cdefghab", "efghabcd"))


@pytest.fixture
def book():
    return Codebook(WORDS, dim=4096, tie="random")


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=-1))


# --- algebra ---------------------------------------------------------------------------------------------------------


def test_binding_twice_gives_the_vector_back(book):
    x, y = book["word01"], book["word02"]
    assert torch.equal(book.bind(book.bind(x, y), y), x)
    assert torch.equal(book.bind(x, y), book.bind(y, x))


def test_cosines_of_two_codes_have_mean_0_and_deviation_of_one_over_the_root_of_dim(book):
    found = book.similarities(book.codes)[torch.triu_indices(60, 60, 1).unbind()].double()
    assert abs(found.mean()) < 4 / math.sqrt(4096 * len(found))
    assert abs(float(found.std()) * math.sqrt(4096) - 1) < 0.1


@pytest.mark.parametrize("m", [3, 5])
def test_a_bundle_keeps_each_item_at_the_closed_form(book, m):
    bundle = book.bundle(*book[WORDS[:m]])
    expected = math.comb(m - 1, (m - 1) // 2) / 2 ** (m - 1)
    assert all(abs(cosine(bundle, code) - expected) < 4 / math.sqrt(4096) for code in book[WORDS[:m]])


def test_a_key_unbinds_its_value_at_one_half(book):
    code = book.encode_pairs([("word00", "word01"), ("word02", "word03")])
    ((best, value), *_) = book.cleanup(book.bind(code, book["word02"]), 3)
    assert best == "word03" and abs(value - 0.5) < 4 / math.sqrt(4096)


def test_negative_ties_show_a_word_that_only_the_bias_knows():
    """Unbound by all other three words: at a tie -1 is the product of all four, so that the fourth is left."""
    found = {}
    for tie in ("negative", "random", "zero"):
        book = Codebook(WORDS, dim=4096, tie=tie)
        code = book.encode_pairs([("word00", "word01"), ("word02", "word03")])
        found[tie] = cosine(book.bind(code, *book[["word00", "word01", "word02"]]), book["word03"])
        assert tie != "negative" or abs(float(code.double().mean()) + 0.5) < 0.07
    assert abs(found["negative"] - 0.5) < 0.07 and abs(found["random"]) < 0.07 and abs(found["zero"]) < 0.07


def test_a_codebook_is_the_same_from_the_same_seed_and_in_any_order():
    first, second = Codebook(["B", "a"], 256), Codebook(["A", "b "], 256)
    assert first.concepts == second.concepts == ("a", "b") and torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, Codebook(["a", "b"], 256, seed=1).codes)


# --- compression -----------------------------------------------------------------------------------------------------


def lloyd(points, k, seed=101):
    """k-means as its definition says, one point at a time; an empty cluster keeps its centroid."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]
    centroids = [points[i] for i in order.tolist()]
    for _ in range(100):
        nearest = [min(range(k), key=lambda c: float((p - centroids[c]).norm())) for p in points]
        groups = [[p for p, n in zip(points, nearest) if n == c] for c in range(k)]
        centroids = [torch.stack(g).mean(0) if g else old for g, old in zip(groups, centroids)]
    return torch.stack(centroids).sum(0)


def test_kmeans_equals_its_definition_and_a_batch_its_rows():
    hidden = torch.randn(7, 16, 12, generator=torch.Generator().manual_seed(0))
    together = compress_states(hidden, 5)
    assert torch.allclose(together, torch.stack([lloyd(row, 5) for row in hidden]), atol=1e-5)
    assert torch.allclose(together[3], compress_states(hidden[3], 5), atol=1e-6)


def test_compression_has_its_neutral_settings():
    hidden = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(compress_states(hidden, 8), hidden.sum(1), atol=1e-5)  # a cluster for every layer
    assert torch.allclose(compress_states(hidden, 1), hidden.mean(1), atol=1e-5)
    assert torch.allclose(compress_states(hidden, 0), hidden.mean(1))
    scaled = hidden * torch.arange(1, 9)[:, None]
    assert torch.allclose(compress_states(scaled, 3, True), compress_states(hidden, 3, True), atol=1e-5)


def test_empty_clusters_give_no_nan():
    assert bool(compress_states(torch.ones(2, 6, 4), 5).isfinite().all())
    assert torch.equal(compress_states(torch.ones(6, 4), 5), torch.full((4,), 5.0))


def test_states_of_a_batch_are_those_of_a_trace(llama, tokenizer):
    texts = ["a : b = c :", "a longer text : b = c :"]
    depth = llama.config.num_hidden_layers
    for text, found in zip(texts, read_states(llama, tokenizer, texts)):
        with capture(llama, tokenizer, hidden=range(depth)) as cap, torch.no_grad():
            llama(tokenizer(text, return_tensors="pt").input_ids)
        wanted = [cap.trace.hidden(i)[-1] for i in range(max(1, depth // 2), depth)] + [cap.trace.hidden("final")[-1]]
        assert torch.allclose(found, torch.stack(wanted), atol=1e-5)


# --- encoder ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(llama, tokenizer):
    method = HyperdimensionalProbe(dim=256, n_clusters=1, blocks=1, epochs=60, learning_rate=1e-2, tie="random")
    return method.fit(Loaded(llama, tokenizer), documents_in(LINES, "lines")).artifact


def test_the_loss_is_its_definition():
    probe = HyperProbe(Codebook(["a"], 256), 4).eval()
    states, code = torch.randn(3, 4), torch.ones(3, 256)
    logits = probe(states)
    expected = -torch.log(torch.sigmoid(logits)).mean() + 0.1 * (logits - code).square().mean()
    assert torch.allclose(probe.loss(states, code), expected, atol=1e-6)


def test_the_official_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        probe = HyperProbe(Codebook.restored(*_meta_book()), 1024)
    assert round(sum(p.numel() for p in probe.parameters()) / 1e6) == 55


def _meta_book():
    codes = torch.ones(1, 4096, dtype=torch.int8, device="cpu")
    return {"concepts": ["a"], "seed": 101, "tie": "negative"}, {"codes": codes}


def test_an_encoder_learns_separable_states_and_is_the_same_again():
    book = Codebook(list("abcdef"), 256, tie="random")
    states = torch.eye(6).repeat(20, 1)
    codes = book[list("abcdef")].repeat(20, 1)
    first, second = (HyperProbe(book, 6, 1).fit(states, codes, learning_rate=1e-2, epochs=5) for _ in range(2))
    assert [first.read(state)[0][0] for state in torch.eye(6)] == list("abcdef")
    assert first.digest() == second.digest() and first.held_out_cosine > 0.95


def test_a_probe_comes_back_as_it_was_saved(learned, llama, tmp_path):
    learned.save(tmp_path / "probe")
    again = HyperProbe.load(tmp_path / "probe")
    states = torch.randn(4, llama.config.hidden_size)
    assert torch.equal(again(states), learned.eval()(states)) and again.codebook.concepts == learned.codebook.concepts
    learned.codebook.save(tmp_path / "book")
    assert torch.equal(Codebook.load(tmp_path / "book").codes, learned.codebook.codes)


def test_a_trace_reads_as_its_text_does(learned, llama, tokenizer, tmp_path):
    loaded, method = Loaded(llama, tokenizer), HyperdimensionalProbe(given=("c",), threshold=0)
    text = "a : b = c :"
    with capture(llama, tokenizer, hidden=range(llama.config.num_hidden_layers)) as cap, torch.no_grad():
        llama(tokenizer(text, return_tensors="pt").input_ids)
    cap.trace.save(tmp_path / "t.safetensors")
    trace = Trace.load(tmp_path / "t.safetensors")
    assert method.read(trace, learned).rows == method.read(text, learned, loaded).rows
    assert method.read(trace, learned).rows[0]["given"] == ["c"]


def test_a_reading_draws_bars_and_escapes():
    rows = [{"position": 1, "concept": "<b>", "cosine": 0.5, "given": []}]
    drawn = ConceptReading("x", rows).picture()
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn and 'width="150.0"' in drawn
    assert "nothing" in ConceptReading("x", []).picture()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Codebook(["Rome", "rome"]), "equal after lower-casing: rome"),
        (lambda: Codebook([]), "at least one concept"),
        (lambda: Codebook("rome"), "one text"),
        (lambda: Codebook(["a"], dim=255), "dim=255"),
        (lambda: Codebook(["a"], dim=16385), "16384"),
        (lambda: Codebook(["a"], tie="up"), "tie='up'"),
        (lambda: Codebook(["a"])[["x", "a", "y"]], "no concept 'x', 'y'"),
        (lambda: Codebook(["a"]).bundle(), "nothing to bundle"),
        (lambda: Codebook(["a"], 256).bind(torch.full((256,), 2)), "is no code"),
        (lambda: Codebook(["a"], 256).bind(torch.full((256,), 0.5)), "is no code"),
        (lambda: Codebook(["a"], 256).bind(torch.zeros(256)), "is no code"),
        (lambda: Codebook(["a"], 256).cleanup(torch.ones(256), 2), "k=2"),
        (lambda: compress_states(torch.ones(4, 3), 5), "n_clusters=5"),
        (lambda: compress_states(torch.full((4, 3), torch.nan), 2), "not finite"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4)(torch.ones(1, 5)), "width 4, not 5"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4)(torch.full((1, 4), torch.inf)), "not finite"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4).fit(torch.ones(2, 4), torch.zeros(2, 256)), "is no code"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4).fit(torch.ones(2, 4), torch.ones(3, 256)), "for 3 codes"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4, dropout=1), "dropout=1"),
        (lambda: HyperProbe(Codebook(["a"], 256), 4).save("x"), "belongs to no model"),
        (lambda: documents_in("a : b : c\na : b", "f"), "line 1 of 'f'"),
        (lambda: documents_in("a : b", "f"), "1 lines"),
        (lambda: HyperdimensionalProbe().examples("capitals:3", None), "no known task"),
        (lambda: HyperdimensionalProbe().examples("analogies:1", None), "1 analogies are not allowed; give 2 to"),
        (lambda: HyperdimensionalProbe().examples("analogies:99999", None), "99999 analogies are not allowed"),
        (lambda: HyperdimensionalProbe(dim=100), "dim"),
        (lambda: HyperdimensionalProbe().read("x"), "need a probe"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_trace_without_the_states_is_refused(learned, llama, make_model, tokenizer):
    ids = tokenizer("a : b", return_tensors="pt").input_ids
    with capture(llama, tokenizer) as cap, torch.no_grad():
        llama(ids)
    with pytest.raises(InputError, match=r"hidden=range\("):
        HyperdimensionalProbe().read(cap.trace, learned)
    with capture(llama, tokenizer, hidden=range(llama.config.num_hidden_layers)) as cap, torch.no_grad():
        llama(ids)
    with pytest.raises(InputError, match="position=500"):
        HyperdimensionalProbe(position=500).read(cap.trace, learned)
    with pytest.raises(InputError, match="no concept 'zebra'"):
        HyperdimensionalProbe(given=("zebra",)).read(cap.trace, learned)
    cap.trace.header["fingerprint"] = "another"
    with pytest.raises(InputError, match="not for the weights another"):
        HyperdimensionalProbe().read(cap.trace, learned)


def test_analogies_of_countries_come_with_it():
    """Two of them are always the same, in the form that a file has."""
    drawn = HyperdimensionalProbe().examples("analogies:50", None)
    assert drawn == HyperdimensionalProbe().examples("analogies:50", None) and len(set(drawn)) == 50
    pairs = {frozenset(pair) for document in drawn for pair in document.pairs}
    assert any("france" in pair for pair in pairs) and all(len(document.pairs) == 2 for document in drawn)
    first = drawn[0]
    (a, b), (c, _) = first.pairs
    assert first.prompt == f"{a} : {b} = {c} :"


# --- verbs -----------------------------------------------------------------------------------------------------------


def test_the_verbs_fit_and_read(llama, tokenizer, tmp_path):
    folder, probe, data = tmp_path / "model", str(tmp_path / "probe"), tmp_path / "lines.txt"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text(LINES)
    small = ["-o", "dim=256", "-o", "n_clusters=1", "-o", "epochs=2", "-o", "tie=random"]
    fit = ["fit", "hyperdimensional-probe", "--data", str(data), "--save", probe, "--model", str(folder), *small]
    done = CliRunner().invoke(main, fit)
    assert done.exit_code == 0, done.output
    ask = ["read", "--method", "hyperdimensional-probe", "--artifact", probe, "--model", str(folder), "--json"]
    report = tmp_path / "page.html"
    asked = ["-o", "given=a,b", "-o", "threshold=0", "-o", "subsets=true", "--report", str(report), "a : b = c :"]
    found = CliRunner().invoke(main, [*ask, *asked])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)[0]["rows"]
    assert rows and rows == sorted(rows, key=lambda row: -row["cosine"]) and "<svg" in report.read_text()
