"""Several traces as one: each of their ranks becomes a rank of the new trace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvtrace import database, tables
from kvtrace.errors import InputError, TraceError
from kvtrace.export.target import new_target
from kvtrace.layout import JOURNAL, REPLAYS, rank_directory
from kvtrace.manifest import Manifest
from kvtrace.places import RowPlaces
from kvtrace.renumber import renumbered
from kvtrace.rewrite import Rewrite, Tell, count_parts
from kvtrace.store import StoreReader
from kvtrace.trace import Trace
from kvtrace.version import __version__

#: What a trace of several sources is, is what the least real of them is.
_SOURCES = ("synthetic", "imported", "recorded")


@dataclass(frozen=True)
class _Input:
    """One of the traces."""

    trace: Trace
    #: The new rank of each of its own.
    ranks: Mapping[int, int]
    #: The new name of each of its replays.
    replays: Mapping[str, str]


def merge(
    traces: Sequence[Trace],
    out: Path,
    *,
    command: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> Trace:
    """Write one trace that holds all that several hold.

    Ranks are numbered anew, in the order of the traces, and with them requests, rows, steps,
    models and blocks. Replays come along; of equal names the later one gets that of its trace
    behind it. Where each rank came from stands in `runs.merged_from`.

    Raises
    ------
    InputError
        Where one trace is given twice, none is, or `out` exists and `force` is not given.
    TraceError
        Where one is being recorded or damaged.
    """
    inputs = _inputs(traces)
    tell = _Progress(inputs, progress)
    with new_target(out, force=force) as place:
        place.mkdir()
        source = next(s for s in _SOURCES if s in {t.manifest.source for t in traces})
        Manifest(__version__, time.time_ns(), source, list(command)).write(place)
        for one in inputs:
            for old, new in one.ranks.items():
                rewrite = Rewrite(_rank_change(one, old), tell=tell)
                rewrite.run(one.trace.store(old), place / rank_directory(new))
            for old_name, new_name in one.replays.items():
                _merge_replay(one, old_name, place / REPLAYS / new_name, tell)
        database.build(place)
    return Trace(out)


def _inputs(traces: Sequence[Trace]) -> list[_Input]:
    if not traces:
        raise InputError("no trace was given; at least one was expected; name those to merge")
    paths = [trace.path.resolve() for trace in traces]
    taken: set[str] = set()
    found = []
    first = 0
    for number, trace in enumerate(traces):
        if paths[number] in paths[:number]:
            raise InputError(f"{trace.path} was given twice; each once was expected; leave one out")
        if trace.status == "recording":
            raise TraceError(
                f"{trace.path} is being recorded; one that has ended was expected; stop the"
                " recording"
            )
        names = {}
        for store in database.replay_stores(trace.path):
            old = store.directory.name
            names[old] = _free(old, trace.name, taken)
            taken.add(names[old])
        ranks = {rank: first + index for index, rank in enumerate(trace.ranks)}
        first += len(ranks)
        found.append(_Input(trace, ranks, names))
    return found


def _free(name: str, trace: str, taken: set[str]) -> str:
    """A name that no other replay has."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{trace}" if number == 2 else f"{name}-{trace}-{number}"
    return found


def _rank_change(one: _Input, rank: int) -> Callable[[str, pa.Table], pa.Table]:
    manifest = one.trace.manifest
    origin: dict[str, Any] = {
        "trace": one.trace.path.name,
        "rank": rank,
        "command": manifest.command,
    }

    def change(table: str, rows: pa.Table) -> pa.Table:
        found = renumbered(table, rows, one.ranks)
        if table == "runs":
            earlier = rows["merged_from"].to_pylist()
            texts = [
                json.dumps(origin if text is None else {**origin, "merged_from": json.loads(text)})
                for text in earlier
            ]
            found = _with(found, "merged_from", texts)
        return found

    return change


def _merge_replay(one: _Input, name: str, place: Path, tell: Tell) -> None:
    """The result, and what was found out about it afterwards, which lies inside its folder."""

    def change(table: str, rows: pa.Table) -> pa.Table:
        found = renumbered(table, rows, one.ranks)
        return _with(found, "replay", [place.name] * len(rows))

    source = one.trace.replay(name)
    rewrite = Rewrite(change, tell=tell)
    whole = rewrite
    if not source.table("replay_ranks").num_rows:
        # An older result is of one rank and does not say so.
        whole = replace(rewrite, extra={"replay_ranks": _rank_rows(one, name, place.name)})
    whole.run(source, place)
    for journal in sorted(source.directory.glob(f"[!.]*/{JOURNAL}")):
        folder = journal.parent
        rewrite.run(StoreReader(folder), place / folder.name)


def _rank_rows(one: _Input, name: str, replay: str) -> pa.Table:
    places: RowPlaces = one.trace.replay_places(name)
    return tables.to_arrow(
        "replay_ranks",
        {
            "replay": [replay] * len(places.counts),
            "rank": [one.ranks[rank] for rank in places.counts],
            "first_index": list(places.first.values()),
            "rows": list(places.counts.values()),
        },
    )


def _with(rows: pa.Table, name: str, values: list[str]) -> pa.Table:
    index = rows.schema.get_field_index(name)
    return rows.set_column(index, rows.schema.field(name), pa.array(values, pa.string()))


class _Progress:
    """Counts the parts that were written."""

    def __init__(self, inputs: Sequence[_Input], progress: Callable[[float], None]) -> None:
        stores = [one.trace.store(rank) for one in inputs for rank in one.ranks]
        stores += [s for one in inputs for s in database.replay_stores(one.trace.path)]
        self._whole = max(1, sum(count_parts(store) for store in stores))
        self._done = 0
        self._progress = progress

    def __call__(self) -> None:
        self._done += 1
        self._progress(min(1.0, self._done / self._whole))
