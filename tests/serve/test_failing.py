"""What goes wrong while a text is written: its client is told in one sentence, and the others go on."""

import asyncio
import functools
import json
import logging
import time
from typing import ClassVar

import httpx
import pytest
import torch
from support.families import build
from transformers import LogitsProcessor

from tokenry.decode import LoopMethod, Plugins
from tokenry.models.load import Loaded
from tokenry.serve import Worker, create_app

TRAP = 77  # prompts that begin with this token go wrong
ASKED = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Trapped(LogitsProcessor):
    """Fails, and then cannot give back what it holds either."""

    failed = False

    def __call__(self, input_ids, scores):
        self.failed = bool(input_ids[0, 0] == TRAP and input_ids.shape[1] > 8)
        if self.failed:
            raise ZeroDivisionError("a secret of the method")
        return scores

    def end(self):
        if self.failed:
            raise KeyError("what it held")


class Trap(LoopMethod):
    """Fails in the middle of some texts."""

    slug: ClassVar[str] = "trap"

    def plugins(self, model, tokenizer):
        return Plugins(processors=[Trapped()])


@pytest.fixture
def worker(chat_tokenizer):
    started = Worker(Loaded(build("llama"), chat_tokenizer), name="tiny", methods=[Trap()])
    yield started
    asyncio.run(started.close(0))


def together(worker, *bodies):
    """The answers to requests that are sent at one time."""
    transport = httpx.ASGITransport(create_app(worker), raise_app_exceptions=False)

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=ASKED | body) for body in bodies))

    return asyncio.run(ask())


def events(answer):
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]


def told(error):
    """Whether it is the error of a server, without what only its log may say."""
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "server_error"
    assert "secret" not in error["message"] and "Traceback" not in error["message"]
    return error["message"].count(".") == 0 and "log" in error["message"]


def test_a_failing_text_says_so_and_the_others_go_on(worker, caplog):
    wrong, right = {"prompt": [TRAP, 5, 6]}, {"prompt": [7, 5, 6]}
    alone = together(worker, right)[0].json()["choices"][0]["token_ids"]
    with caplog.at_level(logging.ERROR, "tokenry.serve"):
        stream, whole, other, streamed = together(
            worker, wrong | {"stream": True}, wrong, right, right | {"stream": True}
        )
    *pieces, error, done = events(stream)
    assert stream.status_code == 200 and len(pieces) == 6 and done == "[DONE]"
    assert told(json.loads(error)["error"])
    assert whole.status_code == 500 and told(whole.json()["error"])
    assert other.json()["choices"][0]["token_ids"] == alone
    ids = [token for event in events(streamed)[:-1] for token in json.loads(event)["choices"][0]["token_ids"]]
    assert ids == alone and len(ids) == 24
    assert caplog.text.count("KeyError: 'what it held'") == 2
    assert (
        len([record for record in caplog.records if record.exc_info[0] is ZeroDivisionError])
        == 2
        == worker.numbers()["failed"]
    )
    assert not worker.running and not worker.engine.places and not worker.engine.batches


def test_one_failing_text_of_a_request_ends_the_request(worker):
    answer = together(worker, {"prompt": [[7, 5, 6], [TRAP, 5, 6]], "max_tokens": 200})[0]
    assert answer.status_code == 500 and told(answer.json()["error"])
    assert together(worker, {"prompt": [7, 5]})[0].status_code == 200
    assert not worker.running and worker.numbers()["finished"] == 2


def test_an_expression_that_takes_too_long_ends_its_own_text(worker):
    say_a = {"logit_bias": {str(worker.tokenizer.encode("a")[0]): 60}, "max_tokens": 80}
    slow = {"prompt": [7, 5], "banned_regex": "(a|aa)+[bc]"} | say_a
    fine = {"prompt": [7, 5], "banned_regex": "(a+)+[bc]"} | say_a
    began = time.monotonic()
    answer, other = together(worker, slow, fine)
    assert time.monotonic() - began < 30  # unbounded it would take longer than the sun will shine
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert "(a|aa)+[bc]" in error["message"] and "takes more than 1 s" in error["message"]
    assert other.json()["choices"][0]["text"] == "a" * 80
    assert not worker.running and worker.numbers()["failed"] == 1


def ends(worker, where, error):
    """Let what the worker's thread does there raise an error once some tokens are written."""
    place = worker.loaded.model if where == "forward" else worker.engine
    whole = getattr(place, where)

    @functools.wraps(whole)
    def ending(*given, **named):
        if worker.counts["tokens_written"] > 5:
            raise error
        return whole(*given, **named)

    setattr(place, where, ending)


FATAL = [
    ("forward", torch.AcceleratorError("a secret of the device")),
    ("forward", SystemExit("a secret")),
    ("cache_bytes", KeyError("a secret, and no row is to blame")),
]


@pytest.mark.parametrize(("where", "error"), FATAL, ids=["device", "exit", "outside"])
def test_when_the_thread_of_the_model_ends_nobody_waits(chat_tokenizer, caplog, where, error):
    """Two texts are being written, one waits, one comes later: all end, and health and metrics say so."""
    worker = Worker(Loaded(build("llama"), chat_tokenizer), name="tiny", rows=2)
    ends(worker, where, error)
    transport = httpx.ASGITransport(create_app(worker), raise_app_exceptions=False)
    body = ASKED | {"prompt": [7, 5, 6], "max_tokens": 300}

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            before = await client.get("/health"), await client.get("/metrics")
            bodies = (body | {"stream": True}, body, body)
            answers = await asyncio.gather(*(client.post("/v1/completions", json=one) for one in bodies))
            later = [await client.post("/v1/completions", json=body | {"stream": stream}) for stream in (False, True)]
            return before, answers, later, await client.get("/health"), await client.get("/metrics")

    before, (stream, *answers), later, health, metrics = asyncio.run(asyncio.wait_for(ask(), 60))
    assert before[0].status_code == 200 and "tokenry_up 1.0" in before[1].text
    *pieces, last, done = events(stream)
    assert len(pieces) >= 2 and done == "[DONE]" and told(json.loads(last)["error"])
    for answer in (*answers, *later, health):
        assert answer.status_code == 503 and told(answer.json()["error"])
        assert answer.json()["error"]["code"] == "server_broken" and type(error).__name__ in answer.text
    for line in ("tokenry_up 0.0", "tokenry_failed 3.0", "tokenry_running 0.0", "tokenry_waiting 0.0"):
        assert line in metrics.text
    assert [record.exc_info[1] for record in caplog.records if record.levelname == "CRITICAL"] == [error]
    asyncio.run(worker.close(1.0))
