"""TiDAR: the text is the model's own, replicas know just what they may, the cache stays exact, and what is refused."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from support.families import TEXT, build
from transformers import (
    DynamicCache,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    TextStreamer,
)
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from tokenry import InputError, decode, load
from tokenry.decode import Job, PhraseBan, TiDAR, TransformersEngine, loop, tidar_generate
from tokenry.decode.speculation import self_draft
from tokenry.decode.speculation.self_draft import SelfDrafting, TiDARLoop
from tokenry.models.masks import as_attention_mask
from tokenry.train import TiDARTrainer

PROMPT = torch.tensor([[5, 2, 7, 1, 3]])


@lru_cache
def tiny(vocabulary=12, seed=0, kernel="sdpa", scale=6.0):
    """A random model that is sure of what it says; its last token is the mask."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=kernel).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale) if parameter.dim() > 1 else None
    model.config.mask_token_id = vocabulary - 1
    return model


def run(model, prompt=PROMPT, custom=tidar_generate, **options):
    """Without the mask token, which TiDAR never writes."""
    defaults = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [model.config.mask_token_id]}
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        custom_generate=custom,
        return_dict_in_generate=True,
        **{**defaults, **options},
    )


# --- greedy text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_greedy_text_is_that_of_generate(size, kernel):
    for seed in range(3):
        model = tiny(seed=seed, kernel=kernel)
        out = run(model, block_size=size)
        assert torch.equal(out.sequences, run(model, custom=None).sequences)
        assert out.stats.target_calls == out.forward_calls - 1 <= out.stats.emitted == 39
        assert out.stats.drafted <= (size - 1) * out.stats.target_calls


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_text_of_other_models(make_model, tokenizer, kind):
    model = make_model(kind)
    prompt = tokenizer(TEXT[:80], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 30, "do_sample": False, "suppress_tokens": [319]}
    out = model.generate(prompt, custom_generate=tidar_generate, mask_token_id=319, block_size=3, **options)
    assert torch.equal(out, model.generate(prompt, **options))


def test_greedy_text_under_processors():
    model = tiny()
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3}
    out = run(model, block_size=4, **options)
    assert torch.equal(out.sequences, run(model, custom=None, **options).sequences)


def test_the_end_of_a_text():
    model = tiny()
    plain = run(model, custom=None).sequences
    for place in (6, 9, 13):
        eos = int(plain[0, place])
        out = run(model, block_size=4, eos_token_id=eos, pad_token_id=0)
        assert torch.equal(out.sequences, run(model, custom=None, eos_token_id=eos, pad_token_id=0).sequences)
    for limit in range(1, 8):
        out = run(model, block_size=4, max_new_tokens=limit)
        assert torch.equal(out.sequences, plain[:, : 5 + limit])
        assert out.stats.emitted == limit - 1


def test_the_mask_token_is_never_written():
    model = tiny.__wrapped__()
    with torch.no_grad():
        model.lm_head.weight *= 0.01  # all scores are about 0, so it would be drawn
    for beta in (1.0, 0.5, 0.0):
        out = run(model, suppress_tokens=None, beta=beta, do_sample=True, seed=0, max_new_tokens=100)
        assert 11 not in out.new_ids[0] and len(set(out.new_ids[0])) == 11


# --- the distribution ------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_step(model, ids, size, beta):
    """Logits after `ids` by the definition: a causal row, mixed with the first mask of a block that sees all."""
    causal = model(torch.tensor([ids])).logits[0, -1].double()
    if beta < 1:
        whole = torch.tensor([[*ids, *[model.config.mask_token_id] * size]])
        sees = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
        sees[len(ids) :] = True
        masked = model(whole, attention_mask=as_attention_mask(model, sees[None, None])).logits[0, len(ids)].double()
        causal = beta * causal + (1 - beta) * masked
    causal[model.config.mask_token_id] = -torch.inf
    return causal


def warped(logits, temperature=1.0, top_k=0):
    logits = logits / temperature
    return logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf) if top_k else logits


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_greedy_text_with_less_trust_is_that_of_the_mixture(beta):
    model, size = tiny(), 3
    ids = PROMPT[0].tolist()
    for _ in range(20):
        ids.append(int(one_step(model, ids, size, beta).argmax()))
    out = run(model, block_size=size, beta=beta, max_new_tokens=20)
    assert out.sequences[0].tolist() == ids
    assert ids != run(model, custom=None, max_new_tokens=20).sequences[0].tolist()


