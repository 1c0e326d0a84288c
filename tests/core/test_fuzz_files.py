"""Every reader of the house on files that were cut, flipped, retyped or nested: the right result or an InputError.

A reader is one line of READERS: how to write a file that it takes, and how to read (and use) it.
"""

import contextlib
import copy
import gzip
import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tokenry import InputError
from tokenry.cli import judge as cli_judge
from tokenry.cli.decode import read_prompts
from tokenry.cli.options import read_text
from tokenry.cli.represent import read_lines
from tokenry.decode import Antislop
from tokenry.decode.diffadapt import DiffAdapt
from tokenry.decode.specreason import SpecReason
from tokenry.evidence.token_prepending import DevScores
from tokenry.evidence.token_prepending import Row as DevRow
from tokenry.judge import Reference, SlopProfile
from tokenry.learned.confidence_filter import ConfidenceFilter, TraceDataset
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.learned.difficulty_probe import DifficultyProbe
from tokenry.learned.filter_traces import TraceWriter
from tokenry.learned.token_values import TokenValueModel
from tokenry.measure.store import RunStore
from tokenry.measure.task import Outcome
from tokenry.read import DifficultyProbeMethod, LMHeadNeurons, NeuronMap
from tokenry.select.heads.profile import HeadProfile
from tokenry.tokenize import load_tokenizer
from tokenry.trace.trace import Trace, capture
from tokenry.train.ftpo import FTPO
from tokenry.train.learn2pd import Learn2PDTraining
from tokenry.train.preference.pairs import check_pairs
from tokenry.train.rectifier import Rectifier
from tokenry.train.token_values.solutions import value_examples
from tokenry.train.tvm import TVMTraining
from tokenry.train.values.collator import RectifierCollator
from tokenry.train.values.episodes import check_episodes
from tokenry.zoo import recipes

EXAMPLES = int(os.environ.get("TOKENRY_FUZZ", "60"))  # damaged files for each reader
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
GRADED_IDS = {"prompt_ids": [5], "solution_ids": [[6, 7], [6]], "correct": [1, 0]}
TEXTS = ["the old lighthouse", "café “quotes”", "a testament to the sea"]


@dataclass
class Kit:
    """What readers need besides the file."""

    model: Any
    small: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def kit(tokenizer):
    from support.families import build
    from transformers import LlamaConfig, LlamaModel

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Kit(build("llama"), LlamaModel(LlamaConfig(vocab_size=320, **shape, pad_token_id=1)), tokenizer)


# --- valid files -----------------------------------------------------------------------------------------------------


def lines(*rows):
    return lambda kit, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def text(content):
    return lambda kit, path: path.write_text(content)


def write_probe(kit, path):
    probe = DifficultyProbe(4, 3)
    probe.made_for = {"model": "m", "fingerprint": "f", "layer": 3, "normed": False, "template": "t"}
    probe.save(path)


def write_filter(kit, path):
    made = ConfidenceFilter(4)
    made.made_for = {"model": "m", "fingerprint": "f", "temperature": 0.0}
    made.save(path)


def write_trace(kit, path):
    ids = torch.tensor([kit.tokenizer.encode("the old lighthouse")])
    with capture(kit.model, kit.tokenizer, hidden=[1], qk=[1], head_outputs=[2], neurons=[0]) as cap, torch.no_grad():
        kit.model(ids)
    cap.trace.save(path)


def write_map(kit, path):
    LMHeadNeurons(top_k=2, bottom=True).map(kit.model, kit.tokenizer).save(path)


def write_profile(kit, path):
    shape = {"layers": 2, "heads": 2, "kv_heads": 1}
    HeadProfile(model="m", **shape, order=((0, 1), (1,)), scores=((1, 2), (3, 4)), error=(1.0, 2.0)).save(path)


