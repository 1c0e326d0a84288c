"""The routes: through OpenAI's own client without a port, once over a port, and with bad input of every kind."""

import asyncio
import json
import logging
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from starlette.testclient import TestClient
from support.serving import OneByOne

import tokenry
from tokenry.decode import Antislop
from tokenry.serve import Limits, create_app
from tokenry.serve.running import Server, bound

BODIES = sorted((Path(__file__).parent / "bodies").glob("*.json"))
OPENAI = [file for file in BODIES if '"/v1/' in file.read_text()]  # the others are in test_kobold
PROMPT = "the old lighthouse"
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0}


def written(backend, prompt=PROMPT, **options):
    """What the loop itself writes."""
    return tokenry.generate(backend.model, backend.tokenizer, prompt, chat=False, **options)


def events(text):
    """The JSON of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(answer, status, *words):
    """The error of an answer, after a look at its shape."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words) and "\n" not in error["message"]
    return error


# --- texts ---------------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_loop_writes(ai, backend):
    answer = ai.completions.create(**GREEDY, max_tokens=12, extra_body={"return_token_ids": True})
    out = written(backend, max_new_tokens=12)
    assert answer.choices[0].text == out.texts[0] and answer.choices[0].token_ids == out.new_ids[0]
    assert answer.choices[0].prompt_token_ids == out.prompt_ids[0]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(out.prompt_ids[0]), 12)
    assert answer.choices[0].finish_reason == "length" and answer.model == "tiny"


