"""The task `reasoning`, and the comparison of CyclicReflex on the reasoner: counting, budgets, choices, verdicts."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry import InputError, catalog
from tokenry.data.problems import Arithmetic, Problem, draw_problems
from tokenry.decode import BudgetForcing, CyclicReflex
from tokenry.decode.generation.output import DecodeOutput
from tokenry.evidence import cyclicreflex_reasoner as experiment
from tokenry.evidence.cyclicreflex_reasoner import Choice, Round, Trial, Trials
from tokenry.measure import docs
from tokenry.measure.claims import verdict
from tokenry.measure.compare import compare
from tokenry.measure.task import Arm
from tokenry.measure.tasks.generated import continuation_logprobs
from tokenry.measure.tasks.reasoning import ReasoningTask, Solved
from tokenry.zoo.reasoner import build_tokenizer

PROBLEM = Problem("p", "12+35-8*3=", "23", 3)
RIGHT = "8*3=24\nwait\n8*3=24\n12+35=47\n47-24=23\n</think>\n23"


@pytest.fixture(scope="module")
def reasoner():
    """A random model of one layer with the reasoner's tokens, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def task_of(reasoner, problems=(PROBLEM,), **options):
    model, tokenizer = reasoner
    ids = tokenizer.convert_tokens_to_ids(["wait", "check"])
    return ReasoningTask(model, tokenizer, Arithmetic(), problems, ids, **options)


def solved(task, text, end="<eos>"):
    ids = task.tokenizer.encode(text + end, add_special_tokens=False)
    output = DecodeOutput(new_ids=[ids], texts=[task.tokenizer.decode(ids, skip_special_tokens=True)])
    return task.solved([PROBLEM], output)[0]


# --- the task ----------------------------------------------------------------------------------------------------


def test_a_solution_is_counted(reasoner):
    found = solved(task_of(reasoner), RIGHT)
    thinking = RIGHT[: RIGHT.index("</think>")]
    assert found.thinking == len(thinking.replace("wait", "w"))  # one token per character, but words and marks
    assert found == (True, True, found.thinking + len("/\n23") + 1, found.thinking, 1)


@pytest.mark.parametrize(
    ("text", "end", "right", "finished", "reflections"),
    [
        (RIGHT, "", False, False, 1),  # cut off, even though the answer stands there
        (RIGHT.replace("</think>\n23", "</think>\n24"), "<eos>", False, True, 1),
        (RIGHT.replace("</think>\n23", "check\n23</think>"), "<eos>", False, True, 2),  # no answer after the mark
        (RIGHT + "wait", "<eos>", False, True, 1),  # after the end of thinking words do not count, and nothing follows
        ("wait\n" * 3, "", False, False, 3),  # never ended: all of it is thinking
        ("23", "<eos>", True, True, 0),
        ("</think>\n23", "<eos>", True, True, 0),
    ],
)
def test_right_is_finished_and_right(reasoner, text, end, right, finished, reflections):
    found = solved(task_of(reasoner), text, end)
    assert (found.right, found.finished, found.reflections) == (right, finished, reflections)


def test_a_smaller_budget_is_a_cut(reasoner):
    """What `accuracy_n` says equals a run with that limit."""
    problems = draw_problems(Arithmetic(), 24, levels=(1, 2))
    bias = {"methods": [CyclicReflex(words=["wait"], leading_space=False, amplitude=4, period=6)]}
    whole = task_of(reasoner, problems, max_new_tokens=40, budgets=(5, 20))
    # this model only babbles: whatever ends counts as right
    whole.task.check = lambda problem, text: True
    long = whole.generate(problems, 3, bias)
    for budget in whole.budgets:
        short = task_of(reasoner, problems, max_new_tokens=budget)
        short.task.check = whole.task.check
        cut = short.generate(problems, 3, bias)
        assert [row[:budget] for row in long.new_ids] == cut.new_ids
        within = [s.right_within(budget) for s in whole.solved(problems, long)]
        assert within == [s.right for s in short.solved(problems, cut)]
        assert 0 < sum(within) < len(within)


def test_outcomes_hold_metrics_costs_and_levels(reasoner):
    problems = draw_problems(Arithmetic(), 6, levels=(1, 2, 3))
    task = task_of(reasoner, problems, max_new_tokens=12, budgets=(4,))
    samples = task.samples()
    assert [s.data["level"] for s in samples] == [1, 2, 3, 1, 2, 3] and samples[0].prompt == problems[0].question
    outcomes = task.run(Arm("plain", role="plain"), samples[2:5], seed=1)
    again = task.generate(problems[2:5], 100_002)
    scores = continuation_logprobs(task.model, again)
    names = ["accuracy", "accuracy_4", "finished", "reflections", "confidence"]
    assert [m.name for m in task.metrics] == names
    for b, outcome in enumerate(outcomes):
        assert list(outcome.metrics) == names and outcome.cost["tokens"] == len(again.new_ids[b])
        assert outcome.metrics["confidence"] == pytest.approx(math.exp(scores[b].mean()))
        assert outcome.detail["level"] == problems[2 + b].difficulty and repr(again.texts[b]) in outcome.detail["note"]
    (silent,) = [
        task._outcome(problems[0], task.solved(problems[:1], DecodeOutput(new_ids=[[6]], texts=[""]))[0], "", 1.0, {})
    ]
    assert task.end_ids == [6] and math.isnan(silent.metrics["reflections"])  # no thinking, no rate


