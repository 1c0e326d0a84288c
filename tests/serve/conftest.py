"""A server over a tiny model, without a port."""

import copy

import openai
import pytest
from starlette.testclient import TestClient
from support.serving import OneByOne

from tokenry.serve import Limits, create_app

CHAT = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer):
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = CHAT
    return talking


@pytest.fixture
def backend(llama, chat_tokenizer):
    return OneByOne(llama, chat_tokenizer)


@pytest.fixture
def app(backend):
    return create_app(backend, limits=Limits(tokens=64))


@pytest.fixture
def client(app):
    return TestClient(app, base_url="http://testserver", raise_server_exceptions=False)


@pytest.fixture
def ai(client):
    """OpenAI's own client."""
    return openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0)
