"""DiffAdapt: entropy and labels, the probe, strategies in one batch, and the loop on a cache that is filled already."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tokenry import InputError, generate
from tokenry.cli import main
from tokenry.data.problems import Arithmetic, draw_problems, split_of
from tokenry.decode import CyclicReflex, PhraseBan, Spectr, TransformersEngine, Violation, encode_prompts, loop
from tokenry.decode.diffadapt import DiffAdapt, TemperatureByRow, generate_by_strategy, oracle_strategy
from tokenry.decode.generation.sampler import row_seed
from tokenry.decode.generation.sequence import SequenceState
from tokenry.decode.reasoning.strategies import DEFAULT_STRATEGIES, Strategy
from tokenry.evidence import diffadapt as experiment
from tokenry.learned.difficulty_probe import CLASSES, DifficultyProbe, read_questions
from tokenry.measure.claims import verdict
from tokenry.measure.compare import compare
from tokenry.measure.experiment import Experiment
from tokenry.measure.task import Arm
from tokenry.measure.tasks.difficulty import Answer, DifficultyTask
from tokenry.models.anatomy import decoder_layers
from tokenry.models.prompts import prompt_ids, question_ids
from tokenry.read.difficulty_probe import (
    DifficultyProbeMethod,
    label_by_entropy,
    question_states,
)
from tokenry.read.samples.entropy import EntropyProfile, entropy_profile, token_entropy
from tokenry.read.samples.problems import problems_in, sums

QUESTIONS = ["the old lighthouse", "Elara walked along the shore and the wind", "was it a dream", "the sea"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}.{% endfor %} a:"
STRATEGIES = (
    Strategy("easy", " was a whisper", 0.5, 0.4),
    Strategy("normal", "", 0.8, 1.0),
    Strategy("hard", " listen", 0.4, 0.5),
)
ALIKE = tuple(Strategy(name, "", 0.7, 0.5) for name in CLASSES)
REFLECT = [70, 75, 80]


@pytest.fixture(scope="module")
def chat(tokenizer):
    """The tokenizer with a chat template: something follows the question."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def probe(llama, chat):
    """A probe that has learned the questions by heart: easy, normal, hard, easy."""
    states = question_states(llama, chat, QUESTIONS)
    found = DifficultyProbe(32, 16).fit(states, [0, 1, 2, 0], learning_rate=0.05, held_out=0)
    return found.bind(llama, chat)


def constant(favored):
    """A probe that always favors one class."""
    found = DifficultyProbe(32, 8)
    with torch.no_grad():
        found.layers[-1].weight.zero_()
        found.layers[-1].bias.copy_(torch.eye(3)[favored])
    return found


def whole_prompt(tokenizer, question, suffix=""):
    return tokenizer.encode(f"u:{question}{suffix}. a:")


class BanRepeat:
    """Rejects the token `reach` places back when sums of ids fall in a residue class."""

    def __init__(self, modulus=5, reach=3):
        self.modulus, self.reach = modulus, reach

    def check(self, row):
        for index in range(len(row.ids) - self.reach):
            if sum(row.ids[index : index + self.reach + 1]) % self.modulus == 0 and (index, "sum") not in row.ignored:
                return Violation(index, "sum", {row.ids[index]: 0.0}, retries=5)
        return None

    def hold(self, row):
        return self.reach + 1


class Collect:
    """A streamer that remembers what came after the prompt."""

    def __init__(self):
        self.prompt, self.tokens, self.ended = None, [], False

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.tokens += value.tolist()

    def end(self):
        self.ended = True


# --- entropy and labels ----------------------------------------------------------------------------------------------


def test_entropy_closed_forms():
    uniform, certain = torch.zeros(1, 4, 50), torch.full((1, 4, 50), -torch.inf)
    certain[..., 7] = 0
    mask = torch.ones(1, 4)
    assert token_entropy(uniform, mask).item() == pytest.approx(math.log(50), abs=1e-6)
    assert token_entropy(certain, mask).item() == 0
    p = torch.tensor([0.5, 0.25, 0.25])
    assert token_entropy(p.log()[None, None], mask[:, :1]).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_padding_does_not_enter_the_mean():
    logits = torch.randn(2, 6, 30)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    short = token_entropy(logits[:1, :3], torch.ones(1, 3))
    poisoned = logits.clone()
    poisoned[0, 3:] = float("nan")
    assert torch.allclose(token_entropy(poisoned, mask)[0], short[0])
    with pytest.raises(InputError, match="row 1 has no token"):
        token_entropy(logits, torch.tensor([[1] * 6, [0] * 6]))


@pytest.mark.parametrize(
    ("entropy", "correctness", "label"),
    [
        (0.2, 1.0, "normal"),
        (0.5, 0.7, "normal"),  # both limits belong to normal
        (0.51, 1.0, "easy"),
        (0.51, 0.7, "easy"),
        (0.2, 0.69, "easy"),
        (0.2, 0.3, "easy"),  # gamma does not belong to hard
        (0.2, 0.29, "hard"),
        (2.0, 0.0, "hard"),
    ],
)
def test_labels_by_hand(entropy, correctness, label):
    assert CLASSES[label_by_entropy([entropy], [correctness], 0.7, 0.5, 0.3)[0]] == label


