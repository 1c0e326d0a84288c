"""A sweep of bad input through the command line: exit code 2 with one sentence, or right; never a traceback, and never
a value that is taken and not looked at. Broken files and output paths have tests of their own."""

import json
import os
import subprocess
import sys
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from tokenry import catalog, load
from tokenry.cli import main
from tokenry.cli.options import Number
from tokenry.core.errors import InputError
from tokenry.core.fields import fits

NUMBERS = ["", "x", "nan", "inf", "-inf", "1e308", "1e30", "1e-320", "-1", str(10**13), str(10**30), "9" * 5000, "1[/]"]
BAD = {  # of options and arguments that are no numbers
    "model": ["", "zzz", "m[/]x", "~nobody/x", "a" * 5000, "/dev/null", "zoo/../x", "zoo/", "a b/c"],
    "dtype": ["", "float8", "float8_e4m3fn", "int8", "complex64", "nn", "float32[/]"],
    "device": ["", "zzz", "cuda", "cuda:99", "meta", "cpu:7", "cpu[/]", "9" * 40],
    "stage": ["", "x", "m[/]x"],
    "level": ["", "x", "type"],  # without --lexicon
    "lexicon": ["", "x", "m[/]x", "words.json", "a" * 5000],
    "method": ["", "x", "m[/]x", "kl3m", "antislop", "ftpo", "a" * 5000],
    "o": ["", "x", "=", "=1", "m[/]x=1", "a" * 5000, "zzz=" + "9" * 5000],
    "seeds": ["", ",", "x", "1,,2", "-1", "1e3", "0,0", str(2**40), "9" * 5000, "nan"],
    "tokenizer": ["", "zzz", "m[/]x", "a" * 5000],
    "score": ["", "x"],  # without a log
    "slug": ["", "x", "m[/]x"],
    "name": ["", "x", "m[/]x", "tip"],
    "question": ["", " "],
    "prompt": ["", " "],
    "tokenizers": ["", "zzz", "m[/]x"],
    "ray": ["127.0.0.1:1"],
    "engine": ["", "x", "m[/]x"],
    "server": ["", "zzz", "m[/]x", "ftp://x"],
    "server-model": ["", "x"],  # without --server
    "server-key": ["x"],
    "api-key": ["", " ", "caf\u00e9"],
    "host": ["", "x", "999.1.1.1", "0.0.0.0"],
}
STAGE = {"serve": "decode"}  # of whose methods a verb takes, where it is called otherwise
FILES = {  # what is read and written: tests of readers and writers
    "prompts", "save-pairs", "save-traces", "data", "output", "context", "files", "file", "text", "html", "report",
    "picture", "store", "trace", "control", "artifact", "save", "pairs", "texts", "save-texts",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a small model, and the files that the verbs read."""
    from support.families import build

    folder = tmp_path_factory.mktemp("hostile")
    build("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("the old lighthouse stood on the cliff\n" * 20)
    solution = {"prompt": "What is 1 + 1?", "solution": r"It is \boxed{2}.", "answer": "2"}
    (folder / "solutions.jsonl").write_text(json.dumps(solution) + "\n")
    return folder


def commands(group=main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield (*path, name), command
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def right(path, place):
    """Arguments with which a command would run, in the order option, argument."""
    text, model, out = str(place / "text.txt"), ["--model", str(place / "model")], str(place / "out")
    return {
        "list": [],
        "find": ["shorter cache"],
        "show": ["antislop"],
        "tokenize train": ["--method", "kl3m", "--output", out, text],
        "tokenize encode": ["--tokenizer", str(place / "model"), "the sea"],
        "tokenize report": ["--text", text, str(place / "model")],
        "select": ["--method", "compresskv", "--context", text, *model, "--max-new-tokens", "2", "who?"],
        "represent": ["--output", out + ".npy", *model, text],
        "decode": [*model, "--max-new-tokens", "2", "the sea"],
        "read": ["--method", "lm-head-neurons", "-o", "find=the", *model],
        "fit": ["--save", out, *model, "lm-head-neurons"],
        "judge": ["--method", "crew", *model, str(place / "solutions.jsonl")],
        "profile": [*model, "--prompts", text, "--draws", "1", "--max-new-tokens", "2"],
        "serve": [*model, "--port", "0"],
        "train": ["--method", "ftpo", "--data", text, "--output", out, *model],
        "compare": ["antislop", "--store", out + ".sqlite", *model],
        "zoo list": [],
        "zoo show": ["reasoner"],
        "zoo build": ["reasoner", "--output", out],
    }[" ".join(path)]


def named(parameter):
    return parameter.name if isinstance(parameter, click.Argument) else parameter.opts[0].lstrip("-")


def parameters():
    """(path of the command, parameter) of all that is no flag and no file."""
    for path, command in commands():
        for parameter in command.params:
            flag = isinstance(parameter, click.Option) and parameter.is_flag
            if not flag and named(parameter) not in FILES:
                yield path, parameter


def beyond(value, declared):
    try:
        return not fits(get_args(declared)[0](value), declared)
    except ValueError:
        return True


def is_its_own(path, parameter, value):
    """A method of the verb's own stage."""
    return named(parameter) == "method" and any(
        (e.slug, e.stage) == (value, STAGE.get(path[0], path[0])) for e in catalog.METHODS
    )


def cases():
    for path, parameter in parameters():
        bounded = isinstance(parameter.type, Number)
        values = (
            [v for v in NUMBERS if beyond(v, parameter.type.declared)] if bounded else BAD.get(named(parameter), ())
        )
        for value in values:
            if not is_its_own(path, parameter, value):
                yield pytest.param(path, parameter, value, id=f"{' '.join(path)} {named(parameter)} {value[:12]}")


def run(*args):
    return CliRunner().invoke(main, list(args), catch_exceptions=True)


def is_refusal(result):
    """One sentence and exit code 2; click's own errors say the usage before."""
    lines = result.stderr.strip().splitlines()
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code == 2 and sum(line.startswith("Error: ") for line in lines) == 1 and len(lines[-1]) < 1000


def test_the_sweep_covers_every_parameter():
    """A new option is in BAD, in FILES, or a number with bounds."""
    for path, parameter in parameters():
        known = isinstance(parameter.type, Number) or named(parameter) in BAD
        assert known, (path, parameter.name)


@pytest.mark.parametrize(("path", "parameter", "value"), [*cases()])
def test_a_bad_value_is_refused(path, parameter, value, place):
    if path == ("find",):  # a question in any words
        value = ""
    args = right(path, place)
    if isinstance(parameter, click.Argument):
        args = [*args[:-1], value] if path[0] not in ("compare", "zoo") else [value, *args[1:]]
    else:
        option = parameter.opts[-1] if parameter.opts[-1].startswith("-") else parameter.opts[0]
        given = args.index(option) if option in args else None
        args = args if given is None else args[:given] + args[given + 2 :]
        args = [option, value, *args]
    result = run(*path, *args)
    assert is_refusal(result), result.output[-600:]
    if isinstance(parameter.type, Number):
        assert parameter.opts[0] in result.stderr and "give a" in result.stderr


def method_cases():
    """Each option of each method that is no number (see test_limits), with values that are no choice of it."""
    for entry in catalog.METHODS:
        for name, schema in entry.load().model_json_schema()["properties"].items():
            kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
            closed = "enum" in schema or kinds <= {"boolean", "null"}
            for value in ["", "m[/]x", "9" * 5000, "nan", "-1", "\ud800", "[1", "{}", "none,none"]:
                if kinds & {"boolean"} and value in ("",):
                    continue
                yield pytest.param(
                    entry, name, value, closed, id=f"{entry.stage} {entry.slug} {name} {ascii(value)[:12]}"
                )


@pytest.mark.parametrize(("entry", "name", "value", "closed"), [*method_cases()])
def test_an_option_of_a_method_is_right_or_refused(entry, name, value, closed):
    """What is no choice, no yes or no, no number; a text may be anything that its method can use."""
    try:
        entry.load().from_strings([f"{name}={value}"])
    except InputError as error:
        assert str(error).encode()
    else:
        assert not closed


@pytest.mark.parametrize(
    "args, words",
    [
        (["decode", "--greedy", "--temperature", "2", "x"], "--temperature would have no effect with --greedy"),
        (["decode", "--greedy", "--top-p", ".5", "--top-k", "3", "x"], "--top-p, --top-k would have no effect"),
        (["decode", "--batch-size", "2", "x"], "without --prompts"),
        (["read", "--method", "lm-head-neurons", "-o", "min_prob=.5", "-o", "find=y"], "without a text or a trace"),
        (["read", "--method", "lm-head-neurons", "--artifact", "x", "-o", "top_k=3", "y"], "with --artifact"),
        (["fit", "lm-head-neurons", "-o", "min_prob=.5", "--save", "x"], "on what is learned"),
        (
            ["fit", "difficulty-probe", "--data", "arithmetic:4", "-o", "marker=answer", "--save", "x"],
            "with arithmetic",
        ),
        (["judge", "--method", "crew", "--top-k", "3", "SOLUTIONS"], "without --pairs"),
        (["judge", "--method", "crew", "--trace", "--raw", "SOLUTIONS"], "with --trace"),
    ],
)
def test_an_option_that_would_not_be_looked_at_is_refused(args, words, place):
    result = run(*(str(place / "solutions.jsonl") if arg == "SOLUTIONS" else arg for arg in args))
    assert is_refusal(result) and words in result.stderr, result.output


@pytest.mark.parametrize("path", [" ".join(path) for path, c in commands() if not isinstance(c, click.Group)])
def test_an_argument_that_is_no_utf8_is_refused(path):
    result = run(*path.split(), "caf\udce9.txt")
    assert is_refusal(result) and "not UTF-8" in result.stderr


def test_bytes_that_are_no_utf8_and_a_terminal_that_takes_ascii_alone():
    """In a process of its own, where the arguments are bytes and standard output has an encoding."""
    command = [sys.executable, "-m", "tokenry"]
    refused = subprocess.run([*command, "find", b"caf\xe9"], capture_output=True)
    assert refused.returncode == 2 and b"not UTF-8" in refused.stderr and b"Traceback" not in refused.stderr
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([*command, "find", "zzz \u2026 \u00e9"], capture_output=True, env=ascii_only)
    assert shown.returncode == 2 and b"no method matches 'zzz" in shown.stderr and b"Traceback" not in shown.stderr


def test_names_with_markup_are_printed_as_they_are(place):
    """rich would take [/] for the end of something, and :smile: for a picture."""
    hostile = place / "m[" / "]x :smile: [bold]"
    hostile.parent.mkdir()
    (place / "model").rename(hostile)
    try:
        shown = run("tokenize", "report", str(hostile), "--text", str(place / "text.txt"))
        assert shown.exit_code == 0, shown.exception
        assert "smile" in shown.stdout.replace("\n", "")
        read = run("read", "--method", "lm-head-neurons", "--model", str(hostile), "-o", "find=[/]a")
        assert read.exit_code in (0, 2) and not isinstance(read.exception, ValueError), read.exception
        read = run("read", "--method", "lm-head-neurons", "--model", str(hostile), "-o", "layer=0")
        assert read.exit_code == 0, read.exception
    finally:
        hostile.rename(place / "model")


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% for %}",
    "division": "{{ 1 / 0 }}",
    "missing": "{{ messages[7].content.x.y }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "type": "{{ 'a' + 1 }}",
    "empty": "",
    "blank": "{{ ' ' }}",
    "call": "{{ nothing() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("verb", ["decode", "select", "judge", "specreason"])
