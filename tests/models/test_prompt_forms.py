"""Prompts in every form a person has them in: the same text for all of them, or one sentence."""

import numpy as np
import pytest
import torch
from support.families import build
from transformers import BatchEncoding

import tokenry
from tokenry import InputError, decode
from tokenry.decode import encode_prompts
from tokenry.models.masks import make_bidirectional

TEXTS = ["the old sea and", "a whisper in the night"]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}. {% endfor %}a:"


@pytest.fixture(scope="module")
def model():
    return build("llama")


def user(text):
    return [{"role": "user", "content": text}]


def forms(tokenizer):
    """{name: (two prompts in one form, the first of them alone)}."""
    rows = [tokenizer(text).input_ids for text in TEXTS]
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    first = tokenizer(TEXTS[:1], return_tensors="pt")
    return {
        "texts": (TEXTS, TEXTS[0]),
        "a tuple of texts": (tuple(TEXTS), (TEXTS[0],)),
        "a batch": (batch, first),
        "a mapping": (dict(batch), dict(first)),
        "a mapping of lists": ({k: v.tolist() for k, v in batch.items()}, {"input_ids": rows[0]}),
        "a tensor": (batch["input_ids"], first["input_ids"]),
        "a tensor of one row": (batch["input_ids"], first["input_ids"][0]),
        "lists of ids": (rows, rows[0]),
        "tensors of ids": ([torch.tensor(row) for row in rows], [torch.tensor(rows[0])]),
        "conversations": (list(map(user, TEXTS)), user(TEXTS[0])),
        "texts and conversations": ([TEXTS[0], user(TEXTS[1])], [user(TEXTS[0])]),
    }


NAMES = list(forms(lambda texts, **_: BatchEncoding({"input_ids": torch.ones(1, 2)})))
REFUSED = {
    "nothing": [],
    "an empty text": [""],
    "no ids": torch.zeros(1, 0, dtype=torch.long),
    "embeddings": torch.zeros(1, 3, 32),
    "embeddings by name": {"inputs_embeds": torch.zeros(1, 3, 32)},
    "a single message": {"role": "user", "content": "the sea"},
    "a message without content": [{"role": "user"}],
    "the assistant last": [*user("the sea"), {"role": "assistant", "content": "is wide"}],
    "numbers": [0.5, 1.5],
    "one number": 3,
    "None": None,
    "bytes": b"the sea",
    "an array": np.ones((1, 3), dtype=int),
    "ids beyond the vocabulary": [[3, 5000]],
    "ids below 0": torch.tensor([[-1, 3]]),
    "ids and texts": [[3, 4], "the sea"],
    "an empty row": [[3, 4], []],
    "padding on the right": {"input_ids": [[3, 4], [5, 1]], "attention_mask": [[1, 1], [1, 0]]},
    "a mask of another shape": {"input_ids": [[3, 4]], "attention_mask": [[1, 1, 1]]},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_same_text(model, tokenizer, name):
    wanted = tokenry.generate(model, tokenizer, TEXTS, max_new_tokens=6)
    many, one = forms(tokenizer)[name]
    assert tokenry.generate(model, tokenizer, many, max_new_tokens=6).new_ids == wanted.new_ids
    assert tokenry.generate(model, tokenizer, one, max_new_tokens=6).new_ids == wanted.new_ids[:1]


@pytest.mark.parametrize("name", NAMES)
def test_masked_diffusion_takes_the_same_forms(tokenizer, name):
    model = make_bidirectional(build("llama"))
    model.config.mask_token_id = 4
    many, one = forms(tokenizer)[name]
    method = decode.MaskedDiffusion(block_length=4)
    if name.startswith("a tensor"):  # without a mask a padded batch says nothing of its padding
        many = TEXTS
    wanted = method.generate(model, tokenizer, TEXTS, max_new_tokens=4)
    assert method.generate(model, tokenizer, many, max_new_tokens=4).new_ids == wanted.new_ids
    assert method.generate(model, tokenizer, one, max_new_tokens=4).new_ids == wanted.new_ids[:1]


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused(model, tokenizer, name):
    with pytest.raises(InputError):
        tokenry.generate(model, tokenizer, REFUSED[name], max_new_tokens=2)


@pytest.mark.parametrize("method", [decode.DiffAdapt(), decode.SpecReason(small=(None, None), prompts="lines")])
@pytest.mark.parametrize("prompts", [[3, 4], torch.tensor([[3, 4]]), {"input_ids": [[3, 4]]}, [[3, 4]], 3, None])
def test_what_needs_words_refuses_ids(model, tokenizer, method, prompts):
    with pytest.raises(InputError):
        tokenry.generate(model, tokenizer, prompts, methods=[method], max_new_tokens=2)


def test_conversations_go_through_the_template(tokenizer):
    from copy import deepcopy

    chat = deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    talk = [{"role": "system", "content": "be brief"}, *user("the sea")]
    ids = encode_prompts(chat, talk)["input_ids"]
    assert chat.decode(ids[0]) == "s:be brief. u:the sea. a:"
    assert (
        encode_prompts(chat, user("the sea"))["input_ids"].tolist()
        == encode_prompts(chat, "the sea")["input_ids"].tolist()
    )
    for tokens, chatting in ((tokenizer, True), (chat, False)):
        with pytest.raises(InputError, match="needs a chat template"):
            encode_prompts(tokens, talk, chatting)
    assert chat.decode(encode_prompts(chat, user("the sea"), chat=False)["input_ids"][0]) == "the sea"


@pytest.mark.parametrize("sentences", ["the sea", {"input_ids": [[3, 4]]}, torch.tensor([[3, 4]]), [[3, 4]], []])
def test_embedders_take_lists_of_texts(model, tokenizer, sentences):
    from tokenry.represent import PromptEmbedder

    with pytest.raises(InputError):
        PromptEmbedder(model, tokenizer).encode(sentences)


@pytest.mark.parametrize(("prompts", "solutions"), [("ab", ["x", "y"]), (["a", "b"], "xy"), ({"a": 1}, ["x"])])
def test_judges_take_lists(model, tokenizer, prompts, solutions):
    from tokenry.judge import CRewScorer

    with pytest.raises(InputError, match=r"give a list|prompts for . solutions; give one of each"):
        CRewScorer(model, tokenizer).score_batch(prompts, solutions)
