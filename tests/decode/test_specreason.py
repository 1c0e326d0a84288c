"""SpecReason: exact checks on small random models, whose steps are the lines of the zoo's reasoner."""

import math
import warnings
from dataclasses import replace
from functools import lru_cache
from itertools import cycle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TextStreamer

from tokenry import InputError, catalog, decode, generate
from tokenry.decode.reasoning.scores import DigitScorer, StepScore
from tokenry.decode.reasoning.speculative import SMALL_STREAM, StepSpeculation
from tokenry.decode.reasoning.step_prompts import PRESETS, StepPrompts, prompts_for
from tokenry.decode.reasoning.steps import StepModel
from tokenry.models.load import Loaded
from tokenry.zoo.reasoner import build_tokenizer, judging_prompt

LINES = PRESETS["lines"]
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
QUESTIONS = ["12+35-8*3=", "7+8=", "99-3*9+14="]


@lru_cache
def random_model(seed: int, width: int = 32) -> Loaded:
    """A random model that ends lines often, texts and thinking never, and likes digits."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
        bias = torch.zeros(len(tokenizer))
        bias[tokenizer.convert_tokens_to_ids([*"0123456789"])] = 1.5
        bias[tokenizer.convert_tokens_to_ids("\n")] = 2.5
        bias[tokenizer.convert_tokens_to_ids(["<eos>", "</think>"])] = -30
        model.lm_head.bias = torch.nn.Parameter(bias)
    return Loaded(model, tokenizer)


BASE, SMALL = random_model(1), random_model(2, 16)


class Fixed:
    """Scores by a rule on the steps, and remembers what it was asked."""

    def __init__(self, rule=lambda steps: 9.0):
        self.rule, self.asked = rule, []

    def score(self, problem, steps, candidate):
        self.asked.append((problem, list(steps), candidate))
        return StepScore(self.rule([*steps, candidate]))


def reasoner(scorer=None, base=BASE, small=SMALL, **values):
    settings = {"prompts": LINES, "token_budget": 60, "max_step_tokens": 20, **SAMPLING, **values}
    return decode.SpeculativeReasoner(base, small, scorer, **settings)


def alternating():
    return Fixed(lambda steps: 9.0 if len("".join(steps)) % 2 else 0.0)


def sources(result):
    return [step.source for step in result.steps]


# --- the ends of the threshold ---------------------------------------------------------------------------------------


def plainly(loaded, question, seed, tokens=60):
    out = generate(*loaded, question, seed=seed, max_new_tokens=tokens, **SAMPLING)
    return loaded.tokenizer.decode(out.new_ids[0])


@pytest.mark.parametrize("seed", [0, 3])
def test_threshold_0_is_the_small_model_alone(seed):
    for scorer in (None, Fixed(lambda steps: 0.0)):
        result = reasoner(scorer, threshold=0).generate(QUESTIONS[0], seed=seed)
        assert set(sources(result)) == {"small"} and len(result.steps) > 2
        assert result.text == plainly(SMALL, QUESTIONS[0], seed + SMALL_STREAM)[: len(result.text)]
        assert result.stats.base_tokens == 0 and result.stats.kept_tokens == result.stats.small_tokens


@pytest.mark.parametrize("seed", [0, 3])
def test_above_9_and_without_speculation_it_is_plain_generate_of_the_base(seed):
    with pytest.warns(UserWarning, match="every step is rewritten"):
        never = reasoner(threshold=9.5)
    for one in (never, reasoner(first_n_base_steps=10**6)):
        result = one.generate(QUESTIONS[0], seed=seed)
        assert set(sources(result)) == {"base"} and len(result.steps) > 2
        assert result.text == plainly(BASE, QUESTIONS[0], seed)[: len(result.text)]
        assert result.stop_reason == "budget" and result.stats.kept_tokens == 60


def test_without_speculation_nothing_is_drafted_or_judged():
    stats = reasoner(first_n_base_steps=10**6).generate(QUESTIONS[0], seed=0).stats
    assert stats.small_tokens == stats.judged == stats.judge_tokens == 0 and math.isnan(stats.acceptance)


@pytest.mark.parametrize("scorer", [Fixed, alternating, lambda: None])
def test_greedy_with_twice_the_same_model_ignores_the_threshold(scorer):
    texts = {
        reasoner(scorer(), small=BASE, threshold=threshold, do_sample=False).generate(QUESTIONS[0]).text
        for threshold in (0, 4.5, 9)
    }
    assert len(texts) == 1


def test_the_first_steps_are_of_the_base():
    result = reasoner(Fixed(), first_n_base_steps=2).generate(QUESTIONS[0], seed=0)
    assert sources(result)[:2] == ["base"] * 2 and set(sources(result)[2:]) == {"small"}
    assert [step.score for step in result.steps[:2]] == [None] * 2
    whole = reasoner(first_n_base_steps=99).generate(QUESTIONS[0], seed=0)
    assert [step.text for step in result.steps[:2]] == [step.text for step in whole.steps[:2]]


# --- step by step, against a loop without any cache ------------------------------------------------------------------


def slowly(scorer, question, threshold, budget, limit):
    """The algorithm in its simplest form, greedy: every text is read anew."""

    def write(loaded, text, most):
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        new = []
        while len(new) < most:
            logits = loaded.model(torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
            if new[-1] in (loaded.tokenizer.eos_token_id, loaded.tokenizer.convert_tokens_to_ids("\n")):
                break
        return loaded.tokenizer.decode(new), len(new)

    text, kept, found, steps = f"<user>{question}<assistant><think>\n", 0, [], []
    while kept < budget:
        most = min(limit, budget - kept)
        draft, tokens = write(SMALL, text, most)
        *before, begun = text.partition("<think>\n")[2].split("\n")
        source = "small"
        if scorer.score(question, before, begun + draft.removesuffix("\n")).value < threshold:
            (draft, tokens), source = write(BASE, text, most), "base"
        text, kept = text + draft, kept + tokens
        found.append((source, draft.removesuffix("\n").removesuffix("<eos>")))
        steps.append(found[-1][1])
        if draft.endswith("<eos>") or (len(steps) > 2 and steps[-1] == steps[-2]):
            break
    return found


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("method", ["greedy", "average", "digits", "in turn"])
def test_it_is_the_plain_algorithm(question, method):
    def scorer():
        turns = cycle([9.0, 0.0, 0.0])
        if method == "in turn":
            return Fixed(lambda steps: next(turns))
        return DigitScorer(*BASE, method=method, prompts=LINES)

    result = reasoner(scorer(), threshold=4.5, do_sample=False).generate(question)
    expected = slowly(scorer(), question, 4.5, 60, 20)
    assert [(step.source, step.text) for step in result.steps] == expected
    if method == "in turn":
        assert {"small", "base"} == {source for source, _ in expected}


@pytest.mark.parametrize("make", [alternating, lambda: None])
def test_a_batch_is_its_rows(make):
    one = reasoner(make(), threshold=4.5)
    alone = [one.generate(question, seed=0) for question in QUESTIONS[:1]]
    batch = one.generate_many(QUESTIONS, seed=0)
    again = one.generate_many(QUESTIONS, seed=0)
    assert [r.text for r in batch] == [r.text for r in again]
    assert alone[0].text == batch[0].text and sources(alone[0]) == sources(batch[0])
    greedy = reasoner(make(), threshold=4.5, do_sample=False)
    assert [r.text for r in greedy.generate_many(QUESTIONS)] == [greedy.generate(q).text for q in QUESTIONS]


def test_scores_from_the_cache_are_those_of_a_fresh_reading():
    scorer = DigitScorer(*BASE, method="digits", prompts=LINES)
    one = reasoner(scorer, threshold=4.5)
    judged = 0
    for question, result in zip(QUESTIONS, one.generate_many(QUESTIONS, seed=0)):
        steps, begun = [], ""
        for step in result.steps:
            written = step.rejected_text if step.rejected_text is not None else step.text
            if step.score is not None:
                fresh = scorer.score(question, steps, begun + written)
                assert torch.allclose(step.score.probs, fresh.probs, atol=1e-4)
                assert step.score.value == pytest.approx(fresh.value, abs=1e-4)
                judged += 1
            begun += step.text
            if step.end == "separator":
                steps, begun = [*steps, begun], ""
    assert judged > 8


def test_the_logits_of_the_cache_are_those_of_a_fresh_reading():
    reader = StepModel(BASE, ["<user>7+8=<assistant><think>\n", "<user>1+1=<assistant><think>\n"])
    texts = ["7+8=15\n", "7+8=15\n<eos><user>score<assistant>score=", "7+8=15\nwait\n", "7+8=14\n", ""]
    for i, text in enumerate(texts):
        wanted = {0: "<user>7+8=<assistant><think>\n" + text}
        if i % 2:
            wanted[1] = "<user>1+1=<assistant><think>\n" + text
        logits = reader.read(wanted)
        for row, whole in wanted.items():
            ids = torch.tensor([BASE.tokenizer.encode(whole, add_special_tokens=False)])
            fresh = BASE.model(ids).logits[0, -1]
            assert torch.allclose(logits[row], fresh, atol=1e-4) and reader.held[row] == ids[0].tolist()


def test_after_a_rejection_the_cache_holds_the_prefix_and_the_step():
    """One row: the cache itself is cut, so its length says what it holds."""
    one = reasoner(threshold=9, do_sample=False)
    speculation, lengths = StepSpeculation(one, QUESTIONS[:1], None), []
    write, engine = speculation.base.write, speculation.base.engine

    def watched(texts, limits, separator):
        speculation.base.read(texts)
        lengths.append((engine.cache.get_seq_length(), len(speculation.base.encode(texts[0]))))
        return write(texts, limits, separator)

    speculation.base.write = watched
    with torch.no_grad():
        while speculation.open:
            speculation.round()
    assert len(lengths) > 2 and all(held == prefix for held, prefix in lengths)
    assert speculation.results()[0].text == one.generate(QUESTIONS[0]).text


def test_an_accepted_step_costs_the_base_one_forward():
    speculation = StepSpeculation(reasoner(threshold=0, token_budget=200, max_step_tokens=80), QUESTIONS[:1], 0)
    with torch.no_grad():
        speculation.round()
        before = speculation.base.engine.calls
        (row,) = speculation.round()
    assert speculation.base.engine.calls == before + 1 and [step.end for step in row.steps] == ["separator"] * 2
    turn = len(speculation.base.encode("<eos><user>score<assistant>score="))
    assert row.judge_tokens == len(speculation.base.encode(row.begin["base"] + row.text)) + 2 * turn


# --- the score -------------------------------------------------------------------------------------------------------


def logits_of(tokenizer, probabilities):
    logits = torch.full((len(tokenizer),), -torch.inf)
    for token, p in probabilities.items():
        logits[tokenizer.convert_tokens_to_ids(token)] = math.log(p)
    return logits


@pytest.mark.parametrize(
    ("probabilities", "greedy", "average", "digits"),
    [
        ({"7": 0.6, "8": 0.3, "wait": 0.1}, 7, 22 / 3, 22 / 3),
        ({"7": 0.3, "8": 0.2, "wait": 0.5}, 0, 7.4, 7.4),
        ({"wait": 0.7, "check": 0.3}, 0, 0, 0),
        ({"9": 1.0}, 9, 9, 9),
    ],
)
def test_the_score_by_arithmetic(probabilities, greedy, average, digits):
    for method, value in (("greedy", greedy), ("average", average), ("digits", digits)):
        score = DigitScorer(*BASE, method=method, prompts=LINES).read(logits_of(BASE.tokenizer, probabilities))
        assert score.value == pytest.approx(value) and score.kind == method and score.probs.shape == (10,)
        assert float(score.probs.sum()) == pytest.approx(sum(p for t, p in probabilities.items() if t.isdigit()))


def test_average_sees_ten_tokens_and_digits_sees_all():
    others = [t for t in "+-*=\n " if t] + ["wait", "check", "direct", "score"]
    logits = logits_of(BASE.tokenizer, {**dict.fromkeys(others, 0.0999), "9": 0.0008, "5": 0.0002})
    assert DigitScorer(*BASE, method="average", prompts=LINES).read(logits).value == 0
    assert DigitScorer(*BASE, method="digits", prompts=LINES).read(logits).value == pytest.approx(8.2)


def test_another_scale():
    scorer = DigitScorer(*BASE, scale=(1, 5), method="digits", prompts=LINES)
    assert scorer.read(logits_of(BASE.tokenizer, {"1": 0.5, "5": 0.25, "9": 0.25})).value == pytest.approx(7 / 3)
    assert DigitScorer(*BASE, scale=(1, 5), prompts=LINES).read(logits_of(BASE.tokenizer, {"9": 1.0})).value == 1


def test_digits_after_a_space_count_too(smollm2):
    """The token after 'score is: ' is a bare digit here, and most of the digits' probability is on it."""
    scorer = DigitScorer(*smollm2)
    tokenizer = smollm2.tokenizer
    assert all([tokenizer.decode([i]).strip() for i in ids] == [str(n)] for n, ids in enumerate(scorer.ids))
    score = scorer.score("What is 2+2?", ["I add the numbers."], "2+2=4")
    assert 0 < float(score.probs.sum()) <= 1
    assert tokenizer.encode(" 7", add_special_tokens=False)[-1] in scorer.ids[7]


