"""Speculative decoding: the distribution of the text, greedy identity, the cache, batches, monitors, and what is
refused."""

import itertools
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from support.drafting import MANY, PROMPTS, encode, p_value, run, tiny
from support.families import TEXT, build
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, MistralConfig, MistralForCausalLM

from tokenry import InputError, catalog, decode
from tokenry.decode import PhraseBan, TransformersEngine, Violation, loop
from tokenry.decode.generation.sampler import row_seed
from tokenry.decode.speculation import drafters
from tokenry.decode.speculation.loop import Speculation, SpeculativeLoop
from tokenry.decode.speculation.tree import ROOT, DraftTree, slots
from tokenry.decode.speculation.verifiers import VERIFIERS
from tokenry.hooks.layers import skip_layers
from tokenry.measure.tasks.reflection import REFLECTION_PROMPTS
from tokenry.measure.tasks.stories import story_prompts
from tokenry.models.masks import tree_mask

EVERY = [("single", 1), *MANY]


@pytest.fixture(scope="module")
def small():
    """A random model that agrees with no other one."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


# --- the distribution ------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_distribution(model, prompt, length, temperature=1.0, top_k=0):
    """Probability of every continuation of the prompt (1, T), by the model alone."""
    vocabulary = model.config.vocab_size
    every = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    ids = torch.cat([prompt.expand(len(every), -1), every], 1)
    logits = model(ids).logits[:, prompt.shape[1] - 1 : -1].double() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.log_softmax(-1).gather(2, every[..., None]).sum((1, 2)).exp().numpy()


def sampled(model, prompt, length, rows, **options):
    """Counts of every continuation, by speculative decoding."""
    batch = {"input_ids": prompt.expand(rows, -1), "attention_mask": torch.ones(rows, prompt.shape[1])}
    out = run(model, batch, do_sample=True, **{"top_k": 0, "max_new_tokens": length + 1, "seed": 3, **options})
    vocabulary = model.config.vocab_size
    code = out.sequences[:, prompt.shape[1] :][:, :length].numpy() @ (vocabulary ** np.arange(length)[::-1])
    return np.bincount(code, minlength=vocabulary**length), out


@pytest.mark.parametrize(("verifier", "drafts"), EVERY)
def test_the_distribution_is_that_of_the_target(verifier, drafts):
    """Continuations of three tokens: one by the prompt's forward, then a tree of depth two and what follows it."""
    target, draft, prompt = tiny(0), tiny(1), torch.tensor([[1, 2, 0, 3]])
    options = {"drafter": draft, "verifier": verifier, "num_drafts": drafts, "draft_length": 2}
    counts, out = sampled(target, prompt, 3, 1000, **options)
    assert p_value(counts, plain_distribution(target, prompt, 3)) > 1e-3
    assert out.stats.block_efficiency > 1.2 and out.stats.accepted >= out.stats.accepted_explicitly
    if verifier != "naive":
        assert out.stats.accepted_explicitly > 0


@pytest.mark.parametrize(("verifier", "drafts"), [("rrs-without", 4), ("greedy", 4), ("kseq", 2)])
@pytest.mark.parametrize("drafter", ["ngram", "prompt-lookup"])
def test_the_distribution_with_warpers_and_drafts_from_the_text(drafter, verifier, drafts):
    """Temperature and top-k go for both; drafts that run out of tokens are fewer."""
    target, prompt = tiny(0), torch.tensor([[1, 2, 0, 3, 1, 2, 0, 3, 1, 2]])
    counts, out = sampled(
        target, prompt, 2, 600, drafter=drafter, verifier=verifier, num_drafts=drafts, temperature=0.7, top_k=2
    )
    assert p_value(counts, plain_distribution(target, prompt, 2, 0.7, 2)) > 1e-3
    assert out.stats.drafted


