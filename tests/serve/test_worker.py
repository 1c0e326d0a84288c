"""The worker: what every request gets is what it would get alone, and none waits for, or falls with, another."""

import asyncio
import random
import threading
import time
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from support.families import build
from transformers import LogitsProcessor, MambaConfig, MambaForCausalLM

from tokenry import InputError
from tokenry.decode import (
    Antislop,
    BudgetForcing,
    LoopMethod,
    MaskedDiffusion,
    Plan,
    PlanMethod,
    Plugins,
    RunnerMethod,
    Spectr,
    generate,
)
from tokenry.models.load import Loaded
from tokenry.serve.backend import Busy, Work
from tokenry.serve.worker import Worker
from tokenry.serve.writing import CHUNK

KINDS = ["llama", "qwen2", "opt", "gemma3", "mamba", "stretched"]


def made(kind, tokenizer):
    if kind == "stretched":  # its texts cannot share, but are read in chunks
        model = build("llama")
        model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        return Loaded(model, tokenizer)
    if kind != "mamba":
        return Loaded(build(kind), tokenizer)
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, pad_token_id=1, eos_token_id=0)
    return Loaded(MambaForCausalLM(config).eval(), tokenizer)


@pytest.fixture
def llama_worker(tokenizer):
    """serving(rows=...): a worker around a tiny Llama, closed at the end."""
    workers = []

    def start(**options):
        workers.append(Worker(Loaded(build("llama"), tokenizer), name="tiny", **options))
        return workers[-1]

    yield start
    for worker in workers:
        asyncio.run(worker.close(0))
        assert not worker.thread.is_alive() and not worker.running and not worker.queue


async def gathered(worker, work):
    return [piece async for piece in worker.stream(work)]


def ids_of(pieces):
    return [token for piece in pieces for token in piece.ids]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


async def until(holds):
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to that")


def ended(worker):
    """Whether nothing is left of any request."""
    engine = worker.engine
    return not worker.running and not worker.queue and (engine is None or not (engine.places or engine.batches))


OPTIONS = [
    {},
    {"options": {"do_sample": True, "temperature": 1.3, "top_k": 40}, "seed": 7},
    {"methods": [Antislop(phrases=["the", "se", "o"])], "options": {"do_sample": True}, "seed": 3},
    {"methods": [BudgetForcing(end_think="e", min_ignores=2, ignore_text=" ship and rain")]},
    {"methods": [Spectr(drafter="prompt-lookup")]},
    {"logit_bias": {40: 100.0, 41: 99.0, 50: -100.0}, "options": {"repetition_penalty": 1.5}},
    {"stop": ["e"], "options": {"do_sample": True}, "seed": 11},
]


def alone(loaded, work):
    """The ids that the request gets by itself."""
    bias = {(token,): value for token, value in work.logit_bias.items()}
    output = generate(
        *loaded,
        list(work.prompt_ids),
        methods=work.methods,
        seed=work.seed,
        stop=work.stop,
        max_new_tokens=work.max_new_tokens,
        **work.options,
        **({"sequence_bias": bias} if bias else {}),
    )
    return output.new_ids[0], output.events


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_come_and_go_get_what_they_would_get_alone(tokenizer, kind):
    loaded, rng = made(kind, tokenizer), random.Random(kind)
    worker = Worker(loaded, rows=6, waiting=99)
    assert (worker.engine is None) == (kind in ("mamba", "stretched"))
    options = [one for one in OPTIONS if kind not in ("mamba",) or not isinstance(one.get("methods", [0])[0], Spectr)]
    works = []
    for number in range(24):
        length = rng.choice([1, 6, 40, 100]) if number else CHUNK + 90
        ids = (*(rng.randrange(2, 320) for _ in range(length - 1)), *tokenizer.encode("a"))  # no half character last
        works.append(Work(ids, rng.randint(1, 30), **options[number % len(options)]))

    async def one(work):
        await asyncio.sleep(rng.random() / 2)
        return await gathered(worker, work)

    async def leaves_early():
        await asyncio.sleep(rng.random() / 2)
        async for piece in worker.stream(Work((5, 6, 7), 400)):
            if piece.ids:
                return

    async def all_of_them():
        found, _ = await asyncio.gather(
            asyncio.gather(*map(one, works)), asyncio.gather(*(leaves_early() for _ in range(6)))
        )
        await until(lambda: ended(worker))
        await worker.close(10)
        return found

    for work, pieces in zip(works, asyncio.run(all_of_them())):
        ids, events = alone(loaded, work)
        assert ids_of(pieces) == ids
        assert pieces[-1].finish in ("stop", "length") and all(piece.finish is None for piece in pieces[:-1])
        assert [e["rejected"] for e in pieces[-1].events] == [e.rejected for e in events]
        if not work.stop:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert text_of(pieces) == text
    assert worker.numbers()["cache_bytes"] == 0
    assert worker.numbers()["tokens_written"] >= sum(len(alone(loaded, work)[0]) for work in works)


