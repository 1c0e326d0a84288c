"""The remote engine: the same texts and repairs as the local loop, and what servers can do wrong."""

import json
import threading
import time

import pytest
from click.testing import CliRunner
from support.completions_server import completions_server
from support.gguf_files import save_gguf
from support.llama_server import llama_server
from support.writer import writer

from tokenry import InputError
from tokenry.cli import main
from tokenry.decode import Antislop, BudgetForcing, CyclicReflex, RemoteServer, generate, remote
from tokenry.decode.engines.remote import client
from tokenry.decode.engines.remote.dialects import TextOnly, _placed
from tokenry.decode.engines.remote.loop import STREAMED

PROMPTS = ["the old lighthouse", "The keeper", "It was not"]
BANS = Antislop(
    phrases=["the sea", "a whisper", "seemed to", "testament to", "along the shore"],
    regexes=["elara.{0,9}"],
    max_span=20,
)
CALL = {"methods": [BANS], "max_new_tokens": 48}


@pytest.fixture(scope="module")
def model(tokenizer):
    return writer(tokenizer)


@pytest.fixture(scope="module")
def vllm(model, tokenizer):
    with completions_server(model, tokenizer) as server:
        yield server


@pytest.fixture
def served(model, tokenizer):
    """A server of this test's own, and it as it is seen from here."""
    with completions_server(model, tokenizer) as server, RemoteServer(server.url, timeout=5, retries=2) as seen:
        seen.dialect(tokenizer)
        server.requests.clear()
        yield server, seen


@pytest.fixture
def streaming(model, tokenizer):
    """As `served`, with a server that tells each token as it is written."""
    with (
        completions_server(model, tokenizer, streams=True) as server,
        RemoteServer(server.url, timeout=5, retries=2) as seen,
    ):
        seen.dialect(tokenizer)
        assert seen.streams
        server.requests.clear()
        server.sent = 0
        yield server, seen


