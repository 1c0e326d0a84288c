"""Prompts that begin like others are not read again: the same texts, fewer tokens, and the client is told."""

import asyncio
import json
import random

import pytest
from starlette.testclient import TestClient
from support.families import build
from support.gguf_files import save_gguf

import tokenry
from tokenry.decode import Antislop, BudgetForcing, generate
from tokenry.decode.engines.resting import common_beginning
from tokenry.models.load import Loaded
from tokenry.serve import Limits, Worker, create_app
from tokenry.serve.backend import Work

OPTIONS = {
    "greedy": {},
    "sampled": {"options": {"do_sample": True, "temperature": 1.3, "top_k": 40}, "seed": 7},
    "antislop": {"methods": [Antislop(phrases=["the", "se", "o", "k"])], "options": {"do_sample": True}, "seed": 3},
    "forced": {"methods": [BudgetForcing(end_think="e", min_ignores=2, ignore_text=" ship and rain")]},
}


@pytest.fixture(params=["llama", "gemma3", "gguf"])
def kind(request):
    return request.param


@pytest.fixture
def loaded(kind, chat_tokenizer, tmp_path, monkeypatch):
    if kind != "gguf":
        return Loaded(build(kind), chat_tokenizer)
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path / "cache"))
    model, _ = tokenry.load(save_gguf(build("llama"), chat_tokenizer, tmp_path / "tiny.gguf"), threads=1)
    return Loaded(model, chat_tokenizer)


@pytest.fixture
def started(loaded):
    """started(...): a worker around the model, closed at the end."""
    workers = []

    def start(**options):
        workers.append(Worker(loaded, "tiny", **options))
        return workers[-1]

    yield start
    for worker in workers:
        asyncio.run(worker.close(5))


def some(seed, count):
    return random.Random(seed).choices(range(2, 320), k=count)


async def gathered(worker, work):
    return [piece async for piece in worker.stream(work)]


def together(worker, *works):
    async def all_of_them():
        return await asyncio.gather(*(gathered(worker, work) for work in works))

    return asyncio.run(all_of_them())


def ids_of(pieces):
    return [token for piece in pieces for token in piece.ids]


def alone(loaded, work):
    given = {"methods": work.methods, "seed": work.seed, "max_new_tokens": work.max_new_tokens, **work.options}
    return generate(*loaded, list(work.prompt_ids), **given).new_ids[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_turns_of_a_chat_are_those_of_a_worker_that_reads_anew(started, loaded, name):
    reusing, anew = started(), started(reuse_memory=0)
    texts = {seed: some(seed, 90) for seed in range(2)}
    for turn in range(3):
        works = [Work(tuple(texts[seed]), 20, **OPTIONS[name]) for seed in texts]
        found, wanted = together(reusing, *works), together(anew, *works)
        for seed, work, one, other in zip(texts, works, found, wanted):
            assert ids_of(one) == ids_of(other) == alone(loaded, work)
            assert one[-1].events == other[-1].events and other[-1].reused == 0
            # all but the newest token, which was not fed, and what was written to say on
            assert one[-1].reused == (0 if turn == 0 else len(work.prompt_ids) - 12 - 1)
            texts[seed] += ids_of(one) + some(seed + 10 * turn, 12)
    numbers = reusing.numbers()
    assert numbers["tokens_read"] + numbers["tokens_reused"] == anew.numbers()["tokens_read"]
    assert numbers["cache_bytes"] == 0 < numbers["resting_bytes"] <= 2**30 and anew.numbers()["resting_bytes"] == 0


def test_texts_of_one_prompt_read_it_once(started, loaded, kind):
    worker, prompt = started(), tuple(some(1, 200))
    works = [Work(prompt, 9, **OPTIONS["sampled"] | {"seed": seed}) for seed in range(8)]
    found, numbers = together(worker, *works), worker.numbers()
    assert [ids_of(pieces) for pieces in found] == [alone(loaded, work) for work in works]
    if kind == "gemma3":  # whose windows have lost what the last token but one saw: those that begin later read all
        assert numbers["tokens_read"] + numbers["tokens_reused"] == 8 * 200
    else:
        assert numbers["tokens_read"] == 200 + 7
        assert [pieces[-1].reused for pieces in found] == [0] + [199] * 7


def test_clients_with_one_system_prompt_read_it_once(started, loaded, kind):
    """They come at one time, between texts that begin otherwise."""
    worker, system = started(), some(1, 150)
    tails = [some(seed, 10 + seed % 9) for seed in range(20, 32)]
    works = [Work((*system, *tail), 9) for tail in tails] + [Work(tuple(some(seed, 30)), 9) for seed in range(4)]
    random.Random(0).shuffle(works)
    found, numbers = together(worker, *works), worker.numbers()
    assert [ids_of(pieces) for pieces in found] == [alone(loaded, work) for work in works]
    assert numbers["tokens_read"] + numbers["tokens_reused"] == sum(len(work.prompt_ids) for work in works)
    if kind != "gemma3":
        assert numbers["tokens_read"] == 150 + sum(map(len, tails)) + 4 * 30


def test_after_a_failure_nothing_rests_and_those_that_had_waited_are_written(started, loaded, kind, monkeypatch):
    worker, prompt = started(), tuple(some(1, 300))
    together(worker, Work(tuple(some(2, 100)), 2))
    assert worker.numbers()["resting_bytes"] > 0
    forward, engine = worker.engine.forward, worker.engine

    def failing(blocks):
        forward(blocks)
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "forward", failing)

    async def three():
        return await asyncio.gather(*(gathered(worker, Work(prompt, 9)) for _ in range(3)), return_exceptions=True)

    found = asyncio.run(three())
    failed = [isinstance(one, MemoryError) for one in found]
    assert failed == ([True] * 3 if kind == "gemma3" else [True, False, False])
    wanted = alone(loaded, Work(prompt, 9))
    assert all(ids_of(one) == wanted for one, error in zip(found, failed) if not error)
    assert worker.engine is not engine
    assert together(worker, Work((*some(2, 100), 5), 2))[0][-1].reused == 0