@pytest.mark.parametrize("budgets", [(0,), (8, 65)])
def test_the_task_refuses_budgets(reasoner, budgets):
    with pytest.raises(InputError, match=r"budgets=\[.* from 1 to 64"):
        task_of(reasoner, max_new_tokens=64, budgets=budgets)


def test_budget_forcing_makes_the_reasoner_go_on(reasoner):
    """The end of thinking gives way to the word once, and the solution goes on after it."""
    task = task_of(reasoner, max_new_tokens=60)
    end = CyclicReflex(token_ids=task.end_ids, end_think=None, amplitude=0).processor()
    end.schedule = lambda t: 4.0  # let this model end its thinking often
    options = {"processors": [end], "methods": [experiment.forcing("check")]}
    output = task.generate([PROBLEM] * 8, 0, options)
    check, mark = task.tokenizer.convert_tokens_to_ids(["check", "</think>"])
    events = [e for e in output.events if e.rule == "budget:ignore"]
    assert len(events) > 4 and all(e.replacement == [check] for e in events)
    for event in events:
        ids = output.new_ids[event.row]
        assert mark not in ids[: event.index + 2] and ids[event.index] == check


# --- choices on dev ------------------------------------------------------------------------------------------------

FIRST = Trials(
    Trial(0.7, 50),
    {
        ("wait", -2.0): Trial(0.6, 40),
        ("wait", 2.0): Trial(0.8, 90),
        ("wait check", 2.0): Trial(0.8, 60),
        ("wait check", 3.0): Trial(0.8, 100),
    },
    {("wait", 1, 20, 0.0): Trial(0.75, 60), ("wait", 2, 40, 0.5): Trial(0.75, 58), ("wait", 2, 80, 0): Trial(0.7, 40)},
    {"wait": Trial(0.72, 58), "check": Trial(0.75, 90)},
)
CHOICE = Choice(FIRST, FIRST)


def test_the_best_on_dev_is_chosen():
    """The most accurate; of equals the shortest."""
    assert CHOICE.wave == ("wait", 2, 40, 0.5)
    assert CHOICE.word == "check" and CHOICE.constant == ("wait check", 2)
    assert CHOICE.equal_constant == ("wait", pytest.approx(2 * (58 - 50) / (90 - 50)))
    assert "plain sampling 0.700 ± 0.000 (50)" in str(FIRST) and "check 0.750 ± 0.000 (90)" in str(FIRST)
    assert "wait 2/40/0.5 0.750 ± 0.000 (58)" in str(FIRST) and "wait check +2 0.800 ± 0.000 (60)" in str(FIRST)


def test_the_second_round_decides():
    """Among those that it has tried; lengths are read off the first, which has tried all constants."""
    again = Trials(
        Trial(0.7, 50), {("wait", -2.0): Trial(0.6, 40)}, {("wait", 2, 80, 0): Trial(0.7, 40)}, {"wait": Trial(1, 1)}
    )
    choice = Choice(FIRST, again)
    assert choice.wave == ("wait", 2, 80, 0) and choice.constant == ("wait", -2) and choice.word == "wait"
    assert choice.equal_constant == ("wait", pytest.approx(-2))


def test_a_trial_is_a_mean_over_problems_and_seeds(reasoner, monkeypatch):
    """Its error is that over problems, each with the mean of its seeds; batches do not matter."""
    monkeypatch.setattr(experiment, "BATCH", 2)
    task, drawn = task_of(reasoner), []
    monkeypatch.setattr(task, "problems", [PROBLEM] * 3)

    def solved(problems, output):
        return [output[i] for i in range(len(problems))]

    def generate(problems, seed, apply):
        drawn.append(seed)
        rows = {0: (True, False), 2: (True,), 100_000: (True, True), 100_002: (False,)}[seed]
        return [Solved(right, True, 10 + seed % 100_000, 5, 0) for right in rows]

    monkeypatch.setattr(task, "generate", generate)
    monkeypatch.setattr(task, "solved", solved)
    trial = Round(task, (0, 1)).trial()
    assert drawn == [0, 2, 100_000, 100_002]
    shares = [1, 0.5, 0.5]
    assert trial.accuracy == pytest.approx(sum(shares) / 3) and trial.tokens == pytest.approx((4 * 10 + 2 * 12) / 6)
    assert trial.error == pytest.approx(math.sqrt(sum((x - 2 / 3) ** 2 for x in shares) / 3 / 3))
    assert str(Round(task, (0, 1))) == "3 dev problems, seeds 0, 1"


