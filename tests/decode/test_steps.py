"""The decode loop step by step: what it yields, what cancelling gives back, and that it leaves nothing behind."""

import time
from contextlib import closing, contextmanager

import pytest
import torch
from support.families import own_hooks

from tokenry import InputError
from tokenry.decode import (
    VERIFIERS,
    DecodeLoop,
    Job,
    ModelDrafter,
    Plugins,
    SelfDrafting,
    Speculation,
    TransformersEngine,
    Violation,
)
from tokenry.hooks.residual import add_to_residual
from tokenry.models.kv_cache import cache_bytes

PROMPTS = ["the old lighthouse", "Elara walked along the shore and", "the"]


@pytest.fixture
def opened(tokenizer):
    """opened(model, rows, plugins, **options of the job): a loop, and the plug-ins decide which."""

    def make(model, rows=3, plugins=Plugins(), **options):  # noqa: B008
        batch = tokenizer(PROMPTS[:rows], return_tensors="pt", padding=True)
        options = {"max_new_tokens": 24, "do_sample": True, "seed": 5, "eos_ids": [0], "pad_id": 1, **options}
        job = Job(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        rewinds = bool(plugins.monitors) or plugins.speculation is not None
        kind = DecodeLoop if plugins.speculation is None else plugins.speculation.loop
        return kind(TransformersEngine(model, rewinds=rewinds), job, tokenizer, plugins)

    return make


def drafting(model):
    return Plugins(speculation=Speculation(ModelDrafter(model), VERIFIERS["kseq"], 3, 3))


class BanSums:
    """Rejects a token where it and the next ones have a sum that a number divides: rewinds over several tokens."""

    def check(self, row):
        for index in range(len(row.ids) - 2):
            if sum(row.ids[index : index + 3]) % 7 == 0 and (index, "sum") not in row.ignored:
                return Violation(index, "sum", {row.ids[index]: 0.0}, retries=5)
        return None

    def hold(self, row):
        return 3


def joined(steps, rows):
    texts = [[] for _ in range(rows)]
    for settled in steps:
        for text, new in zip(texts, settled, strict=True):
            text += new
    return texts


class Counts:
    """A processor that knows whether a generation is going on."""

    open = 0

    def begin(self, prompt_length):
        self.open += 1

    def end(self):
        self.open -= 1

    def __call__(self, input_ids, scores):
        assert self.open == 1
        return scores


# --- what is yielded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("drafts", [False, True])
def test_steps_together_are_the_text(make_model, opened, kind, rows, drafts):
    model = make_model(kind)
    plugins = drafting(model) if drafts else Plugins()
    wanted = opened(model, rows, plugins).generate()
    loop = opened(model, rows, plugins)
    assert joined(loop.steps(), rows) == wanted.new_ids == loop.output().new_ids
    assert loop.output().stop_reasons == wanted.stop_reasons


@pytest.mark.parametrize("drafts", [False, True])
def test_nothing_is_yielded_that_a_rewind_takes_back(llama, opened, drafts):
    plugins = Plugins(monitors=[BanSums()]) + (drafting(llama) if drafts else Plugins())
    loop, texts = opened(llama, plugins=plugins), [[], [], []]
    for settled in loop.steps():
        for row, text, new in zip(loop.rows, texts, settled):
            text += new
            assert row.ids[: len(text)] == text
    assert len({event.row for event in loop.events}) >= 2 and any(len(e.rejected) > 1 for e in loop.events)
    assert texts == loop.output().new_ids


def test_steps_of_a_model_that_drafts_for_itself(llama, opened):
    plugins = Plugins(speculation=SelfDrafting(319, 4))
    wanted = opened(llama, 1, plugins, do_sample=False).generate()
    loop = opened(llama, 1, plugins, do_sample=False)
    assert joined(loop.steps(), 1) == wanted.new_ids
    loop = opened(llama, 1, plugins, do_sample=False)
    steps = loop.steps()
    first = joined([next(steps), next(steps)], 1)
    loop.cancel(0)
    assert list(steps) == [] and loop.output().new_ids == first and loop.output().stop_reasons == ["cancelled"]


def test_a_loop_runs_once(llama, opened):
    loop = opened(llama)
    list(loop.steps())
    with pytest.raises(InputError, match="has run"):
        list(loop.steps())


# --- cancelling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("extra", ["nothing", "monitor", "drafts"])
def test_the_other_rows_do_not_notice(make_model, opened, kind, sample, extra):
    model = make_model(kind)
    if extra == "drafts" and kind == "opt":
        pytest.skip("its positions count columns, so it takes no draft trees")
    ban = Plugins(monitors=[BanSums()])
    plugins = {"nothing": Plugins, "monitor": lambda: ban, "drafts": lambda: drafting(model)}[extra]
    whole = opened(model, plugins=plugins(), do_sample=sample).generate().new_ids
    loop = opened(model, plugins=plugins(), do_sample=sample)
    steps, texts = loop.steps(), [[], [], []]
    for number, settled in enumerate(steps):
        for text, new in zip(texts, settled):
            text += new
        if number == 3:
            loop.cancel(1)
    out = loop.output()
    assert out.new_ids == texts and out.stop_reasons[1] == "cancelled"
    assert out.new_ids[0] == whole[0] and out.new_ids[2] == whole[2]
    assert len(whole[1]) > len(out.new_ids[1]) and whole[1][: len(out.new_ids[1])] == out.new_ids[1]


@pytest.mark.parametrize("drafts", [False, True])
def test_the_cache_of_a_row_is_given_back(llama, opened, drafts):
    plugins = drafting(llama) if drafts else Plugins()
    loop = opened(llama, plugins=plugins, eos_ids=())
    steps = loop.steps()
    next(steps), next(steps)
    engines = [loop.engine, loop.drafter.engine] if drafts else [loop.engine]
    before = [cache_bytes(engine.cache) for engine in engines]
    loop.cancel(0)
    assert [cache_bytes(engine.cache) * 3 for engine in engines] == [size * 2 for size in before]
    next(steps)
    loop.cancel(2)
    assert {layer.keys.shape[0] for engine in engines for layer in engine.cache.layers} == {1}
    list(steps)
    assert loop.output().stop_reasons == ["cancelled", "budget", "cancelled"]


def test_cancelling_the_only_row_ends_the_loop(llama, opened):
    loop = opened(llama, 1)
    steps = loop.steps()
    text = joined([next(steps), next(steps), next(steps)], 1)
    loop.cancel(0)
    assert list(steps) == [] and cache_bytes(loop.engine.cache) == 0
    assert loop.output().new_ids == text and loop.output().stop_reasons == ["cancelled"]


def test_a_row_that_never_begins(llama, opened):
    wanted = opened(llama).generate().new_ids
    loop = opened(llama)
    loop.cancel(0)
    assert joined(loop.steps(), 3) == [[], *wanted[1:]]
    assert loop.output().stop_reasons[0] == "cancelled" and loop.engine.cache.layers[0].keys.shape[0] == 2


def test_a_row_that_has_ended_stays_as_it_is(llama, opened):
    loop = opened(llama, budgets=[2, 9, 9])
    for _ in loop.steps():
        if 0 not in loop.active:
            loop.cancel(0)
    assert loop.output().stop_reasons[0] in ("budget", "finished") and loop.output().new_ids[0]
    with pytest.raises(InputError, match="row 3 is not in this generation; give one from 0 to 2"):
        loop.cancel(3)


def test_a_time_out(llama, opened):
    whole = opened(llama, max_new_tokens=400, eos_ids=()).generate
    loop, deadline = opened(llama, max_new_tokens=400, eos_ids=()), time.monotonic() + 0.2
    for _ in loop.steps():
        if time.monotonic() > deadline:
            break
    cut = loop.output()
    assert cut.stop_reasons == ["cancelled"] * 3 and 0 < len(cut.new_ids[0]) < 400
    assert whole().new_ids[0][: len(cut.new_ids[0])] == cut.new_ids[0]


# --- closing -------------------------------------------------------------------------------------------------------


def test_a_closed_generator_leaves_the_model_clean(llama, opened):
    before, left = own_hooks(llama), []

    @contextmanager
    def around():
        try:
            yield
        finally:
            left.append(True)

    counts = Counts()
    push = add_to_residual(llama, {1: torch.ones(32)})
    plugins = Plugins([counts], interventions=[around(), push])
    loop = opened(llama, plugins=plugins)
    with closing(loop.steps()) as steps:
        next(steps), next(steps)
        assert counts.open == 1 and len(own_hooks(llama)) > len(before) and torch.is_grad_enabled()
    assert counts.open == 0 and left == [True] and own_hooks(llama) == before
    assert loop.output().stop_reasons == ["cancelled"] * 3


def test_a_streamer_that_fails_leaves_the_model_clean(llama, tokenizer):
    from tokenry.decode import generate

    class Fails:
        ended = False

        def put(self, value):
            if value.numel() == 1:
                raise OSError("nobody listens any more")

        def end(self):
            self.ended = True

    counts, streamers, before = Counts(), [Fails(), Fails()], own_hooks(llama)
    push = add_to_residual(llama, {1: torch.ones(32)})
    with pytest.raises(OSError, match="nobody listens"):
        generate(
            llama, tokenizer, PROMPTS[:2], chat=False, processors=[counts], interventions=[push], streamers=streamers
        )
    assert counts.open == 0 and own_hooks(llama) == before and all(one.ended for one in streamers)
