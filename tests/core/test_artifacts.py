"""What methods learn, all alike: saved and loaded, bound to a model, refused when damaged, given as an option."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from tokenry import InputError, catalog
from tokenry.core.artifact import Artifact, ArtifactField, Folder
from tokenry.core.method import Method
from tokenry.judge.receipts.heads import MatchingHeads
from tokenry.judge.receipts.receipt import AuditSetting
from tokenry.learned.confidence_filter import ConfidenceFilter
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.learned.difficulty_probe import DifficultyProbe
from tokenry.learned.hyper_probe import Codebook, HyperProbe
from tokenry.learned.linear_probe import LinearProbe
from tokenry.models.anatomy import fingerprint, shape_of
from tokenry.models.embedders import Embedder
from tokenry.read import LMHeadNeurons, NeuronMap
from tokenry.select.heads.profile import SHIPPED, HeadProfile, shipped_profile
from tokenry.train import ProjectDelta, Tuning
from tokenry.zoo import storyteller

SIZES = "hidden_size hidden n_classes"  # of a probe
ONE_SENTENCE = r"^[^\n]+; [^\n]+$"  # what is wrong, and what to do


@dataclass
class Kit:
    """Models and tokenizers that artifacts are made for."""

    model: Any
    other: Any
    tokenizer: Any
    other_tokenizer: Any


@pytest.fixture(scope="module")
def kit(tokenizer):
    from support.families import build

    other = copy.deepcopy(model := build("llama"))
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    return Kit(model, other, tokenizer, storyteller.build_tokenizer())


def make_filter(kit):
    return ConfidenceFilter(5, 3).bind(kit.model)


def make_probe(kit):
    probe = DifficultyProbe(kit.model.config.hidden_size, 3)
    probe.mean.uniform_()
    return probe.bind(kit.model, kit.tokenizer, chat=False)


def make_linear(kit):
    return LinearProbe(kit.model.config.hidden_size, 2).bind(kit.model)


def make_hyper(kit):
    return HyperProbe(Codebook(["a", "b", "c"], 256), kit.model.config.hidden_size, 1).bind(kit.model)


def make_rectifier(kit):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return DeadEndValueModel(LlamaModel(LlamaConfig(vocab_size=320, **shape, pad_token_id=1))).bind(kit.tokenizer)


def make_map(kit):
    return LMHeadNeurons(top_k=2, bottom=True).map(kit.model, kit.tokenizer)


def make_profile(kit):
    order, scores = ((3, 0, 1, 2),) * 4, ((0.1, 0.2, 0.3, 1 / 3),) * 4
    shape = shape_of(kit.model)
    return HeadProfile(
        model="m", fingerprint=fingerprint(kit.model), **shape, order=order, scores=scores, error=(0.25,) * 4
    )


def make_heads(kit):
    """Bound to an embedder, whose revision stands for the model's fingerprint."""
    setting = AuditSetting(block_size=16, samples=4, exposure_budget=0.4, token_budget=0.04, certain=0.95)
    heads = MatchingHeads(4, setting, honest=3)
    heads.calibration.uniform_()
    heads.rates = {"random": 0.9}
    return heads.bind(Embedder("m", fingerprint(kit.model), lambda texts: None))


def make_delta(kit):
    tuning = Tuning("last_block", last_n_blocks=2)
    weights = {"model.layers.3.mlp.up_proj.weight": torch.rand(4, 3)}
    return ProjectDelta(tuning, weights, {"model": "m", "fingerprint": fingerprint(kit.model)})


@dataclass
class Case:
    """An artifact: how it is made, and how it meets a model."""

    kind: type[Artifact]
    make: Any
    check: Any


