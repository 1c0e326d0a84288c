"""Files of a checkpoint are another's: they run no code, are complete, and where they are broken a sentence says so."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import tokenry
from tokenry import load
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.decode import loop
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.models.masks import make_bidirectional, sees_both_sides
from tokenry.represent import TokenPrepending
from tokenry.represent.text.sentence_transformer import TokenPrependingTransformer
from tokenry.tokenize import load_tokenizer

SOURCE = Path(tokenry.__file__).parent


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A complete folder, of a tiny Llama."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=64, eos_token_id=0, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- code ----------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import {imports}
Path({marker!r}).touch()
class Config(LlamaConfig): model_type = "own"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def trojan(folder):
    """A folder whose model and tokenizer are classes of its own; the marker appears where their code runs."""
    marker = folder.parent / "ran"
    imports = "LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast"
    (folder / "own.py").write_text(CODE.format(imports=imports, marker=str(marker)))
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(folder / "config.json", model_type="own", auto_map=classes)
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]})
    return folder, marker


def by_name_or_path(folder):
    """The loop looks for the tokenizer beside the model, where it is given none."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=320))
    model.name_or_path = str(folder)
    model.generate(torch.tensor([[5, 6]]), custom_generate=loop, stop=["."], max_new_tokens=1, pad_token_id=1)


def sentence_transformer(folder):
    (folder / TokenPrependingTransformer.config_file_name).write_text(json.dumps({"token_prepending": None}))
    TokenPrependingTransformer.load(str(folder), trust_remote_code=True)  # which is about the class, see its docstring


DOORS = [load, load_tokenizer, by_name_or_path, sentence_transformer]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_code_of_a_checkpoint_does_not_run_whoever_says_yes(door, trojan, monkeypatch):
    folder, marker = trojan
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 50))
    with pytest.raises(InputError, match=r"Python code of its own, which is not run.*--trust-remote-code"):
        door(folder)
    assert not marker.exists()


VERBS = {
    "decode": ["decode", "--model", "FOLDER", "--max-new-tokens", "2", "the sea"],
    "represent": ["represent", "--model", "FOLDER", "LINES", "--output", "OUTPUT"],
    "tokenize": ["tokenize", "encode", "--tokenizer", "FOLDER", "the sea"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_option_is_the_only_way(verb, trojan, tmp_path):
    folder, marker = trojan
    lines = tmp_path / "lines.txt"
    lines.write_text("the sea\n")
    places = {"FOLDER": str(folder), "LINES": str(lines), "OUTPUT": str(tmp_path / "vectors.npy")}
    command = [places.get(word, word) for word in VERBS[verb]]
    refused = CliRunner().invoke(main, command, input="yes\n" * 50)
    assert refused.exit_code == 2 and "--trust-remote-code" in refused.stderr and not marker.exists()
    assert len(refused.stderr.strip().splitlines()) == 1
    done = CliRunner().invoke(main, [*command, "--trust-remote-code"])
    assert done.exit_code == 0 and marker.exists(), done.output


def loaders(tree):
    """The calls of a file that may load a class from a checkpoint, with the arguments that they name."""
    modules = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        kind, _, method = name.rpartition(".")
        of_transformers = modules.get(kind, "").split(".")[0] in ("transformers", "sentence_transformers")
        if (method in ("from_pretrained", "from_config") and of_transformers) or name == "SentenceTransformer":
            yield call.lineno, {keyword.arg for keyword in call.keywords}


def test_every_loader_says_whether_it_trusts():
    found = [
        (file.relative_to(SOURCE), line, given)
        for file in SOURCE.rglob("*.py")
        for line, given in loaders(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert len(found) >= 5 and [call for call in found if "trust_remote_code" not in call[2]] == []


# --- weights -------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def reweigh(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda w: w.pop(UP), f"it lacks {UP}"),
        (lambda w: w.clear(), "it lacks lm_head.weight, .* and 18 more"),
        (lambda w: w.pop("lm_head.weight"), "it lacks lm_head.weight"),
        (lambda w: w.update({UP: w[UP].T.contiguous()}), rf"another shape has {UP} \(16, 24\) for \(24, 16\)"),
        (lambda w: w.update(extra=torch.zeros(2)), "unknown is extra"),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": w[UP].clone()}), "unknown is model.layers.2.mlp"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(edit, said, folder):
    reweigh(folder, edit)
    with pytest.raises(InputError, match=said):
        load(folder)
    (folder / TokenPrependingTransformer.config_file_name).write_text(json.dumps({"token_prepending": None}))
    with pytest.raises(InputError, match=said):
        TokenPrependingTransformer.load(str(folder))


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda w: w.pop("model.transformer.ln_f.weight"), "it lacks model.norm.weight"),
        (
            lambda w: w.update({"model.transformer.wte.weight": torch.zeros(3, 8)}),
            "another shape has model.embed_tokens",
        ),
    ],
)
def test_weights_of_denoisers_are_refused_by_name(edit, said, folder):
    sizes = {"d_model": 8, "mlp_hidden_size": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 320}
    tokens = {"eos_token_id": 0, "pad_token_id": 1, "mask_token_id": 2}
    more = {"max_sequence_length": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", **sizes, **tokens, **more}))
    names = [f"blocks.0.{part}" for part in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")]
    weights = {f"model.transformer.{name}.weight": torch.zeros(8, 8) for name in names}
    weights |= {
        f"model.transformer.{n}.weight": torch.ones(8) for n in ("blocks.0.attn_norm", "blocks.0.ff_norm", "ln_f")
    }
    weights |= {f"model.transformer.{n}.weight": torch.zeros(320, 8) for n in ("wte", "ff_out")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).model.config.mask_token_id == 2
    reweigh(folder, edit)
    with pytest.raises(InputError, match=said):
        load(folder)


def test_tied_weights_and_masks_of_old_checkpoints_are_not_missed(folder):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2, eos_token_id=0))
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    reweigh(folder, lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(load(folder).model(ids).logits, model.eval()(ids).logits)


# --- kinds of models -----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 320, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
ENCODERS = (
    "bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm "
    "roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_known_and_its_decoder_is_not(kind):
    """As measured: whether the first position changes with the last one."""
    for decodes in (False, True):
        extra = {"languages": ["en_XX"], "default_language": "en_XX"} if kind == "xmod" else {}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SMALL, **extra, is_decoder=decodes)
        ).eval()
        ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        with torch.no_grad():
            first = model(ids).logits[:, 0]
        assert sees_both_sides(model) == (not decodes) == (not torch.equal(first[0], first[1]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
def test_causal_models_see_one_side(kind, make_model):
    assert not sees_both_sides(make_model(kind))


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertModel])
def test_an_encoder_is_not_loaded_as_a_causal_model(cls, folder):
    cls(BertConfig(**SMALL)).save_pretrained(folder)
    with pytest.raises(InputError, match="BertLMHeadModel whose tokens see both sides"):
        load(folder)


def test_what_needs_a_causal_model_refuses_others(tokenizer):
    bert = AutoModelForCausalLM.from_config(BertConfig(**SMALL))
    denoiser = make_bidirectional(LlamaForCausalLM(LlamaConfig(**SMALL)))
    for model in (bert, denoiser):
        with pytest.raises(InputError, match="is bidirectional"):
            TokenPrepending().encoder(model, tokenizer)
        with pytest.raises(InputError, match="is bidirectional"):
            DeadEndValueModel(model)
        with pytest.raises(InputError, match="sees both sides"):
            tokenry.generate(model, tokenizer, "the sea", max_new_tokens=1)


# --- broken files --------------------------------------------------------------------------------------------------


WHOLE = [
    "[]",
    "null",
    "3",
    '"x"',
    "",
    "{",
    "[" * 10_000,
    '{"a":' * 10_000,
    "\udcff",
    "{}",
    '{"a": ' * 80 + "1" + "}" * 80,
]
JUNK = [None, True, False, 0, -1, 3, 2.5, 1e308, float("nan"), 10**30, "", "x", [], [1], ["x"], {}, {"a": 1}]
JSONS = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def refused_or_right(folder, saved):
    """Whether a folder loads. A refusal is one sentence; what is loaded has the weights and can be used."""
    try:
        model, tokenizer = load(folder)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return False
    kept = load_file(saved / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in model.state_dict().items() if name in kept)
    assert isinstance(tokenizer.encode("the sea"), list) and isinstance(tokenizer.decode([5, 6]), str)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, 320) and torch.isfinite(logits).all()
    return True