def write_filter_traces(kit, path):
    mask = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    with TraceWriter(path, kit.model) as writer:
        writer.add(TraceDataset(torch.linspace(0, 1, 180).reshape(60, 3), mask.roll(1, 0), mask, torch.arange(60) // 6))


def use_filter_traces(kit, path):
    method = Learn2PDTraining(epochs=1)
    trainer = method.trainer(kit.model, kit.tokenizer, method.read(path, kit.tokenizer), path)
    trainer.train()
    assert all(math.isfinite(value) for value in trainer.report().values())


PAIR = {"prompt_ids": [5, 6], "chosen_ids": [10, 11, 12, 13], "rejected_id": 9}
REWIND = {
    "context_ids": [5, 6],
    "rejected": 9,
    "rejected_text": None,
    "rule": "phrase:sea",
    "candidates": [[266 + i, 0.5] for i in range(20)],
}
TEXT_PAIR = {"prompt": "the old", "chosen": [" the", " s", " a", " w"], "rejected": " t"}
EPISODES = (
    {"prompt": "the old", "continuation": " sea", "reward": -1},
    {"prompt_ids": [9], "continuation_ids": [8, 7], "reward": [0.0, -0.5]},
)
STRATEGIES = [{"name": n, "suffix": " ", "temperature": 0.5, "budget": 1.0} for n in ("easy", "normal", "hard")]


# --- reading, and using what was read --------------------------------------------------------------------------------


def use_pairs(kit, path):
    pairs = FTPO(function_words=True, min_chosen=1).read(path, kit.tokenizer)
    check_pairs(pairs, 320)


def use_episodes(kit, path):
    episodes = Rectifier().read(path, kit.tokenizer)
    check_episodes(episodes, 320)
    RectifierCollator(0)(episodes)


def use_solutions(kit, path):
    assert all(isinstance(part, str | None) for row in cli_judge.read_rows(str(path)) for part in vars(row).values())


def use_problems(kit, path):
    problems = DifficultyProbeMethod(marker="number").examples(str(path), read_text(str(path), "data"))
    assert [problems.is_correct(i, "3") in (True, False) for i in range(len(problems.questions))]


def use_trace(kit, path):
    trace = Trace.load(path)
    assert len(trace.roles) == len(trace) and trace.text[:1] is not None
    for name in ("position_ids", "logprob", "entropy", "lse"):
        assert len(getattr(trace, name)) == len(trace)
    for use in (lambda: trace.hidden(1), lambda: trace.attention(1), lambda: trace.neurons(0), lambda: trace.offsets):
        with contextlib.suppress(InputError):  # it may have been captured without
            use()


def use_map(kit, path):
    found = NeuronMap.load(path)
    found.table(0)
    assert found.overlap(found).share == 1 and found.named_layers(0.5) is not None


def use_rectifier(kit, path):
    model = DeadEndValueModel.load(path)
    if model.vocab_size > 20:
        model(torch.tensor([[3, 4, 5]]))


def use_token_values(kit, path):
    model = TokenValueModel.opened(path)
    if model.config.get_text_config().vocab_size > 20:
        assert 0 <= float(model.score(torch.tensor([[3, 4, 5]]))[0, -1]) <= 1


def use_graded(kit, path):
    value_examples(TVMTraining().read(path, kit.tokenizer))


def use_probe(kit, path):
    DifficultyProbe.load(path).probabilities(torch.zeros(1, 4))


def use_filter(kit, path):
    ConfidenceFilter.load(path)(torch.zeros(1, 4))


def use_slop(kit, path):
    SlopProfile.load(path).score("the old lighthouse")


def use_reference(kit, path):
    SlopProfile.fit(TEXTS, Reference.load(path), 1)


def use_tokenizer(kit, path):
    found = load_tokenizer(path)
    assert isinstance(found.encode("the old"), list)


def use_record(kit, path):
    """The record where the zoo looks for it; a record that is not there is a model that is not built."""
    folder = path.parent / "zoo" / "reasoner"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "zoo_folders", lambda name: (folder, folder))
        if path.is_file():
            shutil.copy(path, folder / "recipe.json")
        found = recipes.record_of("reasoner")
    if not path.is_file():
        raise InputError("not built")
    assert all(f"{value:>9}" for value in found["measures"].values())


def write_store(kit, path):
    with RunStore(path) as store:
        store.add(store.begin({"task": "t"}), [("a", "x", 0, Outcome({"m": 1.5}, {"seconds": 2.0}, {"text": "sea"}))])


def use_store(kit, path):
    with RunStore(path) as store:
        found = store.outcomes(store.begin({"task": "t"}, resume=True))
        assert all(isinstance(outcome, Outcome) for outcome in found.values())


def use_prompts(kit, path):
    assert all(prompt.strip() for prompt in read_prompts(None, str(path)))


def use_phrases(kit, path):
    assert Antislop(phrases=str(path)).phrases


# name: (write a valid file or folder, read and use it)
READERS = {
    "phrases": (text("\n".join(TEXTS)), use_phrases),
    "phrases, JSON": (text(json.dumps(TEXTS, indent=1)), use_phrases),
    "prompts": (text("\n".join(TEXTS)), use_prompts),
    "sentences": (text("\n".join(TEXTS)), lambda kit, path: read_lines(str(path))),
    "text": (text("\n".join(TEXTS)), lambda kit, path: read_text(str(path), "text").encode()),
    "pairs of ids": (lines(PAIR, PAIR), use_pairs),
    "pairs of texts": (lines(TEXT_PAIR, TEXT_PAIR), use_pairs),
    "rewinds": (lines(REWIND, REWIND), use_pairs),
    "episodes": (lines(*EPISODES), use_episodes),
    "filter traces": (write_filter_traces, use_filter_traces),
    "solutions": (lines({"prompt": "a", "solution": "b", "answer": 3}), use_solutions),
    "problems": (lines({"question": "a", "answer": 3}), use_problems),
    "strategies": (text(json.dumps(STRATEGIES)), lambda kit, path: DiffAdapt(strategies=str(path))),
    "step prompts": (text('{"separator": "x", "answers": ["y"]}'), lambda kit, path: SpecReason(prompts=str(path))),
    "head profile": (write_profile, lambda kit, path: HeadProfile.load(path).model_dump_json()),
    "dev scores": (
        lambda kit, path: DevScores("m", "f", 3, (DevRow(2, True, (0.1, 0.2)),)).save(path),
        lambda kit, path: DevScores.load(path).save(path),
    ),
    "slop profile": (lambda kit, path: SlopProfile.fit(TEXTS * 3, min_count=1).save(path), use_slop),
    "reference": (lambda kit, path: Reference.count("r", TEXTS).save(path), use_reference),
    "trace": (write_trace, use_trace),
    "neuron map": (write_map, use_map),
    "difficulty probe": (write_probe, use_probe),
    "confidence filter": (write_filter, use_filter),
    "dead-end values": (
        lambda kit, path: DeadEndValueModel(copy.deepcopy(kit.small)).bind(kit.tokenizer).save(path),
        use_rectifier,
    ),
    "token values": (
        lambda kit, path: TokenValueModel.from_language_model(kit.small, kit.tokenizer).save_pretrained(path),
        use_token_values,
    ),
    "graded solutions": (
        lines({"prompt": "a", "solutions": ["b", "c"], "correct": [True, 0.5]}, GRADED_IDS),
        use_graded,
    ),
    "zoo record": (text('{"recipe": "reasoner", "measures": {"accuracy": 0.8}}'), use_record),
    "run store": (write_store, use_store),
    "tokenizer": (lambda kit, path: kit.tokenizer.save_pretrained(path), use_tokenizer),
}


# --- damage ----------------------------------------------------------------------------------------------------------

HOSTILE = [
    *(None, True, -1, 0, 2, 10**30, 10**400, 1.5, -0.5, float("nan"), float("inf"), "", "x", "5", "\ud800", "\0"),
    *([], [[]], [None], [1], ["x"], {}, {"x": 1}, [[1, 2]] * 3),
]


def places(value, here=()):
    """The path to every value inside a JSON value; of long lists the first two."""
    yield here
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*here, key))


