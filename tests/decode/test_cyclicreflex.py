"""CyclicReflex, TIP and budget forcing: what must hold exactly, and what is refused."""

import warnings

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import TemperatureLogitsWarper
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

import tokenry.decode as decode
from tokenry import InputError, catalog
from tokenry.core.method import Method
from tokenry.decode.bans.phrases import start_tokens
from tokenry.decode.cyclicreflex import constant_schedule
from tokenry.decode.generation.sequence import SequenceState

V = 320
REFLECT = [70, 75, 80]
END = 5


def wave(t, A, C, s=0.0):
    """The piecewise definition, one position at a time."""
    u = ((t + s * C) % C) / C
    if u <= 0.25:
        return 4 * A * u
    if u <= 0.75:
        return A - 4 * A * (u - 0.25)
    return -A + 4 * A * (u - 0.75)


def ids_of(*rows):
    return torch.tensor(rows)


def prompts(*lengths):
    """Left-padded random prompts of these lengths, with their mask."""
    generator = torch.Generator().manual_seed(7)
    width = max(lengths)
    ids = torch.randint(2, V, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}


def run(model, inputs, tokens=40, **options):
    """Plain `generate`, never ending early."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)


class Recorder(LogitsProcessor):
    """Keeps every (ids, scores) that reach it."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


# --- the wave --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [600, 100, 7, 12.5, 601.25])
@pytest.mark.parametrize("s", [0.0, 0.3, 0.99])
def test_wave_equals_its_piecewise_definition(C, s):
    t = np.arange(3000)
    assert np.abs(decode.triangular_wave(t, 2.5, C, s) - [wave(x, 2.5, C, s) for x in t]).max() < 1e-9


def test_wave_equals_the_closed_form_of_the_paper():
    t, A, C = np.arange(5000), 3.0, 600
    closed = A * np.abs(4 * ((t - C / 4) % C) / C - 2) - A
    assert np.abs(decode.triangular_wave(t, A, C, 0.0) - closed).max() < 1e-9


def test_wave_at_the_quarters_and_over_a_period():
    assert decode.triangular_wave([0, 150, 300, 450, 600], 3, 600, 0).tolist() == [0, 3, 0, -3, 0]
    for C in (4, 100, 600):
        assert abs(decode.triangular_wave(np.arange(C), 5, C, 0.0).sum()) < 1e-9


def test_wave_broadcasts_in_numpy_and_torch():
    t, A = np.arange(50)[:, None], np.array([1.0, 2.0])
    expected = decode.triangular_wave(t, A, 12, 0.25)
    assert expected.shape == (50, 2)
    tensor = decode.triangular_wave(torch.tensor(t, dtype=torch.float64), torch.tensor(A), 12, 0.25)
    assert np.abs(tensor.numpy() - expected).max() < 1e-9


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"A": -1}, "amplitude"),
        ({"A": np.array([1.0, -1.0])}, "amplitude"),
        ({"A": float("nan")}, "amplitude"),
        ({"C": 0}, "period"),
        ({"C": -3.0}, "period"),
        ({"C": torch.tensor([1.0, float("inf")])}, "period"),
        ({"s": 1.0}, "shift"),
        ({"s": -0.1}, "shift"),
    ],
)
def test_wave_refuses(values, word):
    with pytest.raises(InputError, match=word):
        decode.triangular_wave(**{"t": 3, "A": 1.0, "C": 10, "s": 0.0, **values})


def test_a_constant_schedule():
    assert constant_schedule(2.0)(17) == 2.0


# --- one call --------------------------------------------------------------------------------------------------


def test_only_reflection_entries_change_and_not_in_place():
    scores = torch.randn(2, V)
    before = scores.clone()
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 3.0, 12, prompt_length=4)
    for t in range(1, 30):
        out = processor(torch.full((2, 4 + t), 9), scores)
        change = out - scores
        others = [i for i in range(V) if i not in REFLECT]
        assert torch.equal(out[:, others], scores[:, others])
        assert torch.allclose(change[:, REFLECT], torch.full((2, 3), wave(t, 3.0, 12)), atol=1e-6)
    assert torch.equal(scores, before)


def test_odds_multiply_by_exp_delta():
    scores = torch.randn(1, V, dtype=torch.float64).float()
    out = decode.CyclicReflectionLogitsProcessor(REFLECT, 2.0, 100, prompt_length=3)(torch.full((1, 20), 9), scores)
    p, q = scores.double().softmax(-1)[0], out.double().softmax(-1)[0]
    assert float((q[70] / q[9]) / (p[70] / p[9])) == pytest.approx(np.exp(wave(17, 2.0, 100)), rel=1e-5)


def test_half_precision_scores_give_float32():
    out = decode.CyclicReflectionLogitsProcessor(REFLECT, 3.0, 8, prompt_length=1)(
        torch.full((1, 3), 9), torch.zeros(1, V, dtype=torch.float16)
    )
    assert out.dtype == torch.float32 and float(out[0, 70]) == 3.0