@torch.no_grad()
def test_likelihood_is_that_of_the_least_probable_token():
    steps, candidate = ["8*3=24", "12+35=47"], "47-24=23"
    score = decode.LikelihoodScorer(*BASE, prompts=LINES).score(QUESTIONS[0], steps, candidate)
    known = BASE.tokenizer.encode(LINES.begin(BASE.tokenizer, QUESTIONS[0]) + "8*3=24\n12+35=47\n")
    worst = 1.0
    for token in BASE.tokenizer.encode(candidate + "\n"):
        worst = min(worst, float(BASE.model(torch.tensor([known])).logits[0, -1].softmax(-1)[token]))
        known.append(token)
    assert score.value == pytest.approx(9 * worst, rel=1e-4) and score.kind == "likelihood" and score.probs is None
    method = decode.SpecReason(small=SMALL, prompts="lines", score_method="likelihood", threshold=9 * worst)
    assert isinstance(method.scorer(BASE, LINES), decode.LikelihoodScorer)


# --- the prompts -----------------------------------------------------------------------------------------------------


def test_the_words_of_the_zoo():
    tokenizer = BASE.tokenizer
    assert LINES.begin(tokenizer, QUESTIONS[0]) == f"<user>{QUESTIONS[0]}<assistant><think>\n"
    text = LINES.judging(tokenizer, QUESTIONS[0], ["8*3=24", "12+35=47"], "47-24=23")
    assert text == judging_prompt(QUESTIONS[0], "8*3=24\n12+35=47\n47-24=23")


