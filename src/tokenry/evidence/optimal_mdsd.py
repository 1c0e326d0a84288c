"""How often could drafts be accepted, and how often are they?

Target and drafter read the same text. At every position the ceiling of each way of drafting stands beside the rate of
each verifier, by formula and by one real draw. What comes out is checked against the target's distribution, with a
control that takes any draft and must fail this check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.problems import Arithmetic, draw_problems
from ..decode.api import generate
from ..decode.optimal_mdsd import OptimalMDSD
from ..decode.speculation.acceptance import optimal_acceptance, verifier_acceptance
from ..decode.speculation.drafters import Drafter, ModelDrafter, make_drafter
from ..decode.speculation.verifiers import SAMPLINGS, VERIFIERS, Selection, Verifier, sample_drafts
from ..measure.claims import Check, Contrast, Finding, above, all_of, at_most, exactly
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import OF_METHOD, Arm, Metric, Outcome, Sample

__all__ = ["AcceptanceTask", "Reach", "build"]

SINGLE, NAIVE, RRS, WITHOUT, KSEQ, GREEDY = "single", "naive", "rrs", "rrs-without", "kseq", "greedy"
SEVERAL = (NAIVE, RRS, KSEQ, WITHOUT, GREEDY)
ANY = "any draft"
TEMPERATURES, DRAFTS = (1.0, 0.6), (1, 2, 4, 8)
NEW_TOKENS = 80  # positions of each text at most
PATHS = 200  # random paths for the rate of rrs-without ...
SMALL, FEW = 64, 4  # ... which is exact up to this vocabulary and this many drafts
MATTERS = 0.01  # of an acceptance rate
ERRORS, MOST_ERRORS = 3, 4  # standard errors off that K-SEQ and greedy may be, and any of the many comparisons


@experiment("optimal-mdsd", OptimalMDSD, model="zoo/reasoner", samples=36, quick=2)
def build(run: Run[OptimalMDSD]) -> Design:
    """Ceilings and verifiers with one to eight drafts at two temperatures, on texts of the model's own, of at most 80
    positions each. The drafter of `method` replaces zoo/drafter.
    """
    given = {name: value for name, value in run.given.items() if name in ("drafter", "exit_layers")}
    settings = OptimalMDSD(**{"drafter": "zoo/drafter", **given})
    drafter = make_drafter(settings.drafter, run.model, settings.exit_layers)
    exact_up_to = FEW if run.model.config.get_text_config().vocab_size <= SMALL else 1
    return Design(
        task=AcceptanceTask(run.model, run.tokenizer, drafter, run.count),
        arms=make_arms({"drafter": settings.drafter, "exit_layers": settings.exit_layers}, exact_up_to),
        baseline=SINGLE,
        models={"drafter": drafter.model} if type(drafter) is ModelDrafter else {},  # others are in the settings
        notes=f"Drafts come from {settings.drafter}. Texts are what the target writes at temperature 1 for problems of "
        f"the test split, at most {NEW_TOKENS} tokens each. `single` has one draft in every column. Ceilings are no "
        f"verifiers; `{ANY}` emits the first draft whatever the target says and is not lossless. The rate of {WITHOUT} "
        f"with more than {exact_up_to} drafts is estimated from {PATHS} random paths per position.",
    )


def make_arms(drafts: dict[str, Any], exact_up_to: int) -> list[Arm]:
    """One draft, the verifiers of several, any draft, and the ceilings. Above so many drafts the rate of `rrs-without`
    is estimated."""

    def arm(name: str, role: Any, rate: Callable, *more: Any, setting: dict[str, Any] = OF_METHOD) -> Arm:
        return Arm(name, role=role, setting=setting, apply=Reach(rate, *more))

    def rate(name: str) -> Callable[[Tensor, Tensor, int], Tensor]:
        def of(p: Tensor, q: Tensor, n: int) -> Tensor:
            paths = PATHS if name == WITHOUT and n > exact_up_to else None
            return verifier_acceptance(p, q, n, name, monte_carlo=paths, generator=torch.Generator().manual_seed(n))

        return of

    return [
        arm(SINGLE, "plain", rate(SINGLE), VERIFIERS[SINGLE], 1),
        *(
            arm(name, "control" if name == NAIVE else "method", rate(name), VERIFIERS[name], setting=drafts)
            for name in SEVERAL
        ),
        arm(ANY, "control", lambda p, q, n: p.new_ones(len(p)), AnyDraft()),
        *(arm(ceiling(scheme), "control", partial(optimal_acceptance, scheme=scheme)) for scheme in SAMPLINGS),
    ]


def ceiling(scheme: str) -> str:
    return f"ceiling, {scheme}"


def setting(temperature: float, drafts: int) -> str:
    return f"T={temperature:g} n={drafts}"


ALL = [setting(t, n) for t in TEMPERATURES for n in DRAFTS]
SEVERAL_DRAFTS = [setting(t, n) for t in TEMPERATURES for n in DRAFTS if n > 1]


# --- the task ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What is measured of an arm.

    Attributes:
        rate: acceptance by formula, (p, q, n) -> (positions,).
        verifier: what really selects; None for a ceiling.
        most: drafts it can take at most.
    """

    rate: Callable[[Tensor, Tensor, int], Tensor]
    verifier: Verifier | None = None
    most: int | None = None


