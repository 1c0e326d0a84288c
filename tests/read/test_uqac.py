"""UQAC: equal to stacked maps and to plain forwards, and no more than the probability of the answer when told so."""

import pytest
import torch
from support.attention import KINDS, eager, random_ids

import tokenry
from tokenry.core.errors import InputError
from tokenry.data.problems import Arithmetic, draw_problems
from tokenry.measure.task import Arm
from tokenry.measure.tasks.confidence import ConfidenceTask
from tokenry.read import UQAC
from tokenry.read.chains.backtrack import Walk, backtrack
from tokenry.read.chains.variations import chosen_logprobs, variations
from tokenry.trace.reducers import NEAR, LowEntropyRows
from tokenry.trace.trace import Trace, capture

PROMPT, SPAN = 12, (34, 37)
SMALL = {"n_heads": 3, "min_prob": 0.0}


def traced(model, tokenizer, method, ids=None):
    return method.trace_ids(random_ids()[0] if ids is None else ids, PROMPT, (model, tokenizer))


def stacked(model, ids):
    """Cleaned maps (layers * heads, T, T) of eager attention, by loops as the page says."""
    with torch.no_grad():
        maps = torch.cat(eager(model)(ids, output_attentions=True).attentions, 1)[0].clone()
    for row in range(maps.shape[1]):
        maps[:, row, row] = 0
        for distance, factor in enumerate(NEAR.tolist(), 1):
            if row >= distance:
                maps[:, row, row - distance] *= factor
    maps[..., 0] = 0
    return maps / (maps.sum(-1, keepdim=True) + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_streamed_rows_equal_stacked_maps(make_model, kind, reduction):
    model, ids = make_model(kind), random_ids()
    maps = stacked(model, ids)
    order = -(maps * (maps + 1e-12).log()).sum(-1)
    for k in (3, len(maps)):
        with capture(model, reducers=[LowEntropyRows(k, reduction, PROMPT)]) as cap, torch.no_grad():
            model(ids, use_cache=False)
        best = maps.gather(0, order.sort(dim=0, stable=True)[1][:k, :, None].expand(-1, -1, maps.shape[2]))
        expected = best.amax(0) if reduction == "max" else best.mean(0)
        assert torch.allclose(cap.trace.reduced["low_entropy_rows"], expected[PROMPT:], atol=1e-5)
    if reduction == "mean":  # all heads: the plain average
        assert torch.allclose(expected, maps.mean(0), atol=1e-6)


def test_rows_of_cached_steps_are_those_of_one_forward(llama):
    ids = random_ids()
    with capture(llama, reducers=[LowEntropyRows(3)]) as cap, torch.no_grad():
        cache = llama(ids[:, :30], use_cache=True).past_key_values
        for i in range(30, ids.shape[1]):
            cache = llama(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
    with capture(llama, reducers=[LowEntropyRows(3)]) as whole, torch.no_grad():
        llama(ids, use_cache=False)
    step, once = (c.trace.reduced["low_entropy_rows"] for c in (cap, whole))
    assert torch.allclose(step, once, atol=1e-5)


def test_a_dominant_path_is_found_and_ends_at_the_prompt():
    rows = torch.zeros(20, 20)
    rows[17, 12], rows[11, 8], rows[7, 5], rows[4, 2] = 0.9, 0.8, 0.7, 0.9
    stop = [i < 5 for i in range(20)]
    found = backtrack(rows, [17], stop, Walk(3, 0.5, 5))
    assert found == pytest.approx({17: 0, 11: 0.9, 7: 0.8, 4: 0.7})
    stop[8] = True
    assert list(backtrack(rows, [17], stop, Walk(3, 0.5, 5))) == [17, 11]


def test_the_threshold_counts_once_enough_was_found_and_the_buffer_always():
    rows = torch.zeros(20, 20)
    rows[17, 8:13] = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3])
    assert list(backtrack(rows, [17], [False] * 20, Walk(3, 0.5, 5))) == [17, 11, 10, 9]
    assert list(backtrack(rows, [17], [False] * 20, Walk(3, 0.5, 0))) == [17]
    assert list(backtrack(rows, [17], [False] * 20, Walk(2, 0.22, 0))) == [17, 11, 10]


