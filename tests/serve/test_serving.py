"""The application in front of the worker itself, on both engines, and `tokenry serve` over a real port."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from starlette.testclient import TestClient
from support.gguf_files import save_gguf

import tokenry
from tokenry.models.load import Loaded
from tokenry.serve import Worker, create_app
from tokenry.serve.running import DRAIN

PROMPTS = ("the old lighthouse", "Elara", "It was a")


@pytest.fixture(params=["transformers", "llamacpp"])
def loaded(request, llama, tokenizer, tmp_path, monkeypatch):
    if request.param == "transformers":
        return Loaded(llama, tokenizer)
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path / "cache"))
    save_gguf(llama, tokenizer, tmp_path / "tiny.gguf")
    return tokenry.load(tmp_path / "tiny.gguf", threads=1)


def test_texts_at_the_same_time_are_those_of_the_loop(loaded):
    """Different requests share the batch, each with its own method, length and seed."""
    worker = Worker(loaded, "tiny", rows=4)
    with TestClient(create_app(worker), base_url="http://testserver") as client:
        ai = openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)

        def ask(number):
            asked = {"model": "tiny", "prompt": PROMPTS[number], "max_tokens": 8 + 4 * number, "temperature": 0}
            methods = [{"name": "antislop", "phrases": ["e"]}] if number == 1 else []
            return ai.completions.create(**asked, extra_body={"methods": methods, "return_token_ids": True}).choices[0]

        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, range(3)))
        assert client.get("/health").json() == {"status": "ok"}
    for number, answer in enumerate(answers):
        methods = [tokenry.decode.Antislop(phrases=["e"])] if number == 1 else []
        options = {"methods": methods, "max_new_tokens": 8 + 4 * number, "chat": False}
        assert answer.token_ids == tokenry.generate(*loaded, PROMPTS[number], **options).new_ids[0]
    assert worker.numbers()["running"] == worker.numbers()["waiting"] == 0
    asyncio.run(worker.close(1.0))


def test_the_command_line_serves_until_it_is_told_to_stop(llama, tokenizer, tmp_path):
    """Over a real port, in a process of its own; a stream that runs when the end comes is finished."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "tokenry", "serve", "--model", str(tmp_path / "model"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        said = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        body = {"prompt": "the old", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


SHORT_GRACE = """
import importlib
serving = importlib.import_module("tokenry.cli.serve")
serving.GRACE = 1.0
serving.serve()
"""


def test_it_ends_within_the_grace_while_streams_run(llama, tokenizer, tmp_path, monkeypatch):
    """Streams that would take minutes are told that the server closes, and it is gone."""
    monkeypatch.setattr(llama.config, "max_position_embeddings", 60_000)  # tests share the model
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", SHORT_GRACE, "--model", str(tmp_path / "model"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--max-tokens", "50000"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        body = {"prompt": "the old", "max_tokens": 50_000, "temperature": 0, "stream": True, "ignore_eos": True}
        begun = threading.Semaphore(0)

        def read():
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                begun.release()
                return [line for line in lines if line]

        with ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(read) for _ in range(3)]
            for _ in streams:
                assert begun.acquire(timeout=60)
            process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            for stream in streams:
                *_, error, done = stream.result(60)
                assert '"code":"server_closing"' in error and done == "data: [DONE]"
        assert process.wait(60) == -signal.SIGTERM
        assert 1.0 <= time.monotonic() - told < 1.0 + 3 * DRAIN  # of a busy machine
    finally:
        process.kill()
        process.wait()
