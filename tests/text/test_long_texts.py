"""Texts that are too long or no text at all: cut by option, refused in a sentence, never minutes of work."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.decode import generate
from tokenry.represent import PromptEmbedder, TokenPrepending
from tokenry.tokenize import KL3M, boundary_stability, token_pieces, tokens_per_character
from tokenry.tokenize.kl3m import LONGEST_WORD, _shortened

LONG = "the sea and the wind " * 120
HALF = "a\ud800b"

# --- embeddings ----------------------------------------------------------------------------------------------------


def embedder(llama, tokenizer, prepending, **options):
    if prepending:
        return TokenPrepending(exit_layer=2).encoder(llama, tokenizer, **options)
    return PromptEmbedder(llama, tokenizer, **options)


@pytest.mark.parametrize("prepending", [False, True])
def test_one_long_text_does_not_lose_the_list(llama, tokenizer, prepending):
    texts = ["the sea", LONG, "a whisper"]
    with pytest.raises(
        InputError, match=r"text 1 has \d+ tokens with its prompt, the model takes 512; .*truncate=True"
    ):
        embedder(llama, tokenizer, prepending).encode(texts)
    cut = embedder(llama, tokenizer, prepending, truncate=True)
    vectors = cut.encode(texts)
    assert torch.allclose(
        vectors[[0, 2]], embedder(llama, tokenizer, prepending).encode(["the sea", "a whisper"]), atol=1e-5
    )
    (row,) = cut.rows([LONG])[0]
    assert len(row) <= 512 and tokenizer.decode(row).endswith('means in one word:"')


@pytest.mark.parametrize("prompt", ["prompteol", "metaeol"])
@pytest.mark.parametrize("most", [200, 201, 300])
def test_a_cut_text_is_as_long_as_can_be(llama, tokenizer, prompt, most):
    cut = PromptEmbedder(llama, tokenizer, prompt=prompt, truncate=True, max_seq_length=most)
    lengths = [len(row) for row in cut.rows([LONG])[0]]
    assert most - 4 <= max(lengths) <= most
    assert cut.rows(["the sea"]) == PromptEmbedder(llama, tokenizer, prompt=prompt).rows(["the sea"])


def test_the_limit_can_be_set(llama, tokenizer):
    made = PromptEmbedder(llama, tokenizer)
    assert made.max_seq_length == 512
    made.max_seq_length = 70
    with pytest.raises(InputError, match="max_seq_length is 70; shorten it"):
        made.rows([LONG])
    made.truncate = True
    assert len(made.rows([LONG])[0][0]) <= made.max_seq_length == 70
    made.max_seq_length = None
    assert made.max_seq_length == 512
    for value in (0, 513):
        with pytest.raises(InputError, match=f"max_seq_length={value} is not allowed"):
            made.max_seq_length = value
    made.max_seq_length = 5
    with pytest.raises(InputError, match="max_seq_length=5 leaves no room"):
        made.rows([LONG])


def test_sentence_transformers_set_it_too(llama, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tokenry.represent import TokenPrependingTransformer

    made = TokenPrepending(exit_layer=2).encoder(llama, tokenizer, truncate=True)
    sentences = sentence_transformers.SentenceTransformer(modules=[TokenPrependingTransformer(made)])
    assert sentences.max_seq_length == 512
    sentences.max_seq_length = 90
    before = sentences.encode(["a", LONG])
    assert made.max_seq_length == 90 and before.shape == (2, 32)
    sentences.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), trust_remote_code=True)
    assert again.max_seq_length == 90 and np.allclose(again.encode(["a", LONG]), before, atol=1e-5)


def test_the_command_line_cuts(llama, tokenizer, tmp_path):
    folder, lines, output = tmp_path / "model", tmp_path / "lines.txt", tmp_path / "vectors.npy"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines.write_text(f"the sea\n{LONG}\n")
    command = ["represent", str(lines), "--output", str(output), "--model", str(folder)]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "--truncate" in refused.output
    result = CliRunner().invoke(main, [*command, "--truncate", "--max-seq-length", "80"])
    assert result.exit_code == 0, result.output
    assert np.load(output).shape == (2, 32)


# --- no text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m, t: KL3M(kind="char", vocab_size=512).train(["fine", HALF]),
        lambda m, t: KL3M(custom_tokens=[HALF], vocab_size=600),
        lambda m, t: tokens_per_character(t, [HALF]),
        lambda m, t: boundary_stability(t, [(HALF, "ab")]),
        lambda m, t: token_pieces(t, HALF),
        lambda m, t: PromptEmbedder(m, t).encode(["fine", HALF]),
        lambda m, t: generate(m, t, HALF, max_new_tokens=1),
        lambda m, t: generate(m, t, ["fine", HALF], max_new_tokens=1),
    ],
)
def test_half_a_surrogate_pair_is_refused(llama, tokenizer, use):
    with pytest.raises(InputError, match=r"has half a surrogate pair, '\\ud800', at character 1"):
        use(llama, tokenizer)


# --- one giant word ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a" * 5000, "é" * 3000, "x " + "12" * 4000 + " y", "\n" * 4000])
def test_words_are_learnt_from_in_pieces(text):
    """The cost of a word goes with the square of its length, so the longest piece bounds it."""
    words = KL3M(kind="char")._untrained().pre_tokenizer
    pieces = [piece for piece, _ in _shortened(words).pre_tokenize_str(text)]
    assert max(map(len, pieces)) == LONGEST_WORD
    assert "".join(pieces) == "".join(piece for piece, _ in words.pre_tokenize_str(text))


def test_ordinary_words_are_left_as_they_are():
    words = KL3M(kind="char")._untrained().pre_tokenizer
    text = "Café, naïve; it's 12 345 “quotes” – " + "w" * (LONGEST_WORD - 1)
    assert _shortened(words).pre_tokenize_str(text) == words.pre_tokenize_str(text)


@pytest.mark.timeout(60)
def test_a_giant_word_is_trained_on_and_comes_back():
    """It took minutes. What was cut for training is whole in the tokenizer."""
    word = "".join("acgt"[(i * i // 7) % 4] for i in range(1_000_000))
    tokenizer = KL3M(custom_tokens=(), vocab_size=600, normalization="none").train([word])
    assert "FixedLength" not in tokenizer.backend_tokenizer.to_str()
    part = word[:5000]
    assert tokenizer.decode(tokenizer(part).input_ids) == part and len(tokenizer(part).input_ids) < 2500
