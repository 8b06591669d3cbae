"""A trace as a timeline: Chrome's JSON trace events, which Perfetto opens.

A process of the timeline is a rank. Its tracks: the steps of each model, the requests (with their
prefill and their decoding), and KV memory by device as counters. Times are those of the first
rank's clock, in microseconds from the first event.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from kvtrace.clocks import RankClock
from kvtrace.export.kv_memory import kv_memory
from kvtrace.export.target import new_target
from kvtrace.export.timeline import RankTimeline, timelines
from kvtrace.trace import Trace

Event = dict[str, Any]


def export_perfetto(
    trace: Trace,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> int:
    """Write a .json or .json.gz; returns how many events it holds.

    Raises
    ------
    InputError
        Where the file exists and `force` is not given.
    """
    ranks = timelines(trace)
    begin = min((rank.begin_ns for rank in ranks if rank.begin_ns is not None), default=0)
    count = 0
    with new_target(out, force=force) as place, _open(place, out.suffix == ".gz") as file:
        about = {"trace": trace.name, "source": trace.manifest.source, "begin_ns": str(begin)}
        file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[')
        for done, rank in enumerate(ranks, start=1):
            for event in _events(rank, begin):
                file.write((",\n" if count else "\n") + json.dumps(event))
                count += 1
            progress(done / len(ranks))
        file.write("\n]}\n")
    return count


def _open(path: Path, compressed: bool) -> TextIO:
    if compressed:
        return gzip.open(path, "wt", encoding="utf-8")
    return path.open("w", encoding="utf-8")


def _events(rank: RankTimeline, begin: int) -> Iterator[Event]:
    yield from _names(rank)
    time = _Times(rank.clock, begin)
    yield from _steps(rank, time)
    yield from _requests(rank, time)
    for held in kv_memory(rank.events, rank.step_models, rank.request_models):
        yield {
            "ph": "C",
            "name": f"KV memory, {held.device}",
            "pid": rank.rank,
            "ts": time.us(held.ts_ns),
            "args": {"bytes": held.bytes},
        }


class _Times:
    """Microseconds from the first event, on the clock of the first rank."""

    def __init__(self, clock: RankClock, begin: int) -> None:
        self._clock, self._begin = clock, begin

    def us(self, ts_ns: int) -> float:
        return (int(self._clock.align(ts_ns)) - self._begin) / 1000


def _names(rank: RankTimeline) -> Iterator[Event]:
    yield _metadata(rank.rank, 0, "process_name", {"name": rank.name})
    yield _metadata(rank.rank, 0, "process_sort_index", {"sort_index": rank.rank})
    for track, model in enumerate(rank.models, start=1):
        name = f"steps of {rank.models[model]}"
        yield _metadata(rank.rank, track, "thread_name", {"name": name})


def _metadata(pid: int, tid: int, name: str, args: Event) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args}


def _steps(rank: RankTimeline, time: _Times) -> Iterator[Event]:
    tracks = {model: track for track, model in enumerate(rank.models, start=1)}
    for step in rank.steps:
        if step["started_ns"] is None:
            continue
        names = ("step", "batch_size", "num_tokens", "training_step")
        yield {
            "ph": "X",
            "cat": "step",
            "name": step["phase"] or "step",
            "pid": rank.rank,
            "tid": tracks[step["model"]],
            "ts": time.us(step["started_ns"]),
            "dur": (step["duration_ns"] or 0) / 1000,
            "args": {name: step[name] for name in names if step[name] is not None},
        }


def _requests(rank: RankTimeline, time: _Times) -> Iterator[Event]:
    """Slices that may overlap, so each request has a track of its own: the id."""
    for request in rank.requests:
        common = {
            "cat": "request",
            # Local to the process, so that the slice stands with its rank.
            "id2": {"local": str(request.request)},
            "pid": rank.rank,
            "tid": 0,
        }
        facts = {
            "request": request.request,
            "external_id": request.external_id,
            "prompt_tokens": request.prompt_tokens,
            "generated_tokens": request.generated_tokens,
        }
        phases = [("prefill", request.start_ns, request.decode_ns or request.end_ns)]
        if request.decode_ns is not None:
            phases.append(("decode", request.decode_ns, request.end_ns))
        slices = [(request.name, request.start_ns, request.end_ns, facts)]
        slices += [(name, start, end, {}) for name, start, end in phases]
        first, *inner = slices
        yield {**common, "ph": "b", "name": first[0], "ts": time.us(first[1]), "args": first[3]}
        for name, start, end, _ in inner:
            yield {**common, "ph": "b", "name": name, "ts": time.us(start)}
            yield {**common, "ph": "e", "name": name, "ts": time.us(end)}
        yield {**common, "ph": "e", "name": first[0], "ts": time.us(first[2])}