@pytest.mark.parametrize(
    ("size", "beta", "options"),
    [
        (2, 1.0, {}),
        (3, 1.0, {}),
        (4, 1.0, {"temperature": 0.7, "top_k": 3}),
        (3, 0.5, {}),
        (3, 0.0, {"temperature": 1.3}),
    ],
)
def test_sampled_text_has_the_distribution_of_the_model(size, beta, options):
    """Continuations of three tokens: the first comes with the prompt, then two by drafts."""
    model, prompt = tiny(6, scale=4.0), PROMPT % 5
    distribution = {(): 1.0}
    for _ in range(3):
        distribution = {
            (*new, token): p * q
            for new, p in distribution.items()
            for token, q in enumerate(
                warped(one_step(model, prompt[0].tolist() + list(new), size, beta), **options).softmax(-1).tolist()
            )
            if q
        }
    warpers = [TemperatureLogitsWarper(options["temperature"])] if "temperature" in options else []
    warpers += [TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    counts, rows, taken = dict.fromkeys(distribution, 0), 1000, 0
    for seed in range(rows):
        engine = TransformersEngine(model, rewinds=True)
        job = Job(prompt, 3, warpers=warpers, do_sample=True, seed=seed)
        out = TiDARLoop(SelfDrafting(5, size, beta), engine, job).generate()
        counts[tuple(out.new_ids[0])] += 1
        taken += out.stats.accepted
    assert taken > rows / 10
    observed, expected = np.array(list(counts.values())), np.array(list(distribution.values())) * rows
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_a_seed_repeats_a_text():
    model = tiny(scale=3.0)
    first, second, third = (run(model, do_sample=True, seed=seed).new_ids for seed in (1, 1, 2))
    assert first == second != third


# --- what the rows of a forward see --------------------------------------------------------------------------------


class Watched(TiDARLoop):
    """Keeps what guesses are drawn from, with the text they were made after."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def _scores(self, row, masked):
        self.seen.append((row.prompt + row.ids[: row.fed], masked.clone()))
        return super()._scores(row, masked)


@pytest.mark.parametrize("size", [2, 4])
def test_a_replica_is_a_fresh_forward(size):
    """[all committed tokens | masks], position by position, whatever the number of accepted tokens was."""
    model = tiny()
    watched = Watched(SelfDrafting(11, size), TransformersEngine(model, rewinds=True), Job(PROMPT, 40))
    with torch.no_grad():
        out = watched.generate()
        assert {len(ids) for ids, _ in watched.seen} > {5}
        steps = np.diff([len(ids) for ids, _ in watched.seen])
        assert steps.min() == 1 and steps.max() >= 2  # several replicas have been used
        for ids, masked in watched.seen:
            assert ids == (PROMPT[0].tolist() + out.new_ids[0])[: len(ids)]
            whole = torch.tensor([[*ids, *[11] * size]])
            sees = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
            sees[len(ids) :] = True
            fresh = model(whole, attention_mask=sees[None, None]).logits[0, len(ids) :, :11]
            assert torch.allclose(masked[:, :11], fresh, atol=1e-4 * float(fresh.abs().max()))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("limit", [2, 7, 30])
def test_the_cache_is_that_of_a_fresh_prefill(limit, beta):
    model = tiny()
    out = run(model, block_size=4, beta=beta, max_new_tokens=limit)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(out.sequences[:, :-1], past_key_values=cache, use_cache=True)
    for mine, fresh in zip(out.past_key_values.layers, cache.layers, strict=True):
        held = mine.keys.shape[-2]  # the last token of a text that has ended is not always fed
        assert held in (4 + limit, 5 + limit - 1)
        for name in ("keys", "values"):
            expected = getattr(fresh, name)
            assert torch.allclose(getattr(mine, name), expected, atol=1e-5 * float(expected.abs().max()))


def test_a_cache_that_holds_the_beginning_of_the_prompt():
    model = tiny()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT[:, :3], past_key_values=cache, use_cache=True)
    out = run(model, block_size=4, past_key_values=cache)
    assert torch.equal(out.sequences, run(model, custom=None).sequences)
    assert out.tokens_processed == run(model, block_size=4).tokens_processed - 3
    with torch.no_grad():
        cache = model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"the cache holds the whole prompt \(5 columns\)"):
        run(model, block_size=4, past_key_values=cache)


def test_what_a_forward_costs():
    out = run(tiny(), block_size=4)
    assert out.tokens_processed == 5 + 4 + 20 * out.stats.target_calls


# --- together with the rest of the loop ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phrases(tokenizer):
    """A model whose greedy text has words to ban, and the options that keep the mask token out."""
    model = build("llama")
    model.config.mask_token_id = 319
    prompt = tokenizer("the old lighthouse stood", return_tensors="pt")["input_ids"]
    return model, prompt, {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [319]}


def both(model, prompt, options, **further):
    """By the plain loop and by TiDAR."""
    options = {**options, **further, "return_dict_in_generate": True}
    return [model.generate(prompt, custom_generate=custom, **options) for custom in (loop, tidar_generate)]


def test_monitors_may_rewind_what_was_drafted(phrases, tokenizer):
    model, prompt, options = phrases
    text = tokenizer.decode(both(model, prompt, options)[0].new_ids[0])
    words = [text[i : i + 3] for i in (6, 20, 33)]
    plain, drafted = (
        model.generate(
            prompt,
            custom_generate=custom,
            monitors=[PhraseBan(words)],
            processing_class=tokenizer,
            return_dict_in_generate=True,
            **options,
        )
        for custom in (loop, tidar_generate)
    )
    assert drafted.new_ids == plain.new_ids and len(plain.events) >= 2
    assert [e.index for e in drafted.events] == [e.index for e in plain.events]


def test_stop_strings_and_streamers(phrases, tokenizer, capsys):
    model, prompt, options = phrases
    text = tokenizer.decode(both(model, prompt, options)[0].new_ids[0])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    further = {"stop": [text[12:15]], "processing_class": tokenizer, "token_streamers": [streamer]}
    plain, drafted = both(model, prompt, options, **further)
    assert drafted.new_ids == plain.new_ids and len(drafted.new_ids[0]) < 40
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 and printed[0] == printed[1]


def test_as_a_method_of_generate(phrases, tokenizer):
    model, _, options = phrases
    plain = decode.generate(model, tokenizer, "the sea", **options)
    drafted = decode.generate(model, tokenizer, "the sea", methods=[TiDAR(block_size=3)], **options)
    assert drafted.texts == plain.texts and drafted.stats.target_calls > 0


def test_it_is_checked_once_that_a_model_obeys(monkeypatch):
    calls, check = [], self_draft.check_mask
    monkeypatch.setattr(self_draft, "check_mask", lambda *args: calls.append(1) or check(*args))
    model = tiny.__wrapped__()
    for _ in range(3):
        run(model, max_new_tokens=2)
    assert len(calls) == 1


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_of_the_model_are_taken():
    model = tiny.__wrapped__()
    model.config.tidar_block_size = 3
    assert TiDAR().plugins(model, None).speculation == SelfDrafting(11, 3, 1.0)
    assert TiDAR(block_size=2, beta=0.5, mask_token_id=4).plugins(model, None).speculation == SelfDrafting(4, 2, 0.5)
    assert TiDAR.from_strings(["block_size=none", "beta=0.25"]) == TiDAR(beta=0.25)
    del model.config.tidar_block_size
    assert TiDAR().plugins(model, None).speculation.block_size == 8


def bare(cls, config, **sizes):
    torch.manual_seed(0)
    common = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return cls(config(**common, num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1 is not allowed"),
        ({"beta": 1.5}, "beta=1.5 is not allowed"),
        ({"beta": -0.1}, "beta=-0.1 is not allowed"),
        ({"mask_token_id": 12}, "mask_token_id=12 is outside the vocabulary of 12"),
        ({"mask_token_id": 7}, "the prompt contains the mask token 7"),
        ({"prompt": PROMPT.expand(2, -1)}, r"2 prompts at a time are too many for tidar; give one \(--batch-size 1\)"),
        ({"num_beams": 2}, "no beams"),
    ],
)
def test_refused_calls(options, message):
    with pytest.raises(InputError, match=message):
        run(tiny(), **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"block_size": 1}, "block_size=1"), ({"beta": 2.0}, "beta=2.0"), ({"size": 3}, "no option 'size'")],
)
def test_refused_settings(values, message):
    with pytest.raises(InputError, match=message):
        TiDAR(**values)


def test_padding_is_refused():
    with pytest.raises(InputError, match="the prompt is padded"):
        tiny().generate(
            PROMPT, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]), custom_generate=tidar_generate, max_new_tokens=4
        )


def test_a_model_without_a_mask_token_is_refused(llama, tokenizer):
    with pytest.raises(InputError, match="has no mask token; give mask_token_id"):
        TiDAR().plugins(llama, tokenizer)


def test_refused_models():
    method = TiDAR(mask_token_id=11)
    sliding = bare(MistralForCausalLM, MistralConfig, sliding_window=8)
    recurrent = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention"],
        )
    )
    for model, why in ((sliding, "has layers with a sliding window"), (recurrent, "keeps a state")):
        with pytest.raises(InputError, match=f"{why}.*use a model with full attention"):
            method.plugins(model, None)
        with pytest.raises(InputError, match=f"{why}.*use a model with full attention"):
            TiDARTrainer(model, mask_token_id=11)
    with pytest.raises(InputError, match="no rotary positions"):
        TiDAR(mask_token_id=319).plugins(build("opt"), None)
    flash = bare(LlamaForCausalLM, LlamaConfig)
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 does not take a structured mask"):
        method.plugins(flash, None)
    deaf = bare(LlamaForCausalLM, LlamaConfig)
    plain = deaf.forward
    deaf.forward = lambda attention_mask=None, **kw: plain(**kw)
    with pytest.raises(InputError, match=r"ignores the attention mask|hides token"):
        method.plugins(deaf, None)


def test_caches_that_cannot_be_shortened_are_refused():
    model = tiny()
    with pytest.raises(InputError, match="cannot be"):
        run(model, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_other_drafts_are_refused(phrases, tokenizer):
    model, _, _ = phrases
    with pytest.raises(InputError, match="both draft"):
        decode.generate(model, tokenizer, "the sea", methods=[TiDAR(), decode.Spectr()])
    with pytest.raises(InputError, match="2 prompts at a time"):
        decode.generate(model, tokenizer, ["the sea", "the old"], methods=[TiDAR()])


# --- the experiment --------------------------------------------------------------------------------------------------


def test_guesses_of_other_kinds():
    from tokenry.measure.tasks.self_drafting import OtherGuesses, bigram, random_tokens, repeat

    follow = bigram([[0, 1, 2, 0, 1, 3, 0, 1, 2]], 5)
    assert follow([3, 0], 4) == [1, 2, 0, 1] and follow([4], 2) == [0, 1]
    assert repeat([1, 2], 3) == [2, 2, 2]
    assert random_tokens(7)([1, 2], 3) == random_tokens(7)([1, 2], 3) != random_tokens(7)([1, 3], 3)
    model = tiny()
    plain = run(model, custom=None).sequences[0].tolist()
    oracle = OtherGuesses(11, 4, guess=lambda ids, count: (plain[len(ids) :] + [0] * count)[:count])
    for guesses, calls in ((oracle, 10), (OtherGuesses(11, 4, guess=repeat), 39)):
        with torch.no_grad():
            out = guesses.loop(TransformersEngine(model, rewinds=True), Job(PROMPT, 40)).generate()
        assert out.sequences[0].tolist() == plain and out.stats.target_calls <= calls


def test_the_experiment_compares_and_judges(monkeypatch):
    from tokenry.evidence import tidar as experiment
    from tokenry.measure import claims
    from tokenry.measure.compare import compare

    monkeypatch.setattr(claims, "UNITS", 2)  # so that few problems decide
    for name, value in (("LESSONS", 50), ("MANY", 6)):
        monkeypatch.setattr(experiment, name, value)
    built = experiment.build(*load("zoo/tidar"), samples=2, seeds=(4, 5))
    assert [s.role for s in built.arms].count("method") == 4
    comparison = compare(built)
    assert comparison.table("tidar")["accuracy"].shape == (2, 2)
    assert np.isnan(comparison.table("tidar")["accuracy"][:, 1]).all()  # greedy text needs one seed
    assert not np.isnan(comparison.table("tidar, sampled")["accuracy"]).any()
    assert comparison.mean("tidar", "tokens_processed") > 5 * comparison.mean("tidar", "forward_passes")
    plain = [detail["ids"] for detail in comparison.details("plain") if detail]
    for name in experiment.LOSSLESS:  # with full trust in the causal rows the text is the model's own, whoever guesses
        assert [detail["ids"] for detail in comparison.details(name) if detail] == plain
    findings = built.findings(comparison)
    assert len(findings) == 7 and all(f.numbers for f in findings)
    assert findings[0].holds and findings[1].holds and findings[2].holds
    with pytest.raises(InputError, match="measured with --model zoo/tidar"):
        experiment.build(*load("zoo/reasoner"), samples=1)
