"""What `tokenry serve` refuses before it loads a model, and what it says of itself."""

import importlib.util
import socket

import pytest
from click.testing import CliRunner

from tokenry.cli import main
from tokenry.cli.serve import announce


def refusal(*args):
    """The one sentence that the command refuses with."""
    result = CliRunner().invoke(main, ["serve", *args])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and result.stdout == "" and len(lines) == 1, result.output
    return lines[0]


def test_help_has_an_example():
    assert "tokenry serve --model smollm2 --method antislop" in CliRunner().invoke(main, ["serve", "--help"]).stdout


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7"])
def test_other_machines_need_a_key(host):
    assert f"--host {host} lets other machines in; give --api-key KEY" in refusal("--host", host)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "not an address"], "'not an address' is no address"),
        (["--port", "70000"], "--port 70000 is not allowed"),
        (["--rows", "0"], "--rows 0 is not allowed"),
        (["--reuse-memory", "-1"], "--reuse-memory -1 is not allowed"),
        (["--server", "http://127.0.0.1:1", "--reuse-memory", "64"], "--reuse-memory would have no effect with"),
        (["--api-key", " "], "printable ASCII"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--method", "antislob"], "antislob"),
        (["--method", "compresskv"], "compresskv"),
        (["--method", "antislop", "-o", "phrase=x"], "no option 'phrase'"),
        (["--method", "antislop", "-o", "phrases=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_refused(args, words):
    assert words in refusal(*args)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port} cannot be listened at" in refusal("--port", port)


def test_packages_of_the_server_that_are_not_there(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("tokenry.cli.serve.find_spec", lambda name: None if name == "uvicorn" else there(name))
    assert "the server needs uvicorn; run `pip install tokenry[serve]`" in refusal()


@pytest.mark.parametrize("has_key", [False, True])
def test_it_says_how_it_is_asked_and_not_the_key(capsys, has_key):
    announce("tiny", "http://127.0.0.1:8000", has_key)
    said = capsys.readouterr().out
    assert "tiny is served at http://127.0.0.1:8000/v1" in said
    assert "curl http://127.0.0.1:8000/v1/completions" in said and ("$TOKENRY_SERVE_KEY" in said) == has_key
