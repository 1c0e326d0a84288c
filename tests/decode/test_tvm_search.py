"""TVM search against plain sampling, against a search without caches, and against the best there is."""

from itertools import product

import pytest
import torch
from support.families import build, byte_tokenizer
from transformers import TextIteratorStreamer, TextStreamer

from tokenry import InputError
from tokenry.data.problems import Arithmetic, draw_problems
from tokenry.decode import Antislop, TreeShape, TVMSearch, generate, step_beam_search
from tokenry.decode.generation.sampler import Sampler
from tokenry.decode.reasoning.steps import prepared
from tokenry.decode.reasoning.tree_search import shared_out
from tokenry.evidence.tvm import right_so_far
from tokenry.learned import TokenValueModel
from tokenry.models.load import Loaded, load
from tokenry.text.token_text import TokenText

PROMPT, NEW = "the old lighthouse", 24
DRAWING = {"do_sample": True, "temperature": 1.0, "top_k": 40}
FAMILIES = ["llama", "qwen2", "gemma3", "opt"]


@pytest.fixture(scope="module")
def values(tokenizer):
    made = TokenValueModel.from_language_model(build("qwen2"), tokenizer).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        made.head.weight.normal_(std=0.2)
    return made


def search(values, **options):
    return TVMSearch(values=values, **{"max_step_tokens": 4, "delimiter": "e", **options})


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_beam_with_one_candidate_is_plain_sampling(kind, make_model, tokenizer, values):
    """The same ids from the same seed, row by row, whatever the value model says."""
    model, prompts = make_model(kind), [PROMPT, "the sea was a whisper in"]
    options = {"max_new_tokens": NEW, "seed": 3, **DRAWING}
    plain = generate(model, tokenizer, prompts, **options)
    found = generate(model, tokenizer, prompts, methods=[search(values, beams=1, candidates=1)], **options)
    assert found.new_ids == plain.new_ids and found.texts == plain.texts
    assert torch.equal(found.sequences, plain.sequences)


# --- the same without caches -----------------------------------------------------------------------------------------


def without_caches(model, tokenizer, values, prompt, shape, seed, budget):
    """The page's algorithm, every candidate read from its beginning; returns (finished, live, tokens read)."""
    processors, config, ends = prepared(model, DRAWING)
    sampler = Sampler(processors, config.do_sample, seed, shape.candidates, model.device)
    live, finished, read = [([], 0.5)], [], 0
    while live and len(finished) < shape.beams:
        shares = shape.allot([v for _, v in live]) if live[0][0] else [shape.candidates]
        parents = [beam for beam, count in zip(live, shares) for _ in range(count)]
        drafts, going = [[] for _ in parents], set(range(len(parents)))
        texts = [TokenText(tokenizer, prompt + ids, skip_special=False) for ids, _ in parents]
        while going:
            for c in sorted(going):
                whole = torch.tensor([prompt + parents[c][0] + drafts[c]])
                token = sampler.redraw(c, whole, model(whole).logits[0, -1].float(), 0, False)[0]
                drafts[c].append(token)
                texts[c].append(token)
                length = len(parents[c][0]) + len(drafts[c])
                full = len(drafts[c]) >= shape.max_step_tokens or length >= budget
                if full or token in ends or shape.delimiter in texts[c].text:
                    going.remove(c)
        grown = []
        for (ids, _), draft in zip(parents, drafts):
            whole = prompt + ids + draft
            read += 2 * len(whole) - 1
            grown.append((ids + draft, float(values.score(torch.tensor([whole]))[0, -1])))
        best = sorted(range(len(grown)), key=lambda i: -grown[i][1])[: shape.beams - len(finished)]
        finished += [grown[i] for i in best if grown[i][0][-1] in ends]
        live = [grown[i] for i in best if grown[i][0][-1] not in ends and len(grown[i][0]) < budget]
    return finished, read


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("allocation", ["even", "rebase"])
@torch.no_grad()
def test_caches_change_nothing(kind, allocation, make_model, tokenizer, values):
    """Steps of unequal length, copied and dropped rows, sliding windows: the same texts, and the same values."""
    model = make_model(kind)
    model.generation_config.eos_token_id = list(range(100, 160))  # so that some texts end
    try:
        shape = TreeShape(3, 6, allocation, 0.05, "e", None, 4)
        ids = tokenizer(PROMPT)["input_ids"]
        found = step_beam_search(Loaded(model, tokenizer), values, ids, shape, max_new_tokens=40, seed=5, **DRAWING)
        finished, read = without_caches(model, tokenizer, values, ids, shape, 5, 40)
    finally:
        model.generation_config.eos_token_id = 0
    assert finished and [beam.ids for beam in found.finished] == [ids for ids, _ in finished]
    assert [beam.value for beam in found.finished] == pytest.approx([value for _, value in finished], abs=2e-5)
    assert found.reread == read and found.fed + found.value_fed < read / 2
    assert found.best.value == max(beam.value for beam in found.finished)


# --- what is found ---------------------------------------------------------------------------------------------------


def pick(values, kept, **shape):
    """A search of single tokens 50 and 51, drawn evenly, led by a function."""
    model, tokenizer = build("llama"), byte_tokenizer()
    others = [token for token in range(320) if token not in (50, 51)]
    shape = TreeShape(**{"max_step_tokens": 1, "delimiter": "never", **shape})
    options = {"do_sample": True, "temperature": 1e4, "suppress_tokens": others}
    return step_beam_search(Loaded(model, tokenizer), values, [7, 8, 9], shape, max_new_tokens=kept, seed=0, **options)


