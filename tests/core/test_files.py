"""What people have in their files: marks, line ends, blanks, JSON in any layout, and one wrong field in line 3."""

import io
import json
import sys

import pytest
from click.testing import CliRunner

from tokenry import InputError
from tokenry.cli import judge, main
from tokenry.cli.decode import read_prompts
from tokenry.cli.options import read_text
from tokenry.cli.represent import read_lines
from tokenry.core.files import as_text, entries_of
from tokenry.core.files import read_text as library_read_text
from tokenry.decode import Antislop
from tokenry.decode.cyclicreflex import CyclicReflex
from tokenry.read import DifficultyProbeMethod
from tokenry.tokenize.kl3m import KL3M
from tokenry.train.ftpo import FTPO
from tokenry.train.preference.pairs import read_pairs
from tokenry.train.rectifier import Rectifier

ENTRIES = ["a testament to", "l’été “dernier”", "the sea"]
PLAIN = "\n".join(ENTRIES) + "\n"
LAYOUTS = {
    "lines": PLAIN.encode(),
    "no last line feed": PLAIN.rstrip("\n").encode(),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "CRLF": PLAIN.replace("\n", "\r\n").encode(),
    "byte order mark and CRLF": b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(),
    "CR": PLAIN.replace("\n", "\r").encode(),
    "blanks around": PLAIN.replace("\n", " \t\n ").rstrip(" ").encode(),
    "JSON": json.dumps(ENTRIES).encode(),
    "JSON over lines": json.dumps(ENTRIES, indent=2, ensure_ascii=False).encode(),
    "JSON with a mark and CRLF": b"\xef\xbb\xbf" + json.dumps(ENTRIES, indent=1).replace("\n", "\r\n").encode(),
    "JSON after blank lines": b"\n \n" + json.dumps(ENTRIES, indent=1).encode() + b"\n\n",
}
LISTS = {
    "phrases": lambda path: Antislop(phrases=path).phrases,
    "regexes": lambda path: Antislop(regexes=path).regexes,
    "reflection words": lambda path: CyclicReflex(words=path).words,
    "custom tokens": lambda path: KL3M(custom_tokens=path).custom_tokens,
    "prompts": lambda path: read_prompts(None, path),
    "sentences": read_lines,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_texts_is_the_same_in_every_layout(name, layout, tmp_path):
    (tmp_path / "file").write_bytes(LAYOUTS[layout])
    assert list(LISTS[name](str(tmp_path / "file"))) == ENTRIES


def test_what_a_list_leaves_out_and_says(tmp_path):
    """Patterns count once; prompts as often as they are there, since each is answered."""
    (tmp_path / "file").write_text("a b\n\n c\na b \n", encoding="utf-8")
    path = str(tmp_path / "file")
    assert Antislop(phrases=path).phrases == ("a b", "c") and read_prompts(None, path) == ["a b", "c", "a b"]
    result = CliRunner().invoke(
        main, ["decode", "--method", "antislop", "-o", f"phrases={path}", "--model", "./no", "x"]
    )
    assert f"{path}: 2 phrases, 1 duplicates" in result.stderr and result.stdout == "" and result.exit_code == 2
    with pytest.raises(InputError, match=r"line 2 of .* is empty"):
        read_lines(path)
    (tmp_path / "file").write_text("\na\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 of .* is empty"):
        read_lines(path)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("[Tt]estament", ["[Tt]estament"]),  # a regular expression, not JSON
        ("[0-9]+ stars\n[a-z]", ["[0-9]+ stars", "[a-z]"]),
        ("{name} smiled", ["{name} smiled"]),
        ('[" kept as it stands "]', [" kept as it stands "]),
        ("[]", []),
        ("one\u2028line\u0085still", ["one\u2028line\u0085still"]),
    ],
)
def test_entries_are_recognized_by_content(text, entries):
    assert entries_of(text) == entries


@pytest.mark.parametrize(
    "text", ['["a", "b"', '[\n"a"\n"b"\n]', "[\n  a,\n]", '["a", 1]', "[[1]]", '{"a": 1}', "[" * 9999]
)
def test_broken_json_is_no_list_of_lines(text, tmp_path):
    (tmp_path / "file").write_text(text)
    for read in LISTS.values():
        with pytest.raises(InputError):
            read(str(tmp_path / "file"))


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_a_file_without_entries_bans_nothing_and_is_refused(text, tmp_path):
    (tmp_path / "file").write_text(text)
    for name, read in LISTS.items():
        with pytest.raises(InputError, match=r"holds no|has no|is empty"):
            print(name, read(str(tmp_path / "file")))


# --- text ------------------------------------------------------------------------------------------------------------

NO_TEXT = {
    "UTF-16": "the sea".encode("utf-16"),
    "Latin-1": "l'été".encode("latin-1"),
    "NUL": b"the\0sea",
    "binary": bytes(range(256)),
}


def test_a_text_begins_with_its_first_letter():
    assert as_text(b"\xef\xbb\xbfone\r\ntwo\rthree") == "one\ntwo\nthree"


@pytest.mark.parametrize("name", NO_TEXT)
def test_other_encodings_are_refused_everywhere(name, tmp_path):
    (tmp_path / "file").write_bytes(NO_TEXT[name])
    path = str(tmp_path / "file")
    text_readers = [lambda path: read_text(path, "text"), lambda path: library_read_text(path, "text")]
    for read in [*LISTS.values(), *text_readers, *RECORDS.values()]:
        with pytest.raises(InputError, match="not UTF-8 text"):
            read(path)


