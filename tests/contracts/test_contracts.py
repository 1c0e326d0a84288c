"""Every method of the catalogue keeps the contract of its stage, and whatever serves methods knows none by name."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter

import tokenry
from tokenry import catalog
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.core.method import Method
from tokenry.data.problems import Arithmetic
from tokenry.judge import CRew, CRewScorer, Sample
from tokenry.measure.docs import options_table
from tokenry.read import DifficultyProbeMethod, LMHeadNeurons
from tokenry.represent.contract import encoder_of
from tokenry.represent.text.prompt_embedder import PromptEmbedder
from tokenry.trace.trace import capture

SOURCE = Path(tokenry.__file__).parent
ENTRIES = [pytest.param(entry, id=f"{entry.stage}-{entry.slug}") for entry in catalog.METHODS]
CONTRACTS = {
    "tokenize": "TokenizeMethod",
    "select": "SelectMethod",
    "represent": "RepresentMethod",
    "decode": "DecodeMethod",
    "read": "ReadMethod",
    "judge": "JudgeMethod",
    "train": "TrainMethod",
}
ALL_HEADS = ("-o", "budget=16", "-o", "adaptive=false", "-o", "heads=all")  # needs no profile
TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "minLength")


def base(stage):
    return getattr(importlib.import_module(f"tokenry.{stage}.contract"), CONTRACTS[stage])


def run(*args, code=0, stdin=None):
    result = CliRunner().invoke(main, [*map(str, args)], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


# --- the classes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_method_keeps_the_contract_of_its_stage(entry):
    method, contract = entry.load(), base(entry.stage)
    assert issubclass(method, contract) and issubclass(contract, Method)
    assert (method.slug, method.stage) == (entry.slug, entry.stage)
    assert "stage" not in vars(method), "the contract says it"
    assert method.title and method.paper and method.claim


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_a_contract_asks_for_is_there(entry):
    """Each function that the contract leaves open is given by the method, with the parameters that callers use."""
    method, contract = entry.load(), base(entry.stage)
    for name, asked in vars(contract).items():
        if not inspect.isfunction(asked) or "raise NotImplementedError" not in inspect.getsource(asked):
            continue
        given = getattr(method, name)
        own = hasattr(method, "generate") and name == "plugins"  # reads its prompts first
        assert given is not asked or own, f"{entry.slug} does not give {name}"
        wanted = [p for p in inspect.signature(asked).parameters.values() if p.default is p.empty]
        assert len(inspect.signature(given).parameters) >= len(wanted), name


def test_the_options_of_a_read_method_are_told_apart():
    """Those that shape the artifact, those about the input, and the rest, which asks something of the artifact."""
    for entry in catalog.by_stage("read"):
        method, contract = entry.load(), base("read")
        fit, given = set(method.fit_options), set(method.input_options)
        assert fit | given <= set(method.model_fields) and not fit & given
        asks = set(method.model_fields) - fit - given
        assert bool(asks) == (method.browse is not contract.browse)
        assert bool(method.takes) == (method.read is not contract.read)
        assert bool(method.learns_from) == (method.examples is not contract.examples)
        learns = [name for name in ("fit", "load") if getattr(method, name) is not getattr(contract, name)]
        assert learns == (["fit", "load"] if method.artifact else [])
        assert not method.artifact or callable(method.artifact.save)


# --- the schemas -----------------------------------------------------------------------------------------------------


def parts(schema, root):
    """Every schema inside a schema; references lead to what is defined in `root`."""
    yield schema
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for part in schema.get(name, ()):
            yield from parts(part, root)
    for name in ("properties", "$defs"):
        for part in schema.get(name, {}).values():
            yield from parts(part, root)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from parts(schema[name], root)


def check_schema(schema):
    """What JSON Schema demands of a schema, as far as ours go."""
    for part in parts(schema, schema):
        kind = part.get("type", "object")
        assert kind in TYPES, part
        if "$ref" in part:
            place, name = part["$ref"].rsplit("/", 1)
            assert place == "#/$defs" and name in schema["$defs"]
        if "enum" in part:
            assert part["enum"] and len(set(part["enum"])) == len(part["enum"])
        assert set(part.get("required", ())) <= set(part.get("properties", ()))
        assert all(isinstance(part[name], int | float) for name in BOUNDS if name in part)
        low, high = part.get("minimum", part.get("exclusiveMinimum")), part.get("maximum", part.get("exclusiveMaximum"))
        assert low is None or high is None or low < high
        assert "properties" not in part or kind == "object"
        assert "items" not in part or kind == "array"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_schema_is_json_schema(entry):
    method = entry.load()
    schema = method.schema()
    assert set(schema) == {"slug", "stage", "title", "input", "options", "output"}
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    for name in ("input", "options", "output"):
        check_schema(schema[name])
        described = schema[name].get("description") or schema[name].get("items")
        assert schema[name]["type"] in ("object", "array") and described
    assert schema["options"] == method.model_json_schema()
    assert json.loads(run("show", entry.slug, "--json"))["schema"]["slug"] == entry.slug


@pytest.mark.parametrize("entry", ENTRIES)
def test_options_are_the_same_everywhere(entry):
    """In the schema, with -o, in the table of the documentation; and a default fits its own schema."""
    method = entry.load()
    properties = method.schema()["options"]["properties"]
    named = [option.name for option in method.options()]
    assert list(properties) == named == list(method.model_fields)
    assert re.findall(r"^\| `(\w+)` \|", options_table(entry), flags=re.M) == named
    if not any(field.is_required() for field in method.model_fields.values()):
        with pytest.raises(InputError, match="its options are: ") as refusal:
            method.from_strings(["zzz=1"])
        listed = str(refusal.value).partition("its options are: ")[2]
        assert all(f"{name} (" in listed for name in named)
    for option in method.options():
        schema = properties[option.name]
        assert schema.get("description") == (option.description or None)
        if "default" in schema and "enum" in schema:
            assert schema["default"] in schema["enum"]


def test_options_come_back_from_json():
    for entry in catalog.METHODS:
        method = entry.load()
        if any(field.is_required() for field in method.model_fields.values()):
            continue
        one = method()
        simple = {n: v for n, v in one.model_dump(mode="json").items() if isinstance(v, bool | int | float | str)}
        assert method(**simple) == one, entry.slug


# --- who knows methods -----------------------------------------------------------------------------------------------


def imports(path):
    """Modules that a file imports anywhere in it, as absolute names; of `from x import y` both x and x.y."""
    package = ["tokenry", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*start, *([node.module] if node.module else [])])
            yield home
            yield from (f"{home}.{alias.name}" for alias in node.names)


def commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        yield from commands(command, (*path, name)) if isinstance(command, click.Group) else ()


def test_every_verb_has_an_example_and_prints_json():
    for path, command in commands():
        assert "Example:" in run(*path, "--help"), path
        answers = not isinstance(command, click.Group) and path != ("serve",)  # which answers over HTTP
        assert not answers or any(p.name == "json_output" for p in command.params), path


def method_modules():
    return {entry.target.partition(":")[0] for entry in catalog.METHODS}


def homes(stage):
    """{exported name: its module} of a stage package."""
    tree = ast.parse((SOURCE / stage / "__init__.pyi").read_text(encoding="utf-8"))
    return {a.name: f"tokenry.{stage}.{node.module}" for node in tree.body for a in node.names}


SERVING = [path for room in ("cli", "serve", "studio") for path in sorted((SOURCE / room).rglob("*.py"))]


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_serves_methods_imports_none(path):
    """Neither a module of a method nor a name that a stage gives from one, nor a slug outside examples and help."""
    methods = method_modules()
    for name in imports(path):
        home, _, last = name.rpartition(".")
        stage = home.removeprefix("tokenry.")
        from_stage = stage in catalog.STAGES and homes(stage).get(last)
        assert name not in methods and from_stage not in methods, f"{path.name} imports {name}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    slugs = {entry.slug for entry in catalog.METHODS}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & slugs, f"{path.name} knows {texts & slugs}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_method_imports_no_other(entry):
    own = entry.target.partition(":")[0]
    path = SOURCE.parent / (own.replace(".", "/") + ".py")
    assert not set(imports(path)) & (method_modules() - {own})


# --- the same answers from Python and the command line ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    from support.families import build

    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return tokenry.load(folder)


def valid(method, printed):
    """What a verb prints is what its method declares as output."""
    answer = json.loads(printed)
    method.output.model_validate(answer)
    assert method.output.model_validate(answer).model_dump(mode="json") == answer
    return answer


def test_judging(folder, loaded, tmp_path):
    """Text and traces through one scorer; the verb prints what `Scores` gives."""
    texts = [r"it is \boxed{4}", r"so \boxed{357}", "no answer"]
    samples = [Sample("The sea", text, "357") for text in texts] + [Sample("The wind", texts[0], "4")]
    ticks = []
    scores = CRew().scorer(loaded, chat=False).score(samples, lambda done, total: ticks.append((done, total)))
    assert scores.values == CRewScorer(*loaded, chat=False).score_batch([s.prompt for s in samples], [*texts, texts[0]])
    assert [one.correct for one in scores.judged] == [False, True, False, True] and ticks[-1] == (4, 4)
    assert "no answer found" in scores.table() and "vote:" in scores.table()
    lines = tmp_path / "s.jsonl"
    lines.write_text("\n".join(json.dumps(vars(sample)) for sample in samples))
    printed = run("judge", "--method", "crew", lines, "--raw", "--json", "--model", folder)
    assert valid(CRew, printed) == scores.to_json()
    request = {"samples": [vars(sample) for sample in samples], "raw": True}
    assert CRew.input.model_validate(request).samples == samples


def test_reading(folder, loaded, tmp_path):
    """A text is read as the trace that is captured of it, and the artifact is kept apart from its making."""
    path = tmp_path / "map.safetensors"
    fitted = LMHeadNeurons().fit(loaded)
    fitted.artifact.save(path)
    method = LMHeadNeurons(find=("the",), layer=1, min_prob=0.0033)
    names = method.load(path, loaded)
    ids = loaded.tokenizer("the sea", return_tensors="pt").input_ids
    with capture(*loaded, neurons="all") as cap:
        loaded.model(ids, use_cache=False, logits_to_keep=1)
    read = method.read("the sea", names, loaded)
    assert read == method.read(cap.trace, names) == method.read("the sea", loaded=loaded) and len(read)
    options = ["-o", "find=the", "-o", "layer=1", "-o", "min_prob=0.0033", "--artifact", path, "--model", folder]
    printed = run("read", "--method", "lm-head-neurons", *options, "the sea", "--json")
    expected = [reading.to_json() for reading in (*method.browse(names), read)]
    assert valid(LMHeadNeurons, printed) == json.loads(json.dumps(expected))


def test_learning_from_a_task():
    """`examples` draws what `is_correct` knows."""
    questions, is_correct = DifficultyProbeMethod().examples("arithmetic:8", None)
    right = [str(Arithmetic().totals(question)[-1]) for question in questions]
    assert len(questions) == 8 and all(is_correct(i, f"</think>\n{text}") for i, text in enumerate(right))


def test_embedding(loaded):
    """No method is the plain prompt."""
    assert isinstance(encoder_of(None, loaded), PromptEmbedder)
    method = catalog.load("token-prepending")()
    vectors = encoder_of(method, loaded).encode(["the sea", "the wind"])
    assert vectors.equal(method.encoder(*loaded).encode(["the sea", "the wind"]))
    assert not vectors.equal(encoder_of(None, loaded).encode(["the sea", "the wind"]))
    method.output.model_validate({"embeddings": vectors.tolist()})


@pytest.mark.parametrize(
    ("slug", "args"),
    [
        ("compresskv", ["select", "--method", "compresskv", *ALL_HEADS, "--context", "{file}", "who?"]),
        ("antislop", ["decode", "--method", "antislop", "-o", 'phrases=["the"]', "--raw", "the sea"]),
    ],
)
def test_generating(slug, args, folder, tmp_path):
    (tmp_path / "file").write_text("the old lighthouse stood on the cliff\n" * 8)
    given = [arg.format(file=tmp_path / "file") if "{file}" in arg else arg for arg in args]
    answer = valid(catalog.load(slug), run(*given, "--max-new-tokens", 4, "--json", "--model", folder))
    assert isinstance(answer["text"], str)


def test_training_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("the old lighthouse stood on the cliff\n" * 8)
    small = ["-o", "vocab_size=600", "-o", "custom_tokens=none", "--json"]
    made = run("tokenize", "train", "--method", "kl3m", tmp_path / "a.txt", "--output", tmp_path / "made", *small)
    assert valid(catalog.load("kl3m"), made)["files"] == 1


def test_requests_are_closed():
    """A field that nobody reads is refused, as an option is."""
    for entry in catalog.METHODS:
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            TypeAdapter(entry.load().input).validate_python({"zzz": 1})
