"""Texts that come into and leave one batch at any time: what each gets is what it would get alone."""

import random

import pytest
import torch
from support.families import build
from transformers import MambaConfig, MambaForCausalLM

from tokenry import InputError
from tokenry.decode import Antislop, BudgetForcing, opened
from tokenry.decode.engines.shared import SharedTransformersEngine, Slot, sharing_obstacle

SHARED = ["llama", "qwen2", "opt", "gemma3"]


class Alone:
    """What a slot should hold, and the logits that a forward of it all gives."""

    def __init__(self, model):
        self.model, self.ids, self.prompt = model, [], 0

    @torch.no_grad()
    def logits(self):
        return self.model(torch.tensor([self.ids])).logits[0, -1].float()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, pad_token_id=1, eos_token_id=0)
    ).eval()


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("seed", range(4))
def test_logits_are_those_of_each_text_alone(make_model, kind, seed):
    model, rng = make_model(kind), random.Random(seed)
    engine, texts = SharedTransformersEngine(model), {}
    for _ in range(40):
        for _ in range(rng.choice([0, 0, 1, 3])):
            texts[engine.join()] = Alone(model)
        for slot in [slot for slot in texts if rng.random() < 0.06]:
            engine.free(slot)
            del texts[slot]
        for slot, text in texts.items():
            # windows have lost what lies before the prompt, which nobody takes back
            new = len(text.ids) - (text.prompt if kind == "gemma3" else 2)
            if new > 0 and rng.random() < 0.2:
                count = rng.randint(1, min(new, 6))
                engine.rollback(slot, count)
                del text.ids[-count:]
        blocks = {}
        for slot, text in texts.items():
            if rng.random() < 0.9:
                count = rng.choice([1, 2, 17, 60]) if not text.ids else rng.choice([1] * 12 + [3, 20])
                blocks[slot] = [rng.randrange(2, 320) for _ in range(count)]
                text.prompt = text.prompt or count
                text.ids += blocks[slot]
        found = engine.forward(blocks)
        assert found.keys() == blocks.keys()
        for slot in blocks:
            torch.testing.assert_close(found[slot], texts[slot].logits(), rtol=1e-3, atol=2e-3)


def test_what_left_is_given_back(llama):
    engine = SharedTransformersEngine(llama)
    short, long = engine.join(), engine.join()
    engine.forward({short: [5, 6, 7], long: [8] * 200})
    engine.forward({short: [8], long: [9]})
    both = engine.cache_bytes()
    engine.free(long)
    engine.forward({short: [9]})
    assert len(engine.batches) == 1 and engine.batches[0].grid.columns == 5
    assert engine.cache_bytes() == both * 5 / (2 * 201)
    engine.free(short)
    assert engine.cache_bytes() == 0 and not engine.batches and not engine.places


def test_a_long_text_does_not_stretch_the_batch_of_short_ones(llama):
    engine = SharedTransformersEngine(llama)
    slots = [engine.join() for _ in range(9)]
    engine.forward({slot: [5, 6, 7] for slot in slots[:8]} | {slots[8]: [9] * 400 * 4})
    engine.forward({slot: [5] for slot in slots})
    assert sorted((batch.grid.batch, batch.grid.columns) for batch in engine.batches) == [(1, 1601), (8, 4)]


def test_rows_of_one_batch_are_fed_together(llama):
    engine = SharedTransformersEngine(llama)
    slots = [engine.join() for _ in range(5)]
    for slot in slots:
        engine.forward({slot: [5, 6, 7]})
    before = engine.calls
    engine.forward({slot: [5] for slot in slots})
    assert engine.calls == before + 1


def chunked():
    model = build("llama")
    model.config.attention_chunk_size = 8
    return model


@pytest.mark.parametrize(("make", "why"), [(chunked, "into chunks"), (mamba, "no cache of keys and values")])
def test_models_whose_texts_cannot_share(make, why):
    model = make()
    assert why in sharing_obstacle(model)
    with pytest.raises(InputError, match="cannot share a batch"):
        SharedTransformersEngine(model)


def test_positions_that_depend_on_the_longest_text_cannot_be_shared():
    model = build("llama")
    assert sharing_obstacle(model) is None
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "longest text" in sharing_obstacle(model)


METHODS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 40, "seed": 7},
    "antislop": {"methods": [Antislop(phrases=["the", "se", "o", "k"])], "do_sample": True, "seed": 3},
    "forced": {"methods": [BudgetForcing(end_think="e", min_ignores=2, ignore_text=" ship and rain")]},
}


def described(tokenizer, name):
    """A prompt of random length, and what is asked for."""
    rng = random.Random(name)
    ids = [rng.randrange(2, 320) for _ in range(rng.choice([1, 5, 30, 90]))]
    kind = rng.choice(list(METHODS))
    return ids, {**METHODS[kind], "max_new_tokens": rng.randint(1, 40), "chat": False}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_loops_on_slots_write_what_they_write_alone(make_model, tokenizer, kind):
    model, rng = make_model(kind), random.Random(0)
    engine, running, done = SharedTransformersEngine(model), {}, {}
    for turn in range(400):
        if turn < 24 and rng.random() < 0.6:
            ids, options = described(tokenizer, turn)
            slot = Slot(engine)
            loop = opened(model, tokenizer, ids, engine=lambda plugins, slot=slot: slot, **options)
            running[turn] = slot, loop, loop.running()
            running[turn][2].__enter__()
        blocks = {name: loop.pending()[0][0].tolist() for name, (_, loop, _) in running.items()}
        numbers = {name: running[name][0].feeding(len(block)) for name, block in blocks.items()}
        logits = engine.forward({numbers[name]: block for name, block in blocks.items()})
        for name in list(running):
            slot, loop, context = running[name]
            loop.receive(logits[numbers[name]][None])
            if not loop.active:
                done[name] = loop.output()
                context.__exit__(None, None, None)
                slot.free()
                del running[name]
    assert len(done) > 8 and not running and engine.cache_bytes() == 0
    for name, output in done.items():
        ids, options = described(tokenizer, name)
        alone = opened(model, tokenizer, ids, **options).generate()
        assert output.new_ids == alone.new_ids and output.stop_reasons == alone.stop_reasons
        assert [vars(e) | {"candidates": 0} for e in output.events] == [
            vars(e) | {"candidates": 0} for e in alone.events
        ]