@pytest.fixture(scope="module")
def servers(vllm, model, tokenizer, tmp_path_factory):
    path = save_gguf(model, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with llama_server(path) as llama:
        yield {"vllm": vllm.url, "llama.cpp": llama}


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def repairs(output):
    fields = ("row", "index", "kind", "rule", "rejected", "rejected_text", "replacement", "context_ids")
    return sorted([getattr(event, name) for name in fields] for event in output.events)


# --- the same as here ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("repair", ["ask", "local"])
@pytest.mark.parametrize("chunk", [4, 8, 32, None])
def test_greedy_texts_and_repairs_are_those_of_the_local_loop(servers, model, tokenizer, name, repair, chunk):
    here = generate(model, tokenizer, PROMPTS, **CALL)
    assert len(here.events) >= 8 and any(len(event.rejected) > 1 for event in here.events)
    with RemoteServer(servers[name]) as server:
        there = remote(server, tokenizer, PROMPTS, chunk=chunk, repair=repair, **CALL)
        assert server.dialect(tokenizer).name == name and server.streams == (name == "llama.cpp")
    assert there.new_ids == here.new_ids and there.texts == here.texts
    assert repairs(there) == repairs(here) and there.stop_reasons == here.stop_reasons
    new = sum(map(len, there.new_ids))
    asked = len(there.events) if repair == "ask" else 0
    assert there.stats.written - there.stats.wasted + (len(there.events) - asked) == new
    assert there.stats.requests >= new / (chunk or (STREAMED if server.streams else 10)) + asked


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("strength", [0.01, 0.5])
def test_soft_bans_keep_and_lower_as_here(servers, model, tokenizer, name, strength):
    soft = Antislop(phrases=["the sea", "a whisper", "stood on"], strength=strength)
    here = generate(model, tokenizer, PROMPTS[0], methods=[soft], max_new_tokens=40)
    for repair in ("ask", "local"):
        there = remote(servers[name], tokenizer, PROMPTS[0], methods=[soft], max_new_tokens=40, repair=repair)
        assert there.new_ids == here.new_ids and repairs(there) == repairs(here)
    assert {event.kind for event in here.events} == ({"kept"} if strength < 0.1 else {"rewind"})


def test_candidates_are_the_probabilities_after_the_repair(vllm, model, tokenizer):
    here, there = (
        call(tokenizer, PROMPTS[0], methods=[Antislop(phrases=["the sea"])], max_new_tokens=30)
        for call in (lambda *a, **k: generate(model, *a, **k), lambda *a, **k: remote(vllm.url, *a, **k))
    )
    for one, other in zip(here.events, there.events, strict=True):
        assert [token for token, _ in other.candidates] == [token for token, _ in one.candidates][:19]
        for (_, wanted), (_, got) in zip(one.candidates, other.candidates):
            assert got == pytest.approx(wanted, rel=0.35) and got >= wanted - 1e-6  # of those told alone
    assert there.pairs[0]["chosen"] == here.pairs[0]["chosen"]


def test_forced_text_budgets_and_stop_strings_are_as_here(servers, model, tokenizer):
    wait = BudgetForcing(end_think=" was", min_ignores=1, ignore_text=" Wait,", max_thinking_tokens=30, close_text="!")
    for methods, stop in (([wait], ()), ([], "sound of"), ([BANS], "keeper")):
        call = {"methods": methods, "stop": stop, "max_new_tokens": 48}
        here = generate(model, tokenizer, PROMPTS[0], **call)
        for url in servers.values():
            there = remote(url, tokenizer, PROMPTS[0], **call)
            assert there.new_ids == here.new_ids and repairs(there) == repairs(here)
            assert there.stop_reasons == here.stop_reasons
    assert here.stop_reasons == ["finished"] and here.texts[0].endswith("keeper")


def test_a_text_ends_where_the_server_ends_it(servers, model, tokenizer):
    lengths, end = set(), tokenizer.eos_token_id
    for bias in (8.0, 10.0, 12.0, 14.0, 40.0):
        here = generate(model, tokenizer, PROMPTS[2], sequence_bias={(end,): bias}, max_new_tokens=30)
        lengths |= {len(here.new_ids[0])} if here.new_ids[0][-1] == end else set()
        for url in servers.values():
            there = remote(url, tokenizer, PROMPTS[2], logit_bias={end: bias}, max_new_tokens=30)
            assert there.new_ids == here.new_ids and there.stop_reasons == here.stop_reasons
    assert 1 in lengths and any(1 < length < 30 for length in lengths)


def test_half_characters_are_not_lost(servers, model, tokenizer):
    ids = generate(model, tokenizer, PROMPTS[2], max_new_tokens=40).new_ids
    assert any("�" in tokenizer.decode([token]) for token in ids[0]) and "Café, naïve" in tokenizer.decode(ids[0])
    for url in servers.values():
        for chunk in (1, 8):
            assert remote(url, tokenizer, PROMPTS[2], max_new_tokens=40, chunk=chunk).new_ids == ids


def test_told_tokens_are_placed_only_where_that_is_certain():
    one, other = {7: -0.1}, {8: -0.2}
    assert _placed([7, 8], [(7, one), (8, other)]) == [one, other]
    assert _placed([5, 7, 8], [(7, one), (8, other)]) == [{}, one, other]
    assert _placed([7, 7, 8], [(7, one), (8, other)]) == [{}, {}, other]
    with pytest.raises(ValueError):
        _placed([5, 6], [(7, one)])


# --- text alone ------------------------------------------------------------------------------------------------------


def test_a_server_that_tells_text_alone(model, tokenizer):
    here = generate(model, tokenizer, PROMPTS, **CALL)
    with completions_server(model, tokenizer, tells_ids=False) as server:
        with pytest.warns(UserWarning, match="text alone"):
            there = remote(server.url, tokenizer, PROMPTS, **CALL)
        assert there.texts == here.texts
        assert [event.rule for event in there.events if event.row == 0] == [e.rule for e in here.events if e.row == 0]
        assert all(isinstance(body["prompt"], str) for body in server.requests[1:])
        assert not any({"top_k", "min_p", "repetition_penalty"} & set(body) for body in server.requests[1:])
        with pytest.raises(InputError, match="repair='local' needs token ids"):
            remote(server.url, tokenizer, PROMPTS, repair="local", **CALL)


def test_text_goes_on_in_the_tokens_of_its_middle(tokenizer):
    dialect = TextOnly(tokenizer)
    for text in (" sound of the sea", "\n\nThe", "ouse", "é", ""):
        ids = dialect.continued(text)
        assert tokenizer.decode(ids) == text


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", ["ask", "local"])
def test_a_seed_fixes_the_requests(vllm, tokenizer, repair):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 30, "repair": repair, **CALL}
    first, again, other = (remote(vllm.url, tokenizer, PROMPTS[0], seed=seed, **options) for seed in (1, 1, 2))
    assert first.new_ids == again.new_ids != other.new_ids
    assert not any(phrase in text for phrase in BANS.phrases for text in (*first.texts, *other.texts))