def test_a_stream_is_the_same_text_in_pieces(ai, backend):
    seeded = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    whole = ai.completions.create(**seeded)
    chunks = list(ai.completions.create(**seeded, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length" and len(chunks) > 3
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    out = written(backend, max_new_tokens=12, do_sample=True, seed=5, temperature=1.5, top_p=0.9, top_k=0)
    assert whole.choices[0].text == out.texts[0]


def test_a_chat(ai, backend):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    answer = ai.chat.completions.create(**asked)
    out = written(backend, "user: hello\nassistant:", max_new_tokens=8)
    assert answer.choices[0].message.content == out.texts[0]
    chunks = list(ai.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == out.texts[0]


def test_ids_in_and_ids_out_in_a_stream(client, backend):
    ids = backend.tokenizer.encode(PROMPT)
    asked = {**GREEDY, "prompt": ids, "max_tokens": 6, "stream": True, "return_token_ids": True}
    choices = [event["choices"][0] for event in events(client.post("/v1/completions", json=asked).text)]
    assert choices[0]["prompt_token_ids"] == ids
    assert [token for c in choices for token in c["token_ids"]] == written(backend, max_new_tokens=6).new_ids[0]


def test_several_prompts_and_several_texts(ai, backend):
    answer = ai.completions.create(model="tiny", prompt=[PROMPT, "Elara"], n=2, max_tokens=6, seed=3)
    texts = [choice.text for choice in answer.choices]
    for number, prompt in enumerate([PROMPT, PROMPT, "Elara", "Elara"]):
        out = written(backend, prompt, max_new_tokens=6, do_sample=True, seed=3 + number, top_k=0)
        assert texts[number] == out.texts[0]
    read = sum(len(backend.tokenizer.encode(prompt)) for prompt in (PROMPT, "Elara"))
    assert answer.usage.prompt_tokens == read and answer.usage.completion_tokens == 24


def test_log_probabilities_in_both_shapes(ai, backend, client):
    logprobs = ai.completions.create(**GREEDY, max_tokens=4, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 4
    for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs):
        assert value == max(top.values()) < 0  # the most probable token was taken
    by_id = client.post(
        "/v1/completions", json={**GREEDY, "max_tokens": 4, "logprobs": 3, "return_tokens_as_token_ids": True}
    ).json()["choices"][0]["logprobs"]
    assert by_id["tokens"] == [f"token_id:{i}" for i in written(backend, max_new_tokens=4).new_ids[0]]
    assert all(len(top) == 3 for top in by_id["top_logprobs"])
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": True}
    content = ai.chat.completions.create(**chat, top_logprobs=2).choices[0].logprobs.content
    assert len(content) == 3 and all(len(token.top_logprobs) == 2 for token in content)
    streamed = ai.chat.completions.create(**chat, stream=True, temperature=0)
    assert sum(len(c.choices[0].logprobs.content) for c in streamed if c.choices[0].logprobs) == 3


def test_bias_and_bans_of_tokens_change_the_text(client, backend):
    first = written(backend, max_new_tokens=1).new_ids[0][0]
    asked = {**GREEDY, "max_tokens": 5, "return_token_ids": True}
    for fields in ({"custom_token_bans": [first]}, {"logit_bias": {str(first): -100}}, {"banned_tokens": [first]}):
        ids = client.post("/v1/completions", json=asked | fields).json()["choices"][0]["token_ids"]
        assert first not in ids
    forced = client.post("/v1/completions", json=asked | {"logit_bias": {"40": 100}}).json()["choices"][0]["token_ids"]
    assert forced == [40] * 5


def test_ends_of_a_text(client, backend):
    end = backend.tokenizer.eos_token_id
    asked = {**GREEDY, "max_tokens": 5, "logit_bias": {str(end): 50}}
    choice = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["text"] == ""
    choice = client.post("/v1/completions", json=asked | {"ignore_eos": True}).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_stop_string_is_not_in_the_text(client, backend):
    said = {"logit_bias": {str(backend.tokenizer.encode("a")[0]): 60}}
    for stream in (False, True):
        answer = client.post(
            "/v1/completions", json={**GREEDY, **said, "max_tokens": 9, "stop": ["aaa"], "stream": stream}
        )
        choices = [e["choices"][0] for e in events(answer.text)] if stream else answer.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == ""
        assert choices[-1]["finish_reason"] == "stop"


def test_offsets_are_the_characters_of_the_tokens_also_of_those_held_back(client, backend):
    said = {"logit_bias": {str(backend.tokenizer.encode("a")[0]): 60}, "stop": ["aaa!"]}  # begun, and never whole
    asked = {**GREEDY, **said, "max_tokens": 9, "logprobs": 0}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]
    choices = [e["choices"][0] for e in events(client.post("/v1/completions", json=asked | {"stream": True}).text)]
    assert [choice["text"] for choice in choices[:5]] == ["", "", "", "a", "a"]
    streamed = [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["text_offset"]]
    assert whole["logprobs"]["text_offset"] == streamed == list(range(9))
    assert whole["text"] == "".join(choice["text"] for choice in choices) == "a" * 9


# --- methods -------------------------------------------------------------------------------------------------------


def leaning(backend):
    """A request that makes the model write "sea" by itself."""
    return {"logit_bias": {str(backend.tokenizer.encode(" sea")[-1]): 30.0}}


def test_a_method_in_a_request_acts(client, backend):
    bias = leaning(backend)
    asked = {**GREEDY, "max_tokens": 6, **bias}
    plain = client.post("/v1/completions", json=asked).json()["choices"][0]
    assert "sea" in plain["text"] and "events" not in plain
    for ban in ({"methods": [{"name": "antislop", "phrases": ["sea"]}]}, {"banned_strings": ["sea"]}):
        choice = client.post("/v1/completions", json=asked | ban).json()["choices"][0]
        assert "sea" not in choice["text"].split() and choice["events"][0]["rule"]
        streamed = events(client.post("/v1/completions", json=asked | ban | {"stream": True}).text)
        assert "".join(e["choices"][0]["text"] for e in streamed) == choice["text"]
        assert streamed[-1]["choices"][0]["events"] == choice["events"]


def test_methods_of_the_server_act_on_every_request(backend):
    bias = leaning(backend)
    client = TestClient(create_app(backend, methods=[Antislop(phrases=["sea"])]), base_url="http://testserver")
    asked = {**GREEDY, "max_tokens": 6, **bias}
    assert "sea" not in client.post("/v1/completions", json=asked).json()["choices"][0]["text"].split()
    off = asked | {"methods": [{"name": "antislop", "strength": 0}]}
    assert "sea" in client.post("/v1/completions", json=off).json()["choices"][0]["text"]


def test_a_method_that_cannot_stream_is_refused_before_the_stream(client):
    asked = {**GREEDY, "stream": True, "methods": [{"name": "antislop", "regexes": ["sea+"]}]}
    refused(client.post("/v1/completions", json=asked), 400, "max_span")


@pytest.mark.parametrize("file", OPENAI, ids=lambda file: file.stem)
def test_recorded_bodies_of_clients_are_answered(client, file):
    record = json.loads(file.read_text())
    answer = client.post(record["path"], json=record["body"])
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-tokenry-ignored", "") == record["ignored"]
    if record["body"].get("stream"):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events(answer.text)[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert answer.json()["usage"]["completion_tokens"] >= 1


# --- bad input -----------------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BAD = [
    (TEXT, {"max_tokens": 4}, 400, "prompt", "is missing"),
    (TEXT, {"prompt": ""}, 400, "prompt", "empty"),
    (TEXT, {"prompt": []}, 400, "prompt", "valid string"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "valid string"),
    (TEXT, {"prompt": {"text": "x"}}, 400, "prompt", "valid string"),
    (TEXT, {"prompt": [99999]}, 400, "prompt", "ids 0 to 319"),
    (TEXT, {"prompt": [-1]}, 400, "prompt", "[-1]"),
    (TEXT, {"prompt": "x", "max_tokens": -5}, 400, "max_tokens", "-5"),
    (TEXT, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    (TEXT, {"prompt": "x", "max_tokens": 65}, 400, "max_tokens", "at most 64"),
    (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature", "-1"),
    (TEXT, {"prompt": "x", "temperature": 1e300}, 400, "temperature", "10000"),
    (TEXT, {"prompt": "x", "top_p": 0}, 400, "top_p", "greater than 0"),
    (TEXT, {"prompt": "x", "rep_pen": 1e-300}, 400, "repetition_penalty", "0.01"),
    (TEXT, {"prompt": "x", "n": 17}, 400, "n", "at most 16"),
    (TEXT, {"prompt": "x", "seed": -2}, 400, "seed", "-2"),
    (TEXT, {"prompt": "x", "stop": ["a", ""]}, 400, "stop", "empty"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "20"),
    (TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias", "ids 0 to 319"),
    (TEXT, {"prompt": "x", "logit_bias": {"5": 1e9}}, 400, "logit_bias", "10000"),
    (TEXT, {"prompt": "x", "logit_bias": [5]}, 400, "logit_bias", "object of ids"),
    (TEXT, {"prompt": "x", "custom_token_bans": "a"}, 400, "custom_token_bans", "commas"),
    (TEXT, {"prompt": "x", "custom_token_bans": [320]}, 400, "custom_token_bans", "ids 0 to 319"),
    (TEXT, {"prompt": "x", "model": "gpt-5"}, 404, "model", "'tiny'"),
    (TEXT, {"prompt": "x", "echo": True}, 400, "echo", "leave it out"),
    (TEXT, {"prompt": "x", "temprature": 1}, 400, "temprature", "'temperature'"),
    (TEXT, {"prompt": "x", "methods": [{"name": "antislop", "phrase": ["x"]}]}, 400, "methods", "no option 'phrase'"),
    (TEXT, {"prompt": "x", "methods": [{"name": "antislop", "phrases": "/etc/passwd"}]}, 400, "methods", "list"),
    (TEXT, {"prompt": "x", "methods": [{"name": "specreason", "small": "/etc"}]}, 400, "methods", "server runs"),
    (TEXT, {"prompt": "x", "banned_regex": "("}, 400, "banned_regex", "does not compile"),
    (TEXT, {"prompt": "x", "banned_strings": [" "]}, 400, "banned_strings", "empty"),
    (CHAT, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "pirate", "content": "x"}]}, 400, "messages", "'pirate'"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "'text'"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, 400, "logprobs", "logprobs=true"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "messages", "window of 512"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests(client, path, body, status, param, words):
    assert refused(client.post(path, json=body), status, words)["param"] == param


BROKEN = {
    "half an object": b'{"prompt": "x"',
    "nothing": b"",
    "a list": b"[1, 2]",
    "null": b"null",
    "no number": b'{"prompt": "x", "temperature": NaN}',
    "an absurd number": b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}",
    "a number of 5,000 digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "100,000 brackets": b"[" * 100_000,
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in a name": b'{"prompt": "x", "\\ud800": 1}',
    "half a character in a method": b'{"prompt": "x", "methods": [{"name": "antislop", "phrases": ["\\udc00"]}]}',
    "no UTF-8": b'{"prompt": "\xff"}',
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_broken_bodies(client, body):
    refused(client.post(TEXT, content=body, headers={"Content-Type": "application/json"}), 400)


def test_a_form_is_not_json(client):
    refused(client.post(TEXT, content=b"prompt=x", headers={"Content-Type": "text/plain"}), 400, "application/json")


def test_a_body_of_a_megabyte(client):
    fits = json.dumps({"prompt": "x", "max_tokens": 1, "banned_strings": [f"words {i} of it" for i in range(48_000)]})
    assert 900_000 < len(fits) < 2**20
    assert client.post(TEXT, content=fits, headers={"Content-Type": "application/json"}).status_code == 200
    refused(client.post(TEXT, content=b"x" * (2**20 + 1)), 413, "1048576")
    pieces = iter([b" " * 2**19] * 3)
    refused(client.post(TEXT, content=pieces, headers={"Content-Type": "application/json"}), 413)
    refused(client.post(TEXT, json={"prompt": "x " * 2**18}), 400, "window of 512")


def test_a_prompt_that_just_fits(client, backend):
    ids = [20] * (backend.window - 3)
    assert client.post(TEXT, json={"prompt": ids, "max_tokens": 3}).json()["usage"]["total_tokens"] <= backend.window
    error = refused(client.post(TEXT, json={"prompt": ids, "max_tokens": 4}), 400, "window of 512")
    assert error["code"] == "context_length_exceeded"
    silent = client.post(TEXT, json={"prompt": ids, "ignore_eos": True}).json()
    assert silent["usage"]["completion_tokens"] == 3  # as many as there is room for


def test_paths_and_methods(client):
    assert refused(client.get("/v1/nothing"), 404, "/v1/completions")["type"] == "not_found_error"
    refused(client.get(TEXT), 405, "POST")
    refused(client.get("/v1/models/other"), 404, "'tiny'")
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"


def test_the_client_of_openai_sees_its_own_errors(ai):
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        ai.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        ai.completions.create(model="other", prompt="x")
    assert [model.id for model in ai.models.list()] == ["tiny"]


def test_a_model_without_a_chat_template(llama, tokenizer):
    client = TestClient(create_app(OneByOne(llama, tokenizer)), base_url="http://testserver")
    refused(client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}), 400, "/v1/completions")


def test_a_template_that_takes_no_such_messages(client, backend, chat_tokenizer, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    error = refused(client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}), 400, "roles must")
    assert error["param"] == "messages" and "--raw" not in error["message"]


def test_an_unexpected_failure_says_nothing_of_the_request(client, backend, monkeypatch):
    monkeypatch.setattr(backend, "window", "wide")  # a broken backend
    error = refused(client.post(TEXT, json={"prompt": "a secret"}), 500)
    assert error["type"] == "server_error" and "secret" not in json.dumps(error)


# --- who may ask, and when -----------------------------------------------------------------------------------------


def test_the_api_key(backend):
    client = TestClient(create_app(backend, api_key="s3cret"), base_url="http://testserver")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}, {"Authorization": "é"}):
        raw = {name: value.encode() for name, value in headers.items()}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            error = refused(client.get(path, headers=raw), 401, "Bearer KEY")
            assert error["code"] == "invalid_api_key"
    right = {"Authorization": "Bearer s3cret"}
    assert client.get("/v1/models", headers=right).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=right).status_code == 200
    scheme = client.get("/openapi.json", headers=right).json()["components"]["securitySchemes"]
    assert scheme["HTTPBearer"]["scheme"] == "bearer"


