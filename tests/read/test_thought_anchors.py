"""Thought anchors against oracles: deletion, loops over definitions, planted heads and rollouts; and the refusals."""

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from scipy.stats import kurtosis as scipy_kurtosis
from scipy.stats import rankdata
from support.attention import assert_clean
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.evidence.thought_anchors import ROUTES, split_half
from tokenry.hooks.attention import edit_mask
from tokenry.measure.task import Arm
from tokenry.measure.tasks.beginnings import Beginnings
from tokenry.measure.tasks.planted import REWRITTEN, PlantedTask
from tokenry.models.load import Loaded
from tokenry.read import (
    CounterfactualImportance,
    Rollout,
    Rollouts,
    ThoughtAnchors,
    attribution_matrix,
    generate_rollouts,
    mean_states,
    receiver_heads,
    receiver_scores,
    segment_sentences,
    suppressed_kl,
    suppression_matrix,
)
from tokenry.read.anchors import suppression
from tokenry.read.anchors.receivers import kurtosis, sentence_attention, vertical_scores
from tokenry.read.anchors.sentences import sentences_of
from tokenry.text.sentences import check_spans, split_sentences
from tokenry.trace.recorder import head_logits
from tokenry.trace.reducers import SentenceMean
from tokenry.trace.trace import Trace, capture

WORDS = "sea sun fog ice oak elm ash fir yew bay".split()
TEXT = " ".join(f"The {word} is {i} miles away." for i, word in enumerate(WORDS))


def traced(model, tokenizer, text=TEXT, **kept):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with capture(model, tokenizer, **(kept or {"qk": "all"})) as cap, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return cap.trace


def spans_of(trace):
    return [(s.start, s.stop) for s in sentences_of(trace)]


# --- sentences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It is 3.5 miles long. Is it so? Yes it really is!", ["It is 3.5 miles long.", "Is it so? Yes it really is!"]),
        ("First of all this.\nThen that follows", ["First of all this.", "Then that follows"]),
        ("A line without a stop\n\nAnother one here", ["A line without a stop", "Another one here"]),
        ("Wait. That was too fast.", ["Wait. That was too fast."]),
        ("That was too fast. Yes.", ["That was too fast. Yes."]),
        ("No. So.", ["No. So."]),
        ("  \n\n ", []),
    ],
)
def test_splitting(text, pieces):
    assert [text[a:b] for a, b in split_sentences(text)] == pieces


def test_sentences_lie_between_the_think_tags(tokenizer):
    text = f"Question here. <think>\n{TEXT}\n</think> The answer is here."
    found = segment_sentences(text, tokenizer)
    assert [s.text for s in found] == TEXT.replace(". ", ".|").split("|")
    check_spans([(s.start, s.stop) for s in found], len(tokenizer(text).input_ids))


def test_tokens_of_a_sentence_are_its_text(llama, tokenizer):
    trace = traced(llama, tokenizer)
    for sentence in sentences_of(trace):
        assert tokenizer.decode(trace.ids[sentence.start : sentence.stop]).strip() == sentence.text
    assert sentences_of(trace) == segment_sentences(TEXT, tokenizer)


# --- receiver heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_sentence_attention_is_the_mean_of_maps(make_model, tokenizer, kind):
    model = make_model(kind)
    spans = [(s.start, s.stop) for s in segment_sentences(TEXT, tokenizer)]
    trace = traced(model, tokenizer, reducers=[SentenceMean(spans)])
    rebuilt = traced(model, tokenizer)
    maps = sentence_attention(trace)
    assert torch.allclose(maps, sentence_attention(rebuilt), atol=1e-5)
    (a, b), (c, d) = spans[7], spans[6]
    by_hand = rebuilt.attention(1)[:, a:b, c:d].mean((1, 2))
    assert torch.allclose(maps[1, :, 7, 6], by_hand, atol=1e-6)
    lengths = torch.tensor([stop - start for start, stop in spans]).float()
    outside = torch.ones(len(trace)).bool()
    for start, stop in spans:
        outside[start:stop] = False
    rest = rebuilt.attention(1)[:, a:b][:, :, outside].sum(2).mean(1)
    assert torch.allclose((maps[1, :, 7] * lengths).sum(-1) + rest, torch.ones(len(rest)), atol=1e-5)


