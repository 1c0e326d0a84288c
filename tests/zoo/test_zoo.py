"""The zoo: problems, the texts models learn from, recipes, and the models that come with the package."""

import json
import random
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenry
from tokenry.core.errors import InputError
from tokenry.data.problems import Arithmetic, Problem, by_difficulty, draw_problems, split_of
from tokenry.zoo import building, reasoner, recipes
from tokenry.zoo.training import batches_by_length, fit

TASK = Arithmetic()


# --- problems ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", TASK.levels)
def test_answers_are_those_of_ordinary_arithmetic(level):
    shape, rng = TASK.shapes[level], random.Random(level)
    for _ in range(50):
        problem = TASK.draw(level, rng)
        assert int(problem.answer) == eval(problem.question[:-1])  # digits and signs only, see the pattern below
        assert re.fullmatch(r"[-+*\d]+=", problem.question)
        assert problem.question.count("*") == shape.products
        assert len(re.findall(r"[-+]", problem.question)) == shape.terms - 1
        assert min(TASK.totals(problem.question)) >= 0


def test_operations_come_in_order():
    """Products from left to right, then the sum from left to right."""
    steps = []

    def solve(left, sign, right):
        steps.append(f"{left}{sign}{right}")
        return eval(steps[-1])

    assert TASK.evaluate("12+35-8*3+2*2=", solve) == 27
    assert steps == ["8*3", "2*2", "12+35", "47-24", "23+4"]


@pytest.mark.parametrize("question", ["", "1+2", "1++2=", "a+1=", "1+2*3*4=", "-1+2=", "1/2="])
def test_other_questions_are_refused(question):
    with pytest.raises(InputError, match="write for example"):
        TASK.evaluate(question, lambda a, s, b: 0)


def test_splits_share_no_problem_whatever_the_seed():
    drawn = {s: {p.question for seed in (0, 1) for p in draw_problems(TASK, 160, seed, s)} for s in ("dev", "test")}
    assert not drawn["dev"] & drawn["test"]
    for split, questions in drawn.items():
        assert {split_of(q) for q in questions} == {split}
    hashed = [split_of(str(i)) for i in range(2000)]
    assert 0.75 < hashed.count("train") / 2000 < 0.85


def test_a_longer_list_begins_with_the_shorter_one_and_levels_take_turns():
    short, long = draw_problems(TASK, 10), draw_problems(TASK, 30)
    assert long[:10] == short
    assert [p.difficulty for p in long[:9]] == [1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert len({p.question for p in long}) == 30
    assert by_difficulty(long)[1] == [0, 8, 16, 24]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"count": 5, "split": "all"}, "no split 'all'"),
        ({"count": 5, "levels": (9,)}, "no level"),
        ({"count": 100_000, "levels": (1,)}, "no more problems"),
    ],
)
def test_impossible_draws_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        draw_problems(TASK, **options)


def test_only_the_answer_counts():
    problem = Problem("p", "12+35=", "47", 1)
    for text, right in [
        ("12+35=47\n</think>\n47", True),
        ("</think>\n 47\n", True),
        ("</think>\n047", True),
        ("</think>\n48", False),
        ("</think>\n47 48", False),
        ("</think>\n", False),
        ("12+35=47", False),
        ("</think>\n4\n</think>\n47", True),
    ]:
        assert TASK.check(problem, text) is right


# --- the texts of the reasoner -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def characters():
    return reasoner.build_tokenizer()


def test_every_text_decodes_to_itself(characters):
    rng = random.Random(0)
    for _ in range(50):
        text = f"<think>\n{reasoner.solution(TASK.draw(rng.choice(TASK.levels), rng), rng)}"
        assert characters.decode(characters.encode(text, add_special_tokens=False)) == text
    for word in (*reasoner.WORDS, *reasoner.MARKS):
        assert len(characters.encode(word, add_special_tokens=False)) == 1


def test_the_template_is_what_it_learns(characters):
    turn = [{"role": "user", "content": "1+2="}]
    assert characters.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == (
        "<user>1+2=<assistant><think>\n"
    )
    question, begin = reasoner.JUDGE
    judged = [
        *turn,
        {"role": "assistant", "content": "<think>\n1+2=3\n"},
        {"role": "user", "content": question},
        {"role": "assistant", "content": begin},
    ]
    text = characters.apply_chat_template(judged, tokenize=False, continue_final_message=True)
    assert text == reasoner.judging_prompt("1+2=", "1+2=3")


def test_solutions_carry_their_errors_and_doubt_mostly_wrong_steps():
    """Every line follows from the lines before; the answer is the last total, right or not."""
    rng, wrong, doubted, steps, noticed = random.Random(1), 0, 0, 0, 0
    for _ in range(1500):
        problem = TASK.draw(rng.choice(reasoner.LEVELS), rng)
        *lines, end, answer = reasoner.solution(problem, rng).split("\n")
        assert end == "</think>"
        values = []
        for line, after in zip(lines, [*lines[1:], ""]):
            if line in ("wait", "check"):
                continue
            left, sign, right, value = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", line).groups()
            right_one = int(value) == eval(f"{left}{sign}{right}")
            steps, wrong = steps + 1, wrong + (not right_one)
            doubted += right_one and after == "wait"
            noticed += (not right_one) and after == "wait"
            if after != "wait":
                values.append(int(value))
        assert values[-1] == int(answer)
    assert 0.03 < wrong / steps < 0.07
    assert 0.7 < noticed / wrong < 0.9
    assert 0.04 < doubted / (steps - wrong) < 0.08


def test_direct_solutions_are_the_running_totals():
    problem = Problem("p", "12+35-8*3=", "23", 3)
    assert reasoner.solution(problem, random.Random(0), direct=True) == "24\n47\n23\n</think>\n23"