def test_repeated_ids_get_the_bias_once():
    out = decode.CyclicReflectionLogitsProcessor([70, 70], 3.0, 8, prompt_length=1)(
        torch.full((1, 3), 9), torch.zeros(1, V)
    )
    assert float(out[0, 70]) == 3.0


def test_windows_are_half_open():
    processor = decode.CyclicReflectionLogitsProcessor(
        REFLECT, windows=[(2, 4), (6, 7)], prompt_length=1, schedule=constant_schedule(1)
    )
    on = [t for t in range(10) if float(processor(torch.full((1, 1 + t), 9), torch.zeros(1, V))[0, 70])]
    assert on == [2, 3, 6]


def test_after_the_end_mark_a_row_is_untouched_while_others_move():
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 3.0, 12, end_think_ids=[END, 6], prompt_length=3)
    ids = ids_of(
        [END, 6, 9, 9, END, 6, 9],  # ended in the generated part
        [END, 6, 9, 9, 9, 9, 9],  # the mark of the prompt does not count
        [9, 9, END, 6, 9, 9, 9],  # nor one that begins in the prompt
        [9, 9, 9, 9, 9, 9, END],  # half a mark
        [9, 9, 9, 6, END, 9, 6],  # not in a row
        [9, 9, 9, END, END, 6, 9],  # overlapping beginnings
    )
    scores = torch.zeros(6, V)
    moved = (processor(ids, scores)[:, 70] != 0).tolist()
    assert moved == [False, True, True, True, True, False]


def test_tip_counts_from_the_newest_switch_token():
    processor = decode.ThoughtSwitchPenaltyLogitsProcessor(REFLECT, alpha=3.0, beta=3)
    prompt = ids_of([9, 70], [9, 9])
    processor(prompt, torch.zeros(2, V))
    grown = prompt
    penalties = []
    for row0, row1 in [(9, 9), (9, 9), (75, 9), (9, 9), (9, 9), (9, 9)]:
        grown = torch.cat([grown, ids_of([row0], [row1])], 1)
        penalties.append(processor(grown, torch.zeros(2, V))[:, 70].tolist())
    assert [p[0] for p in penalties] == [-3, -3, -3, -3, 0, 0]  # the switch at 2 lasts while t < 2 + 3
    assert [p[1] for p in penalties] == [-3, -3, 0, 0, 0, 0]


def test_tip_without_reset_is_a_fixed_window():
    processor = decode.ThoughtSwitchPenaltyLogitsProcessor([70], alpha=2.0, beta=3, per_thought=False)
    processor.begin(2)
    got = [float(processor(torch.full((1, 2 + t), 70), torch.zeros(1, V))[0, 70]) for t in range(6)]
    # the loop announces two columns; the first call shows them
    assert got == [-2, -2, -2, 0, 0, 0]


# --- under plain generate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_neutral_settings_are_bit_identical(llama, tokenizer, do_sample):
    inputs = prompts(9, 5, 7)
    neutral = [
        decode.CyclicReflex(token_ids=REFLECT, amplitude=0, end_think=None).processor(),
        decode.ThoughtSwitchPenalty(token_ids=REFLECT, alpha=0, end_think=None).processor(),
        decode.ThoughtSwitchPenalty(token_ids=REFLECT, beta=0, end_think=None).processor(),
    ]

    def sample(**options):
        torch.manual_seed(3)
        return llama.generate(
            **inputs,
            max_new_tokens=30,
            do_sample=do_sample,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )

    plain, changed = sample(), sample(logits_processor=LogitsProcessorList(neutral))
    assert torch.equal(plain.sequences, changed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, changed.scores))
    forcing = decode.BudgetForcing(min_ignores=0).plugins(llama, tokenizer)
    assert not forcing.monitors


def test_batch_with_padding_equals_single_rows(llama):
    lengths = (9, 5, 7)
    batch = prompts(*lengths)
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=8, period=14, end_think=[END])
    together = run(llama, batch, logits_processor=[method.processor()])
    assert not torch.equal(together, run(llama, batch))
    for b, n in enumerate(lengths):
        single = {"input_ids": batch["input_ids"][b : b + 1, -n:]}
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        assert torch.equal(run(llama, single, logits_processor=[method.processor()])[0, n:], together[b, 9:])


def test_delta_comes_before_temperature():
    scores, ids = torch.randn(1, V), torch.full((1, 20), 9)
    chain = LogitsProcessorList(
        [decode.CyclicReflectionLogitsProcessor(REFLECT, 3.0, 24, prompt_length=14), TemperatureLogitsWarper(0.5)]
    )
    change = chain(ids, scores) - scores / 0.5
    assert float(change[0, 70]) == pytest.approx(3.0 / 0.5, abs=1e-5)


def test_generate_adds_delta_before_temperature(llama):
    inputs = prompts(6)
    torch.manual_seed(0)
    out = llama.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[decode.CyclicReflex(token_ids=REFLECT, amplitude=2, period=8, end_think=None).processor()],
    )
    for t, (scores, logits) in enumerate(zip(out.scores, out.logits)):
        expected = logits.clone()
        expected[:, REFLECT] += wave(t, 2, 8)
        assert torch.allclose(scores, expected / 0.5, atol=1e-4)