CASES = {
    "filter": Case(ConfidenceFilter, make_filter, lambda one, model, _: one.check(model)),
    "probe": Case(DifficultyProbe, make_probe, lambda one, model, tokenizer: one.check(model, tokenizer, chat=False)),
    "linear probe": Case(LinearProbe, make_linear, lambda one, model, _: one.check(model)),
    "hyperdimensional probe": Case(
        HyperProbe, make_hyper, lambda one, model, _: one.check_made_for(fingerprint(model))
    ),
    "matching heads": Case(MatchingHeads, make_heads, lambda one, model, _: one.check_made_for(fingerprint(model))),
    "delta": Case(ProjectDelta, make_delta, lambda one, model, _: one.check_made_for(fingerprint(model))),
    "rectifier": Case(DeadEndValueModel, make_rectifier, lambda one, _, tokenizer: one.check(tokenizer)),
    "map": Case(NeuronMap, make_map, lambda one, model, _: one.check_made_for(fingerprint(model))),
    "head profile": Case(HeadProfile, make_profile, lambda one, model, _: one.check(model)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def made(case, kit):
    return case.make(kit)


@pytest.fixture
def place(made, tmp_path):
    """Where it was saved."""
    made.save(tmp_path / "kept.safetensors")
    return tmp_path / "kept.safetensors"


def files_of(place):
    return sorted(place.iterdir()) if place.is_dir() else [place]


def header_file(place):
    """Where the header can be read, and its text."""
    for file in files_of(place):
        if file.suffix == ".json" or place.is_file():
            if file.read_bytes()[:1] == b"{":
                return file, file.read_text(encoding="utf-8")
            with safe_open(file, "pt") as tensors:
                return file, next(iter(tensors.metadata().values()))
    raise AssertionError("there is no header")


def rewrite(place, text):
    """Put another text where the header is."""
    file, _ = header_file(place)
    if file.suffix == ".json" or file.read_bytes()[:1] == b"{":
        file.write_text(text)
        return
    with safe_open(file, "pt") as kept:
        tensors, (key,) = {name: kept.get_tensor(name) for name in kept.keys()}, kept.metadata()  # noqa: SIM118
    save_file(tensors, file, {key: text})


def change(place, **changes):
    """Save the header with other fields."""
    rewrite(place, json.dumps({**json.loads(header_file(place)[1]), **changes}))


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_artifact_is_a_case(kit):
    """Also what a new method will learn."""
    for entry in catalog.METHODS:  # so that all are imported
        entry.load()
    known = {case.kind for case in CASES.values()}
    found = [kind for kind in Artifact.__subclasses__() if kind.__module__.startswith("tokenry.")]
    assert set(found) == known | {Codebook}  # which belongs to no model, see test_hyperdimensional_probe


def test_loaded_equals_saved_bit_for_bit(case, made, place, kit):
    again = case.kind.load(place)
    tensors, header = made.stored()
    restored, restored_header = again.stored()
    assert restored.keys() == tensors.keys() and all(torch.equal(t, restored[n]) for n, t in tensors.items())
    assert all(t.dtype == restored[n].dtype for n, t in tensors.items())
    plain = {"format", "held_out_accuracy", "held_out_cosine"}  # not of the object; may be nan
    same = {n: v for n, v in restored_header.items() if n not in plain}
    assert same == {n: v for n, v in header.items() if n not in plain}
    assert again.made_for == made.made_for and again.digest() == case.kind.load(place).digest()
    case.check(again, kit.model, kit.tokenizer)
    again.save(str(place) + ".again")
    pairs = zip(files_of(place), files_of(place.with_name(place.name + ".again")), strict=True)
    assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_the_digest_is_of_all_that_is_stored(case, made, place):
    tensors, _ = made.stored()
    before = made.digest()
    if tensors:
        next(t for t in tensors.values() if t.is_floating_point()).data.view(-1)[0] += 1
    else:
        made = made.model_copy(update={"model": "another"})
    assert made.digest() != before == case.kind.load(place).digest()


def test_the_header_is_readable_json(case, place):
    header = json.loads(header_file(place)[1])
    assert header["format"] == case.kind.version == 1 and len(header) > 2


def test_another_model_is_refused_in_one_sentence(case, made, kit):
    with pytest.raises(InputError, match=r"not for the weights|this tokenizer has") as refused:
        case.check(made, kit.other, kit.other_tokenizer)
    assert str(refused.value).count("; ") == 1 and "{" not in str(refused.value)
    with pytest.raises(InputError, match=ONE_SENTENCE):
        case.check(made, kit.other, kit.other_tokenizer)


def test_what_is_bound_to_nothing_is_not_saved(case, made, tmp_path):
    if isinstance(made, torch.nn.Module):
        name = "vocabulary" if case.kind is DeadEndValueModel else "made_for"
        setattr(made, name, None)
        with pytest.raises(InputError, match=rf"the {case.kind.kind} .*call bind\("):
            made.save(tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_a_newer_one_is_refused_before_its_tensors_are_read(case, place):
    change(place, format=2)
    if isinstance(case.kind.layout, Folder):
        (place / case.kind.layout.weights).unlink()
    with pytest.raises(InputError, match=rf"the {case.kind.kind} .*kept.* has format 2, this version reads 1; update"):
        case.kind.load(place)


@pytest.mark.parametrize("value", [0, -1, True, "1", None, 1.5])
def test_a_format_that_is_none_is_refused(case, place, value):
    change(place, format=value)
    with pytest.raises(InputError, match="format"):
        case.kind.load(place)


@pytest.mark.parametrize("kind", ["cut", "empty", "foreign", "gone"])
def test_damage_is_refused(case, place, kind):
    for file in files_of(place):
        whole = file.read_bytes()
        file.unlink()
        if kind != "gone":
            file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"\x89PNG\r\n"}[kind])
        with pytest.raises(InputError, match=ONE_SENTENCE):
            case.kind.load(place)
        file.write_bytes(whole)
    case.kind.load(place)


@pytest.mark.parametrize("text", ["null", "[1]", "3", '"x"', "{}"])
def test_a_header_that_is_none_is_refused(case, place, text):
    rewrite(place, text)
    with pytest.raises(InputError, match=ONE_SENTENCE):
        case.kind.load(place)


@pytest.mark.parametrize("other", CASES)
def test_another_kind_is_refused(case, place, other):
    kind = CASES[other].kind
    if kind is not case.kind:
        with pytest.raises(InputError, match=kind.remedy.split(",")[0].split("(")[0]):
            kind.load(place)


def test_texts_of_users_are_no_templates(case, tmp_path):
    """Braces in a path, or in the name of a model, stay braces."""
    with pytest.raises(InputError, match=r"\{x\}\{0\}"):
        case.kind.load(tmp_path / "{x}{0}")


def test_a_model_with_braces_in_its_name(kit):
    made = make_filter(kit)
    made.made_for = {**made.made_for, "model": "{x}", "kind": "no", "found": "no"}
    with pytest.raises(InputError, match=r"the filter was trained for '\{x\}'"):
        made.check(kit.other)


# --- an option of a method -------------------------------------------------------------------------------------------


def method_with(kind):
    class Learned(Method):
        learned: ArtifactField[kind]
        maybe: ArtifactField[kind] | None = None

    Learned.slug = "learned"
    return Learned


@pytest.mark.parametrize("form", [str, Path])
def test_an_option_takes_a_path_and_reads_it_once(case, made, place, form, monkeypatch):
    loads, load = [], case.kind.load
    monkeypatch.setattr(case.kind, "load", lambda path: loads.append(path) or load(path))
    method = method_with(case.kind)(learned=form(place))
    assert isinstance(method.learned, case.kind) and len(loads) == 1 and method.maybe is None
    assert method.learned is method.learned and method.learned.digest() == load(place).digest()
    assert method.model_copy().learned is method.learned and len(loads) == 1


def test_an_option_is_given_on_the_command_line(case, place):
    method = method_with(case.kind).from_strings([f"learned={place}", f"maybe={place}"])
    assert method.learned.digest() == method.maybe.digest() == case.kind.load(place).digest()


def test_an_option_takes_the_object_itself(case, made):
    method = method_with(case.kind)(learned=made, maybe=made)
    assert method.learned is made and method.maybe is made


def test_an_option_refuses_what_it_is_not(case, kit, tmp_path):
    others = [c.make(kit) for c in CASES.values() if c.kind is not case.kind]
    for value in (3, math.nan, True, b"x", {"model": "m"}, [str(tmp_path)], object(), *others):
        with pytest.raises(InputError, match=r"learned: learned=.* is not allowed \(.*\); give path") as refused:
            method_with(case.kind)(learned=value)
        assert "\n" not in str(refused.value) and case.kind.__name__ in str(refused.value)
    for nowhere in ("", "nowhere", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=ONE_SENTENCE):
            method_with(case.kind)(learned=nowhere)
    with pytest.raises(InputError, match="needs the option 'learned'"):
        method_with(case.kind)()


def test_an_option_is_a_path_to_who_reads_about_it(case, made):
    kind = method_with(case.kind)
    schema = kind.model_json_schema()["properties"]
    assert schema["learned"]["type"] == "string" and schema["learned"]["format"] == "path"
    assert [(o.type, o.default) for o in kind.options()] == [("path", "required"), ("path", "none")]
    assert kind.model_json_schema(mode="serialization")["properties"]["learned"]["type"] == "string"


def test_an_option_is_named_by_what_is_in_it(case, made, place):
    """So that results of two artifacts are not taken for each other, and those of a moved one are."""
    kind = method_with(case.kind)
    found = kind(learned=made).model_dump(mode="json")
    assert found == kind(learned=place).model_dump(mode="json")
    assert found == {"learned": f"{case.kind.__name__} {made.digest()}", "maybe": None}


# --- files of older versions -----------------------------------------------------------------------------------------


def test_profiles_from_before_formats_are_read(kit, tmp_path):
    assert "format" not in json.loads(SHIPPED.read_text()) and shipped_profile().layers == 30
    made = make_profile(kit)
    (tmp_path / "old.json").write_text(json.dumps(made.model_dump(mode="json")))
    assert HeadProfile.load(tmp_path / "old.json") == made


@pytest.mark.parametrize(
    ("name", "files", "header"),
    [
        ("filter", ["filter.json", "filter.safetensors"], "format block_length hidden made_for"),
        (
            "probe",
            ["probe.json", "probe.safetensors"],
            f"format {SIZES} held_out_accuracy made_for",
        ),
        (
            "rectifier",
            ["rectifier.json", "rectifier.safetensors"],
            "format vocabulary special_ids hidden_mult trunk",
        ),
        ("map", None, "format model fingerprint side fold_norm top_k vocabulary texts"),
        ("head profile", None, "format model fingerprint layers heads kv_heads order scores error"),
    ],
)
def test_the_files_are_where_they_always_were(name, files, header, kit, tmp_path):
    CASES[name].make(kit).save(tmp_path / "kept")
    assert list(json.loads(header_file(tmp_path / "kept")[1])) == header.split()
    assert (tmp_path / "kept").is_file() if files is None else [f.name for f in files_of(tmp_path / "kept")] == files
