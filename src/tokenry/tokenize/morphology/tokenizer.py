"""The hybrid tokenizer: forms of one morpheme share an id, and every text comes back as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import ahocorasick
import numpy as np
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, BatchEncoding, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.generic import PaddingStrategy

from ...core.errors import InputError
from ...core.files import explained, parse_json
from ...text.token_text import check_encodable
from .forms import REACH, Choice, choice, choices, harmonize
from .pipeline import EOS, JOINED, LONGEST, MARK, PAD, SPACE, Entry, to_bytes
from .scoring import Cutter, look_ahead
from .sharing import MOST, Sharing

__all__ = ["MorphTokenizer"]

FILE = "morphology.json"
LONGEST_KNOWN = 64  # characters of a word that is remembered


class MorphTokenizer(PreTrainedTokenizerFast):
    """A `PreTrainedTokenizerFast` whose ids stand for morphemes, not for strings.

    Underneath is a plain pipeline (tokenizer.json), which cuts the text and gives each form its own id. Here the forms
    of one morpheme become its one id, and decoding chooses the form that fits the letters around it. Where it would
    choose another one than was written, the guard keeps the id of the form itself; so nothing is lost.

    Args:
        table: {id: entry} of `pipeline.entries`.
        case, contexts, rules: those of the dictionary.
        guard: False is the paper's code: forms always share their id, and some words come back with another form.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": "tokenizer.json", "morphology_file": FILE}

    def __init__(self, morphology_file: str | None = None, morphology: Any = None, **options: Any) -> None:
        if morphology is None:
            morphology = _read(morphology_file)
        self.guard: bool = morphology["guard"]
        self._morphology = morphology
        self._case = {lower: upper for upper, lower in morphology["case"].items()}
        self._read_entries(morphology)
        self._read_matcher(morphology)
        self._known: dict[str, bytes] = {}  # ids of words that were seen, with the space behind them
        self._word_text = lru_cache(MOST)(self._text_of_word)
        self._harmonized = lru_cache(MOST)(lambda left, id, behind: harmonize(left, self._shared[id], behind))
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**{"pad_token": PAD, "eos_token": EOS, **options})
        self._plain_cuts = self.backend_tokenizer.pre_tokenizer
        self._cutter: Cutter | None = None
        if morphology["rule"] == "score":
            kinds = {token: kind for _, token, kind, *_ in morphology["entries"]}
            self._cutter = look_ahead(self.backend_tokenizer, kinds)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **options: Any) -> dict[str, Any]:
        """tokenizer.json is the whole pipeline, so that nothing is made anew of its parts."""
        return options

    def _read_entries(self, morphology: Mapping[str, Any]) -> None:
        asked = choices(morphology["contexts"], morphology["rules"])
        self._exact: dict[int, str] = {}  # the text of ids that stand for one form
        self._bytes: dict[int, bytes] = {}
        self._shared: dict[int, Choice] = {}
        self._id_of_form: dict[int, int] = {}  # {id of a form: the id that it shares}
        self._kinds: dict[int, str] = {}
        self._first: dict[int, str] = {}  # the form that stands for all
        for at, entry in ((at, Entry(*fields)) for at, *fields in morphology["entries"]):
            forms: tuple[str, ...] = tuple(entry.forms)
            self._kinds[at], self._first[at] = entry.kind, forms[0]
            if entry.kind == "byte":
                self._bytes[at], self._first[at] = _byte(entry.token), ""
            elif len(forms) > 1:
                self._shared[at] = choice(forms, asked.get(entry.rule, ()))
            else:
                self._exact[at] = entry.forms[0]
            if entry.kind == "mark":
                self._mark = at if entry.token == MARK else getattr(self, "_mark", -1)
                self._space = at if entry.forms[0] == SPACE else getattr(self, "_space", -1)
            if entry.shared is not None:
                self._id_of_form[at] = entry.shared
        for at, shared in self._id_of_form.items():
            self._first[at] = self._first[shared]
        texts = dict.fromkeys(self._shared, "") | dict.fromkeys(self._bytes, "\ufffd") | self._exact
        self._sharing = Sharing(texts, self._id_of_form, self._shared, self._first, self._space)

    def _read_matcher(self, morphology: Mapping[str, Any]) -> None:
        cased = [(to_bytes(upper), MARK + to_bytes(lower)) for upper, lower in morphology["case"].items()]
        letters = {byte[0]: token for token, byte in BYTE_VALUES.items()}
        self._bytes_and_case = letters | {ord(upper): marked for upper, marked in cased if len(upper) == 1}
        self._wide_case = [(upper, marked) for upper, marked in cased if len(upper) > 1]
        self._automaton = ahocorasick.Automaton()
        for at, token, *_ in morphology["entries"]:
            if JOINED not in token and token not in (PAD, EOS):
                self._automaton.add_word(token, at)
        self._automaton.make_automaton()

    # --- text to ids ---------------------------------------------------------------------------------------------

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        for number, given in enumerate(_strings(text, text_pair)):
            check_encodable(given, f"text {number}")
        if isinstance(text, list) and self._is_plain(text, text_pair, options):
            return self._batch(text, options)
        return self._through_backend(text, text_pair, options)

    def _through_backend(self, text: Any, text_pair: Any, options: Mapping[str, Any]) -> BatchEncoding:
        tensors = options.get("return_tensors")
        encoded = super()._encode_plus(text, text_pair, **{**options, "return_tensors": None})
        ids: Any = encoded["input_ids"]
        batched = bool(ids) and isinstance(ids[0], list)
        encoded["input_ids"] = self.share(ids) if batched else self.share([ids])[0]
        if tensors is None:
            return encoded
        return BatchEncoding(encoded.data, encoded.encodings, tensor_type=tensors, prepend_batch_axis=not batched)

    def _is_plain(self, texts: Sequence[Any], pair: Any, options: Mapping[str, Any]) -> bool:
        """Whether ids alone are asked for, of texts without added tokens: then known words need no second look."""
        asked = ("return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask", "return_length")
        asked += ("is_split_into_words", "return_token_type_ids", "split_special_tokens", "sanitize_control_tokens")
        if pair is not None or any(options.get(name) for name in asked) or not all(isinstance(t, str) for t in texts):
            return False
        if not texts or self.split_special_tokens or self.num_special_tokens_to_add():
            return False
        added = list(self.added_tokens_encoder)
        return not any(token in text for text in texts for token in added)

    def _batch(self, texts: list[str], options: Mapping[str, Any]) -> BatchEncoding:
        rows = self._rows(texts)
        most = options.get("max_length")
        if (
            most is not None
            and getattr(options.get("truncation_strategy"), "value", "do_not_truncate") != "do_not_truncate"
        ):
            rows = [row[:most] if self.truncation_side == "right" else row[-most:] for row in rows]
        data: dict[str, Any] = {"input_ids": rows}
        if options.get("return_attention_mask") is not False:
            data["attention_mask"] = [[1] * len(row) for row in rows]
        if options.get("padding_strategy", PaddingStrategy.DO_NOT_PAD) != PaddingStrategy.DO_NOT_PAD:
            data = self.pad(
                data,
                padding=options["padding_strategy"],
                max_length=most,
                pad_to_multiple_of=options.get("pad_to_multiple_of"),
                padding_side=options.get("padding_side"),
                return_attention_mask=options.get("return_attention_mask"),
            ).data
        later = Encodings(
            lambda: super(MorphTokenizer, self)._encode_plus(texts, **{**options, "return_tensors": None})
        )
        return BatchEncoding(data, later, tensor_type=options.get("return_tensors"), n_sequences=1)

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without added tokens. Words stand alone between spaces, so each is looked at once."""
        words = SPACE.join(texts).split(SPACE)
        try:
            whole = b"".join(map(self._known.__getitem__, words))
        except KeyError:
            whole = self._of_new(words)
        flat = np.frombuffer(whole, np.int32)
        ends = np.flatnonzero(flat == self._space)[np.cumsum([text.count(SPACE) + 1 for text in texts]) - 1].tolist()
        ids = flat.tolist()
        return [ids[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], ends)]

    def _of_new(self, words: list[str]) -> bytes:
        """The ids of words some of which were not seen before; they are known afterwards, unless they are long."""
        new = list(set(words).difference(self._known))
        self._known.update(self._learned(new))
        whole = b"".join(map(self._known.__getitem__, words))
        for word in (word for word in new if len(word) > LONGEST_KNOWN):
            del self._known[word]
        if len(self._known) > MOST:
            self._known.clear()
        return whole

    def forget_words(self) -> None:
        """Drop what is remembered of words, as after a change of `guard`."""
        self._known.clear()
        self._harmonized.cache_clear()
        self._sharing.left.clear()
        if self._cutter is not None:
            self._cutter.ahead.clear()
            self._cutter.cut.clear()

    def _learned(self, words: list[str]) -> Iterator[tuple[str, bytes]]:
        """Each word with its ids and that of the space behind it."""
        long = [word for word in words if len(word) * 4 > LONGEST and len(word.encode()) > LONGEST]
        if long:  # the pipeline cuts them before it matches
            words = [*set(words).difference(long), *long]
        ids = self._cut(words[: len(words) - len(long)])
        if long:
            encodings = self.backend_tokenizer.encode_batch_fast(long, add_special_tokens=False)
            ids = np.concatenate([ids, *([*encoding.ids, self._space] for encoding in encodings)])
        shared = self._sharing(ids, self.guard).astype(np.int32).tobytes()
        ends = (4 * (np.flatnonzero(ids == self._space) + 1)).tolist()
        return zip(words, [shared[begin:end] for begin, end in zip([0, *ends], ends)])

    def _cut(self, words: list[str]) -> np.ndarray:
        """Ids of forms of all words, a space behind each, as the pipeline gives them."""
        text = SPACE.join([*words, ""]).encode().decode("latin-1").translate(self._bytes_and_case)
        for upper, marked in self._wide_case:
            text = text.replace(upper, marked)
        if self._cutter is not None:
            return self._cutter.ids(text)
        return np.fromiter(map(itemgetter(1), self._automaton.iter_long(text)), np.int64)  # one longest match

    def share(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of ids of forms to ids of morphemes; as many as there were."""
        flat = np.fromiter(chain.from_iterable((*row, self._space) for row in rows), np.int64)
        ids = self._sharing(flat, self.guard, list(self.added_tokens_decoder)).tolist()
        ends = np.cumsum([len(row) + 1 for row in rows]).tolist()
        return [ids[begin : end - 1] for begin, end in zip([0, *ends], ends)]

    def _form(self, shared: int, left: str, ids: Sequence[int], at: int) -> str:
        behind = self._first.get(ids[at + 1], "") if at + 1 < len(ids) else ""
        return self._harmonized(left[-REACH:], shared, behind)

    def _text(self, id: int, left: str, ids: Sequence[int], at: int) -> str:
        """The letters of an id where it stands; a byte that is no letter is a mark that no context asks for."""
        if id in self._exact:
            return self._exact[id]
        return self._form(id, left, ids, at) if id in self._shared else "\ufffd"

    # --- ids to text ---------------------------------------------------------------------------------------------

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(map(int, token_ids))
        added = self.added_tokens_decoder
        self._check_ids(ids, added)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        out: list[str] = []
        for word in _words(ids, {self._space, *added}):
            if len(word) == 1 and word[0] in added:
                out.append("" if word[0] in skipped else added[word[0]].content)
            else:
                out.append(SPACE if word == (self._space,) else self._word_text(word))
        return "".join(out)

    def _check_ids(self, ids: Iterable[int], added: Mapping[int, Any]) -> None:
        for id in ids:
            if id not in self._kinds and id not in added:
                raise InputError(f"the id {id} is outside of the vocabulary; give ids in [0, {len(self) - 1}]")

    def _text_of_word(self, ids: tuple[int, ...]) -> str:
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> Iterator[bytes]:
        """The bytes that each id of a word stands for, where it stands."""
        left, raised = "", False
        for at, id in enumerate(ids):
            if id == self._mark:
                raised = True
                yield b""
                continue
            text = self._text(id, left, ids, at)
            left = (left + text)[-REACH:]
            if id in self._bytes:
                yield self._bytes[id]
            else:
                yield (self._case.get(text[0], text[0]) + text[1:] if raised else text).encode()
            raised = False

    def kinds(self, ids: Iterable[int]) -> list[str]:
        """What each id is: root, suffix, subword, letter, byte or mark."""
        return [self._kinds.get(id, "mark") for id in ids]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The pieces of the text as written; a mark before an upper-case letter is one of its own."""
        encoded = self._encode_plus(text=text, text_pair=pair, add_special_tokens=add_special_tokens, **options)
        return [str(self.convert_ids_to_tokens(id)) for id in encoded["input_ids"]]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens of the vocabulary."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    # --- files ---------------------------------------------------------------------------------------------------

    def _save_pretrained(
        self, save_directory: str | os.PathLike, file_names: tuple[str, ...], *args: Any, **options: Any
    ):
        path = Path(save_directory) / FILE
        path.write_text(json.dumps(self._morphology, ensure_ascii=False), encoding="utf-8")
        cuts, self.backend_tokenizer.pre_tokenizer = self.backend_tokenizer.pre_tokenizer, self._plain_cuts
        try:
            saved = super()._save_pretrained(str(save_directory), file_names, *args, **options)
        finally:
            self.backend_tokenizer.pre_tokenizer = cuts
        return (*saved, str(path))


class Encodings(Sequence):
    """What the pipeline says of a batch (offsets, words), made when somebody asks."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._made: list[Any] | None = None

    def _all(self) -> list[Any]:
        if self._made is None:
            self._made = list(self._make().encodings)
        return self._made

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Any:
        return self._all()[index]


