"""Does a dictionary cut Turkish words where the treebank does, more than BPE, and does every text come back?

Everything is trained on 80 % of the sentences of the Turkish Web Treebank, and measured on the rest. Words are cut
there where one is derived of another (olma|dığını), not at each suffix, so a tokenizer of all suffixes cannot be
precise. The model takes no part; its tokenizer is a control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..data.corpora import split
from ..data.turkish import turkish_sentences
from ..measure.claims import Finding, above, all_of, at_least, describe
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
from ..measure.tasks.morphemes import BOUNDARY_F1, Cutter, MorphemesTask
from ..tokenize.kl3m import KL3M
from ..tokenize.morphological import Morphological
from ..tokenize.text.measures import token_offsets

__all__ = ["build"]

METHOD, AHEAD, LOOSE, EQUAL, OFFICIAL, SPACES, OWN = (
    "morphological",
    "morphological, looks ahead",
    "morphological, no guard",
    "BPE, equal size",
    "official ids",
    "whitespace",
    "the model's own",
)
SIZES = (1024, 4096, 8192, 32768)  # of BPE beside the one of equal size; 4096 cuts words about as often as the method


@experiment("morphological", Morphological, quick=16)
def build(run: Run[Morphological]) -> Design:
    """Trains the method and five BPEs (half a minute). Samples are held-out sentences; by default all 970 of them."""
    training, held_out = split(turkish_sentences())
    texts = [sentence.text for sentence in training]
    method = run.settings(Morphological)
    ours = method.train(texts)
    loose = method.model_copy(update={"guard": False}).train(texts)
    scored = method.model_copy(update={"rule": "score"})
    bpe = {EQUAL: len(ours), **{f"BPE {size}": size for size in SIZES}}
    return Design(
        task=MorphemesTask(held_out[: run.samples]),
        arms=[
            *(_bpe(name, texts, size) for name, size in bpe.items()),
            Arm(SPACES, role="control", setting={"cuts": "spaces"}, apply=Cutter(_space_ends, str)),
            _official(),
            _arm(OWN, "control", run.tokenizer, None),
            _arm(LOOSE, "method", loose, method),
            _arm(AHEAD, "method", scored.train(texts), scored),
            _arm(METHOD, "method", ours, method),
        ],
        baseline=EQUAL,
        on="tokenizers",
        statistics=[BOUNDARY_F1],
        notes=f"{len(training)} sentences of training. The method has {len(ours)} entries there: little text leaves "
        "few subwords to learn. Its tokens, and the official ones, have one for each space, which BPE has not.",
        tried="On the training sentences: roots of up to three letters only where they are frequent words, and without "
        "those that are another root and suffixes, F1 0.260 in place of 0.239 with all roots of the lexicon. Beside "
        "these numbers stood those of another split of the same sentences, so that some test sentences were seen.",
    )


def _arm(name: str, role: Any, tokenizer: PreTrainedTokenizerBase, method: Morphological | None) -> Arm:
    setting = {**(method.model_dump(mode="json") if method else {}), "entries": len(tokenizer), "arm": name}
    return Arm(name, method, role, setting, cutter(tokenizer))


def cutter(tokenizer: PreTrainedTokenizerBase) -> Cutter:
    """A tokenizer of transformers."""

    def ends(text: str) -> list[int]:
        return [end for _, end in token_offsets(tokenizer, text)[1]]

    def back(text: str) -> str:
        return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids))

    return Cutter(ends, back)


def _bpe(name: str, texts: Sequence[str], size: int) -> Arm:
    bare = {"custom_tokens": (), "normalization": "none", "pad_to_power_of_two": False, "min_frequency": 1}
    tokenizer = KL3M(vocab_size=size, **bare).train(texts)
    return _arm(name, "plain" if name == EQUAL else "control", tokenizer, None)


def _space_ends(text: str) -> list[int]:
    return [at for at, c in enumerate(text) if c == " "] + [len(text)]


def _official() -> Arm:
    """The package of the paper's authors, with its own dictionary and decoder."""
    try:
        from turkish_tokenizer import TurkishTokenizer
    except ImportError:
        raise InputError(
            "the official tokenizer is not installed; run `pip install --no-deps 'turkish-tokenizer<1'`"
        ) from None
    official = TurkishTokenizer()

    def ends(text: str) -> list[int]:
        found, at = [], 0
        for token in official.tokenize(text):
            at += {"<uppercase>": 0, "<unknown>": 1}.get(token, len(token))
            found.append(at)
        return found

    def back(text: str) -> str:
        return official.decode(official.encode(text))

    return Arm(OFFICIAL, role="control", setting={"entries": 32768}, apply=Cutter(ends, back))


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Borders, losses, and the price in tokens."""
    bpe = [EQUAL, *(f"BPE {size}" for size in SIZES)]
    f1 = "; ".join(f"{arm} {c.mean(arm, 'boundary_f1'):.3f}" for arm in c.arms)
    back = "; ".join(f"{arm} {c.mean(arm, 'lossless'):.1%}" for arm in (METHOD, AHEAD, LOOSE, OFFICIAL))
    return [
        Finding(
            "Its cuts agree more with the treebank's than those of BPE of equal size, of other sizes and of the model.",
            all_of(*(above(c.gap("boundary_f1", METHOD, other), 0) for other in (*bpe, OWN, SPACES))),
            main=True,
            note=f"boundary F1: {f1}",
        ),
        Finding(
            "Every text comes back; without the guard, and by the official decoder, many do not.",
            all_of(
                at_least(c.value("lossless", METHOD, ".1%"), 1),
                at_least(c.value("lossless", AHEAD, ".1%"), 1),
                above(c.gap("lossless", METHOD, LOOSE, "+.1%"), 0),
                above(c.gap("lossless", METHOD, OFFICIAL, "+.1%"), 0),
            ),
            note=back,
        ),
        Finding(
            "It needs more tokens than BPE of equal size, and than BPE of a quarter of that.",
            all_of(*(above(c.ratio("pieces", METHOD, other), 1) for other in (EQUAL, "BPE 8192"))),
        ),
        Finding(
            "The dictionary made here agrees with the treebank no less than the official one.",
            at_least(c.gap("boundary_f1", METHOD, OFFICIAL), -0.01),
        ),
        Finding(
            "The rule that looks ahead cuts more as the treebank does than the longest match.",
            above(c.gap("boundary_f1", AHEAD, METHOD), 0),
        ),
        describe("Tokens against the official ones.", str(c.ratio("pieces", METHOD, OFFICIAL))),
    ]