def test_a_draft_that_is_the_target_is_always_accepted(llama, tokenizer):
    for verifier, drafts in (("single", 1), ("kseq", 1), ("rrs", 1), ("rrs-without", 1), ("greedy", 1)):
        out = run(
            llama,
            encode(tokenizer),
            drafter=llama,
            verifier=verifier,
            num_drafts=drafts,
            do_sample=True,
            top_k=0,
            seed=1,
        )
        assert out.stats.acceptance_by_depth == [1.0] * 4 and out.stats.block_efficiency > 4.4


def test_more_drafts_are_accepted_more_often():
    target, draft, prompt = tiny(0), tiny(1), torch.tensor([[1, 2, 0, 3]])
    options = {"drafter": draft, "draft_length": 2}
    found = [sampled(target, prompt, 3, 300, num_drafts=k, **options)[1].stats.block_efficiency for k in (1, 2, 4)]
    assert found == sorted(found)


# --- greedy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("drafter", ["prompt-lookup", "ngram", "early-exit", "random", "itself"])
def test_greedy_equals_plain_greedy(make_model, tokenizer, small, kind, drafter):
    model, inputs = make_model(kind), encode(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=1)
    chosen = {"random": small, "itself": model}.get(drafter, drafter)
    for verifier, drafts in (("single", 1), ("greedy", 4)):
        out = run(model, inputs, drafter=chosen, verifier=verifier, num_drafts=drafts)
        assert torch.equal(out.sequences, plain)
        if drafter == "itself":
            assert out.stats.acceptance_by_depth == [1.0] * 4


def test_greedy_with_a_window_on_every_layer(small, tokenizer):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**small.config.to_dict(), "sliding_window": 6, "layer_types": None}))
    model, inputs = model.eval(), encode(tokenizer)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=1)
    out = run(model, inputs, drafter=deepcopy(model), num_drafts=4)
    assert torch.equal(out.sequences, plain) and out.stats.acceptance_by_depth[0] == 1


def test_greedy_with_eager_attention(tokenizer):
    model = build("llama")
    plain = model.generate(**encode(tokenizer), max_new_tokens=12, do_sample=False, pad_token_id=1)
    model.set_attn_implementation("eager")
    out = run(model, encode(tokenizer), drafter="ngram", max_new_tokens=12)
    assert torch.equal(out.sequences, plain)


def test_greedy_with_a_penalty(llama, tokenizer):
    options = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "max_new_tokens": 24, "do_sample": False}
    for prompt in PROMPTS:  # transformers binds this penalty to the rows of a padded batch
        inputs = encode(tokenizer, [prompt])
        plain = llama.generate(**inputs, pad_token_id=1, **options)
        for drafter in ("prompt-lookup", "ngram", llama):
            assert torch.equal(run(llama, inputs, drafter=drafter, num_drafts=3, **options).sequences, plain)


ASKED = (
    "Repeat this: the cat sat on the mat, the dog sat on the log, and the cat saw the dog.",
    "Rewrite with y for x: def area(x): return x * x  # the area of a square with side x",
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List the numbers from 1 to 12.",
    "Translate to French: good morning, my friend.",
    "Say hello five times.",
    "Fix the spelling: teh quick brwon fox jumps ovre teh lazy dog.",
    "Explain what a hash table is in one sentence.",
    "Count down from ten.",
)