def test_a_web_page_that_was_pointed_here_is_kept_out(backend):
    app = create_app(backend, hosts=("127.0.0.1", "localhost", "::1"))
    for url, status in (("http://127.0.0.1:8000", 200), ("http://[::1]:80", 200), ("http://evil.example", 403)):
        assert TestClient(app, base_url=url).get("/v1/models").status_code == status


def test_too_many_texts_are_told_when_to_come_back(llama, chat_tokenizer, ai):
    backend = OneByOne(llama, chat_tokenizer, waiting=0)
    client = TestClient(create_app(backend), base_url="http://testserver")
    for stream in (False, True):
        answer = client.post(TEXT, json={"prompt": "x", "stream": stream})
        assert refused(answer, 429, "waiting")["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "3"


def test_the_deadline_of_a_text(backend):
    backend.pause = 0.02
    client = TestClient(create_app(backend, limits=Limits(seconds=0.1)), base_url="http://testserver")
    choice = client.post(TEXT, json={**GREEDY, "max_tokens": 200, "ignore_eos": True}).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["stop_reason"] == "timeout"


def test_texts_are_logged_only_when_asked(backend, caplog):
    caplog.set_level(logging.DEBUG)
    asked = {"prompt": "Elara", "max_tokens": 2, "temperature": 0, "custom_token_bans": [-1]}
    for log_texts in (False, True):
        client = TestClient(create_app(backend, log_texts=log_texts), base_url="http://testserver")
        assert client.post(TEXT, json=asked).status_code == 400
        assert client.post(TEXT, json=asked | {"custom_token_bans": []}).status_code == 200
        assert ("Elara" in caplog.text) == log_texts


def test_metrics(client):
    client.post(TEXT, json={**GREEDY, "max_tokens": 4, "ignore_eos": True})
    client.post(TEXT, json={})
    client.get("/no/such/path")
    page = client.get("/metrics").text
    for line in (
        'tokenry_requests_total{route="/v1/completions",status="200"} 1.0',
        'tokenry_requests_total{route="/v1/completions",status="400"} 1.0',
        'tokenry_requests_total{route="other",status="404"} 1.0',
        "tokenry_completion_tokens_total 4.0",
        "tokenry_prompt_tokens_total 10.0",
        "tokenry_time_to_first_token_seconds_count 1.0",
        "tokenry_inter_token_seconds_count 3.0",
        "tokenry_rows_running 0.0",
        "tokenry_cache_bytes 0.0",
    ):
        assert line in page


# --- those who leave -----------------------------------------------------------------------------------------------


async def leaves(app, body, after):
    """Ask over ASGI, and leave after so many parts of the answer; what was sent until then."""
    sent, gone = [], asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) > after:
            gone.set()

    headers = [(b"content-type", b"application/json"), (b"host", b"testserver")]
    scope = {"type": "http", "method": "POST", "path": TEXT, "headers": headers, "query_string": b""}
    if after < 0:
        asyncio.get_running_loop().call_later(0.1, gone.set)
    await app({**scope, "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0"}}, receive, send)
    return sent


