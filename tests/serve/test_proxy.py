"""The proxy: the pieces of texts that another server writes."""

import asyncio
from typing import ClassVar

import httpx
import pytest
from support.completions_server import completions_server
from support.writer import writer

from tokenry import InputError
from tokenry.decode import Antislop, CyclicReflex, MonitorMethod, RemoteServer, generate
from tokenry.serve import create_app
from tokenry.serve.backend import Busy, Work
from tokenry.serve.proxy import Proxy

PROMPTS = ["the old lighthouse", "The keeper", "It was not"]
BANS = Antislop(phrases=["the sea", "a whisper", "seemed to", "testament to", "along the shore"])


@pytest.fixture(scope="module")
def model(tokenizer):
    return writer(tokenizer)


@pytest.fixture
def server(model, tokenizer):
    with completions_server(model, tokenizer) as server:
        yield server


def served(server, tokenizer, body, **options):
    """Run `body(proxy)` in an event loop of its own."""

    async def whole():
        proxy = Proxy(RemoteServer(server.url, timeout=5, retries=1), tokenizer, **options)
        server.requests.clear()
        try:
            return await body(proxy)
        finally:
            await proxy.close(0)

    return asyncio.run(whole())


def work(tokenizer, prompt=PROMPTS[0], **options):
    options = {"max_new_tokens": 40, "methods": [BANS], "options": {"do_sample": False}, **options}
    return Work(tokenizer.encode(prompt), **options)


async def read(proxy, work):
    return [piece async for piece in proxy.stream(work)]