def test_greedy_with_the_embedded_model(smollm2):
    """In float32 two best tokens closer than rounding could swap; on these prompts none are."""
    for prompt in ASKED:
        plain = decode.generate(*smollm2, prompt, max_new_tokens=16)
        method = decode.Spectr(drafter="prompt-lookup", verifier="single", num_drafts=1)
        assert decode.generate(*smollm2, prompt, methods=[method], max_new_tokens=16).new_ids == plain.new_ids


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_text_of_a_hundred_prompts(smollm2):
    """A row may differ from plain greedy text only where the two best tokens are as good as equal."""
    model, tokenizer = smollm2
    prompts = [*story_prompts(), *REFLECTION_PROMPTS, *ASKED, *(f"Name {n} things that are blue." for n in range(2, 8))]
    method, ties = decode.Spectr(drafter="prompt-lookup", verifier="greedy", num_drafts=2), 0
    for start in range(0, 100, 25):
        batch = prompts[start : start + 25]
        plain = decode.generate(model, tokenizer, batch, max_new_tokens=24)
        found = decode.generate(model, tokenizer, batch, methods=[method], max_new_tokens=24)
        for prompt, wanted, new in zip(plain.prompt_ids, plain.new_ids, found.new_ids):
            if new == wanted:
                continue
            same = next(i for i, pair in enumerate(zip(new, wanted)) if pair[0] != pair[1])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + wanted[:same]])).logits[0, -1]
            best = logits.topk(2)
            assert {new[same], wanted[same]} == set(best.indices.tolist())
            assert float(best.values[0] - best.values[1]) < 1e-3
            ties += 1
    assert len(prompts) == 100 and ties <= 2


# --- cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("kind", "sampling"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_the_cache_is_a_fresh_prefill_after_every_step(make_model, tokenizer, monkeypatch, kind, rows, sampling):
    model, steps = make_model(kind), []
    after = SpeculativeLoop._speculate

    def check(self):
        after(self)
        engine = self.engine
        for row in self.rows:
            ids = row.prompt + row.ids[: row.fed]
            columns = engine.grid.mask[row.number, : engine.columns].nonzero().squeeze(1)
            assert len(columns) == len(ids) == int(engine.grid.live[row.number]) and row.fed <= len(row.ids) - 1
            assert engine.grid.tokens[row.number, columns].tolist() == ids
            fresh = model(torch.tensor([ids]), use_cache=True).past_key_values
            for mine, theirs in zip(engine.cache.layers, fresh.layers):
                held = mine.keys.shape[2]
                inside = columns[columns >= engine.columns - held] - (engine.columns - held)
                keys = mine.keys[row.number, :, inside]
                count = min(keys.shape[1], theirs.keys.shape[2])  # a window has dropped the oldest ones
                assert torch.allclose(keys[:, -count:], theirs.keys[0, :, -count:], atol=1e-5)
        steps.append(max(row.fed for row in self.rows))

    monkeypatch.setattr(SpeculativeLoop, "_speculate", check)
    options = {"do_sample": sampling, "seed": 5, "num_drafts": 3, "draft_length": 3}
    run(model, encode(tokenizer, PROMPTS[:rows]), drafter=model, **options)
    assert len(steps) >= 4


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 7])
def test_the_limit_is_kept_in_text_and_cache(llama, tokenizer, most):
    inputs = encode(tokenizer, PROMPTS[:1])
    out = run(llama, inputs, drafter=llama, verifier="single", num_drafts=1, max_new_tokens=most)
    assert len(out.new_ids[0]) == most
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + most - 1


def test_the_end_of_text_inside_a_draft_ends_the_row(llama, tokenizer):
    inputs = encode(tokenizer, PROMPTS[:1])
    ids = run(llama, inputs, custom=loop).new_ids[0]
    end = ids[3]
    first = ids.index(end)
    out = run(llama, inputs, drafter=llama, verifier="single", num_drafts=1, eos_token_id=end)
    assert out.new_ids[0] == ids[: first + 1]
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + first


