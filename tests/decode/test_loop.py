"""The decode loop: every equality it promises, on small random models."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import own_hooks
from transformers import LogitsProcessor, LogitsProcessorList

from tokenry import InputError
from tokenry.decode import DecodeLoop, Job, PhraseBan, TransformersEngine, Violation, loop
from tokenry.decode.generation.sampler import row_seed
from tokenry.decode.generation.sequence import SequenceState
from tokenry.hooks.residual import add_to_residual
from tokenry.models.anatomy import decoder_layers
from tokenry.text.token_text import TokenText

PROMPTS = ["the old lighthouse", "Elara walked along the shore and", "the"]


def encode(tokenizer, prompts=PROMPTS):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def run(model, inputs, tokenizer=None, **options):
    return model.generate(
        **inputs,
        custom_generate=loop,
        processing_class=tokenizer,
        pad_token_id=1,
        return_dict_in_generate=True,
        **{"max_new_tokens": 30, **options},
    )


class BanToken:
    """Rejects a token id wherever it appears, by index, without reading text."""

    def __init__(self, *tokens, factor=0.0):
        self.tokens, self.factor = set(tokens), factor

    def check(self, row: SequenceState):
        for index, token in enumerate(row.ids):
            if token in self.tokens and (index, "token") not in row.ignored:
                return Violation(index, "token", {token: self.factor})
        return None

    def hold(self, row):
        return 0


class BanRepeat:
    """Rejects the third-last token when the last one falls in a residue class: rewinds over several tokens."""

    def __init__(self, modulus=7, reach=3):
        self.modulus, self.reach = modulus, reach

    def check(self, row):
        for last in range(self.reach, len(row.ids)):
            index = last - self.reach
            if sum(row.ids[index : last + 1]) % self.modulus == 0 and (index, "sum") not in row.ignored:
                return Violation(index, "sum", {row.ids[index]: 0.0}, retries=5)
        return None

    def hold(self, row):
        return self.reach + 1


class BanRuns:
    """Rejects the first token of given runs of ids."""

    def __init__(self, runs):
        self.runs = runs

    def check(self, row):
        for index in range(len(row.ids) - 2):
            if tuple(row.ids[index : index + 3]) in self.runs:
                return Violation(index, "run", {row.ids[index]: 0.0})
        return None

    def hold(self, row):
        return 3


class Wave(LogitsProcessor):
    """Adds a bias to some tokens that depends on the generated length."""

    def begin(self, prompt_length):
        self.prompt = prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        t = input_ids.shape[1] - self.prompt
        scores[:, 5:60] += 2.0 * ((t % 8) - 4) / 4
        return scores


# --- neutral: equal to generate -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_without_plugins_equals_generate(make_model, tokenizer, kind, sample, rows):
    model, inputs = make_model(kind), encode(tokenizer, PROMPTS[:rows])
    options = dict(do_sample=sample, max_new_tokens=40, pad_token_id=1)
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(3)
    ours = model.generate(**inputs, custom_generate=loop, **options)
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_k": 9}, {"min_p": 0.05, "top_p": 0.8}])
def test_warpers_and_penalties_equal_generate(llama, tokenizer, options):
    inputs = encode(tokenizer)
    options = dict(options, do_sample=True, max_new_tokens=25, repetition_penalty=1.3, pad_token_id=1)
    torch.manual_seed(5)
    plain = llama.generate(**inputs, **options)
    torch.manual_seed(5)
    assert torch.equal(plain, llama.generate(**inputs, custom_generate=loop, **options))


def test_a_seed_equals_manual_seed_for_one_row(llama, tokenizer):
    inputs = encode(tokenizer, PROMPTS[:1])
    torch.manual_seed(11)
    plain = llama.generate(**inputs, do_sample=True, max_new_tokens=25, pad_token_id=1)
    assert torch.equal(plain, run(llama, inputs, do_sample=True, max_new_tokens=25, seed=11).sequences)


def test_monitors_that_never_fire_change_nothing(llama, tokenizer):
    inputs = encode(tokenizer)
    monitors = [PhraseBan(["this phrase never occurs"]), PhraseBan(["the"], strength=0.0)]
    plain = run(llama, inputs, tokenizer, do_sample=True, seed=2)
    watched = run(llama, inputs, tokenizer, do_sample=True, seed=2, monitors=monitors)
    assert torch.equal(plain.sequences, watched.sequences) and not watched.events
    assert plain.forward_calls == watched.forward_calls


# --- rewinding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("sample", [False, True])
def test_a_batch_with_rewinds_equals_single_rows(make_model, tokenizer, kind, sample):
    model, inputs = make_model(kind), encode(tokenizer)
    monitors = [BanRepeat(7 if sample else 4)]
    length = 40 if sample else 24  # greedy text repeats itself, and is rewound hundreds of times
    options = dict(do_sample=sample, monitors=monitors, tokenizer=tokenizer, max_new_tokens=length)
    together = run(model, inputs, seed=4, **options)
    assert len(together.events) >= 6
    for b, prompt in enumerate(PROMPTS):
        single = run(model, encode(tokenizer, [prompt]), seed=row_seed(4, b), **options)
        new = single.sequences[0, encode(tokenizer, [prompt])["input_ids"].shape[1] :]
        got = together.sequences[b, inputs["input_ids"].shape[1] :]
        assert torch.equal(got[: len(new)], new)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_cropping_masking_and_feeding_again_agree(make_model, tokenizer, kind):
    """One row crops its cache; a left-padded one masks dead columns; "reprefill" starts the cache again."""
    model = make_model(kind)
    options = dict(monitors=[BanRepeat()], tokenizer=tokenizer, do_sample=True, seed=9, max_new_tokens=40)
    inputs = encode(tokenizer, PROMPTS[:1])
    cropped = run(model, inputs, **options)
    padded = {
        "input_ids": torch.cat([torch.ones(1, 2, dtype=torch.long), inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(1, 2, dtype=torch.long), inputs["attention_mask"]], 1),
    }
    masked = run(model, padded, **options)
    again = run(model, inputs, rewind="reprefill", **options)
    assert cropped.events
    assert torch.equal(cropped.sequences, masked.sequences[:, 2:])
    assert torch.equal(cropped.sequences, again.sequences)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_after_rewinds_equal_a_fresh_forward(make_model, tokenizer, kind, rows):
    """Drive the engine by hand: forward, rollback different counts per row, feed other tokens, compare."""
    model, inputs = make_model(kind), encode(tokenizer, PROMPTS[:rows])
    engine = TransformersEngine(model, rewinds=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        engine.forward(inputs["input_ids"], inputs["attention_mask"])
        live = [[t for t, m in zip(i, k) if m] for i, k in zip(*(inputs[n].tolist() for n in inputs))]
        for step in range(30):
            for b in range(rows):
                count = (step * (b + 2)) % 4 if len(live[b]) > 12 else 0
                engine.rollback(b, count)
                live[b] = live[b][: len(live[b]) - count]
            tokens = torch.randint(2, 320, (rows, 1), generator=generator)
            logits = engine.forward(tokens)
            for b in range(rows):
                live[b].append(int(tokens[b]))
                fresh = model(torch.tensor([live[b]])).logits[0, -1]
                assert torch.allclose(logits[b], fresh, atol=1e-4), (step, b)


def test_rewinding_costs_only_the_dead_tokens(llama, tokenizer):
    inputs = encode(tokenizer, PROMPTS[:1])
    out = run(llama, inputs, tokenizer, monitors=[BanRepeat()], do_sample=True, seed=9)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    fed_and_dropped = sum(len(e.rejected) - 1 for e in out.events if e.kind == "rewind")
    assert out.tokens_processed == inputs["input_ids"].shape[1] + new - 1 + fed_and_dropped
    assert out.forward_calls == new + fed_and_dropped


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), modulus=st.integers(3, 11), reach=st.integers(1, 6), length=st.integers(1, 45))
def test_random_monitors_batch_equals_single(llama, tokenizer, seed, modulus, reach, length):
    inputs = encode(tokenizer)
    options = dict(
        tokenizer=tokenizer, monitors=[BanRepeat(modulus, reach)], do_sample=True, max_new_tokens=length, top_k=30
    )
    together = run(llama, inputs, seed=seed, **options)
    b = seed % 3
    single_inputs = encode(tokenizer, [PROMPTS[b]])
    single = run(llama, single_inputs, seed=row_seed(seed, b), **options)
    new = single.sequences[0, single_inputs["input_ids"].shape[1] :]
    assert torch.equal(together.sequences[b, inputs["input_ids"].shape[1] :][: len(new)], new)


def test_eos_can_be_taken_back(llama, tokenizer):
    """A row that has ended goes on when a monitor rejects its last token."""
    inputs = encode(tokenizer, PROMPTS[:1])

    class Always(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, 0] = 100.0
            return scores

    options = dict(tokenizer=tokenizer, logits_processor=LogitsProcessorList([Always()]), max_new_tokens=6)
    ended = run(llama, inputs, **options)
    assert ended.sequences.shape[1] == inputs["input_ids"].shape[1] + 1
    banned = run(llama, inputs, monitors=[BanToken(0)], **options)
    assert banned.sequences.shape[1] == inputs["input_ids"].shape[1] + 6
    assert 0 not in banned.sequences[0, inputs["input_ids"].shape[1] :]


# --- everything together against a run without any cache -------------------------------------------------------


class Thinning:
    """Fewer layers with every sixth generated column; layer 0 always runs."""

    def begin(self, prompt_columns, new_columns):
        self.first = prompt_columns

    def layers(self, column):
        return range(max(2, 4 - max(0, column - self.first) // 6))


def brute_force(model, tokenizer, prompt, processor, steer, policy, monitor, length):
    """The same plug-ins on full forwards of the whole sequence: no cache, no loop, greedy."""
    layers = decoder_layers(model)
    prompt_length = prompt.shape[1]
    processor.begin(prompt_length)
    policy.begin(prompt_length, length)
    row = SequenceState(0, prompt[0].tolist(), tokenizer)
    scores = []

    def forward(ids):
        """Layer l sees only the columns that reach it; sets only shrink, so they are a prefix."""
        depth = [4 if c < prompt_length else len(set(policy.layers(c))) for c in range(ids.shape[1])]
        base = model.model
        hidden = base.embed_tokens(ids)
        position_ids = torch.arange(ids.shape[1])[None]
        rotary = base.rotary_emb(hidden, position_ids)
        for number, layer in enumerate(layers):
            reach = sum(d > number for d in depth)
            part = layer(hidden[:, :reach], position_embeddings=tuple(r[:, :reach] for r in rotary))
            hidden = torch.cat([part, hidden[:, reach:]], 1)
        return model.lm_head(base.norm(hidden))[0, -1]

    with torch.no_grad(), steer:
        while len(row.ids) < length:
            ids = torch.cat([prompt, torch.tensor([row.ids], dtype=torch.long)], 1)
            scores.append(processor(ids, forward(ids)[None])[0].clone())
            row.append(int(scores[-1].argmax()))
            while (found := monitor.check(row)) is not None:
                for token in found.factors:
                    scores[found.index][token] = -torch.inf
                del scores[found.index + 1 :]
                row.truncate(found.index)
                row.checked = len(row.text)
                row.append(int(scores[found.index].argmax()))
            row.checked = len(row.text)
    return row.ids


def test_wave_ban_steering_and_skipping_equal_brute_force(llama, tokenizer):
    prompt = encode(tokenizer, PROMPTS[:1])["input_ids"]
    vector = 0.2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    plugins = dict(layer_policy=Thinning(), do_sample=False)
    free = run(
        llama,
        {"input_ids": prompt},
        logits_processor=LogitsProcessorList([Wave()]),
        interventions=[add_to_residual(llama, {1: vector})],
        **plugins,
    )
    ids = free.sequences[0, prompt.shape[1] :].tolist()
    banned = BanRuns({tuple(ids[i : i + 3]) for i in range(1, 30, 4)})
    expected = brute_force(
        llama, tokenizer, prompt, Wave(), add_to_residual(llama, {1: vector}), Thinning(), banned, 30
    )
    got = run(
        llama,
        {"input_ids": prompt},
        tokenizer,
        logits_processor=LogitsProcessorList([Wave()]),
        monitors=[banned],
        interventions=[add_to_residual(llama, {1: vector})],
        **plugins,
    )
    assert len(got.events) >= 3 and all(len(e.rejected) == 3 for e in got.events)
    assert got.sequences[0, prompt.shape[1] :].tolist() == expected


def test_an_exception_in_a_plugin_leaves_nothing_behind(llama, tokenizer):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 20:
                raise RuntimeError("broken plug-in")
            return scores

    inputs = encode(tokenizer, PROMPTS[:1])
    before = run(llama, inputs).sequences
    blocks = list(decoder_layers(llama))
    with pytest.raises(RuntimeError, match="broken plug-in"):
        run(
            llama,
            inputs,
            logits_processor=LogitsProcessorList([Broken()]),
            interventions=[add_to_residual(llama, {0: torch.ones(32)})],
            layer_policy=Thinning(),
        )
    assert list(decoder_layers(llama)) == blocks
    assert own_hooks(llama) == []
    assert torch.equal(before, run(llama, inputs).sequences)


# --- streaming ------------------------------------------------------------------------------------------------


class Collect:
    """A streamer that remembers every token in the order it came."""

    def __init__(self):
        self.prompt, self.tokens, self.ended = None, [], False

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.tokens += value.tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("seed", range(6))
def test_streams_are_never_withdrawn_and_add_up(llama, tokenizer, seed):
    inputs = encode(tokenizer)
    streamers = [Collect() for _ in PROMPTS]
    monitors = [PhraseBan(["the", "a", "sea", "li", "o", "e"]), BanRepeat()]
    out = run(
        llama, inputs, tokenizer, monitors=monitors, token_streamers=streamers, do_sample=True, seed=seed, top_k=40
    )
    assert out.events
    width = inputs["input_ids"].shape[1]
    for b, streamer in enumerate(streamers):
        new = out.sequences[b, width:].tolist()
        assert streamer.ended and streamer.tokens == new[: len(streamer.tokens)]
        assert set(new[len(streamer.tokens) :]) <= {1}  # only padding follows


def test_text_coordinates(tokenizer):
    text = "Café naïve 🙂 “the” lighthouse… 你好"
    ids = tokenizer.encode(text)
    growing = TokenText(tokenizer, tokenizer.encode("the old"))
    for token in ids:
        growing.append(token)
    assert growing.text == text
    assert len(growing.starts) == len(ids)
    for count in (len(ids) - 3, 7, 2, 0):
        growing.truncate(count)
        whole = TokenText(tokenizer, tokenizer.encode("the old"))
        for token in ids[:count]:
            whole.append(token)
        assert (growing.text, growing.starts, growing.done) == (whole.text, whole.starts, whole.done)
    for token in ids:
        growing.append(token)
    assert growing.text == text


def test_stop_strings_end_a_row(llama, tokenizer):
    inputs = encode(tokenizer, PROMPTS[:1])
    free = run(llama, inputs, tokenizer, do_sample=True, seed=1)
    word = free.texts[0][10:13]
    stopped = run(llama, inputs, tokenizer, do_sample=True, seed=1, stop=[word])
    assert free.texts[0].startswith(stopped.texts[0]) and word in stopped.texts[0]
    new = stopped.sequences[0, inputs["input_ids"].shape[1] :]
    assert word not in tokenizer.decode(new[:-1])


# --- refusals -------------------------------------------------------------------------------------------------


class Growing:
    def begin(self, prompt_columns, new_columns):
        self.first = prompt_columns

    def layers(self, column):
        return range(2 + max(0, column - self.first) % 2)


class NoFirst(Growing):
    def layers(self, column):
        return [1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_policy": Growing()}, "may only shrink"),
        ({"layer_policy": NoFirst()}, "layer 0 is always needed"),
        ({"num_beams": 2}, "no beams"),
        ({"rewind": "sometimes"}, "use 'auto' or 'reprefill'"),
        ({"stop": [""]}, "empty stop string"),
        ({"monitors": [BanToken(5)], "cache_implementation": "static"}, "default dynamic cache"),
    ],
)
def test_refusals(llama, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        run(llama, encode(tokenizer, PROMPTS[:1]), tokenizer, **options)


def test_refuses_a_prompt_beyond_the_window(llama):
    with pytest.raises(InputError, match="context window 512"):
        run(llama, {"input_ids": torch.full((1, 512), 5)}, max_new_tokens=3)


def test_monitors_without_a_tokenizer_are_refused(llama):
    with pytest.raises(InputError, match="processing_class"):
        run(llama, {"input_ids": torch.full((1, 4), 5)}, monitors=[BanToken(5)])


def test_one_streamer_per_row(llama, tokenizer):
    engine = TransformersEngine(llama)
    with pytest.raises(InputError, match="one streamer per row"):
        DecodeLoop(engine, Job(torch.full((2, 3), 5), 2), tokenizer).generate([Collect()])