def test_sampling_is_said_in_full(served, tokenizer):
    server, seen = served
    remote(seen, tokenizer, PROMPTS[0], do_sample=True, seed=3, max_new_tokens=20, chunk=8)
    seeds = [body["seed"] for body in server.requests]
    assert len(set(seeds)) == len(seeds) == 3
    said = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(said.items() <= body.items() for body in server.requests)
    server.requests.clear()
    remote(seen, tokenizer, PROMPTS[0], temperature=2.0, seed=3, max_new_tokens=8)
    assert server.requests[0]["temperature"] == 0 and "seed" not in server.requests[0]


def test_logit_bias_holds_everywhere_and_for_repairs(served, model, tokenizer):
    server, seen = served
    plain = generate(model, tokenizer, PROMPTS[0], **CALL).new_ids[0]
    late = max(set(plain), key=plain.index)
    here = generate(model, tokenizer, PROMPTS[0], sequence_bias={(late,): -50.0}, **CALL)
    there = remote(seen, tokenizer, PROMPTS[0], logit_bias={late: -50.0}, **CALL)
    assert there.new_ids == here.new_ids and late not in there.new_ids[0] and there.events
    assert all(body["logit_bias"][str(late)] == -50.0 for body in server.requests)


def test_chunks_are_short_where_something_was_found(served, tokenizer):
    server, seen = served
    out = remote(seen, tokenizer, PROMPTS[0], repair="local", **CALL)
    sizes = [body["max_tokens"] for body in server.requests]
    assert sizes[0] == 6 and out.events and set(sizes[:-1]) == {6, 10}
    server.requests.clear()
    remote(seen, tokenizer, PROMPTS[0], max_new_tokens=48)
    assert [body["max_tokens"] for body in server.requests] == [6, 6, 10, 10, 10, 6]


# --- requests that are closed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", ["ask", "local"])
def test_a_request_is_closed_at_the_first_violation(streaming, model, tokenizer, repair):
    """One request for each stretch without one, of which the server writes hardly more than is kept."""
    server, seen = streaming
    server.pause = 0.02
    here = generate(model, tokenizer, PROMPTS[0], **CALL)
    there = remote(seen, tokenizer, PROMPTS[0], repair=repair, **CALL)
    assert there.new_ids == here.new_ids and repairs(there) == repairs(here) and len(here.events) > 2
    asked = len(here.events) if repair == "ask" else 0
    assert there.stats.requests == len(server.requests) <= 1 + len(here.events) + asked
    gone, new = sum(len(event.rejected) for event in here.events), len(here.new_ids[0])
    assert server.gone >= len(here.events) - 1 and server.sent <= new + gone + 4 * len(here.events)
    assert server.requests[0]["stream"] and server.requests[0]["max_tokens"] == 48
    assert there.stats.written - there.stats.wasted + len(here.events) - asked == new


def test_a_soft_ban_that_changes_nothing_leaves_the_stream_open(streaming, model, tokenizer):
    _, seen = streaming
    soft = Antislop(phrases=["the sea", "a whisper", "stood on"], strength=0.01)
    here = generate(model, tokenizer, PROMPTS[0], methods=[soft], max_new_tokens=40)
    for repair, asked in (("local", 0), ("ask", len(here.events))):
        there = remote(seen, tokenizer, PROMPTS[0], methods=[soft], max_new_tokens=40, repair=repair)
        assert there.new_ids == here.new_ids and repairs(there) == repairs(here)
        assert there.stats.requests == 1 + asked and there.stats.wasted == 0