def test_the_words_for_chat_models(smollm2):
    prompts = PRESETS["chat"]
    text = prompts.judging(smollm2.tokenizer, "What is 2+2?", ["First."], "Then 4.")
    head, _, tail = text.partition("<think>\nFirst.\n\nThen 4.\n\n")
    assert "What is 2+2?" in head and prompts.judge in tail and "</think>" not in text
    assert text.endswith("assistant\n<think>I think the quality score is: ") and text.startswith(
        prompts.begin(smollm2.tokenizer, "What is 2+2?")
    )
    ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
    assert "Then 4." in smollm2.tokenizer.decode(ids)


def test_a_template_that_drops_thoughts_cannot_drop_the_candidate():
    from copy import deepcopy

    tokenizer = deepcopy(BASE.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = StepPrompts().judging(tokenizer, "1+1=", ["one", "</think>"], "two")
    assert "<think>\none\n\n</think>\n\ntwo\n\n<user>" in text and text.endswith("score is: ")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="drops turns"):
        StepPrompts().judging(tokenizer, "1+1=", [], "two")


def test_messages_and_raw_texts():
    talk = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    begin = LINES.begin(BASE.tokenizer, [*talk, {"role": "user", "content": "2+2="}])
    assert begin == "<user>1+1=<assistant>2<eos><user>2+2=<assistant><think>\n"
    raw = replace(LINES, chat=False)
    assert raw.judging(BASE.tokenizer, "2+2=", [], "4") == "2+2=4\nscore\nscore="
    assert reasoner(prompts=raw).generate("2+2=", seed=0).steps