def test_every_generation_has_a_processor_of_its_own(llama):
    """A prompt that is no longer than the one before may follow with the same; a longer one is refused."""
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=8, period=14, end_think=None)
    first, second = prompts(9, 5), prompts(4)
    fresh = [run(llama, x, logits_processor=[method.processor()]) for x in (first, second)]
    assert method.processor() is not method.processor()
    processor = method.processor()
    for inputs, expected in zip((first, first, second, second), (fresh[0], fresh[0], fresh[1], fresh[1])):
        assert torch.equal(run(llama, inputs, logits_processor=[processor]), expected)
    with pytest.raises(InputError, match="9 columns do not go on from the call before, whose prompt had 4; make a new"):
        run(llama, first, logits_processor=[processor])
    # a prompt that goes on from the whole previous output
    longer = {"input_ids": torch.cat([fresh[1], ids_of([9, 9])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with pytest.raises(InputError, match="46 columns do not go on"):
        run(llama, longer, logits_processor=[processor])
    stated = method.processor(prompt_length=46)
    assert torch.equal(
        run(llama, longer, logits_processor=[stated]), run(llama, longer, logits_processor=[method.processor()])
    )


def test_another_text_of_the_next_width_is_refused():
    """Only rows of the call before go on, in any order."""
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 4.0, 16)
    processor(ids_of([9, 8], [7, 6]), torch.zeros(2, V))
    with pytest.warns(UserWarning, match="renormalize_logits"):
        out = processor(ids_of([7, 6, 5], [9, 8, 5]), torch.zeros(2, V))
    assert out[:, 70].tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="4 columns do not go on from the call before, whose prompt had 2"):
        processor(ids_of([7, 6, 5, 4], [9, 7, 5, 4]), torch.zeros(2, V))


def test_one_processor_in_the_loop_and_outside(llama):
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=8, period=14, end_think=None)
    first, second = prompts(9, 5), {k: v.flip(1) for k, v in prompts(12).items()}
    looped = method.processor()
    for inputs in (first, second, first):
        plain = run(llama, inputs, logits_processor=[method.processor()])
        assert torch.equal(run(llama, inputs, logits_processor=[looped], custom_generate=decode.loop), plain)
    assert torch.equal(run(llama, first, logits_processor=[looped]), plain)


def test_after_the_loop_has_ended_a_longer_prompt_is_a_new_one():
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 4.0, 16)
    processor.begin(3)
    prompt = torch.full((1, 3), 9)
    processor(prompt, torch.zeros(1, V))
    longer = torch.full((1, 7), 9)
    assert float(processor(longer, torch.zeros(1, V))[0, 70]) == 4.0  # forced tokens: still the same generation
    processor.end()
    assert float(processor(longer, torch.zeros(1, V))[0, 70]) == 0.0


def test_a_given_prompt_length_fixes_the_phase(llama):
    inputs = prompts(8)
    recorder = Recorder()
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 5.0, 20, prompt_length=3)
    out = run(
        llama,
        inputs,
        tokens=6,
        logits_processor=[recorder, processor],
        output_scores=True,
        return_dict_in_generate=True,
    )
    for step, (_, before) in enumerate(recorder.calls):
        assert float((out.scores[step] - before)[0, 70]) == pytest.approx(wave(step + 5, 5.0, 20), abs=1e-5)


def test_beams_keep_the_phase_and_warn(llama):
    recorder = Recorder()
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=3, period=16, end_think=None)
    seen = []

    class After(LogitsProcessor):
        def __call__(self, input_ids, scores):
            before = recorder.calls[-1][1]
            seen.append((scores - before)[:, 70])
            return scores

    with pytest.warns(UserWarning, match="renormalize_logits"):
        run(llama, prompts(6, 4), tokens=24, num_beams=3, logits_processor=[recorder, method.processor(), After()])
    for t, change in enumerate(seen):
        # where a score is -inf the difference is nan
        assert torch.allclose(change[~change.isnan()], torch.tensor(wave(t, 3, 16)), atol=1e-4)


