"""The puzzles, the recipe of zoo/denoiser, the model that comes with the package, and the comparison on it."""

import hashlib
import json
import random
import re
from itertools import islice, permutations

import numpy as np
import pytest
from click.testing import CliRunner

from tokenry import load
from tokenry.cli import main
from tokenry.data.problems import draw_problems, split_of
from tokenry.data.puzzles import LISTING, PUZZLES, Addition, Listing, Sorting, Sudoku, grids, kind_of
from tokenry.decode import (
    ConfidenceFilter,
    CreditDecoding,
    CreditFusion,
    Daedal,
    DaedalLength,
    Learn2PD,
    LearnedFilter,
    MaskedDiffusionModel,
    collect_egp_traces,
    diffusion_generate,
    encode_prompts,
    generate,
)
from tokenry.evidence.creditdecoding import arms, build
from tokenry.measure.compare import Comparison, compare
from tokenry.measure.experiment import Experiment
from tokenry.measure.frontier import cost_at
from tokenry.measure.report import render
from tokenry.measure.task import Arm, Metric, Outcome, Sample
from tokenry.measure.tasks.denoising import PuzzleTask
from tokenry.train import train_filter
from tokenry.zoo import denoiser


@pytest.fixture(scope="module")
def tokenizer():
    return denoiser.build_tokenizer()


# --- puzzles -------------------------------------------------------------------------------------------------------


def test_there_are_288_grids():
    assert len(set(grids())) == 288
    for grid in grids():
        rows = [grid[i : i + 4] for i in range(0, 16, 4)]
        columns = [grid[i::4] for i in range(4)]
        boxes = [grid[i] + grid[i + 1] + grid[i + 4] + grid[i + 5] for i in (0, 2, 8, 10)]
        assert all(set(group) == set("1234") for group in rows + columns + boxes)


@pytest.mark.parametrize("level", Sudoku.levels)
def test_every_solution_of_a_sudoku_is_right_and_nothing_else(level):
    task = Sudoku()
    problem = task.draw(level, random.Random(level))
    shown = problem.question.removeprefix("sudoku ").removesuffix("=")
    assert shown.count(".") == level
    solutions = {g for g in grids() if all(a in (".", b) for a, b in zip(shown, g))}
    assert problem.answer in solutions
    assert {g for g in grids() if task.check(problem, g)} == solutions
    assert not task.check(problem, problem.answer + "1") and not task.check(problem, shown)


def test_sums_are_written_from_the_right_in_six_columns():
    for level in Addition.levels:
        problem = Addition().draw(level, random.Random(3))
        left, right = problem.question.removeprefix("add ").removesuffix("=").split("+")
        assert len(left) == len(right) == 6 and set(left[level:] + right[level:]) <= {"0"}
        assert int(problem.answer[::-1]) == int(left[::-1]) + int(right[::-1])


def test_digits_are_sorted():
    problem = Sorting().draw(7, random.Random(1))
    assert sorted(problem.question.removeprefix("sort ").removesuffix("=")) == list(problem.answer)


def test_lists_are_numbered():
    for level in Listing.levels:
        problem = Listing().draw(level, random.Random(level))
        text, times = problem.question.removeprefix("list ").removesuffix("=").split("*")
        lines = re.findall(r"(\d)(\D+)", problem.answer)
        assert len(set(text)) == 4 and int(times) == level and len(problem.answer) == 5 * level
        assert lines == [(str(number + 1), text) for number in range(level)]


def test_answers_are_checked():
    for task in (*PUZZLES, LISTING):
        for problem in draw_problems(task, 8, split="dev"):
            assert kind_of(problem) is task and split_of(problem.question) == "dev"
            assert task.check(problem, problem.answer) and not task.check(problem, problem.answer[:-1])


# --- the recipe ----------------------------------------------------------------------------------------------------


def test_every_text_has_tokens(tokenizer):
    for task in PUZZLES:
        for problem in draw_problems(task, 4):
            text = problem.question + problem.answer + "<eos>"
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
            inputs = encode_prompts(tokenizer, [problem.question])
            assert inputs["input_ids"][0].tolist() == tokenizer.encode(problem.question)


def test_the_lessons_of_the_model_of_the_package_are_what_they_were(tokenizer):
    found = hashlib.sha256(repr(list(islice(denoiser.examples(tokenizer, 0), 300))).encode()).hexdigest()
    assert found.startswith("ed7c7e627d3649ed")


