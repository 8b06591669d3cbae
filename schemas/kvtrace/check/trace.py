"""Checking a whole trace: its manifest, its ranks and replays, what is derived from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kvtrace.check.derived import check_database
from kvtrace.check.report import Problem, Report, Status
from kvtrace.check.store import StoreCheck
from kvtrace.check.tables import check_tables
from kvtrace.checksums import FIELD, document_sum
from kvtrace.console import progress
from kvtrace.errors import TraceError
from kvtrace.journal import JournalReader
from kvtrace.layout import DATABASE, JOURNAL, MANIFEST, REPLAYS, WHATIFS
from kvtrace.manifest import read_manifest


def check(path: Path) -> Report:
    """Compare every file of a trace with what was written, and what they say with each other.

    Raises
    ------
    TraceError
        Where there is no trace, or one of a format that this version does not read.
    """
    report = Report(str(path))
    report.problems += _check_manifest(path)
    folders = store_folders(path)
    with progress("checking") as show:
        for number, folder in enumerate(folders):
            _check_store(path, folder, report)
            show((number + 1) / (len(folders) + 1))
        damaged = [one for one in report.problems if one.status is Status.DAMAGED]
        if not damaged and not report.recording:
            found = check_database(path)
            if found is not None:
                what = f"{found}; it is built from the segments"
                report.problems.append(Problem(Status.DERIVED, DATABASE, what))
    return report


def store_folders(trace: Path) -> list[Path]:
    """Folders of the ranks and of the results, also those that have lost their journal."""
    found = [path for path in sorted(trace.glob("rank-*")) if path.is_dir()]
    for results in (REPLAYS, WHATIFS):
        found += [path for path in sorted(trace.glob(f"{results}/[!.]*")) if path.is_dir()]
    # What was found out about a replay lies inside it.
    return found + [path.parent for path in sorted(trace.glob(f"{REPLAYS}/[!.]*/[!.]*/{JOURNAL}"))]


def _check_manifest(path: Path) -> Iterator[Problem]:
    try:
        read_manifest(path)
    except TraceError as error:
        if not any(path.glob(f"rank-*/{JOURNAL}")) or _is_as_written(path / MANIFEST):
            raise
        what = f"{error}; it is written again from table runs"
        yield Problem(Status.DERIVED, MANIFEST, what)


def _is_as_written(manifest: Path) -> bool:
    """Whether a manifest that cannot be used is nevertheless what was written: a newer one."""
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        return bool(found.get(FIELD) == document_sum(found))
    except (OSError, ValueError, AttributeError):
        return False


def _check_store(trace: Path, folder: Path, report: Report) -> None:
    """Check one store; again where its writer went on meanwhile and moved what was looked at."""
    while True:
        store = StoreCheck(trace, folder)
        problems = list(store.run())
        alive = _is_written(folder)
        if not problems or not alive or _commits(folder) == store.state.commits:
            break
    report.files += store.files
    report.nbytes += store.nbytes
    report.problems += problems
    if alive:
        report.recording = True
    elif not store.state.complete and not problems:
        what = f"not closed; {store.state.rows} rows were committed"
        report.problems.append(Problem(Status.CUT_OFF, f"{store.name}/{JOURNAL}", what))
    if all(one.status is not Status.DAMAGED for one in problems):
        report.problems += [
            Problem(Status.DAMAGED, f"{store.name}/tables/{table}", what, f"table {table}")
            for table, what in check_tables(folder, store.state)
        ]


def _is_written(folder: Path) -> bool:
    try:
        reader = JournalReader(folder / JOURNAL)
        return not reader.state.closed and reader.writer_alive()
    except TraceError:
        return False


def _commits(folder: Path) -> int:
    return JournalReader(folder / JOURNAL).state.commits