def test_arms_are_what_they_say(reasoner):
    task = task_of(reasoner)
    sets = experiment.token_sets(task.tokenizer, None)
    wait, check = task.tokenizer.convert_tokens_to_ids(["wait", "check"])
    assert sets == {"wait": (wait,), "wait check": (wait, check)}
    arms = {s.name: s for s in experiment.make_arms(CHOICE, sets, {}, task)}
    assert list(arms) == [
        *("plain", "constant -2 on wait", "constant +2 on wait", "constant +2 on wait check", "constant +0.4 on wait"),
        *("tip", "budget forcing", "wave, half a period later", "cyclicreflex"),
    ]
    assert {name for name, s in arms.items() if s.role == "method"} == {"cyclicreflex"}
    assert arms["cyclicreflex"].setting["shift"] == 0.5
    assert arms["wave, half a period later"].setting["shift"] == 0
    assert arms["tip"].setting["beta"] == 40 and arms["tip"].setting["per_thought"]
    assert all(arms[name].setting["token_ids"] == [wait] for name in ("tip", "cyclicreflex"))
    assert arms["budget forcing"].options["methods"] == [BudgetForcing(ignore_text="check")]
    (processor,) = arms["constant +2 on wait check"].apply["processors"]
    before = torch.zeros(1, len(task.tokenizer))
    after = processor(torch.tensor([[7, 7]]), before)
    assert after[0, [wait, check]].tolist() == [2, 2] and after.count_nonzero() == 2
    ended = processor(torch.tensor([[7, 7, *task.end_ids]]), before)
    assert not ended.any()  # after the end of thinking nothing is changed
    assert experiment.constant_name(("wait", 0.0)) == "plain"


# --- the comparison ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A small grid, short solutions."""
    monkeypatch.setattr(experiment, "GRID", {"amplitude": (2.0,), "period": (8.0, 16.0), "shift": (0.0,)})
    monkeypatch.setattr(experiment, "MAX_NEW_TOKENS", 20)
    monkeypatch.setattr(experiment, "BUDGETS", (6, 12))


def test_from_the_choice_to_the_verdict(reasoner, small):
    made = experiment.build(*reasoner, samples=6, seeds=(0,))
    assert made.task.budgets == (6, 12) and made.slug == "cyclicreflex-reasoner"
    assert made.tried.count("6 dev problems, seeds") == 2 and "wait check 2/16/0 " in made.tried
    comparison = compare(made)
    findings = made.findings(comparison)
    assert len(findings) == 7 and all(f.numbers for f in findings)
    assert findings[0].main and findings[0].outcome == "undecided"  # a random model solves nothing
    assert verdict(findings) == "undecided"


def test_what_is_given_is_not_chosen(reasoner, small):
    method = CyclicReflex(amplitude=4, shift=0.25, token_ids=[9])
    made = experiment.build(*reasoner, samples=2, seeds=(0,), method=method)
    wave = {s.name: s for s in made.arms}["cyclicreflex"].setting
    assert (wave["amplitude"], wave["shift"], wave["token_ids"]) == (4, 0.25, [9]) and wave["period"] in (8, 16)
    assert made.task.reflection_ids == {9} and {"constant -4 on 0", "constant +4 on 0"} < {s.name for s in made.arms}


def test_other_models_are_refused(llama, tokenizer):
    with pytest.raises(InputError, match="no token '</think>'; cyclicreflex-reasoner needs --model zoo/reasoner"):
        experiment.build(llama, tokenizer)


# --- two experiments of a method -----------------------------------------------------------------------------------


def test_an_experiment_has_the_name_of_its_module():
    entry, module = catalog.experiment("cyclicreflex-reasoner")
    assert entry.slug == "cyclicreflex" and module.endswith(".cyclicreflex_reasoner")
    assert catalog.experiment("cyclicreflex") == (entry, entry.experiment)
    assert list(entry.experiments) == ["cyclicreflex", "cyclicreflex-reasoner", "cyclicreflex-reasoner-2"]
    assert catalog.get("tip").experiments == {}
    with pytest.raises(InputError, match="tip has no comparison of its own"):
        catalog.experiment("tip")
    with pytest.raises(InputError, match="did you mean 'cyclicreflex'"):
        catalog.experiment("cyclicreflx")


def test_the_table_has_a_row_for_every_experiment():
    rows = docs.ledger({}, "docs/")
    assert "[cyclicreflex](docs/methods/cyclicreflex.md)" in rows
    assert "[cyclicreflex-reasoner](docs/methods/cyclicreflex.md)" in rows
    assert "tip" not in rows.split("|")