def test_models_with_different_vocabularies(smollm2, tokenizer, llama):
    """The base is a chat model, the small one has a byte-level vocabulary of 320 tokens and no template."""
    raw = StepPrompts(separator=" ", chat=False)
    base = Loaded(*smollm2)
    scorer = alternating()
    one = decode.SpeculativeReasoner(
        base, Loaded(llama, tokenizer), scorer, prompts=raw, token_budget=24, max_step_tokens=8
    )
    result = one.generate("The sea was", seed=0)
    assert {"small", "base"} == set(sources(result))
    joined = "".join(step.text + (" " if step.end == "separator" else "") for step in result.steps)
    assert result.text == joined


# --- accounting and stopping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_token_accounting(seed):
    one = reasoner(alternating(), threshold=4.5)
    for result in one.generate_many(QUESTIONS, seed=seed):
        stats = result.stats
        assert stats.kept_tokens == len(BASE.tokenizer.encode(result.text)) + (result.steps[-1].end == "eos")
        rejected = [step for step in result.steps if step.rejected_text is not None]
        thrown_away = sum(step.small_tokens for step in rejected)
        assert stats.kept_tokens + thrown_away == stats.small_tokens + stats.base_tokens
        assert stats.judged - stats.accepted == len(rejected) > 0
        assert all(step.source == "base" and step.base_tokens > 0 for step in rejected)
        assert stats.kept_tokens <= 60


