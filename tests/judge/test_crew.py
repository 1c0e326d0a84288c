"""CRew: answers found and compared, scores against brute force, both doors alike, pairs that trl trains on."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.catalog import load as load_method
from tokenry.cli import main
from tokenry.core.calibration import auroc
from tokenry.core.errors import InputError
from tokenry.data.problems import Arithmetic, draw_problems
from tokenry.decode import generate
from tokenry.evidence.crew import build
from tokenry.judge import (
    CRew,
    CRewScorer,
    Judged,
    Solution,
    best_of_n,
    build_crew_pairs,
    crew_dpo_config,
    crew_reward,
    find_answer,
    lowest_correct,
    normalise_answer,
    weighted_vote,
)
from tokenry.measure.compare import compare
from tokenry.measure.tasks import arithmetic
from tokenry.measure.tasks.arithmetic import ArithmeticTask
from tokenry.text.answers import answer_tokens
from tokenry.text.spans import text_offsets
from tokenry.trace.trace import Trace, capture

PROMPT = "How many ships are on the sea?"
BOXED = r"The keeper counts 12 and 345, so \boxed{357}."


def found(text, marker="boxed", finished=True):
    span = find_answer(text, marker, finished)
    return None if span is None else text[slice(*span)]


def judged(prompt, score, correct, solution="s", answer="1"):
    return Judged(prompt, solution, answer, score, correct)


def brute(model, tokenizer, prompt, solution, answer):
    """Probabilities of the tokens that overlap the last place of `answer`, from a softmax over everything."""
    start, ids = tokenizer(prompt).input_ids, tokenizer(solution, add_special_tokens=False).input_ids
    with torch.no_grad():
        probs = model(torch.tensor([start + ids])).logits[0].double().softmax(-1)
    begin = solution.rindex(answer)
    text, offsets = text_offsets(tokenizer, ids)
    assert text == solution
    rows = [t for t, (a, b) in enumerate(offsets.tolist()) if a < begin + len(answer) and b > begin]
    return torch.stack([probs[len(start) + t - 1, ids[t]] for t in rows]), probs[[len(start) + t - 1 for t in rows]]


def trace_of(model, tokenizer, prompt, solution, step=False):
    """The trace of prompt + solution, in one forward or token by token with a cache, as generation does it."""
    start, ids = tokenizer(prompt).input_ids, tokenizer(solution, add_special_tokens=False).input_ids
    with capture(model, tokenizer) as cap, torch.no_grad():
        if not step:
            model(torch.tensor([start + ids]), use_cache=False, logits_to_keep=1)
        else:
            cache = model(torch.tensor([start]), use_cache=True).past_key_values
            for token in ids:
                cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    return cap.trace if step else cap.trace.with_prompt(len(start))


# --- where the answer is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, marker, answer",
    [
        (r"first \boxed{3}, then \boxed{ 12 }.", "boxed", "12"),
        (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
        (r"\boxed {x}", "boxed", "x"),
        (r"\boxed{3} or rather \boxed{4", "boxed", None),
        (r"\boxed{ }", "boxed", None),
        ("no box, only {3}", "boxed", None),
        ("A: 7 + 5 = 12. The answer is 12. Done", "answer", "12"),
        ("The final answer is: 3.14", "answer", "3.14"),
        ("#### 1,234\nnext", "answer", "1,234"),
        ("A: The answer is B.", "answer", "B"),
        ("the answer is 42<|im_end|>", "answer", "42"),
        ("The answer is ", "answer", None),
        ("The answer is\n42", "answer", None),
        ("nothing here", "answer", None),
        ("17-25 makes -8.", "number", "-8"),
        ("about 1,234.50 in all, 12,34", "number", "34"),
        ("half is 1/2.", "number", "1/2"),
        ("that is .5", "number", ".5"),
        ("17-25", "number", "25"),
        ("none", "number", None),
        ("<a>x</a> <a>y</a>", "<a>(.*?)</a>", "y"),
        ("<b>", "<a>(.*?)</a>", None),
        ("say 9 now", lambda text: (4, 5), "9"),
    ],
)
def test_find_answer(text, marker, answer):
    assert found(text, marker) == answer


@pytest.mark.parametrize(
    "text, marker, answer",
    [
        ("The answer is 4", "answer", None),  # 42 was cut
        ("The answer is 3.", "answer", None),  # 3.5 was cut
        ("it is 4", "number", None),
        ("it is 4\n", "number", "4"),
        ("it is 4 apples and", "number", "4"),
        (r"\boxed{4}", "boxed", None),
        (r"\boxed{4} and", "boxed", "4"),
    ],
)
def test_an_answer_that_may_go_on_is_none_in_a_text_that_was_cut(text, marker, answer):
    if marker == "boxed":
        answer = "4"  # the closed brace proves that it is whole
    assert found(text, marker, finished=False) == answer


def test_answer_tokens_overlap_the_inner_text_and_are_not_just_braces():
    text = r"a \boxed{12\frac{3}{4}}."
    pieces = ["a", r" \boxed", "{1", "2", r"\frac", "{", "3", "}{", "4}", "}."]
    assert "".join(pieces) == text
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    offsets = torch.tensor(list(zip([0, *ends], ends)))
    picked = answer_tokens(text, offsets, find_answer(text))
    assert [pieces[i] for i in picked] == ["{1", "2", r"\frac", "3", "4}"]


def test_tokens_of_one_character_belong_to_the_answer_together(tokenizer):
    text = r"\boxed{🙂}"
    ids = tokenizer(text).input_ids
    shown, offsets = text_offsets(tokenizer, ids)
    picked = answer_tokens(shown, offsets, find_answer(shown))
    assert len(picked) > 1 and tokenizer.decode([ids[i] for i in picked]) == "🙂"


@pytest.mark.parametrize(
    "text, normal",
    [
        (" 42. ", "42"),
        ("$1,234.50$", "1234.5"),
        (r"\$5", "5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("+3", "3"),
        (".5", "0.5"),
        ("-1,000", "-1000"),
        ("(1,234)", "(1,234)"),
        (r"\text{Monday}", "monday"),
        ("(B)", "(b)"),
        (r"\frac{1}{2}", "1/2"),
        (r"\dfrac12", "1/2"),
        ("1 / 2", "1/2"),
        (r"-\frac{3}{4}", "-3/4"),
        (r"\frac{x+1}{2}", "(x+1)/2"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        ("", ""),
        ("12345678901234567890123456789012.10", "12345678901234567890123456789012.1"),
    ],
)
def test_normalise_answer(text, normal):
    assert normalise_answer(text) == normal


@given(st.text(alphabet="0123456789.,-+$ {}\\fractext/ab", max_size=20))
@settings(max_examples=200, deadline=None)
def test_normalising_numbers_keeps_their_value(text):
    normal = normalise_answer(text)
    try:
        value = float(text)
    except ValueError:
        return
    assert float(normal) == value


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_every_aggregate_equals_brute_force(make_model, tokenizer, kind):
    model = make_model(kind)
    p, rows = brute(model, tokenizer, PROMPT, BOXED, "357")
    best = rows.topk(2).values
    expected = {
        "mean_prob": p.mean(),
        "geo_mean": p.log().mean().exp(),
        "product": p.prod(),
        "min": p.min(),
        "top2_gap": (best[:, 0] - best[:, 1]).mean(),
    }
    for aggregate, value in expected.items():
        (score,) = CRewScorer(model, tokenizer, CRew(aggregate=aggregate)).score_batch([PROMPT], [BOXED])
        assert score == pytest.approx(float(value), rel=1e-4), aggregate


def test_a_one_token_answer_gives_exactly_its_probability(llama, tokenizer):
    solution = r"so \boxed{7}"
    p, _ = brute(llama, tokenizer, PROMPT, solution, "7")
    assert len(p) == 1
    for aggregate in ("mean_prob", "geo_mean", "product", "min"):
        scorer = CRewScorer(llama, tokenizer, CRew(aggregate=aggregate))
        assert scorer.score_batch([PROMPT], [solution])[0] == pytest.approx(float(p[0]), rel=1e-5)


def test_padding_and_what_follows_the_answer_change_nothing(llama, tokenizer):
    prompts = [PROMPT, "The sea", "Tell me how the old lighthouse stood on the cliff in the night."]
    solutions = [BOXED, r"\boxed{1}", r"a whisper \boxed{night} and the wind"]
    scorer = CRewScorer(llama, tokenizer)
    together = scorer.score_batch(prompts, solutions)
    alone = [scorer.score_batch([p], [s])[0] for p, s in zip(prompts, solutions)]
    longer = scorer.score_batch(prompts, [s + " And the tower was empty." for s in solutions])
    assert together == pytest.approx(alone, rel=1e-4)
    assert longer == pytest.approx(alone, rel=1e-4)
    assert len(set(together)) == 3


def test_a_constant_on_the_logits_changes_nothing_and_a_uniform_model_gives_one_over_v(llama, tokenizer):
    def score(edit):
        handle = llama.lm_head.register_forward_hook(lambda module, args, output: edit(output))
        try:
            return CRewScorer(llama, tokenizer).score_batch([PROMPT], [BOXED])[0]
        finally:
            handle.remove()

    plain = CRewScorer(llama, tokenizer).score_batch([PROMPT], [BOXED])[0]
    assert score(lambda x: x + 5) == pytest.approx(plain, rel=1e-5)
    assert score(lambda x: x * 0) == pytest.approx(1 / 320, rel=1e-5)
    sharp = score(lambda x: (x * 1e-3).bfloat16())  # close to uniform: a softmax in bfloat16 would be coarse
    assert sharp == pytest.approx(1 / 320, rel=0.02)


def test_only_answers_are_known_and_no_other_logits_are_made(llama, tokenizer):
    sizes = []
    handle = llama.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1]))
    (read,) = CRewScorer(llama, tokenizer).read([PROMPT], [BOXED])
    handle.remove()
    known = (~read.logprob.isnan()).nonzero().squeeze(1).tolist()
    assert known == answer_tokens(read.text, read.offsets, find_answer(read.text)) and sizes == [len(known)]


def test_no_answer_is_none_and_takes_no_forward(llama, tokenizer):
    calls = []
    handle = llama.register_forward_hook(lambda *_: calls.append(1))
    solutions = ["no marker", r"\boxed{}", r"\boxed{12", ""]
    assert CRewScorer(llama, tokenizer).score_batch([PROMPT] * 4, solutions) == [None] * 4
    scorer = CRewScorer(llama, tokenizer, CRew(marker="number"))
    assert scorer.score_batch([PROMPT] * 2, ["it is 4", "it is 4"], finished=[False, True])[0] is None
    handle.remove()
    assert len(calls) == 1


def test_the_prompt_is_read_in_the_chat_template(llama, tokenizer):
    talker = copy.deepcopy(tokenizer)
    talker.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    raw = CRewScorer(llama, tokenizer).score_batch([f"[{PROMPT}]>"], [BOXED])
    assert CRewScorer(llama, talker).score_batch([PROMPT], [BOXED]) == raw
    assert CRewScorer(llama, talker).score_batch([[{"role": "user", "content": PROMPT}]], [BOXED]) == raw
    plain = CRewScorer(llama, tokenizer).score_batch([PROMPT], [BOXED])
    assert CRewScorer(llama, talker, chat=False).score_batch([PROMPT], [BOXED]) == plain != raw


@given(
    st.lists(st.floats(-12, 0), min_size=1, max_size=6),
)
@settings(max_examples=50, deadline=None)
def test_aggregates_are_ordered(values):
    text = "7" * len(values)
    offsets = torch.tensor([(i, i + 1) for i in range(len(values))])
    solution = Solution("q", text, offsets, torch.tensor(values))
    product, least, geo, mean = (
        CRew(aggregate=a, marker="number").score([solution])[0] for a in ("product", "min", "geo_mean", "mean_prob")
    )
    assert 0 <= product <= least * 1.001 <= geo * 1.002 <= mean * 1.003 <= 1.004


# --- the door of traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("aggregate", ["mean_prob", "top2_gap"])
def test_a_trace_of_cached_steps_scores_as_teacher_forcing(make_model, tokenizer, kind, aggregate):
    model, method = make_model(kind), CRew(aggregate=aggregate)
    forced = CRewScorer(model, tokenizer, method).score_batch([PROMPT], [BOXED])
    stepped = trace_of(model, tokenizer, PROMPT, BOXED, step=True)
    assert method.score([stepped]) == pytest.approx(forced, abs=1e-4)
    assert method.score([trace_of(model, tokenizer, PROMPT, BOXED)]) == pytest.approx(forced, abs=1e-4)
    (solution,) = method.judge([stepped], gold=["357"])
    assert solution == (PROMPT, BOXED, "357", pytest.approx(forced[0], abs=1e-4), True)


def test_a_saved_trace_scores_the_same_and_is_refused_for_another_model(make_model, llama, tokenizer, tmp_path):
    trace = trace_of(llama, tokenizer, PROMPT, BOXED, step=True)
    path = tmp_path / "t.safetensors"
    trace.save(path)
    gap = CRew(aggregate="top2_gap")
    assert CRew().score([Trace.load(path)]) == CRew().score([trace])
    assert gap.score([Trace.load(path, llama)]) == gap.score([trace])
    with pytest.raises(InputError, match="top2_gap needs"):
        gap.score([Trace.load(path)])
    with pytest.raises(InputError, match="another model"):
        Trace.load(path, make_model("qwen2"))


def test_generated_batches_give_traces_that_score_as_teacher_forcing(smollm2):
    from tokenry.decode import generate

    model, tokenizer = smollm2
    prompts = [f"Q: 8 + 14 = ? A: 8 + 14 = 22.\nQ: {question} = ? A:" for question in ("5 + 6", "17 + 12")]
    method = CRew(marker="number")
    with capture(model, tokenizer) as cap:
        output = generate(model, tokenizer, prompts, chat=False, max_new_tokens=11, stop=["\n"])
    texts = [trace.text[int(trace.offsets[trace.spans["answer"][0][0], 0]) :] for trace in cap.traces]
    assert all(text.strip() for text in texts) and all(t in o for t, o in zip(texts, output.texts))
    forced = CRewScorer(model, tokenizer, method, chat=False).score_batch(prompts, texts)
    assert None not in forced
    assert method.score(cap.traces) == pytest.approx(forced, abs=1e-4)


def test_an_answer_at_the_end_of_a_cut_trace_is_none(llama, tokenizer):
    trace = trace_of(llama, tokenizer, PROMPT, "there are 12", step=True)
    method = CRew(marker="number")
    assert method.score([trace])[0] > 0
    assert method.score([Solution.from_trace(trace, finished=False)]) == [None]


def test_a_trace_that_cannot_be_judged_is_refused(llama, tokenizer):
    ids = torch.tensor([tokenizer(PROMPT + BOXED).input_ids])
    with capture(llama, tokenizer) as cap, torch.no_grad():
        llama(ids, use_cache=False, logits_to_keep=1)
    with pytest.raises(InputError, match="with_prompt"):
        CRew().score([cap.trace])
    with capture(llama) as cap, torch.no_grad():
        llama(ids, use_cache=False, logits_to_keep=1)
    with pytest.raises(InputError, match="tokenizer"):
        CRew().score([cap.trace.with_prompt(5)])
    (read,) = CRewScorer(llama, tokenizer).read([PROMPT], ["3 ships, " + BOXED])
    with pytest.raises(InputError, match="not known"):
        CRew(marker=r"(\d+) ships").score([read])


# --- choosing ------------------------------------------------------------------------------------------------------


def test_best_of_n_and_the_weighted_vote():
    samples = [judged("q", s, None, answer=a) for s, a in ((0.5, "1"), (0.9, "2"), (0.45, "1.0"), (None, None))]
    assert best_of_n(samples) is samples[1]
    assert weighted_vote(samples) == ("1", pytest.approx(0.95 / 1.85))
    ties = [judged("q", 0.5, None, answer=a) for a in ("3", "4")]
    assert best_of_n(ties) is ties[0] and weighted_vote(ties) == ("3", 0.5)
    nothing = [judged("q", None, None, answer=None)] * 2
    assert best_of_n(nothing) is None and weighted_vote(nothing) is None
    zeros = [judged("q", 0.0, None, answer=a) for a in ("3", "4")]
    assert weighted_vote(zeros) == ("3", 0.5)


@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3"]), st.floats(0.01, 1)), min_size=2, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_vote_equals_its_sum(draws):
    totals = {}
    for answer, score in draws:
        totals[answer] = totals.get(answer, 0) + score
    won = weighted_vote([judged("q", score, None, answer=answer) for answer, score in draws])
    assert totals[won.answer] == max(totals.values())
    assert won.share == pytest.approx(totals[won.answer] / sum(totals.values()))


def test_the_lowest_right_solution_of_each_prompt():
    samples = [judged("p", 0.8, True), judged("p", 0.3, True), judged("p", 0.1, False), judged("q", 0.2, False)]
    assert lowest_correct(samples) == [samples[1]]


@given(
    st.lists(st.tuples(st.sampled_from("pq"), st.floats(0, 1), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 6),
    st.sampled_from([None, 0.0, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_pairs_are_the_largest_gaps_right_against_wrong(draws, top_k, min_gap):
    samples = [judged(p, s, c, solution=f"{i}") for i, (p, s, c) in enumerate(draws)]
    expected = {}
    for prompt in "pq":
        right = [s.score for s in samples if s.prompt == prompt and s.correct]
        wrong = [s.score for s in samples if s.prompt == prompt and not s.correct]
        gaps = sorted((r - w for r in right for w in wrong if min_gap is None or r - w >= min_gap), reverse=True)
        expected[prompt] = gaps[:top_k]
    if not any(expected.values()):
        with pytest.raises(InputError, match="right and a wrong"):
            build_crew_pairs(samples, top_k, min_gap)
        return
    pairs = build_crew_pairs(samples, top_k, min_gap)
    assert pairs.column_names == ["prompt", "chosen", "rejected", "gap"]
    for prompt, gaps in expected.items():
        mine = [row for row in pairs if row["prompt"] == prompt]
        assert [row["gap"] for row in mine] == pytest.approx(gaps)
        for row in mine:
            good, bad = samples[int(row["chosen"])], samples[int(row["rejected"])]
            assert good.correct and not bad.correct and row["gap"] == pytest.approx(good.score - bad.score)


def test_pairs_say_how_many_prompts_gave_none_and_leave_out_what_has_no_answer():
    samples = [judged("p", 0.8, True), judged("p", 0.3, False), judged("p", None, False, answer=None)]
    pairs = build_crew_pairs([*samples, judged("q", 0.2, False), judged("r", 0.2, True)])
    assert len(pairs) == 1 and pairs.info.description == "2 of 3 prompts gave no pair (67%)"


# --- trl -----------------------------------------------------------------------------------------------------------


def test_trl_trains_a_dpo_step_on_the_pairs(llama, tokenizer, tmp_path):
    from trl import DPOTrainer

    texts = [r"it is \boxed{1}", r"it is \boxed{2}", r"perhaps \boxed{3}", r"the sea \boxed{1}"]
    solutions = CRewScorer(llama, tokenizer).read([PROMPT] * 4, texts)
    pairs = build_crew_pairs(CRew().judge(solutions, gold=["1"] * 4), top_k=2)
    assert len(pairs) == 2
    options = {"use_cpu": True, "report_to": "none", "max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1}
    config = crew_dpo_config(str(tmp_path), development=False, **options, save_strategy="no")
    model = copy.deepcopy(llama)
    trainer = DPOTrainer(model, copy.deepcopy(llama), config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    assert loss == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-3)  # both models are the same at first
    changed = [not torch.equal(a, b) for a, b in zip(llama.parameters(), model.parameters())]
    assert any(changed)


def test_the_dpo_config_has_the_values_of_the_paper(tmp_path):
    config = crew_dpo_config(str(tmp_path), use_cpu=True)
    assert (config.beta, config.learning_rate, config.num_train_epochs) == (0.3, 5e-7, 2)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 128
    assert config.eval_steps == config.save_steps == 50 and config.load_best_model_at_end
    assert crew_dpo_config(str(tmp_path), development=False, beta=0.1, use_cpu=True).beta == 0.1
    with pytest.raises(InputError, match="does not divide 128"):
        crew_dpo_config(str(tmp_path), per_device_train_batch_size=7)


def test_the_reward_takes_text_and_messages_and_any_column(llama, tokenizer):
    reward = crew_reward(CRewScorer(llama, tokenizer))
    expected = CRewScorer(llama, tokenizer).score_batch([PROMPT] * 2, [BOXED, "none"])
    texts = reward(prompts=[PROMPT] * 2, completions=[BOXED, "none"], completion_ids=[[1], [2]], answer=["a", "b"])
    turns = [[{"role": "assistant", "content": text}] for text in (BOXED, "none")]
    assert texts == expected and expected[1] is None
    assert reward(prompts=[PROMPT] * 2, completions=turns, trainer_state=None) == expected
    assert reward.__name__ == "crew_reward"


def test_trl_trains_a_grpo_step_on_the_reward(llama, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = copy.deepcopy(llama)
    scores = []
    scored = crew_reward(CRewScorer(llama, tokenizer, CRew(marker=r"(\S+)")))

    def watched(**columns):
        scores.extend(scored(**columns))
        return scores[-len(columns["prompts"]) :]

    config = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=1,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = GRPOTrainer(model, watched, config, Dataset.from_dict({"prompt": [PROMPT]}), processing_class=tokenizer)
    trainer.train()
    known = [s for s in scores if s is not None]
    assert known and all(0 < s < 1 for s in known)
    assert trainer.state.log_history[0]["reward"] == pytest.approx(sum(known) / len(known), rel=1e-4)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: CRew(aggregate="max"), "aggregate='max' is not allowed"),
        (lambda: CRew(marker="("), "is no regex"),
        (lambda: CRew(marker="x"), "has 0 groups; give boxed, answer, number, or a regex with one group"),
        (lambda: CRew(marker="(a)(b)"), "has 2 groups"),
        (lambda: best_of_n([judged("q", 0.5, None)]), "nothing to choose among 1 samples"),
        (lambda: weighted_vote([]), "nothing to choose among 0 samples"),
        (lambda: best_of_n([judged("q", 0.5, None), judged("r", 0.5, None)]), "2 prompts"),
        (lambda: build_crew_pairs([judged("q", 0.5, None)]), "neither right nor wrong"),
        (lambda: build_crew_pairs([judged("q", 0.5, True)], top_k=0), "top_k=0"),
        (lambda: build_crew_pairs([judged("q", 0.5, True)] * 2), "draw more samples"),
        (lambda: build_crew_pairs([judged("q", 0.5, True), judged("q", 0.6, False)], min_gap=0), "lower min_gap=0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(act, message):
    with pytest.raises(InputError) as error:
        act()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_solutions_are_refused(llama, tokenizer):
    scorer = CRewScorer(llama, tokenizer)
    with pytest.raises(InputError, match="the prompt is empty"):
        scorer.score_batch([" "], [BOXED])
    with pytest.raises(InputError, match="1 prompts for 2 solutions"):
        scorer.score_batch([PROMPT], [BOXED, BOXED])
    with pytest.raises(InputError, match="context window 512"):
        scorer.score_batch([PROMPT], ["sea " * 600 + BOXED])


def test_training_without_its_packages_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    for act in (lambda: build_crew_pairs([judged("q", 0.5, True)]), lambda: crew_dpo_config(str(tmp_path))):
        with pytest.raises(InputError, match=r"pip install tokenry\[train\]"):
            act()


def test_the_catalogue_knows_it():
    assert load_method("crew") is CRew
    assert CRew.from_strings(["aggregate=min", "marker=number"]) == CRew(aggregate="min", marker="number")
    assert "boxed" in {option.default for option in CRew.options()}


# --- the experiment ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_auroc_equals_counting_pairs(draws):
    pairs = [(a > b) + 0.5 * (a == b) for a, right in draws if right for b, other in draws if not other]
    found = auroc([score for score, _ in draws], [right for _, right in draws])
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else found != found


PROBLEMS = draw_problems(Arithmetic(), 40, levels=(1, 2))


class Watched(ArithmeticTask):
    """Keeps the tokens of each solution."""

    def _solution(self, prompt, ids, logprob):
        solution = super()._solution(prompt, ids, logprob)
        self.seen = [*getattr(self, "seen", ()), (prompt, ids, solution)]
        return solution


def test_drawn_solutions_have_the_probabilities_of_teacher_forcing(llama, tokenizer, monkeypatch):
    """Also where a batch is padded, and the token that ends a text is no part of it."""
    monkeypatch.setitem(arithmetic.SAMPLING, "max_new_tokens", 12)
    ended = copy.deepcopy(tokenizer)
    ended.eos_token = tokenizer.convert_ids_to_tokens(generate(llama, tokenizer, "12", max_new_tokens=4).new_ids[0][-1])
    task = Watched(llama, ended, PROBLEMS[:4], drawn=3)
    samples = task.samples()
    batch = task._solutions(samples, seed=0)
    assert [len(group) for group in batch] == [3] * 4 and len(task.seen) == 12
    for prompt, ids, solution in task.seen:
        start = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits = llama(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        kept = len(ids) - solution.finished
        torch.testing.assert_close(solution.logprob, expected[:kept], atol=1e-4, rtol=1e-4)
        assert solution.text == text_offsets(tokenizer, ids[:kept])[0]
        assert solution.finished == (ids[-1] == ended.eos_token_id)
    assert task._solutions(samples, seed=0) is batch
    again = ArithmeticTask(llama, ended, PROBLEMS[:4], drawn=3)._solutions(samples, seed=0)
    assert [s.text for group in again for s in group] == [s.text for group in batch for s in group]


class Told(ArithmeticTask):
    """Sums with solutions that a test wrote: (text, probability of every token)."""

    def __init__(self, model, tokenizer, told):
        super().__init__(model, tokenizer, PROBLEMS[: len(told)], drawn=3)
        self.told = told

    def _solutions(self, samples, seed):
        def solution(prompt, text, p):
            offsets = torch.tensor([(i, i + 1) for i in range(len(text))])
            return Solution(prompt, text, offsets, torch.full((len(text),), p).log())

        return [[solution(s.prompt, *one) for one in self.told[s.data["index"]]] for s in samples]


def test_the_task_judges_and_the_findings_follow(llama, tokenizer):
    golds = [problem.answer for problem in PROBLEMS[:4]]
    told = [[(f"so {gold}", 0.9), ("so 999", 0.5), ("no idea", 0.99)] for gold in golds]
    told[1] = [("so 999", 0.9), (f"so {golds[1]}", 0.5), ("no idea", 0.99)]
    experiment = build(llama, tokenizer, samples=4)
    comparison = compare(dataclasses.replace(experiment, task=Told(llama, tokenizer, told)))
    assert comparison.values("crew", "best_of_n").tolist() == [1, 0, 1, 1]
    assert comparison.values("crew", "vote").tolist() == [1, 0, 1, 1]
    assert comparison.values("crew", "concordance").tolist() == [1, 0, 1, 1]
    assert comparison.values("all alike", "concordance").tolist() == [0.5] * 4
    assert comparison.values("crew", "accuracy") == pytest.approx([1 / 3] * 4)
    findings = experiment.findings(comparison)
    assert [f.outcome for f in findings] == ["undecided"] * 6 + ["described"]  # by four questions
    assert "crew - all alike: +0.000" in findings[1].numbers and "crew - all alike: +0.000" in findings[2].numbers
    assert "AUROC: 0.750" in findings[3].numbers and findings[6].numbers.endswith("0.90: 1.00")


def test_the_findings_are_decided_by_more_questions(llama, tokenizer):
    """Right solutions come second and are surer: whoever reads probabilities is ahead of who does not."""
    told = [[("so 999", 0.5), (f"so {problem.answer}", 0.9)] for problem in PROBLEMS]
    experiment = build(llama, tokenizer, samples=40)
    findings = experiment.findings(compare(dataclasses.replace(experiment, task=Told(llama, tokenizer, told))))
    assert [f.outcome for f in findings[1:4]] == ["holds"] * 3 and "AUROC: 1.000" in findings[3].numbers
    assert findings[0].main and findings[0].outcome == findings[4].outcome == "undecided"  # as log-likelihood has it


def test_the_experiment_runs_on_a_real_draw(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(arithmetic.SAMPLING, "max_new_tokens", 12)
    experiment = build(llama, tokenizer, samples=2, method=CRew(aggregate="product"))
    comparison = compare(experiment)
    assert {s.role for s in experiment.arms} == {"plain", "control", "method"}
    assert "as given" in comparison.arms and experiment.arms[-1].setting["marker"] == "number"
    assert comparison.mean("crew", "forward_passes") == 0
    own = build(llama, tokenizer, samples=2, method=CRew(marker=find_answer)).arms[-1]
    assert own.setting == {"aggregate": "mean_prob", "marker": "find_answer"}
    json.dumps(comparison.to_dict())


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, llama, tokenizer):
    """cli(*args): run `tokenry judge --method crew` on the tiny model; (exit code, stdout, stderr)."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(*args, stdin=None):
        given = ["judge", "--method", "crew", "--model", str(tmp_path / "model"), *map(str, args)]
        result = CliRunner().invoke(main, given, input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def test_the_command_scores_chooses_and_writes_pairs(cli, tmp_path, llama, tokenizer):
    texts = [BOXED, r"it is \boxed{4}", "no answer"]
    path, out = tmp_path / "s.jsonl", tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": PROMPT, "solutions": texts[:2], "answer": 357},
        {"prompt": PROMPT, "solution": texts[2], "answer": "357"},
        {"prompt": "The sea", "solution": texts[0], "answer": "9"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    code, stdout, stderr = cli(path, "--json", "--pairs", out)
    assert code == 0 and "1 pairs" in stderr and "1 of 2 prompts gave no pair" in stderr
    first, second = json.loads(stdout)
    scores = CRewScorer(llama, tokenizer).score_batch([PROMPT] * 3, texts)
    assert [s["score"] for s in first["solutions"][:2]] == pytest.approx(scores[:2], rel=1e-4)
    assert first["solutions"][2] == {"score": None, "answer": None, "correct": False}
    assert [s["correct"] for s in first["solutions"]] == [True, False, False]
    assert first["best"] == (0 if scores[0] > scores[1] else 1)
    assert first["vote"]["answer"] == ("357" if scores[0] > scores[1] else "4")
    assert second["best"] is None and second["vote"] is None
    (pair,) = map(json.loads, out.read_text().splitlines())
    assert pair == {"prompt": PROMPT, "chosen": texts[0], "rejected": texts[1], "gap": pair["gap"]}
    code, stdout, _ = cli("-", stdin=path.read_text())
    assert code == 0 and "no answer found" in stdout and "vote:" in stdout and PROMPT in stdout


def test_the_command_scores_traces_and_refuses_those_of_another_model(cli, tmp_path, make_model, llama, tokenizer):
    files = []
    for i, text in enumerate((BOXED, r"\boxed{1}")):
        files.append(tmp_path / f"{i}.safetensors")
        trace_of(llama, tokenizer, PROMPT, text, step=True).save(files[-1])
    code, stdout, stderr = cli("--trace", *files, "--json", "-o", "aggregate=top2_gap")
    assert code == 0, stderr
    expected = CRewScorer(llama, tokenizer, CRew(aggregate="top2_gap")).score_batch([PROMPT] * 2, [BOXED, r"\boxed{1}"])
    (group,) = json.loads(stdout)
    assert [s["score"] for s in group["solutions"]] == pytest.approx(expected, abs=1e-4)
    other = tmp_path / "other.safetensors"
    trace_of(make_model("qwen2"), tokenizer, PROMPT, BOXED, step=True).save(other)
    code, _, stderr = cli("--trace", files[0], other)
    assert code == 2 and "was traced on another model" in stderr
    code, _, stderr = cli("--trace", files[0], "--pairs", tmp_path / "p")
    assert code == 2 and "traces do not hold" in stderr


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 of '-' is not JSON"),
        ("[1]", "line 2 of '-' is not an object"),
        ('{"solution": "x"}', "line 2 of '-' has the prompt None"),
        ('{"prompt": " ", "solution": "x"}', "has the prompt ' '"),
        ('{"prompt": "q"}', "needs either 'solution'"),
        ('{"prompt": "q", "solution": "x", "solutions": []}', "needs either 'solution'"),
        ('{"prompt": "q", "solutions": []}', "has no solutions as text"),
        ('{"prompt": "q", "solution": 3}', "has no solutions as text"),
        ('{"prompt": "q", "solution": "x", "answer": [1]}', "has the answer [1]"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(cli, line, message):
    code, stdout, stderr = cli("-", stdin='{"prompt": "q", "solution": "x"}\n' + line)
    assert code == 2 and stdout == "" and message in stderr and len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        (["-"], "\n", "holds no solutions"),
        (["/nowhere.jsonl"], None, "cannot be read"),
        (["-", "--pairs", "/nowhere/p"], '{"prompt": "q", "solution": "x", "answer": "1"}', "cannot be written"),
        (["-", "--pairs", "p"], '{"prompt": "q", "solution": "x"}', "add 'answer' to 'q'"),
        (["-", "--pairs", "p", "--top-k", "0"], '{"prompt": "q", "solution": "x", "answer": "1"}', "--top-k 0"),
        (["-", "-o", "marker=x"], '{"prompt": "q", "solution": "x"}', "has 0 groups"),
    ],
)
def test_the_command_refuses_bad_input(cli, args, stdin, message):
    code, stdout, stderr = cli(*args, stdin=stdin)
    assert code == 2 and stdout == "" and message in stderr