def test_a_stream_that_breaks_off_is_taken_up_again(streaming, model, tokenizer, monkeypatch):
    """What has come is kept, and the next request goes on from there."""
    server, seen = streaming
    whole = server.completion

    def shorter(body):
        answer = whole(body)
        answer["choices"][0]["token_ids"][9:] = []
        answer["choices"][0]["finish_reason"] = None
        return answer

    monkeypatch.setattr(server, "completion", shorter)
    there = remote(seen, tokenizer, PROMPTS[0], max_new_tokens=40)
    assert there.new_ids == generate(model, tokenizer, PROMPTS[0], max_new_tokens=40).new_ids
    assert [body["max_tokens"] for body in server.requests] == [40, 31, 22, 13, 4]


def test_an_error_in_a_stream_is_said_in_a_sentence(streaming, tokenizer):
    server, seen = streaming
    head = {"content-type": "text/event-stream"}
    for text, said in (
        ('data: {"error": {"message": "no\\nroom", "code": 500}}\n\n', "broke off: no room"),
        ("data: {\n\n", "answered no completion"),
        ("data: 3\n\n", "answered no completion"),
        ("", "wrote nothing"),
    ):
        server.faults += [(200, head, text)]
        with pytest.raises(InputError, match=said):
            remote(seen, tokenizer, PROMPTS[0], **CALL)


def test_a_cancelled_row_closes_its_stream(streaming, tokenizer):
    server, seen = streaming
    server.pause = 0.05
    loop = opened(seen, tokenizer, PROMPTS[:1])
    for settled in loop.steps():
        if settled[0]:
            loop.cancel(0)
    assert loop.output().stop_reasons == ["cancelled"] and len(loop.output().new_ids[0]) >= 1
    for _ in range(100):
        if server.gone:
            break
        time.sleep(0.02)
    assert server.gone == 1 and server.sent < 40


# --- streams and cancelling ------------------------------------------------------------------------------------------


class Reads:
    def __init__(self):
        self.ids, self.ended = [], 0

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streams_come_in_order_and_nothing_is_withdrawn(servers, tokenizer):
    for url in servers.values():
        readers = [Reads() for _ in PROMPTS]
        out = remote(url, tokenizer, PROMPTS, streamers=readers, **CALL)
        assert out.events
        for reader, prompt, ids in zip(readers, out.prompt_ids, out.new_ids):
            assert reader.ids[-len(ids) :] == ids and reader.ids[-len(ids) - len(prompt) : -len(ids)] == prompt
            assert reader.ended == 1
    unbounded = Antislop(regexes=["elara.*"])
    with pytest.raises(InputError, match="set max_span"):
        remote(servers["vllm"], tokenizer, PROMPTS[0], methods=[unbounded], streamers=[Reads()])


def opened(seen, tokenizer, prompts=PROMPTS, **options):
    from tokenry.decode import Plugins, RemoteLoop
    from tokenry.decode.engines.remote.api import job_for
    from tokenry.decode.engines.remote.dialects import Sampling

    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    job = job_for(seen, tokenizer, batch["input_ids"], batch["attention_mask"], Sampling(), max_new_tokens=48)
    return RemoteLoop(seen, job, tokenizer, Plugins(monitors=BANS.monitors()), **options)


def test_a_cancelled_row_stays_as_it_was_yielded(served, model, tokenizer):
    wanted = generate(model, tokenizer, PROMPTS, **CALL)
    loop, seen = opened(served[1], tokenizer), [[] for _ in PROMPTS]
    for settled in loop.steps():
        for ids, new in zip(seen, settled):
            ids += new
        if len(seen[1]) >= 8:
            loop.cancel(1)
    output = loop.output()
    assert output.new_ids == seen and output.stop_reasons == [
        wanted.stop_reasons[0],
        "cancelled",
        wanted.stop_reasons[2],
    ]
    assert seen[0] == wanted.new_ids[0] and seen[2] == wanted.new_ids[2]
    assert 8 <= len(seen[1]) < 48 and wanted.new_ids[1][: len(seen[1])] == seen[1]
    with pytest.raises(InputError, match="row 3 is not in this generation"):
        loop.cancel(3)
    with pytest.raises(InputError, match="has run"):
        next(loop.steps())