def test_what_a_scorer_is_asked():
    scorer = Fixed()
    result = reasoner(scorer).generate(QUESTIONS[0], seed=0)
    for problem, steps, candidate in scorer.asked:
        assert problem == QUESTIONS[0] and result.text.startswith("".join(s + "\n" for s in steps) + candidate)
    assert result.stats.judge_tokens == 0 and math.isnan(result.stats.digit_mass)


def scripted(monkeypatch, script):
    """Both models write these steps, in order; a step without a line break is the last of its text."""
    from tokenry.decode.reasoning.steps import Draft

    def write(self, texts, limits, separator):
        drafts = {}
        for row in texts:
            text = script.pop(0)
            end = "separator" if text.endswith(separator) else "eos"
            drafts[row] = Draft(text.removesuffix(separator), len(text), end)
        return drafts

    monkeypatch.setattr(StepModel, "write", write)
    return lambda **values: reasoner(Fixed(), **values).generate("1+1=", seed=0)


def test_stop_reasons(monkeypatch):
    run = scripted(monkeypatch, ["a\n", "a\n", "b\n", "b\n"])
    result = run()
    assert result.stop_reason == "repeated" and result.text == "a\na\nb\nb\n"
    assert scripted(monkeypatch, ["a\n", "b"])().stop_reason == "finished"
    assert scripted(monkeypatch, ["abcd\n", "b\n", "c\n"])(token_budget=6).stop_reason == "budget"
    official = replace(LINES, answers=("boxed",))
    result = scripted(monkeypatch, ["a\n", "boxed 3\n", "c\n"])(prompts=official)
    assert result.stop_reason == "finished" and result.text == "a\nboxed 3\n"


def test_the_end_of_thinking_is_deleted_unless_the_answer_is_there(monkeypatch):
    official = replace(LINES, answers=("boxed",))
    result = scripted(monkeypatch, ["a</think>\n", "</think>\n", "</think> boxed 3\n"])(prompts=official)
    assert [step.text for step in result.steps] == ["a", "", "</think> boxed 3"]


def test_whoever_ends_thinking_answers_and_nobody_judges(monkeypatch):
    scorer, script = Fixed(), ["a\n", "</think>\n", "23"]
    scripted(monkeypatch, script)
    result = reasoner(scorer).generate("1+1=", seed=0)
    assert result.text == "a\n</think>\n23" and len(scorer.asked) == 2 and result.steps[-1].score is None
    scripted(monkeypatch, ["a\n", "</think>\n", "</think>\n", "23"])
    result = reasoner(Fixed(lambda steps: 0.0 if len(steps) == 2 else 9.0)).generate("1+1=", seed=0)
    assert sources(result) == ["small", "base", "base"] and result.steps[-1].small_tokens == 0


def test_a_step_that_is_cut_goes_on_without_a_separator():
    result = reasoner(Fixed(), max_step_tokens=3).generate(QUESTIONS[0], seed=0)
    assert "length" in [step.end for step in result.steps]
    assert result.text == plainly(SMALL, QUESTIONS[0], SMALL_STREAM)[: len(result.text)]
    assert all(step.small_tokens <= 3 for step in result.steps)


def test_the_context_window_ends_it():
    result = reasoner(Fixed(), token_budget=8192).generate(QUESTIONS[0], seed=0)
    assert result.stop_reason in ("context", "finished", "repeated")
    speculation = StepSpeculation(reasoner(Fixed(), token_budget=8192, max_step_tokens=99), QUESTIONS[:1], 0)
    speculation.base.window = 40
    judging = BASE.tokenizer.encode("\n<eos><user>score<assistant>score=")
    assert speculation._limit(speculation.rows[0]) == 40 - len(speculation.base.starts[0]) - len(judging)
    with pytest.raises(InputError, match=r"no room in the context windows \(512 and 512 tokens\)"):
        reasoner().generate("1+" * 300 + "1=")


# --- the latency model -----------------------------------------------------------------------------------------------


