"""The plug-in of vLLM, through hand-made stand-ins of both its interfaces, and with vLLM itself."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tokenry import InputError
from tokenry.decode import Antislop, BudgetForcing, CyclicReflex, generate, triangular_wave
from tokenry.serve.vllm_plugin import TokenryLogitsProcessor

V = 320
REFLECT, END = [70, 75], 5
PERIOD, AMPLITUDE = 8, 4.0


# --- what vLLM gives -----------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    tokenizer: str
    tokenizer_revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class VllmConfig:
    model_config: ModelConfig


@dataclass
class SamplingParams:
    extra_args: dict[str, Any] | None = None


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list = field(default_factory=list)
    added: list = field(default_factory=list)
    moved: list = field(default_factory=list)


@dataclass
class Buffer:
    """A buffer of the V2 runner: the same numbers on the host and on the device."""

    gpu: torch.Tensor

    @property
    def np(self):
        return self.gpu.numpy()


@dataclass(frozen=True)
class RequestState:
    all_token_ids: Buffer
    prompt_len: Buffer


@dataclass(frozen=True)
class Context:
    expanded_idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    expanded_local_pos: torch.Tensor
    input_ids: torch.Tensor
    pos: torch.Tensor


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _no_engine():
    yield
    TokenryLogitsProcessor.config = None


def wave(**more):
    return SamplingParams(
        {
            "cyclicreflex": {
                "token_ids": REFLECT,
                "end_think": [END],
                "amplitude": AMPLITUDE,
                "period": PERIOD,
                **more,
            }
        }
    )


def v1(folder):
    return TokenryLogitsProcessor(VllmConfig(ModelConfig(folder)), torch.device("cpu"), False)


def v2(folder, slots=4, width=32):
    states = RequestState(
        Buffer(torch.zeros(slots, width, dtype=torch.int32)), Buffer(torch.zeros(slots, dtype=torch.int32))
    )
    return TokenryLogitsProcessor(VllmConfig(ModelConfig(folder)), states), states


def context(slots, positions, fed, drafted=None):
    tensors = [torch.tensor(values) for values in (slots, drafted or [0] * len(slots), fed, positions)]
    return Context(tensors[0], np.array(list(dict.fromkeys(slots))), *tensors[1:])


def bias_of(changed):
    """What was added to the reflection tokens of every row; nothing else has changed."""
    rest = [i for i in range(V) if i not in REFLECT]
    assert not changed[:, rest].any()
    assert torch.equal(changed[:, REFLECT[0]], changed[:, REFLECT[1]])
    return changed[:, REFLECT[0]].tolist()


def expected(*positions):
    return [float(triangular_wave(t, AMPLITUDE, PERIOD)) for t in positions]


# --- the V1 runner -------------------------------------------------------------------------------------------------


def test_rows_get_the_wave_at_their_own_position(folder):
    plugin = v1(folder)
    first, second = [], [9, 9]
    added = [(0, wave(), [1], first), (1, SamplingParams(), [1], [8]), (2, wave(), [1, 2], second)]
    plugin.update_state(BatchUpdate(3, added=added))
    for step in range(9):
        assert bias_of(plugin.apply(torch.zeros(3, V))) == [*expected(step), 0.0, *expected(2 + step)]
        first.append(9)
        second.append(9)
        plugin.update_state(None)


def test_rows_move_swap_and_leave(folder):
    plugin = v1(folder)
    added = [(i, wave(), [1], [9] * length) for i, length in enumerate([1, 2, 3])]
    plugin.update_state(BatchUpdate(3, added=added))
    plugin.update_state(BatchUpdate(3, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert bias_of(plugin.apply(torch.zeros(3, V))) == expected(2, 1, 3)
    plugin.update_state(BatchUpdate(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert bias_of(plugin.apply(torch.zeros(2, V))) == expected(3, 1)
    plugin.update_state(BatchUpdate(2, added=[(1, SamplingParams(), [1], [9])]))  # takes the place of another one
    assert bias_of(plugin.apply(torch.zeros(2, V))) == [*expected(3), 0.0]
    plugin.update_state(BatchUpdate(0, removed=[0, 1]))
    logits = torch.zeros(2, V)
    assert plugin.apply(logits) is logits and not logits.any()


def test_the_wave_ends_with_thinking_and_half_precision_stays(folder):
    plugin = v1(folder)
    plugin.update_state(BatchUpdate(2, added=[(0, wave(), [1], [9, END]), (1, wave(), [END], [9, 9])]))
    changed = plugin.apply(torch.zeros(2, V, dtype=torch.bfloat16))
    assert changed.dtype == torch.bfloat16 and bias_of(changed) == [0.0, *expected(2)]


def test_asked_for_by_name_and_by_entry_point_it_acts_once(folder):
    config = VllmConfig(ModelConfig(folder))
    logits = torch.zeros(1, V)
    for plugin in [TokenryLogitsProcessor(config, torch.device("cpu"), False) for _ in range(2)]:
        plugin.update_state(BatchUpdate(1, added=[(0, wave(), [1], [9, 9])]))
        plugin.apply(logits)
    assert bias_of(logits) == expected(2)


# --- the V2 runner -------------------------------------------------------------------------------------------------


def test_rows_find_their_slots_whatever_their_order(folder):
    plugin, states = v2(folder)
    states.prompt_len.gpu[:] = torch.tensor([3, 1, 5, 2])
    assert plugin.add_request(0, wave()) and plugin.add_request(3, wave()) and not plugin.add_request(1, wave_free())
    changed = plugin.apply(torch.zeros(3, V), context([3, 1, 0], [3, 4, 3], [9, 9, 9]))
    assert bias_of(changed) == [expected(2)[0], 0.0, expected(1)[0]]
    changed = plugin.apply(torch.zeros(2, V), context([0, 3], [4, 1], [9, 9]))
    assert bias_of(changed) == expected(2, 0)
    logits = torch.zeros(1, V)
    assert plugin.apply(logits, context([1], [4], [9])) is logits and not logits.any()


def wave_free():
    return SamplingParams({"another": "plug-in"})


def test_a_slot_that_is_used_again_forgets_its_request(folder):
    plugin, states = v2(folder)
    states.prompt_len.gpu[:] = 1
    plugin.add_request(0, wave())
    assert not plugin.add_request(0, SamplingParams())
    assert not plugin.apply(torch.zeros(1, V), context([0], [2], [9])).any()
    plugin.add_request(0, wave(shift=0.5))
    assert bias_of(plugin.apply(torch.zeros(1, V), context([0], [2], [9]))) == [-value for value in expected(2)]


def test_drafts_are_part_of_what_is_generated(folder):
    plugin, states = v2(folder)
    states.prompt_len.gpu[:] = torch.tensor([2, 2, 3, 1])
    states.all_token_ids.gpu[0, :5] = torch.tensor([END, 1, 20, 21, 22])  # an end mark in the prompt does not count
    plugin.add_request(0, wave())
    # The request feeds its last token, at position 4, and two drafts, of which the second ends thinking.
    drafts = context([0, 0, 0, 1], [4, 5, 6, 7], [22, 30, END, 9], [0, 1, 2, 0])
    assert bias_of(plugin.apply(torch.zeros(4, V), drafts)) == [*expected(3, 4), 0.0, 0.0]


def test_drafts_restart_the_thoughts_of_tip(folder):
    plugin, states = v2(folder)
    states.prompt_len.gpu[:] = 2
    states.all_token_ids.gpu[0, :4] = torch.tensor([1, 1, 9, 9])
    tip = {"token_ids": REFLECT, "end_think": None, "alpha": 3.0, "beta": 3}
    plugin.add_request(0, SamplingParams({"tip": json.dumps(tip)}))
    fed = [9, 9, 9, REFLECT[0], 9]
    drafts = context([0] * 5, [3, 4, 5, 6, 7], fed, [0, 1, 2, 3, 4])
    # 2, 3, 4 tokens into the first thought; then a switch word is drafted, at the fifth place.
    assert bias_of(plugin.apply(torch.zeros(5, V), drafts)) == [-3.0, 0.0, 0.0, -3.0, -3.0]


def test_a_prompt_read_in_parts_and_its_last_part(folder):
    plugin, states = v2(folder)
    states.prompt_len.gpu[:] = 4
    plugin.add_request(0, wave(shift=0.25))
    assert bias_of(plugin.apply(torch.zeros(1, V), context([0], [2], [9]))) == [0.0]
    assert bias_of(plugin.apply(torch.zeros(1, V), context([0], [3], [9]))) == [AMPLITUDE]


# --- what a request may say ----------------------------------------------------------------------------------------


def test_options_as_json_and_by_themselves(folder):
    flat = {"cyclicreflex": "{}", "cyclicreflex.token_ids": REFLECT, "cyclicreflex.end_think": "5"}
    flat |= {"cyclicreflex.amplitude": 4, "cyclicreflex.period": "8"}
    plugin = v1(folder)
    plugin.update_state(BatchUpdate(2, added=[(0, SamplingParams(flat), [1], [9]), (1, wave(), [1], [9])]))
    assert bias_of(plugin.apply(torch.zeros(2, V))) == expected(1, 1)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cyclicreflex": '{"period": -8}'}, "period=-8 is not allowed"),
        ({"cyclicreflex.perod": 8}, "cyclicreflex has no option 'perod'"),
        ({"cyclicreflex": "{period: 8}"}, "is not JSON; give an object"),
        ({"cyclicreflex": "[1]"}, "give an object with its options"),
        ({"cyclicreflex": 3}, "give an object with its options"),
        ({"tip": '{"alpha": 1}', "tip.alpha": 2}, "'tip.alpha' is given twice"),
        ({"budget-forcing.min_ignores": -1}, "min_ignores=-1 is not allowed"),
        ({"antislop": '{"phrases": ["a"]}'}, "vLLM cannot run it; put `tokenry serve --server URL` in front"),
    ],
)
def test_a_wrong_request_is_refused_at_the_door(given, sentence):
    with pytest.raises(InputError, match=sentence.replace("[", r"\[")):
        TokenryLogitsProcessor.validate_params(SamplingParams(given))


def test_requests_of_others_pass():
    TokenryLogitsProcessor.validate_params(SamplingParams())
    TokenryLogitsProcessor.validate_params(SamplingParams({"kv_transfer_params": {}, "tips": 1}))


def test_in_the_process_of_the_model_words_are_looked_up_at_the_door(folder):
    v1(folder)
    with pytest.raises(InputError, match="is not one token here"):
        TokenryLogitsProcessor.validate_params(SamplingParams({"cyclicreflex": '{"words": ["serendipity"]}'}))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"words": ["serendipity"]}, "is not one token here"), ({"token_ids": [V], "end_think": None}, "outside")],
)
def test_a_request_that_turns_out_wrong_ends_alone(folder, tokenizer, caplog, options, sentence):
    plugin = v1(folder)
    wrong = SamplingParams({"cyclicreflex": options})
    with caplog.at_level(logging.ERROR):
        plugin.update_state(BatchUpdate(2, added=[(0, wrong, [1], [9]), (1, wave(), [1], [9])]))
        changed = plugin.apply(torch.zeros(2, V))
        plugin.apply(torch.zeros(2, V))
    assert caplog.text.count(sentence) == 1
    assert changed[0].isfinite().nonzero().tolist() == [[tokenizer.eos_token_id or 0]]
    assert bias_of(changed[1:]) == expected(1)


def test_tokens_that_vllm_keeps_to_itself_end_a_request(folder, caplog):
    plugin = v1(folder)
    plugin.update_state(BatchUpdate(1, added=[(0, wave(), [1], [9, -1])]))
    assert plugin.apply(torch.zeros(1, V)).isfinite().sum() == 1
    assert "--no-async-scheduling" in caplog.text


# --- budget forcing, which cannot take anything back here ----------------------------------------------------------


def written(model, processor, prompt, tokens):
    return model.generate(
        torch.tensor([prompt]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        logits_processor=processor,
    )[0, len(prompt) :].tolist()


@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_budget_forcing_is_that_of_the_loop(make_model, tokenizer, seed, limit):
    model = make_model("llama")
    prompt = torch.randint(10, V, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    plain = written(model, [], prompt, 24)
    end = plain[4]  # what it would write there ends thinking
    word = next(w for w in "abcdefgh" if tokenizer.encode(w)[0] not in plain)
    forcing = BudgetForcing(end_think=(end,), ignore_text=word, max_thinking_tokens=limit, close_text=" the end")
    inputs = {"input_ids": torch.tensor([prompt])}
    looped = generate(model, tokenizer, inputs, methods=[forcing], max_new_tokens=24, do_sample=False)
    ids = looped.new_ids[0]
    own = ids.count(tokenizer.encode(word)[0]) - sum(event.rule == "budget:ignore" for event in looped.events)
    assert own == 0, "the model wrote the word by itself; choose another seed"
    assert any(event.rule == "budget:ignore" for event in looped.events)
    assert written(model, [forcing.processor(tokenizer)], prompt, 24)[: len(ids)] == ids


def test_budget_forcing_in_a_batch_of_vllm(folder, tokenizer):
    word, end = tokenizer.encode("a")[0], END
    asked = {"end_think": [end], "ignore_text": "a", "max_thinking_tokens": 4, "close_text": "b"}
    plugin = v1(folder)
    rows = [[9], [9, word], [9, word, 9], [9, word, 9, 9], [9, word, 9, 9, tokenizer.encode("b")[0]], [9, word, end, 9]]
    added = [(i, SamplingParams({"budget-forcing": asked}), [1], ids) for i, ids in enumerate(rows)]
    plugin.update_state(BatchUpdate(len(rows), added=added))
    logits = torch.zeros(len(rows), V)
    logits[:, end] = 7.0
    changed = plugin.apply(logits.clone())
    ignored, again, free, closing = changed[0], changed[1], changed[2], changed[3]
    assert ignored[end] == -torch.inf and ignored[word] == 7
    assert again[end] == -torch.inf and again[word] == 0
    assert torch.equal(free, logits[2]) and torch.equal(changed[5], logits[5])
    assert len(closing.isfinite().nonzero()) == 1


@pytest.mark.parametrize("options", [{"end_think": (5, 6)}, {"ignore_text": "the sea", "end_think": (5,)}])
def test_a_mark_or_word_of_several_tokens_needs_the_loop(tokenizer, options):
    with pytest.raises(InputError, match="as a logits processor give one that is a token"):
        BudgetForcing(**options).processor(tokenizer)


def test_without_a_tokenizer_budget_forcing_is_no_processor():
    with pytest.raises(InputError, match=r"write BudgetForcing\(...\).processor\(tokenizer\)"):
        BudgetForcing().processor()


# --- vLLM ----------------------------------------------------------------------------------------------------------


def test_importing_it_is_light():
    heavy = {"torch", "transformers", "numpy"}
    assert imported("import tokenry.serve.vllm_plugin") & heavy == set()


def test_its_methods_need_nothing_of_the_models():
    """vLLM comes with a version of transformers of its own."""
    asked = {"cyclicreflex": "{}", "tip": "{}", "budget-forcing": "{}"}
    code = f"""