def test_windows_vary_and_no_test_problem_is_learnt(tokenizer):
    eos, widths, narrow = tokenizer.eos_token_id, set(), 0
    for ids, prompt in islice(denoiser.examples(tokenizer, 0), 400):
        question, window = tokenizer.decode(ids[:prompt]), ids[prompt:]
        assert split_of(question) == "train" and len(window) <= denoiser.COURSE.widest
        answer = tokenizer.decode(window, skip_special_tokens=True)
        assert eos not in window or set(window[window.index(eos) :]) == {eos}
        widths.add(len(window))
        narrow += len(answer) < len(draw_answer(question))
    assert len(widths) > 20 and 10 < narrow < 60


def draw_answer(question):
    """The right answer of a question."""
    kind, rest = question.removesuffix("=").split(" ")
    return str(sum(int(n[::-1]) for n in rest.split("+"))) if kind == "add" else rest


def test_training_goes_down(tokenizer, monkeypatch):
    monkeypatch.setattr(denoiser, "STEPS", 30)
    monkeypatch.setattr(denoiser, "BATCH_TOKENS", 600)
    losses = []
    model, _ = denoiser.train(0, lambda done, steps, loss: losses.append(loss))
    assert len(losses) == 30 and losses[-1] < losses[0] and not model.training
    assert model.config.is_causal is False and model.config.mask_token_id == tokenizer.mask_token_id


def test_the_model_of_the_package_solves_its_puzzles():
    model, tokenizer = load("zoo/denoiser")
    for task in PUZZLES:
        problems = draw_problems(task, 40, seed=5)
        method = CreditDecoding(threshold=1.0, alpha=0)
        out = method.generate(model, tokenizer, [p.question for p in problems], max_new_tokens=20)
        assert sum(task.check(p, text) for p, text in zip(problems, out.texts)) >= 34


def test_the_command_line_says_how_it_was_denoised():
    command = ["decode", "--model", "zoo/denoiser", "--method", "creditdecoding", "--greedy", "--max-new-tokens", "24"]
    result = CliRunner().invoke(main, [*command, "sort 940271="])
    assert result.exit_code == 0 and result.stdout.strip() == "012479"
    assert re.search(r"\(6 tokens, in a window of 24, with \d+ forward pass(es)?\)", result.stderr)
    result = CliRunner().invoke(main, [*command, "--json", "sort 940271="])
    found = json.loads(result.stdout)
    assert found["text"] == "012479" and found["denoising"]["nfe"] == found["forward_calls"]
    assert len(found["denoising"]["step"]) == len(found["denoising"]["confidence"]) == 24
    assert max(found["denoising"]["step"]) == found["denoising"]["nfe"]


# --- the comparison ------------------------------------------------------------------------------------------------


def test_the_frontier_by_hand():
    points = [(2.0, 0.5), (4.0, 0.9), (3.0, 0.4), (6.0, 0.9), (8.0, 1.0)]  # the third and fourth are beaten
    found = cost_at(points, np.array([0.5, 0.7, 0.9, 0.95, 1.0]))
    assert found.tolist() == pytest.approx([2, 3, 4, 6, 8])
    assert np.isnan(cost_at(points, np.array([0.4, 1.01]))).all()


def made_up(points):
    """A comparison whose arms, in the sweeps a and b, have these (cost, quality) on every sample."""

    class Task:
        slug, stage, metrics = "made-up", "decode", (Metric("exact", "higher", "quality"),)

    samples = [Sample(f"s{i}", "") for i in range(6)]
    arms = [Arm(n, role="control", sweep=n[0], value=int(n[1])) for n in points]
    experiment = Experiment("x", "", Task(), arms, "a1", lambda c: [])
    outcomes = {
        (n, s.id, 0): Outcome({"exact": quality}, {"forward_passes": cost})
        for n, (cost, quality) in points.items()
        for s in samples
    }
    return Comparison(experiment, samples, outcomes)


def test_the_ratio_at_equal_quality():
    found = made_up({"a1": (2, 0.6), "a2": (4, 0.8), "b1": (1, 0.6), "b2": (2, 0.8)})
    ratio = found.frontier("forward_passes", "b", "a", at="exact").interval
    assert ratio[:3] == pytest.approx((0.5, 0.5, 0.5))
    along = made_up({"a1": (2, 0.6), "a2": (4, 0.8), "b1": (3, 0.7), "b2": (5, 0.9)})  # on one line
    ratio = along.frontier("forward_passes", "b", "a", at="exact").interval
    assert ratio.mean == pytest.approx(1)
    apart = made_up({"a1": (2, 0.1), "a2": (4, 0.2), "b1": (3, 0.7), "b2": (5, 0.9)})
    assert np.isnan(apart.frontier("forward_passes", "b", "a", at="exact").interval.mean)


