"""Does an audit tell padded bills from honest ones, with few honest ones convicted, and which padding does it miss?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ..judge.coin import Coin
from ..judge.receipts.fingerprints import Fingerprinter
from ..judge.receipts.heads import MatchingHeads
from ..judge.receipts.receipt import AuditSetting, HiddenReasoning
from ..judge.receipts.training import calibrate, new_heads, train_heads, train_verdict
from ..measure.claims import Finding, above, all_of, at_most, describe
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm, Role
from ..measure.tasks.receipts import BILLS, ReceiptTask, documents, remembering
from ..models.embedders import load_minilm

if TYPE_CHECKING:
    from ..measure.compare import Comparison

__all__ = ["build"]

PLAIN, UNTRAINED, RULE, METHOD = "proofs alone", "untrained heads", "thresholds", "learned verdict"
HELD_OUT = 100  # traces that nothing is learned from
SHARES = (0.35, 0.55)  # of the others: heads, verdict, calibration
NAMES = {
    "random": "random tokens",
    "random_half": "random tokens, half as many",
    "random_spread": "random tokens, spread",
    "off_topic": "other topics",
    "same_topic": "the same topic",
    "reasoning": "tokens of the reasoning",
    "answer": "tokens of the answer",
    "prompt": "tokens of the prompt",
    "copy": "the reasoning again",
}


@experiment("coin", Coin, samples=40, seeds=(0, 1, 2), batch=10, quick=8, revision=2, limit=HELD_OUT)
def build(run: Run[Coin]) -> Design:
    """Documents as traces; of the model only the tokenizer counts. A seed trains heads and draws openings."""
    coin = run.settings(Coin, block_size=32)
    traces = documents(run.tokenizer)
    made = Fingerprinter(remembering(load_minilm()), run.tokenizer)
    others = traces[HELD_OUT : HELD_OUT + run.size(len(traces), 96)]
    held_out = traces[: run.count]

    def arm(name: str, apply: Callable, role: Role = "control") -> Arm:
        setting = {"arm": name, **coin.model_dump(mode="json", exclude={"rule", "seed", "heads"})}
        return Arm(name, role=role, setting=setting, apply=apply)

    trained, untrained = (fitted(made, others, coin.setting, on) for on in (True, False))
    return Design(
        task=ReceiptTask(made, held_out, coin.false_alarm, coin.block_size),
        arms=[
            arm(PLAIN, lambda seed: None, "plain"),
            arm(UNTRAINED, lambda seed: (untrained(seed), "learned")),
            arm(RULE, lambda seed: (trained(seed), "rule")),
            arm(METHOD, lambda seed: (trained(seed), "learned"), "method"),
        ],
        baseline=PLAIN,
        statistics=ReceiptTask.statistics,
        notes="Traces are docstrings of modules of Python's library: 24 tokens as prompt, 256 to 768 as hidden "
        "reasoning, 64 as answer, one trace a module; heads, verdict and calibration learn from other modules, padding "
        "takes passages from other traces held out. Every bill is committed to, opened with proofs and judged.",
        tried="A verdict that summed over blocks told padded bills by their length, with traces of nearly one length "
        "(35 modules, some held out now); since then it averages, and lengths differ. With that, on modules "
        "that learn here, heads that began at random had an AUROC of 0.990 for random tokens and 0.747 for other "
        "topics; since then they begin as plain cosines, with which it was 0.760. On test, 40 samples, that was "
        "0.720, below untrained heads. Of the modules that learn here a third was then audited, two seeds, after the "
        "heads had learned from 32 others: for other topics untrained heads had 0.857, heads of 400 steps 0.758, with "
        "blocks of the same trace as further answers 0.790, with a decay of weights besides 0.793, heads of 100 steps "
        "0.878 (for random tokens 0.933, 0.986, 0.991, 0.985 and 0.983). Since then heads take 100 steps.",
    )


def fitted(
    made: Fingerprinter, traces: Sequence[HiddenReasoning], setting: AuditSetting, trained: bool
) -> Callable[[int], MatchingHeads]:
    """Heads of a seed; with `trained` off the heads stay plain cosines, and the verdict learns from them."""
    first, second = (int(share * len(traces)) for share in SHARES)

    @cache
    def of(seed: int) -> MatchingHeads:
        heads = new_heads(made, traces[0], setting, seed, len(traces) - second)
        if trained:
            train_heads(heads, made, traces[:first], seed)
        train_verdict(heads, made, traces[first:second], seed)
        calibrate(heads, made, traces[second:])
        return heads

    return of


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """What the audit tells apart, whom it wrongs, what the controls do, and what it does not see."""
    return [
        Finding(
            "Bills padded to twice their tokens are told from honest ones: with random tokens at an AUROC above 0.9, "
            "with passages of other topics above 0.75.",
            all_of(
                above(c.value("auroc_random", METHOD), 0.9),
                above(c.value("auroc_off_topic", METHOD), 0.75),
            ),
            main=True,
            note=_row(c, METHOD, "auroc", ".3f"),
        ),
        Finding(
            "Of honest bills at most twice the wanted 5 % are convicted.",
            at_most(c.value("convicted_honest", METHOD, ".1%"), 0.1),
            note="; ".join(f"{arm} {c.mean(arm, 'convicted_honest'):.1%}" for arm in c.arms),
        ),
        Finding(
            "Heads that were trained tell passages of other topics better than untrained ones.",
            above(c.gap("auroc_off_topic", METHOD, UNTRAINED), 0),
            note=_row(c, UNTRAINED, "auroc", ".3f"),
        ),
        Finding(
            "The learned verdict convicts more bills padded with passages of other topics than thresholds do.",
            above(c.gap("convicted_off_topic", METHOD, RULE, "+.1%"), 0),
            note=f"{_row(c, RULE, 'convicted', '.0%')}; AUROC {_row(c, RULE, 'auroc', '.3f')}",
        ),
        describe("What is convicted, by the kind of padding.", _row(c, METHOD, "convicted", ".0%")),
        describe(
            "What it does not see: kinds of which less than half are convicted.",
            ", ".join(f"{NAMES[n]} {rate:.0%}" for n, rate in _rates(c).items() if rate < 0.5) or "none of these kinds",
        ),
        describe(
            "What an honest trace exposes.",
            f"{c.mean(METHOD, 'exposed'):.0%} of the fingerprints, {c.mean(METHOD, 'shown'):.1%} of the tokens",
        ),
    ]


def _rates(c: Comparison) -> dict[str, float]:
    return {name: c.mean(METHOD, f"convicted_{name}") for name in BILLS}


def _row(c: Comparison, arm: str, what: str, form: str) -> str:
    return ", ".join(f"{NAMES[name]} {c.mean(arm, f'{what}_{name}'):{form}}" for name in BILLS)