def test_stop_strings_and_budgets_inside_a_draft(llama, tokenizer):
    inputs, options = encode(tokenizer), {"processing_class": tokenizer}
    plain = run(llama, inputs, custom=loop, budgets=[3, 9, 24], **options)
    piece = tokenizer.decode(plain.new_ids[2][4:6])
    for more in ({"budgets": [3, 9, 24]}, {"stop": [piece]}):
        expected = run(llama, inputs, custom=loop, **options, **more)
        assert run(llama, inputs, drafter=llama, num_drafts=2, **options, **more).new_ids == expected.new_ids


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_tree_equals_plain_forwards(make_model, kind, apart):
    """Siblings, a batch with padding, rows that keep different paths, tokens that are taken back in between."""
    model, generator, rows = make_model(kind), torch.Generator().manual_seed(0), 3
    engine = TransformersEngine(model, rewinds=True)
    ids = torch.randint(2, 320, (rows, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    live = [ids[row, row:].tolist() for row in range(rows)]
    parents = np.array([-1, -1, 0, 0, 1])
    paths = [[0], [1], [0, 2], [0, 3], [1, 4]]
    with torch.no_grad():
        engine.forward(ids, mask)
        for step in range(8):
            new = torch.randint(2, 320, (rows, 5), generator=generator)
            every, parts = torch.ones(rows, 5, dtype=torch.bool), [slice(0, 2), slice(2, 5)] if apart else [slice(0, 5)]
            found = [engine.forward_tree(new[:, p], every[:, p], np.tile(parents[p], (rows, 1))) for p in parts]
            logits, kept = torch.cat(found, 1), []
            for row in range(rows):
                for node, path in enumerate(paths):
                    fresh = model(torch.tensor([live[row] + new[row, path].tolist()])).logits[0, -1]
                    assert torch.allclose(logits[row, node], fresh, atol=1e-5)
                kept.append(paths[(step + row) % 5])
                live[row] += new[row, kept[-1]].tolist()
            engine.commit(kept)
            for row in range(rows if step % 3 == 2 else 0):
                engine.rollback(row, row)
                live[row] = live[row][: len(live[row]) - row]


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("drafter", "verifier", "drafts"), [("ngram", "greedy", 3), ("model", "kseq", 3)])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_batch_equals_single_rows(make_model, tokenizer, small, kind, drafter, verifier, drafts, sample):
    model, inputs = make_model(kind), encode(tokenizer)
    options = {"verifier": verifier, "num_drafts": drafts, "do_sample": sample, "max_new_tokens": 30}
    options["drafter"] = small if drafter == "model" else drafter
    together = run(model, inputs, seed=4, **options)
    for b, prompt in enumerate(PROMPTS):
        single = run(model, encode(tokenizer, [prompt]), seed=row_seed(4, b), **options)
        assert together.new_ids[b] == single.new_ids[0]


def test_no_draft_is_plain_sampling(llama, tokenizer):
    """Where nothing was before, prompt lookup draws from the target with the same random numbers as plain decoding."""
    inputs = {"input_ids": torch.tensor([[5, 9, 7]]), "attention_mask": torch.ones(1, 3)}
    drafter = drafters.PromptLookupDrafter(longest=300, shortest=200)
    plain = run(llama, inputs, custom=loop, do_sample=True, seed=8)
    out = run(llama, inputs, drafter=drafter, do_sample=True, seed=8)
    assert out.new_ids == plain.new_ids and out.stats.drafted == 0 and out.stats.block_efficiency == 1


# --- monitors and streams --------------------------------------------------------------------------------------


class BanEvery:
    """Rejects the token three before each one whose sum falls in a residue class: rewinds into accepted tokens."""

    def check(self, row):
        for last in range(3, len(row.ids)):
            index = last - 3
            if sum(row.ids[index : last + 1]) % 6 == 0 and (index, "sum") not in row.ignored:
                return Violation(index, "sum", {row.ids[index]: 0.0}, retries=5)
        return None

    def hold(self, row):
        return 4


@pytest.mark.parametrize("kind, tokens", [("llama", 20), ("gemma3", 40)])  # the latter beyond its window of 16
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_with_rewinds_equals_plain_with_rewinds(make_model, tokenizer, small, kind, tokens, rows):
    model, inputs = make_model(kind), encode(tokenizer, PROMPTS[:rows])
    options = {"monitors": [BanEvery()], "processing_class": tokenizer, "max_new_tokens": tokens}
    plain = run(model, inputs, custom=loop, **options)
    assert len(plain.events) > 10
    for drafter in (model, small, "ngram"):
        out = run(model, inputs, drafter=drafter, num_drafts=3, **options)
        assert out.new_ids == plain.new_ids
        order = [sorted((e.row, e.index, e.kind) for e in found.events) for found in (plain, out)]
        assert order[0] == order[1]


def test_phrase_bans_equal_plain_ones(llama, tokenizer):
    inputs = encode(tokenizer)
    text = run(llama, inputs, custom=loop, processing_class=tokenizer).texts[0]
    options = {"monitors": [PhraseBan([text[6:12], text[14:17]])], "processing_class": tokenizer}
    plain = run(llama, inputs, custom=loop, **options)
    out = run(llama, inputs, drafter=llama, num_drafts=2, **options)
    assert plain.events and out.new_ids == plain.new_ids and out.texts == plain.texts


class Collect:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streams_show_what_stays(llama, tokenizer):
    inputs, streamers = encode(tokenizer), [Collect() for _ in PROMPTS]
    options = {"monitors": [BanEvery()], "processing_class": tokenizer, "token_streamers": streamers}
    out = run(llama, inputs, drafter=llama, num_drafts=3, **options)
    for streamer, prompt, ids in zip(streamers, inputs["input_ids"].tolist(), out.new_ids):
        assert streamer.ended and streamer.pieces == prompt + ids


# --- drafters --------------------------------------------------------------------------------------------------


def begun(drafter, distinct=False, vocabulary=8):
    target = SimpleNamespace(device=torch.device("cpu"), config=LlamaConfig(vocab_size=vocabulary))
    drafter.begin(target, 1, distinct)
    return drafter


def test_places_of_agreement():
    ids = np.array([1, 2, 3, 9, 2, 3, 7, 1, 2, 3])
    places, agree = drafters.matches(ids, 5)
    assert places.tolist() == [6, 3] and agree.tolist() == [2, 3]
    assert drafters.matches(np.array([4]), 3)[0].size == 0


def test_prompt_lookup_is_certain_or_ranked():
    ids = [1, 2, 3, 5, 2, 3, 7, 1, 2, 3]
    (one,) = begun(drafters.PromptLookupDrafter()).root([ids]).exp()
    assert one.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]  # the longest agreement, not the latest
    (many,) = begun(drafters.PromptLookupDrafter(), distinct=True).root([ids]).exp()
    assert many.tolist() == pytest.approx([0, 0, 0, 0, 0, 2 / 3, 0, 1 / 3])
    (none,) = begun(drafters.PromptLookupDrafter()).root([[1, 2, 3]])
    assert torch.isneginf(none).all()


