"""Caches that grow as whole tensors, one per layer, placed in one address space by first fit.

A dynamic cache makes a larger tensor at each step and lets the old one go once it is copied, so
both stand for a moment; what lies between the tensors is free but may be too small for the next.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np

from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import Ints

#: Bytes that allocations are rounded up to, as torch's CUDA allocator does.
ALIGNMENT = 512


@dataclass(frozen=True, eq=False)
class ContiguousUse:
    """What the tensors took after each event; int64 [event].

    Attributes
    ----------
    ts_ns : when.
    used_bytes : bytes of the tensors.
    reach_bytes : the highest address in use, and so what must be reserved.
    hole_bytes : the largest free stretch below it.
    """

    ts_ns: Ints
    used_bytes: Ints
    reach_bytes: Ints
    hole_bytes: Ints

    @property
    def peak_reach_bytes(self) -> int:
        """The most address space that was needed, old and new tensors together."""
        return int(self.reach_bytes.max(initial=0))

    def external_fragmentation(self) -> Ints:
        """Free share of the address space below the highest address, by event: float64."""
        free = self.reach_bytes - self.used_bytes
        return np.asarray(free / np.maximum(1, self.reach_bytes))


class Arena:
    """Addresses from 0 on; the lowest gap that is large enough is taken."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []

    def place(self, size: int) -> tuple[int, int]:
        """Take `size` bytes; the span that they have."""
        at = 0
        for start, end in self.spans:
            if start - at >= size:
                break
            at = end
        span = (at, at + size)
        insort(self.spans, span)
        return span

    def release(self, span: tuple[int, int]) -> None:
        """Give a span back."""
        self.spans.remove(span)

    @property
    def reach(self) -> int:
        """The highest address in use."""
        return self.spans[-1][1] if self.spans else 0

    @property
    def largest_hole(self) -> int:
        """The largest gap below `reach`."""
        at, largest = 0, 0
        for start, end in self.spans:
            largest, at = max(largest, start - at), end
        return largest


def contiguous(trace: Trace) -> ContiguousUse | None:
    """Place what the caches of a trace grew to; None where none grew as a whole."""
    events = trace.sql(
        "select ts_ns, request, layer, event, coalesce(bytes, 0) bytes from kv_events"
        " where block is null and event in ('grow', 'crop', 'free', 'reorder') order by ts_ns"
    ).to_pylist()
    if not any(event["event"] == "grow" and event["bytes"] for event in events):
        return None
    arena = Arena()
    spans: dict[tuple[int | None, int | None], tuple[int, int]] = {}
    rows = []
    for event in events:
        key = (event["request"], event["layer"])
        size = -(-event["bytes"] // ALIGNMENT) * ALIGNMENT
        if event["event"] == "free" or not size:
            gone = [k for k in spans if k[0] == key[0] and key[1] in (None, k[1])]
            for one in gone:
                arena.release(spans.pop(one))
        elif key not in spans or spans[key][1] - spans[key][0] != size:
            span = arena.place(size)
            if key in spans:
                arena.release(spans[key])
            spans[key] = span
        used = sum(end - start for start, end in arena.spans)
        rows.append((event["ts_ns"], used, arena.reach, arena.largest_hole))
    table = np.array(rows, np.int64)
    return ContiguousUse(*(np.ascontiguousarray(table[:, i]) for i in range(4)))