@pytest.mark.parametrize(("stream", "after"), [(True, 3), (False, -1), (True, -1)])
def test_a_client_that_goes_away_frees_its_row(app, backend, stream, after):
    backend.pause = 0.02
    body = {**GREEDY, "max_tokens": 60, "ignore_eos": True, "stream": stream}
    began = time.monotonic()
    asyncio.run(leaves(app, body, after))
    while backend.now and time.monotonic() < began + 5:
        time.sleep(0.01)
    assert backend.left == 1 and backend.now is None and backend.written < 40


def test_closing_lets_texts_end_and_takes_no_others(backend):
    app = create_app(backend)
    with TestClient(app, base_url="http://testserver") as client:
        client.post(TEXT, json={"prompt": "x", "max_tokens": 1})
        assert client.get("/health").json() == {"status": "ok"}
    assert backend.closed
    answer = TestClient(app, base_url="http://testserver").post(TEXT, json={"prompt": "x"})
    assert refused(answer, 503, "closing")["code"] == "server_closing" and answer.headers["retry-after"]


# --- over a port ---------------------------------------------------------------------------------------------------


class Running:
    """A server in a thread, at a free port."""

    def __init__(self, app, grace=5.0):
        self.place, ready = bound("127.0.0.1", 0), threading.Event()
        self.server, self.port = Server(app, grace, ready.set), self.place.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.place]})
        self.thread.start()
        assert ready.wait(10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.place.close()
        assert not self.thread.is_alive()


def ask(port, body):
    """A connection that has sent a request, and has read nothing."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_over_a_port(backend, app):
    with Running(app) as running:
        with httpx.Client() as http:  # the client of today's openai
            ai = openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="x", http_client=http)
            chunks = ai.completions.create(**GREEDY, max_tokens=8, stream=True)
            assert "".join(c.choices[0].text for c in chunks) == written(backend, max_new_tokens=8).texts[0]
        slow = [ask(running.port, {**GREEDY, "max_tokens": 60, "stream": True, "logprobs": 20}) for _ in range(3)]
        for connection in slow:
            assert connection.recv(1)  # and now they read no more for a while
        answer = httpx.post(f"http://127.0.0.1:{running.port}{TEXT}", json={**GREEDY, "max_tokens": 4}, timeout=20)
        assert answer.status_code == 200
        slow[0].close()
        for connection in slow[1:]:
            text = b""
            while not text.endswith(b"0\r\n\r\n"):
                text += connection.recv(65536)
            assert b"data: [DONE]" in text
            connection.close()
    assert backend.closed


def test_a_stream_that_the_end_of_the_server_cuts_says_so(backend, app):
    backend.pause = 0.05
    running = Running(app, grace=0.1)
    with httpx.stream(
        "POST",
        f"http://127.0.0.1:{running.port}{TEXT}",
        json={**GREEDY, "max_tokens": 60, "ignore_eos": True, "stream": True, "return_token_ids": True},
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        threading.Thread(target=running.stop).start()
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]" and "closing" in json.loads(rest[-2])["error"]["message"]
    assert len(rest) < 50


# --- the schema ----------------------------------------------------------------------------------------------------

EXAMPLES = 30


def test_the_schema_is_true(llama, chat_tokenizer):
    """Answers are as the schema says, to requests that are as it says and to those that are not.

    One check is left out: that every request which the schema allows is accepted. Whether an id is in the vocabulary, a
    prompt in the window and an expression well-formed, it cannot say.
    """
    load_all_checks()
    app = create_app(OneByOne(llama, chat_tokenizer), limits=Limits(tokens=32))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]
    quick = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seen = []
    for found in schema.get_all_operations():
        operation = found.ok()
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.method == "post":
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @quick
            @given(case=operation.as_strategy(generation_mode=mode))
            def conforms(case):
                seen.append(case.call_and_validate(checks=checks).status_code)

            conforms()
    assert {200, 400} <= set(seen) and max(seen) < 500
