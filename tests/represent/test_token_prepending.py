"""Token Prepending: against the loop over layers written out, its invariants, and the two ways to use it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from support.families import own_hooks
from transformers import BertConfig, BertModel

from tokenry.cli import main
from tokenry.core.calibration import spearman
from tokenry.core.errors import InputError
from tokenry.evidence.token_prepending import (
    BOS,
    COT,
    COT_PLAIN,
    METHOD,
    MINILM,
    PLAIN,
    PUBLISHED,
    SHIPPED,
    SLOT,
    DevScores,
    Row,
    build,
    choose,
    score_on_dev,
)
from tokenry.hooks.residual import capture_residual
from tokenry.measure.claims import verdict
from tokenry.measure.compare import Comparison, compare
from tokenry.measure.task import Outcome
from tokenry.measure.tasks.sts import load_pairs, similarities, spread
from tokenry.models.anatomy import decoder_layers
from tokenry.models.embedders import load_minilm
from tokenry.represent import PROMPTS, PromptEmbedder, TokenPrepending, clean_up

FAMILIES = ("llama", "qwen2", "gemma3", "opt")
TEXTS = [
    "the old lighthouse stood on the cliff",
    "Elara walked along the shore, and the wind echoed through the empty tower of the sea",
    "a whisper",
    "It was not a dream?",
]


def rows_with_slot(slot, length=9, batch=2, seed=1):
    """Random ids with the slot at column 3."""
    ids = torch.randint(2, 300, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 3] = slot
    return ids


def states(model, ids, **options):
    """The output of every layer, the final state first."""
    with torch.no_grad(), capture_residual(model, range(4)) as caught:
        final = model.base_model(ids, use_cache=False, **options).last_hidden_state
    return [final, *(caught[layer][0] for layer in range(4))]


# --- the overwriting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("start", "stop"), [(1, 2), (0, 3), (1, 99), (2, 4)])
def test_equals_the_layers_run_one_by_one(make_model, kind, start, stop):
    model = make_model(kind)
    method = TokenPrepending(start_layer=start, exit_layer=stop, seed=3)
    with method(model) as run:
        ids = rows_with_slot(run.slot_token_id)
        got = states(model, ids)[1:]
    # the same by hand: the vector of the slot in the embeddings, then each layer on what the last one gave
    inputs, blocks = [], decoder_layers(model)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    vector = vector * float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))

    def look(module, args, kwargs):
        inputs.append((args[0], kwargs))

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    states(model, ids.masked_fill(ids == run.slot_token_id, 5))
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        hidden = inputs[0][0].clone()
        position = hidden[:, 3] - model.get_input_embeddings()(torch.tensor(5)) if kind == "opt" else 0
        hidden[:, 3] = vector + position
        for layer, block in enumerate(blocks):
            if start <= layer < stop:
                hidden[:, 3] = hidden[:, -1].clone()
            hidden = block(hidden, **inputs[layer][1])
            if kind == "opt":
                torch.testing.assert_close(hidden, got[layer], atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(hidden, got[layer]), layer
    assert own_hooks(model) == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_reaches_nothing_before_its_layer_or_left_of_its_slot(make_model, kind):
    model = make_model(kind)
    on, off = TokenPrepending(start_layer=2, exit_layer=4), TokenPrepending(overwrite=False)
    with on(model) as run:
        ids = rows_with_slot(run.slot_token_id)
        with_it = states(model, ids)
    with off(model):
        without = states(model, ids)
    for layer in range(4):
        a, b = with_it[layer + 1], without[layer + 1]
        assert torch.equal(a[:, :3], b[:, :3])  # causality
        assert torch.equal(a, b) == (layer < 2)


def test_early_words_learn_of_the_last_one(llama):
    """The point of the method: the first sentence word depends on the last, with it and not without."""
    for method, depends in ((TokenPrepending(exit_layer=2), True), (TokenPrepending(overwrite=False), False)):
        with method(llama) as run:
            ids = rows_with_slot(run.slot_token_id, batch=1)
            other = ids.clone()
            other[0, -1] = 7 if ids[0, -1] != 7 else 8
            first, second = states(llama, ids), states(llama, other)
        assert torch.equal(first[1][:, :-1], second[1][:, :-1])  # after layer 0 nothing has moved yet
        assert torch.equal(first[2][:, 4], second[2][:, 4]) != depends


def test_last_token_comes_from_the_mask_on_either_side(llama):
    with TokenPrepending(exit_layer=3)(llama) as run:
        ids = rows_with_slot(run.slot_token_id, batch=1)
        alone = states(llama, ids)[0]
        pad, real = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
        mask = torch.cat([real, torch.zeros_like(pad)], 1)
        right = states(llama, torch.cat([ids, pad], 1), attention_mask=mask)[0][:, :9]
        left = states(llama, torch.cat([pad, ids], 1), attention_mask=mask.flip(1))[0][:, 4:]
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "scale"), [("llama", 1.0), ("gemma3", 32**0.5)])
def test_slot_embeddings(make_model, kind, scale):
    model = make_model(kind)
    embedding = model.get_input_embeddings()
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(1))
    expected = {
        "zeros": torch.zeros(32),
        "mean": embedding(torch.arange(320)).detach().mean(0),
        "normal": scale * drawn,
    }
    for init, vector in expected.items():
        found = []
        with TokenPrepending(slot_init=init, seed=1)(model) as run:
            handle = embedding.register_forward_hook(lambda module, args, output, found=found: found.append(output))
            states(model, rows_with_slot(run.slot_token_id))
            handle.remove()
        torch.testing.assert_close(found[0][0, 3], vector, atol=1e-5, rtol=1e-4)
        assert torch.equal(found[0][0, 2], embedding(rows_with_slot(5)[0, 2]))


def test_gradients_flow_and_an_error_leaves_nothing_behind(llama):
    with TokenPrepending(exit_layer=4)(llama) as run:
        ids = rows_with_slot(run.slot_token_id)
        llama.base_model(ids, use_cache=False).last_hidden_state[:, -1].sum().backward()
    weight = llama.model.layers[0].mlp.down_proj.weight
    assert weight.grad.abs().sum() > 0
    llama.zero_grad()
    with pytest.raises(RuntimeError, match="stop"), TokenPrepending()(llama):
        raise RuntimeError("stop")
    assert own_hooks(llama) == []


# --- the embedder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_without_a_slot_it_is_the_plain_model_bit_for_bit(make_model, tokenizer, kind):
    model = make_model(kind)
    embedder = PromptEmbedder(model, tokenizer)
    prompt = 'This sentence : "a whisper." means in one word:"'
    with torch.no_grad():
        output = model.base_model(tokenizer(prompt, return_tensors="pt").input_ids, output_hidden_states=True)
    assert torch.equal(embedder.encode(["a  whisper"])[0], output.last_hidden_state[0, -1])
    layers = embedder.encode_layers(["a  whisper"])[0]
    assert len(layers) == 5
    for layer, hidden in zip(layers[:4], output.hidden_states):
        assert torch.equal(layer, hidden[0, -1])


@pytest.mark.parametrize("prompt", ["prompteol", "metaeol"])
def test_a_text_has_the_same_vector_alone_and_in_any_batch(make_model, tokenizer, prompt):
    for kind in ("llama", "opt"):
        embedder = TokenPrepending(exit_layer=3, prompt=prompt).encoder(make_model(kind), tokenizer)
        together = embedder.encode(TEXTS, batch_size=3)
        alone = torch.cat([embedder.encode([text]) for text in TEXTS])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(embedder(**embedder.tokenize(TEXTS)), alone, atol=2e-5, rtol=1e-5)
        assert (together[0] - together[2]).abs().max() > 1e-3


def test_several_templates_are_averaged(llama, tokenizer):
    parts = [
        TokenPrepending(prompt=template).encoder(llama, tokenizer).encode(TEXTS) for template in PROMPTS["metaeol"]
    ]
    assert len(parts) == 8
    whole = TokenPrepending(prompt="metaeol").encoder(llama, tokenizer).encode(TEXTS)
    torch.testing.assert_close(whole, torch.stack(parts).mean(0), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", [None, TokenPrepending(exit_layer=3)])
def test_stopping_early_gives_what_the_full_forward_gives_there(make_model, tokenizer, kind, method):
    model, ran = make_model(kind), []
    handles = [
        block.self_attn.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
        for i, block in enumerate(decoder_layers(model))
    ]
    full = PromptEmbedder(model, tokenizer, token_prepending=method).encode_layers(TEXTS)
    for layer in range(5):
        for index in (layer, layer - 5):
            ran.clear()
            embedder = PromptEmbedder(model, tokenizer, token_prepending=method, output_layer=index)
            assert torch.equal(embedder.encode(TEXTS), full[:, layer])
            assert ran == list(range(layer))
    for handle in handles:
        handle.remove()
    assert own_hooks(model) == []


def test_the_slot_is_tokenized_like_an_added_token(llama, tokenizer):
    import copy

    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<PST>"], special_tokens=False)
    embedder = TokenPrepending().encoder(llama, tokenizer)
    assert embedder.slot_token_id == 320 == grown.convert_tokens_to_ids("<PST>")
    (ids,) = embedder.rows(["It was a dream"])[0]
    assert ids == grown('This sentence : <PST> "It was a dream." means in one word:"').input_ids


def test_bos(llama, tokenizer):
    import copy

    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<eos>"
    plain, led = (PromptEmbedder(llama, with_bos, add_bos=flag).rows(["a"])[0][0] for flag in (None, True))
    assert led == [0, *plain]
    with pytest.raises(InputError, match="has no BOS token; give add_bos=False"):
        PromptEmbedder(llama, tokenizer, add_bos=True)


def test_normalize(llama, tokenizer):
    raw, unit = (PromptEmbedder(llama, tokenizer, normalize=flag).encode(TEXTS) for flag in (False, True))
    torch.testing.assert_close(unit, raw / raw.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a  b\tc\n", "a b c."),
        ("Done.", "Done."),
        ("Why?", "Why."),
        ('He said "yes"', "He said 'yes'"),
        ('"Why?"', "'Why?'"),
        ("wait!", "wait!."),
        ("", ""),
    ],
)
def test_clean_up(text, cleaned):
    assert clean_up(text) == cleaned


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": 2, "exit_layer": 2}, "start_layer=2 must be below exit_layer=2"),
        ({"exit_layer": 0}, "exit_layer=0 is not allowed"),
        ({"prompt": 'The "{text}" means'}, "has 0 {slot} and 1 {text}"),
        ({"prompt": "{slot} {slot} {text}"}, "has 2 {slot} and 1 {text}"),
        ({"prompt": "{text} means {slot} in short"}, "put the slot before the text"),
        ({"slot_init": "ones"}, "one of normal, zeros, mean"),
        ({"layer": 1}, "no option 'layer'"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(InputError) as error:
        TokenPrepending(**options)
    assert message in str(error.value)


def test_refuses_models_and_layers(llama, tokenizer):
    bert = BertModel(
        BertConfig(**{"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2})
    )
    with pytest.raises(InputError, match="BertModel is bidirectional"):
        TokenPrepending()(bert)
    with pytest.raises(InputError, match="start_layer=4 does not exist; this model has layers 0 to 3"):
        TokenPrepending(start_layer=4, exit_layer=9)(llama)
    for layer in (5, -6):
        with pytest.raises(InputError, match=f"output_layer={layer} does not exist; .* give -5 to 4"):
            TokenPrepending(output_layer=layer).encoder(llama, tokenizer)


def test_refuses_rows_without_one_slot_before_the_last_token(llama):
    from transformers import DynamicCache

    run = TokenPrepending()(llama, slot_token_id=7)
    good = torch.tensor([[5, 7, 9, 4]])
    cache = DynamicCache(config=llama.config)
    with run, torch.no_grad():
        for ids, count in (([[5, 7, 9, 4], [5, 6, 9, 4]], 0), ([[5, 7, 9, 4], [7, 7, 9, 4]], 2)):
            with pytest.raises(InputError, match=f"exactly once per row, row 1 has {count}"):
                llama(torch.tensor(ids))
        with pytest.raises(InputError, match="row 0 is its last token"):
            llama(torch.tensor([[5, 6, 7, 1]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
        with pytest.raises(InputError, match="do not pass inputs_embeds"):
            llama(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(InputError, match="do not pass a 4-D one"):
            llama(good, attention_mask=torch.ones(1, 1, 4, 4))
        llama(good, past_key_values=cache)
        with pytest.raises(InputError, match="past_key_values holds 4 tokens"):
            llama(good, past_key_values=cache)
    assert own_hooks(llama) == []


def test_refuses_texts(llama, tokenizer):
    embedder = TokenPrepending(output_layer=0).encoder(llama, tokenizer)
    for texts, message in (
        ("one text", "is no list of texts"),
        ([], "is no list of texts"),
        (["a", None], "text 1 is a NoneType"),
        (["a", "my {slot}"], "text 1 contains '{slot}'"),
        (["a", "sea " * 600], "tokens with its prompt, the model takes 512; shorten it"),
    ):
        with pytest.raises(InputError, match=message):
            embedder.encode(texts)
    with pytest.raises(InputError, match="batch_size=0"):
        embedder.encode(["a"], batch_size=0)
    with pytest.warns(UserWarning, match="text 1 is empty and becomes a pair of empty quotes"):
        assert embedder.encode(["a", " "]).shape == (2, 32)


# --- sentence-transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, TokenPrepending(exit_layer=3, output_layer=3, prompt="cot")])
def test_sentence_transformers_gives_the_same_vectors_and_reloads(llama, tokenizer, tmp_path, method):
    from sentence_transformers import SentenceTransformer

    from tokenry.represent import TokenPrependingTransformer

    embedder = method.encoder(llama, tokenizer) if method else PromptEmbedder(llama, tokenizer, normalize=True)
    expected = embedder.encode(TEXTS)
    model = SentenceTransformer(modules=[TokenPrependingTransformer(embedder)], device="cpu")
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), expected, atol=2e-5, rtol=1e-5)
    assert model.get_embedding_dimension() == 32 and model.max_seq_length == 512
    model.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected, atol=2e-5, rtol=1e-5)
    assert again[0].embedder.token_prepending == method
    (tmp_path / "token_prepending.json").unlink()
    with pytest.raises(InputError, match="has no token_prepending"):
        TokenPrependingTransformer.load(str(tmp_path))


# --- STS-B -----------------------------------------------------------------------------------------------------


def test_sts_pairs():
    counts = {split: len(load_pairs(split)) for split in ("train", "dev", "test")}
    assert counts == {"train": 5749, "dev": 1500, "test": 1379}
    pair = load_pairs("test")[0]
    assert pair == ("A girl is styling her hair.", "A girl is brushing her hair.", 2.5)
    assert any('"' in p.first for p in load_pairs("test"))  # lone quotes are text
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], 2) == [1, 2]
    with pytest.raises(InputError, match="no split 'valid'"):
        load_pairs("valid")
    with pytest.raises(InputError, match="give 1 to 2"):
        spread([1, 2], 3)


def test_spearman_has_ties_at_their_mean_rank():
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 6, 30), generator.normal(size=30).round(1)
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(3), np.arange(3)))


def check_minilm(count, expected, tolerance):
    pairs = spread(load_pairs("test"), count)
    cosines = similarities(load_minilm().embed, pairs)
    assert 100 * spearman(cosines.numpy(), np.array([p.score for p in pairs])) == pytest.approx(expected, abs=tolerance)


def test_the_harness_is_right_on_200_pairs():
    check_minilm(200, 86.17, 0.05)


@pytest.mark.slow
def test_the_harness_is_right():
    """all-MiniLM-L6-v2 is known to reach 82.03 on the test split."""
    check_minilm(1379, 82.03, 0.05)


# --- the experiment --------------------------------------------------------------------------------------------


def test_dev_scores_come_from_the_embeddings(llama, tokenizer, tmp_path):
    pairs = spread(load_pairs("dev"), 12)
    scores = score_on_dev(llama, tokenizer, pairs)
    assert [row.exit_layer for row in scores.rows] == [0, 1, 2, 3, 4] and not any(row.add_bos for row in scores.rows)
    embedder = TokenPrepending(exit_layer=3, output_layer=2).encoder(llama, tokenizer)
    first, second = (embedder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    cosine = torch.nn.functional.cosine_similarity(first, second)
    expected = scipy.stats.spearmanr(cosine, [pair.score for pair in pairs]).statistic
    assert scores.rows[3].layers[1] == pytest.approx(100 * expected, abs=1e-3)
    scores.save(tmp_path / "dev.json")
    again = DevScores.load(tmp_path / "dev.json")
    assert again == scores and again.fits(llama)
    for text in ("{", "[]", '{"model": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match="make one with tools/choose_token_prepending"):
            DevScores.load(tmp_path / "bad.json")


def test_every_subject_gets_its_best_layer_of_dev():
    rows = (
        Row(0, False, (1.0, 9.0, 3.0)),
        Row(1, False, (8.0, 1.0, 1.0)),
        Row(2, False, (1.0, 2.0, float("nan"))),
        Row(3, False, (1.0, 2.0, 7.0)),
        Row(0, True, (10.0, 1.0, 1.0)),
        Row(1, True, (99.0, 1.0, 1.0)),
        Row(2, True, (1.0, 6.0, 1.0)),
        Row(3, True, (1.0, 2.0, 3.0)),
    )
    method, layers, rival, notes = choose(DevScores("tiny", "0", 5, rows))
    assert (method.exit_layer, method.add_bos, method.output_layer, method.overwrite) == (3, False, 3, True)
    assert layers == {PLAIN: 2, BOS: 1, SLOT: 1, PUBLISHED: 2} and rival == BOS
    assert "exit layer 3, no BOS, output layer 3 (7.0)" in notes and "BOS, output layer 1 (10.0)" in notes


def test_the_shipped_choice_fits_the_embedded_model(smollm2):
    scores = DevScores.load(SHIPPED)
    assert scores.fits(smollm2[0]) and {len(row.layers) for row in scores.rows} == {30}
    assert {row.exit_layer for row in scores.rows} == {0, 1, 2, 3, 4, 5, 7}


def test_the_experiment_runs_and_its_controls_are_what_they_say(llama, tokenizer):
    method = TokenPrepending(exit_layer=3, output_layer=3)
    experiment = build(llama, tokenizer, samples=6, method=method)
    roles = {s.name: s.role for s in experiment.arms}
    assert roles == {
        PLAIN: "plain",
        **dict.fromkeys((SLOT, COT_PLAIN, MINILM), "control"),
        **dict.fromkeys((PUBLISHED, COT, METHOD), "method"),
    }
    comparison = compare(experiment)
    second = [p.second for p in spread(load_pairs("test"), 6)]
    for name, embedder in {
        PLAIN: PromptEmbedder(llama, tokenizer, output_layer=3),
        SLOT: TokenPrepending(overwrite=False, output_layer=3).encoder(llama, tokenizer),
        PUBLISHED: TokenPrepending(exit_layer=2, output_layer=3).encoder(llama, tokenizer),
        COT_PLAIN: PromptEmbedder(llama, tokenizer, output_layer=3, prompt="cot"),
        COT: TokenPrepending(exit_layer=3, output_layer=3, prompt="cot").encoder(llama, tokenizer),
        METHOD: method.encoder(llama, tokenizer),
    }.items():
        cosine = torch.nn.functional.cosine_similarity(
            embedder.encode([s.prompt for s in comparison.samples]), embedder.encode(second)
        )
        assert comparison.values(name, "similarity") == pytest.approx(cosine.numpy(), abs=1e-5)
    assert len(comparison.details(METHOD)[0]["layers"]) == 5
    assert comparison.mean(METHOD, "spearman") == pytest.approx(
        100 * spearman(comparison.values(METHOD, "similarity"), comparison.values(METHOD, "gold"))
    )
    findings = experiment.findings(comparison)
    assert len(findings) == 5 and "layer (3) beats the last one" in findings[4].statement


@pytest.mark.parametrize("helps", [True, False])
def test_the_judge_follows_the_numbers(llama, tokenizer, helps):
    """Cosines that equal the gold score up to noise: little noise for what is good."""
    experiment = build(llama, tokenizer, samples=150, method=TokenPrepending(output_layer=2))
    samples = experiment.task.samples()
    noise = dict.fromkeys((PLAIN, SLOT, PUBLISHED, COT_PLAIN, COT), 1.0) | {METHOD: 0.1 if helps else 2.5, MINILM: 0.1}
    outcomes = {}
    for name, size in noise.items():
        draw = np.random.default_rng(len(name)).normal(size=(len(samples), 5))
        for sample, row in zip(samples, draw):
            gold = sample.data["gold"]
            layers = (gold + size * row + 200 * row * (np.arange(5) == 4)).tolist()
            metrics = {"similarity": layers[2], "similarity_last": layers[-1], "gold": gold}
            outcomes[name, sample.id, 0] = Outcome(metrics, detail={"layers": layers})
    findings = experiment.findings(Comparison(experiment, samples, outcomes))
    better = "holds" if helps else "fails"
    assert [f.outcome for f in findings] == [better, better, "undecided", "undecided", "holds"]
    assert verdict(findings) == ("partly" if helps else "not reproduced")
    # a plain prompt that dev reads elsewhere: then the gain could be the layer's
    plain = replace(experiment.arms[0], setting={"output_layer": 1})
    elsewhere = replace(experiment, arms=[plain, *experiment.arms[1:]])
    more = elsewhere.findings(Comparison(elsewhere, samples, outcomes))
    assert more[:5] == findings and more[5].holds == helps and "same layer (2)" in more[5].statement


def test_meaning_decides_on_the_embedded_model(smollm2):
    embedder = TokenPrepending(output_layer=28).encoder(*smollm2)
    base, same, other = embedder.encode(
        ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell on Monday."]
    )
    near, far = (torch.cosine_similarity(base, vector, 0) for vector in (same, other))
    assert near > far + 0.05


# --- command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    """A saved tiny model and a file of sentences."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