def test_the_ngram_distribution_by_hand():
    """After "a": the text a b a c a, so the unigram is (3 a, 1 b, 1 c), the bigram (1 b, 1 c)."""
    (found,) = begun(drafters.NGramDrafter(order=1), vocabulary=4).root([[0, 1, 0, 2, 0]]).exp()
    unigram = (np.array([3, 1, 1, 0]) + 3 / 4) / 8
    assert found.tolist() == pytest.approx(((np.array([0, 1, 1, 0]) + 2 * unigram) / 4).tolist())
    assert found.sum() == pytest.approx(1)


def test_the_scores_of_a_model_drafter_are_its_logits(llama, tokenizer):
    """Along rewinds, accepted paths and new levels, for rows of unequal length."""
    drafter, generator = drafters.ModelDrafter(llama), torch.Generator().manual_seed(0)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    drafter.begin(llama, len(rows), False)

    def fresh(ids):
        return llama(torch.tensor([ids])).logits[0, -1]

    with torch.no_grad():
        for step in range(8):
            scores, trees = drafter.root(rows), [DraftTree() for _ in rows]
            for ids, found in zip(rows, scores):
                assert torch.allclose(found, fresh(ids), atol=1e-5)
            level = [[ROOT] for _ in rows]
            for depth in range(2):
                level = [
                    [
                        new
                        for node in nodes[:2]
                        for new in tree.add(node, torch.randint(2, 320, (2,), generator=generator).tolist(), scores[0])
                    ]
                    for tree, nodes in zip(trees, level)
                ]
                level[step % 3] = level[step % 3] if depth == 0 else []
                found = drafter.extend(trees, level)
                for ids, tree, nodes, logits in zip(rows, trees, level, found):
                    for node, row in zip(nodes, logits):
                        assert torch.allclose(row, fresh(ids + tree.path(node)), atol=1e-5)
            for b, tree in enumerate(trees):
                rows[b] = rows[b] + tree.path((step + b) % len(tree.tokens)) + [5 + step] * (step != 5)
                rows[b] = rows[b][: len(rows[b]) - 3 * (step in (2, 5) and len(rows[b]) > 6)]


