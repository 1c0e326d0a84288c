"""CompressKV: scores, budgets, calibration and the method, each against its definition."""

import gc
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry import decode
from tokenry.catalog import load as load_method
from tokenry.core.errors import InputError
from tokenry.hooks.attention import AttentionCall, observe
from tokenry.models.anatomy import fingerprint, shape_of
from tokenry.models.kv_cache import layer_lengths
from tokenry.select import (
    CompressKV,
    HeadProfile,
    NeedlePrompt,
    allocate_layer_budgets,
    find_answer_span,
    identify_retrieval_heads,
    layer_eviction_error,
    make_needle_prompts,
    semantic_retrieval_scores,
    window_scores,
)
from tokenry.select.heads.profile import shipped_profile
from tokenry.select.keep.topk import rouge1_recall

ORDER = ((2, 0, 1, 3), (1, 3, 0, 2), (0, 1, 2, 3), (3, 2, 1, 0))


def ids(*shape, seed=1):
    return torch.randint(2, 320, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def profile(llama):
    return HeadProfile(
        model="tiny", fingerprint=fingerprint(llama), **shape_of(llama), order=ORDER, error=(4.0, 1.0, 2.0, 1.0)
    )


@pytest.fixture
def needles(tokenizer):
    return make_needle_prompts(tokenizer, 3, 350, seed=5)


# --- pure functions --------------------------------------------------------------------------------------------


def test_window_scores_match_the_loop_definition():
    torch.manual_seed(0)
    w, length, kernel, heads, d = 4, 20, 5, [3, 0], 8
    q, k = torch.randn(2, 4, w, d), torch.randn(2, 2, length, d)
    expected = torch.zeros(2, length - w)
    for b in range(2):
        for h in heads:
            summed = torch.zeros(length)
            for i in range(w):
                row = torch.full((length,), -torch.inf)
                for j in range(length - w + i + 1):
                    row[j] = q[b, h, i] @ k[b, h // 2, j] / d**0.5
                summed += row.softmax(0)
            for j in range(length - w):
                near = [float(summed[t]) for t in range(j - 2, j + 3) if 0 <= t < length - w]
                expected[b, j] += sum(near) / kernel / len(heads)
    torch.testing.assert_close(window_scores(q, k, heads, kernel), expected, atol=1e-6, rtol=1e-5)


def test_window_scores_refuse_bad_windows_and_kernels():
    q, k = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(InputError, match="none before a window of 8"):
        window_scores(q, k, [0])
    with pytest.raises(InputError, match="kernel=4 is not odd"):
        window_scores(q[:, :, :2], k, [0], kernel=4)


@pytest.mark.parametrize("mode", ["semantic", "topk"])
def test_head_scores_match_the_loop_definition(mode):
    torch.manual_seed(0)
    layers, heads, (a, b) = 2, 3, (4, 8)
    prompt, written = [9, 9, 5, 9, 5, 7, 5, 6, 9, 9], [5, 8, 6, 7]
    steps = [torch.rand(layers, heads, 10 + t).softmax(-1) for t in range(4)]
    steps[0][0, 0, 4] = 2.0  # a strongest key that is a copy
    expected = torch.zeros(layers, heads)
    for row, token in zip(steps, written):
        for layer in range(layers):
            for head in range(heads):
                if mode == "semantic":
                    for position in range(a, b):
                        if prompt[position] == token:
                            expected[layer, head] += sum(row[layer, head, j] for j in range(a, b))
                else:
                    best = int(row[layer, head].argmax())
                    if a <= best < b and prompt[best] == token:
                        expected[layer, head] += 1 / (b - a)
    got = semantic_retrieval_scores(steps, (a, b), prompt, written, mode)
    torch.testing.assert_close(got, expected)
    assert got.abs().sum() > 0


def test_answer_span():
    assert find_answer_span([1, 2, 3, 4, 5], [3, 4]) == (2, 4)
    ten = list(range(10))
    assert find_answer_span([99, *ten], ten) == (1, 11)  # 9 of 10 are not more than 90 %
    with pytest.raises(InputError, match="does not contain its answer"):
        find_answer_span([1, 2, 3], [7, 8])
    with pytest.raises(InputError, match="answer is empty"):
        find_answer_span([1, 2, 3], [])


def test_rouge_recall_counts_words():
    assert rouge1_recall("Seven, seven and nine", "seven nine ten") == pytest.approx(2 / 3)
    assert rouge1_recall("the doors opened", "opening door") == 1.0  # stemmed


ERRORS = st.lists(st.floats(0, 1e3), min_size=1, max_size=30).filter(lambda e: sum(e) > 0)


def budgets_in_code_order(error, total, m, most):
    """The procedure of the page, written out."""
    share = [e / sum(error) for e in error]
    b = [min(max(m + round(r * (total - len(error) * m)), m), most) for r in share]
    d = total - sum(b)
    while d != 0:
        order = sorted(range(len(b)), key=lambda i: -share[i] if d > 0 else share[i])
        candidates = [i for i in order if (b[i] < most if d > 0 else b[i] > m)]
        if not candidates:
            break
        for i in candidates:
            b[i] += 1 if d > 0 else -1
            d += -1 if d > 0 else 1
            if d == 0:
                break
    return b


@settings(max_examples=200)
@given(ERRORS, st.integers(12, 200), st.integers(1, 12))
def test_layer_budgets(error, budget, m):
    total, most = budget * len(error), 3 * budget
    got = allocate_layer_budgets(error, total, m)
    assert sum(got) == total or all(b == most for b in got)
    assert all(m <= b <= most for b in got)
    assert got == budgets_in_code_order(error, total, m, most)


@given(st.integers(1, 40), st.integers(12, 300))
def test_uniform_error_gives_equal_budgets(layers, budget):
    assert allocate_layer_budgets([0.3] * layers, budget * layers, 12) == [budget] * layers


@pytest.mark.parametrize("error", [[], [1.0, -1.0], [0.0, 0.0]])
def test_layer_budgets_refuse_bad_errors(error):
    with pytest.raises(InputError):
        allocate_layer_budgets(error, 100)


def test_layer_budgets_refuse_a_total_below_the_minimum():
    with pytest.raises(InputError, match="cannot give 2 parts 32 tokens each"):
        allocate_layer_budgets([1.0, 1.0], 63)


# --- calibration -----------------------------------------------------------------------------------------------


def test_needle_prompts(tokenizer, needles):
    again = make_needle_prompts(tokenizer, 3, 350, seed=5)
    assert needles == again and needles != make_needle_prompts(tokenizer, 3, 350, seed=6)
    for prompt, answer in needles:
        question = prompt[prompt.rindex("The secret") :]
        assert question.endswith(" is") and f"{question}{answer}." in prompt[: -len(question)]
        assert 350 <= len(tokenizer(prompt).input_ids) < 450
    with pytest.raises(InputError, match="no room for filler"):
        make_needle_prompts(tokenizer, 1, 20)


@torch.no_grad()
def test_head_scores_come_from_the_rows_that_predict_the_answer(llama, tokenizer, needles):
    profile = identify_retrieval_heads(llama, tokenizer, needles, teacher_forced=True)
    llama.set_attn_implementation("eager")
    expected = torch.zeros(4, 4)
    for prompt, answer in needles:
        p, a = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
        weights = torch.cat(llama(torch.tensor([p + a]), output_attentions=True).attentions)
        steps = [weights[:, :, len(p) - 1 + i] for i in range(len(a))]
        expected += semantic_retrieval_scores(steps, find_answer_span(p, a), p, a) / len(needles)
    llama.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.tensor(profile.scores), expected, atol=2e-5, rtol=1e-4)
    assert [list(o) for o in profile.order] == expected.sort(dim=-1, descending=True, stable=True).indices.tolist()
    profile.check(llama)


def test_free_writing_reads_the_same_rows(llama, tokenizer, needles):
    """With the greedy text as the answer, writing freely and teacher forcing are one and the same."""
    prompt = needles[0].prompt
    inputs = tokenizer(prompt, return_tensors="pt")
    written = llama.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    from tokenry.select.heads.retrieval import _forced_rows, _written_rows

    with torch.no_grad():
        tokens, free = _written_rows(llama, tokenizer, inputs.input_ids[0].tolist(), 4)
        forced = _forced_rows(llama, inputs.input_ids[0].tolist(), written.tolist())
    assert tokens == written.tolist()[: len(tokens)] and tokens
    for one, two in zip(free, forced):
        torch.testing.assert_close(one, two[..., : one.shape[-1]], atol=1e-5, rtol=1e-4)


def test_a_model_that_answers_nothing_is_refused(llama, tokenizer, needles):
    with pytest.raises(InputError, match="teacher_forced=True"):
        identify_retrieval_heads(llama, tokenizer, needles[:1], max_new_tokens=2)


@torch.no_grad()
def test_layer_error_by_brute_force_and_its_invariance(make_model, llama, tokenizer, needles, profile):
    error = layer_eviction_error(llama, tokenizer, needles[:1], profile, budget=24, top_heads=2)
    p, a = (tokenizer(t).input_ids for t in needles[0])
    expected = torch.zeros(4)

    def look(call):
        length, w, group = len(p), 8, 2
        scores = window_scores(call.query[:, :, length - w : length], call.key[:, :, :length], ORDER[call.layer][:2])
        kept = {*scores[0].topk(24 - w).indices.tolist(), *range(length - w, length)}
        for row in range(length, length + len(a)):
            outputs = []
            for columns in (list(range(row + 1)), sorted(kept | set(range(length, row + 1)))):
                heads = []
                for h in range(4):
                    logits = call.key[0, h // group, columns] @ call.query[0, h, row] * call.scaling
                    heads.append(logits.softmax(0) @ call.value[0, h // group, columns])
                outputs.append(call.module.o_proj(torch.cat(heads)))
            expected[call.layer] += (outputs[1] - outputs[0]).norm() / outputs[0].norm()

    with observe(llama, look):
        llama(torch.tensor([p + a]), use_cache=False)
    torch.testing.assert_close(error, expected / expected.sum(), atol=1e-4, rtol=1e-3)

    # scale V up and Wo down in one layer: the same function, hence the same error
    layer = llama.model.layers[1].self_attn
    layer.v_proj.weight.mul_(4.0)
    layer.o_proj.weight.mul_(0.25)
    try:
        scaled = profile.model_copy(update={"fingerprint": fingerprint(llama)})
        again = layer_eviction_error(llama, tokenizer, needles[:1], scaled, budget=24, top_heads=2)
    finally:
        layer.v_proj.weight.mul_(0.25)
        layer.o_proj.weight.mul_(4.0)
    torch.testing.assert_close(again, error, atol=1e-5, rtol=1e-4)


def test_layer_error_refusals(llama, tokenizer, needles, profile):
    with pytest.raises(InputError, match="more than 8"):
        layer_eviction_error(llama, tokenizer, needles, profile, budget=8)
    short = NeedlePrompt("the code is 1 2. the code is", " 1 2")
    with pytest.raises(InputError, match="needs prompts of more than 40"):
        layer_eviction_error(llama, tokenizer, [short], profile, budget=40)


# --- profiles --------------------------------------------------------------------------------------------------


def test_profile_is_saved_and_bound_to_its_model(tmp_path, llama, make_model, profile):
    profile.save(tmp_path / "p.json")
    assert HeadProfile.load(tmp_path / "p.json") == profile
    CompressKV(profile=tmp_path / "p.json", budget=20, top_heads=2)(llama)
    with pytest.raises(InputError, match="not for the weights given"):
        profile.check(make_model("qwen2"))
    with pytest.raises(InputError, match="this model has"):
        shipped_profile().check(llama)
    named = profile.model_copy(update={"fingerprint": None})
    with pytest.raises(InputError, match="made for tiny"):
        named.check(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": ORDER[:3]}, "3 layers, the profile 4"),
        ({"order": ((2, 0, 4), *ORDER[1:])}, "head 4, the model has 0 to 3"),
        ({"order": ((0, 0), *ORDER[1:])}, "head twice"),
        ({"error": (1.0, 1.0)}, "2 entries for 4 layers"),
        ({"error": (1.0, -1.0, 1.0, 1.0)}, "must be >= 0"),
        ({"error": (0.0,) * 4}, "not all zero"),
    ],
)
def test_broken_profiles_are_refused(profile, change, message):
    with pytest.raises(InputError, match=message):
        HeadProfile(**profile.model_dump() | change)


def test_files_that_are_no_profiles_are_refused(tmp_path):
    bad = tmp_path / "bad.json"
    for text, message in (("{", "not JSON"), ("[1]", "no head profile"), (json.dumps({"model": "x"}), "layers")):
        bad.write_text(text)
        with pytest.raises(InputError, match=message):
            HeadProfile.load(bad)
    with pytest.raises(InputError, match="cannot be read"):
        CompressKV(profile=str(tmp_path / "missing.json"))


# --- the method ------------------------------------------------------------------------------------------------


def test_keeping_everything_is_the_plain_model(llama, profile):
    x, mask = ids(3, 50), torch.ones(3, 50, dtype=torch.long)
    mask[1, :20] = 0
    plain = llama.generate(x, attention_mask=mask, max_new_tokens=10, do_sample=False)
    with CompressKV(profile=profile, budget=160, min_tokens=60, top_heads=2)(llama) as run:
        assert torch.equal(llama.generate(x, attention_mask=mask, max_new_tokens=10, do_sample=False), plain)
    assert not run.trace.cut


@torch.no_grad()
def test_all_heads_with_equal_budgets_is_snapkv_with_one_index_set(llama, profile):
    x, w, budget = ids(1, 70), 8, 24
    llama.set_attn_implementation("eager")
    weights = llama(x, output_attentions=True).attentions
    llama.set_attn_implementation("sdpa")
    maps = []
    for method in (
        CompressKV(budget=budget, adaptive=False, heads="all"),
        CompressKV(profile=profile, budget=budget, adaptive=False, top_heads=4),
    ):
        with method(llama) as run:
            llama(x, use_cache=True)
        maps.append(run.trace)
    for layer, rows in enumerate(weights):
        votes = rows[0, :, -w:, : 70 - w].mean(1)  # SnapKV takes the mean over the window: the same order
        pooled = torch.nn.functional.avg_pool1d(votes, 5, 1, 2).mean(0)
        expected = [*sorted(pooled.topk(budget - w).indices.tolist()), *range(70 - w, 70)]
        assert [m.columns[layer][0].tolist() for m in maps] == [expected, expected]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_batch_equals_single_prompts(llama, profile, implementation):
    x, mask = ids(3, 70), torch.ones(3, 70, dtype=torch.long)
    lengths = [70, 45, 14]
    for row, length in enumerate(lengths):
        mask[row, : 70 - length] = 0
    llama.set_attn_implementation(implementation)
    try:
        with CompressKV(profile=profile, budget=20, top_heads=2)(llama) as run:
            batch = llama.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
            counts, places = run.trace.counts(), run.trace.positions(0)
            for row, length in enumerate(lengths):
                single = llama.generate(x[row : row + 1, 70 - length :], max_new_tokens=8, do_sample=False)
                assert torch.equal(single[0, length:], batch[row, 70:])
                assert run.trace.positions(0)[0].tolist() == [p for p in places[row].tolist() if p >= 0]
    finally:
        llama.set_attn_implementation("sdpa")
    assert sum(counts.values()) == 80 and len(set(counts.values())) > 1


def test_sdpa_and_eager_keep_the_same_tokens(llama, profile):
    x, kept = ids(1, 70), []
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        with torch.no_grad(), CompressKV(profile=profile, budget=20, top_heads=2)(llama) as run:
            llama(x)
        kept.append({layer: c.tolist() for layer, c in run.trace.columns.items()})
    llama.set_attn_implementation("sdpa")
    assert kept[0] == kept[1]


def test_attention_that_was_read_is_not_kept(llama, profile):
    """Its queries and keys would hold the whole prompt in memory."""

    def calls():
        return sum(type(thing) is AttentionCall for thing in gc.get_objects())

    assert llama.config._attn_implementation == "sdpa"
    with torch.no_grad(), CompressKV(profile=profile, budget=20, top_heads=2)(llama):
        llama(ids(1, 70))
        assert calls() == 0


def test_works_in_the_decode_loop_with_a_ban(llama, tokenizer, profile):
    x = ids(1, 60, seed=24)
    options = {"max_new_tokens": 10, "do_sample": False, "custom_generate": decode.loop}
    with CompressKV(profile=profile, budget=20, top_heads=2)(llama):
        plain = llama.generate(x, **options)
        same = llama.generate(x, max_new_tokens=10, do_sample=False)
        idle = llama.generate(x, **options, monitors=[decode.PhraseBan(["unseen"])], processing_class=tokenizer)
    assert torch.equal(plain, same) and torch.equal(idle, same)


def test_gemma_keeps_its_windows_and_splits_the_rest(make_model):
    gemma = make_model("gemma3")
    order = ((0, 1, 2, 3),) * 4
    profile = HeadProfile(
        model="g", fingerprint=fingerprint(gemma), **shape_of(gemma), order=order, error=(0.0, 3.0, 0.0, 1.0)
    )
    with torch.no_grad(), CompressKV(profile=profile, budget=20, top_heads=2)(gemma) as run:
        cache = gemma(ids(1, 60), use_cache=True).past_key_values
    assert run.trace.counts() == {1: 24, 3: 16} or sum(run.trace.counts().values()) == 40
    assert layer_lengths(cache)[1::2] == list(run.trace.counts().values())
    assert layer_lengths(cache)[0] == 15  # window - 1, untouched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8}, "above window=8"),
        ({"kernel": 4}, "kernel=4 is even"),
        ({"min_tokens": 8}, "min_tokens=8"),
        ({"min_tokens": 300}, "at most budget=256"),
        ({"top_heads": 0}, "top_heads=0 is not allowed"),
        ({"heads": "some"}, "one of retrieval, random, lowest, all"),
        ({"bugdet": 64}, "no option 'bugdet'"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        CompressKV(**options)


def test_refuses_models_and_profiles_that_do_not_fit(llama, profile):
    with pytest.raises(InputError, match="calibrate_model"):
        CompressKV(budget=64)(llama)
    with pytest.raises(InputError, match="top_heads=5 is more than the model's 4 heads"):
        CompressKV(profile=profile, top_heads=5)(llama)
    with pytest.raises(InputError, match="no layer errors"):
        CompressKV(profile=profile.model_copy(update={"error": None}))(llama)
    with pytest.raises(InputError, match="names 2 heads in layer 0"):
        short = tuple(heads[:2] for heads in ORDER)
        CompressKV(profile=profile.model_copy(update={"order": short}), top_heads=3)(llama)


def test_is_found_by_the_catalogue_and_reads_options_as_text():
    method = load_method("compresskv").from_strings(["budget=64", "adaptive=false", "heads=all"])
    assert (method.budget, method.adaptive, method.heads) == (64, False, "all")
    ranges = {o.name: o.type for o in CompressKV.options()}
    assert ranges["profile"] == "path" and ranges["budget"] == "whole number"


# --- the embedded model ----------------------------------------------------------------------------------------


def test_retrieval_heads_keep_the_needle_that_recent_tokens_lose(smollm2):
    from tokenry.measure.task import Arm
    from tokenry.measure.tasks.needle import NeedleTask
    from tokenry.select import CacheCutter, FirstLast

    model, tokenizer = smollm2
    task = NeedleTask(model, tokenizer, count=1, length=200)
    arms = [
        Arm("full", role="plain"),
        Arm("compresskv", apply=lambda model, draw: CompressKV(budget=64)(model)),
        Arm(
            "recent",
            role="control",
            apply=lambda model, draw: CacheCutter(model, FirstLast(), dict.fromkeys(range(30), 64)),
        ),
    ]
    full, ours, recent = (task.run(arm, task.samples(), 0)[0] for arm in arms)
    assert full.metrics["answer_nll"] < ours.metrics["answer_nll"] < recent.metrics["answer_nll"]
    assert sum(ours.detail["kept"]) == 64 * 30 and len(ours.detail["tokens"]) == 9
    assert ours.cost["cache_bytes"] == recent.cost["cache_bytes"] == 64 * 30 * 2 * 3 * 64 * 4


def test_a_shared_prefill_equals_one_inside_the_context(llama):
    """Cutting a copy of a finished prefill keeps the same tokens and gives the same logits."""
    import copy

    from transformers import DynamicCache

    from tokenry.hooks.attention import observe

    prompt = torch.arange(2, 62)[None]
    after = torch.tensor([[7, 8, 9]])
    press = CompressKV(budget=16, window=4, top_heads=2, adaptive=False, heads="random")
    with torch.no_grad():
        inside = DynamicCache(config=llama.config)
        with press(llama) as direct:
            llama(prompt, past_key_values=inside)
            expected = llama(after, past_key_values=inside).logits
        shared, calls = DynamicCache(config=llama.config), {}
        with observe(llama, lambda call: calls.update({call.layer: call})):
            llama(prompt, past_key_values=shared)
        cache = copy.deepcopy(shared)
        with press(llama) as late:
            kept = late.cut(cache, calls)
            logits = llama(after, past_key_values=cache).logits
    assert kept.counts() == direct.trace.counts()
    assert all(torch.equal(kept.columns[i], direct.trace.columns[i]) for i in kept.columns)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert shared.get_seq_length() == 60  # the shared prefill is untouched