def test_step_speedup():
    assert decode.step_speedup(1, 0.1, 1, 0, 10) == pytest.approx(10)
    assert decode.step_speedup(0, 0.1, 1, 2, 10) == pytest.approx(10 / 13)
    for t_small, t_verify, m in ((0.1, 1.0, 10), (0.3, 2.0, 40)):
        even = t_small + t_verify / m
        assert decode.step_speedup(even, t_small, 1.0, t_verify, m) == pytest.approx(1)
        assert decode.step_speedup(even + 0.01, t_small, 1.0, t_verify, m) > 1
        assert decode.step_speedup(even - 0.01, t_small, 1.0, t_verify, m) < 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.1, 1, 1, 1, 1), "acceptance=1.1"),
        ((math.nan, 1, 1, 1, 1), "acceptance=nan"),
        ((0.5, 0, 1, 1, 1), "t_small=0"),
        ((0.5, 1, math.inf, 1, 1), "t_base=inf"),
        ((0.5, 1, 1, -1, 1), "t_verify=-1"),
        ((0.5, 1, 1, 1, 0), "step_tokens=0"),
    ],
)
def test_step_speedup_refuses(values, message):
    with pytest.raises(InputError, match=message):
        decode.step_speedup(*values)


# --- the method ------------------------------------------------------------------------------------------------------


def test_the_method_is_the_reasoner():
    method = decode.SpecReason(small=SMALL, threshold=4.5, prompts="lines", max_step_tokens=20)
    out = method.generate(*BASE, QUESTIONS, max_new_tokens=60, seed=0, **SAMPLING)
    results = reasoner(threshold=4.5).generate_many(QUESTIONS, seed=0)
    assert [r.text for r in out.results] == [r.text for r in results]
    same = generate(*BASE, QUESTIONS, methods=[method], max_new_tokens=60, seed=0, **SAMPLING)
    assert same.new_ids == out.new_ids
    assert out.texts == [BASE.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.new_ids]
    left = max(map(len, out.prompt_ids))
    for line, prompt, new in zip(out.sequences.tolist(), out.prompt_ids, out.new_ids):
        assert line[left - len(prompt) : left + len(new)] == prompt + new
    assert out.forward_calls > 0 and out.events == []


def test_it_streams_whole_steps():
    class Collect:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, ids):
            self.pieces.append(BASE.tokenizer.decode(ids))

        def end(self):
            self.ended = True

    streamer, method = Collect(), decode.SpecReason(small=SMALL, prompts="lines")
    out = method.generate(*BASE, QUESTIONS[0], max_new_tokens=40, seed=0, streamers=[streamer], **SAMPLING)
    assert streamer.pieces[0] == "<user>12+35-8*3=<assistant><think>\n" and streamer.ended
    assert "".join(streamer.pieces[1:]) == out.results[0].text and len(streamer.pieces) > 2


def test_the_zoo_gets_its_own_words():
    from types import SimpleNamespace

    from tokenry.models.folders import zoo_folders

    assert prompts_for(SimpleNamespace(name_or_path=str(zoo_folders("reasoner")[1]))) is LINES
    assert prompts_for(SimpleNamespace(name_or_path="owner/name")) is PRESETS["chat"]


def test_prompts_from_the_command_line(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"separator": "\\n", "answers": ["####"]}')
    for value in (str(path), path.read_text()):
        prompts = decode.SpecReason.from_strings(["small=zoo/speculator", f"prompts={value}"]).prompts
        assert prompts.separator == "\n" and prompts.answers == ("####",) and prompts.chat
    assert decode.SpecReason.from_strings(["small=x", "prompts=lines"]).prompts == LINES