def test_assisted_decoding_equals_plain_where_the_prompt_length_is_stated(llama, make_model):
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=8, period=14, end_think=None)
    inputs, options = prompts(6), {"assistant_model": make_model("qwen2")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assisted = run(llama, inputs, logits_processor=[method.processor(prompt_length=6)], **options)
        with pytest.raises(InputError, match="give prompt_length for assisted decoding"):
            run(llama, inputs, logits_processor=[method.processor()], **options)
    assert torch.equal(assisted, run(llama, inputs, logits_processor=[method.processor()]))


def test_methods_compare_by_their_parameters_and_hold_no_state():
    first, second = (decode.CyclicReflex(token_ids=REFLECT, end_think=None) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    first.processor()(torch.full((1, 4), 9), torch.zeros(1, V))
    assert first == second and not first.__pydantic_private__
    louder = first.model_copy(update={"amplitude": 8.0, "period": 4.0}).processor()
    for ids in (torch.full((1, 4), 9), torch.full((1, 5), 9)):
        out = louder(ids, torch.zeros(1, V))
    assert float(out[0, 70]) == 8.0


# --- in the decode loop ----------------------------------------------------------------------------------------


def brute_force(model, prompt, tokens, bans, method_bias):
    """The sequence without cache, rewinds or processors: bans by position are given."""
    ids = prompt
    with torch.no_grad():
        for t in range(tokens):
            scores = model(ids).logits[:, -1].float()
            scores[:, REFLECT] += method_bias(t, ids[0, prompt.shape[1] :].tolist())
            for token in bans.get(t, ()):
                scores[:, token] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


def tip_bias(alpha, beta):
    def bias(t, generated):
        start = max([i for i, x in enumerate(generated) if x in REFLECT], default=0)
        return -alpha if t < start + beta else 0.0

    return bias


CASES = [
    (decode.CyclicReflex(token_ids=REFLECT, amplitude=9, period=14, end_think=None), lambda t, g: wave(t, 9, 14)),
    (decode.ThoughtSwitchPenalty(token_ids=REFLECT, alpha=6, beta=5, end_think=None), tip_bias(6, 5)),
]


class RewindAt:
    """When the row first has `length` tokens, goes back `count` of them and bans the token there."""

    def __init__(self, plan):
        self.plan = dict(plan)

    def check(self, row):
        count = self.plan.pop(len(row.ids), None)
        if count is None:
            return None
        index = len(row.ids) - count
        return decode.Violation(index, "rewind", {row.ids[index]: 0.0})

    def hold(self, row):
        return None


@pytest.mark.parametrize(("method", "bias"), CASES)
@pytest.mark.parametrize("plan", [{12: 1, 25: 1}, {9: 3, 20: 8, 21: 2, 33: 16}])
def test_rewinds_keep_the_phase(llama, tokenizer, method, bias, plan):
    inputs = prompts(6)
    out = run(
        llama,
        inputs,
        logits_processor=[method.processor()],
        custom_generate=decode.loop,
        monitors=[RewindAt(plan)],
        processing_class=tokenizer,
        return_dict_in_generate=True,
    )
    assert [e.index for e in out.events] == [length - count for length, count in plan.items()]
    expected = brute_force(llama, inputs["input_ids"], 40, bans_of(out.events), bias)
    assert torch.equal(out.sequences, expected)


def bans_of(events, also=lambda event: ()):
    """Banned tokens by position; a rewind forgets the bans further on."""
    bans = {}
    for event in events:
        bans = {t: tokens for t, tokens in bans.items() if t <= event.index}
        bans.setdefault(event.index, []).extend([event.rejected[0], *also(event)])
    return bans


@pytest.mark.parametrize(("method", "bias"), CASES)
def test_phrase_bans_in_a_batch_equal_brute_force(llama, tokenizer, method, bias):
    inputs = prompts(9, 5, 7)
    plain = run(llama, inputs, logits_processor=[method.processor()])
    phrases = [text for row in plain[:, 9:] if (text := tokenizer.decode(row[12:15]).strip()) and "\ufffd" not in text]
    out = run(
        llama,
        inputs,
        logits_processor=[method.processor()],
        monitors=[decode.PhraseBan(phrases)],
        custom_generate=decode.loop,
        processing_class=tokenizer,
        return_dict_in_generate=True,
    )
    assert out.events
    for b, n in enumerate((9, 5, 7)):
        events = [e for e in out.events if e.row == b and e.kind == "rewind"]
        bans = bans_of(events, lambda event: start_tokens(tokenizer, event.rule.removeprefix("phrase:")))
        expected = brute_force(llama, inputs["input_ids"][b : b + 1, -n:], 40, bans, bias)
        assert torch.equal(out.sequences[b, 9:], expected[0, n:])


def test_the_loop_calls_with_single_rows(llama, tokenizer):
    """After rewinds rows come one by one and of unequal length; the position is each row's own."""
    processor = decode.CyclicReflectionLogitsProcessor(REFLECT, 4.0, 16)
    processor.begin(3)
    prompt = ids_of([9, 8, 7], [1, 2, 3])
    processor(prompt, torch.zeros(2, V))
    for row, t in [(0, 5), (1, 9), (0, 2), (1, 10), (0, 14)]:
        ids = torch.cat([prompt[row : row + 1], torch.full((1, t), 9)], 1)
        assert float(processor(ids, torch.zeros(1, V))[0, 70]) == pytest.approx(wave(t, 4.0, 16), abs=1e-6)


def test_text_in_and_out(smollm2):
    model, tokenizer = smollm2
    method = decode.CyclicReflex(words=[" but", " and"], amplitude=20, period=16, end_think="none")
    out = decode.generate(model, tokenizer, "Describe a harbour.", methods=[method], max_new_tokens=24)
    inputs = decode.encode_prompts(tokenizer, ["Describe a harbour."])
    ready = method.processor(tokenizer)
    same = model.generate(**inputs, max_new_tokens=24, do_sample=False, logits_processor=[ready])
    assert torch.equal(out.sequences, same)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert not torch.equal(plain[:, : same.shape[1]], same[:, : plain.shape[1]])


# --- budget forcing --------------------------------------------------------------------------------------------


class Script(LogitsProcessor):
    """Makes the model say `mark`, token by token, whenever `say(generated ids)`; bans its ids otherwise."""

    def __init__(self, mark, say, prompt):
        self.mark, self.say, self.prompt = mark, say, prompt

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for b, row in enumerate(input_ids[:, self.prompt :].tolist()):
            begun = next((k for k in range(len(self.mark) - 1, 0, -1) if row[-k:] == self.mark[:k]), 0)
            scores[b, self.mark] = -torch.inf
            scores[b, 0] = -torch.inf
            if begun or self.say(row):
                scores[b, self.mark[begun]] = 1000.0
        return scores


def forced(model, tokenizer, mark, say, tokens=60, batch=1, streamers=(), extra=(), **values):
    """Budget forcing on a model that wants to stop thinking whenever `say(row)`."""
    inputs = prompts(*range(6, 6 + batch))
    monitor = decode.BudgetForcingMonitor(mark, tokenizer, **values)
    return llama_ids(
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            custom_generate=decode.loop,
            logits_processor=[Script(mark, say, inputs["input_ids"].shape[1])],
            monitors=[monitor, *extra],
            processing_class=tokenizer,
            token_streamers=streamers,
            return_dict_in_generate=True,
        ),
        inputs,
    )


def llama_ids(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), out


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def count(ids, mark):
    return sum(ids[i : i + len(mark)] == mark for i in range(len(ids)))


MARKS = [[END], [END, 6, 7]]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("ignores", [0, 1, 3])
def test_the_end_of_thinking_is_ignored_so_often(llama, tokenizer, mark, ignores):
    wait = encode(tokenizer, "Wait")

    def say(row):
        return len(row) % 9 == 8 and not count(row, mark)

    ids, out = forced(llama, tokenizer, mark, say, min_ignores=ignores)
    assert count(ids[0], wait) == ignores and count(ids[0], mark) == 1
    assert len(out.events) == ignores and len(ids[0]) == 60
    for event in out.events:
        assert event.rejected == mark and event.replacement == wait
    # what stands before the first end is the plain text
    plain, _ = forced(llama, tokenizer, mark, say, min_ignores=0)
    assert ids[0][:8] == plain[0][:8]


@pytest.mark.parametrize("mark", MARKS)
def test_a_new_token_follows_every_ignored_end(llama, tokenizer, mark):
    """A model that always wants to stop says one other token after each 'Wait'."""
    wait = encode(tokenizer, "Wait")
    ids, out = forced(llama, tokenizer, mark, lambda row: len(row) >= 4 and not count(row, mark), min_ignores=2)
    first = 4
    for _ in range(2):
        assert ids[0][first : first + len(wait)] == wait
        assert ids[0][first + len(wait)] not in mark
        first += len(wait) + 1
    assert ids[0][first : first + len(mark)] == mark
    assert {e.rule for e in out.events} == {"budget:ignore", "budget:again"}


def test_the_end_of_text_may_be_the_end_of_thinking(llama, tokenizer):
    wait = encode(tokenizer, "Wait")
    ids, _ = forced(llama, tokenizer, [0], lambda row: len(row) % 10 == 9, min_ignores=2)
    assert count(ids[0], wait) == 2 and ids[0][-1] == 0 and ids[0].count(0) == 1 and len(ids[0]) < 60


@pytest.mark.parametrize("mark", MARKS)
def test_thinking_is_closed_at_the_limit(llama, tokenizer, mark):
    close, newline = encode(tokenizer, "=END=\nFinal:"), encode(tokenizer, "\n")
    ids, out = forced(llama, tokenizer, mark, lambda row: False, max_thinking_tokens=20, close_text="=END=\nFinal:")
    cut = [] if tokenizer.decode(ids[0][:20]).endswith("\n") else newline
    assert ids[0][20 : 20 + len(cut + close)] == cut + close
    assert [e.rule for e in out.events] == ["budget:close"] and len(ids[0]) == 60


def test_a_limit_that_falls_on_a_line_end_adds_no_newline(llama, tokenizer):
    newline = encode(tokenizer, "\n")
    close = encode(tokenizer, "=END=")
    ids, _ = forced(
        llama, tokenizer, newline, lambda row: len(row) == 19, max_thinking_tokens=30, close_text="=END=", min_ignores=0
    )
    assert ids[0][19:20] == newline and not count(ids[0], close)  # here the newline itself ends thinking
    monitor = decode.BudgetForcingMonitor([END], tokenizer, max_thinking_tokens=3, close_text="=END=")
    row = SequenceState(0, [9], tokenizer)
    for token in [40, 41, *newline]:
        row.append(token)
    assert list(monitor.check(row).force) == close


def test_a_mark_begun_at_the_limit_is_replaced(llama, tokenizer):
    mark, close = MARKS[1], encode(tokenizer, "=END=")
    ids, _ = forced(llama, tokenizer, mark, lambda row: len(row) == 18, max_thinking_tokens=20, close_text="=END=")
    newline = encode(tokenizer, "\n")
    assert ids[0][18 : 18 + len(newline + close)] == newline + close


def test_the_budget_never_goes_below_zero(llama, tokenizer):
    """Ends are ignored while the text and one new token fit; thinking never passes the limit."""
    wait = encode(tokenizer, "Wait")
    for limit in range(8, 24):
        ids, out = forced(
            llama,
            tokenizer,
            [END],
            lambda row: len(row) >= 6 and END not in row,
            min_ignores=50,
            max_thinking_tokens=limit,
            close_text="=",
        )
        closed = [e for e in out.events if e.rule == "budget:close"]
        end = closed[0].index if closed else ids[0].index(END)
        assert end <= limit
        ignored = [e.index for e in out.events if e.rule == "budget:ignore"]
        assert all(index + len(wait) < limit for index in ignored)


def test_thinking_that_ended_by_itself_is_left_alone(llama, tokenizer):
    ids, out = forced(
        llama, tokenizer, [END], lambda row: len(row) == 10 or len(row) == 30, min_ignores=0, max_thinking_tokens=20
    )
    assert ids[0][10] == END and ids[0][30] == END and not out.events


def test_batch_rows_equal_single_rows(llama, tokenizer):
    def say(row):
        return len(row) % 7 == 6 and END not in row and sum(row) % 3 == 0

    values = {"min_ignores": 2, "max_thinking_tokens": 30, "close_text": "=END="}
    ids, out = forced(llama, tokenizer, [END], say, batch=3, **values)
    assert {e.row for e in out.events} == {0, 1, 2}
    batch = prompts(6, 7, 8)
    for b, n in enumerate((6, 7, 8)):
        single = {"input_ids": batch["input_ids"][b : b + 1, -n:]}
        one = llama.generate(
            **single,
            attention_mask=torch.ones_like(single["input_ids"]),
            max_new_tokens=60,
            do_sample=False,
            custom_generate=decode.loop,
            logits_processor=[Script([END], say, n)],
            monitors=[decode.BudgetForcingMonitor([END], tokenizer, **values)],
            processing_class=tokenizer,
        )[0, n:].tolist()
        assert one == ids[b][: len(one)]


class Collect:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mark", MARKS)
def test_streamed_tokens_are_the_final_ones(llama, tokenizer, mark):
    streamers = [Collect(), Collect()]

    def say(row):
        return len(row) % 9 == 8 and not count(row, mark)

    ids, out = forced(
        llama,
        tokenizer,
        mark,
        say,
        batch=2,
        streamers=streamers,
        min_ignores=2,
        max_thinking_tokens=40,
        close_text="=END=",
    )
    assert out.events
    for row, streamer in zip(ids, streamers):
        shown = [token for piece in streamer.pieces[1:] for token in piece]
        assert streamer.ended and shown == row[: len(shown)] and len(shown) >= len(row) - 10


def test_with_a_wave_and_phrase_bans(llama, tokenizer):
    """The forced text is kept by other monitors, and the wave sees the row's live length."""
    recorder = Recorder()
    inputs = prompts(6)
    out = llama.generate(
        **inputs,
        max_new_tokens=50,
        do_sample=False,
        custom_generate=decode.loop,
        logits_processor=[
            recorder,
            decode.CyclicReflex(token_ids=REFLECT, amplitude=5, period=14, end_think=None).processor(),
            Script([END], lambda row: len(row) % 11 == 10 and END not in row, 6),
        ],
        monitors=[
            decode.BudgetForcingMonitor([END], tokenizer, min_ignores=2),
            decode.PhraseBan(["Wait"]),
        ],
        processing_class=tokenizer,
        return_dict_in_generate=True,
    )
    assert count(out.sequences[0, 6:].tolist(), encode(tokenizer, "Wait")) == 2
    assert any(e.kind == "given up" for e in out.events)


def test_the_method_with_a_real_vocabulary(smollm2):
    model, tokenizer = smollm2
    method = decode.BudgetForcing(end_think="<|im_end|>", min_ignores=1, max_thinking_tokens=30, close_text="Answer:")
    out = decode.generate(model, tokenizer, "What is 2+2?", methods=[method], max_new_tokens=45)
    assert "4.Wait" in out.texts[0] and [e.rule for e in out.events] == ["budget:ignore", "budget:close"]
    assert "\nAnswer:" in out.texts[0]


# --- tokens ----------------------------------------------------------------------------------------------------


def test_reflection_ids_round_trip(smollm2):
    tokenizer = smollm2.tokenizer
    ids = decode.reflection_token_ids(tokenizer)
    assert ids == [14006, 5847, 33359, 22297, 5476, 564, 2596, 1249, 40714, 18199]
    assert decode.reflection_token_ids(tokenizer, leading_space=False) == [14006, 33359, 5476, 2596, 40714]
    assert decode.reflection_token_ids(tokenizer, [" but", " However", " and"]) == [564, 1423, 284]
    assert decode.reflection_token_ids(tokenizer, ["but", " but"]) == [5476, 564]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wait", "Hmm"], r"'Hmm' is not one token here but 'H' \+ 'mm'"),
        (["haha"], "not one token"),
        ([], "at least one word"),
        (["wait", " "], "at least one word"),
    ],
)
def test_reflection_ids_refuse(smollm2, words, message):
    with pytest.raises(InputError, match=message):
        decode.reflection_token_ids(smollm2.tokenizer, words)