def test_without_kept_tokens_the_confidence_is_the_product_of_the_answer(llama, tokenizer):
    method = UQAC(**SMALL, top_k_similarity=0, ensemble_k=0)
    trace = traced(llama, tokenizer, method)
    product = float(trace.logprob[SPAN[0] : SPAN[1]].double().exp().prod())
    for mode in ("marginal", "sim_prod", "answer"):
        assert method.confidence(llama, trace, SPAN, mode) == pytest.approx(product, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_variations_share_their_prefix_and_equal_plain_forwards(make_model, tokenizer, kind):
    model, method = make_model(kind), UQAC(**SMALL, similarity_threshold=-1)
    trace = traced(model, tokenizer, method)
    kept = method.kept(trace, SPAN, method.attention_chain(trace, SPAN))
    ids = variations(trace, kept, 5, 10, 0.0)
    assert 1 < len(ids) <= 11 + len(kept) and len({tuple(row.tolist()) for row in ids}) == len(ids)
    assert ((ids != trace.ids).sum(1) == torch.tensor([0] + [1] * (len(ids) - 1))).all()
    places = sorted({*kept, *range(*SPAN)})
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.log_softmax(-1)
    plain = plain[:, torch.tensor(places) - 1].gather(-1, ids[:, places, None])[..., 0]
    found = chosen_logprobs(model, trace, ids, places)
    assert torch.allclose(found, plain, atol=1e-4)
    confidence = method.confidence(model, trace, SPAN)
    assert confidence == pytest.approx(float(plain.double().sum(-1).exp().sum()), rel=1e-3)
    assert 0 <= confidence <= 1


def test_the_first_token_of_the_response_may_be_the_answer(llama, tokenizer):
    method = UQAC(**SMALL)
    trace = traced(llama, tokenizer, method)
    chain = method.attention_chain(trace, (PROMPT, PROMPT + 1))
    assert chain.indices == [0] and chain.scores == [0]
    assert 0 < method.confidence(llama, trace, (PROMPT, PROMPT + 1)) <= 1


def test_a_trace_is_read_with_its_page(llama, tokenizer, tmp_path):
    method = UQAC(**SMALL, marker="boxed", mode="sim_prod")
    prompt = tokenizer.encode("What is the sea?")
    ids = torch.tensor(prompt + tokenizer.encode(" It is <b>deep</b> and old, so it is \\boxed{deep sea}."))
    trace = method.trace_ids(ids, len(prompt), (llama, tokenizer))
    trace.save(tmp_path / "t.safetensors")
    reading = method.read(Trace.load(tmp_path / "t.safetensors", llama))
    assert reading == method.read(trace, loaded=(llama, tokenizer))
    answer = "".join(row["token"] for row in reading.rows if row["role"] == "answer")
    assert "deep" in answer and "sea" in answer
    assert sum(row["share"] for row in reading.rows) == pytest.approx(1)
    assert "&lt;" in reading.picture() and "<b>" not in reading.picture() and reading.picture() in reading.to_html()


def test_bad_input_is_refused(make_model, tokenizer):
    llama, method = make_model("llama"), UQAC(**SMALL)
    trace = traced(llama, tokenizer, method)
    for span in ((34, 34), (5, 14), (30, 41), (37, 34)):
        with pytest.raises(InputError, match="answer span"):
            method.attention_chain(trace, span)
        with pytest.raises(InputError, match="answer span"):
            method.confidence(llama, trace, span)
    with pytest.raises(InputError, match="layer-heads"):
        traced(llama, tokenizer, UQAC(n_heads=10_000))
    with pytest.raises(InputError, match="n_heads=3"):
        UQAC(n_heads=4).attention_chain(trace, SPAN)
    with pytest.raises(InputError, match="another model"):
        method.confidence(make_model("qwen2"), trace, SPAN)
    with pytest.raises(InputError, match="mode="):
        method.confidence(llama, trace, SPAN, "sum")
    with pytest.raises(InputError, match="at least 2 tokens"):
        method.attention_chain(trace.with_prompt(39), (39, 40))
    with pytest.raises(InputError, match="n_candidates"):
        UQAC(**SMALL, n_candidates=1000, similarity_threshold=-1).confidence(llama, trace, SPAN)
    with pytest.raises(InputError, match="tokenizer="):
        method.attention_chain(traced(llama, None, method), SPAN)
    with pytest.raises(InputError, match=r"LowEntropyRows\(3, 'max'\)"):
        with capture(llama, tokenizer) as cap, torch.no_grad():
            llama(random_ids(), use_cache=False)
        method.attention_chain(cap.trace.with_prompt(PROMPT), SPAN)
    with pytest.raises(InputError, match="no answer"):
        UQAC(**SMALL, marker="boxed").read(trace)
    for options in ({"n_heads": 0}, {"buffer_size": 0}, {"threshold": 2}, {"marker": "("}, {"reduction": "sum"}):
        with pytest.raises(InputError):
            UQAC(**options)
    with pytest.raises(InputError, match="k=0"):
        LowEntropyRows(0)


def test_the_scores_of_the_comparison_are_those_of_the_method():
    model, tokenizer = tokenry.load("zoo/reasoner")
    method, problems = UQAC(), draw_problems(Arithmetic(), 3, split="dev", levels=(1, 2, 3))
    task = ConfidenceTask(model, tokenizer, Arithmetic(), problems, method)
    found = {
        how: task.run(Arm(how, apply=how), task.samples(), 0)
        for how in ("answer", "whole", "mean", "length", "random", "uqac")
    }
    for i, problem in enumerate(problems):
        trace = method.trace(problem.question, (model, tokenizer))
        span, begin = method.answer_span(trace), trace.spans["prompt"][0][1]
        values = {how: outcomes[i].metrics["score"] for how, outcomes in found.items()}
        assert values["uqac"] == pytest.approx(method.confidence(model, trace, span), abs=1e-4)
        assert values["answer"] == pytest.approx(method.confidence(model, trace, span, "answer"), abs=1e-4)
        assert values["whole"] == pytest.approx(float(trace.logprob[begin:].sum().exp()), abs=1e-4)
        assert values["mean"] == pytest.approx(float(trace.logprob[begin:].mean().exp()), abs=1e-4)
        assert values["length"] == 1 / (len(trace) - begin) and 0 <= values["random"] <= 1
    cost = found["uqac"][0].cost
    assert cost["forward_passes"] in (2, 3) and found["mean"][0].cost["tokens_processed"] == 0
