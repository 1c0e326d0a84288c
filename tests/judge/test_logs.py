"""Logs that lm-eval 0.4.13 and inspect_ai 0.3.285 have written, of models that answer from a list, as results.

Three questions (four in lm-eval's), two levels; high.eval has two epochs, two-scorers.eval and lm-eval's two scores.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.judge import Arise, Results, read_log

LOGS = Path(__file__).parent / "logs"
SAMPLES = {level: LOGS / f"samples_sums_{level}.jsonl" for level in ("low", "high")}
FILTERED = "exact_match,last-number"


def judged(*args):
    return CliRunner().invoke(main, ["judge", "--method", "arise", *map(str, args)])


def told(rows):
    return [(row.accuracy, row.tokens) for row in rows]


# --- inspect_ai ----------------------------------------------------------------------------------------------------


def test_an_archive_and_a_json_log_say_the_same():
    rows = read_log(LOGS / "low.eval", "low")
    assert rows == read_log(LOGS / "low.json", "low")
    assert told(rows) == [(1, 3), (0, 3), (0, 3)] and rows[0].question == "1 What is 1 + 2?"


def test_epochs_are_runs_and_levels_become_a_table():
    rows = read_log(LOGS / "high.eval", "high")
    assert sorted(told(rows)) == [(0, 9)] + [(1, 9)] * 5
    found = Results.from_rows(read_log(LOGS / "low.eval", "low") + rows)
    assert found.levels == ["low", "high"] and found.tokens.tolist() == [[3, 9]] * 3
    assert found.accuracies.tolist() == [[1, 1], [0, 1], [0, 0.5]]


def test_of_several_scores_one_is_chosen():
    with pytest.raises(InputError, match="the scores 'match', 'includes'; choose one"):
        read_log(LOGS / "two-scorers.eval", 1)
    assert len(read_log(LOGS / "two-scorers.eval", 1, "includes")) == 3
    with pytest.raises(InputError, match="has no score 'f1'; it has"):
        read_log(LOGS / "two-scorers.eval", 1, "f1")


@pytest.fixture
def changed(tmp_path):
    """A log with something else in it."""

    def make(change):
        log = json.loads((LOGS / "low.json").read_text())
        change(log, log["samples"][1])
        path = tmp_path / "log.json"
        path.write_text(json.dumps(log, indent=2))
        return path

    return make


@pytest.mark.parametrize(
    ("value", "expected"),
    [("P", 0.5), ("N", 0), ("I", 0), ("yes", 1), (0.25, 0.25), (True, 1)],
)
def test_grades_are_numbers(changed, value, expected):
    path = changed(lambda log, sample: sample["scores"]["match"].update(value=value))
    assert read_log(path, 1)[1].accuracy == expected


def test_a_scorer_of_several_values_has_several_scores(changed):
    def several(log, _):
        for sample in log["samples"]:
            sample["scores"]["match"]["value"] = {"exact": "C", "near": 0.5, "why": "so"}

    assert [row.accuracy for row in read_log(changed(several), 1, "match/near")] == [0.5] * 3
    with pytest.raises(InputError, match="'match/exact', 'match/near'; choose"):
        read_log(changed(several), 1)


def test_a_question_of_messages_is_its_last_text(changed):
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "1 + 1?"}]
    assert read_log(changed(lambda _, sample: sample.update(input=messages)), 1)[1].question == "2 1 + 1?"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda log, _: log.update(status="started"), "has the status 'started'"),
        (lambda log, _: log.pop("status"), "field 'status' is missing"),
        (lambda log, _: log.pop("samples"), "holds no samples"),
        (lambda log, _: log["samples"].clear(), "holds no samples"),
        (lambda log, _: log["samples"].append(5), "sample 4 of the log"),
        (lambda _, sample: sample.update(scores=None), r"'2 What is 2 . 3\?' .* has no score 'match'"),
        (lambda _, sample: sample["scores"]["match"].update(value="why"), "has no score 'match'"),
        (lambda _, sample: sample["scores"]["match"].update(value=7), "field 'accuracy' is 7"),
        (lambda _, sample: sample.update(model_usage={}), "says no tokens of the model 'mockllm/model'"),
        (lambda _, sample: sample["model_usage"].update({"mockllm/model": {"output_tokens": -1}}), "output_tokens"),
        (lambda _, sample: sample.pop("id"), "field 'id' is missing"),
    ],
)
def test_broken_logs_are_refused_by_name(changed, change, said):
    with pytest.raises(InputError, match=said):
        read_log(changed(change), 1)


def test_other_questions_are_refused(changed):
    other = read_log(changed(lambda _, sample: sample.update(input="What is 9 + 9?")), "high")
    with pytest.raises(InputError, match=r"'2 What is 2 . 3\?' has no row at the level 'high'"):
        Results.from_rows(read_log(LOGS / "low.eval", "low") + other)


def test_broken_archives_are_refused(tmp_path):
    path = tmp_path / "a.eval"
    whole = (LOGS / "low.eval").read_bytes()
    for data in (whole[:500], whole[:300] + bytes(300) + whole[600:]):
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be read"):
            read_log(path, 1)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("_journal/start.json", "{}")
    with pytest.raises(InputError, match="has no header"):
        read_log(path, 1)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads this compression itself")
def test_without_the_package_a_compressed_log_says_what_to_do():
    code = (
        "import sys; sys.modules['zipfile_zstd'] = None\n"
        "from tokenry.judge import read_log\n"
        f"try: read_log({str(LOGS / 'low.eval')!r}, 1)\n"
        "except Exception as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "run `pip install tokenry[logs]`, or convert it" in said


# --- lm-eval -------------------------------------------------------------------------------------------------------


def test_samples_of_the_harness_are_counted_by_a_tokenizer(tokenizer):
    rows = read_log(SAMPLES["low"], 3, FILTERED, tokenizer)
    lines = [json.loads(line) for line in SAMPLES["low"].read_text().splitlines()]
    own = [line for line in lines if line["filter"] == "last-number"]
    assert [row.accuracy for row in rows] == [line["exact_match"] for line in own] and len(rows) == 4
    counts = [len(tokenizer.encode(line["resps"][0][0], add_special_tokens=False)) for line in own]
    assert [row.tokens for row in rows] == counts
    assert {row.accuracy for row in read_log(SAMPLES["low"], 3, "exact_match,whole", tokenizer)} == {0}


def test_the_harness_needs_a_tokenizer_and_a_choice(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r'says no tokens; give the tokenizer of its model \("[a-z0-9]+"\)$'):
        read_log(SAMPLES["low"], 1)  # as the results beside it say
    with pytest.raises(InputError, match="'exact_match,last-number', 'exact_match,whole'; choose one"):
        read_log(SAMPLES["low"], 1, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"says no tokens; give the tokenizer of its model$"):
        read_log(shutil.copy(SAMPLES["low"], tmp_path), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.update(resps=[["a", "b"]]), "question 0 of .* has 2 responses to a score"),
        (lambda row: row.update(resps=[[[-1.5, False]]]), "field 'resps.0.0' is a list"),
        (lambda row: row.pop("filter"), "field 'filter' is missing"),
        (lambda row: row.update(exact_match="so"), "has no score 'exact_match,last-number'"),
        (lambda row: row.update(exact_match=-1), "field 'accuracy' is -1"),
    ],
)
def test_broken_samples_are_refused_by_name(tokenizer, tmp_path, change, said):
    rows = [json.loads(line) for line in SAMPLES["low"].read_text().splitlines()]
    change(rows[0])
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=said):
        read_log(path, 1, FILTERED, tokenizer)


def test_an_answer_without_tokens_has_written_its_end(tokenizer, tmp_path):
    row = json.loads(SAMPLES["low"].read_text().splitlines()[0])
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({**row, "resps": [[""]]}))
    assert read_log(path, 1, tokenizer=tokenizer)[0].tokens == 1


@pytest.mark.parametrize("name", ["results_low.json", "no-such.eval"])
def test_what_is_no_log_is_refused(name):
    with pytest.raises(InputError, match=r"give a log of inspect_ai .* or the samples_\*.jsonl of lm-eval"):
        read_log(LOGS / name, 1)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_verb_takes_logs_with_their_levels(tokenizer, tmp_path):
    done = judged(f"low={LOGS / 'low.eval'}", f"high={LOGS / 'high.eval'}", "--json")
    assert done.exit_code == 0, done.stderr
    report = Arise().judge(Results.from_rows([r for v in ("low", "high") for r in read_log(LOGS / f"{v}.eval", v)]))
    assert json.loads(done.stdout) == json.loads(json.dumps(report.to_json()))
    tokenizer.save_pretrained(tmp_path)
    logs = [f"{number}={SAMPLES[level]}" for number, level in ((0.5, "low"), (8, "high"))]
    done = judged(*logs, "--tokenizer", tmp_path, "--score", FILTERED, "--json")
    assert done.exit_code == 0, done.stderr
    assert [row["level"] for row in json.loads(done.stdout)["levels"]] == [0.5, 8]


def test_a_path_with_an_equals_sign_that_is_there_is_a_path(tmp_path):
    path = tmp_path / "a=b.jsonl"
    path.write_text("[]")
    assert "is not an object" in judged(path).stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["=x"], "'=x' is not LEVEL=PATH"),
        (["low="], "'low=' is not LEVEL=PATH"),
        ([f"low={LOGS / 'low.eval'}"], "there are 1 levels"),
        ([f"low={LOGS / 'low.eval'}", f"2={LOGS / 'high.eval'}"], "some levels are numbers"),
        ([f"nan={LOGS / 'low.eval'}", f"2={LOGS / 'high.eval'}"], "level"),
        ([LOGS / "low.json"], "a log as LEVEL=PATH"),
        (["--score", "x", LOGS / "low.json"], "--score would have no effect without a log"),
        (["--trust-remote-code", LOGS / "low.json"], "--trust-remote-code would have no effect without --tokenizer"),
    ],
)
def test_the_verb_refuses_what_is_no_log_with_a_level(args, said):
    done = judged(*args)
    assert done.exit_code == 2 and said in done.stderr