@pytest.mark.parametrize("text", WHOLE, ids=range(len(WHOLE)))
@pytest.mark.parametrize("file", JSONS)
def test_a_file_that_is_something_else(file, text, folder, saved):
    (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
    loads = refused_or_right(folder, saved)
    assert not (loads and file == "config.json")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [None, -4, 0, 1.5, True, "16", [], 3, 10**6, 2**31, 10**30])
def test_sizes(name, value, folder, saved):
    change(folder / "config.json", **{name: value})
    loads = refused_or_right(folder, saved)
    assert not loads or (name == "head_dim" and value is None)


def places(value, path=()):
    """The paths to everything inside a JSON value, big tables by their first entries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inside)[:24]:
        yield (*path, key)
        yield from places(part, (*path, key))


def replaced(value, path, new):
    """`value` with `new` at the path; with nothing there for `...`."""
    key, *rest = path
    if rest:
        value[key] = replaced(value[key], rest, new)
    elif new is ...:
        del value[key]
    else:
        value[key] = new
    return value


@given(st.sampled_from(JSONS), st.randoms(use_true_random=False), st.sampled_from([*JUNK, ...]))
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_field_may_be_wrong(saved, tmp_path_factory, file, random, value):
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / "copy"))
    content = json.loads((folder / file).read_text())
    path = random.choice(list(places(content)))
    (folder / file).write_text(json.dumps(replaced(content, path, value)))
    refused_or_right(folder, saved)
    shutil.rmtree(folder)


@given(st.sampled_from([*JSONS, "model.safetensors"]), st.floats(0, 1), st.sampled_from([None, 0, 34, 92, 123, 255]))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_byte_may_be_wrong(saved, tmp_path_factory, file, where, byte):
    """A file that ends early (None), or with one byte of its first thousand changed."""
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / "copy"))
    content = bytearray((folder / file).read_bytes())
    if byte is None:
        content = content[: int(where * (len(content) - 1))]
    else:
        content[int(where * min(len(content) - 1, 1000))] = byte
    (folder / file).write_bytes(content)
    refused_or_right(folder, saved)
    shutil.rmtree(folder)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, b"\x10" + b"\0" * 7, (10**9).to_bytes(8, "little") + b"{}"])
def test_headers_of_safetensors(header, folder):
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(InputError, match=r"cannot be loaded|too few"):
        load(folder)