@pytest.mark.parametrize("control_depth", [False, True])
def test_vertical_scores_are_their_definition(control_depth):
    n, p = 9, 3
    maps = torch.rand(2, n, n, generator=torch.Generator().manual_seed(0)).mul(8).round()  # with ties
    found = vertical_scores(maps, p, control_depth)
    for head in range(2):
        values = torch.full((n, n), torch.nan)
        for a in range(p, n):
            row = maps[head, a, : a - p + 1]
            ranked = torch.tensor(rankdata(row.numpy()) / len(row)) if control_depth else row
            values[a, : a - p + 1] = ranked.float()
        assert torch.allclose(found[head], values.nanmean(0), equal_nan=True)
    assert found[:, -p:].isnan().all() and found[:, :-p].isfinite().all()


@pytest.mark.parametrize("n", [5, 12])
def test_kurtosis(n):
    spike = torch.zeros(n + 2)
    spike[3], spike[n:] = 7, torch.nan
    p, q = 1 / n, 1 - 1 / n
    assert float(kurtosis(spike)) == pytest.approx((1 - 6 * p * q) / (p * q))
    values = torch.rand(3, n, generator=torch.Generator().manual_seed(1)).double()
    assert kurtosis(values).tolist() == pytest.approx(scipy_kurtosis(values.numpy(), axis=1).tolist())


def test_a_planted_head_is_first(llama, tokenizer):
    """A head that looks at nothing but one sentence (and itself) is the first receiver head; its sentence scores."""
    spans = [(s.start, s.stop) for s in segment_sentences(TEXT, tokenizer)]
    start, stop = spans[2]

    def planted(call):
        if call.layer != 1:
            return call.mask
        q = call.query.shape[2]
        mask = torch.ones(q, q).tril().bool().expand(1, call.heads, -1, -1).clone()
        later = torch.arange(q) >= stop
        mask[:, 3, later] = False
        mask[:, 3, later, start:stop] = True
        return mask

    with edit_mask(llama, planted):
        trace = traced(llama, tokenizer, reducers=[SentenceMean(spans)])
    found = receiver_heads([trace, trace], top_k=3)
    assert found.heads[0] == (1, 3) and all(layer > 0 for layer, _ in found.heads)
    assert found.reliability == pytest.approx(1)
    scores = receiver_scores(trace, [(1, 3)])
    assert int(scores.nan_to_num(-1).argmax()) == 2 and scores[-4:].isnan().all()
    both = receiver_scores(trace, [(1, 3), (1, 0)])
    assert torch.allclose(both, (scores + receiver_scores(trace, [(1, 0)])) / 2, equal_nan=True)
    with pytest.raises(InputError, match="edited during the capture"):
        with edit_mask(llama, planted):
            edited = traced(llama, tokenizer)
        sentence_attention(edited)


# --- suppression ---------------------------------------------------------------------------------------------------


def by_deletion(model, ids, span, temperature):
    """KL after each token behind the span from a run without its tokens, in which the others keep their positions."""
    start, stop = span
    keep = torch.cat([torch.arange(start), torch.arange(stop, len(ids))])
    with torch.no_grad():
        plain = model(ids[None], use_cache=False).logits[0, stop:].double()
        ones = torch.ones_like(keep)[None]  # without which a gap in the positions would begin another text
        cut = model(ids[keep][None], ones, position_ids=keep[None], use_cache=False).logits[0, start:].double()
    p, q = ((x / temperature).log_softmax(-1) for x in (plain, cut))
    return (p.exp() * (p - q)).sum(-1).float()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("fed", [2048, 150, 33, 1])