def test_defaults_and_catalogue():
    method = catalog.load("specreason")
    assert method is decode.SpecReason and method.stage == "decode"
    one = method()
    assert one.small == "zoo/speculator" and one.prompts is None
    assert (one.threshold, one.score_method, one.max_step_tokens, one.first_n_base_steps) == (7.0, "greedy", 512, 0)
    assert decode.SpeculativeReasoner(BASE, SMALL, Fixed()).options == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    assert decode.SpeculativeReasoner(BASE, SMALL, Fixed()).token_budget == 8192
    assert all(option.description for option in method.options())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": math.nan}, "threshold=nan"),
        ({"max_step_tokens": 0}, "max_step_tokens=0"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"first_n_base_steps": -1}, "first_n_base_steps=-1"),
    ],
)
def test_the_reasoner_refuses(values, message):
    with pytest.raises(InputError, match=message):
        reasoner(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": math.nan}, "threshold=nan"),
        ({"threshold": "high"}, "threshold='high'"),
        ({"score_method": "median"}, "score_method='median' .*one of greedy, average, digits"),
        ({"max_step_tokens": 0}, "max_step_tokens=0"),
        ({"first_n_base_steps": -1}, "first_n_base_steps=-1"),
        ({"prompts": "nowhere.json"}, "'nowhere.json' is neither chat nor lines nor JSON"),
        ({"prompts": '{"seperator": " "}'}, "no field 'seperator'.*separator"),
        ({"prompts": '{"separator": ""}'}, "separator is empty"),
    ],
)
def test_the_method_refuses(values, message):
    with pytest.raises(InputError, match=message):
        decode.SpecReason(**{"small": SMALL, **values})


def test_the_method_works_alone():
    method = decode.SpecReason(small=SMALL, prompts="lines")
    assert isinstance(method, decode.RunnerMethod) and not isinstance(method, decode.LoopMethod)  # it has no plug-ins
    with pytest.raises(InputError, match="takes no monitors"):
        method.generate(*BASE, "1+1=", monitors=[decode.PhraseBan(["x"])])
    with pytest.raises(InputError, match="texts or messages, not ids"):
        method.generate(*BASE, decode.encode_prompts(BASE.tokenizer, ["1+1="]))
    with pytest.raises(InputError, match="2 streamers for 1 rows"):
        method.generate(*BASE, "1+1=", streamers=[TextStreamer(BASE.tokenizer)] * 2)


@pytest.mark.parametrize("threshold", [-1.0, 9.01])
def test_a_threshold_outside_the_scores_warns(threshold):
    with pytest.warns(UserWarning, match="outside the scores of 0 to 9"):
        reasoner(threshold=threshold)
    with pytest.warns(UserWarning, match="outside the scores of 0 to 9"):
        decode.SpecReason(small=SMALL, threshold=threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reasoner(threshold=0), reasoner(threshold=9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"separator": ""}, "separator is empty"),
        ({"instruction": "Think."}, r"no '\{problem\}'"),
    ],
)
def test_the_prompts_refuse(values, message):
    with pytest.raises(InputError, match=message):
        StepPrompts(**values)


def test_a_problem_that_is_none():
    for problem in ("", " ", [], [{"role": "assistant", "content": "2"}], [{"role": "user", "content": " "}]):
        with pytest.raises(InputError, match="the problem is empty"):
            reasoner().generate(problem)
    with pytest.raises(InputError, match="no problems"):
        reasoner().generate_many([])


def test_a_tokenizer_without_a_template(llama, tokenizer):
    one = decode.SpeculativeReasoner(Loaded(llama, tokenizer), SMALL, Fixed())
    with pytest.raises(InputError, match="no chat template; use StepPrompts"):
        one.generate("1+1=")


def test_the_scorer_refuses(llama, tokenizer):
    with pytest.raises(InputError, match=r"one token per digit; '10' is not one token"):
        DigitScorer(*BASE, scale=(0, 10), prompts=LINES)
    for scale in ((5, 5), (-1, 3), (9, 0)):
        with pytest.raises(InputError, match="lowest and the highest score"):
            DigitScorer(*BASE, scale=scale, prompts=LINES)
    with pytest.raises(InputError, match="method='median'"):
        DigitScorer(*BASE, method="median", prompts=LINES)


def test_a_judge_without_digits_is_reported(monkeypatch):
    """The scores collapse silently otherwise: a word where the digit should stand counts as 0."""
    monkeypatch.setattr(DigitScorer, "read", lambda self, logits: StepScore(0.0, torch.full((10,), 0.001), "greedy"))
    with pytest.warns(UserWarning, match="only 1% of the probability to digits"):
        reasoner().generate("1+1=", seed=0)


# --- the experiment --------------------------------------------------------------------------------------------------

DONE = ["8*3=24", "12+35=47", "47-24=23"]


