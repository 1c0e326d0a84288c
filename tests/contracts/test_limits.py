"""Numbers have bounds: every option of every method, functions, and the command line."""

import math

import pytest

from tokenry import catalog
from tokenry.core.errors import InputError
from tokenry.decode import SkipSchedule, generate, loop
from tokenry.decode.denoising.loop import sampling_warpers
from tokenry.decode.denoising.unmask import Factor, FixedCount, RandomUnmask
from tokenry.learned.confidence_filter import ConfidenceFilter
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.learned.token_values import TokenValueModel

ENTRIES = [pytest.param(entry, id=f"{entry.stage}-{entry.slug}") for entry in catalog.METHODS]
UNBOUNDED = {"windows"}  # START:END, compared with a position and nothing else
FAR = ["nan", "inf", "-inf", "1e308", "-1e308", "1e30", str(10**30), str(-(10**30)), "9" * 5000]


def numeric(schema):
    """The parts of a field's JSON schema that describe a number, those of its list items too."""
    for part in schema.get("anyOf", [schema]):
        if part.get("type") in ("integer", "number"):
            yield part
        for inner in (part.get("items"), *part.get("prefixItems", ())):
            if inner and "$ref" not in inner:
                yield from numeric(inner)


def numbers_of(entry):
    """{option: its first numeric schema} of the options that take one number."""
    fields = entry.load().model_json_schema()["properties"]
    scalars = {name: [p for p in numeric(s) if p in s.get("anyOf", [s])] for name, s in fields.items()}
    return {name: parts[0] for name, parts in scalars.items() if parts}


@pytest.fixture
def build(tmp_path, llama, tokenizer):
    """A method with some options; one that cannot do without a folder gets one."""
    ConfidenceFilter(32).bind(llama).save(tmp_path)
    required = {
        ("decode", "rectification"): {"rectifier": DeadEndValueModel(llama)},
        ("decode", "learn2pd"): {"filter": str(tmp_path)},
        ("decode", "tvm-search"): {"values": TokenValueModel.from_language_model(llama, tokenizer)},
        ("judge", "tvm"): {"values": TokenValueModel.from_language_model(llama, tokenizer)},
    }

    def made(entry, **values):
        return entry.load()(**required.get((entry.stage, entry.slug), {}), **values)

    return made


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_number_of_a_method_has_both_bounds(entry):
    for name, schema in entry.load().model_json_schema()["properties"].items():
        if name in UNBOUNDED:
            continue
        for part in numeric(schema):
            assert {"minimum", "exclusiveMinimum"} & set(part), f"{entry.slug}: {name} has no lower bound"
            assert {"maximum", "exclusiveMaximum"} & set(part), f"{entry.slug}: {name} has no upper bound"


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "1e308", "-1e308", "1e30", str(10**30), str(-(10**30)), "9" * 5000]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_beyond_them_is_refused(entry, value, build):
    """Whether it comes as text, as from the command line, or as a number."""
    for name in numbers_of(entry):
        for given in (value, float(value)):
            with pytest.raises(InputError) as caught:
                build(entry, **{name: given})
            sentence = str(caught.value)
            assert name in sentence and len(sentence) < 400 and "\n" not in sentence


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_bounds_themselves_are_numbers_that_a_method_takes(entry, build):
    """Alone, unless another option forbids it, which the refusal then names."""
    for name, part in numbers_of(entry).items():
        for bound in ("minimum", "maximum"):
            if bound not in part:
                continue
            assert math.isfinite(part[bound])
            try:
                assert getattr(build(entry, **{name: part[bound]}), name) == part[bound]
            except InputError as error:
                assert name in str(error) and "is not allowed (" not in str(error)


CALLS = {  # a function of a number, and a value beyond what it takes
    "max_new_tokens": (lambda m, t, n: generate(m, t, "the sea", max_new_tokens=n), [10**13, 0, -1, 2.5, math.inf]),
    "seed": (lambda m, t, n: generate(m, t, "the sea", max_new_tokens=1, seed=n), [10**30, -1, 1e30, math.nan]),
    "temperature": (
        lambda m, t, n: generate(m, t, "the sea", max_new_tokens=1, do_sample=True, temperature=n),
        [math.inf, math.nan, 1e-320, 0.0, -1.0, 1e308],
    ),
    "temperature of the loop": (
        lambda m, t, n: m.generate(
            **t("the sea", return_tensors="pt"), custom_generate=loop, max_new_tokens=1, do_sample=True, temperature=n
        ),
        [math.inf, 1e-320, 1e308],
    ),
    "planned_new_tokens": (lambda m, t, n: SkipSchedule(8, planned_new_tokens=n), [2**31, 10**13, 0, math.inf]),
    "temperature of drawing": (lambda m, t, n: sampling_warpers(True, n), [math.inf, math.nan, 1e-320, 0.0]),
    "factor": (lambda m, t, n: Factor(n), [math.inf, math.nan, 0.0, 1e308]),
    "steps": (lambda m, t, n: FixedCount(n), [10**13, 0]),
    "steps of chance": (lambda m, t, n: RandomUnmask(n), [10**13, 0]),
    "temperature of positions": (lambda m, t, n: FixedCount(temperature=n), [math.inf, 1e-320, -1.0, 1e308]),
    "block_length": (lambda m, t, n: ConfidenceFilter(n), [10**6, 0]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in CALLS.items() for value in values])
def test_a_function_refuses_a_number_that_would_break_it(name, value, llama, tokenizer):
    with pytest.raises(InputError, match=name.split()[0]):
        CALLS[name][0](llama, tokenizer, value)