@given(
    points=st.lists(st.tuples(st.floats(0, 5), st.floats(0, 1)), min_size=1, max_size=30),
    limits=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    beta=st.none() | st.floats(0, 5),
)
def test_labels_are_a_partition(points, limits, beta):
    gamma, alpha = sorted(limits)
    e, r = np.array(points).T
    labels = label_by_entropy(e, r, alpha, beta, gamma)
    limit = np.percentile(e[r >= alpha], 60) if beta is None and (r >= alpha).any() else beta
    normal = (r >= alpha) & (e <= limit) if limit is not None else np.zeros(len(e), bool)
    hard = (r < gamma) & ~normal
    assert ((labels == 1) == normal).all() and ((labels == 2) == hard).all() and set(labels) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([0.1], [0.5], 0.2, 1.0, 0.4), "alpha=0.2, gamma=0.4"),
        (([0.1], [0.5], 1.2, 1.0, 0.4), "alpha=1.2"),
        (([float("nan")], [0.5]), "finite"),
        (([0.1, 0.2], [0.5]), "as many"),
    ],
)
def test_labels_refuse(values, message):
    with pytest.raises(InputError, match=message):
        label_by_entropy(*values)


# --- the profile -----------------------------------------------------------------------------------------------------


def test_profile_equals_forwards_without_cache(llama, chat, monkeypatch):
    """Entropy of every sample, computed again from its text; truncation and temperature do not enter."""
    texts, ends = {}, set(range(40))
    monkeypatch.setattr(llama.generation_config, "eos_token_id", list(ends))

    def is_correct(index, text):
        texts.setdefault(index, []).append(text)
        return len(text) % 2 == 0

    options = {"max_new_tokens": 12, "n_samples": 3, "seed": 5}
    found = entropy_profile(llama, chat, QUESTIONS, is_correct, **options)
    assert {i: len(t) for i, t in texts.items()} == dict.fromkeys(range(4), 3)
    inputs = chat.pad({"input_ids": [whole_prompt(chat, q) for q in QUESTIONS]}, return_tensors="pt")
    torch.manual_seed(5)
    samples = llama.generate(
        **inputs, do_sample=True, temperature=0.8, top_k=0, num_return_sequences=3, max_new_tokens=12, pad_token_id=1
    )
    width = inputs["input_ids"].shape[1]
    means, right = [], []
    for b, row in enumerate(samples):
        new = row[width:].tolist()
        last = next((i for i, token in enumerate(new) if token in ends), None)
        new = new if last is None else new[: last + 1]
        right.append(last is not None and len(texts[b // 3][b % 3]) % 2 == 0)  # cut off is wrong
        ids = torch.tensor([whole_prompt(chat, QUESTIONS[b // 3]) + new])
        with torch.no_grad():
            p = llama(ids).logits[0, -len(new) - 1 : -1].double().softmax(-1)
        means.append(float(-(p * p.log()).sum(-1).mean()))
        assert chat.decode(new, skip_special_tokens=True) == texts[b // 3][b % 3]
    expected = np.array(means).reshape(4, 3).mean(1)
    assert np.abs(found.entropy - expected).max() < 1e-4
    assert found.correctness == pytest.approx(np.array(right).reshape(4, 3).mean(1)) and any(right)


def test_profile_by_level():
    profile = EntropyProfile(np.array([0.4, 0.6, 0.1, 0.3]), np.array([1, 0.5, 1, 0]), np.array([10.0, 20, 30, 50]))
    levels = profile.levels([1, 1, 2, 2])
    assert levels[1].entropy == pytest.approx(0.5) and levels[2].entropy == pytest.approx(0.2)
    assert levels[2].correctness == 0.5 and levels[2].tokens == 40 and levels[1].questions == 2
    assert [row["level"] for row in profile.reading([1, 1, 2, 2]).rows] == [1, 2]
    bars = list(profile.plot([1, 1, 2, 2]).columns[-1].cells)
    assert bars[0].count("█") == 24 and bars[1].count("█") == 10
    with pytest.raises(InputError, match="3 difficulties for 4 questions"):
        profile.levels([1, 2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "n_samples=1"),
        ({"temperature": 0}, "temperature=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_profile_refuses(llama, chat, options, message):
    with pytest.raises(InputError, match=message):
        entropy_profile(llama, chat, QUESTIONS, lambda i, text: True, **{"max_new_tokens": 3, **options})


def test_settings_refuse():
    with pytest.raises(InputError, match="n_samples=1"):
        DifficultyProbeMethod(n_samples=1)
    with pytest.raises(InputError, match=r"alpha=0.2 is below gamma=0.3"):
        DifficultyProbeMethod(alpha=0.2)


# --- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
def test_state_is_the_last_blocks_output_at_the_last_token_of_the_question(make_model, chat, kind):
    model = make_model(kind)
    caught = []
    states = read_questions(model, chat, QUESTIONS).states
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda module, args, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for question in QUESTIONS:
            model(torch.tensor([chat.encode(f"u:{question}")]))
    handle.remove()
    assert torch.allclose(states, torch.cat([c[:, -1] for c in caught]), atol=1e-4)


def test_the_question_ends_where_words_can_follow(chat):
    assert question_ids(chat, QUESTIONS[0]) == chat.encode(f"u:{QUESTIONS[0]}")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the sea"}]
    assert chat.decode(prompt_ids(chat, messages, " now")) == "s:be brief.u:the sea now. a:"
    assert chat.decode(question_ids(chat, messages)) == "s:be brief.u:the sea"
    assert question_ids(chat, "the sea", chat=False) == chat.encode("the sea")


def test_probe_learns_a_rule_and_is_repeatable():
    generator = torch.Generator().manual_seed(0)
    states = 5 + 3 * torch.randn(600, 12, generator=generator)
    labels = (states[:, 0] > 5).long() + (states[:, 1] > 8).long()
    probe = DifficultyProbe(12, 32).fit(states, labels, epochs=200)
    assert probe.held_out_accuracy > 0.8
    again = DifficultyProbe(12, 32).fit(states, labels, epochs=200)
    assert torch.equal(probe.probabilities(states), again.probabilities(states))
    shuffled = DifficultyProbe(12, 32).fit(states, labels[torch.randperm(600, generator=generator)], epochs=200)
    assert shuffled.held_out_accuracy < probe.held_out_accuracy - 0.2
    assert torch.allclose(probe.probabilities(states).sum(-1), torch.ones(600))


def test_probe_is_two_layers_on_standardized_states():
    states = torch.randn(50, 6) * 3 + 1
    probe = DifficultyProbe(6, 4).fit(states, [0, 1, 2, 1, 0] * 10, held_out=0, epochs=3)
    first, last = probe.layers[0], probe.layers[2]
    z = (states - states.mean(0)) / states.std(0, correction=0)
    expected = (torch.relu(z @ first.weight.T + first.bias) @ last.weight.T + last.bias).softmax(-1)
    assert torch.allclose(probe.probabilities(states), expected, atol=1e-5)
    assert len(DifficultyProbe(6, 0).layers) == 1


def test_rare_classes_weigh_more():
    """With states that say nothing, weights make both classes equally probable."""
    labels = [0] * 90 + [1] * 10
    with pytest.warns(UserWarning, match="no question is hard"):
        probe = DifficultyProbe(3, 0).fit(torch.zeros(100, 3), labels, learning_rate=0.05, epochs=300, held_out=0)
    p = probe.probabilities(torch.zeros(1, 3))[0]
    assert p[0].item() == pytest.approx(0.5, abs=0.05) and p[2] < 0.05


def test_save_and_load(llama, chat, probe, tmp_path):
    probe.save(tmp_path / "probe")
    loaded = DifficultyProbe.load(tmp_path / "probe")
    states = question_states(llama, chat, QUESTIONS)
    assert torch.equal(loaded.probabilities(states), probe.probabilities(states))
    assert loaded.made_for == probe.made_for and loaded.made_for["layer"] == 3 and not loaded.made_for["normed"]
    loaded.check(llama, chat)
    assert DiffAdapt.from_strings([f"probe={tmp_path / 'probe'}"]).probe.made_for == probe.made_for


def test_probe_belongs_to_its_model_and_template(make_model, chat, probe):
    with pytest.raises(InputError, match="not for the weights"):
        probe.check(make_model("qwen2"), chat)
    other = copy.deepcopy(chat)
    other.chat_template = TEMPLATE + " "
    with pytest.raises(InputError, match="another chat template"):
        probe.check(make_model("llama"), other)
    with pytest.raises(InputError, match="another chat template"):
        DiffAdapt(probe=probe).generate(make_model("llama"), chat, QUESTIONS, chat=False)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: DifficultyProbe(0), "hidden_size=0"),
        (lambda: DifficultyProbe(8, -1), "hidden=-1"),
        (lambda: DifficultyProbe(8)(torch.zeros(2, 9)), "width 8, not 9"),
        (lambda: DifficultyProbe(8).fit(torch.zeros(4, 8), [2] * 4), "no question is easy, normal"),
        (lambda: DifficultyProbe(8).fit(torch.zeros(4, 8), [0, 1, 2, 3]), "classes 0 to 2"),
        (lambda: DifficultyProbe(8).fit(torch.zeros(4, 8), [0, 1]), "for 2 labels"),
        (lambda: DifficultyProbe(8).fit(torch.full((2, 8), float("nan")), [0, 1]), "finite"),
        (lambda: DifficultyProbe(8).save("/tmp/never"), "call bind"),
        (lambda: DifficultyProbe.load("/nowhere"), "no probe in '/nowhere'"),
    ],
)
def test_probe_refuses(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_damaged_files_are_refused(probe, tmp_path):
    probe.save(tmp_path)
    header = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({**header, "format": 9}))
    with pytest.raises(InputError, match="format 9"):
        DifficultyProbe.load(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({**header, "hidden": 3}))
    with pytest.raises(InputError, match="no probe in"):
        DifficultyProbe.load(tmp_path)
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(InputError, match="no probe in"):
        DifficultyProbe.load(tmp_path)


# --- the loop on a filled cache --------------------------------------------------------------------------------------


def filled(model, ids, mask, held):
    """The cache of the first `held` columns."""
    engine = TransformersEngine(model)
    with torch.no_grad():
        engine.forward(ids[:, :held], mask[:, :held])
    return engine.cache


def holes(question_lengths, rest_lengths):
    """Random prompts whose question and rest are each left-padded: ids, mask, columns of the questions."""
    generator = torch.Generator().manual_seed(3)

    def part(lengths):
        return torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])

    mask = torch.cat([part(question_lengths), part(rest_lengths)], 1)
    ids = torch.randint(2, 320, mask.shape, generator=generator)
    return torch.where(mask > 0, ids, 1), mask, max(question_lengths)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("rests", [(4, 4, 4), (5, 1, 3)])
def test_logits_after_a_filled_cache_equal_a_fresh_forward(make_model, kind, rests):
    """Feeds and rewinds by hand; gemma3's window of 16 is shorter than the questions."""
    model = make_model(kind)
    ids, mask, held = holes((21, 9, 30), rests)
    engine = TransformersEngine(model, filled(model, ids, mask, held), rewinds=True)
    live = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    with torch.no_grad():
        logits = engine.forward(ids, mask)
        for step in range(12):
            for b in range(3):
                assert torch.allclose(logits[b], model(torch.tensor([live[b]])).logits[0, -1], atol=1e-4), (step, b)
                count = min((step * (b + 2)) % 4, step)
                engine.rollback(b, count)
                live[b] = live[b][: len(live[b]) - count]
            tokens = torch.randint(2, 320, (3, 1), generator=torch.Generator().manual_seed(step))
            logits = engine.forward(tokens)
            for b in range(3):
                live[b].append(int(tokens[b]))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("rewind", ["auto", "reprefill"])
def test_filled_cache_with_rewinds_equals_single_rows(make_model, tokenizer, kind, rewind):
    model = make_model(kind)
    ids, mask, held = holes((21, 9, 13), (5, 2, 3))

    def run(ids, mask, seed, cache=None):
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            custom_generate=loop,
            monitors=[BanRepeat()],
            processing_class=tokenizer,
            rewind=rewind,
            seed=seed,
            do_sample=True,
            max_new_tokens=25,
            return_dict_in_generate=True,
        )

    together = run(ids, mask, 4, filled(model, ids, mask, held))
    assert len(together.events) >= 3
    for b in range(3):
        alone = ids[b, mask[b].bool()][None]
        single = run(alone, torch.ones_like(alone), row_seed(4, b))
        cached = run(alone, torch.ones_like(alone), row_seed(4, b), filled(model, alone, torch.ones_like(alone), 6))
        assert together.new_ids[b] == single.new_ids[0] == cached.new_ids[0]
        assert together.prompt_ids[b] == alone[0].tolist()
        assert cached.tokens_processed == single.tokens_processed - 6 or rewind == "reprefill" or kind == "gemma3"


def test_loop_refuses_a_cache_that_does_not_fit(llama):
    ids, mask, held = holes((8, 6), (3, 3))
    cache = filled(llama, ids, mask, held)
    with pytest.raises(InputError, match="the cache holds 8 columns of 2 rows, the prompt has 8 of 2"):
        llama.generate(
            ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache, custom_generate=loop, max_new_tokens=3
        )
    with pytest.raises(InputError, match="of 2 rows, the prompt has 11 of 1"):
        llama.generate(ids[:1], attention_mask=mask[:1], past_key_values=cache, custom_generate=loop, max_new_tokens=3)
    cache.layers[2].keys = cache.layers[2].keys[:, :, 2:]
    with pytest.raises(InputError, match="hold 6 to 8 columns"):
        llama.generate(ids, attention_mask=mask, past_key_values=cache, custom_generate=loop, max_new_tokens=3)


def test_budgets_of_rows(llama, tokenizer):
    ids, mask, _ = holes((6, 6, 6), (1, 1, 1))
    options = {"custom_generate": loop, "do_sample": True, "seed": 1, "return_dict_in_generate": True}
    free = llama.generate(ids, attention_mask=mask, max_new_tokens=20, **options)
    out = llama.generate(ids, attention_mask=mask, max_new_tokens=20, budgets=[5, 30, 11], **options)
    assert [len(row) for row in out.new_ids] == [5, 20, 11]
    assert all(a == b[: len(a)] for a, b in zip(out.new_ids, free.new_ids))
    for budgets in ([5, 5], [0, 1, 1]):
        with pytest.raises(InputError, match="give a number >= 1 for each"):
            llama.generate(ids, attention_mask=mask, max_new_tokens=20, budgets=budgets, **options)


# --- strategies ------------------------------------------------------------------------------------------------------


def test_temperature_by_row_is_known_by_the_prompt():
    prompts = torch.tensor([[1, 5, 6], [4, 5, 6], [7, 8, 9]])
    warp = TemperatureByRow(prompts, [0.5, 2.0, 1.0])
    scores = torch.randn(3, 11)
    together = warp(torch.cat([prompts, torch.full((3, 4), 2)], 1), scores)
    assert torch.equal(together, scores / torch.tensor([[0.5], [2.0], [1.0]]))
    for b, extra in ((2, 1), (0, 7), (1, 2)):
        alone = torch.cat([prompts[b : b + 1], torch.full((1, extra), 3)], 1)
        assert torch.equal(warp(alone, scores[b : b + 1])[0], together[b])
    with pytest.raises(InputError, match=r"temperatures \[0.5, 2.0\]"):
        TemperatureByRow(prompts[[0, 0]], [0.5, 2.0])


@pytest.mark.parametrize("extra", [{}, {"top_k": 9, "repetition_penalty": 1.2}])
def test_equal_strategies_are_plain_generate(llama, chat, probe, extra):
    """Whatever the probe says: same temperature, same limit, same tokens as one plain call."""
    out = DiffAdapt(probe=probe, strategies=ALIKE).generate(llama, chat, QUESTIONS, max_new_tokens=30, seed=3, **extra)
    assert out.strategy == ["easy", "normal", "hard", "easy"]
    plain = generate(llama, chat, QUESTIONS, max_new_tokens=15, seed=3, do_sample=True, temperature=0.7, **extra)
    assert out.new_ids == plain.new_ids and out.prompt_ids == plain.prompt_ids


def test_equal_strategies_are_transformers_generate(llama, chat, probe):
    """One row and a seed: the tokens of `model.generate` itself."""
    out = DiffAdapt(probe=probe, strategies=ALIKE).generate(llama, chat, QUESTIONS[1], max_new_tokens=30, seed=8)
    torch.manual_seed(8)
    ids = torch.tensor([whole_prompt(chat, QUESTIONS[1])])
    plain = llama.generate(ids, do_sample=True, temperature=0.7, max_new_tokens=15, pad_token_id=1)
    assert out.new_ids[0] == plain[0, ids.shape[1] :].tolist()


def test_a_probe_for_normal_is_the_plain_run(llama, chat):
    out = DiffAdapt(probe=constant(1), strategies=STRATEGIES).generate(
        llama, chat, QUESTIONS, seed=2, max_new_tokens=20
    )
    plain = generate(llama, chat, QUESTIONS, seed=2, max_new_tokens=20, do_sample=True, temperature=0.8)
    assert out.strategy == ["normal"] * 4 and out.new_ids == plain.new_ids
    assert torch.allclose(out.probs[0], torch.tensor([1, math.e, 1]) / (2 + math.e))
    assert out.tokens_processed == plain.tokens_processed


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("use_chat", [True, False])
def test_reused_prefill_equals_a_fresh_one(make_model, chat, kind, use_chat):
    """Suffixes of unequal length after one prefill; without a template a bare prompt has nothing after the question."""
    model, chosen = make_model(kind), [STRATEGIES[i] for i in (0, 1, 2, 0)]
    options = {"max_new_tokens": 24, "seed": 6, "monitors": [BanRepeat()], "chat": use_chat}
    questions = read_questions(model, chat, QUESTIONS, use_chat)
    reused = generate_by_strategy(model, chat, QUESTIONS, chosen, questions=questions, **options)
    fresh = generate_by_strategy(model, chat, QUESTIONS, chosen, **options)
    assert reused.events and reused.new_ids == fresh.new_ids and reused.prompt_ids == fresh.prompt_ids
    if use_chat and kind != "gemma3":  # a window with padding inside is filled again
        assert reused.tokens_processed == fresh.tokens_processed and reused.forward_calls == fresh.forward_calls + 1


def test_a_suffix_that_merges_with_the_question(llama, chat):
    """The last tokens of the question become others; they are masked, not fed again."""
    question, suffix = "Elara walked to the lighth", "ouse"
    strategy = Strategy("easy", suffix, 0.9)
    whole, read = whole_prompt(chat, question, suffix), question_ids(chat, question)
    assert whole[: len(read)] != read
    out = generate_by_strategy(
        llama,
        chat,
        [question, QUESTIONS[1]],
        [strategy, STRATEGIES[1]],
        questions=read_questions(llama, chat, [question, QUESTIONS[1]]),
        max_new_tokens=20,
        seed=1,
    )
    assert out.prompt_ids[0] == whole
    torch.manual_seed(1)
    plain = llama.generate(torch.tensor([whole]), do_sample=True, temperature=0.9, max_new_tokens=20, pad_token_id=1)
    assert out.new_ids[0] == plain[0, len(whole) :].tolist()


def test_budget_is_never_exceeded_also_by_what_is_forced(llama, chat, probe):
    class Force:
        """Appends ten tokens again and again."""

        def check(self, row):
            ready = len(row.ids) % 4 == 3 and not row.finished
            return Violation(len(row.ids), "more", force=[90, 91, 92, 93, 94, 95, 96, 97, 98, 99]) if ready else None

        def hold(self, row):
            return 0

    for limit in (1, 2, 7, 25):
        out = DiffAdapt(probe=probe, strategies=STRATEGIES).generate(
            llama, chat, QUESTIONS, max_new_tokens=limit, seed=0, monitors=[Force()]
        )
        most = [max(1, int(share * limit)) for share in (0.4, 1.0, 0.5, 0.4)]
        assert all(len(row) <= m for row, m in zip(out.new_ids, most))
    assert len(out.events) >= 4 and [len(row) for row in out.new_ids] == most


def test_budget_in_tokens():
    assert [Strategy("easy", budget=0.4).tokens(n) for n in (1, 10, 25, 100)] == [1, 4, 10, 40]
    assert Strategy("easy", budget=0.29).tokens(100) == 29  # 28.999... in floats
    assert Strategy("easy", budget=1 / 3).tokens(100) == 33


def test_low_confidence_falls_back_to_normal(llama, chat, probe):
    hesitant = DiffAdapt(probe=constant(2), strategies=STRATEGIES, min_confidence=0.9)
    assert hesitant.generate(llama, chat, QUESTIONS, max_new_tokens=2, seed=0).strategy == ["normal"] * 4
    assert [s.name for s in hesitant.choose(torch.tensor([[0.92, 0.04, 0.04], [0.6, 0, 0.4]]))] == ["easy", "normal"]


def brute_force(model, tokenizer, prompt, strategy, monitor, wave, generator, limit):
    """One row of everything together on full forwards: no cache, no loop, no shared prefill."""
    row, scores = SequenceState(0, prompt, tokenizer), []

    def draw(index):
        p = (scores[index] / strategy.temperature).softmax(-1)
        row.append(int(torch.multinomial(p, 1, generator=generator)))

    wave.begin(len(prompt))
    with torch.no_grad():
        while len(row.ids) < strategy.tokens(limit) and row.ids[-1:] != [0]:
            ids = torch.tensor([prompt + row.ids])
            scores.append(wave(ids, model(ids).logits[:, -1])[0].clone())
            draw(len(row.ids))
            while (found := monitor.check(row)) is not None:
                for token, factor in found.factors.items():
                    scores[found.index][token] += math.log(factor) if factor else -torch.inf
                del scores[found.index + 1 :]
                row.truncate(found.index)
                row.checked = len(row.text)
                draw(found.index)
            row.checked = len(row.text)
    return row.ids


def test_with_antislop_a_wave_and_streaming_equals_brute_force(llama, chat, probe):
    method = DiffAdapt(probe=probe, strategies=STRATEGIES)
    wave = CyclicReflex(token_ids=REFLECT, amplitude=4, period=14, end_think=None)
    options = {"max_new_tokens": 60, "seed": 12, "top_k": 0}
    free = method.generate(llama, chat, QUESTIONS, methods=[wave], **options)
    pieces = [
        chat.decode(row[i : i + 3], skip_special_tokens=True).strip()
        for row in free.new_ids
        for i in (2, 6, 10, 14, 18)
    ]
    phrases = [piece for piece in pieces if piece and "\ufffd" not in piece]
    streamers = [Collect() for _ in QUESTIONS]
    ban = PhraseBan(phrases)
    out = method.generate(llama, chat, QUESTIONS, methods=[wave], monitors=[ban], streamers=streamers, **options)
    assert len({e.row for e in out.events}) >= 2 and {e.kind for e in out.events} == {"rewind"}
    for b, (question, name) in enumerate(zip(QUESTIONS, out.strategy)):
        strategy = next(s for s in STRATEGIES if s.name == name)
        prompt = whole_prompt(chat, question, strategy.suffix)
        generator = torch.Generator().manual_seed(row_seed(12, b))
        expected = brute_force(llama, chat, prompt, strategy, PhraseBan(phrases), wave.processor(), generator, 60)
        assert out.new_ids[b] == expected
        assert streamers[b].ended and streamers[b].tokens == expected
        assert len(expected) <= strategy.tokens(60)


def test_among_the_methods_of_generate(llama, chat, probe):
    """Its place in the list does not matter; whatever else `generate` takes goes along."""
    method, wave = DiffAdapt(probe=probe, strategies=STRATEGIES), CyclicReflex(token_ids=REFLECT, end_think=None)
    options = {"max_new_tokens": 30, "seed": 5, "monitors": [BanRepeat()], "top_k": 20}
    direct = method.generate(llama, chat, QUESTIONS, methods=[wave], **options)
    for methods in ([method, wave], [wave, method]):
        out = generate(llama, chat, QUESTIONS, methods=methods, **options)
        assert out.new_ids == direct.new_ids and out.strategy == ["easy", "normal", "hard", "easy"]
    stopped = generate(llama, chat, QUESTIONS[0], methods=[method], stop=["L"], **options)
    assert stopped.texts[0].endswith("L") and len(stopped.new_ids[0]) < 12


def test_with_drafts(llama, chat, probe):
    """Greedy: drafting changes no token, and the budgets hold."""
    options = {"max_new_tokens": 30, "do_sample": False}
    methods = [DiffAdapt(probe=probe, strategies=STRATEGIES)]
    plain = generate(llama, chat, QUESTIONS, methods=methods, **options)
    drafted = generate(llama, chat, QUESTIONS, methods=[*methods, Spectr(drafter="early-exit")], **options)
    assert drafted.new_ids == plain.new_ids and drafted.strategy == plain.strategy
    assert [len(row) for row in drafted.new_ids] == [12, 30, 15, 12]


def test_encoded_prompts_are_continued_as_they_are(llama, chat):
    inputs = encode_prompts(chat, QUESTIONS)
    assert (
        generate(llama, chat, inputs, max_new_tokens=9).new_ids
        == generate(llama, chat, QUESTIONS, max_new_tokens=9).new_ids
    )


def test_in_batch_equals_alone(llama, chat, probe):
    method = DiffAdapt(probe=probe, strategies=STRATEGIES)
    together = method.generate(llama, chat, QUESTIONS, max_new_tokens=40, seed=4)
    assert len(set(together.strategy)) == 3
    for b, question in enumerate(QUESTIONS):
        alone = method.generate(llama, chat, question, max_new_tokens=40, seed=row_seed(4, b))
        assert alone.strategy == together.strategy[b : b + 1] and alone.new_ids[0] == together.new_ids[b]


def test_oracle_by_hand():
    table = {
        "easy": ([True, True, False, False, True], [10, 30, 5, 5, 20]),
        "normal": ([True, True, True, False, True], [20, 20, 40, 60, 20]),
        "hard": ([False, True, True, False, True], [8, 25, 39, 30, 21]),
    }
    assert oracle_strategy(table) == ["easy", "normal", "hard", "normal", "easy"]
    with pytest.raises(InputError, match="at least 'normal'"):
        oracle_strategy({"easy": ([True], [3])})


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Strategy("easy", temperature=0), "temperature=0 of strategy 'easy'"),
        (lambda: Strategy("easy", budget=0), "budget=0 of strategy 'easy'"),
        (lambda: Strategy("easy", budget=1.2), r"budget=1.2 .* \(0, 1\]"),
        (lambda: DiffAdapt(probe=constant(0), strategies=DEFAULT_STRATEGIES[:2]), "easy, normal; give one each"),
        (lambda: DiffAdapt(probe=constant(0), strategies="/nowhere.json"), "no JSON list"),
        (lambda: DiffAdapt(probe="/nowhere"), "no probe in '/nowhere'"),
        (lambda: DiffAdapt(probe=DifficultyProbe(8, n_classes=2)), "the probe has 2 classes"),
        (lambda: DiffAdapt(probe=7), "probe=7"),
        (lambda: DiffAdapt(probe=constant(0), min_confidence=2), "min_confidence=2"),
    ],
)
def test_refusals(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_generate_refuses(llama, chat, probe):
    method = DiffAdapt(probe=probe, strategies=STRATEGIES)
    for prompts, options, message in (
        ([], {}, "at least one prompt"),
        (["  "], {}, "does not end with a question"),
        ([[{"role": "assistant", "content": "hm"}]], {}, "does not end with a question"),
        (QUESTIONS, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (QUESTIONS, {"temperature": 0.3}, "temperature=0.3"),
    ):
        with pytest.raises(InputError, match=message):
            method.generate(llama, chat, prompts, **{"max_new_tokens": 3, **options})
    with pytest.raises(InputError, match="1 strategies for 4 prompts"):
        generate_by_strategy(llama, chat, QUESTIONS, STRATEGIES[:1])
    with pytest.raises(InputError, match="width 9, the model has 32"):
        DiffAdapt(probe=DifficultyProbe(9)).generate(llama, chat, QUESTIONS)
    with pytest.raises(InputError, match="has no probe"):
        DiffAdapt().generate(llama, chat, QUESTIONS)
    with pytest.raises(InputError, match="diffadapt and diffadapt both read the prompts"):
        generate(llama, chat, QUESTIONS, methods=[method, DiffAdapt(probe=constant(0))])
    with pytest.raises(InputError, match="give the questions as texts"):
        generate(llama, chat, encode_prompts(chat, QUESTIONS), methods=[method])
    with pytest.raises(InputError, match="2 messages need a chat template"):
        prompt_ids(chat, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hm"}], chat=False)


def test_strategies_from_a_file(tmp_path):
    file = tmp_path / "strategies.json"
    file.write_text(json.dumps([{"name": n, "suffix": " go", "temperature": 1, "budget": 0.5} for n in CLASSES]))
    assert DiffAdapt(probe=constant(0), strategies=str(file)).strategies[2] == Strategy("hard", " go", 1.0, 0.5)
    file.write_text('[{"name": "easy", "budget": 7}]')
    with pytest.raises(InputError, match="budget=7"):
        DiffAdapt(probe=constant(0), strategies=str(file))


# --- the experiment --------------------------------------------------------------------------------------------------

PROBLEMS = draw_problems(Arithmetic(), 24)


def answering(right, tokens, strategy):
    """Answers that are right on some levels, at a price by level."""

    def answer(problems, seed):
        return [
            Answer(p.answer if right(p) else "7 or so", True, strategy, {"tokens": float(tokens(p))}) for p in problems
        ]

    return answer


def test_unfinished_answers_are_wrong():
    task, (problem, other) = DifficultyTask(Arithmetic(), PROBLEMS), PROBLEMS[:2]
    given = [Answer(problem.answer, False, "easy", {}), Answer(other.answer, True, "easy", {})]
    outcomes = task.run(Arm("x", role="plain", apply=lambda problems, seed: given), task.samples()[:2], 0)
    assert [o.metrics["accuracy"] for o in outcomes] == [0, 1] and outcomes[0].detail["level"] == 1


def test_random_choice_has_the_same_shares():
    shares = ["easy"] * 12 + ["normal"] * 4 + ["hard"] * 8
    choose = experiment.random_choice(PROBLEMS, shares, STRATEGIES)
    dealt = [[choose(p, seed).name for p in PROBLEMS] for seed in (3, 100_003, 100_007)]
    assert all(sorted(one) == sorted(shares) for one in dealt)
    assert dealt[0] != dealt[1] == dealt[2]


def test_oracle_takes_the_cheapest_right_answer():
    task = DifficultyTask(Arithmetic(), PROBLEMS)
    fixed = {
        "easy": answering(lambda p: p.difficulty <= 3, lambda p: 10, "easy"),
        "normal": answering(lambda p: p.difficulty <= 5, lambda p: 40, "normal"),
        "hard": answering(lambda p: p.difficulty == 2, lambda p: 5, "hard"),
    }
    wanted = {1: "easy", 2: "hard", 3: "easy", 4: "normal", 5: "normal"}
    for hopeless in ("normal", "hard"):
        found = experiment.by_oracle(fixed, task, hopeless, PROBLEMS, 0)
        assert [a.strategy for a in found] == [wanted.get(p.difficulty, hopeless) for p in PROBLEMS]


def test_the_oracle_reuses_answers():
    calls = []
    run = experiment.remembered(lambda problems, seed: calls.append(seed) or [problems])
    for first, last, seed in ((0, 3, 1), (0, 3, 1), (0, 3, 2), (3, 6, 1), (0, 2, 1)):
        assert run(PROBLEMS[first:last], seed) == [PROBLEMS[first:last]]
    assert calls == [1, 2, 1, 1]


@pytest.mark.parametrize("helps", [True, False])
def test_judge_on_answers_made_up(helps):
    """Right and cheap on easy problems, cheap on hopeless ones; otherwise no better than chance."""
    task = DifficultyTask(Arithmetic(), PROBLEMS)
    never, solved = (lambda p: False), (lambda p: p.difficulty <= 6)
    cheap = answering(solved if helps else never, lambda p: 20 if p.difficulty != 5 else 40, "easy")
    controls = ("CALM", "EASY", "HARD", "SHUFFLED", "RANDOM", "LINEAR", "LENGTH", "DIRECTLY", "ORACLE")
    runs = {getattr(experiment, n): answering(lambda p: p.difficulty == 5, lambda p: 30, "easy") for n in controls}
    runs |= {
        experiment.PLAIN: answering(solved, lambda p: 40, "normal"),
        experiment.FAST_ORACLE: answering(solved, lambda p: 10, "easy"),
        experiment.METHOD: cheap,
    }
    arms = [Arm(name, role="control", apply=run) for name, run in runs.items()]
    levels = [p.difficulty for p in PROBLEMS]
    u = EntropyProfile(np.array([abs(n - 5) for n in levels], float), np.ones(24), np.ones(24))
    trained = experiment.Profiled([], levels, u)
    known = {experiment.METHOD: np.array([helps] * 24)}
    made = Experiment("diffadapt", "", task, arms, experiment.PLAIN, None, batch=8)
    findings = experiment.findings(compare(made), trained, known, np.arange(24) % 3)
    assert [f.holds for f in findings] == [helps] * 8 + [False] * 3
    assert [f.outcome for f in findings[8:]] == ["described"] * 3
    assert verdict(findings) == ("reproduced" if helps else "not reproduced")
    assert "tokens saved, diffadapt of normal for all: 43.8%" in findings[0].numbers
    assert "level 1: 100% easy, 0% normal, 0% hard, 20.0 of 40.0 tokens" in findings[9].numbers
    assert "the U appears" in findings[10].numbers


# --- the command line ------------------------------------------------------------------------------------------------


def tokenry(*args, code=0):
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def folder(llama, chat, tmp_path):
    """The random model with its chat template, as a folder."""
    llama.save_pretrained(tmp_path / "model")
    chat.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_from_problems_to_answers(folder, tmp_path):
    """A probe learned with `read` chooses the strategies of `decode`, streamed or not, for one prompt and many."""
    problems, probe, prompts, strategies = (tmp_path / name for name in ("p.jsonl", "probe", "prompts.txt", "s.json"))
    lines = [{"question": f"{text} {i}", "answer": i} for i in range(4) for text in QUESTIONS]
    problems.write_text("\n".join(map(json.dumps, lines)))
    prompts.write_text("\n".join(QUESTIONS))
    strategies.write_text(json.dumps([vars(one) for one in STRATEGIES]))
    learn = ["fit", "difficulty-probe", "--data", str(problems), "--save", str(probe), "--json"]
    learn += ["-o", "n_samples=2", "-o", "gamma=0", "-o", "alpha=0", "-o", "epochs=2", "-o", "max_new_tokens=4"]
    with pytest.warns(UserWarning, match="no question is hard"):
        (found,) = json.loads(tokenry(*learn, "-o", "marker=number", "--model", folder))
    assert {row["class"]: row["questions"] for row in found["rows"]} == {"normal": 10, "easy": 6}
    ask = ["read", "--method", "difficulty-probe", "--artifact", str(probe), "--json", "--model", folder]
    ((asked,),) = [found["rows"] for found in json.loads(tokenry(*ask, QUESTIONS[0]))]
    assert asked["class"] == max(CLASSES, key=asked.get) and sum(map(asked.get, CLASSES)) == pytest.approx(1)
    assert "n_samples would have no effect with --artifact" in tokenry(*ask, "-o", "n_samples=4", "hm", code=2)
    decode = ["decode", "--method", "diffadapt", "-o", f"probe={probe}", "-o", f"strategies={strategies}"]
    decode += ["--max-new-tokens", "20", "--model", folder]
    one = json.loads(tokenry(*decode, "--json", QUESTIONS[0]))
    assert one["strategy"] in CLASSES and len(one["ids"]) <= 20
    assert tokenry(*decode, QUESTIONS[0]).strip() == one["text"].strip()
    many = [json.loads(line) for line in tokenry(*decode, "--prompts", str(prompts)).splitlines()]
    assert [row["prompt"] for row in many] == QUESTIONS and all(row["strategy"] in CLASSES for row in many)
    assert "the strategy's to say" in tokenry(*decode, "--temperature", "0.5", "hm", code=2)
    assert "another chat template" in tokenry(*decode, "--raw", "hm", code=2)


def test_sums_to_learn_from():
    questions, is_correct = sums(16)
    assert len(questions) == 16 and all(split_of(question) == "train" for question in questions)
    assert is_correct(0, f"</think>\n{Arithmetic().totals(questions[0])[-1]}") and not is_correct(0, "7 or so")


def test_right_answers_are_found_by_their_marker(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "a", "answer": "1,200"}\n\n{"question": "b", "answer": 3.5}\n')
    questions, is_correct = problems_in((tmp_path / "p.jsonl").read_text(), str(tmp_path / "p.jsonl"), "boxed")
    assert questions == ["a", "b"] and is_correct(0, r"so \boxed{1200}") and is_correct(1, r"\boxed{3.50}")
    assert not is_correct(0, "1200") and not is_correct(1, r"\boxed{4}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "has nothing to learn from; give --data, a file"),
        (["--data", "arithmetic:0"], "N of arithmetic:N=0 is not allowed"),
        (["--data", "algebra:3"], "'algebra:3' is no file and no known task"),
        (["--data", "/nowhere"], "'/nowhere' cannot be read"),
        (["--data", "/dev/null"], "holds no problems"),
        (["--data", "arithmetic:3", "-o", "marker=number"], "marker would have no effect with arithmetic:N"),
        (["--data", "arithmetic:3", "-o", "find=dog"], "no option 'find'"),
        (["--data", "arithmetic:3", "-o", "n_samples=1"], "n_samples='1'"),
        (["--data", "arithmetic:3", "-o", "marker=x"], "has 0 groups"),
    ],
)
def test_learning_refuses(args, message, tmp_path):
    assert message in tokenry("fit", "difficulty-probe", *args, "--save", str(tmp_path / "probe"), code=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "difficulty-probe", "--data", "arithmetic:3"], "Missing option '--save'"),
        (["fit", "difficulty-probe", "--data", "arithmetic:3", "--save", "/dev/null/probe"], "the output"),
        (["fit", "lm-head-neurons", "--data", "x", "--save", "map"], "learns from the model alone; leave --data out"),
        (["fit", "lm-head-neurons", "-o", "find=sea", "--save", "map"], "find would have no effect on what is learned"),
        (["read", "--method", "difficulty-probe", "hm"], "reads with what it has learned; `tokenry fit"),
        (["read", "--method", "difficulty-probe", "--artifact", "x", "--trace", "y"], "reads no trace"),
        (["read", "--method", "difficulty-probe", "--artifact", "x"], "nothing was asked; give a text"),
        (["read", "--method", "difficulty-probe", "--artifact", "/nowhere", "hm"], "there is no probe in '/nowhere'"),
    ],
)
def test_fitting_and_reading_refuse_what_is_not_theirs(args, message):
    assert message in tokenry(*args, code=2)


def test_problems_that_are_none(tmp_path):
    for line in (
        "hm",
        "[1]",
        '{"question": "a"}',
        '{"question": " ", "answer": 1}',
        '{"question": "a", "answer": true}',
    ):
        (tmp_path / "p.jsonl").write_text(line)
        with pytest.raises(InputError, match=r"line 1 of .* (is no problem|give both as text)"):
            problems_in((tmp_path / "p.jsonl").read_text(), str(tmp_path / "p.jsonl"), "boxed")
