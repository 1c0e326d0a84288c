"""judge: score solutions, choose among them, and make preference pairs; judge results, or translations; or commit to
hidden reasoning and audit what is billed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.fields import Count, Probability
from ..core.files import records_of
from ..core.outputs import LineWriter, check_file, check_folder, write_folder, write_text
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
)
from .receipts import judge_receipts

if TYPE_CHECKING:
    from ..judge.answers.samples import Sample
    from ..judge.answers.scores import Scores
    from ..judge.contract import ResultsMethod, TranslationMethod
    from ..judge.quality.answer import TranslationRow
    from ..judge.scaling.results import ResultRow

SOLUTIONS_ALONE = ("--trace", "--pairs", "--top-k", "--min-gap", "--raw")
MODEL_ALONE = ("--model", "--dtype", "--device", "--trust-remote-code")


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
@click.option("--save", help="Write the receipts, or the heads that an audit needs, into this folder.")
@click.option("--save", help="Train an estimator on the labeled translations and save it in this folder.")
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
    "level": ..., "accuracy": ..., "tokens": ...}, of one run each or of means, and draws them with --report.

    A method of receipts, such as coin, is told first what to do: `fit` heads from, or `commit` to, lines {"reasoning":
    ..., "answer": ..., "prompt": ...}, both with --save; `audit` receipts.jsonl records.jsonl.
    """
    (method,) = parse_methods([slug], options, "judge")
    from ..judge.contract import ReceiptMethod, ResultsMethod
    A method that judges translations, such as dcsqe, takes lines {"source": ..., "reference": ...}: --model translates,
    and what it does wrong is labeled; with "translation", that is labeled, by its "heads" where its tree is known. With
    --save an estimator learns from them. It then judges lines {"source": ..., "translation": ...}.
    """
    (method,) = parse_methods([slug], options, "judge")
    from ..judge.contract import ResultsMethod, TranslationMethod

    if isinstance(method, ReceiptMethod):
        refuse_unused((*SOLUTIONS_ALONE[1:], "--report"), f"with --method {slug}")
        opening = partial(load_model, model_name, dtype, device, trust_remote_code)
        judge_receipts(method, files, traces, save, force, json_output, opening)
        return
    refuse_unused(("--save",), f"with --method {slug}")
    if isinstance(method, ResultsMethod):
        refuse_unused((*SOLUTIONS_ALONE, *MODEL_ALONE, "--save"), f"with --method {slug}")
        judge_results(method, files, report, force, json_output)
        return
    refuse_unused(("--report",), f"with --method {slug}")
    if isinstance(method, TranslationMethod):
        refuse_unused(SOLUTIONS_ALONE, f"with --method {slug}")
        if method.estimates:
            refuse_unused((*MODEL_ALONE, "--save"), "where an estimator is given")
        judge_translations(method, files, (model_name, dtype, device, trust_remote_code), save, force, json_output)
        return
    refuse_unused(("--save",), f"with --method {slug}")
    rows = [] if traces else [row for path in files for row in read_rows(path)]
    if pairs is None:
        refuse_unused(("--top-k", "--min-gap"), "without --pairs")
    if traces:
        refuse_unused(("--raw",), "with --trace")
    check_pairs(pairs, traces, rows, force)
    loaded = load_model(model_name, dtype, device, trust_remote_code)
    if traces:
        from ..trace.trace import Trace

        rows = [Trace.load(path, loaded.model) for path in files]
    with progress("judge", len(rows)) as update:
        scores = method.scorer(loaded, chat=not raw).score(rows, lambda done, total, *_: update(completed=done))
    if pairs:
        write_pairs(scores, pairs, top_k, min_gap)
    as_json(scores.to_json()) if json_output else click.echo(scores.table())


def judge_results(
    method: ResultsMethod, files: Sequence[str], report: str | None, force: bool, json_output: bool
) -> None:
    """Judge the rows of all files together."""
    from ..judge.scaling.results import Results

    if report:
        check_file(report, force)
    said = method.judge(Results.from_rows(row for path in files for row in read_results(path)))
    if report:
        write_text(report, said.picture())
        click.echo(f"picture: {report}", err=True)
    as_json(said.to_json()) if json_output else click.echo(said.table())


def judge_translations(
    method: TranslationMethod,
    files: Sequence[str],
    model: tuple[str, str | None, str | None, bool],
    save: str | None,
    force: bool,
    json_output: bool,
) -> None:
    """Label the translations of all files, and learn from them where that is asked for; or estimate them."""
    from ..judge.quality.answer import JudgedTranslations

    rows = [row for path in files for row in read_translations(path)]
    if save:
        check_folder(save, force)
    method.check(rows, learns=bool(save))
    if method.estimates:
        judged = method.estimate(rows)
    else:
        missing = any(row.translation is None for row in rows)
        judged = method.label(rows, load_model(*model, translates=True) if missing else None)
    if save:
        with progress("train", None) as update:
            learned = method.fit(judged, lambda done, total, *_: update(completed=done, total=total))
        write_folder(save, lambda folder: [part.save_pretrained(folder) for part in learned], force)
        click.echo(f"estimator: {save}", err=True)
    said = JudgedTranslations(judged)
    as_json(said.to_json()) if json_output else click.echo(said.table())


def read_translations(path: str) -> list[TranslationRow]:
    """The translations of a file of JSON lines."""
    from ..core.schemas import checked
    from ..judge.quality.answer import TranslationRow

    remedy = 'write lines like {"source": "...", "reference": "..."}'
    text = read_text(path, "file of translations")
    return records_of(
        text, path, "translations", remedy, lambda row, where: checked(TranslationRow, row, where, remedy)
    )


def read_results(path: str) -> list[ResultRow]:
    """The results of a file of JSON lines."""
    from ..core.schemas import checked
    from ..judge.scaling.results import ResultRow

    remedy = 'write lines like {"question": "...", "level": 1, "accuracy": 0.5, "tokens": 120}'
    text = read_text(path, "file of results")
    return records_of(text, path, "results", remedy, lambda row, where: checked(ResultRow, row, where, remedy))


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