@pytest.mark.parametrize(
    ("lines", "candidate", "right"),
    [
        ([], "8*3=24", True),
        ([], "8*3=25", False),
        ([], "12+35=47", False),
        ([], "wait", False),
        (DONE[:1], "12+35=47", True),
        (DONE[:1], "wait", True),
        ([*DONE[:1], "wait"], "8*3=24", True),
        ([*DONE[:1], "wait"], "wait", False),
        (["8*3=24", "12+35=57"], "57-24=33", True),
        (["8*3=24", "12+35=57"], "47-24=23", False),
        (["8*3=24", "12+35=57", "wait"], "12+35=47", True),
        (DONE[:2], "</think>", False),
        (DONE, "</think>", True),
        (DONE, "check", True),
        ([*DONE, "check"], "8*3=24", True),
        ([*DONE, "check"], "</think>", False),
        (DONE, "47-24=23", False),
        (DONE, "nonsense", False),
    ],
)
def test_right_steps(lines, candidate, right):
    from tokenry.measure.tasks.steps import right_step

    assert right_step("12+35-8*3=", lines, candidate) is right


@pytest.mark.parametrize(
    ("lines", "stand"),
    [
        ("8*3=24 12+35=47 47-24=23 </think>", True),
        ("8*3=24 12+35=57", False),
        ("8*3=24 12+35=57 wait 12+35=47", True),
        ("8*3=24 12+35=57 57-24=33 wait 47-24=23", False),
        ("8*3=24 12+35=57 57-24=33 check 8*3=24 12+35=47", True),
        ("8*3=24 wait wait", False),
        ("8*3=24 </think>", False),
        ("", True),
    ],
)
def test_what_was_taken_back_counts_no_more(lines, stand):
    from tokenry.measure.tasks.steps import lines_stand

    assert lines_stand("12+35-8*3=", lines.split()) is stand


def test_right_steps_are_what_the_judge_is_taught():
    import random

    from tokenry.data.problems import Arithmetic
    from tokenry.measure.tasks.steps import right_step
    from tokenry.zoo.reasoner import judgment

    rng, task, scores = random.Random(0), Arithmetic(), []
    for i in range(400):
        problem = task.draw(1 + i % 6, rng)
        steps, score, _ = judgment(problem, rng)
        *lines, candidate = steps.split("\n")
        assert right_step(problem.question, lines, candidate) == (score == 9)
        scores.append(score)
    assert scores.count(0) > 100 < scores.count(9)


def test_the_experiment_compares_and_judges():
    from tokenry.evidence.specreason import PLAIN, Tried, build, choose
    from tokenry.measure.compare import compare

    method = decode.SpecReason(small=SMALL, prompts="lines", threshold=4.5)
    experiment = build(*BASE, samples=3, seeds=(0,), method=method)
    comparison = compare(experiment)
    assert [s.role for s in experiment.arms] == ["plain", *["control"] * 3, "method", "method"]
    assert comparison.mean("base alone", "small_tokens") == 0 == comparison.mean("small alone", "base_tokens")
    assert comparison.mean("small alone", "acceptance") == 1
    findings = experiment.findings(comparison)
    assert len(findings) == 6 and all(f.numbers for f in findings)
    (main,) = [f for f in findings if f.main]
    assert main.statement.startswith("judge asked for a digit") and main.check.number.what.endswith(
        "specreason of base alone"
    )
    assert [f.statement for f in findings if "judge by likelihood, which is ours" in f.statement and not f.main]
    assert findings[-1].check is None  # what is assumed of large models decides nothing
    assert "no step kept" in experiment.tried and "likelihood 4.5:" in experiment.tried
    settings = {s.name: s.setting.get("score_method") for s in experiment.arms}
    assert settings["specreason"] == "digits" and settings["judge by likelihood"] == "likelihood"
    tries = {("digits", t): Tried(accuracy, 50 + t, 0.5) for t, accuracy in enumerate((0.2, 0.5, 0.79, 0.8, 0.9, 0.7))}
    assert choose({**tries, PLAIN: Tried(0.8, 70, 0)}, "digits") == ("digits", 2)
    assert choose({**tries, PLAIN: Tried(0.95, 70, 0)}, "digits") == ("digits", 4)
    tries["likelihood", 1.0] = Tried(0.79, 40, 0.9)
    assert choose({**tries, PLAIN: Tried(0.8, 70, 0)}, "digits") == ("digits", 2)  # each judge for itself
    assert choose({**tries, PLAIN: Tried(0.8, 70, 0)}, "likelihood") == ("likelihood", 1.0)
    with pytest.raises(InputError, match="use --model zoo/reasoner"):
        build(*BASE, samples=1, method=decode.SpecReason(small=SMALL))