def test_standard_input_is_read_alike(monkeypatch):
    class Piped:
        buffer = io.BytesIO("\ufeffthe sea\r\n".encode())

    monkeypatch.setattr(sys, "stdin", Piped)
    assert read_text("-", "text") == "the sea\n"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        read_text("-", "text")


# --- records ---------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole texts."""

    def encode(self, text, add_special_tokens=True):
        return [hash(text) % 300]


RECORDS = {
    "pairs": lambda path: read_pairs(path),
    "episodes": lambda path: Rectifier().read(path, Words()),
    "solutions": lambda path: judge.read_rows(path),
    "problems": lambda path: DifficultyProbeMethod(marker="number").examples(path, read_text(path, "data")).questions,
}
ROWS = {
    "pairs": [{"prompt": "q", "chosen": ["a"], "rejected": "b"}],
    "episodes": [{"prompt": "q", "continuation": "b", "reward": -1}],
    "solutions": [{"prompt": "q", "solution": "b", "answer": "c"}],
    "problems": [{"question": "q", "answer": 1}],
}
WRONG = {  # the field, and values that it cannot have; ... is a field that is missing
    "pairs": {"prompt": (..., None, 1, "", [{"role": "user", "content": "q"}]), "rejected": (..., None, ["b"], 7)},
    "episodes": {
        "prompt": (..., None, 1, ["q"]),
        "continuation": (..., None, 5),
        "reward": (..., None, "x", True, 1, -2, float("nan"), [0.5], {}),
    },
    "solutions": {"prompt": (..., None, 3, " "), "solution": (..., None, 5, ["b"]), "answer": ([], {}, True)},
    "problems": {"question": (..., None, 3, " ", []), "answer": (..., None, [], True, float("inf"))},
}
CASES = [(name, field, value) for name, fields in WRONG.items() for field, values in fields.items() for value in values]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u2029", "\x1c", "\x0b"])
def test_only_a_line_feed_ends_a_record(name, separator, tmp_path):
    (row,) = ROWS[name]
    field = "question" if name == "problems" else "prompt"
    line = json.dumps({**row, field: f"a{separator}b"}, ensure_ascii=False)
    plain = json.dumps({**row, field: "c"})
    for text in (f"{line}\n{plain}\n", f"{line}\r\n{plain}", f"\ufeff{line}\n\n{plain}\n"):
        (tmp_path / "file").write_bytes(text.encode())
        assert len(RECORDS[name](str(tmp_path / "file"))) == 2


@pytest.mark.parametrize(("name", "field", "value"), CASES)
def test_every_record_is_refused_by_line_and_field(name, field, value, tmp_path):
    (row,) = ROWS[name]
    wrong = {key: value if key == field else kept for key, kept in row.items() if key != field or value is not ...}
    (tmp_path / "file").write_text("\n".join(map(json.dumps, [row, row, wrong])))
    with pytest.raises(InputError) as refusal:
        RECORDS[name](str(tmp_path / "file"))
    assert "line 3 of" in str(refusal.value) and field in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    "line", ["{", "[1]", "3", "null", '"x"', "{}", "[" * 9999, '{"a": "\\ud800"}', '{"a": %s}' % ("9" * 5000)]
)
def test_a_line_that_is_no_record(name, line, tmp_path):
    (tmp_path / "file").write_text("\n".join([json.dumps(*ROWS[name])] * 2 + [line]))
    with pytest.raises(InputError, match="line 3 of"):
        RECORDS[name](str(tmp_path / "file"))


IDS = {"prompt_ids": [5], "chosen_ids": [6], "rejected_id": 7}
REWIND = {"context_ids": [5], "rejected": 7, "rule": "phrase:x", "candidates": [[6, 0.5]]}


@pytest.mark.parametrize("row", [IDS, REWIND])
def test_token_ids_are_whole_numbers(row, tmp_path):
    for field in row:
        for value in (..., None, 1.5, [["5"]], [True], [-1], -1, {"a": 1}, [10**400], *["5"] * (field != "rule")):
            wrong = {
                key: value if key == field else kept for key, kept in row.items() if key != field or value is not ...
            }
            (tmp_path / "file").write_text("\n".join(map(json.dumps, [row, row, wrong])))
            with pytest.raises(InputError, match=rf"line 3 of .*{field}"):
                read_pairs(tmp_path / "file")


def test_pairs_of_text_are_refused_by_line(tokenizer, tmp_path):
    good = {"prompt": "the old", "chosen": [" the"], "rejected": " s"}
    (tmp_path / "file").write_text(json.dumps(good) + "\n" + json.dumps({**good, "rejected": " whisper"}))
    with pytest.raises(InputError, match=r"line 2 of .*: ' whisper' is . tokens"):
        FTPO().read(tmp_path / "file", tokenizer)
    (tmp_path / "file").write_text(json.dumps(good) + "\n" + json.dumps(IDS))
    with pytest.raises(InputError, match=r"line 2 of .*: field 'prompt' is missing; .*all lines alike"):
        FTPO().read(tmp_path / "file", tokenizer)