def test_a_word_that_is_unknown_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "wait": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    assert decode.reflection_token_ids(words, ["wait"], leading_space=False) == [1]
    with pytest.raises(InputError, match=r"'but' is not one token here but '\[UNK\]'"):
        decode.reflection_token_ids(words, ["but"], leading_space=False)
    with pytest.raises(InputError, match="leading_space=False"):
        decode.reflection_token_ids(words, ["wait"])


def test_the_end_mark_must_be_in_the_vocabulary(smollm2, tokenizer):
    model, real = smollm2
    for make in (decode.CyclicReflex, decode.ThoughtSwitchPenalty):
        with pytest.raises(InputError, match=r"'</think>' is not in this vocabulary .*'</' \+ 'think' \+ '>'"):
            make().processor(real)
        with pytest.raises(InputError, match="end_think=none"):
            make().plugins(model, real)
        assert make(end_think=None).plugins(model, real).processors[0].end_think_ids is None
        assert make.from_strings(["end_think=none"]).end_think is None
        assert make(end_think=[3, 4]).plugins(model, real).processors[0].end_think_ids == (3, 4)
    with pytest.raises(InputError, match="not in this vocabulary"):
        decode.BudgetForcing().plugins(model, real)


def test_an_added_end_mark_is_one_id(smollm2):
    from copy import deepcopy

    tokenizer = deepcopy(smollm2.tokenizer)
    tokenizer.add_tokens([AddedToken("</think>", special=False)])
    processor = decode.CyclicReflex().processor(tokenizer)
    assert processor.end_think_ids == (len(tokenizer) - 1,)
    monitor = decode.BudgetForcing().plugins(smollm2.model, tokenizer).monitors[0]
    assert monitor.end_ids == [len(tokenizer) - 1] and monitor.close_ids[0] == len(tokenizer) - 1