def test_a_template_that_fails_is_a_sentence(name, verb, place, llama, tokenizer, monkeypatch):
    from tokenry.decode import SpecReason, generate
    from tokenry.judge import CRew, CRewScorer
    from tokenry.models.prompts import prompt_ids

    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name])
    if name == "empty":  # as good as none
        return
    calls = {
        "decode": lambda: generate(llama, tokenizer, "the sea", max_new_tokens=2),
        "select": lambda: prompt_ids(tokenizer, "the sea"),
        "judge": lambda: CRewScorer(llama, tokenizer, CRew()).read(["1 + 1?"], [r"\boxed{2}"]),
        "specreason": lambda: SpecReason(small=(llama, tokenizer)).generate(llama, tokenizer, ["the sea"]),
    }
    with pytest.raises(InputError, match=r"chat template .*\(?"):
        calls[verb]()


SETTINGS = {
    "eos_token_id": ["x", 10**6, -3, 1.5, ["a"], [[0]]],
    "pad_token_id": [10**6, "y"],
    "bad_words_ids": [[[10**6]], [["x"]], "x", [7]],
    "suppress_tokens": [[10**6], "x"],
    "begin_suppress_tokens": [[10**6]],
    "forced_eos_token_id": [10**6],
    "num_return_sequences": [3, "x"],
    "repetition_penalty": ["x", -1.0],
    "no_repeat_ngram_size": ["x", -2],
    "min_length": ["x"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SETTINGS.items() for value in values])