def test_one_that_leaves_while_others_wait_for_it(started, loaded):
    """Nobody waits for what will not be read any more."""
    worker, prompt = started(), tuple(some(1, 400))

    async def leaving():
        first = asyncio.create_task(gathered(worker, Work(prompt, 9, deadline=0.0)))
        others = [asyncio.create_task(gathered(worker, Work((*prompt, seed), 9))) for seed in range(2, 5)]
        return await first, [await other for other in others]

    first, others = asyncio.run(leaving())
    assert first[-1].finish == "timeout"
    assert [ids_of(one) for one in others] == [alone(loaded, Work((*prompt, seed), 9)) for seed in range(2, 5)]


# --- what is told --------------------------------------------------------------------------------------------------


def counted(client, path, **asked):
    """The usage of an answer, whole and as a stream tells it."""
    whole = client.post(path, json=asked).json()["usage"]
    text = client.post(path, json=asked | {"stream": True, "stream_options": {"include_usage": True}}).text
    return whole, json.loads(text.split("\n\n")[-3].removeprefix("data: "))["usage"]


def test_usage_says_how_many_tokens_of_the_prompt_were_not_read(started, kind, chat_tokenizer):
    worker = started()
    client = TestClient(create_app(worker, limits=Limits(tokens=64)), base_url="http://testserver")
    given = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    talk = [{"role": "system", "content": "The sea is calm and the keeper walks along the shore. " * 4}]
    found, prompts = [], []
    for turn in range(2):
        talk.append({"role": "user", "content": f"Who is there? {turn}"})
        prompts.append(chat_tokenizer.apply_chat_template(talk, return_dict=False))
        found += counted(client, "/v1/chat/completions", messages=talk, **given)
    assert found[0]["prompt_tokens_details"] == {"cached_tokens": 0}
    again, later = found[1], found[2]
    if kind != "gemma3":  # where a prompt again would need what windows have lost
        assert again["prompt_tokens_details"] == {"cached_tokens": again["prompt_tokens"] - 1}
        assert later["prompt_tokens_details"] == {"cached_tokens": common_beginning(*prompts)}
    whole, streamed = counted(client, "/v1/completions", prompt=some(1, 100), n=2, **given)
    assert whole["prompt_tokens_details"] == {"cached_tokens": 0}  # though the second text has read one token alone
    assert streamed["prompt_tokens_details"] == {"cached_tokens": 0 if kind == "gemma3" else 99}
    page = client.get("/metrics").text
    for name in ("tokens_read", "tokens_reused", "resting_bytes"):
        assert f"tokenry_{name} {worker.numbers()[name]}" in page
    assert worker.numbers()["tokens_reused"] > 0 or kind == "gemma3"


def test_one_who_is_not_told_says_nothing(client):
    """As of another server, which counts for itself."""
    assert "prompt_tokens_details" not in client.post("/v1/completions", json={"prompt": "a"}).json()["usage"]
