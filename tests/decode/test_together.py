"""Methods of several stages in one call of `generate`, in the ecosystem's own idioms."""

from contextlib import nullcontext

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessor

from tokenry.decode import Antislop, CyclicReflex, PhraseBan, RegexBan, SkipDecode, loop, skip_forward, triangular_wave
from tokenry.decode.generation.sampler import row_seed
from tokenry.decode.generation.sequence import SequenceState
from tokenry.decode.rectification import RectifierLogitsProcessor
from tokenry.judge import CRew
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.select import CompressKV
from tokenry.trace.trace import Trace, capture

PROMPT = "the old lighthouse stood on the cliff and the sound of the sea was a whisper in the night, and the wind"
OTHER = "Elara walked along the shore; the keeper seemed to listen to the empty tower and the sea was not a dream but"


def encode(tokenizer, *prompts):
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def run(model, tokenizer, inputs, budget, amplitude, phrases, **options):
    wave = CyclicReflex(token_ids=range(40, 90), amplitude=amplitude, period=8, end_think=None).processor()
    press = CompressKV(budget=budget, window=4, top_heads=2, min_tokens=5, adaptive=False, heads="all")
    with press(model) as kept:
        out = model.generate(
            **inputs,
            custom_generate=loop,
            logits_processor=[wave],
            monitors=[PhraseBan(phrases), RegexBan(["#"])],
            processing_class=tokenizer,
            pad_token_id=1,
            return_dict_in_generate=True,
            **{"max_new_tokens": 30, "do_sample": True, "seed": 6, **options},
        )
    return out, kept.trace


def test_all_neutral_equals_plain_generate(llama, tokenizer):
    inputs = encode(tokenizer, PROMPT, OTHER)
    torch.manual_seed(6)
    plain = llama.generate(**inputs, do_sample=True, max_new_tokens=30, pad_token_id=1)
    torch.manual_seed(6)
    out, _ = run(llama, tokenizer, inputs, 512, 0.0, ["this never occurs"], seed=None)
    assert torch.equal(plain, out.sequences)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_all_active_batch_equals_single(make_model, tokenizer, kind):
    """A compressed cache under rewinds: cropped (one row), masked (a padded row) and batched agree."""
    model, phrases = make_model(kind), ["the", "a", "o", "li", "e", "and", "er", "en"]
    together, trace = run(model, tokenizer, encode(tokenizer, PROMPT, OTHER), 12, 2.0, phrases)
    assert set(trace.counts().values()) == {12} and together.events
    for b, prompt in enumerate((PROMPT, OTHER)):
        single, _ = run(model, tokenizer, encode(tokenizer, prompt), 12, 2.0, phrases, seed=row_seed(6, b))
        assert single.new_ids[0] == together.new_ids[b]


def test_each_alone_in_plain_generate(llama, tokenizer):
    inputs = encode(tokenizer, PROMPT)
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=1)
    plain = llama.generate(**inputs, **options)
    wave = CyclicReflex(token_ids=[43, 44], amplitude=30.0, period=8, end_think=None).processor()
    waved = llama.generate(**inputs, logits_processor=[wave], **options)
    assert not torch.equal(plain, waved)
    assert torch.equal(waved, llama.generate(**inputs, logits_processor=[wave], **options))  # used twice
    with CompressKV(budget=8, window=4, adaptive=False, heads="all")(llama) as kept:
        llama.generate(**inputs, **options)
    assert set(kept.trace.counts().values()) == {8}
    assert torch.equal(plain, llama.generate(**inputs, **options))


def test_a_trace_is_taken_along(llama, tokenizer):
    """Capturing does not change what monitors, a wave and a compressed cache generate."""
    inputs = encode(tokenizer, PROMPT)
    phrases = ["this never occurs"]
    without, _ = run(llama, tokenizer, inputs, 512, 2.0, phrases)
    with capture(llama, tokenizer) as cap:
        with_trace, _ = run(llama, tokenizer, inputs, 512, 2.0, phrases)
    assert torch.equal(without.sequences, with_trace.sequences)
    fed = with_trace.sequences[0, :-1]
    assert torch.equal(cap.trace.ids, fed)
    logits = llama(fed[None]).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, fed[1:, None]).squeeze(1)
    assert torch.allclose(cap.trace.logprob[1:], expected, atol=1e-4)


class RawScores(LogitsProcessor):
    """Oracle: the log-probabilities of the model itself at every length, the last time it was asked."""

    def __init__(self):
        self.at = {}

    def __call__(self, input_ids, scores):
        self.at[input_ids.shape[1]] = scores[0].log_softmax(-1)
        return scores