def test_settings_in_a_model_folder_that_cannot_be_used_are_refused(key, value, place):
    path = place / "model" / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), key: value}))
    try:
        with pytest.raises(InputError, match=key) as caught:
            load(place / "model")
        assert "\n" not in str(caught.value)
    finally:
        path.write_text(before)


def test_good_settings_are_taken(place):
    path = place / "model" / "generation_config.json"
    before = path.read_text()
    good = {"eos_token_id": [0, 319], "bad_words_ids": [[5], [6, 7]], "num_return_sequences": 1, "temperature": 0.6}
    path.write_text(json.dumps({**json.loads(before), **good}))
    try:
        assert load(place / "model").model.generation_config.bad_words_ids == [[5], [6, 7]]
    finally:
        path.write_text(before)


@pytest.mark.parametrize("text", ["\ud800", "the sea \udfff"])
def test_a_lone_surrogate_in_a_text_is_refused(text, llama, tokenizer):
    from tokenry.decode import generate
    from tokenry.judge import CRew, CRewScorer
    from tokenry.models.prompts import prompt_ids
    from tokenry.represent import PromptEmbedder

    for call in (
        lambda: generate(llama, tokenizer, text, max_new_tokens=2),
        lambda: prompt_ids(tokenizer, text),
        lambda: CRewScorer(llama, tokenizer, CRew()).read(["1 + 1?"], [text]),
        lambda: PromptEmbedder(llama, tokenizer).encode([text]),
    ):
        with pytest.raises(InputError, match="half a surrogate pair"):
            call()


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (None, "give trained=FOLDER"),
        ("trained=", "trained"),
        ("trained=/dev/null", "no trained Causal2Vec in '/dev/null'"),
        ("trained=m[/]x", "no trained Causal2Vec in 'm[/]x'"),
        ("trained=" + "a" * 5000, "no trained Causal2Vec in"),
        ("trained=MODEL", "no trained Causal2Vec in"),
        ("context=m[/]x", "context='m[/]x' is not allowed"),
        ("context=none", "needs the Contextual token"),
        ("seed=-1", "seed='-1' is not allowed"),
    ],
)
def test_causal2vec_that_is_not_there_is_refused(option, why, place):
    option = option and option.replace("MODEL", str(place / "model"))
    args = ["represent", "--method", "causal2vec", "--output", str(place / "v.npy"), "--model", str(place / "model")]
    result = run(*args, *(["-o", option] if option else []), str(place / "text.txt"))
    assert result.exit_code == 2 and why in " ".join(result.output.split()), result.output
    assert not (place / "v.npy").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["decode", "the nama"],
        ["represent", "--output", "x.npy", "TEXT"],
        ["fit", "lm-head-neurons", "--save", "x"],
        ["judge", "--method", "crew", "--raw", "SOLUTIONS"],
    ],
)
def test_a_model_that_translates_is_refused_where_none_is_asked_for(args, place):
    given = [{"TEXT": str(place / "text.txt"), "SOLUTIONS": str(place / "solutions.jsonl")}.get(a, a) for a in args]
    result = CliRunner().invoke(main, [*given, "--model", "zoo/translator-a"])
    assert result.exit_code == 2 and "the model 'zoo/translator-a' translates" in result.output, result.output
