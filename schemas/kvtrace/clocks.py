"""The clocks of the processes of one trace: noting them down, and aligning them afterwards.

Times in a trace are the wall clock of the machine that recorded them. Two processes on one host
share its monotonic clock, so pairs of both clocks, noted while recording, align them to within a
reading, also where the wall clock was set meanwhile. Between hosts nothing but their wall clocks
is known, and how far the kernel believes each to be off (NTP's bound); that is then said.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvtrace.ranks import Column

Times = NDArray[np.int64]

#: Seconds between two notes while recording: clocks are slewed by 0.5 ms a second at most.
INTERVAL_S = 10.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE = Path("/proc/self/ns/time")
#: `adjtimex` says this where no time service disciplines the clock.
_TIME_ERROR = 5


class ClockNotes:
    """Says when clocks are to be noted, and what they show then."""

    def __init__(self) -> None:
        self._clock_id = _clock_id()
        self._last = -INTERVAL_S

    @property
    def due(self) -> bool:
        """Whether the last note is old."""
        return time.monotonic() - self._last >= INTERVAL_S

    def row(self, event: str) -> Mapping[str, Column]:
        """Row of table `clock_sync`: both clocks, now."""
        self._last = time.monotonic()
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        row = {
            "run": 0,
            "event": event,
            "wall_ns": wall,
            "monotonic_ns": (before + after) // 2,
            "spread_ns": after - before,
            "wall_error_ns": wall_error_ns(),
            "clock_id": self._clock_id,
        }
        return {name: [value] for name, value in row.items()}


class _Timex(ctypes.Structure):
    """The head of the kernel's `struct timex`, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_char * 256),
    )


def wall_error_ns() -> int | None:
    """How far the wall clock may be off by the kernel's own bound.

    None where no time service disciplines the clock, or the system does not say.
    """
    if not sys.platform.startswith("linux"):
        return None
    found = _Timex()
    # Modes 0: read, set nothing.
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(found))
    return None if state in (-1, _TIME_ERROR) else int(found.maxerror) * 1000


def _clock_id() -> str | None:
    """What tells one monotonic clock from another: the boot and, of containers, the namespace."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {_TIME_NAMESPACE.readlink()}"
    except OSError:
        return None


@dataclass(frozen=True)
class RankClock:
    """How the times of a rank are put on the clock of the first rank.

    Attributes
    ----------
    rank : int
        The rank.
    basis : str
        reference, monotonic (the same host: its monotonic clock is shared), or wall (another
        host, or clocks were not noted: the wall clocks are taken as they are).
    uncertainty_ns : int or None
        How far an aligned time may be off; None where nobody knows.
    wall, shift : numpy.ndarray
        int64 [note]: at these times of the rank's wall clock, this is added.
    """

    rank: int
    basis: str
    uncertainty_ns: int | None
    wall: Times
    shift: Times

    def align(self, times: Times | int) -> Times:
        """Times of the rank, in nanoseconds of the first rank's clock; int64."""
        given = np.asarray(times, np.int64)
        if not len(self.wall):
            return given
        first = self.wall[0]
        shift = np.interp(given - first, self.wall - first, self.shift)
        return np.asarray(given + np.rint(shift).astype(np.int64))


def rank_clocks(notes: pa.Table, ranks: Sequence[int]) -> dict[int, RankClock]:
    """The clocks of some ranks.

    Parameters
    ----------
    notes : pyarrow.Table
        Table `clock_sync`.
    ranks : sequence of int
        Ascending; the first one that noted its clocks is the reference.
    """
    rows = {
        rank: [row for row in notes.sort_by("wall_ns").to_pylist() if row["run"] == rank]
        for rank in ranks
    }
    reference = next((rank for rank in ranks if rows[rank]), None)
    if reference is None:
        return {rank: _by_wall(rank, [], []) for rank in ranks}
    return {
        rank: _aligned(rank, rows[rank], rows[reference])
        if rank != reference
        else RankClock(rank, "reference", 0, *_none())
        for rank in ranks
    }


def _aligned(rank: int, own: list[dict[str, Any]], other: list[dict[str, Any]]) -> RankClock:
    shared = own and own[0]["clock_id"] is not None and own[0]["clock_id"] == other[0]["clock_id"]
    if not shared:
        return _by_wall(rank, own, other)
    wall, mine = _difference(own)
    other_wall, theirs = _difference(other)
    # How far the other wall clock was ahead of the monotonic one at the moments of our notes.
    # Relative to the first note: as floats whole times would lose some hundred nanoseconds.
    moments, first = other_wall - theirs, other_wall[0] - theirs[0]
    ahead = np.interp(wall - mine - first, moments - first, theirs - theirs[0])
    shift = np.rint(ahead).astype(np.int64) + theirs[0] - mine
    # Between two notes a clock may have been set at any moment.
    steps = [int(np.abs(np.diff(x)).max(initial=0)) for x in (mine, theirs)]
    spread = max(row["spread_ns"] for row in own) + max(row["spread_ns"] for row in other)
    return RankClock(rank, "monotonic", sum(steps) + spread, wall, shift)


def _by_wall(rank: int, own: list[dict[str, Any]], other: list[dict[str, Any]]) -> RankClock:
    errors = [row["wall_error_ns"] for row in (*own, *other)]
    known = own and other and None not in errors
    worst = [max(row["wall_error_ns"] for row in side) for side in (own, other)] if known else []
    return RankClock(rank, "wall", sum(worst) if known else None, *_none())


def _difference(rows: list[dict[str, Any]]) -> tuple[Times, Times]:
    """Wall times of some notes, and the wall clock minus the monotonic clock at each."""
    wall = np.array([row["wall_ns"] for row in rows], np.int64)
    return wall, wall - np.array([row["monotonic_ns"] for row in rows], np.int64)


def _none() -> tuple[Times, Times]:
    return np.empty(0, np.int64), np.empty(0, np.int64)
