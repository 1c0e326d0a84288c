"""judge: score solutions, choose among them, and make preference pairs; judge results, or translations; or commit to
hidden reasoning and audit what is billed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..core.errors import InputError
from ..core.fields import Count, Probability
from ..core.files import records_of
from ..core.outputs import LineWriter, check_file
from .options import (
    Number,
    as_json,
    example,
    force_option,
    load_model,
    model_options,
    parse_methods,
    progress,
    read_text,
    refuse_unused,
    say,
)
from .receipts import judge_receipts
from .results import ResultsReader, judge_results
from .translations import judge_translations

if TYPE_CHECKING:
    from ..judge.answers.samples import Sample
    from ..judge.answers.scores import Scores

MODEL = ("--model", "--dtype", "--device")
# what only some kinds of methods take
SPECIAL = (
    *("--trace", "--pairs", "--top-k", "--min-gap", "--raw", "--report", "--save", "--score", "--tokenizer"),
    *MODEL,
)


@click.command(epilog=example("tokenry judge --method crew -o marker=answer --pairs pairs.jsonl solutions.jsonl"))
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--method", "slug", required=True, help="A judge method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--trace", "traces", is_flag=True, help="The files are traces of solutions (Trace.save).")
@click.option("--pairs", help="Write preference pairs of right and wrong solutions (JSON lines).")
@click.option("--top-k", type=Number(Count), default=10, show_default=True, help="Pairs per prompt.")
@click.option("--min-gap", type=Number(Probability), help="Smallest difference of scores in a pair; default: any.")
@click.option("--raw", is_flag=True, help="Take the prompts as they are, without the chat template.")
@click.option("--report", help="Write a picture of the results (SVG).")
@click.option("--save", help="New folder for receipts, or for what is learned: heads of an audit, an estimator.")
@click.option("--score", help="Which score of a log counts, where it has several.")
@click.option("--tokenizer", help="Counts the tokens of lm-eval's logs: that of the model they are of.")
@force_option
@model_options
def judge(
    files: tuple[str, ...],
    slug: str,
    options: tuple[str, ...],
    traces: bool,
    pairs: str | None,
    top_k: int,
    min_gap: float | None,
    raw: bool,
    report: str | None,
    save: str | None,
    score: str | None,
    tokenizer: str | None,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Score solutions; for each prompt show the best one and what a vote weighted by the scores says.

    A line of FILE is {"prompt": ..., "solution": ...} or {"prompt": ..., "solutions": [...]}; with "answer", the right
    one, solutions are marked right or wrong, which --pairs needs. FILE '-' reads standard input.

    A method that judges results over levels of effort, such as arise, needs no model. It takes lines {"question": ...,
    "level": ..., "accuracy": ..., "tokens": ...}, of one run each or of means, and draws them with --report. A log of
    lm-eval (samples_*.jsonl) or of inspect_ai (.eval, .json) is given with its level: low=LOG high=LOG.

    A method of receipts, such as coin, is told first what to do: `fit` heads from, or `commit` to, lines {"reasoning":
    ..., "answer": ..., "prompt": ...}, both with --save; `audit` receipts.jsonl records.jsonl.

    A method that judges translations, such as dcsqe, takes lines {"source": ..., "reference": ...}: --model translates,
    and what it does wrong is labeled; with "translation", that is labeled, by its "heads" where its tree is known. With
    --save an estimator learns from them. It then judges lines {"source": ..., "translation": ...}.
    """
    (method,) = parse_methods([slug], options, "judge")
    from ..judge.contract import ReceiptMethod, ResultsMethod, TranslationMethod

    opening = partial(load_model, model_name, dtype, device, trust_remote_code)
    if isinstance(method, ReceiptMethod):
        take_only(slug, "--trace", "--save", *MODEL)
        judge_receipts(method, files, traces, save, force, json_output, opening)
    elif isinstance(method, ResultsMethod):
        take_only(slug, "--report", "--score", "--tokenizer")
        reading = ResultsReader(files, score, tokenizer, trust_remote_code)
        judge_results(method, reading.rows(), report, force, json_output)
    elif isinstance(method, TranslationMethod):
        take_only(slug, "--save", *MODEL)
        if method.estimates:
            refuse_unused(("--save", *MODEL, "--trust-remote-code"), "where an estimator is given")
        judge_translations(method, files, save, force, json_output, opening)
    else:
        take_only(slug, "--trace", "--pairs", "--top-k", "--min-gap", "--raw", *MODEL)
        judge_solutions(method, files, Asked(traces, pairs, top_k, min_gap, raw), force, json_output, opening)