from types import SimpleNamespace as Space
from tokenry.serve.vllm_plugin import TokenryLogitsProcessor
TokenryLogitsProcessor.validate_params(Space(extra_args={asked}))
"""
    found = {name for name in imported(code) if name.startswith("tokenry.")}
    assert "tokenry.decode.budget_forcing" in found and not {n for n in found if n.startswith("tokenry.models")}


def test_a_method_whose_packages_are_not_there_is_refused_too():
    code = """
import sys
sys.modules["ahocorasick"] = None
from types import SimpleNamespace as Space
from tokenry.serve.vllm_plugin import TokenryLogitsProcessor
try:
    TokenryLogitsProcessor.validate_params(Space(extra_args={"antislop": "{}"}))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vLLM cannot run it" in done.stdout


def imported(code):
    """The modules of a new process that has run this."""
    code += "\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


REAL = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

def ids(outputs):
    return [list(o.outputs[0].token_ids) for o in outputs]

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=512, enforce_eager=True, max_num_seqs=4,
        distributed_executor_backend="uni", logits_processors=["tokenry.serve.vllm_plugin:TokenryLogitsProcessor"])
    prompts = ["The lighthouse stood", "Once upon a time"]
    def run(*extra):
        params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, extra_args=e) for e in extra]
        return ids(llm.generate(prompts, params, use_tqdm=False))
    asked = json.loads(sys.argv[2])
    found = {"plain": run(None, None), "mixed": run(asked, None), "flat": run({"cyclicreflex.amplitude": 0,
        "cyclicreflex.end_think": "none", "cyclicreflex.token_ids": [260]}, None)}
    found["prompts"] = [llm.get_tokenizer().encode(p) for p in prompts]
    found["refused"] = []
    for wrong in ({"cyclicreflex.period": -8}, {"cyclicreflex": "{}"}):
        try:
            run(wrong, None)
        except VLLMValidationError as error:
            found["refused"].append(str(error))
    print("FOUND", json.dumps(found))
