"""Requests: what clients send is understood or refused in one sentence, and methods come from their declarations."""

import json
from pathlib import Path

import pytest

from tokenry import catalog
from tokenry.core.errors import InputError
from tokenry.decode import Antislop, CyclicReflex
from tokenry.serve.errors import Refused
from tokenry.serve.methods import made
from tokenry.serve.protocol import BANNED, ChatRequest, CompletionRequest, KoboldRequest

KINDS = {"chat": ChatRequest, "completions": CompletionRequest, "/api/": KoboldRequest}
BODIES = sorted((Path(__file__).parent / "bodies").glob("*.json"))


def asked(**fields):
    return CompletionRequest.model_validate({"prompt": "the sea", **fields})


def refusal(**fields):
    with pytest.raises(ValueError) as error:
        asked(**fields)
    return error.value.errors()[0]["ctx"]["error"]


def recorded(name):
    return json.loads((Path(__file__).parent / "bodies" / f"{name}.json").read_text())["body"]


def test_a_silent_request_has_openais_defaults():
    assert asked().options() == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert asked().methods_in_force([]) == [] and asked().stops() == [] and asked().ranked() is None


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 5e-5, "top_p": 0.5}, {"do_sample": False}])
def test_the_coldest_requests_take_the_likeliest_token(fields):
    assert asked(**fields).options() == {"do_sample": False}


def test_sampling_by_the_names_of_other_servers():
    same = asked(max_length=9, rep_pen=1.2, typical=0.9, stop_sequence=["x"], sampler_seed=4, ban_eos_token=True)
    assert same.max_tokens == 9 and same.seed == 4 and same.stops() == ["x"] and same.ignore_eos
    assert same.options()["repetition_penalty"] == 1.2 and same.options()["typical_p"] == 0.9
    assert asked(n_predict=9, max_tokens=9).max_tokens == 9
    assert "contradict" in str(refusal(n_predict=8, max_tokens=9))


def test_koboldcpp_bans_texts_and_tabbyapi_ids_under_one_name():
    mixed = asked(banned_tokens=["a whisper", 7, "the sea", 8])
    assert mixed.methods_in_force([]) == [Antislop(phrases=["a whisper", "the sea"])]
    assert mixed.biases(320, []) == {7: BANNED, 8: BANNED}
    assert asked(banned_tokens="7, 8").biases(320, []) == {7: BANNED, 8: BANNED}
    assert asked(banned_tokens=[]).methods_in_force([]) == []
    assert asked(custom_token_bans="").biases(320, []) == {}


def test_bans_at_the_top_are_one_method():
    (method,) = asked(banned_strings="a whisper", banned_regex=["Sea"], banned_bias=-11.512925).methods_in_force([])
    assert method == Antislop(phrases=["a whisper"], regexes=["(?-i:Sea)"], max_span=256, strength=method.strength)
    assert method.strength == pytest.approx(0.5, abs=1e-6)  # 10 to the power of -5 is e to that of -11.51
    assert asked(banned_strings=["x"], banned_bias=-999).methods_in_force([])[0].strength == 1
    (loud,) = asked(banned_regex_case_insensitive="sea").methods_in_force([])
    assert loud.regexes == ("sea",)


def test_a_regular_expression_keeps_its_case_where_that_was_asked():
    ban = asked(banned_regex="Sea", banned_regex_case_insensitive="wind").methods_in_force([])[0].monitors()[0]
    assert [bool(p.search("the sea, the WIND")) for p in ban.patterns] == [False, True]
    assert ban.patterns[0].search("the Sea")


def test_logit_bias_in_both_forms():
    assert asked(logit_bias={"5": 1, "6": -2.5}).biases(320, []) == {5: 1.0, 6: -2.5}
    assert asked(logit_bias=[[5, 1], [6, False]]).biases(320, []) == {5: 1.0, 6: BANNED}
    assert asked(ignore_eos=True).biases(320, [0, 1]) == {0: BANNED, 1: BANNED}
    for bad in ({"320": 1}, {"x": 1}, {"-1": 1}, {"٣": 1}, {"9" * 400: 1}):
        with pytest.raises(Refused, match="ids 0 to 319"):
            asked(logit_bias=bad).biases(320, [])