def test_early_exit_is_the_first_layers(llama, tokenizer):
    drafter = drafters.EarlyExitDrafter(2)
    drafter.begin(llama, 1, False)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        scores = drafter.root([ids])
        with skip_layers(llama, {0, 1}):
            assert torch.allclose(scores[0], llama(torch.tensor([ids]), use_cache=False).logits[0, -1], atol=1e-5)


def test_slots_go_where_they_are_worth_most():
    distributions = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]])
    assert slots([1.0], distributions[1:2], 2) == [2]
    assert slots([0.5, 0.4, 0.1], distributions, 4) == [1, 3, 0]  # 0.5, 0.4, 0.24, 0.12 before 0.1
    assert slots([1.0], distributions[2:], 3) == [1]  # nothing else has probability


class FromScores:
    """A drafter that scores everything alike, with a given row."""

    def __init__(self, scores):
        self.scores = scores

    def begin(self, target, rows, distinct):
        self.rows = rows

    def root(self, contexts):
        return self.scores if self.scores is None else self.scores.expand(self.rows, -1)

    def extend(self, trees, nodes):
        return [self.scores.expand(len(new), -1) for new in nodes]


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_drafts": 0}, "num_drafts=0"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"verifier": "fast"}, "no verifier 'fast'; use one of single"),
        ({"verifier": "single"}, "takes one draft, not 8"),
        ({"verifier": "greedy", "gamma": 2.0}, "gamma=2.0 is of the verifier 'kseq'"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"exit_layers": 2}, "exit_layers=2 is of the drafter 'early-exit'"),
        ({"drafter": "early-exit", "exit_layers": 9}, "this model has 4"),
        ({"drafter": 3}, "int is no drafter"),
        ({"drafter": FromScores(None)}, "returned NoneType and no scores"),
        ({"drafter": FromScores(torch.zeros(1, 7))}, r"\(1, 7\) and no scores of shape \(1, 320\)"),
        ({"drafter": FromScores(torch.full((1, 320), torch.nan).index_fill(1, torch.tensor([3]), 0.0))}, "NaN"),
        ({"num_beams": 2}, "no beams"),
    ],
)
def test_refuses(llama, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        run(llama, encode(tokenizer, PROMPTS[:1]), **options)


def test_refuses_another_vocabulary(llama, tokenizer):
    with pytest.raises(InputError, match="draft vocabulary 5 != target 320; the ids must mean the same tokens"):
        run(llama, encode(tokenizer), drafter=tiny(0))


def test_refuses_other_tokens(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.train_new_from_iterator([TEXT.upper()], 320).save_pretrained(tmp_path)
    method = decode.Spectr(drafter=str(tmp_path))
    with pytest.raises(InputError, match="the ids must mean the same tokens"):
        method.plugins(llama, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert method.plugins(deepcopy(llama), tokenizer).speculation.num_drafts == 8  # another target reads it anew


@pytest.mark.parametrize("gamma", [1.0, 2.0, 5.0])
def test_the_distribution_with_a_fixed_gamma(gamma):
    """Fewer and fewer of the drafts survive, and the valid factors are others at every position."""
    target, draft, prompt = tiny(0), tiny(1), torch.tensor([[1, 2, 0, 3]])
    counts, _ = sampled(target, prompt, 3, 500, drafter=draft, num_drafts=3, draft_length=3, gamma=gamma)
    assert p_value(counts, plain_distribution(target, prompt, 3)) > 1e-3


def test_refuses_a_layer_policy_and_caches_that_cannot_shrink(llama, tokenizer):
    class Half:
        def begin(self, prompt_columns, new_columns):
            pass

        def layers(self, column):
            return [0, 1]

    plan = Speculation(drafters.NGramDrafter(), VERIFIERS["kseq"])
    with pytest.raises(InputError, match="layer policy"):
        run(llama, encode(tokenizer), custom=loop, speculation=plan, layer_policy=Half())
    with pytest.raises(InputError, match="reprefill"):
        run(llama, encode(tokenizer), custom=loop, speculation=plan, rewind="reprefill")
    with pytest.raises(InputError, match="cannot be taken back"):
        run(llama, encode(tokenizer), drafter="ngram", cache_implementation="static")


def test_refuses_a_compressed_cache(llama):
    engine = TransformersEngine(llama, rewinds=True)
    engine.forward(torch.full((1, 6), 9))
    layer = engine.cache.layers[1]
    layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]
    with pytest.raises(InputError, match="hold 4 to 6 of 6 columns"):
        engine.forward_tree(torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.bool), np.array([[-1]]))


def test_refuses_attention_without_masks():
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="does not take a structured mask"):
        tree_mask(model, None, torch.ones(1, 1, 1), None, None)