def test_pieces_together_are_the_text_of_the_local_loop(server, model, tokenizer):
    async def body(proxy):
        assert (proxy.name, proxy.window) == ("tiny", None)
        texts = await asyncio.gather(*(read(proxy, work(tokenizer, prompt)) for prompt in PROMPTS))
        return texts, proxy.numbers()

    texts, numbers = served(server, tokenizer, body)
    for prompt, pieces in zip(PROMPTS, texts):
        here = generate(model, tokenizer, prompt, methods=[BANS], max_new_tokens=40)
        assert [token for piece in pieces for token in piece.ids] == here.new_ids[0]
        assert "".join(piece.text for piece in pieces) == here.texts[0].rstrip("�")
        assert len(pieces) > 2 and [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish == "length" and len(pieces[-1].events) == len(here.events) > 0
        assert pieces[-1].events[0]["rule"] == here.events[0].rule and "context_ids" not in pieces[-1].events[0]
    assert numbers["running"] == numbers["waiting"] == numbers["failed"] == 0 and numbers["finished"] == 3
    assert numbers["tokens_written"] >= 120 and numbers["tokens_read"] == sum(len(tokenizer.encode(p)) for p in PROMPTS)


def test_stop_strings_and_bias_and_seeds_go_along(server, model, tokenizer):
    token = tokenizer.encode(" the", add_special_tokens=False)[0]

    async def body(proxy):
        stopped = await read(proxy, work(tokenizer, stop=("sound",), methods=()))
        await read(proxy, work(tokenizer, logit_bias={token: -7.0}, options={"do_sample": True}, seed=5))
        return stopped

    pieces = served(server, tokenizer, body)
    written = tokenizer.decode([token for piece in pieces for token in piece.ids])
    assert pieces[-1].finish == "stop" and written.endswith("sound")
    assert "".join(piece.text for piece in pieces) == written.removesuffix("sound")
    assert server.requests[-1]["logit_bias"][str(token)] == -7.0 and server.requests[-1]["seed"] >= 0


def test_logprobs_are_the_models_own(server, model, tokenizer):
    import torch

    pieces = served(server, tokenizer, lambda proxy: read(proxy, work(tokenizer, logprobs=3)))
    ids, ranked = ([one for piece in pieces for one in getattr(piece, name)] for name in ("ids", "logprobs"))
    prompt = tokenizer.encode(PROMPTS[0])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, one, wanted in zip(ids, ranked, logits, strict=True):
        assert one.token == token and one.logprob == pytest.approx(float(wanted[token]), abs=1e-3)
        assert list(one.top) == wanted.topk(3).indices.tolist()


def test_leaving_closes_the_connection_and_frees(server, tokenizer):
    async def body(proxy):
        server.faults[:] = [None, 20.0]
        stream = proxy.stream(work(tokenizer))
        first = await anext(stream)
        assert first.ids
        while len(server.requests) < 2:
            await asyncio.sleep(0.01)
        await stream.aclose()
        for _ in range(200):
            if server.gone:
                break
            await asyncio.sleep(0.02)
        assert server.gone == 1 and proxy.numbers()["running"] == 0
        return await read(proxy, work(tokenizer))  # and it goes on for others

    assert served(server, tokenizer, body)[-1].finish == "length"


def test_a_deadline_ends_a_text_as_it_is(server, tokenizer):
    async def body(proxy):
        server.faults[:] = [None, 20.0]
        return await read(proxy, work(tokenizer, deadline=0.8))

    pieces = served(server, tokenizer, body)
    assert pieces[-1].finish == "timeout" and len(pieces) > 1


def test_too_many_are_refused(server, tokenizer):
    async def body(proxy):
        server.faults[:] = [20.0]
        first, second = (asyncio.ensure_future(read(proxy, work(tokenizer))) for _ in range(2))
        await asyncio.sleep(0.2)
        assert (proxy.numbers()["running"], proxy.numbers()["waiting"]) == (1, 1)
        with pytest.raises(Busy, match="try again in a moment") as caught:
            await read(proxy, work(tokenizer))
        assert caught.value.retry_after > 0
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert proxy.numbers()["running"] == proxy.numbers()["waiting"] == 0
        await proxy.close(0)
        with pytest.raises(Busy, match="is closing"):
            await read(proxy, work(tokenizer))

    served(server, tokenizer, body, rows=1, waiting=1)


def test_closing_lets_texts_end_or_ends_them(server, tokenizer):
    async def body(proxy):
        task = asyncio.ensure_future(read(proxy, work(tokenizer)))
        await asyncio.sleep(0)
        await proxy.close(10)
        return await task

    assert served(server, tokenizer, body)[-1].finish == "length"

    async def late(proxy):
        server.faults[:] = [None, 20.0]
        task = asyncio.ensure_future(read(proxy, work(tokenizer)))
        await asyncio.sleep(0.3)
        await proxy.close(0.1)
        return await task

    assert served(server, tokenizer, late)[-1].finish == "cancelled"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"methods": [CyclicReflex()]}, "cyclicreflex needs the model or its scores"),
        ({"options": {"num_beams": 2}}, "num_beams is nothing to ask a server for"),
        ({"logprobs": 50}, "50 log-probabilities of a token are more than servers tell"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_piece(server, tokenizer, change, said):
    async def body(proxy):
        with pytest.raises(InputError, match=said):
            await read(proxy, work(tokenizer, **change))
        assert not server.requests

    served(server, tokenizer, body)


def test_what_the_server_refuses_comes_out_of_the_stream(server, tokenizer):
    async def body(proxy):
        server.faults[:] = [None, (400, {}, '{"error": {"message": "no room"}}')]
        with pytest.raises(InputError, match="no room"):
            await read(proxy, work(tokenizer))
        return proxy.numbers()["failed"]

    assert served(server, tokenizer, body) == 1


class Stumbles:
    """A monitor that goes wrong where the text is long enough."""

    def __init__(self, error):
        self.error = error

    def check(self, row):
        if len(row.ids) > 12:
            raise self.error("a method went wrong")

    def hold(self, row):
        return 0


class Stumbling(MonitorMethod):
    """Watches, and fails."""

    slug: ClassVar[str] = "stumbling"
    error: type[BaseException]

    def monitors(self, tokenizer):
        return [Stumbles(self.error)]


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_a_method_that_fails_ends_its_own_text(server, tokenizer, kind):
    """The client is told in a last event; nothing is left, and another text is written whole."""
    body = {"prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stream": True}

    async def ask(proxy):
        async def one(**options):
            transport = httpx.ASGITransport(create_app(proxy, **options))
            async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
                return (await client.post("/v1/completions", json=body)).text

        texts = await asyncio.gather(one(methods=[Stumbling(error=kind)]), one(methods=[BANS]))
        return texts, dict(proxy.numbers())

    (failing, other), numbers = served(server, tokenizer, ask)
    *pieces, error, done = failing.strip().split("\n\n")
    assert pieces and '"type":"server_error"' in error and "its log says where" in error and done == "data: [DONE]"
    assert "went wrong" not in failing and '"error"' not in other and '"finish_reason":"length"' in other
    assert (numbers["failed"], numbers["finished"], numbers["running"], numbers["waiting"]) == (1, 1, 0, 0)


def test_when_the_thread_of_the_requests_ends_nobody_waits(server, tokenizer):
    """One text is being written, one waits, one comes later: all end, and health says so."""

    async def body(proxy):
        server.faults[:] = [None, 20.0]
        transport = httpx.ASGITransport(create_app(proxy), raise_app_exceptions=False)
        asked = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            texts = [asyncio.create_task(client.post("/v1/completions", json=asked)) for _ in range(2)]
            while len(server.requests) < 2:
                await asyncio.sleep(0.01)
            assert (await client.get("/health")).status_code == 200
            proxy.server.events.call_soon_threadsafe(exit)
            answers = await asyncio.wait_for(asyncio.gather(*texts), 10)
            answers += [await client.post("/v1/completions", json=asked), await client.get("/health")]
            return answers, (await client.get("/metrics")).text

    answers, metrics = served(server, tokenizer, body, rows=1)
    for answer in answers:
        error = answer.json()["error"]
        assert answer.status_code == 503 and error["code"] == "server_broken" and "(SystemExit)" in error["message"]
    assert "tokenry_up 0.0" in metrics and "tokenry_failed 2.0" in metrics
    assert "tokenry_running 0.0" in metrics and "tokenry_waiting 0.0" in metrics