class MorphConfig(PreTrainedConfig):
    """Only a name, under which `AutoTokenizer` finds the class."""

    model_type = "tokenry_morphology"


AutoTokenizer.register(MorphConfig, tokenizer_class=MorphTokenizer, exist_ok=True)


def _words(ids: Sequence[int], alone: set[int]) -> Iterator[tuple[int, ...]]:
    """Stretches between ids that stand alone, and those by themselves."""
    begin = 0
    for at, id in enumerate(ids):
        if id in alone:
            if begin < at:
                yield tuple(ids[begin:at])
            yield (id,)
            begin = at + 1
    if begin < len(ids):
        yield tuple(ids[begin:])


def _strings(*texts: Any) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield text
        elif isinstance(text, list | tuple):
            yield from _strings(*text)


def _byte(token: str) -> bytes:
    """The byte that a character of the byte alphabet stands for."""
    return BYTE_VALUES[token]


def _byte_values() -> dict[str, bytes]:
    """{character of the byte alphabet: byte}. Bytes of printable Latin-1 stand for themselves, the others follow."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(plain)]
    found = {chr(b): bytes([b]) for b in plain} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found


BYTE_VALUES = _byte_values()


def _read(path: str | None) -> dict[str, Any]:
    name = str(path or FILE)
    with explained(
        f"the file {name!r} cannot be read", "give a folder that save_pretrained of this tokenizer has written"
    ):
        morphology = parse_json(Path(name).read_text(encoding="utf-8"))
        _check(morphology)
    return morphology


def _check(morphology: Any) -> None:
    parts = {"guard": bool, "case": dict, "contexts": dict, "rules": dict, "entries": list, "rule": str}
    for name, kind in parts.items():
        if not isinstance(morphology.get(name), kind):
            raise ValueError(f"its {name!r} is missing or broken")
    if morphology["rule"] not in ("cascade", "score"):
        raise ValueError(f"its rule {morphology['rule']!r} is unknown")
    for at, token, kind, forms, rule, shared in morphology["entries"]:
        texts = [token, kind, rule, *forms]
        if type(at) is not int or not all(isinstance(t, str) for t in texts) or type(shared) not in (int, type(None)):
            raise ValueError(f"its entry {at!r} is broken")
    choices(morphology["contexts"], morphology["rules"])