def test_suppression_is_deletion(make_model, tokenizer, monkeypatch, kind, fed):
    """Sentences in batches, one by one, and each in parts; with few logits at a time."""
    monkeypatch.setitem(suppression.TOKENS, "cpu", fed)
    monkeypatch.setattr(suppression, "LOGITS", fed * 320)
    model = make_model(kind)
    trace = traced(model, tokenizer)
    spans = spans_of(trace)
    found = suppressed_kl(model, trace.ids, spans, temperature=0.3)
    for i, (_, stop) in enumerate(spans):
        assert (found[i, :stop] == 0).all()
        expected = by_deletion(model, trace.ids, spans[i], 0.3)
        assert torch.allclose(found[i, stop:], expected, rtol=1e-3, atol=1e-6)
    assert found.max() > 1e-4
    assert_clean(model)


@pytest.mark.parametrize("fed", [2048, 20])
def test_a_sliding_window_hides_the_same_columns(make_model, tokenizer, monkeypatch, fed):
    """Beyond Gemma's window, against one full forward for each sentence with an edited mask."""
    monkeypatch.setitem(suppression.TOKENS, "cpu", fed)
    model = make_model("gemma3")
    trace = traced(model, tokenizer)
    spans = spans_of(trace)
    found = suppressed_kl(model, trace.ids, spans)

    def logits():
        with torch.no_grad():
            return (model(trace.ids[None], use_cache=False).logits[0].double() / 0.6).log_softmax(-1)

    plain = logits()
    for i, (start, stop) in enumerate(spans):

        def hide(call, start=start, stop=stop):
            q = call.query.shape[2]
            causal = torch.ones(q, q).tril().bool()[None, None]
            mask = (causal if call.mask is None else call.mask).clone()
            mask[:, :, stop:, start:stop] = False
            return mask

        with edit_mask(model, hide):
            hidden = logits()
        expected = (plain.exp() * (plain - hidden)).sum(-1).float()
        assert torch.allclose(found[i], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kl_support", ["dense", "nucleus"])
def test_no_map_and_no_table_of_logits_is_whole(llama, tokenizer, monkeypatch, kl_support):
    """No tensor is half as long as the text in two of its dimensions: time x time, or time x vocabulary."""
    monkeypatch.setitem(suppression.TOKENS, "cpu", 64)
    monkeypatch.setattr(suppression, "LOGITS", 2**15)
    trace = traced(llama, tokenizer, " ".join([TEXT] * 3))
    half, made = len(trace) // 2, []
    assert half > max(llama.config.intermediate_size, 2**15 // llama.config.vocab_size)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            made.extend(each.shape for each in tree_leaves(out) if isinstance(each, torch.Tensor))
            return out

    with Watch():
        suppressed_kl(llama, trace.ids, spans_of(trace)[::5], kl_support=kl_support)
    assert any(len(trace) in shape for shape in made)
    assert [shape for shape in made if sum(size >= half for size in shape) > 1] == []


def of_nuclei(plain, hidden, temperature):
    """KL of two lists of logits as the authors compute it: over the likeliest tokens of both, -1e9 if missing."""
    kept = []
    for logits in (plain, hidden):
        shares = (logits.double() / temperature).softmax(0)
        total, best = 0.0, {}
        for at in shares.argsort(descending=True).tolist()[:100]:
            best[at] = float(logits[at])
            total += float(shares[at])
            if total >= 0.9999:
                break
        kept.append(best)
    union = sorted(kept[0].keys() | kept[1].keys())
    p, q = ((torch.tensor([of.get(at, -1e9) for at in union]) / temperature).log_softmax(0) for of in kept)
    terms = torch.where(p.exp() == 0, 0, p.exp() * (p - q))
    return max(0.0, float(terms.sum()))


@pytest.mark.parametrize("temperature", [0.6, 0.02])
def test_a_divergence_of_nuclei(llama, tokenizer, monkeypatch, temperature):
    """At 0.6 a hundred of 320 tokens are kept, at 0.02 fewer; in few places the same ones."""
    trace, made = traced(llama, tokenizer), []

    def kept(*given):
        made.append(head_logits(*given))
        return made[-1].clone()

    monkeypatch.setattr(suppression, "head_logits", kept)
    span = spans_of(trace)[2]
    found = suppressed_kl(llama, trace.ids, [span], temperature=temperature, kl_support="nucleus")[0, span[1] :]
    plain, hidden = torch.cat(made, 1)
    expected = [of_nuclei(p, q, temperature) for p, q in zip(plain, hidden, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found.max() > 1e6 and ((found > 0) & (found < 1)).any()


def test_a_nucleus_of_everything_is_dense(llama, tokenizer, monkeypatch):
    trace = traced(llama, tokenizer)
    dense = suppression_matrix(llama, trace, center=False)
    assert not torch.allclose(
        suppression_matrix(llama, trace, center=False, kl_support="nucleus"), dense, equal_nan=True, atol=1
    )
    monkeypatch.setattr(suppression, "PORTION", 1.0)
    monkeypatch.setattr(suppression, "MOST", 10**9)
    kl = [suppressed_kl(llama, trace.ids, spans_of(trace), kl_support=each) for each in ("dense", "nucleus")]
    assert torch.allclose(*kl, rtol=1e-3, atol=1e-6)
    method = ThoughtAnchors(kl_support="nucleus", align="token", kl_temperature=0.3)
    given = {"temperature": 0.3, "align": "token"}
    expected = suppression_matrix(llama, trace, **given, kl_support="nucleus")
    assert torch.equal(method.suppression(llama, trace).nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("most", [384, 2048])
@pytest.mark.parametrize("total", [140, 2000, 20_000])
def test_sentences_that_run_together(total, most):
    """In order, each once, with few tokens more than alone and few columns in the cache, one by one if need be."""
    spans = [(start, start + 12) for start in range(0, total - 5, 14)]
    groups = list(suppression._groups(spans, total, most))
    assert [i for group in groups for i in group] == list(range(len(spans)))
    assert (len(groups) < len(spans)) == (2 * total <= 4096)
    for group in groups:
        alone, together = sum(total - spans[i][1] for i in group), len(group) * (total - spans[group[0]][1])
        assert len(group) == 1 or (together <= min(most, 1.25 * alone) and len(group) * total <= 4096)
    assert list(suppression._groups([], total, most)) == []


def test_the_matrix_is_its_definition(llama, tokenizer):
    trace = traced(llama, tokenizer)
    spans = spans_of(trace)
    kl = suppressed_kl(llama, trace.ids, spans)
    raw = suppression_matrix(llama, trace, log=False, center=False)
    logs = suppression_matrix(llama, trace, center=False)
    token = suppression_matrix(llama, trace, center=False, align="token")
    for j, (start, stop) in enumerate(spans):
        for i in range(len(spans)):
            if i >= j:
                assert raw[j, i].isnan() and logs[j, i].isnan() and token[j, i].isnan()
                continue
            assert raw[j, i] == pytest.approx(float(kl[i, start:stop].mean()), rel=1e-5)
            assert logs[j, i] == pytest.approx(float((kl[i, start:stop] + 1e-9).log().mean()), rel=1e-5)
            first = max(start - 1, spans[i][1])
            assert token[j, i] == pytest.approx(float((kl[i, first : stop - 1] + 1e-9).log().mean()), rel=1e-5)
    centered = suppression_matrix(llama, trace)
    assert torch.allclose(centered[1:].nanmean(1), torch.zeros(len(spans) - 1), atol=1e-5)
    means = logs.nanmean(1, keepdim=True).expand_as(logs)
    assert torch.allclose(centered, logs - means, equal_nan=True, atol=1e-6)


def test_hiding_nothing_changes_nothing_and_heads_add_up(llama, tokenizer):
    trace = traced(llama, tokenizer)
    spans = spans_of(trace)
    for nothing in ({"layers": []}, {"heads": []}):
        assert suppressed_kl(llama, trace.ids, spans, **nothing).max() < 1e-9
    every = suppressed_kl(llama, trace.ids, spans)
    config = llama.config
    layers = range(config.num_hidden_layers)
    pairs = [(layer, head) for layer in layers for head in range(config.num_attention_heads)]
    assert torch.allclose(suppressed_kl(llama, trace.ids, spans, heads=pairs), every, atol=1e-6)
    assert torch.allclose(suppressed_kl(llama, trace.ids, spans, layers=layers), every, atol=1e-6)
    one = suppressed_kl(llama, trace.ids, spans, layers=[1])
    of_layer = [pair for pair in pairs if pair[0] == 1]
    assert torch.allclose(suppressed_kl(llama, trace.ids, spans, heads=of_layer), one, atol=1e-6)
    assert not torch.allclose(one, every, atol=1e-6)


# --- resampling ----------------------------------------------------------------------------------------------------


def embed(texts):
    """Texts of one first word are alike, others are orthogonal."""
    words = sorted({text.split()[0] for text in texts})
    return torch.eye(len(words))[[words.index(text.split()[0]) for text in texts]]


def importance():
    return CounterfactualImportance(lambda ids, n: [], embed, lambda text: text, n=4)


def test_identical_rollouts_matter_nothing():
    same = [Rollout(["a one", "b two"], "7")] * 4
    rest = [Rollout(["b two"], "7")] * 4
    first, last = importance().score(Rollouts(["a one", "b two"], [same, rest], embed), correct="7")
    assert first == (0, 0, 0, 0, 0, 0.75) and last == first


def test_a_sentence_on_which_all_depends():
    other = [Rollout(["x one"], "3")] * 2
    rollouts = Rollouts(
        ["a one", "b two"], [other + [Rollout(["a one"], "7")] * 2, [Rollout(["b two"], "7")] * 4], embed
    )
    first = importance().score(rollouts, correct="7")[0]
    assert first.counterfactual_accuracy == -1 and first.resampling_accuracy == 0.5
    assert first.different_fraction == 0.5 and first.overdeterminedness == 0.5
    p, q = (2 + 1e-9) / (2 + 2e-9), 1e-9 / (6 + 2e-9)  # "3": all of those that differ, none of the others
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert first.counterfactual_kl == pytest.approx(expected) == pytest.approx(first.correct_kl)
    unknown = importance().score(rollouts)[0]
    assert math.isnan(unknown.resampling_accuracy) and unknown.counterfactual_kl == first.counterfactual_kl


def test_attribution_is_a_difference_of_shares():
    before = [
        [Rollout(["a", "c"], "1"), Rollout(["x"], "1")],
        [Rollout(["b", "c"], "1"), Rollout(["c"], "1"), Rollout(["b"], "1"), Rollout(["c"], "1")],
        [Rollout(["c"], "1")],
    ]
    matrix = attribution_matrix(Rollouts(["a", "b", "c"], before, embed))
    assert matrix[1, 0] == 0.5 - 0 and matrix[2, 0] == 0.75 - 0.5 and matrix[2, 1] == 1 - 0.75
    assert matrix.isnan().sum() == 6


def test_rollouts_without_an_answer_are_left_out(llama, tokenizer):
    trace = traced(llama, tokenizer)
    asked = []

    def generate(ids, n):
        asked.append(len(ids))
        return [" The sea is blue. It ends.", " The sky is red. It is unfinished"]

    method = CounterfactualImportance(generate, embed, lambda text: "yes" if text.endswith("ends.") else None, n=2)
    rollouts = method.sample(trace)
    assert asked == [s.start for s in sentences_of(trace)]
    assert [len(before) for before in rollouts.before] == [1] * len(asked)
    assert rollouts.before[0][0] == Rollout(["The sea is blue. It ends."], "yes")
    silent = CounterfactualImportance(generate, embed, lambda text: None, n=2)
    with pytest.raises(InputError, match="no rollout comes to an answer"):
        silent.sample(trace)


def test_a_forced_answer_comes_right_after_a_sentence(llama, tokenizer):
    """Only where the second sentence stands before it the answer is right, and the ending is what it is asked with."""
    trace, asked = traced(llama, tokenizer), []
    sentences, second = sentences_of(trace), sentences_of(trace)[1]

    def generate(ids, n):
        asked.append(tokenizer.decode(ids))
        return [" 7" if len(ids) > second.stop + 3 else " 3", " none"]

    def answer(text):
        return text.rpartition(" is: ")[2].replace("none", "") or None

    method = CounterfactualImportance(generate, embed, answer, n=2)
    found = method.forced(trace, tokenizer, "7", ending=" The sky is:")
    ending = tokenizer(" The sky is:", add_special_tokens=False).input_ids
    expected = [0.0] * len(sentences)
    reached = next(i for i, s in enumerate(sentences) if s.stop + len(ending) > second.stop + 3)
    expected[reached] = 1.0
    assert found == expected
    assert len(asked) == len(sentences) + 1 and all(text.endswith(tokenizer.decode(ending)) for text in asked)


def test_a_shared_prefix_gives_what_the_model_gives(llama, tokenizer):
    ids = tokenizer(TEXT).input_ids
    for prefix in (ids[:1], ids[:12]):
        found = generate_rollouts(llama, tokenizer, max_new_tokens=6, temperature=1e-3)(prefix, 3)
        alone = llama.generate(torch.tensor([prefix]), max_new_tokens=6, do_sample=False, pad_token_id=1)
        assert found == [tokenizer.decode(alone[0, len(prefix) :], skip_special_tokens=True)] * 3
    drawn = generate_rollouts(llama, tokenizer, max_new_tokens=6, temperature=2.0, top_p=1.0)
    assert drawn(ids[:12], 4) == drawn(ids[:12], 4) and len(set(drawn(ids[:12], 4))) > 1
    together = mean_states(llama, tokenizer)(["The sea", "A much longer sentence of the sun"])
    assert torch.allclose(together[0], mean_states(llama, tokenizer)(["The sea"])[0], atol=1e-5)


# --- the method ----------------------------------------------------------------------------------------------------


def test_a_reading(llama, tokenizer):
    loaded = Loaded(llama, tokenizer)
    method = ThoughtAnchors(top_k_heads=2)
    reading = method.read(TEXT, loaded=loaded)
    trace = traced(llama, tokenizer)
    assert [row["text"] for row in reading.rows] == [s.text for s in sentences_of(trace)]
    heads = receiver_heads([trace], top_k=2)
    assert reading.rows[1]["receiver"] == pytest.approx(float(receiver_scores(trace, heads)[1]), abs=1e-6)
    effects = suppression_matrix(llama, trace)
    assert reading.rows[1]["suppression"] == pytest.approx(float(effects.nanmean(0)[1]), abs=1e-4)
    assert reading.rows[-1]["receiver"] is None and reading.rows[-1]["suppression"] is None
    first, second, strength = reading.arcs[0]
    assert strength == pytest.approx(float(effects.nan_to_num(-9).max()), abs=1e-4) and first < second
    assert second in reading.rows[first]["matters_for"]
    again = method.read(trace, loaded=loaded)
    assert [row["matters_for"] for row in again.rows] == [row["matters_for"] for row in reading.rows]
    json.dumps(reading.to_json(), allow_nan=False)
    assert_clean(llama)


def test_a_reading_with_rollouts(llama, tokenizer):
    text = f"The answer is 7\n\n{TEXT}"  # which every rollout but those of the first sentence repeats
    method = ThoughtAnchors(top_k_heads=2, rollouts=2, max_new_tokens=3, answer="7")
    reading = method.read(text, loaded=Loaded(llama, tokenizer))
    assert [row["rollout"] for row in reading.rows[1:]] == [0.0] * len(WORDS)
    assert [row["accuracy"] for row in reading.rows[1:]] == [0.0] * len(WORDS)
    with pytest.raises(InputError, match="no rollout comes to an answer"):
        ThoughtAnchors(top_k_heads=2, rollouts=2, max_new_tokens=1).read(TEXT, loaded=Loaded(llama, tokenizer))


def test_the_picture_escapes_the_text(llama, tokenizer):
    text = TEXT.replace("The oak is", "The <script>alert(1)</script> is")
    reading = ThoughtAnchors(top_k_heads=2).read(text, loaded=Loaded(llama, tokenizer))
    picture, page = reading.picture(), reading.to_html()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in picture
    assert picture.count("<path") == len(reading.arcs) and picture.count("<circle") == len(WORDS)
    assert "<title>" in picture and "src=" not in picture


def test_on_the_command_line(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = tmp_path / "anchors.html"
    command = ["read", "--method", "thought-anchors", "-o", "top_k_heads=2", "--model", str(tmp_path / "model")]
    done = CliRunner().invoke(main, [*command, TEXT, "--report", str(report), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.output)[0]["rows"]) == len(WORDS) and "<svg" in report.read_text()


def test_refusals(llama, make_model, tokenizer, tmp_path):
    loaded = Loaded(llama, tokenizer)
    trace, bare = traced(llama, tokenizer), traced(llama, tokenizer, hidden=[1])
    spans, short = spans_of(trace), traced(llama, tokenizer, ". ".join(TEXT.split(". ")[:7]) + ".")
    total = len(trace)
    cases = {
        "there are 7 sentences; thought anchors need at least 8": lambda: receiver_heads([short], 2),
        "needs at least 2": lambda: suppression_matrix(llama, traced(llama, tokenizer, "One sentence only.")),
        r'capture again with qk="all" or reducers': lambda: receiver_heads([bare], 2),
        "between 2 spans and has 10 sentences": lambda: sentence_attention(
            traced(llama, tokenizer, reducers=[SentenceMean(spans[:2])])
        ),
        "there are 0 traces": lambda: receiver_heads([]),
        "top_k=999 is not allowed": lambda: receiver_heads([trace], 999),
        "one trace has no two halves": lambda: receiver_heads([trace], 2).reliability,
        r"head \(9, 0\) does not exist": lambda: receiver_scores(trace, [(9, 0)]),
        "there are 0 heads": lambda: receiver_scores(trace, []),
        r"the head \(0, 99\) does not exist": lambda: suppression_matrix(llama, trace, heads=[(0, 99)]),
        "layer 77 does not exist": lambda: suppression_matrix(llama, trace, layers=[77]),
        "temperature": lambda: suppression_matrix(llama, trace, temperature=0.0),
        "kl_support='sparse'": lambda: suppression_matrix(llama, trace, kl_support="sparse"),
        r"\(3, 3\) is empty": lambda: suppressed_kl(llama, trace.ids, [(3, 3)]),
        "overlaps the one before": lambda: suppressed_kl(llama, trace.ids, [(1, 5), (4, 8)]),
        f"outside the {total} tokens": lambda: suppressed_kl(llama, trace.ids, [(1, total + 1)]),
        "traced on another model": lambda: suppression_matrix(make_model("qwen2"), trace),
        "thought anchors run the model again": lambda: ThoughtAnchors().read(TEXT),
        "the text is empty": lambda: ThoughtAnchors().read("  ", loaded=loaded),
        "there are 1 sentences; thought": lambda: ThoughtAnchors().read("Only one here.", loaded=loaded),
        "rollouts=1 is not allowed": lambda: ThoughtAnchors(rollouts=1).read(TEXT, loaded=loaded),
        "n=1 is not allowed": lambda: CounterfactualImportance(None, None, None, n=1),
        "threshold=2 is not allowed": lambda: CounterfactualImportance(None, None, None, threshold=2),
        "rollouts for 1 of 2 sentences": lambda: Rollouts(["a", "b"], [[]], embed),
    }
    for message, call in cases.items():
        with pytest.raises(InputError, match=message):
            call()
    trace.save(tmp_path / "trace.safetensors")
    with pytest.raises(InputError, match="was traced on another model"):
        Trace.load(tmp_path / "trace.safetensors", make_model("qwen2"))
    no_text = Trace({k: v for k, v in trace.tensors.items() if k != "offsets"}, {**trace.header, "text": ""})
    with pytest.raises(InputError, match="tokenizer="):
        sentences_of(no_text)


def test_the_comparison(llama, tokenizer):
    """The planted fact is one of the eight, shuffling moves the scores of suppression, and every arm has numbers."""
    method = ThoughtAnchors(top_k_heads=2, rollouts=2)
    spans = [(s.start, s.stop) for s in segment_sentences(TEXT, tokenizer)]
    heads = receiver_heads([traced(llama, tokenizer, reducers=[SentenceMean(spans)])] * 2, top_k=2)
    task = PlantedTask(llama, tokenizer, 3, heads, method)
    for sample in task.samples():
        sentences = [s.text for s in segment_sentences(sample.prompt, tokenizer)]
        code = sentences[sample.data["planted"]].split()[-1]
        assert len(sentences) == 13 and [code.strip(".") in s for s in sentences[:8]].count(True) == 1
        assert all(code.strip(".") in s for s in sentences[8:])
        found = {route: task.run(Arm(route, apply=route), [sample], 0)[0].metrics for route in ROUTES.values()}
        assert found["suppression"]["agreement"] == pytest.approx(1)
        assert found["place"]["rank"] == 8 - sample.data["planted"]
        assert all(1 <= each["rank"] <= 8 for each in found.values())
        assert all(math.isfinite(each[name]) for each in found.values() for name in ("agreement", "resampled"))
    assert split_half(heads).interval.mean == pytest.approx(1)


def test_beginnings_are_continued_as_alone(llama, tokenizer):
    """Rows of several lengths, one of which is empty, fed words, written to, and fed again."""
    ids, lengths, words = torch.tensor(tokenizer(TEXT).input_ids), [0, 5, 16, 9], [7, 8, 9]
    begun = Beginnings.of(llama, tokenizer, ids, lengths)
    made = begun.then(words).repeated(2).written(4, do_sample=False).then(words).written(3, do_sample=False)
    for i, length in enumerate(lengths):
        alone = ids[:length].tolist() or [tokenizer.bos_token_id or tokenizer.eos_token_id]
        first = len(alone)
        for count in (4, 3):
            given = torch.tensor([[*alone, *words]])
            with torch.no_grad():
                alone = llama.generate(given, max_new_tokens=count, do_sample=False, pad_token_id=0)[0].tolist()
        text = tokenizer.decode(alone[first:], skip_special_tokens=True)
        assert made.texts[2 * i : 2 * i + 2] == [text, text]
    drawn = begun.repeated(2).written(4, do_sample=True)
    assert drawn.texts == begun.repeated(2).written(4, do_sample=True).texts


def test_a_fact_adds_what_its_absence_takes(llama, tokenizer, monkeypatch):
    """A model that knows a number wherever it was said, and writes other things in the place of facts."""
    heads = receiver_heads([traced(llama, tokenizer)] * 2, top_k=2)
    task = PlantedTask(llama, tokenizer, 2, heads, ThoughtAnchors(top_k_heads=2, rollouts=3))

    def written(rows, tokens, do_sample, **_):
        said = [tokenizer.decode(row[seen]) for row, seen in zip(rows.ids, rows.mask)]
        if tokens == REWRITTEN:
            assert do_sample
            return rows.then(tokenizer(" And so on it goes.").input_ids)
        new = [tokenizer(f" {code}." if code in text else " 0.").input_ids for text in said]
        width = max(map(len, new))
        padded = torch.tensor([each + [tokenizer.eos_token_id] * (width - len(each)) for each in new])
        return replace(rows, ids=torch.cat([rows.ids, padded], 1))

    monkeypatch.setattr(Beginnings, "written", written)
    for sample in task.samples():
        code, planted = sample.data["code"], sample.data["planted"]
        for route in ("resampled", "forced"):
            metrics = task.run(Arm(route, apply=route), [sample], 0)[0].metrics
            assert metrics["first"] == 1 and metrics["resampled"] == pytest.approx(1)
        shared = task._measured(sample)
        expected = [float(i == planted) for i in range(8)]
        assert shared.resampled[:8].tolist() == shared.forced[:8].tolist() == expected
        assert shared.resampled[8:].isnan().all()