# --- parameters and refusals -----------------------------------------------------------------------------------


def test_the_catalogue_finds_the_three():
    for slug in ("cyclicreflex", "tip", "budget-forcing"):
        method = catalog.load(slug)
        assert issubclass(method, Method) and method.slug == slug and method.stage == "decode"
        assert all(option.description for option in method.options())


def test_defaults_are_those_of_the_papers():
    wave_, tip = decode.CyclicReflex(), decode.ThoughtSwitchPenalty()
    assert (wave_.amplitude, wave_.period, wave_.shift, wave_.windows, wave_.end_think) == (3, 600, 0, None, "</think>")
    assert wave_.words == ("wait", "Wait", "but", "But", "Alternatively") == tip.words
    assert (tip.alpha, tip.beta, tip.per_thought) == (3, 600, True)
    forcing = decode.BudgetForcing()
    assert (forcing.min_ignores, forcing.ignore_text, forcing.max_thinking_tokens) == (1, "Wait", None)


def test_options_from_the_command_line():
    method = decode.CyclicReflex.from_strings(
        ["amplitude=2", "windows=0:8192, 9000:9500", "token_ids=564, 284", "end_think=12,34", "leading_space=false"]
    )
    assert method.windows == ((0, 8192), (9000, 9500)) and method.token_ids == (564, 284)
    assert method.end_think == (12, 34) and method.leading_space is False and method.amplitude == 2
    assert decode.CyclicReflex.from_strings(["windows=none", 'words=[" but", " and"]']).words == (" but", " and")
    assert decode.CyclicReflex.from_strings(["token_ids=564"]).token_ids == (564,)
    assert decode.BudgetForcing.from_strings(["max_thinking_tokens=none"]).max_thinking_tokens is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"amplitude": -1}, r"amplitude=-1 .*in \[0, "),
        ({"amplitude": float("inf")}, "amplitude"),
        ({"period": 0}, r"period=0 .*in \[0.01, "),
        ({"shift": 1}, r"shift=1 .*\[0, 1\)"),
        ({"windows": [(5, 5)]}, "not a range"),
        ({"windows": [(8, 2)]}, "not a range"),
        ({"windows": [(-1, 2)]}, "not a range"),
        ({"windows": [(4, 9), (0, 5)]}, "overlap"),
        ({"windows": []}, "windows is empty"),
        ({"windows": "0-10"}, "START:END"),
        ({"words": []}, "at least one word"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [-4]}, r"token_ids=-4 .*numbers in \[0, "),
        ({"end_think": []}, "end_think is empty"),
        ({"color": 3}, "no option 'color'"),
    ],
)
def test_cyclicreflex_refuses(values, message):
    with pytest.raises(InputError, match=message):
        decode.CyclicReflex(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [-1]}, "token_ids has -1"),
        ({"amplitude": -1}, "amplitude=-1"),
        ({"period": 0}, "period=0"),
        ({"shift": 1.0}, "shift=1.0"),
        ({"windows": [(3, 1)]}, "not a range"),
        ({"windows": [(0, 4), (3, 6)]}, "overlap"),
        ({"end_think_ids": []}, "end_think_ids is empty"),
        ({"prompt_length": 0}, "prompt_length=0"),
    ],
)
def test_the_processor_refuses(values, message):
    with pytest.raises(InputError, match=message):
        decode.CyclicReflectionLogitsProcessor(**{"token_ids": REFLECT, **values})