class AnyDraft:
    """Emits the first draft. Accepts always, and has the draft's distribution instead of the target's."""

    sampling = "with"

    def select(
        self, target: Tensor, draft: Tensor, tokens: Sequence[int], generator: torch.Generator | None
    ) -> Selection:
        return Selection(tokens[0], True)


class AcceptanceTask:
    """Texts of the target's own, read by target and drafter. An arm's `apply` is a `Reach`."""

    slug: ClassVar[str] = "acceptance"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        *(Metric(name, "higher", f"acceptance by formula, {name}") for name in SEVERAL_DRAFTS),
        *(Metric(f"measured {name}", None, f"acceptance of one draw a position, {name}") for name in SEVERAL_DRAFTS),
    )

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: Drafter, count: int
    ) -> None:
        self.model, self.drafter = model, drafter
        questions = [problem.question for problem in draw_problems(Arithmetic(), count)]
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "seed": 0}
        out = generate(model, tokenizer, questions, **options)
        self.texts = dict(zip(questions, zip(out.prompt_ids, out.new_ids)))
        self.read: tuple[str, tuple[Tensor, Tensor]] | None = None

    def samples(self) -> list[Sample]:
        return [Sample(question, question, {"index": i}) for i, question in enumerate(self.texts)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._measure(arm.apply, sample, seed) for sample in samples]

    def _measure(self, reach: Reach, sample: Sample, seed: int) -> Outcome:
        generator = torch.Generator().manual_seed(10_000 * seed + sample.data["index"])
        outcome = Outcome({}, detail={"expected": {}, "accepted": {}, "best": {}})
        for temperature in TEMPERATURES:
            p, q = ((scores / temperature).softmax(-1) for scores in self._scores(sample))
            for n in DRAFTS:
                name, count = setting(temperature, n), min(n, reach.most or n)
                expected = reach.rate(p, q, count)
                outcome.detail["expected"][name] = expected.tolist()
                accepted, best = self._draw(reach.verifier, p, q, count, generator)
                outcome.detail["accepted"][name] = accepted
                outcome.detail["best"][name] = list(zip(best, p.amax(-1).tolist()))
                if n > 1:
                    outcome.metrics[name] = float(expected.mean())
                    outcome.metrics[f"measured {name}"] = float(np.mean(accepted)) if accepted else float("nan")
        return outcome

    def _draw(
        self, verifier: Verifier | None, p: Tensor, q: Tensor, n: int, generator: torch.Generator
    ) -> tuple[list[int], list[int]]:
        """One draw at every position: whether a drafted token came out, and whether the target's most probable did."""
        accepted: list[int] = []
        best: list[int] = []
        if verifier is None:
            return accepted, best
        for target, draft, top in zip(p, q, p.argmax(-1).tolist()):
            tokens, _ = sample_drafts(draft, n, verifier.sampling, generator)
            token, _ = verifier.select(target, draft, tokens, generator)
            accepted.append(int(token in tokens))
            best.append(int(token == top))
        return accepted, best

    def _scores(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Logits of the target and scores of the drafter (positions, vocabulary), where enough drafts can be drawn."""
        if self.read is None or self.read[0] != sample.id:
            prompt, new = self.texts[sample.id]
            with torch.no_grad():
                ids = torch.tensor([prompt + new], device=self.model.device)
                target = self.model(ids).logits[0, len(prompt) - 1 : -1].double().cpu()
                self.drafter.begin(self.model, 1, True)
                draft = torch.cat([self.drafter.root([prompt + new[:i]]) for i in range(len(new))]).double().cpu()
            usable = torch.isfinite(draft).sum(-1) >= max(DRAFTS)
            self.read = sample.id, (target[usable], draft[usable])
        return self.read[1]


# --- the verdict ---------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """What the way of drafting is worth, what verifiers leave, and whether real draws agree. That none exceeds its
    ceiling and that greedy drafts reach theirs is mathematics; tests say it of the code."""
    verifiers = (SINGLE, *SEVERAL)
    rates = {name: largest_error(c, name, "accepted") for name in verifiers}
    tokens = {name: largest_error(c, name, "best") for name in (*verifiers, ANY)}
    return [
        Finding(
            "greedy drafts with their verifier are accepted more often than K-SEQ and recursive rejection",
            all_of(*(beats(c, name, GREEDY, [KSEQ, RRS], "+.4f") for name in SEVERAL_DRAFTS)),
            main=True,
            note="; ".join(
                f"{name}: " + ", ".join(f"{v} {c.mean(v, name):.4f}" for v in verifiers) for name in SEVERAL_DRAFTS
            ),
        ),
        Finding(
            f"drafts without replacement could be accepted more often than drafts with it, by more than {MATTERS}",
            all_of(*(above(c.gap(n, ceiling("without"), ceiling("with"), "+.4f"), MATTERS) for n in SEVERAL_DRAFTS)),
        ),
        Finding(
            f"recursive rejection and K-SEQ stay below the ceilings of their drafts, by more than {MATTERS}",
            all_of(*(above(gap, MATTERS) for verifier in (KSEQ, RRS, WITHOUT) for gap in below_ceiling(c, verifier))),
            note=f"{len(pooled(c, SINGLE, 'expected', ALL[0]))} positions",
        ),
        Finding(
            f"real draws are accepted as often as the formulas say: K-SEQ and greedy within {ERRORS} standard errors, "
            f"all within {MOST_ERRORS}",
            all_of(
                *(_within_errors(rates, name, ERRORS) for name in (KSEQ, GREEDY)),
                *(_within_errors(rates, name, MOST_ERRORS) for name in verifiers if name not in (KSEQ, GREEDY)),
            ),
        ),
        Finding(
            "the target's most probable token comes out as often as the target says; taking any draft fails that",
            all_of(
                *(_within_errors(tokens, name, MOST_ERRORS) for name in verifiers),
                above(_errors(tokens, ANY), MOST_ERRORS),
            ),
        ),
    ]


def pooled(c: Comparison, arm: str, what: str, name: str) -> np.ndarray:
    """What was kept of an arm in a setting, over all positions."""
    return np.concatenate([np.array(d[what][name], float) for d in c.details(arm)])


def errors_off(hits: np.ndarray, chances: np.ndarray) -> float:
    """How many standard errors the number of hits is away from the sum of its chances."""
    variance = float((chances * (1 - chances)).sum())
    off = float((hits - chances).sum())
    return off / variance**0.5 if variance > 1e-12 else (0.0 if abs(off) < 1e-6 else float("inf"))


def largest_error(c: Comparison, arm: str, of: str) -> float:
    """The largest distance over the settings, in standard errors: of "accepted" or of "best"."""
    found = []
    for name in ALL:
        hits = pooled(c, arm, of, name)
        found.append(errors_off(*hits.T) if of == "best" else errors_off(hits, pooled(c, arm, "expected", name)))
    return max(found, key=abs)


def below_ceiling(c: Comparison, verifier: str) -> list[Contrast]:
    """Ceiling of the same drafts minus the verifier, in each setting."""
    return [c.gap(name, ceiling(VERIFIERS[verifier].sampling), verifier, "+.4f") for name in SEVERAL_DRAFTS]


def _errors(found: dict[str, float], name: str) -> Contrast:
    return exactly(abs(found[name]), f"standard errors, {name}", ".2f")


def _within_errors(found: dict[str, float], name: str, most: int) -> Check:
    return at_most(_errors(found, name), most)
