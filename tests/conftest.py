"""Small models and a real tokenizer for exact tests; the embedded model for the rest."""

import os

from support.families import TEXT, build

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 320 tokens: every text has tokens, many tokens are parts of characters."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


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
