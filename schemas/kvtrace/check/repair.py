"""Mending a trace: what is derived is built again, what is damaged is put right or put aside."""

from __future__ import annotations

import json
import time
from pathlib import Path

from kvtrace import database
from kvtrace.check.mend import mended_file, mended_journal
from kvtrace.check.rebuild import Rebuild
from kvtrace.check.report import Problem, Report, Status
from kvtrace.check.store import StoreCheck
from kvtrace.check.trace import check, store_folders
from kvtrace.errors import TraceError
from kvtrace.layout import DATABASE, JOURNAL, MANIFEST, QUARANTINE, REPLAYS, TABLES, WHATIFS
from kvtrace.manifest import Manifest


def repair(trace: Path, report: Report) -> list[str]:
    """Mend what `report` found; what was done, a line each.

    Nothing is deleted: whatever is replaced or given up is moved to `quarantine/<time>/`, under
    the path it had in the trace.

    Raises
    ------
    TraceError
        Where the trace is being recorded, or cannot be written.
    """
    if report.recording:
        raise TraceError(
            f"{trace} is being recorded; a trace at rest was expected; repair it afterwards"
        )
    aside = Quarantine(trace)
    try:
        done = _mend(trace, aside, report)
        if done:
            report = check(trace)
        done += _put_aside(trace, aside, report)
    except OSError as error:
        raise TraceError(
            f"{trace} cannot be repaired ({error}); a folder that can be written was expected;"
            " copy the trace to where it can be"
        ) from error
    if any(one.path == MANIFEST for one in report.problems):
        _write_manifest(trace, aside)
        done.append(f"{MANIFEST} was written again from table runs")
    if done or any(one.path == DATABASE for one in report.problems):
        database.build(trace)
        done.append(f"{DATABASE} was built again")
    return done


class Quarantine:
    """Where damaged files go: `quarantine/<time>/` in the trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self.folder = trace / QUARANTINE / time.strftime("%Y%m%d-%H%M%S")

    def put(self, path: Path) -> None:
        """Move a file or folder, if it is there."""
        place = self.folder / path.relative_to(self._trace)
        if path.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)

    def replace(self, path: Path, data: bytes) -> None:
        """Move a file and write another in its place."""
        self.put(path)
        path.write_bytes(data)


def _mend(trace: Path, aside: Quarantine, report: Report) -> list[str]:
    """Put right what has one wrong bit and a checksum that says so."""
    done = []
    for folder in store_folders(trace):
        journal = folder / JOURNAL
        store = StoreCheck(trace, folder)
        broken = {one.path for one in [*report.problems, *store.check_journal()]}
        names = [name for name in (JOURNAL, *store.state.files) if f"{store.name}/{name}" in broken]
        for name in names:
            if not (folder / name).exists():
                continue
            is_journal = name == JOURNAL
            right = (
                mended_journal(journal) if is_journal else mended_file(folder, name, store.state)
            )
            if right is not None and right != (folder / name).read_bytes():
                aside.replace(folder / name, right)
                done.append(f"{store.name}/{name} had one wrong bit and is as it was written")
    return done


def _put_aside(trace: Path, aside: Quarantine, report: Report) -> list[str]:
    done = []
    # Whole segments that contradict each other are nothing that moving files would mend.
    damaged = [
        one
        for one in report.problems
        if one.status is Status.DAMAGED and Path(one.path).parent.name != TABLES
    ]
    for folder in store_folders(trace):
        name = folder.relative_to(trace).as_posix()
        mine = [one for one in damaged if one.path.startswith(f"{name}/")]
        if not mine or not folder.exists():
            continue
        if name.startswith(REPLAYS):
            aside.put(folder)
            done.append(f"{name} was put aside; kvtrace replay computes it again")
        elif name.startswith(WHATIFS):
            aside.put(folder)
            done.append(f"{name} was put aside; the command that made it computes it again")
        else:
            done += _rebuild(trace, folder, aside, mine)
    return done


def _rebuild(trace: Path, folder: Path, aside: Quarantine, problems: list[Problem]) -> list[str]:
    name = folder.relative_to(trace).as_posix()
    rebuild = Rebuild(trace, folder, {one.path.removeprefix(f"{name}/") for one in problems})
    if not rebuild.lines:
        aside.put(folder)
        return [f"{name} was put aside: nothing in it can be used without its journal"]
    lost = rebuild.run(aside.put)
    return [f"{name}/{file} was put aside; lost: {what}" for file, what in lost]


def _write_manifest(trace: Path, aside: Quarantine) -> None:
    stores = database.stores_by_rank(trace)
    runs = [row for store in stores.values() for row in store.table("runs").to_pylist()]
    if not runs:
        raise TraceError(
            f"{trace} has no table runs; the manifest is made from it; restore {MANIFEST}"
        )
    aside.put(trace / MANIFEST)
    first = runs[0]
    Manifest(
        first["kvtrace_version"],
        first["started_ns"],
        first["source"],
        json.loads(first["command"]),
    ).write(trace)
