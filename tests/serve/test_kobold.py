"""KoboldCpp's own routes: recorded bodies, the same texts as OpenAI's routes write, and texts that are aborted."""

import asyncio
import json
import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from tokenry.serve import Limits, create_app

BODIES = Path(__file__).parent / "bodies"
ASKED = {"prompt": "the old lighthouse", "max_length": 12, "temperature": 0}
WHOLE, STREAM, ABORT = "/api/v1/generate", "/api/extra/generate/stream", "/api/extra/abort"
CHECK, COUNT = "/api/extra/generate/check", "/api/extra/tokencount"


def recorded(name):
    return json.loads((BODIES / f"{name}.json").read_text())


def messages(text):
    """The JSON of a stream's messages."""
    parts = [part.split("\n") for part in text.removesuffix("\n\n").split("\n\n")]
    assert all(head == "event: message" and line.startswith("data: ") for head, line in parts)
    return [json.loads(line.removeprefix("data: ")) for _, line in parts]


def written(client, body):
    """The choice of OpenAI's route for the same request."""
    body = {name: value for name, value in body.items() if name != "genkey"}
    return client.post("/v1/completions", json=body).json()


def test_a_recorded_body_is_answered_as_koboldcpp_does(client):
    record = recorded("koboldcpp_native")
    answer, same = client.post(record["path"], json=record["body"]), written(client, record["body"])
    assert answer.status_code == 200 and answer.headers.get("x-tokenry-ignored", "") == record["ignored"]
    (result,), choice, usage = answer.json()["results"], same["choices"][0], same["usage"]
    assert result == {
        "text": choice["text"],
        "finish_reason": choice["finish_reason"],
        "logprobs": None,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


def test_a_recorded_stream_is_the_same_text_in_messages(client):
    record = recorded("sillytavern_kobold")
    answer, same = client.post(record["path"], json=record["body"]), written(client, record["body"])["choices"][0]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers.get("x-tokenry-ignored", "") == record["ignored"]
    *parts, last = messages(answer.text)
    assert all(set(part) == {"token", "finish_reason"} and part["finish_reason"] is None for part in parts)
    assert "".join(part["token"] for part in [*parts, last]) == same["text"]
    assert last["finish_reason"] == same["finish_reason"]


def test_what_clients_ask_first(client, backend):
    assert client.get("/api/v1/model").json() == {"result": "koboldcpp/tiny"}
    version = client.get("/api/extra/version").json()
    assert version["result"] == "KoboldCpp" and tuple(map(int, version["version"].split("."))) >= (1, 76)
    assert client.get("/api/v1/info/version").json() == {"result": "1.2.5"}
    for path in ("/api/v1/config/max_context_length", "/api/extra/true_max_context_length"):
        assert client.get(path).json() == {"value": backend.window}


def test_tokens_are_counted(client, backend):
    """Clients fit a chat into the window by that; the first body is SillyTavern's."""
    ids = backend.tokenizer.encode("Seraphina", add_special_tokens=False)
    asked = {"prompt": "Seraphina", "special": False}
    assert client.post(COUNT, json=asked).json() == {"value": len(ids), "ids": ids}
    whole = client.post(COUNT, json={"prompt": "the old"}).json()["ids"]
    assert (
        whole
        == written(client, {"prompt": "the old", "max_tokens": 1, "return_token_ids": True})["choices"][0][
            "prompt_token_ids"
        ]
    )
    assert client.post(COUNT, json={"prompt": ""}).json() == {"value": 0, "ids": []}
    for body in ({}, {"prompt": 7}, {"prompt": "\ud800"}):
        assert client.post(COUNT, content=json.dumps(body)).status_code == 400


@pytest.mark.parametrize("path", [WHOLE, STREAM])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"max_length": 65}, "at most 64"),
        ({"memory": "once"}, "not done here"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n=2"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"banned_tokens": ["<eos>"]}, "special token"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(client, path, fields, said):
    answer = client.post(path, json=ASKED | fields)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_the_api_key_is_asked_for_here_too(backend):
    client = TestClient(create_app(backend, api_key="right"), base_url="http://testserver")
    for path in (WHOLE, STREAM, ABORT, CHECK, COUNT):
        assert client.post(path, json=ASKED).status_code == 401
    right = {"Authorization": "Bearer right"}
    assert client.post(WHOLE, json=ASKED, headers=right).status_code == 200
    assert client.get("/api/v1/model").status_code == 401


def test_nothing_to_abort(client):
    assert client.post(ABORT).json() == client.post(ABORT, json={"genkey": "x"}).json() == {"success": "false"}


@pytest.mark.parametrize("path", [WHOLE, STREAM])
def test_an_aborted_text_ends_as_it_is_and_no_other_does(backend, path):
    """Its client gets what was written; a text of another key, which waits, is written whole."""
    backend.pause = 0.02
    app = create_app(backend, limits=Limits(tokens=64))
    long = ASKED | {"max_length": 60, "ignore_eos": True, "logit_bias": {str(backend.tokenizer.encode("a")[0]): 60}}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
            mine = asyncio.create_task(client.post(path, json=long | {"genkey": "mine"}))
            while backend.written < 5:
                await asyncio.sleep(0.01)
            other = asyncio.create_task(client.post(WHOLE, json=long | {"genkey": "other", "max_length": 8}))
            nobody = await client.post(ABORT, json={"genkey": "nobody"})
            aborted = await client.post(ABORT, json={"genkey": "mine"})
            return nobody.json(), aborted.json(), await mine, await other

    began = time.monotonic()
    nobody, aborted, mine, other = asyncio.run(ask())
    assert nobody == {"success": "false"} and aborted == {"success": "true"}
    parts = messages(mine.text) if path == STREAM else mine.json()["results"]
    text = "".join(part["token" if path == STREAM else "text"] for part in parts)
    assert parts[-1]["finish_reason"] == "stop" and 4 <= len(text) < 40 and set(text) == {"a"}
    assert other.json()["results"][0]["text"] == "a" * 8
    while backend.now and time.monotonic() < began + 5:
        time.sleep(0.01)
    assert backend.left == 1 and backend.now is None


@pytest.mark.parametrize("path", [WHOLE, STREAM])
@pytest.mark.parametrize("key", ["", "mine"])
def test_what_there_is_of_a_text_can_be_asked_for(backend, path, key):
    """By its key alone, while it is written: more and more of it, and nothing once it has ended."""
    backend.pause = 0.02
    asked = ASKED | {"max_length": 40, "ignore_eos": True, "logit_bias": {str(backend.tokenizer.encode("a")[0]): 60}}

    async def ask():
        transport = httpx.ASGITransport(create_app(backend, limits=Limits(tokens=64)))
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:

            async def check(genkey):
                answers = [await client.post(CHECK, json={"genkey": genkey})]
                answers += [await client.post(CHECK), await client.get(CHECK)] if not genkey else []
                return [answer.json()["results"][0]["text"] for answer in answers]

            writing, seen = asyncio.create_task(client.post(path, json=asked | {"genkey": key})), []
            while not writing.done():
                seen += await check(key)
                assert await check("other") == [""]
                await asyncio.sleep(0.05)
            return seen, await check(key)

    seen, after = asyncio.run(ask())
    assert seen == sorted(seen) and set("".join(seen)) == {"a"} and len(set(seen)) > 3 and set(after) == {""}
