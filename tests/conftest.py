"""Small models and a real tokenizer for exact tests; the embedded model for the rest."""

import os

from support.families import build, byte_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


_BUILT = {}


@pytest.fixture
def make_model():
    """make_model(kind): one shared model per family."""

    def make(kind):
        if kind not in _BUILT:
            _BUILT[kind] = build(kind)
        return _BUILT[kind]

    return make


@pytest.fixture
def llama(make_model):
    return make_model("llama")


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer."""
    from tokenry import load

    return load("smollm2")