def test_true_values_lead_to_the_best_text():
    """Of all 64 texts of six tokens; the value of a prefix is that of the best text which begins so."""
    worth = torch.rand(64, generator=torch.Generator().manual_seed(0)).tolist()
    table = dict(zip(product((50, 51), repeat=6), worth))

    def true(prompt, ids):
        return max(value for text, value in table.items() if list(text[: len(ids)]) == ids)

    found = pick(true, 6, beams=1, candidates=16)
    assert tuple(found.best.ids) == max(table, key=table.get) and found.best.value == max(worth)


def test_led_by_what_is_right_it_solves_what_sampling_does_not():
    """Steps end where the model ends them, and the text that is kept is a finished one: zoo/reasoner on its hardest
    level."""
    model, tokenizer = loaded = load("zoo/reasoner")
    problems = draw_problems(Arithmetic(), 3, split="dev", levels=[6])
    value, drawing = right_so_far(tokenizer, problems), {"do_sample": True, "temperature": 1.0, "top_k": 0}
    shape = TreeShape(beams=1, candidates=6)
    found = [
        step_beam_search(loaded, value, problem.question, shape, max_new_tokens=160, seed=0, **drawing)
        for problem in problems
    ]
    texts = [tokenizer.decode(one.best.ids, skip_special_tokens=True) for one in found]
    assert all(Arithmetic().check(*pair) for pair in zip(problems, texts))
    for one, text in zip(found, texts):
        assert len(one.best.values) == len(text.split("\n")), "a value for each line"
    plain = generate(model, tokenizer, [p.question for p in problems], max_new_tokens=160, seed=0, **drawing).texts
    assert not all(Arithmetic().check(*pair) for pair in zip(problems, plain))


def test_equal_values_keep_the_first():
    """With a constant value the first b candidates go on: a search of few is the beginning of one of many."""
    few, many = (pick(lambda prompt, ids: 0.5, 5, beams=1, candidates=n) for n in (1, 8))
    assert few.best.ids == many.best.ids


def test_a_limit_of_steps_ends_the_search(llama, tokenizer, values):
    found = search(values, max_steps=2).generate(llama, tokenizer, PROMPT, max_new_tokens=NEW, seed=0, **DRAWING)
    (result,) = found.results
    assert len(result.best.values) == 2 and found.stop_reasons == ["budget"] and not result.finished
    assert found.new_ids == [result.best.ids]


def test_shares():
    assert shared_out([0.4, 0.4, 0.4], 9, 0.2) == [3, 3, 3]
    assert shared_out([0.1, 0.9, 0.5], 9, 1e-3) == [0, 9, 0]
    assert shared_out([0.5, 0.5], 5, 0.2) == [3, 2], "rounded up, the first of equals first"
    w = torch.tensor([0.2, 0.6]).div(0.2).softmax(0)
    assert shared_out([0.2, 0.6], 8, 0.2) == [8 - int(8 * w[1] + 1), int(8 * w[1] + 1)]


def test_counts(llama, tokenizer, values):
    found = search(values, beams=2, candidates=4).generate(
        llama, tokenizer, PROMPT, max_new_tokens=9, seed=0, **DRAWING
    )
    (result,), stats = found.results, found.stats.summary()
    assert stats["written"] == result.written >= stats["kept"] == len(found.new_ids[0])
    assert found.tokens_processed == result.fed and stats["value_fed"] == len(found.prompt_ids[0]) + result.written
    assert f"{result.kept} of {result.written} written tokens kept" in found.stats.in_words()


def test_streamers_get_the_text(llama, tokenizer, values):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    method = search(values, beams=1, candidates=2)
    out = generate(
        llama, tokenizer, PROMPT, methods=[method], streamers=[streamer], max_new_tokens=8, seed=0, **DRAWING
    )
    assert "".join(streamer) == out.texts[0]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beams": 3}, "candidates=16 cannot be shared out evenly to beams=3; give a multiple of 3"),
        ({"beams": 0}, "beams=0"),
        ({"delimiter": ""}, "delimiter"),
        ({"balance": 0}, "balance=0"),
        ({"allocation": "odd"}, "allocation='odd'"),
        ({"values": "nowhere"}, "the folder 'nowhere' holds no token value model"),
    ],
)
def test_options(options, words, values):
    with pytest.raises(InputError, match=words):
        TVMSearch(**{"values": values, **options})


def test_calls(llama, tokenizer, values):
    method = search(values)
    with pytest.raises(InputError, match="tvm-search writes many texts at once and takes no monitors"):
        generate(llama, tokenizer, PROMPT, methods=[method, Antislop(phrases=["sea"])])
    with pytest.raises(InputError, match="takes no stop"):
        generate(llama, tokenizer, PROMPT, methods=[method], stop="sea")
    with pytest.raises(InputError, match="2 streamers for 1 rows"):
        method.generate(llama, tokenizer, PROMPT, streamers=[TextStreamer(tokenizer), TextStreamer(tokenizer)])
    with pytest.raises(InputError, match="the model's context window 512"):
        method.generate(llama, tokenizer, [[5] * 600])
    with pytest.raises(InputError, match="delimiter is empty"):
        TreeShape(delimiter="")
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(InputError, match="the value model reads the vocabulary"):
        method.generate(llama, other, PROMPT)