def test_a_short_answer_does_not_wait_for_a_long_one(llama_worker):
    worker = llama_worker()

    async def both():
        long = asyncio.create_task(gathered(worker, Work((5, 6, 7), 300)))
        await until(lambda: worker.counts["tokens_written"] > 5)
        await gathered(worker, Work((8, 9), 3))
        assert not long.done()
        long.cancel()
        await until(lambda: ended(worker))

    asyncio.run(both())


@pytest.mark.parametrize("kind", ["llama", "stretched"])
def test_a_long_prompt_is_read_between_the_steps_of_others(tokenizer, kind):
    worker = Worker(made(kind, tokenizer))
    long = Work(tuple(range(2, 318)) + (7,) * (CHUNK // 2), 3)

    async def both():
        first = asyncio.create_task(gathered(worker, Work((5, 6, 7), 300)))
        await until(lambda: worker.counts["tokens_written"] > 5)
        second, seen = asyncio.create_task(gathered(worker, long)), {}
        while not second.done():
            seen.setdefault(worker.counts["tokens_read"] - 3, worker.counts["tokens_written"])
            await asyncio.sleep(0)
        first.cancel()
        await worker.close(5)
        return second.result(), list(seen)

    pieces, read = asyncio.run(both())
    assert ids_of(pieces) == alone(worker.loaded, long)[0]
    assert set(read) <= {0, CHUNK, len(long.prompt_ids)} and read[-1] == len(long.prompt_ids)


def test_hundred_short_requests_leave_nothing(llama_worker):
    worker = llama_worker(rows=3)

    async def hundred():
        for number in range(100):
            pieces = await gathered(worker, Work((5, 6, 7 + number), 2, seed=number))
            assert len(ids_of(pieces)) <= 2
        await until(lambda: ended(worker))

    asyncio.run(hundred())
    numbers = worker.numbers()
    assert numbers["finished"] == 100 and numbers["cache_bytes"] == 0 and numbers["tokens_read"] == 300


class Breaks(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 6:
            raise ZeroDivisionError("a method went wrong")
        return scores


class Breaking(LoopMethod):
    """Fails after some tokens."""

    slug: ClassVar[str] = "breaking"

    def plugins(self, model, tokenizer):
        return Plugins(processors=[Breaks()])


def test_an_error_ends_its_own_request_alone(llama_worker):
    worker = llama_worker()
    others = [Work((5, 6, number), 25) for number in range(7, 12)]

    async def all_of_them():
        found = [asyncio.create_task(gathered(worker, work)) for work in others]
        seen = []
        with pytest.raises(ZeroDivisionError, match="went wrong"):
            async for piece in worker.stream(Work((3, 4, 5), 25, methods=[Breaking()])):
                seen += piece.ids
        assert len(seen) == 4
        await asyncio.gather(*found)
        await until(lambda: ended(worker))
        return [task.result() for task in found]

    for work, pieces in zip(others, asyncio.run(all_of_them())):
        assert ids_of(pieces) == alone(worker.loaded, work)[0]
    assert worker.numbers()["failed"] == 1


class Reads(PlanMethod):
    """Continues what it has read with words of its own."""

    slug: ClassVar[str] = "reads"

    def plan(self, model, tokenizer, prompts, call):
        assert isinstance(prompts, str) and not call.chat
        return Plan(tokenizer([prompts + " and then"], return_tensors="pt"), Plugins(), {})


class Writes(RunnerMethod):
    """Writes by itself, with the plain loop."""

    slug: ClassVar[str] = "writes"

    def run(self, model, tokenizer, prompts, call, others=()):
        return generate(
            model, tokenizer, prompts, max_new_tokens=call.max_new_tokens, streamers=call.streamers, chat=False
        )


class Changes(LoopMethod):
    """Brings a context around the model."""

    slug: ClassVar[str] = "changes"

    def plugins(self, model, tokenizer):
        return Plugins(interventions=[nullcontext()])


def test_a_method_that_reads_questions_gets_the_words(llama_worker, tokenizer):
    worker = llama_worker()
    text = "the old lighthouse"
    work = Work(tuple(tokenizer.encode(text)), 9, methods=[Reads()], prompt=text)
    expected = alone(worker.loaded, Work(tuple(tokenizer.encode(text + " and then")), 9))[0]
    assert ids_of(asyncio.run(gathered(worker, work))) == expected


def test_a_method_that_writes_by_itself_is_run_whole_and_ends_where_nobody_reads_on(llama_worker):
    worker = llama_worker()

    async def all_of_them():
        beside = asyncio.create_task(gathered(worker, Work((5, 6), 30)))
        pieces = await gathered(worker, Work((5, 6, 7), 12, methods=[Writes()]))
        cut = await gathered(worker, Work((5, 6, 7), 490, methods=[Writes()], deadline=0.1))
        return pieces, cut, await beside

    pieces, cut, beside = asyncio.run(all_of_them())
    assert ids_of(pieces) == alone(worker.loaded, Work((5, 6, 7), 12))[0] and pieces[-1].finish == "length"
    assert [(piece.ids, piece.finish) for piece in cut] == [((), "timeout")]
    assert ids_of(beside) == alone(worker.loaded, Work((5, 6), 30))[0]


def test_contexts_around_the_model_would_hold_for_every_text(llama_worker):
    with pytest.raises(InputError, match="change the model for every text"):
        asyncio.run(gathered(llama_worker(), Work((5, 6), 3, methods=[Changes()])))


def test_a_forward_that_fails_ends_those_in_it_and_later_ones_go_on(llama_worker, monkeypatch):
    worker = llama_worker()
    work = Work((5, 6, 7), 20)

    async def both():
        real = worker.engine.forward

        def failing(blocks):
            if worker.counts["tokens_written"] > 3:
                raise MemoryError("no room")
            return real(blocks)

        monkeypatch.setattr(worker.engine, "forward", failing)
        with pytest.raises(MemoryError):
            await gathered(worker, work)
        return await gathered(worker, work)

    assert ids_of(asyncio.run(both())) == alone(worker.loaded, work)[0]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (Work(tuple(range(2, 300)) * 2, 5), "596 tokens, the model's context window 512"),
        (Work((), 5), "the prompt is empty"),
        (Work((5, 4000), 5), "ids 0 to 319"),
        (Work((5,), 0), "max_new_tokens=0"),
        (Work((5,), 5, logit_bias={999: 1.0}), "logit_bias names token 999"),
        (Work((5,), 5, logprobs=101), "logprobs=101"),
        (Work((5,), 5, options={"num_beams": 3}), "num_beams=3"),
        (Work((5,), 5, options={"do_sample": True, "temperature": -1.0}), "temperature"),
        (Work((5,), 5, stop=("",)), "empty stop string"),
        (Work((5,), 5, methods=[MaskedDiffusion()]), "no mask token"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_piece(llama_worker, work, said):
    worker = llama_worker()
    with pytest.raises(InputError, match=said):
        asyncio.run(gathered(worker, work))
    asyncio.run(until(lambda: ended(worker)))


def test_sizes_are_checked(tokenizer):
    with pytest.raises(InputError, match="rows=0"):
        Worker(Loaded(build("llama"), tokenizer), rows=0)


def test_a_full_queue_is_busy(llama_worker):
    worker = llama_worker(rows=1, waiting=1)

    async def three():
        first, second = (asyncio.create_task(gathered(worker, Work((5, 6), 300))) for _ in range(2))
        await until(lambda: len(worker.running) + len(worker.queue) == 2)
        with pytest.raises(Busy, match="ask again later") as refused:
            await gathered(worker, Work((5, 6), 3))
        assert refused.value.retry_after >= 1
        first.cancel()
        second.cancel()
        await until(lambda: ended(worker))
        assert len(ids_of(await gathered(worker, Work((5, 6), 3)))) == 3

    asyncio.run(three())


def test_a_deadline_ends_the_text_where_it_is_also_while_it_waits(llama_worker):
    worker = llama_worker(rows=1)
    whole = alone(worker.loaded, Work((5, 6, 7), 500))[0]

    async def both():
        first = asyncio.create_task(gathered(worker, Work((5, 6, 7), 500, deadline=0.4)))
        await until(lambda: worker.running)
        return await gathered(worker, Work((5, 6), 3, deadline=0.1)), await first

    waited, written = asyncio.run(both())
    assert [(piece.ids, piece.finish) for piece in waited] == [((), "timeout")]
    ids = ids_of(written)
    assert written[-1].finish == "timeout" and 0 < len(ids) < len(whole) and ids == whole[: len(ids)]


def test_closing_lets_texts_end_and_ends_those_that_take_too_long(llama_worker):
    worker = llama_worker()

    forward = worker.engine.forward

    def slowly(blocks):  # 480 tokens take longer than the worker has, 20 do not
        time.sleep(0.01)
        return forward(blocks)

    worker.engine.forward = slowly

    async def closed():
        short, long = (asyncio.create_task(gathered(worker, Work((5, 6, 7), n))) for n in (20, 480))
        await until(lambda: len(worker.running) == 2)
        closing = asyncio.create_task(worker.close(2.0))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="about to end"):
            await gathered(worker, Work((5,), 3))
        await closing
        return await short, await long

    short, long = asyncio.run(closed())
    assert short[-1].finish in ("stop", "length") and long[-1].finish == "cancelled"
    assert not worker.thread.is_alive()


def test_pieces_go_to_the_event_loop_that_asked(llama_worker):
    worker, found = llama_worker(), []
    threads = [
        threading.Thread(target=lambda n=n: found.append(asyncio.run(gathered(worker, Work((5, n), 9)))))
        for n in range(6, 10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(ids_of(pieces)) for pieces in found) == [9] * 4


def test_log_probabilities_are_the_models_own(llama_worker, tokenizer):
    worker = llama_worker()
    work = Work((5, 6, 7), 12, methods=[Antislop(phrases=["o", "e"])], logprobs=3, options={"temperature": 0.5})
    pieces = asyncio.run(gathered(worker, work))
    ids, told = ids_of(pieces), [one for piece in pieces for one in piece.logprobs]
    assert [one.token for one in told] == ids
    with torch.no_grad():
        scores = worker.loaded.model(torch.tensor([[5, 6, 7, *ids]])).logits[0, 2:-1].log_softmax(-1)
    for one, row in zip(told, scores):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-3)
        assert list(one.top) == row.topk(3).indices.tolist()


def test_methods_of_the_server_are_for_those_that_bring_none(llama_worker, tokenizer):
    worker = llama_worker(methods=[Antislop(phrases=["s"])])
    texts = [
        text_of(asyncio.run(gathered(worker, Work((5, 6, 7), 60, methods=methods))))
        for methods in ((), [Antislop(phrases=["zz"])])
    ]
    assert "s" not in texts[0] and "s" in texts[1]


@pytest.mark.parametrize("stop", ["e", "the", "dream", "🙂"])
def test_a_stop_string_is_no_part_of_the_text(llama_worker, tokenizer, stop):
    worker = llama_worker()
    work = Work((5, 6, 7), 200, stop=(stop,), options={"do_sample": True, "temperature": 3.0}, seed=1)
    pieces = asyncio.run(gathered(worker, work))
    whole = tokenizer.decode(ids_of(pieces), skip_special_tokens=True)
    assert text_of(pieces) == whole.split(stop)[0]
    assert pieces[-1].finish == ("stop" if stop in whole or ids_of(pieces)[-1] == 0 else "length")
