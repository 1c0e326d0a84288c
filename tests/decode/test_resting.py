"""Texts that begin like others, which are being written or are over: what is fed, what is kept, what comes of it."""

import random
from array import array

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support.families import build
from support.gguf_files import logits_of, save_gguf

import tokenry
from tokenry.decode.engines.choice import open_shared
from tokenry.decode.engines.llamacpp import Sequences
from tokenry.decode.engines.resting import LEAST, Rest, Resting, longest_beginning
from tokenry.decode.engines.shared import SharedTransformersEngine
from tokenry.models.kv_cache import cache_bytes

MUCH = 2**30
MODELS = {family: build(family) for family in ("llama", "gemma3")}  # the second has windows of 16 columns


@pytest.fixture(scope="module")
def gguf(tokenizer, tmp_path_factory):
    """The first of these models, run by llama.cpp."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENRY_CACHE", str(folder / "cache"))
        yield tokenry.load(save_gguf(MODELS["llama"], tokenizer, folder / "tiny.gguf"), threads=1).model


@pytest.fixture(params=["llama", "gemma3", "gguf"])
def kind(request):
    return request.param


@pytest.fixture
def opened(kind, gguf):
    """opened(memory): an engine for four texts, and the same model as torch runs it."""
    model = gguf if kind == "gguf" else MODELS[kind]

    def opened(memory=MUCH):
        engine = open_shared(model, 4, memory)
        engine.fed, forward = [], engine.forward

        def counting(blocks):
            engine.fed.append(sum(map(len, blocks.values())))
            return forward(blocks)

        engine.forward = counting
        return engine, MODELS["gemma3" if kind == "gemma3" else "llama"]

    return opened


def some(seed, count):
    return random.Random(seed).choices(range(2, 320), k=count)


def begun(engine, prompt):
    """A new text with this prompt, read as far as it need be, its logits, and how many tokens that were."""
    slot = engine.join()
    held = engine.begin(slot, prompt)
    return slot, engine.forward({slot: prompt[held:]})[slot], len(prompt) - held


def same(logits, model, ids):
    torch.testing.assert_close(logits, logits_of(model, ids)[-1], atol=1e-4, rtol=1e-4)


# --- what is fed ---------------------------------------------------------------------------------------------------


def test_the_second_turn_of_a_chat_feeds_what_is_new(opened):
    engine, model = opened()
    prompt = some(1, 150)
    slot, _, read = begun(engine, prompt)
    answer = some(2, 20)
    for token in answer:
        engine.forward({slot: [token]})
    engine.free(slot)
    assert read == 150 and engine.resting_bytes() > 0
    chat = prompt + answer + some(3, 12)
    slot, logits, read = begun(engine, chat)
    assert read == 12
    same(logits, model, chat)
    engine.rollback(slot, 15)  # to before where it has begun
    same(engine.forward({slot: [7]})[slot], model, [*chat[:-15], 7])


def test_the_same_prompt_again_feeds_its_last_token(opened, kind):
    engine, model = opened()
    prompt = some(1, 150)
    slot, first, _ = begun(engine, prompt)
    if kind == "gemma3":  # a window has lost what its last token but one saw
        engine.free(slot)
    for _ in range(2):
        other, logits, read = begun(engine, prompt)
        assert read == (150 if kind == "gemma3" else 1)
        same(logits, model, prompt)
        torch.testing.assert_close(logits, first, atol=1e-4, rtol=1e-4)
        engine.free(other)


def test_nothing_rests_without_memory(opened):
    engine, _ = opened(0)
    for _ in range(2):
        slot, _, read = begun(engine, some(1, 150))
        engine.free(slot)
        assert read == 150 and engine.resting_bytes() == 0


def test_a_beginning_that_is_short_is_read_with_others_at_once():
    """On transformers several new prompts are one forward, and beginnings would be one each."""
    engine = open_shared(MODELS["llama"], 8, MUCH)
    shared = some(1, LEAST - 1)
    slot, _, _ = begun(engine, shared + some(2, 100))
    engine.free(slot)
    prompts = [shared + some(seed, 40) for seed in range(3, 8)] + [some(1, 90) + some(9, 200)]
    assert [engine.begin(engine.join(), prompt) for prompt in prompts] == [0] * 6


def test_texts_that_begin_alike_are_read_together(opened, kind):
    engine, model = opened()
    shared, tails = some(1, 120), [some(seed, 9 + seed % 2) for seed in range(3)]
    first, _, _ = begun(engine, shared[:90])
    for token in shared[90:]:
        engine.forward({first: [token]})
    slots = [engine.join() for _ in tails]
    assert [engine.begin(slot, shared + tail) for slot, tail in zip(slots, tails)] == [120] * 3
    calls = getattr(engine, "calls", 0)
    logits = engine.forward({slot: tail for slot, tail in zip(slots, tails)})
    assert engine.fed[-1] == sum(map(len, tails))
    if kind != "gguf":
        assert engine.calls - calls == (2 if kind == "gemma3" else 1)  # padding between tokens would count in windows
    for slot, tail in zip(slots, tails):
        same(logits[slot], model, shared + tail)
    engine.free(first)
    again = engine.forward({slot: [5] for slot in slots})
    for slot, tail in zip(slots, tails):
        same(again[slot], model, [*shared, *tail, 5])


def test_what_failed_does_not_rest(opened, kind, monkeypatch):
    engine, _ = opened()
    slot, _, _ = begun(engine, some(1, 150))
    with pytest.raises((tokenry.InputError, IndexError)):
        engine.forward({slot: [99_999]})
    engine.free(slot)
    assert engine.resting_bytes() == 0


# --- what is kept --------------------------------------------------------------------------------------------------


def rest(tokens, size=10):
    return Rest(np.array(tokens), None, size)


def held(resting):
    return [one.tokens[0] for one in resting.rests.values()]


def test_the_least_recently_used_is_dropped_first():
    resting = Resting(30)
    for first in range(3):
        resting.add(rest([first] * 100))
    resting.use(next(iter(resting.rests)))
    resting.add(rest([3] * 100))
    assert held(resting) == [2, 0, 3] and resting.size == 30
    assert not resting.wants([2] * 90)  # which is as good as used
    resting.add(rest([4] * 100, 20))
    assert held(resting) == [2, 4]
    resting.add(rest([5] * 100, 31))  # more than there may be at all
    assert held(resting) == [] and resting.size == 0


def test_what_has_hardly_more_than_a_beginning_of_another_one_is_not_kept_beside_it():
    resting = Resting(MUCH)
    chat = some(1, 300)
    resting.add(rest(chat[:200] + some(2, LEAST - 1)))
    resting.add(rest(chat[:150] + some(3, LEAST)))
    assert not resting.wants(chat[:190]) and not resting.wants(chat[: LEAST - 1]) and resting.wants(chat)
    resting.add(rest(chat))
    assert [len(one.tokens) for one in resting.rests.values()] == [150 + LEAST, 300]


def test_the_longest_beginning():
    prompt = np.array([1, 2, 3, 4])
    texts = {"a": array("i", [1, 2]), "b": np.array([1, 2, 3, 4, 5]), "c": np.array([1, 2, 3]), "d": array("i")}
    assert longest_beginning(texts, prompt) == ("c", 3)  # the last token is to be fed
    assert longest_beginning(texts, np.array([2, 1])) == (None, 0) == longest_beginning({}, prompt)


def test_memory_is_what_the_texts_take(opened, kind):
    engine, _ = opened()
    slot, _, _ = begun(engine, some(0, 100))
    engine.free(slot)
    size = engine.resting_bytes()
    for memory, kept in ((3 * size + size // 2, 3), (size - 1, 0)):
        engine, _ = opened(memory)
        for seed in range(6):
            slot, _, _ = begun(engine, some(seed, 100))
            engine.free(slot)
            assert engine.resting_bytes() <= memory
        assert len(engine.resting.rests) == kept and engine.resting_bytes() == kept * size
        if kept:
            states = [one.state for one in engine.resting.rests.values()]
            held = sum(map(len, states)) if kind == "gguf" else sum(cache_bytes(state.cache) for state in states)
            assert held == engine.resting_bytes()
            assert [begun(engine, some(seed, 100) + [5] * 20)[2] for seed in (5, 0)] == [20, 120]


# --- cells ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_cells_of_sequences_that_share_them(gguf, seed):
    """Beside the pool stands which cell every token has; in between all move to a larger context."""
    rng, pool, cells, fresh = random.Random(seed), Sequences(gguf, 6, 512), {}, iter(range(10**6))
    for _ in range(120):
        what = rng.choice(["join", "feed", "feed", "back", "free", "grow"])
        if what == "join" and pool.free_slots:
            slot = pool.join()
            other = rng.choice([*cells, None])
            stop = rng.randint(0, len(cells[other])) if other is not None else 0
            if stop:
                pool.begin_as(slot, other, stop)
            cells[slot] = cells[other][:stop] if other is not None else []
        elif cells and what != "join":
            slot = rng.choice(list(cells))
            if what == "feed" and pool.room >= 30:
                count = rng.randint(1, 30)
                pool.forward({slot: some(seed, count)})
                cells[slot] = cells[slot] + [next(fresh) for _ in range(count)]
            elif what == "back":
                count = rng.randint(0, len(cells[slot]))
                pool.rollback(slot, count)
                cells[slot] = cells[slot][: len(cells[slot]) - count]
            elif what == "free":
                pool.free(slot)
                del cells[slot]
            elif what == "grow" and pool.cells < 1500:
                pool = pool.with_room(pool.room + 1)
        assert pool.lengths == {slot: len(held) for slot, held in cells.items()}
        assert pool.room == pool.cells - len({cell for held in cells.values() for cell in held})
    if cells:
        pool.forward({next(iter(cells)): [5] * min(pool.room_of(next(iter(cells))), 200)})  # there is room indeed
    for slot in list(cells):
        pool.free(slot)
    assert pool.room == pool.cells


def test_a_larger_context_shares_cells_as_the_smaller_one_did(gguf):
    pool, prompt, model = Sequences(gguf, 4, 256), some(1, 100), MODELS["llama"]
    slots, tails = [pool.join() for _ in range(4)], [some(seed, 9) for seed in range(4)]
    pool.forward({slots[0]: prompt})
    pool.begin_as(slots[1], slots[0], 100)
    pool.begin_as(slots[2], slots[1], 60)
    pool.forward(dict(zip(slots[:3], tails)))
    pool.begin_as(slots[3], slots[2], 69)
    pool = pool.with_room(300)
    assert pool.cells - pool.room == 127
    logits = pool.forward({slot: [7] for slot in slots})
    wanted = [prompt + tails[0], prompt + tails[1], *[prompt[:60] + tails[2]] * 2]
    for slot, ids in zip(slots, wanted):
        same(logits[slot], model, [*ids, 7])
    pool.rollback(slots[1], 80)
    same(pool.forward({slots[1]: [8]})[slots[1]], model, [*prompt[:30], 8])
    same(pool.forward({slots[0]: [8]})[slots[0]], model, [*prompt, *tails[0], 7, 8])


# --- in any order --------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**16)


class RestingMachine(RuleBasedStateMachine):
    """Texts begin like others or like nothing, and are fed, taken back and over in any order. `held` is what each has
    been fed, `known` all that there ever was."""

    model = MODELS["llama"]
    memory = MUCH
    torch_model = MODELS["llama"]

    def __init__(self):
        super().__init__()
        self.engine = open_shared(self.model, 4, self.memory)
        self.held, self.known, self.saved = {}, [], 0

    @precondition(lambda self: len(self.held) < 4)
    @rule(data=st.data(), seed=SEEDS, tail=st.integers(1, 40), gone=st.integers(0, 20), waits=st.booleans())
    def begin(self, data, seed, tail, gone, waits):
        """A prompt that begins like something that there was, and has some of its own. It may wait for its first block
        until others have gone."""
        known = [ids for ids in (*self.known, *self.held.values()) if gone < len(ids) < 300]
        like = data.draw(st.sampled_from([*known, some(seed, 90)]))
        prompt = like[: len(like) - gone] + some(seed + 1, tail)
        slot = self.engine.join()
        count = self.engine.begin(slot, prompt)
        assert 0 <= count < len(prompt)
        self.saved += count
        self.held[slot] = prompt[:count]
        if not waits or not count:
            self.feed({slot: prompt[count:]})

    def feed(self, blocks):
        logits = self.engine.forward(blocks)
        for slot, block in blocks.items():
            self.held[slot] = self.held[slot] + block
            expected = logits_of(self.torch_model, self.held[slot])[-1]
            assert torch.allclose(logits[slot], expected, atol=1e-4, rtol=1e-4), (logits[slot] - expected).abs().max()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), seed=SEEDS)
    def forward(self, data, seed):
        counts = {slot: data.draw(st.sampled_from([0, 1, 1, 1, 5])) for slot in self.held}
        counts[data.draw(st.sampled_from(sorted(self.held)))] = 1
        self.feed({slot: some(seed + slot, count) for slot, count in counts.items() if count})

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def rollback(self, data):
        slot = data.draw(st.sampled_from(sorted(self.held)))
        fewest = self.engine.texts[slot].since if isinstance(self.engine, SharedTransformersEngine) else 1
        count = data.draw(st.integers(0, max(len(self.held[slot]) - max(fewest, 1), 0)))
        self.engine.rollback(slot, count)
        self.held[slot] = self.held[slot][: len(self.held[slot]) - count]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        slot = data.draw(st.sampled_from(sorted(self.held)))
        self.engine.free(slot)
        self.known.append(self.held.pop(slot))

    @invariant()
    def memory_is_bounded(self):
        assert self.engine.resting_bytes() <= self.memory

    def teardown(self):
        for slot in sorted(self.held):
            self.feed({slot: [7]})
            self.engine.free(slot)
        if isinstance(self.engine, SharedTransformersEngine):
            assert self.engine.cache_bytes() == 0 and not self.engine.places and not self.engine.texts
        else:
            assert self.engine.pool.room == self.engine.pool.cells and not self.engine.texts
        type(self).all_saved += self.saved

    all_saved = 0


@pytest.mark.parametrize("memory", [MUCH, 150_000])
def test_texts_in_any_order_are_what_they_are_alone(kind, gguf, memory):
    machine = type(
        "Machine",
        (RestingMachine,),
        {
            "model": gguf if kind == "gguf" else MODELS[kind],
            "torch_model": MODELS["gemma3" if kind == "gemma3" else "llama"],
            "memory": memory,
        },
    )
    options = {"max_examples": 15, "stateful_step_count": 16, "deadline": None, "derandomize": True, "database": None}
    run_state_machine_as_test(machine, settings=settings(**options))
    assert machine.all_saved > 800