def replaced(value, place, new):
    if not place:
        return new
    value = copy.deepcopy(value)
    target = value
    for key in place[:-1]:
        target = target[key]
    if new is HOSTILE:  # stands for nothing at all
        del target[place[-1]]
    else:
        target[place[-1]] = new
    return value


def retyped(raw, draw):
    """A JSON text with one value replaced or gone, in one of its lines."""
    whole = [raw] if _is_json(raw) else raw.split("\n")
    number = draw(st.integers(0, len(whole) - 1))
    if not _is_json(whole[number]):
        return raw
    value = json.loads(whole[number])
    place = draw(st.sampled_from(list(places(value))))
    new = draw(st.sampled_from([*HOSTILE, HOSTILE] if place else HOSTILE))
    whole[number] = json.dumps(replaced(value, place, new))
    return "\n".join(whole)


def _is_json(raw):
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def damaged_text(raw: bytes, draw) -> bytes:
    kind = draw(st.sampled_from(["bytes", "retyped", "retyped", "retyped", "mark", "ends", "nested", "deep"]))
    if kind == "bytes":
        return damaged_bytes(raw, draw)
    if kind == "mark":
        return draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\xef\xbb\xbf\xef\xbb\xbf"])) + raw
    if kind == "ends":
        return raw.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b"\xe2\x80\xa8"])))
    if kind == "nested":
        return b"[" * 10_000 + raw
    if kind == "deep":  # nested inside what is otherwise as it should be
        depth = draw(st.sampled_from([300, 700, 900, 960, 5000]))
        return raw.replace(b":", b":" + b"[" * depth + b"]" * depth + b',"x":', 1)
    return retyped(raw.decode(), draw).encode("utf-8", "surrogatepass")