@pytest.mark.parametrize("values", [{"alpha": -1}, {"beta": -1}, {"alpha": float("nan")}])
def test_tip_refuses(values):
    with pytest.raises(InputError):
        decode.ThoughtSwitchPenalty(**values)
    with pytest.raises(InputError, match=f"{next(iter(values))}="):
        decode.ThoughtSwitchPenaltyLogitsProcessor(REFLECT, **values)


def test_an_id_outside_the_vocabulary_is_refused():
    for processor in (
        decode.CyclicReflectionLogitsProcessor([V], amplitude=0),
        decode.ThoughtSwitchPenaltyLogitsProcessor([V]),
    ):
        with pytest.raises(InputError, match=f"token id {V} is outside the model's vocabulary of {V}"):
            processor(torch.full((1, 3), 9), torch.zeros(1, V))


def test_a_prompt_length_beyond_the_ids_is_refused():
    with pytest.raises(InputError, match="prompt_length=9 is more than the 4"):
        decode.CyclicReflectionLogitsProcessor(REFLECT, prompt_length=9)(torch.full((1, 4), 9), torch.zeros(1, V))


@pytest.mark.parametrize("method", [decode.CyclicReflex(), decode.CyclicReflex(token_ids=REFLECT)])
def test_a_processor_of_words_needs_the_tokenizer(method):
    with pytest.raises(InputError, match=r"CyclicReflex\(...\).processor\(tokenizer\)"):
        method.processor()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"end_ids": []}, "end_ids is empty"),
        ({"min_ignores": -1}, "min_ignores=-1"),
        ({"max_thinking_tokens": 0}, "max_thinking_tokens=0"),
        ({"ignore_text": ""}, "ignore_text='' has no token"),
        ({"close_text": "", "max_thinking_tokens": 5}, "close_text='' has no token"),
        ({"ignore_text": "<eos>", "end_ids": [0]}, "ends thinking itself"),
    ],
)
def test_budget_forcing_refuses(tokenizer, values, message):
    with pytest.raises(InputError, match=message):
        decode.BudgetForcingMonitor(**{"end_ids": [END], "tokenizer": tokenizer, **values})


