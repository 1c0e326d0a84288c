"""judge, for methods of receipts: fit heads, commit to hidden reasoning, audit receipts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.files import records_of
from ..core.outputs import check_folder, write_folder, write_text
from .options import as_json, progress, read_text, refuse_unused, say

if TYPE_CHECKING:
    from pathlib import Path

    from ..judge.contract import ReceiptMethod
    from ..judge.receipts.auditor import AuditReport
    from ..judge.receipts.provider import Provider
    from ..judge.receipts.receipt import Bill, HiddenReasoning
    from ..models.load import Loaded
    from ..trace.trace import Trace

__all__ = ["ACTIONS", "judge_receipts"]

ACTIONS = ("fit", "commit", "audit")
RECEIPTS, RECORDS = "receipts.jsonl", "records.jsonl"
Open = Callable[[], "Loaded"]


def judge_receipts(
    method: ReceiptMethod,
    files: Sequence[str],
    traces: bool,
    save: str | None,
    force: bool,
    json_output: bool,
    load: Open,
) -> None:
    """Do what the first of FILE... says."""
    action, *paths = files
    if action not in ACTIONS:
        raise InputError(f"{method.slug} cannot do {action!r}; write one of {', '.join(ACTIONS)} before the files")
    if action != "commit" and traces:
        raise InputError("--trace is for commit; give JSON lines")
    if action == "audit":
        refuse_unused(("--save", "--force"), "with audit")
        audit(method, paths, json_output, load)
        return
    if save is None:
        raise InputError(f"{action} needs --save; give a folder")
    if not paths:
        raise InputError(f"{action} needs hidden reasoning; give a file of it")
    check_folder(save, force)
    rows = [] if traces else [row for path in paths for row in read_hidden(path)]
    loaded = load()
    if action == "fit":
        fit(method, loaded, rows, save, force)
        return
    commit(method, loaded, read_traces(paths, loaded) if traces else rows, save, force)


def fit(method: ReceiptMethod, loaded: Loaded, rows: Sequence[HiddenReasoning], save: str, force: bool) -> None:
    with progress("fit", None) as update:
        heads = method.fit(loaded, rows, lambda done, total, *_: update(completed=done, total=total))
    write_folder(save, heads.save, force)
    rates = ", ".join(f"{kind} {rate:.0%}" for kind, rate in heads.rates.items())
    click.echo(f"saved: {save}; padded to twice the tokens and convicted: {rates}", err=True)


def commit(
    method: ReceiptMethod, loaded: Loaded, rows: Sequence[HiddenReasoning | Trace], save: str, force: bool
) -> None:
    """Write the bills for the users, and the records that stay with the provider."""
    from ..judge.receipts.provider import hidden_of
    from ..judge.receipts.receipt import Bill

    provider, bills = method.provider(loaded), []
    with progress("commit", len(rows)) as update:
        for row in rows:
            receipt = provider.commit(row)
            bills.append(Bill(receipt=receipt, answer=hidden_of(row).answer, billed=receipt.tokens))
            update(advance=1)

    def write(folder: Path) -> None:
        (folder / RECEIPTS).write_text(as_lines(bill.model_dump(mode="json") for bill in bills), encoding="utf-8")
        (folder / RECORDS).write_text(records_text(provider), encoding="utf-8")

    write_folder(save, write, force)
    count = len(bills)
    click.echo(f"{count} receipts: {save}/{RECEIPTS}, for users; {save}/{RECORDS} stays with the provider", err=True)


def audit(method: ReceiptMethod, paths: Sequence[str], json_output: bool, load: Open) -> None:
    """Audit receipts, opened from the provider's records, in which it is noted what was opened."""
    from ..judge.receipts.provider import Record

    if len(paths) != 2:
        raise InputError(f"audit takes two files, not {len(paths)}; give {RECEIPTS} and the provider's {RECORDS}")
    bills, records = read_bills(paths[0]), read_lines(paths[1], "records", Record.from_json)
    loaded = load()
    auditor, provider = method.auditor(loaded), method.provider(loaded)
    provider.records = {record.receipt.digest: record for record in records}
    reports: list[AuditReport] = []
    try:
        with progress("audit", len(bills)) as update:
            for bill in bills:
                reports.append(auditor.audit(bill.receipt, bill.answer, provider.open, bill.billed))
                update(advance=1)
    finally:
        write_text(paths[1], records_text(provider))
    if json_output:
        as_json([report.model_dump(mode="json") for report in reports])
    else:
        say("\n\n".join(report.table() for report in reports))


def records_text(provider: Provider) -> str:
    return as_lines(record.to_json() for record in provider.records.values())


def as_lines(values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def read_lines(path: str, what: str, check: Callable[[dict[str, Any], str], Any]) -> list[Any]:
    remedy = "give what `tokenry judge --method coin commit` has written"
    return records_of(read_text(path, f"file of {what}"), path, what, remedy, check)


def read_bills(path: str) -> list[Bill]:
    from ..core.schemas import checked
    from ..judge.receipts.receipt import Bill, Receipt

    def check(row: dict[str, Any], where: str) -> Bill:
        receipt = Receipt.from_json(row.get("receipt"), where)
        return checked(Bill, {**row, "receipt": receipt}, where, "give receipts.jsonl as commit has written it")

    return read_lines(path, "receipts", check)


def read_hidden(path: str) -> list[HiddenReasoning]:
    """Hidden reasoning of a file of JSON lines."""
    from ..core.schemas import checked
    from ..judge.receipts.receipt import HiddenReasoning

    remedy = 'write lines like {"reasoning": "...", "answer": "...", "prompt": "..."}'
    text = read_text(path, "file of hidden reasoning")
    return records_of(
        text, path, "hidden reasoning", remedy, lambda row, where: checked(HiddenReasoning, row, where, remedy)
    )


def read_traces(paths: Sequence[str], loaded: Loaded) -> list[Trace]:
    from ..trace.trace import Trace

    return [Trace.load(path, loaded[0]) for path in paths]