def take_only(slug: str, *taken: str) -> None:
    """Refuse what other kinds of methods take."""
    refuse_unused(tuple(name for name in SPECIAL if name not in taken), f"with --method {slug}")


class Asked(NamedTuple):
    """What is asked of solutions: see the options of the same names."""

    traces: bool
    pairs: str | None
    top_k: int
    min_gap: float | None
    raw: bool


def judge_solutions(
    method: Any, files: Sequence[str], asked: Asked, force: bool, json_output: bool, opening: Callable[[], Any]
) -> None:
    """Score the solutions of all files together."""
    rows = [] if asked.traces else [row for path in files for row in read_rows(path)]
    if asked.pairs is None:
        refuse_unused(("--top-k", "--min-gap"), "without --pairs")
    if asked.traces:
        refuse_unused(("--raw",), "with --trace")
    check_pairs(asked.pairs, asked.traces, rows, force)
    loaded = opening()
    if asked.traces:
        from ..trace.trace import Trace

        rows = [Trace.load(path, loaded.model) for path in files]
    with progress("judge", len(rows)) as update:
        scorer = method.scorer(loaded, chat=not asked.raw)
        scores = scorer.score(rows, lambda done, total, *_: update(completed=done))
    if asked.pairs:
        write_pairs(scores, asked.pairs, asked.top_k, asked.min_gap)
    as_json(scores.to_json()) if json_output else say(scores.table())


def read_rows(path: str) -> list[Sample]:
    """The solutions of a file of JSON lines."""
    remedy = 'write lines like {"prompt": "...", "solution": "..."}'
    lines = records_of(read_text(path, "file of solutions"), path, "solutions", remedy, solutions_of)
    return [row for rows in lines for row in rows]


def solutions_of(row: dict[str, Any], where: str) -> list[Sample]:
    """The solutions of one line."""
    prompt, answer = row.get("prompt"), row.get("answer")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where} has the prompt {prompt!r}; give the question as text")
    if ("solution" in row) == ("solutions" in row):
        raise InputError(f"{where} needs either 'solution', a text, or 'solutions', a list of texts")
    solutions = [row["solution"]] if "solution" in row else row["solutions"]
    if not isinstance(solutions, list) or not solutions or not all(isinstance(s, str) for s in solutions):
        raise InputError(f"{where} has no solutions as text; give 'solution', a text, or 'solutions', a list of texts")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str | None):
        raise InputError(f"{where} has the answer {answer!r}; give the right answer as text or number")
    from ..judge.answers.samples import Sample

    return [Sample(prompt, solution, answer) for solution in solutions]


def check_pairs(pairs: str | None, traces: bool, rows: Sequence[Sample], force: bool) -> None:
    """Refuse --pairs before anything runs, where there will be none."""
    if pairs is None:
        return
    if traces:
        raise InputError("--pairs needs right answers, which traces do not hold; give JSON lines with 'answer'")
    missing = next((row.prompt for row in rows if row.answer is None), None)
    if missing is not None:
        raise InputError(f"--pairs needs the right answer of every prompt; add 'answer' to {missing[:40]!r}")
    check_file(pairs, force)


def write_pairs(scores: Scores, path: str, top_k: int, min_gap: float | None) -> None:
    made = scores.pairs(top_k, min_gap)
    with LineWriter(path) as lines:
        lines.add(made)
    click.echo(f"{len(made)} pairs: {path}; {made.info.description}", err=True)