"""


WAVE = {"token_ids": [260, 28, 30], "end_think": None, "amplitude": 30.0, "period": 8}


@pytest.fixture
def python():
    """`VLLM_PYTHON` is the interpreter of an environment with vLLM; tokenry's own need not be there."""
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip("VLLM_PYTHON names no interpreter of an environment with vLLM")
    return os.environ["VLLM_PYTHON"]


@pytest.fixture
def weights(smollm2, tmp_path):
    """The embedded model, as vLLM reads it."""
    for part in smollm2:
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def surroundings(**settings):
    source = str(Path(__file__).parents[2] / "src")
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "PYTHONPATH": source, **settings}


@pytest.mark.slow
def test_in_vllm_itself(python, weights, smollm2, tmp_path):
    model, tokenizer = smollm2
    (tmp_path / "run.py").write_text(REAL)
    command = [python, str(tmp_path / "run.py"), weights, json.dumps({"cyclicreflex": WAVE})]
    one_process = surroundings(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    done = subprocess.run(command, capture_output=True, text=True, env=one_process, timeout=540)
    assert "FOUND" in done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND", 1)[1])
    assert found["flat"] == found["plain"] and found["mixed"][1] == found["plain"][1]
    assert found["mixed"][0] != found["plain"][0]
    wave = CyclicReflex(**WAVE)
    assert written(model, [wave.processor(tokenizer)], found["prompts"][0], 24) == found["mixed"][0]
    assert "period=-8 is not allowed" in found["refused"][0]
    assert "is not in this vocabulary" in found["refused"][1]


STARTS = 300  # seconds that vLLM may take


@contextmanager
def vllm_server(python, weights, log):
    """The address of vLLM's own server, with the class inside it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", "smollm2"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "4"]
    command += ["--logits-processors", "tokenry.serve.vllm_plugin:TokenryLogitsProcessor", "--port", str(port)]
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=surroundings(), start_new_session=True)
    try:
        until = time.monotonic() + STARTS
        while True:
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            with suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with the engine that it has started
        server.wait()


@contextmanager
def proxy(url, weights):
    """The address of tokenry's server in front of another one."""
    command = [sys.executable, "-m", "tokenry", "serve", "--server", url, "--tokenizer", weights, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_antislop_in_front_of_vllm(python, weights, smollm2, tmp_path):
    """The two commands of docs/vllm.md: the text is that of the same method on the same weights."""
    prompt, phrases = "Once upon a time, there was", ["a young", "named", "little girl", "small village", "curious"]
    asked = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "model": "smollm2"}
    with vllm_server(python, weights, tmp_path / "vllm.log") as url, proxy(url, weights) as front:

        def text(where, **more):
            answer = httpx.post(f"{where}/v1/completions", json={**asked, **more}, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        def streamed(**more):
            with httpx.stream("POST", f"{front}/v1/completions", json={**asked, **more, "stream": True}) as answer:
                lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
            return "".join(line["choices"][0]["text"] for line in lines)

        plain, passed_on, banned = text(url), text(front), text(front, banned_strings=phrases)
        assert streamed(banned_strings=phrases) == banned
        waved = text(url, vllm_xargs={"cyclicreflex": json.dumps(WAVE)})
    local = {"max_new_tokens": 40, "chat": False}
    assert passed_on == plain == generate(*smollm2, prompt, **local).texts[0]
    assert banned == generate(*smollm2, prompt, methods=[Antislop(phrases=phrases)], **local).texts[0] != plain
    assert [phrase for phrase in phrases if phrase in plain.lower()]
    assert not [phrase for phrase in phrases if phrase in banned.lower()]
    assert waved != plain