def represent(*args, code=0, stdin=None):
    result = CliRunner().invoke(main, ["represent", *map(str, args)], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_command_writes_what_the_method_gives(folder, llama, tokenizer):
    from pyarrow import parquet

    model = ["--model", folder / "model"]
    method = TokenPrepending(exit_layer=3, output_layer=3)
    options = ["--method", "token-prepending", "-o", "exit_layer=3", "-o", "output_layer=3"]
    out = represent(folder / "texts.txt", *options, *model, "--output", folder / "v.npy", "--json")
    shown = json.loads(out)
    assert shown["shape"] == [4, 32] and shown["options"]["exit_layer"] == 3
    expected = method.encoder(llama, tokenizer).encode(TEXTS).numpy()
    np.testing.assert_allclose(np.load(folder / "v.npy"), expected, atol=1e-5)
    out = represent("-", *model, "--output", folder / "v.parquet", stdin="\n".join(TEXTS))
    assert "4 vectors of width 32" in out
    table = parquet.read_table(folder / "v.parquet").to_pydict()
    assert table["text"] == TEXTS
    plain = PromptEmbedder(llama, tokenizer).encode(TEXTS).numpy()
    np.testing.assert_allclose(np.array(table["embedding"]), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["-", "--output", "v.csv"], "a", "give a file that ends in .npy or .parquet"),
        (["-", "--output", "/nowhere/v.npy"], "a", "cannot be written"),
        (["-", "--output", "{}/v.npy"], "", "the file '-' is empty"),
        (["-", "--output", "{}/v.npy"], "a\n\nb\n", "line 2 of '-' is empty"),
        (["/nowhere", "--output", "{}/v.npy"], "", "cannot be read"),
        (
            ["-", "--output", "{}/v.npy", "-o", "exit_layer=2"],
            "a",
            "add --method, see `tokenry list`",
        ),
        (["-", "--output", "{}/v.npy", "--method", "antislop"], "a", "use `tokenry decode`"),
        (["-", "--output", "{}/v.npy", "--batch-size", "0"], "a", "--batch-size 0 is not allowed"),
        (["-", "--output", "{}/v.npy", "--method", "token-prepending", "-o", "exit_layer=1"], "a", "raise exit_layer"),
    ],
)
def test_command_refuses_in_one_sentence(tmp_path, args, stdin, message):
    error = represent(*[a.format(tmp_path) for a in args], code=2, stdin=stdin)
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_parquet_needs_pyarrow(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = represent("-", "--output", tmp_path / "v.parquet", code=2, stdin="a")
    assert "pip install pyarrow" in error