def test_everything_at_once_and_judged_from_its_trace(llama, tokenizer, tmp_path):
    """CompressKV, CyclicReflex, Antislop with rewinds, and a Trace that CRew scores: what is neutral changes nothing,
    and the score is that of the probabilities the model had when it wrote."""
    inputs = encode(tokenizer, PROMPT)
    oracle = RawScores()

    def write(*extra, capturing=None):
        wave = CyclicReflex(token_ids=range(40, 90), amplitude=2.0, period=8, end_think=None).processor()
        press = CompressKV(budget=12, window=4, top_heads=2, min_tokens=5, adaptive=False, heads="all")
        with press(llama) as kept, capturing or nullcontext() as cap:
            out = llama.generate(
                **inputs,
                custom_generate=loop,
                logits_processor=[*extra, wave],
                monitors=Antislop(phrases=["the", "li"], regexes=["[a-z]{4}"]).monitors(),
                processing_class=tokenizer,
                pad_token_id=1,
                return_dict_in_generate=True,
                max_new_tokens=30,
                do_sample=True,
                seed=6,
            )
        return out, kept.trace, cap

    plain, _, _ = write()
    neutral = CyclicReflex(token_ids=[3], amplitude=0.0, period=8, end_think=None).processor()
    out, kept, cap = write(oracle, neutral, capturing=capture(llama, tokenizer))
    assert out.new_ids == plain.new_ids and any(len(e.rejected) > 1 for e in out.events)
    assert set(kept.counts().values()) == {12}
    trace, first = cap.trace, inputs["input_ids"].shape[1]
    fed = [*inputs["input_ids"][0].tolist(), *out.new_ids[0][:-1]]
    assert trace.ids.tolist() == fed and trace.spans["prompt"] == [(0, first)]
    expected = [float(oracle.at[t][fed[t]]) for t in range(first, len(fed))]
    assert torch.allclose(trace.logprob[first:], torch.tensor(expected), atol=1e-5)

    method = CRew(marker=lambda text: (0, len(text) // 2))
    (score,) = method.score([trace])
    half = len(trace.text[int(trace.offsets[first, 0]) :]) // 2
    starts = trace.offsets[first:, 0] - int(trace.offsets[first, 0])
    assert score == pytest.approx(float(torch.tensor(expected)[starts < half].exp().mean()), rel=1e-4)
    trace.save(tmp_path / "t.safetensors")
    assert method.score([Trace.load(tmp_path / "t.safetensors", llama)]) == pytest.approx([score])


def test_methods_add_up_in_generate(smollm2):
    from tokenry import generate

    model, tokenizer = smollm2
    out = generate(
        model,
        tokenizer,
        "Tell a story about the sea.",
        methods=[Antislop(phrases=["the"]), CyclicReflex(words=["and"], amplitude=2.0, period=10, end_think=None)],
        max_new_tokens=24,
    )
    assert " the " not in f" {out.texts[0].lower()} " and len(out.new_ids[0]) == 24


# --- five methods in one loop, against a run that keeps nothing ---------------------------------------------------

WAVE = {"token_ids": range(40, 90), "amplitude": 2.0, "period": 8}
EPS, NEW, EOS = 0.1, 30, 0


class Collect:
    """A streamer that remembers every token; the prompt comes first."""

    def __init__(self):
        self.blocks = []

    def put(self, value):
        self.blocks.append(value.flatten().tolist())

    def end(self):
        self.tokens = [token for block in self.blocks[1:] for token in block]


@pytest.fixture(scope="module")
def rectifier(tokenizer):
    """An untrained one whose caps bind: values are spread over [-1, 0]."""
    from support.families import build

    torch.manual_seed(3)
    model = DeadEndValueModel(build("qwen2")).bind(tokenizer).eval()
    with torch.no_grad():
        model.q_head[-1].weight.mul_(0.4)
        model.q_head[-1].bias.copy_(-torch.rand(320))
    return model


class Rerun:
    """Every step from the ids alone: whole forwards, no cache, no loop. Only the monitor's `check` is shared.

    A token that is taken back leaves its column behind, unless there is one row without padding.
    """

    def __init__(self, model, tokenizer, rectifier, inputs, method, monitor, seed):
        mask = inputs["attention_mask"].bool()
        self.model, self.rectifier, self.monitor, self.width = model, rectifier, monitor, mask.shape[1]
        self.rows, self.columns = [], []
        for b, (ids, known) in enumerate(zip(inputs["input_ids"], mask)):
            self.rows.append(SequenceState(b, ids[known].tolist(), tokenizer))
            self.columns.append(known.nonzero()[:, 0].tolist())
        self.reuse = len(mask) == 1 and bool(mask.all())
        self.schedule = method.schedule_for(4, self.width, NEW)
        self.generators = [torch.Generator().manual_seed(row_seed(seed, b)) for b in range(len(mask))]
        self.rewinds = self.capped = 0

    def run(self):
        column = self.width
        while unfinished := [row for row in self.rows if len(row.ids) < NEW and row.ids[-1:] != [EOS]]:
            for row in unfinished:
                self.extend(row)
            for row, columns in zip(self.rows, self.columns):
                fed = len(row.prompt) + len(row.ids) - 1
                del columns[fed:]
                if self.reuse:
                    column = columns[-1] + 1 if len(columns) == fed else column
                columns += [column] * (fed + 1 - len(columns))
            column += 1
        return [row.ids for row in self.rows]

    def extend(self, row):
        """One more token, and what the monitor makes of it."""
        row.scores[len(row.ids)] = self.scores(row)
        row.append(self.draw(row))
        while (found := self.monitor.check(row)) is not None:
            row.scores[found.index][list(found.factors)] = -torch.inf
            row.truncate(found.index)
            row.checked = len(row.text)
            row.append(self.draw(row))
            self.rewinds += 1
        row.checked = len(row.text)

    def scores(self, row):
        """The logits with the wave, before caps."""
        ids = torch.tensor([row.prompt + row.ids])
        columns = torch.tensor([self.columns[row.number]])
        logits = skip_forward(self.model, ids, self.schedule.executed(columns - self.width)).logits[0, -1]
        wave = triangular_wave(len(row.ids), WAVE["amplitude"], WAVE["period"])
        logits[list(WAVE["token_ids"])] += float(wave)
        return logits

    def draw(self, row):
        """From the nearest distribution under the caps, found by bisection."""
        ids, p = torch.tensor([row.prompt + row.ids]), row.scores[len(row.ids)].double().softmax(-1)
        cap = (1 + self.rectifier(ids).q[0, -1].double() - EPS).clamp(1e-7, 1.0)
        low, high = 1.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if torch.minimum(cap, middle * p).sum() < 1 else (low, middle)
        binds = bool((p > cap).any())
        self.capped += binds
        capped = torch.minimum(cap, high * p) if binds else p
        return int(torch.multinomial(capped.float(), 1, generator=self.generators[row.number]))


def stretches(output, tokenizer, start):
    """The text of three tokens of every row, from `start` on."""
    found = []
    for ids, text in zip(output.new_ids, output.texts):
        a, z = (len(tokenizer.decode(ids[:n])) for n in (start, start + 3))
        found += [text[a:z]] if text[a:z].strip() else []
    return found


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, OTHER, "the wind"]], ids=["one row", "a padded batch"])
def test_wave_ban_caps_skipping_and_streams_equal_a_run_without_cache(llama, tokenizer, rectifier, prompts):
    inputs, method = encode(tokenizer, *prompts), SkipDecode(e_min=2, warmup=1)

    def write(phrases, streamers=()):
        return llama.generate(
            **inputs,
            custom_generate=loop,
            logits_processor=[CyclicReflex(**WAVE, end_think=None).processor()],
            monitors=[PhraseBan(phrases)],
            final_processors=[RectifierLogitsProcessor(rectifier, EPS)],
            layer_policy=method.plugins(llama, tokenizer).layer_policy,
            token_streamers=streamers,
            processing_class=tokenizer,
            pad_token_id=1,
            return_dict_in_generate=True,
            max_new_tokens=NEW,
            do_sample=True,
            top_k=0,
            seed=2,
        )

    phrases = ["this never occurs"]
    for start in (4, 10, 16, 22):  # what it writes is banned, as far as it has got
        phrases += stretches(write(phrases), tokenizer, start)
    streamers = [Collect() for _ in prompts]
    out = write(phrases, streamers)
    rerun = Rerun(llama, tokenizer, rectifier, inputs, method, PhraseBan(phrases), 2)
    assert out.new_ids == rerun.run()
    assert [s.tokens for s in streamers] == out.new_ids
    assert len(out.events) == rerun.rewinds >= 3 and any(len(e.rejected) > 1 for e in out.events)
    assert rerun.capped > NEW