def test_the_experiment_runs_and_is_drawn():
    model, tokenizer = load("zoo/denoiser")
    experiment = build(model, tokenizer, samples=6, seeds=(0, 1))
    comparison = compare(experiment)
    assert {s.role for s in experiment.arms} == {"plain", "control", "method"}
    assert (comparison.values("one token per step", "forward_passes") == 16).all()
    assert (comparison.values("credit 0.9", "tokens_processed") > 0).all()
    findings = experiment.findings(comparison)
    assert len(findings) == 8 and all(f.numbers for f in findings)
    (detail, *_) = comparison.details("credit 0.9")
    assert len(detail["denoising"]) == 16 and detail["note"].startswith("sudoku ")
    html = render(comparison, findings, "x", model="m", command="c", versions="v")
    assert '"denoising"' in html and "function denoising" in html


def test_neutral_arms_are_the_same_decoder():
    model, tokenizer = load("zoo/denoiser")
    task = PuzzleTask(model, tokenizer, (0,), 6)
    made = {s.name: s for s in arms(CreditDecoding(alpha=0))}
    runs = [task.run(made[f"{kind} 0.9"], task.samples(), 0) for kind in ("threshold", "credit")]
    for a, b in zip(*runs):
        assert a.metrics == b.metrics and a.detail == b.detail


def test_each_seed_has_its_own_problems():
    model, tokenizer = load("zoo/denoiser")
    task = PuzzleTask(model, tokenizer, (0, 1), 9)
    first, second = ({p.question for p in task.problems[seed]} for seed in (0, 1))
    assert len(first) == 9 and not first & second
    assert [s.prompt for s in task.samples()] == [p.question for p in task.problems[0]]


# --- several methods at once ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filter_folder(tmp_path_factory):
    """A filter for zoo/denoiser, trained in a moment on a few problems."""
    model, tokenizer = load("zoo/denoiser")
    prompts = [problem.question for task in PUZZLES for problem in draw_problems(task, 40, split="train")]
    traces = collect_egp_traces(model, tokenizer, prompts, gen_length=24, block_length=8, batch_size=60)
    made, _ = train_filter(traces, epochs=300)
    folder = tmp_path_factory.mktemp("filter")
    made.bind(model).save(folder)
    return str(folder)


def test_credit_a_learnt_filter_and_daedal_in_one_call(filter_folder):
    model, tokenizer = load("zoo/denoiser")
    problems = [problem for task in PUZZLES for problem in draw_problems(task, 10, seed=7)]
    prompts = [problem.question for problem in problems]
    methods = [
        CreditDecoding(beta=0.5),
        Learn2PD(filter=filter_folder, accept_threshold=0.9, eotp=False),
        Daedal(initial_gen_length=8, max_gen_length=32, expansion_factor=4, eos_check_tokens=4),
    ]
    out = generate(model, tokenizer, prompts, methods=methods, max_new_tokens=32)
    parts = {
        "unmask": LearnedFilter(ConfidenceFilter.load(filter_folder), 0.9),
        "transforms": [CreditFusion(beta=0.5)],
        "length": DaedalLength(32, expansion_factor=4, eos_check_tokens=4),
    }
    inputs = encode_prompts(tokenizer, prompts)
    direct = diffusion_generate(
        MaskedDiffusionModel(model, tokenizer), **inputs, gen_length=8, block_length=8, tokenizer=tokenizer, **parts
    )
    assert out.texts == direct.texts and out.stats.commit_step == direct.stats.commit_step
    assert sum(kind_of(p).check(p, text) for p, text in zip(problems, out.texts)) >= 24
    widths = {len(window) for window in out.windows}
    assert len(widths) > 2 and max(widths) <= 32 and min(widths) < 16
    assert sum(out.stats.nfe) < sum(map(len, out.windows))
    for order in permutations(methods):
        assert generate(model, tokenizer, prompts[:4], methods=order, max_new_tokens=32).texts == out.texts[:4]


def test_three_methods_on_the_command_line(filter_folder):
    command = ["decode", "--model", "zoo/denoiser", "--greedy", "--max-new-tokens", "32", "--json"]
    command += ["--method", "creditdecoding", "--method", "learn2pd", "--method", "daedal"]
    own = {"learn2pd.filter": filter_folder, "learn2pd.eotp": "false", "daedal.initial_gen_length": 8}
    own |= {"daedal.expansion_factor": 4, "daedal.eos_check_tokens": 4}
    result = CliRunner().invoke(main, [*command, *(f"-o{n}={v}" for n, v in own.items()), "sort 9402="])
    found = json.loads(result.stdout)
    assert found["text"] == "0249" and len(found["denoising"]["step"]) < 32