@pytest.mark.parametrize("values", [{"num_drafts": 0}, {"draft_length": 0}, {"verifier": "x"}, {"drafter": ""}])
def test_the_method_refuses(values):
    with pytest.raises(InputError, match=next(iter(values))):
        decode.Spectr(**values)


@pytest.mark.parametrize("values", [(0, 1), (2, 3)])
def test_drafters_refuse(values):
    with pytest.raises(InputError, match="shortest"):
        drafters.PromptLookupDrafter(*values)
    with pytest.raises(InputError, match="order"):
        drafters.NGramDrafter(0)


def test_two_drafting_methods_are_refused(smollm2):
    with pytest.raises(InputError, match="two methods both draft"):
        decode.generate(*smollm2, "hello", methods=[decode.Spectr(), decode.Spectr()])


# --- the method ------------------------------------------------------------------------------------------------


def test_the_catalogue_and_options():
    assert catalog.load("spectr") is decode.Spectr
    method = decode.Spectr.from_strings(["gamma=2.5", "num_drafts=4", "drafter=ngram", "exit_layers=none"])
    assert (method.gamma, method.num_drafts, method.draft_length, method.exit_layers) == (2.5, 4, 4, None)
    assert decode.Spectr.from_strings(["gamma=optimal"]).gamma == "optimal"


class Shift(LogitsProcessor):
    """Counts the prompt by `begin`, and forbids a token that depends on the length."""

    def begin(self, prompt_length):
        self.prompt = prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, (input_ids.shape[1] - self.prompt) % 50 + 5] = -torch.inf
        return scores


def test_processors_see_each_position(llama, tokenizer):
    options = {"logits_processor": [Shift()]}
    plain = run(llama, encode(tokenizer), custom=loop, **options)
    for drafter in ("ngram", llama):
        assert run(llama, encode(tokenizer), drafter=drafter, num_drafts=3, **options).new_ids == plain.new_ids


def test_counts_agree(llama, tokenizer):
    out = run(llama, encode(tokenizer), drafter="ngram", num_drafts=3)
    stats = out.stats
    assert stats.emitted == sum(len(ids) - 1 for ids in out.new_ids)  # the first of a row is the prompt's
    assert stats.accepted == stats.accepted_explicitly <= stats.drafted
    assert stats.accepted <= stats.emitted <= stats.accepted + stats.target_calls
    assert stats.block_efficiency == stats.emitted / stats.target_calls