def test_cancelling_from_another_thread_closes_the_connection(served, tokenizer):
    server, seen = served
    server.faults += [20.0]
    loop = opened(seen, tokenizer, PROMPTS[:1])
    threading.Timer(0.2, loop.cancel, [0]).start()
    begun = time.monotonic()
    assert [row for settled in loop.steps() for row in settled[0]] == []
    assert loop.output().stop_reasons == ["cancelled"] and time.monotonic() - begun < 5
    for _ in range(100):
        if server.gone:
            break
        time.sleep(0.02)
    assert server.gone == 1


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [(429, {"retry-after": "0.05"}, "{}"), (429, {}, "{}"), (503, {}, "no"), (500, {}, "{}"), "drop"]
)
def test_a_server_that_fails_once_is_asked_again(served, model, tokenizer, fault):
    server, seen = served
    here = generate(model, tokenizer, PROMPTS[0], **CALL)
    server.faults += [fault, None, None, fault, fault]
    begun = time.monotonic()
    there = remote(seen, tokenizer, PROMPTS[0], **CALL)
    assert there.new_ids == here.new_ids and len(server.requests) == there.stats.requests + 3
    if isinstance(fault, tuple) and fault[1]:
        assert time.monotonic() - begun >= 0.15


@pytest.mark.parametrize(
    "faults, said",
    [
        ([(429, {}, '{"error": {"message": "too many"}}')] * 3, r"answers 429 \(too many\); try again later"),
        (["drop"] * 3, "cannot be reached"),
        ([(200, {}, "<html>")], "answered what is no JSON"),
        ([(200, {}, "[" * 100_000)], "answered what is no JSON"),
        ([(200, {}, "[]")], "answered a JSON list"),
        ([(200, {}, "{}")], "answered no completion"),
        ([(200, {}, '{"choices": []}')], "answered no completion"),
        ([(200, {}, '{"choices": [{"text": 3, "token_ids": ["a"]}]}')], "tokens that are none"),
        ([(200, {}, '{"choices": [{"text": "", "token_ids": [-4]}]}')], "tokens that are none"),
        ([(200, {}, '{"choices": [{"text": "", "token_ids": [], "finish_reason": "length"}]}')] * 9, "wrote nothing"),
        ([(400, {}, '{"error": {"message": "no\\nroom"}}')], r"refuses the request \(400\): no room"),
        ([(404, {}, '{"detail": "Not Found"}')], r"refuses the request \(404\): Not Found"),
        ([20.0], "gave no answer within 5 seconds"),
    ],
)
def test_what_a_server_does_wrong_is_said_in_a_sentence(served, tokenizer, faults, said):
    server, seen = served
    seen.http.timeout = seen.httpx.Timeout(0.3) if faults == [20.0] else seen.http.timeout
    server.faults += [None, *faults]
    reader = Reads()
    with pytest.raises(InputError, match=said) as caught:
        remote(seen, tokenizer, PROMPTS[0], streamers=[reader], **CALL)
    assert "\n" not in str(caught.value) and reader.ended == 1


def test_when_the_thread_of_the_requests_ends_nobody_waits(served, tokenizer):
    server, seen = served
    server.faults += [None, 20.0]
    threading.Timer(0.3, seen.events.call_soon_threadsafe, [exit]).start()
    for _ in range(2):
        with pytest.raises(InputError, match=r"can be asked no more, .* ended \(SystemExit\); open it again"):
            remote(seen, tokenizer, PROMPTS[0], **CALL)


@pytest.mark.parametrize("moment", ["before", "at once", "while it ends"])
def test_it_can_be_closed_whenever_its_thread_ends(served, tokenizer, monkeypatch, moment):
    server, _ = served
    ending = threading.Event()
    with RemoteServer(server.url) as seen:
        whole = seen._end

        async def slowly():
            ending.set()
            time.sleep(0.1)
            await whole()

        monkeypatch.setattr(seen, "_end", slowly)
        if moment != "before":
            seen.events.call_soon_threadsafe(exit)
        if moment == "while it ends":
            assert ending.wait(5)
        closing = threading.Thread(target=seen.close, daemon=True)
        closing.start()
        closing.join(5)
        assert not closing.is_alive() and not seen.thread.is_alive() and seen.events.is_closed()
    with pytest.raises(InputError, match="open it again"):
        remote(seen, tokenizer, PROMPTS[0], **CALL)


def test_a_server_without_logit_bias_is_found_out(served, tokenizer, monkeypatch):
    server, seen = served
    whole = server.completion
    monkeypatch.setattr(server, "completion", lambda body: whole({k: v for k, v in body.items() if k != "logit_bias"}))
    with pytest.raises(InputError, match="although logit_bias bans it"):
        remote(seen, tokenizer, PROMPTS[0], repair="ask", **CALL)