def test_what_cannot_be_done_is_refused_unless_it_asks_for_nothing():
    asked(frequency_penalty=0, xtc_probability=0, grammar="", tools=[], suffix=None, best_of=1, echo=False)
    for name, value in {"frequency_penalty": 0.5, "dry_multiplier": 0.8, "tools": [{}], "echo": True}.items():
        error = refusal(**{name: value})
        assert error.param == name and "leave it out" in str(error)


def test_slips_are_refused_and_the_rest_is_named():
    assert str(refusal(temprature=1)) == "there is no field 'temprature'; did you mean 'temperature'?"
    assert "'banned_strings'" in str(refusal(banned_string=["x"]))
    assert asked(user="me", genkey="K").ignored() == []
    assert asked(hovercraft=1, **{"e\nvil": 2}).ignored() == ["hovercraft", "?"]


def test_methods_are_made_from_their_declarations():
    named = asked(methods=[{"name": "antislop", "phrases": ["x"]}, {"name": "cyclicreflex", "period": 60}]).methods
    assert named == [Antislop(phrases=["x"]), CyclicReflex(period=60)]
    assert str(refusal(methods=[{"name": "antislop", "phrase": ["x"]}])).startswith("antislop has no option 'phrase'")
    assert "a number in [0, 1]" in str(refusal(methods=[{"name": "antislop", "strength": 2}]))
    assert "there is no method 'antislob'" in str(refusal(methods=[{"name": "antislob"}]))
    assert "is no method" in str(refusal(methods=["antislop"]))


@pytest.mark.parametrize("entry", catalog.by_stage("decode"), ids=lambda entry: entry.slug)
def test_every_decode_method_can_be_asked_for_or_says_why_not(entry):
    try:
        assert made({"name": entry.slug}) == entry.load()()
    except Refused as error:
        assert "is opened where the server runs" in str(error)


def test_no_request_opens_a_file_of_the_server(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    for entry in catalog.by_stage("decode"):
        for name in entry.load().model_fields:
            try:
                method = made({"name": entry.slug, name: str(secret)})
            except InputError as error:
                assert "a secret" not in str(error)
            else:
                assert getattr(method, name) == str(secret)  # a text, such as what closes thinking
                assert name in ("end_think", "ignore_text", "close_text")


def test_the_methods_of_the_server_and_those_of_the_request():
    own = [Antislop(phrases=["a whisper"]), CyclicReflex()]
    assert asked().methods_in_force(own) == own
    added = asked(banned_strings=["the sea"]).methods_in_force(own)
    assert added == [*own, Antislop(phrases=["the sea"])]
    replaced = asked(methods=[{"name": "antislop", "strength": 0}]).methods_in_force(own)
    assert replaced == [CyclicReflex(), Antislop(strength=0)]


def test_messages_in_parts():
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]
    (message,) = ChatRequest.model_validate({"messages": [{"role": "user", "content": parts, "name": "me"}]}).messages
    assert message.turn() == {"role": "user", "content": "the sea", "name": "me"}


@pytest.mark.parametrize("file", BODIES, ids=lambda file: file.stem)
def test_recorded_bodies_of_clients_are_understood(file):
    record = json.loads(file.read_text())
    kind = next(kind for part, kind in KINDS.items() if part in record["path"])
    request = kind.model_validate(record["body"])
    (ban,) = request.methods_in_force([])
    assert isinstance(ban, Antislop) and "a testament to" in ban.phrases and request.max_tokens == 12
    assert not {"min_p", "typical_p"} & set(request.options()) or request.options()["min_p"] == 0.05


def test_what_the_recorded_bodies_come_to():
    silly, kobold = (CompletionRequest.model_validate(recorded(name)) for name in ("sillytavern_text", "koboldcpp"))
    assert silly.biases(320, []) == {20: -1.5, 3: BANNED, 4: BANNED} and silly.stops() == ["\nYou:", "\nElara:"]
    assert kobold.methods_in_force([])[0].phrases == ("a testament to", "whisper")
    assert kobold.options() == {
        "do_sample": True,
        "temperature": 0.75,
        "top_k": 100,
        "top_p": 0.92,
        "repetition_penalty": 1.07,
    }