@pytest.mark.parametrize("values", [{"min_ignores": -1}, {"max_thinking_tokens": 0}, {"end_think": None}])
def test_the_budget_method_refuses(values):
    with pytest.raises(InputError, match=next(iter(values))):
        decode.BudgetForcing(**values)


# --- the experiment --------------------------------------------------------------------------------------------


def test_the_experiment_counts_by_phase(llama, tokenizer):
    from tokenry.evidence.cyclicreflex import build, phase_counts
    from tokenry.measure.compare import compare

    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=4, period=16)
    experiment = build(llama, tokenizer, samples=2, seeds=(0, 1), method=decode.CyclicReflex(**dict(method)))
    assert experiment.task.wave(2.0) == pytest.approx([np.exp(wave(t, 2.0, 16)) for t in range(16)])
    with pytest.raises(InputError, match="end_think"):
        compare(experiment)  # this tokenizer has no </think>
    method = decode.CyclicReflex(token_ids=REFLECT, amplitude=4, period=16, end_think=None)
    experiment = build(llama, tokenizer, samples=2, seeds=(0, 1), method=method)
    comparison = compare(experiment)
    assert [s.role for s in experiment.arms] == ["plain", "control", "control", "control", "method"]
    counts = phase_counts(comparison, "cyclicreflex")
    assert counts.shape == (2, 2, 16) and counts[:, 1].sum() == comparison.values("cyclicreflex", "tokens").sum() * 2
    assert counts[:, 0].sum() > 0 and comparison.mean("cyclicreflex", "rate_top") > 0
    assert experiment.arms[1].setting["bias"] == pytest.approx(4, abs=0.01)
    findings = experiment.findings(comparison)
    assert len(findings) == 4 and all(f.numbers for f in findings)


def test_the_prompts_are_twenty_different_ones():
    from tokenry.measure.tasks.reflection import REFLECTION_PROMPTS

    assert len(set(REFLECTION_PROMPTS)) == 20


def test_forced_text_keeps_to_the_limit_of_new_tokens(llama, tokenizer):
    """The closing text is cut where max_new_tokens ends."""
    monitor = decode.BudgetForcingMonitor(
        [END], tokenizer, min_ignores=0, max_thinking_tokens=8, close_text="the end of it all"
    )
    out = llama.generate(
        tokenizer("the old", return_tensors="pt")["input_ids"],
        custom_generate=decode.loop,
        monitors=[monitor],
        processing_class=tokenizer,
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=1,
        return_dict_in_generate=True,
    )
    assert len(out.new_ids[0]) == 10
    (event,) = [e for e in out.events if e.rule == "budget:close"]
    assert out.new_ids[0][8:] == event.replacement