def damaged_bytes(raw: bytes, draw) -> bytes:
    place = draw(st.integers(0, max(0, len(raw) - 1)))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "empty"]))
    if kind == "cut":
        return raw[:place]
    if kind == "empty":
        return b""
    middle = (
        bytes([raw[place] ^ 1 << draw(st.integers(0, 7))]) if kind == "flip" and raw else draw(st.binary(max_size=9))
    )
    return raw[:place] + middle + raw[place + (kind == "flip") :]


def damaged_tensors(raw: bytes, path: Path, draw) -> None:
    """A safetensors file with another header length, header, tensor or record."""
    kind = draw(st.sampled_from(["bytes", "length", "header", "tensor", "tensor", "record", "record"]))
    size = struct.unpack("<Q", raw[:8])[0]
    if kind == "bytes":
        path.write_bytes(damaged_bytes(raw, draw))
    elif kind == "length":
        path.write_bytes(
            struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, size + 1, 2**40, 2**64 - 1]))) + raw[8:]
        )
    elif kind == "header":
        header = retyped(raw[8 : 8 + size].decode(), draw).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    else:
        path.write_bytes(raw)
        with safe_open(path, "pt") as file:
            tensors, record = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        if kind == "tensor":
            name = draw(st.sampled_from(sorted(tensors)))
            new = damaged_tensor(tensors.pop(name), draw)
            tensors |= {} if new is None else {name: new}
        elif key := next(iter(set(record or ()) - {"format"}), None):
            record[key] = retyped(record[key], draw)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=record)


def damaged_tensor(tensor, draw):
    turns = [
        lambda t: None,
        lambda t: t[:1].clone(),
        lambda t: t[None].clone(),
        lambda t: t.flatten().clone(),
        lambda t: torch.cat([t, t]),
        lambda t: t.to(torch.int64) - 7,
        lambda t: t.to(torch.int64) + 10**12,
        lambda t: torch.full_like(t.float(), torch.nan),
        lambda t: t.to(torch.bool),
        lambda t: t.to(torch.float16),
        lambda t: torch.zeros(0),
        lambda t: torch.zeros(()),
    ]
    turn = draw(st.sampled_from(turns))
    return turn(tensor) if tensor.dim() else None


def damage(path: Path, draw) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = draw(st.sampled_from(files))
    raw = file.read_bytes()
    if draw(st.integers(0, 20)) == 0:
        file.unlink()
    elif file.suffix == ".safetensors":
        damaged_tensors(raw, file, draw)
    elif raw[:6] == b"SQLite":
        file.write_bytes(damaged_bytes(raw, draw))
    elif raw[:2] == b"\x1f\x8b":
        inner = draw(st.booleans())
        file.write_bytes(gzip.compress(damaged_text(gzip.decompress(raw), draw)) if inner else damaged_bytes(raw, draw))
    else:
        file.write_bytes(damaged_text(raw, draw))


@pytest.fixture(scope="module")
def valid(kit, tmp_path_factory):
    """valid(name): the place of a valid file or folder, written once."""
    made = {}

    def write(name):
        if name not in made:
            suffix = ".safetensors" if name in ("trace", "neuron map", "filter traces") else ""
            made[name] = tmp_path_factory.mktemp("valid") / f"file{suffix}"
            READERS[name][0](kit, made[name])
        return made[name]

    return write


@pytest.mark.parametrize("name", READERS)
def test_what_was_written_is_read(name, kit, valid):
    READERS[name][1](kit, valid(name))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_rightly_or_refused(name, kit, valid, tmp_path):
    source, read = valid(name), READERS[name][1]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def attempt(data):
        place = tmp_path / source.name
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)
        damage(place, data.draw)
        try:
            read(kit, place)
        except InputError as error:
            assert str(error).strip() and "\n" not in str(error)

    attempt()


NO_FILES = [(name, place) for name in READERS for place in ("missing", "folder", "nul\0")]
NO_FILES.remove(("run store", "missing"))  # it is made


@pytest.mark.parametrize(("name", "place"), NO_FILES)
def test_what_is_no_file_is_refused(name, place, kit, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError):
        READERS[name][1](kit, tmp_path / place)
