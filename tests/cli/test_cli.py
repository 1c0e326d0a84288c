"""The command line: what it prints, and how it refuses."""

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenry import catalog
from tokenry import cli as tokenry_cli
from tokenry.cli import leaves, main
from tokenry.measure.store import RunStore


def tokenry(*args, code=0, stdin=None):
    """Run a command in this process; (standard output, standard error)."""
    result = CliRunner().invoke(main, list(args), input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def refuse(*args):
    """The one sentence a command refuses with."""
    out, err = tokenry(*args, code=2)
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("Error: ")
    return lines[0]


def test_list_show_and_find():
    assert "antislop" in tokenry("list")[0]
    listed = json.loads(tokenry("list", "--stage", "select", "--json")[0])
    assert [e["slug"] for e in listed] == ["compresskv"]
    shown = tokenry("show", "antislop")[0]
    assert "arXiv 2510.15061" in shown and "strength = 1.0" in shown
    assert "tokenry compare cyclicreflex-reasoner" in tokenry("show", "cyclicreflex")[0]
    options = json.loads(tokenry("show", "compresskv", "--json")[0])["options"]
    assert any(o["name"] == "budget" for o in options)
    assert tokenry("find", "shorter kv cache")[0].startswith("compresskv")


def test_every_command_has_help_with_an_example():
    for command in ("list", "show", "find", "decode", "select", "compare"):
        assert "Example:\n  " in tokenry(command, "--help")[0].replace("    tokenry", "  tokenry")


@pytest.mark.parametrize(
    "command",
    ["list", "find cache", "zoo list", "zoo show reasoner", "decode --help", "compare --help", "serve --help"],
)
def test_what_only_lists_is_instant(command):
    """No heavy module is imported for it (the time itself depends on the machine)."""
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom tokenry.cli import main\n"
        f"assert CliRunner().invoke(main, {command.split()}).exit_code == 0\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_libraries_print_is_no_part_of_the_answer(monkeypatch):
    """A trainer that prints its losses, say: standard output is what was asked for, and can be read as JSON."""
    from tokenry.zoo import recipes

    find = recipes.find_recipe

    def noisy(name):
        print("{'loss': 0.1}")
        return find(name)

    monkeypatch.setattr(recipes, "find_recipe", noisy)
    result = CliRunner().invoke(main, ["zoo", "show", "reasoner", "--json"])
    assert json.loads(result.stdout)["name"] == "reasoner" and result.stderr == "{'loss': 0.1}\n"
    assert all(hasattr(command.callback, "__wrapped__") for command in leaves(main))


def test_commands_say_nothing_on_standard_output_but_by_say():
    """While they run, what goes there another way ends on standard error."""
    found = []
    for path in Path(tokenry_cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "click.secho"):
                given = {option.arg for option in node.keywords}
                if not given & {"err", "file"}:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_a_bar_on_the_screen_takes_nothing_of_the_answer(tmp_path):
    """Where standard error is a terminal a bar is drawn there; the answers still go where standard output does."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1=\n2+2=\n")
    command = ["decode", "--model", "zoo/speculator", "--greedy", "--max-new-tokens", "4", "--prompts", str(prompts)]
    screen, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenry", *command],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    out, drawn = process.stdout.read(), b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(screen, 4096):
            drawn += piece
    os.close(screen)
    assert process.wait() == 0 and b"decode" in drawn
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["1+1=", "2+2="]


def test_decode_streams_what_it_returns(tmp_path):
    slop = tmp_path / "slop.txt"
    slop.write_text("the lighthouse\nonce upon a time\n")
    args = [
        "decode",
        "--method",
        "antislop",
        "-o",
        f"phrases={slop}",
        "--max-new-tokens",
        "25",
        "Write about a lighthouse",
    ]
    streamed, _ = tokenry(*args)
    pairs = tmp_path / "pairs.jsonl"
    result = json.loads(tokenry(*args, "--json", "--save-pairs", str(pairs))[0])
    assert streamed.strip() == result["text"].strip()
    assert "the lighthouse" not in result["text"].lower()
    assert result["forward_calls"] >= len(result["ids"])
    saved = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(saved) == sum(e["kind"] == "rewind" for e in result["events"])


def test_decode_is_repeatable_and_reads_standard_input():
    args = ["decode", "--max-new-tokens", "8", "--seed", "5", "--raw", "--json"]
    first, second = (json.loads(tokenry(*args, *rest, stdin="The sea")[0]) for rest in (["-"], ["The sea"]))
    assert first["ids"] == second["ids"]


def test_two_methods_with_prefixed_options(tmp_path):
    slop = tmp_path / "slop.txt"
    slop.write_text("the sea\n")
    out = tokenry(
        "decode", "--method", "antislop", "--method", "cyclicreflex", "-o", f"antislop.phrases={slop}",
        "-o", "cyclicreflex.end_think=none", "--max-new-tokens", "6", "--json", "Tell me about ships",
    )[0]  # fmt: skip
    assert len(json.loads(out)["ids"]) == 6


def test_select_answers_from_a_file(tmp_path):
    context = tmp_path / "context.txt"
    context.write_text("The keeper painted the door of the old lighthouse blue. " * 12)
    args = ["select", "--method", "compresskv", "-o", "budget=48", "--context", str(context), "--max-new-tokens", "8"]
    result = json.loads(tokenry(*args, "--json", "What color is the door?")[0])
    assert sum(result["kept"]) <= 48 * len(result["kept"]) and result["prompt_tokens"] > 48
    assert result["text"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["decode", "--method", "antislopp", "x"], "did you mean 'antislop'"),
        (["decode", "--method", "compresskv", "x"], "use `tokenry select`"),
        (["decode", "--method", "antislop", "-o", "phrases=/nowhere", "x"], "cannot be read"),
        (["decode", "--method", "antislop", "-o", "strong=1", "x"], "its options are: phrases"),
        (["decode", "--method", "antislop", "-o", "strength=2", "x"], "give a number in [0, 1]"),
        (["decode", "--method", "antislop", "--method", "tip", "-o", "strength=1", "x"], "say which method"),
        (["decode", ""], "prompt is empty"),
        (["decode"], "give one PROMPT, or a file"),
        (["decode", "x", "--prompts", "y"], "give one PROMPT, or a file"),
        (["decode", "--prompts", "/nowhere"], "prompts '/nowhere' cannot be read"),
        (["decode", "--prompts", "/dev/null"], "has no prompts"),
        (["decode", "--batch-size", "0", "x"], "--batch-size 0"),
        (["decode", "--max-new-tokens", "0", "x"], "--max-new-tokens 0"),
        (["decode", "--max-new-tokens", "-3", "x"], "--max-new-tokens -3"),
        (["decode", "--temperature", "0", "x"], "--temperature 0.0 is not allowed"),
        (["decode", "--min-p", "2", "x"], "--min-p 2.0 is not allowed"),
        (["decode", "--model", "smollm3", "x"], "there is no model 'smollm3'"),
        (["decode", "--save-pairs", "/nowhere/p.jsonl", "x"], "cannot be written"),
        (["select", "--method", "compresskv", "--context", "/nowhere", "q"], "context '/nowhere' cannot be read"),
        (["compare", "antislop", "--report", "/nowhere/r.html"], "cannot be written"),
        (["compare", "antislop", "--samples", "0"], "--samples 0"),
        (["compare", "antislop", "--seeds", "a,b"], "not a list of whole numbers"),
        (["compare", "tip"], "baseline of another"),
        (["compare"], "say what to compare"),
        (["compare", "antislop", "--all"], "leave out 'antislop'"),
        (["compare", "--all", "--samples", "3"], "--samples would have no effect with --all"),
        (["compare", "antislop", "--quick", "--record"], "a quick run decides nothing"),
        (["compare", "spectr", "--samples", "401", "--record"], "spectr ends at 400, fixed beforehand"),
        (["compare", "nothing"], "there is no method"),
        (["list", "--stage", "x"], "the stages are"),
        (["find", "zzzz"], "no method matches"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(args, message):
    assert message in refuse(*args)


def test_a_prompt_beyond_the_window_is_refused():
    assert "context window 8192" in refuse("decode", "--raw", "sea " * 9000)


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """A real Ctrl-C in a real comparison: exit code 130, outcomes in the store, --resume finishes."""
    store = tmp_path / "runs.sqlite"
    command = [sys.executable, "-m", "tokenry", "compare", "masked-diffusion", "--quick", "--store", str(store)]
    environment = {**os.environ, "TERM": "dumb"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells start background jobs deaf to Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if store.exists():
            with RunStore(store) as open_store:
                if open_store.outcomes(1):
                    break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume goes on" in err
    with RunStore(store) as open_store:
        kept = set(open_store.outcomes(1))
    assert kept
    report = tmp_path / "report.html"
    resumed = subprocess.run(
        [*command, "--resume", "--json", "--report", str(report)], capture_output=True, text=True, env=environment
    )
    assert resumed.returncode == 0, resumed.stderr
    entry = json.loads(resumed.stdout)
    assert report.read_text().startswith("<!doctype html>")
    with RunStore(store) as open_store:
        found = set(open_store.outcomes(1))
    assert kept < found and len(found) == entry["numbers"]["samples"] * len(entry["numbers"]["subjects"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", catalog.experiments())
def test_every_experiment_runs_at_its_smallest_size(name, tmp_path):
    command = [sys.executable, "-m", "tokenry", "compare", name, "--quick", "--json", "--store", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["slug"] == name


def test_all_experiments_in_one_table_and_one_that_fails(tmp_path, monkeypatch):
    """Each in a process of its own, on its own model; the others go on, and --resume measures nothing twice."""
    monkeypatch.setattr(catalog, "experiments", lambda: ["no-such-thing", "masked-diffusion"])
    store = tmp_path / "runs.sqlite"
    for _ in range(2):
        command = ["compare", "--all", "--quick", "--json", "--resume", "--store", str(store)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and "1 of 2 failed: no-such-thing" in result.stderr
        failed, masked = json.loads(result.stdout)
        assert masked["model"] == "zoo/denoiser" and masked["numbers"]["samples"] == 6
        assert masked["command"] == "tokenry compare masked-diffusion --quick" and masked["numbers"]["seeds"] == [0]
        assert failed == {"slug": "no-such-thing", "error": failed["error"]} and "no method" in failed["error"]
        shown = next(line for line in result.stderr.splitlines() if line.startswith("masked-diffusion"))
        assert "zoo/denoiser" in shown and masked["verdict"] in shown
        with RunStore(store) as kept:
            assert [row[0] for row in kept.db.execute("SELECT count(*) FROM runs")] == [1]


def test_names_in_the_table_of_all_are_whole(monkeypatch):
    """Other columns give way: two names may differ in their last letter."""
    names = ["cyclicreflex-reasoner", "cyclicreflex-reasoner-2"]
    main_one = {"main": True, "measured": {"what": "gap", "shown": "+6.02 [-30.98, +45.57]"}}
    entry = {"on": "models of 2 layers, trained here", "verdict": "not reproduced", "findings": [main_one]}
    monkeypatch.setattr(catalog, "experiments", lambda: names)
    monkeypatch.setattr("tokenry.cli.compare.run_alone", lambda name, given: entry)
    result = CliRunner().invoke(main, ["compare", "--all", "--quick"], env={"COLUMNS": "80"})
    assert [line.split()[0] for line in result.stderr.splitlines() if line.startswith("cyclic")] == names


def test_many_prompts_give_a_json_line_each(tmp_path, llama, tokenizer):
    """Batches are those of `generate`: a text does not depend on how many others are asked for after it."""
    folder, prompts, pairs = tmp_path / "model", tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts.write_text("the old\nElara\n\nIt was\n")
    common = ["decode", "--model", str(folder), "--raw", "--max-new-tokens", "12"]
    ban = ["--method", "antislop", "-o", 'phrases=["li", "e", "he"]', "--save-pairs", str(pairs)]
    result = CliRunner().invoke(main, [*common, "--prompts", str(prompts), "--batch-size", "2", *ban])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the old", "Elara", "It was"]
    single = CliRunner().invoke(main, [*common, "--seed", "2", "--json", "It was", *ban[:4]])
    assert json.loads(single.stdout)["text"] == lines[2]["text"]
    for pair in map(json.loads, pairs.read_text().splitlines()):
        assert tokenizer.decode([pair["rejected"]]) in pair["rejected_text"]