def test_models_keys_and_windows(model, tokenizer):
    with completions_server(model, tokenizer, key="secret", window=30) as server:
        with pytest.raises(InputError, match=r"wants another API key \(no such key\)"):
            remote(server.url, tokenizer, "the")
        with (
            RemoteServer(f"{server.url}/v1/", "huge", "secret") as seen,
            pytest.raises(InputError, match="`huge` does not"),
        ):
            remote(seen, tokenizer, "the")
        with RemoteServer(server.url, api_key="secret") as seen:
            out = remote(seen, tokenizer, PROMPTS[0], max_new_tokens=100, stop="NEVER")
            assert seen.model == "tiny" and seen.window == 30
            assert out.stop_reasons == ["context"] and len(out.new_ids[0]) + len(out.prompt_ids[0]) == 30
            with pytest.raises(InputError, match="the server's context window 30; shorten"):
                remote(seen, tokenizer, "the sea " * 30)


def test_a_tokenizer_of_another_model_is_refused(vllm):
    from tokenry.models.load import load_tokenizer

    other = load_tokenizer("zoo/reasoner")
    with pytest.raises(InputError, match="give the tokenizer of the server's model"):
        remote(vllm.url, other, "12+3=")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"methods": [CyclicReflex()]}, "cyclicreflex needs the model or its scores"),
        ({"chunk": 0}, r"chunk=0 is not allowed; give a whole number in \[1, 1024\]"),
        ({"repair": "guess"}, "repair='guess' is unknown"),
        ({"num_beams": 4}, "num_beams is nothing to ask a server for"),
        ({"do_sample": True, "temperature": 0}, "temperature=0 is not allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"stop": [""]}, "an empty stop string"),
    ],
)
def test_wrong_input_is_refused(vllm, tokenizer, change, said):
    with pytest.raises(InputError, match=said):
        remote(vllm.url, tokenizer, "the", **change)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://[", "not an address"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError, match="is no address of a server"):
        RemoteServer(url)


def test_nobody_listens(tokenizer):
    with RemoteServer("http://127.0.0.1:9", retries=1) as server, pytest.raises(InputError, match="cannot be reached"):
        remote(server, tokenizer, "the")


def test_httpx_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(InputError, match=r"pip install tokenry\[remote\]"):
        RemoteServer("http://127.0.0.1:9")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_decode_by_a_server(vllm, model, tokenizer, folder, tmp_path):
    call = ["decode", "--server", vllm.url, "--tokenizer", folder, "--max-new-tokens", "48", "--greedy", "--raw"]
    bans = ["--method", "antislop", "-o", f"phrases={json.dumps(list(BANS.phrases))}", PROMPTS[0]]
    here = generate(model, tokenizer, PROMPTS[0], methods=[Antislop(phrases=BANS.phrases)], max_new_tokens=48)
    shown = CliRunner().invoke(main, [*call, *bans])
    assert shown.exit_code == 0 and here.texts[0] in shown.output and "requests" in shown.output
    told = json.loads(CliRunner().invoke(main, [*call, "--json", "--chunk", "8", *bans]).output)
    assert told["ids"] == here.new_ids[0] and len(told["events"]) == len(here.events)
    assert set(told["remote"]) == {"requests", "written", "wasted"}
    pairs = tmp_path / "pairs.jsonl"
    assert CliRunner().invoke(main, [*call, "--save-pairs", str(pairs), *bans]).exit_code == 0
    assert [json.loads(line)["rule"] for line in pairs.read_text().splitlines()] == [p["rule"] for p in here.pairs]


def test_options_of_servers_are_for_servers(vllm, folder):
    for arguments, said in (
        (["--chunk", "8"], "--chunk would have no effect without --server"),
        (["--server", vllm.url, "--tokenizer", folder, "--dtype", "float32"], "--dtype would have no effect"),
        (["--server", vllm.url, "--tokenizer", "/nowhere"], "there is no model '/nowhere'"),
    ):
        result = CliRunner().invoke(main, ["decode", *arguments, "the"])
        assert result.exit_code == 2 and said in result.output