# --- the experiment --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """Untrained models of the zoo's tokenizer: a target, and a drafter."""
    from tokenry.zoo.reasoner import build_tokenizer

    tokenizer, models = build_tokenizer(), []
    for seed, size in ((0, 32), (1, 16)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        models.append(LlamaForCausalLM(config).eval())
    return *models, tokenizer


def test_the_experiment_compares_and_judges(pair, tmp_path, monkeypatch):
    from tokenry.evidence import spectr as experiment
    from tokenry.measure.compare import compare
    from tokenry.measure.tasks import speculation

    target, draft, tokenizer = pair
    draft.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(speculation, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(speculation, "ROWS", 40)
    monkeypatch.setattr(experiment, "DRAWS", 40)
    method = decode.Spectr(drafter=str(tmp_path), draft_length=2)
    built = experiment.build(target, tokenizer, samples=2, method=method)
    comparison = compare(built)
    assert [s.role for s in built.arms] == ["plain", "control", "control", *["method"] * 4]
    assert comparison.mean("plain", "block_efficiency") == 1 < comparison.mean("kseq", "block_efficiency")
    for name in ("single", "rrs", "rrs-without", "kseq", "greedy"):
        assert 0 < comparison.mean(name, "ceiling") <= 1
    findings = built.findings(comparison)
    assert len(findings) == 7 and all(finding.numbers for finding in findings)


def test_chi_square_is_scipys():
    from tokenry.measure.tasks.speculation import chi_square

    distribution = {(0,): 0.5, (1,): 0.3, (2,): 0.199, (3,): 0.001}
    drawn = [(0,)] * 60 + [(1,)] * 25 + [(2,)] * 14 + [(3,)]
    found = chi_square(drawn, distribution)
    known = chisquare([60, 25, 15], [50, 30, 20])
    assert found["freedom"] == 2
    assert chi_square([*drawn[:-1], (2,)], {(0,): 0.5, (1,): 0.3, (2,): 0.2})["p"] == pytest.approx(known.pvalue)


def test_the_exact_distribution_of_continuations(pair):
    from tokenry.measure.tasks.speculation import continuation_distribution

    target, _, tokenizer = pair
    distribution = continuation_distribution(target, [2, 9, 3])
    assert sum(distribution.values()) == pytest.approx(1, abs=0.05) and max(map(len, distribution)) == 3
    assert all(len(new) == 3 or new[-1] == tokenizer.eos_token_id for new in distribution)


# --- the drafter of the zoo ------------------------------------------------------------------------------------


def test_distillation_is_the_divergence_from_the_teacher(pair):
    from tokenry.zoo import drafter

    target, draft, _ = pair
    (batch,) = drafter.batches_by_length(iter([([2, 9, 3, 5, 6, 1], 3), ([2, 8, 3, 7], 2)]), 100, 0)
    known = drafter.with_targets(target, batch)
    rows = batch["attention_mask"].bool()
    total = []
    for ids, keep, labels in zip(batch["input_ids"], rows, batch["labels"]):
        p, q = (m(ids[keep][None]).logits[0].log_softmax(-1) for m in (target, draft))
        learned = (labels[keep][1:] >= 0).nonzero().squeeze(1)
        total.append((p.exp() * (p - q)).sum(-1)[learned])
    assert drafter.distillation_loss(draft, known).item() == pytest.approx(torch.cat(total).mean().item(), rel=1e-4)
    assert drafter.distillation_loss(target, known).item() == pytest.approx(0, abs=1e-6)


def test_the_drafters_recipe_needs_the_reasoner():
    from tokenry.zoo import find_recipe

    recipe = find_recipe("drafter")
    assert recipe.needs == ("reasoner",) and callable(recipe.load().train) and callable(recipe.load().measure)