def test_half_of_the_judged_steps_are_wrong_and_scores_tell():
    rng, scores = random.Random(2), []
    for _ in range(1500):
        problem = TASK.draw(rng.choice(reasoner.LEVELS), rng)
        text, score, meant = reasoner.judgment(problem, rng)
        last = text.split("\n")[-1]
        assert score == 0 or last == meant
        step = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", last)
        scores.append(score)
        if step and int(step[4]) != max(eval(f"{step[1]}{step[2]}{step[3]}"), 0):
            assert score == 0  # a wrong value is never praised
        if last in ("wait", "check"):
            assert score == 9
    assert 0.3 < scores.count(0) / len(scores) < 0.6
    assert set(scores) == {0, 9}


def test_only_train_problems_are_learnt_from(characters):
    examples = reasoner.examples(characters, seed=5)
    for _ in range(200):
        ids, prompt = next(examples)
        question = re.match(r"<user>([-+*\d]+=)", characters.decode(ids))[1]
        assert split_of(question) == "train"
        assert 0 < prompt < len(ids) and ids[-1] == characters.eos_token_id


# --- training and building -----------------------------------------------------------------------------------------


def test_batches_hide_prompts_and_padding():
    examples = iter([([5, 6, 7, 8], 2), ([9, 10, 11], 1), ([12, 13], 0)])
    (batch,) = batches_by_length(examples, tokens=100, pad_id=0)
    assert batch["input_ids"].tolist() == [[12, 13, 0, 0], [9, 10, 11, 0], [5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[12, 13, -100, -100], [-100, 10, 11, -100], [-100, -100, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_training_repeats_itself_from_the_seed(monkeypatch):
    monkeypatch.setattr(reasoner, "PHASES", ((3, 1e-3),))
    monkeypatch.setattr(reasoner, "BATCH_TOKENS", 300)
    seen = []
    first, _ = reasoner.train(3, progress=lambda done, total, loss: seen.append((done, total)))
    again, _ = reasoner.train(3)
    assert seen == [(1, 3), (2, 3), (3, 3)] and not first.training
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_fit_learns():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    losses = []
    batches = iter([{"input_ids": torch.tensor([[1, 2, 3, 4]] * 4), "labels": torch.tensor([[1, 2, 3, 4]] * 4)}] * 60)
    fit(model, batches, 60, learning_rate=1e-2, warmup=5, progress=lambda i, n, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]


def test_a_model_that_does_not_reach_its_numbers_is_kept_aside(monkeypatch, tmp_path):
    """Minutes of training are not thrown away, but nobody takes it for the model."""
    monkeypatch.setattr(reasoner, "PHASES", ((1, 1e-3),))
    monkeypatch.setattr(reasoner, "BATCH_TOKENS", 300)
    found = {"accuracy": 0.01, "easiest": 0.9, "hardest": 0.9, "direct": 0.1}
    monkeypatch.setattr(reasoner, "measure", lambda model, tokenizer: found)
    with pytest.raises(InputError, match=r"accuracy 0.010, and must reach .*; direct 0.100, .* in '.*model.rejected'"):
        building.build("reasoner", tmp_path / "model")
    assert [place.name for place in tmp_path.iterdir()] == ["model.rejected"]
    model, _ = tokenry.load(tmp_path / "model.rejected")
    record = json.loads((tmp_path / "model.rejected" / "recipe.json").read_text())
    assert record["parameters"] == model.num_parameters() and record["measures"] == found


def test_a_built_model_loads_and_says_what_it_reached(monkeypatch, tmp_path):
    """Training for a step, measured for real; only the ranges are opened."""
    monkeypatch.setattr(reasoner, "PHASES", ((1, 1e-3),))
    monkeypatch.setattr(reasoner, "BATCH_TOKENS", 300)
    monkeypatch.setattr(reasoner, "measure", lambda model, tokenizer: {"parameters": model.num_parameters()})
    wide = recipes.Recipe("reasoner", "", "", 1.75, 1, {"parameters": (1e6, 6e6)})
    monkeypatch.setattr(recipes, "RECIPES", (wide,))
    folder = building.build("reasoner", tmp_path / "model", seed=4)
    model, tokenizer = tokenry.load(folder)
    record = json.loads((folder / "recipe.json").read_text())
    assert record["seed"] == 4 and record["measures"]["parameters"] == model.num_parameters() == record["parameters"]
    assert model.dtype == torch.float32 and tokenizer.chat_template == reasoner.TEMPLATE
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert stored < 2.1 * model.num_parameters()


def test_unknown_models_are_refused():
    with pytest.raises(InputError, match="did you mean 'reasoner'"):
        recipes.find_recipe("resoner")
    with pytest.raises(InputError, match="tokenry zoo list"):
        tokenry.load("zoo/nothing")


# --- the models that come with the package -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_shipped_models_load_and_their_records_lie_in_range(recipe):
    record = recipes.record_of(recipe.name)
    assert not building.missed(recipe, record["measures"])
    model, tokenizer = tokenry.load(f"zoo/{recipe.name}")
    assert model.num_parameters() == record["parameters"] == pytest.approx(recipe.size * 1e6, rel=0.02)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.padding_side == "left" and model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_shipped_models_measure_what_their_records_say(recipe):
    measured = recipe.load().measure(*tokenry.load(f"zoo/{recipe.name}"))
    for name, value in recipes.record_of(recipe.name)["measures"].items():
        assert measured[name] == pytest.approx(value, abs=0.02), name


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_models_can_be_built_again_from_their_seed(recipe, tmp_path):
    building.build(recipe.name, tmp_path / recipe.name)
