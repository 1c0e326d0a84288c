"""TVM as a judge: the value of the last token, in every way in which solutions come."""

import json

import pytest
import torch
from click.testing import CliRunner
from support.families import build, byte_tokenizer

import tokenry
from tokenry import InputError
from tokenry.cli import main
from tokenry.judge import TVM, Sample, TokenValueModel, TVMScorer, best_of_n, weighted_vote
from tokenry.models.load import Loaded

PROMPT = "the sea was"
SOLUTIONS = ["a dream. A: 12", "a whisper in the night. A: 7", "not 12 but\nA: 12.", "nothing"]


@pytest.fixture(scope="module")
def values(tokenizer):
    made = TokenValueModel.from_language_model(build("qwen2"), tokenizer).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        made.head.weight.normal_(std=0.2)
    return made


@pytest.fixture
def scorer(llama, tokenizer, values):
    return TVM(values=values, marker="answer").scorer(Loaded(llama, tokenizer))


def last_value(values, tokenizer, solution):
    ids = tokenizer(PROMPT).input_ids + tokenizer(solution).input_ids + [tokenizer.eos_token_id]
    return float(values.score(torch.tensor([ids]))[0, -1])


def test_a_solution_is_worth_its_last_token(scorer, values, tokenizer):
    scores = scorer.score([Sample(PROMPT, text, "12") for text in SOLUTIONS])
    wanted = [last_value(values, tokenizer, text) for text in SOLUTIONS]
    assert scores.values[:3] == pytest.approx(wanted[:3], abs=1e-6) and scores.values[3] is None
    assert [one.correct for one in scores.judged] == [True, False, True, False]
    assert best_of_n(scores.judged).solution == SOLUTIONS[max(range(3), key=wanted.__getitem__)]
    twelve = wanted[0] + wanted[2]
    answer, share = weighted_vote(scores.judged)
    assert (answer, share) == ("12", pytest.approx(twelve / (twelve + wanted[1]))) or twelve < wanted[1]


def test_every_token_has_a_value(scorer, values, tokenizer):
    found = scorer.token_values([PROMPT] * 4, SOLUTIONS)
    start = tokenizer(PROMPT).input_ids
    for text, one in zip(SOLUTIONS, found, strict=True):
        assert one.ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        alone = values.score(torch.tensor([start + one.ids]))[0, len(start) :].tolist()
        assert one.values == pytest.approx(alone, abs=1e-6)


def test_a_batch_is_its_rows(values, tokenizer):
    samples = [Sample(PROMPT, text) for text in SOLUTIONS]
    one, many = (TVMScorer(values, tokenizer, "answer", batch_size=n).score(samples).values for n in (1, 4))
    assert one[:3] == pytest.approx(many[:3], abs=1e-6)


def test_a_trace_is_its_text(scorer, llama, tokenizer):
    ids = tokenizer(PROMPT + " ").input_ids + tokenizer(SOLUTIONS[0]).input_ids
    with tokenry.capture(llama, tokenizer) as capture:
        llama(torch.tensor([ids]), use_cache=False)
    trace = capture.trace.with_prompt(len(tokenizer(PROMPT + " ").input_ids))
    (told,) = scorer.score([trace]).values
    assert told == pytest.approx(scorer.score([Sample(PROMPT + " ", SOLUTIONS[0])]).values[0], abs=1e-6)


def test_what_it_refuses(llama, tokenizer, values, scorer):
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(InputError, match="the value model reads the vocabulary"):
        TVM(values=values).scorer(Loaded(llama, other))
    with pytest.raises(InputError, match="tvm needs the option 'values'"):
        TVM()
    with pytest.raises(InputError, match="1 prompts for 2 solutions"):
        scorer.token_values([PROMPT], ["a", "b"])
    with pytest.raises(InputError, match="the value model's context window 512"):
        scorer.token_values([PROMPT], ["sea " * 600])
    with pytest.raises(InputError, match="marker"):
        TVM(values=values, marker="(")


def test_the_command_line(llama, tokenizer, values, tmp_path):
    for model, name in ((llama, "model"), (values, "values")):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": PROMPT, "solutions": SOLUTIONS, "answer": 12}))
    args = ["judge", tmp_path / "rows.jsonl", "--method", "tvm", "-o", f"values={tmp_path / 'values'}"]
    result = CliRunner().invoke(
        main, [*map(str, args), "-o", "marker=answer", "--model", str(tmp_path / "model"), "--json"]
    )
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)
    wanted = [last_value(values, tokenizer, text) for text in SOLUTIONS[:3]]
    assert [one["score"] for one in told["solutions"][:3]] == pytest.approx(wanted, abs=1e-6)
