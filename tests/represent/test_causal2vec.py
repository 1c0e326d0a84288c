"""Causal2Vec: the token in its place bit for bit, what sees what, the loss, gradients, files, and what is refused."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from support.architectures import tiny_model
from support.families import byte_tokenizer
from transformers import BertConfig, BertModel

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.represent import (
    Causal2Vec,
    Causal2VecConfig,
    Causal2VecModel,
    Causal2VecTransformer,
    ContextEmbedder,
    add_lora,
    train_contrastive,
)
from tokenry.represent.contextual.splice import context_token_inputs

FAMILIES = ("llama", "qwen2", "gemma3", "opt")
TEXTS = ["the old lighthouse stood on the cliff", "a whisper", "the wind echoed through the empty tower of the sea"]


def bert(width=16, **more):
    torch.manual_seed(1)
    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(BertConfig(hidden_size=width, **sizes, **more), add_pooling_layer=False).eval()


@pytest.fixture
def parts(make_model, tokenizer):
    """An embedder whose models are its own."""

    def make(kind="llama", model=None, **options):
        one = copy.deepcopy(make_model(kind)) if model is None else model
        return Causal2Vec(**options).untrained(one, tokenizer, (bert(), byte_tokenizer()))

    return make


# --- the token in its place --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("index", [0, 2, 7])
def test_a_vocabulary_token_in_its_place_is_the_plain_model(make_model, parts, kind, index):
    model, embedder = make_model(kind), parts(kind)
    ids = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(4))
    token = torch.tensor([[11], [23]])
    found = embedder.model(
        ids,
        torch.ones_like(ids),
        context_index=torch.tensor([index, index]),
        context_token=model.get_input_embeddings()(token)[:, 0],
    )
    whole = torch.cat([ids[:, :index], token, ids[:, index:]], 1)
    states = model.base_model(whole, attention_mask=torch.ones_like(whole), use_cache=False).last_hidden_state
    assert torch.equal(found.context_state, states[:, index])
    assert torch.equal(found.eos_state, states[:, -1])
    z = torch.cat([states[:, index], states[:, -1]], 1)
    assert torch.equal(found.embedding, torch.nn.functional.normalize(z, dim=-1))
    torch.testing.assert_close(found.embedding.norm(dim=-1), torch.ones(2))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_in_a_padded_batch_each_row_is_the_plain_model_with_its_token(make_model, parts, kind, side):
    """Rows of other lengths, each with its own token in another place: the mask, the places and the positions of one
    row are not those of the next."""
    model, embedder = make_model(kind), parts(kind)
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(2, 300, (length,), generator=draw) for length in (3, 9, 6, 9)]
    index, tokens = torch.tensor([3, 0, 2, 8]), torch.tensor([11, 23, 31, 47])
    ids, mask = torch.full((4, 9), 1), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    found = embedder.model(ids, mask, context_index=index, context_token=model.get_input_embeddings()(tokens))
    for i, (row, at, token) in enumerate(zip(rows, index.tolist(), tokens)):
        whole = torch.cat([row[:at], token[None], row[at:]])[None]
        states = model.base_model(whole, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found.context_state[i], states[at], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.eos_state[i], states[-1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("context", ["encoder", "constant", "none"])
def test_however_texts_are_batched_their_vectors_are_the_same(parts, context):
    """The encoder has batches of its own."""
    embedder = parts(context=context, **({"pooling": "eos"} if context == "none" else {}))
    texts = [" ".join(["sea", "wind", "tower"][: n % 3 + 1] * n) for n in (9, 1, 4, 2, 7, 3, 1, 12)]
    alone = torch.cat([embedder.encode([text]) for text in texts])
    for size in (1, 3, 64):
        torch.testing.assert_close(embedder.encode(texts, batch_size=size), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_the_token_it_is_the_last_token_of_the_plain_model(llama, parts, tokenizer):
    embedder = parts(context="none", pooling="eos")
    for text, vector in zip(TEXTS, embedder.encode(TEXTS)):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        state = llama.base_model(ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, torch.nn.functional.normalize(state, dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_on_either_side_changes_nothing(parts, kind, side):
    embedder = parts(kind)
    rows = embedder.rows(TEXTS, "find: ")
    width = max(len(row[0]) for row in rows)
    ids, mask = torch.full((3, width), 1), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row[0]), width) if side == "left" else slice(0, len(row[0]))
        ids[i, place], mask[i, place] = torch.tensor(row[0]), 1
    batch = {**embedder.tokenize(TEXTS, "find: "), "input_ids": ids, "attention_mask": mask}
    alone = torch.cat([embedder.encode([text], instruction="find: ") for text in TEXTS])
    torch.testing.assert_close(embedder(**batch), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_end_of_text_is_found_where_it_pads_too(make_model, parts, tokenizer):
    one = copy.deepcopy(tokenizer)
    one.pad_token = one.eos_token
    embedder = ContextEmbedder(parts().model, one, byte_tokenizer())
    assert embedder.encode(TEXTS).allclose(parts().encode(TEXTS), atol=1e-6)


def test_the_splice_by_hand():
    embeds = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    got, real, at = context_token_inputs(embeds, torch.tensor([[-1.0, -1], [-2, -2]]), torch.tensor([1, 2]), mask)
    assert got[0].tolist() == [[0, 1], [2, 3], [-1, -1], [4, 5]] and real[0].tolist() == [0, 1, 1, 1]
    assert got[1].tolist() == [[6, 7], [8, 9], [-2, -2], [10, 11]] and real[1].tolist() == [1, 1, 1, 0]
    assert at.tolist() == [2, 2]


# --- what sees what ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_token_knows_the_summary_and_no_text(parts):
    embedder = parts()
    a, b = (embedder.tokenize([text]) for text in ("the old sea", "the old cliff"))
    words = {name: a[name] for name in ("encoder_input_ids", "encoder_attention_mask")}
    first, same, other = embedder.model(**a), embedder.model(**{**b, **words}), embedder.model(**b)
    assert torch.equal(first.context_state, same.context_state)
    assert not torch.equal(first.eos_state, same.eos_state)
    assert not torch.allclose(first.context_state, other.context_state, atol=1e-4)


@torch.no_grad()
def test_the_first_word_learns_of_the_last_through_it(parts):
    """With the token the state of the first word depends on the last word; without it, never."""
    for context, pooling, depends in (("encoder", "context_eos", True), ("none", "eos", False)):
        embedder, states = parts(context=context, pooling=pooling), []

        def look(module, args, output, kept=states):
            kept.append(output.last_hidden_state)

        hook = embedder.model.decoder.register_forward_hook(look)
        for last in ("sea", "sky"):
            features = embedder.tokenize([f"the old {last}"])
            embedder(**features)
        hook.remove()
        first = 1 if depends else 0
        assert torch.allclose(states[0][0, first], states[1][0, first], atol=1e-4) != depends


@torch.no_grad()
def test_the_instruction_is_for_the_decoder_alone(parts):
    after, first = parts(), parts(context_position="first")
    plain, told = after.rows(["the sea"])[0], after.rows(["the sea"], "find: ")[0]
    assert plain[2] == told[2] and plain[1] == 0 < told[1]
    assert told[0][told[1] :] == plain[0]
    assert first.rows(["the sea"], "find: ")[0][1] == 0
    a, b = (e.model(**e.tokenize(["the sea"], "find: ")).context_state for e in (after, first))
    assert not torch.allclose(a, b, atol=1e-4)


@torch.no_grad()
def test_the_token_is_as_long_as_an_embedding(parts):
    for kind in FAMILIES:
        embedder = parts(kind)
        model = embedder.model
        tokens = model.decoder.get_input_embeddings()(torch.arange(320)).norm(dim=-1).mean()
        features = embedder.tokenize(TEXTS)
        made = model.context_token(features["encoder_input_ids"], features["encoder_attention_mask"]).norm(dim=-1)
        assert 0.5 < float(made.mean() / tokens) < 2


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_summary_is_of_real_tokens(parts, pooling):
    embedder = parts(encoder_pooling=pooling)
    features = embedder.tokenize(TEXTS)
    got = embedder.model.summary(features["encoder_input_ids"], features["encoder_attention_mask"])
    for row, text in zip(got, TEXTS):
        ids = torch.tensor([byte_tokenizer()(text).input_ids])
        states = embedder.model.encoder(ids).last_hidden_state[0]
        torch.testing.assert_close(row, states[0] if pooling == "cls" else states.mean(0), atol=1e-5, rtol=1e-5)


# --- training ----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_definition(parts):
    """InfoNCE with two negatives for each of three queries, against loops in float64."""
    sentences = SentenceTransformer(modules=[Causal2VecTransformer(parts())], device="cpu")
    columns = [[f"{word} {i}" for i in range(3)] for word in ("sea", "cliff", "dream", "tower")]
    features = [sentences.preprocess(column) for column in columns]
    loss = MultipleNegativesRankingLoss(sentences, scale=1 / 0.05)(features, torch.zeros(3))
    q, *docs = (sentences.encode(column).astype(np.float64) for column in columns)
    every = [d[j] for d in docs for j in range(3)]
    wanted = [-np.log(np.exp(q[i] @ docs[0][i] / 0.05) / sum(np.exp(q[i] @ d / 0.05) for d in every)) for i in range(3)]
    assert float(loss) == pytest.approx(np.mean(wanted), abs=1e-4)


def test_no_text_is_its_own_negative(parts):
    """The sampler that training asks for leaves out of a batch what is in it already."""
    rows = [("a", "b"), ("c", "b"), ("d", "e"), ("a", "f"), ("g", "h"), ("h", "i")]
    data = Dataset.from_dict({"anchor": [r[0] for r in rows], "positive": [r[1] for r in rows]})
    for seed in range(5):
        sampler = NoDuplicatesBatchSampler(data, 3, False, generator=torch.Generator().manual_seed(seed), seed=seed)
        for batch in sampler:
            texts = [text for i in batch for text in rows[i]]
            assert len(set(texts)) == len(texts)


def test_gradients_reach_encoder_projector_and_adapters_alone(parts):
    embedder = parts()
    add_lora(embedder, r=2, alpha=4)
    with torch.no_grad():
        for name, weight in embedder.model.decoder.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    embedder(**embedder.tokenize(TEXTS))[:, 0].sum().backward()
    for name, weight in embedder.model.named_parameters():
        moved = weight.grad is not None and bool(weight.grad.abs().sum() > 0)
        if name.startswith("decoder"):
            assert moved == ("lora_" in name), name
        elif name.startswith("projector"):
            assert moved, name
    assert embedder.model.encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_training_brings_pairs_together(parts, tmp_path):
    embedder = parts()
    sentences = SentenceTransformer(modules=[Causal2VecTransformer(embedder)], device="cpu")
    words = "sea cliff dream tower wind shore night keeper".split()
    pairs = [(f"the {word}", f"a {word} was here") for word in words]
    losses = train_contrastive(sentences, pairs, steps=12, batch_size=8, lr=2e-3)
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]


def test_what_the_first_letter_knows_of_the_last_it_knows_through_the_token(parts):
    """A probe is trained, with everything else, to tell from the state of the first letter whether the last one is the
    same. With a token that is the same for all texts there is nothing to tell it from."""
    draw, texts = random.Random(0), []
    for n in range(96):
        first = "abcd"[n // 2 % 4]
        last = first if n % 2 else draw.choice("abcd".replace(first, ""))
        texts.append(f"{first}{draw.choice('xyz')}{last}")
    labels = torch.arange(96) % 2

    def state(embedder):
        """Of the first letter, which stands behind the token."""
        kept = []
        hook = embedder.model.decoder.register_forward_hook(lambda *args: kept.append(args[2].last_hidden_state[:, 1]))
        embedder(**embedder.tokenize(texts))
        hook.remove()
        return kept[0]

    blind = state(parts(context="constant"))
    for n in range(8):
        torch.testing.assert_close(blind[n::8], blind[n // 2 * 2][None].expand(12, -1), atol=1e-6, rtol=1e-6)
    embedder = parts()
    torch.manual_seed(0)
    probe, right = torch.nn.Linear(32, 2), 0.0
    optimizer = torch.optim.Adam([*embedder.model.parameters(), *probe.parameters()], lr=3e-3)
    for _ in range(150):
        scores = probe(state(embedder))
        right = float((scores.argmax(-1) == labels).float().mean())
        if right > 0.95:
            break
        torch.nn.functional.cross_entropy(scores, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert right > 0.9


# --- files -------------------------------------------------------------------------------------------------------


def test_saved_and_read_again_with_and_without_adapters(llama, parts, tokenizer, tmp_path):
    for lora in (False, True):
        embedder = parts()
        if lora:
            add_lora(embedder, r=2, alpha=4)
            for name, weight in embedder.model.decoder.named_parameters():
                weight.data.normal_() if "lora_B" in name else None
        before = embedder.encode(TEXTS)
        embedder.save(tmp_path / str(lora))
        assert embedder.encode(TEXTS).allclose(before, atol=1e-5)  # the adapters are there still
        again = Causal2Vec(trained=tmp_path / str(lora)).encoder(llama, tokenizer)
        assert again.encode(TEXTS).allclose(before, atol=1e-5)
        assert not list((tmp_path / str(lora)).glob("*.bin"))


def test_as_a_module_of_sentence_transformers(parts, tmp_path):
    sentences = SentenceTransformer(modules=[Causal2VecTransformer(parts())], device="cpu")
    vectors = sentences.encode(TEXTS)
    assert sentences.get_embedding_dimension() == vectors.shape[1] == 64
    np.testing.assert_allclose(vectors, sentences[0].embedder.encode(TEXTS), atol=1e-5)
    told = sentences.encode(TEXTS, prompt="find: ")
    np.testing.assert_allclose(told, sentences[0].embedder.encode(TEXTS, instruction="find: "), atol=1e-5)
    sentences.max_seq_length = 100
    sentences.save(str(tmp_path / "model"))
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-5)
    assert again.max_seq_length == 100


def test_the_command_writes_what_a_trained_one_gives(parts, make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    embedder = parts()
    embedder.save(tmp_path / "made")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    given = ["represent", "--method", "causal2vec", "--model", tmp_path / "model", "--json", tmp_path / "texts.txt"]

    def run(*more):
        return CliRunner().invoke(main, [*map(str, (*given, *more))])

    shown = run("-o", f"trained={tmp_path / 'made'}", "--output", tmp_path / "v.npy")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["shape"] == [3, 64], shown.output
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), embedder.encode(TEXTS).numpy(), atol=1e-5)
    assert "give trained=FOLDER" in run("--output", tmp_path / "w.npy").stderr


# --- what is refused ---------------------------------------------------------------------------------------------


def test_long_texts_are_refused_or_cut_and_keep_their_end(parts, tokenizer):
    embedder = parts()
    embedder.max_seq_length = 8
    with pytest.raises(InputError, match=r"text 1 has .* tokens with its instruction, the most is 8"):
        embedder.encode(["sea", TEXTS[2]])
    embedder.truncate = True
    (ids, before, _) = embedder.rows([TEXTS[2]])[0]
    assert len(ids) == 7 and ids[-1] == tokenizer.eos_token_id and before == 0
    for tokens in (2, 513):
        with pytest.raises(InputError, match=f"max_seq_length={tokens} is not allowed; give 3 .* 512"):
            embedder.max_seq_length = tokens


def test_what_is_too_long_for_the_encoder_is_counted(llama, tokenizer):
    reader = byte_tokenizer()
    embedder = Causal2Vec().untrained(copy.deepcopy(llama), tokenizer, (bert(max_position_embeddings=6), reader))
    with pytest.warns(UserWarning, match="2 of 3 texts have more than the 6 tokens that the encoder takes"):
        embedder.encode([*TEXTS[:1], "sea", *TEXTS[2:]])


def test_bad_texts(parts):
    embedder = parts()
    for texts, why in (
        (["sea", " "], "text 1 is empty"),
        ([1], "text 0 is a int"),
        ([], "no list of texts"),
        ("sea", "no list of texts"),
        (["\ud800"], "text 0"),
    ):
        with pytest.raises(InputError, match=why):
            embedder.encode(texts)
    with pytest.raises(InputError, match="batch_size=0"):
        embedder.encode(["sea"], batch_size=0)


def test_bad_places(parts):
    embedder = parts()
    features = embedder.tokenize(["sea", "the sea"])
    for index, row in (([0, 99], 1), ([-1, 0], 0)):
        with pytest.raises(InputError, match=f"context_index={index[row]} of row {row} is outside its text; give 0 to"):
            embedder(**{**features, "context_index": torch.tensor(index)})
    with pytest.raises(InputError, match="the encoder gets no ids"):
        embedder.model(features["input_ids"], features["attention_mask"])


def test_models_that_do_not_go_together(llama, tokenizer, parts, tmp_path):
    reader, method = byte_tokenizer(), Causal2Vec()
    mute = copy.deepcopy(tokenizer)
    mute.eos_token = None
    with pytest.raises(InputError, match="the tokenizer has no eos_token"):
        method.untrained(llama, mute, (bert(), reader))
    with pytest.raises(InputError, match="the encoder torch"):
        method.untrained(llama, tokenizer, (bert().double(), reader))
    with pytest.raises(InputError, match="the encoder meta; bring both to the same device"):
        method.untrained(llama, tokenizer, (bert().to("meta"), reader))
    with pytest.raises(InputError, match="LlamaModel is causal; give an encoder"):
        method.untrained(llama, tokenizer, (copy.deepcopy(llama.base_model), reader))
    with pytest.raises(InputError, match="sees both sides; Causal2Vec needs a causal decoder"):
        method.untrained(bert(), tokenizer, (bert(), reader))
    with pytest.raises(InputError, match="the layers of Gemma3nTextModel read token ids"):
        method.untrained(tiny_model("gemma3n_text"), tokenizer, (bert(), reader))
    config = parts().model.config
    with pytest.raises(InputError, match="the encoder is 32 wide, the projector is made for 16"):
        Causal2VecModel(config, llama.base_model, bert(32))


def test_what_is_not_trained_or_trained_on_another(make_model, tokenizer, parts, tmp_path):
    with pytest.raises(InputError, match="has to be trained before it embeds; give trained=FOLDER"):
        Causal2Vec().encoder(make_model("llama"), tokenizer)
    with pytest.raises(InputError, match="there is no trained Causal2Vec in"):
        Causal2Vec(trained=tmp_path / "none").encoder(make_model("llama"), tokenizer)
    parts().save(tmp_path / "made")
    with pytest.raises(InputError, match="was trained on a decoder with weights"):
        Causal2Vec(trained=tmp_path / "made").encoder(make_model("qwen2"), tokenizer)
    (tmp_path / "made" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError):
        Causal2Vec(trained=tmp_path / "made").encoder(make_model("llama"), tokenizer)
    with pytest.raises(InputError, match="has no decoder; give decoder and encoder"):
        Causal2VecModel(Causal2VecConfig())


def test_options():
    for options, why in (
        ({"context": "none"}, "needs the Contextual token, but context='none' leaves it out"),
        ({"context": "none", "pooling": "context"}, "needs the Contextual token"),
        ({"projector": "deep"}, "projector='deep' is not allowed"),
    ):
        with pytest.raises(InputError, match=why):
            Causal2Vec(**options)


def test_bad_training(parts):
    sentences = SentenceTransformer(modules=[Causal2VecTransformer(parts())], device="cpu")
    good = [("a", "b"), ("c", "d")]
    for rows, more, why in (
        (good[:1], {}, "1 rows cannot be trained on"),
        ([("a", "b"), ("c",)], {}, "2 rows cannot be trained on"),
        (good, {"temperature": 0}, "temperature=0"),
        (good, {"batch_size": 1}, "batch_size=1"),
        (good, {"steps": 0}, "steps=0"),
    ):
        with pytest.raises(InputError, match=why):
            train_contrastive(sentences, rows, **more)
    with pytest.raises(InputError, match="r=0"):
        add_lora(parts(), r=0)
