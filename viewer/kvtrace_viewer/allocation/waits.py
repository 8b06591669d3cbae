"""When requests had to wait: before their first step, and again after they were preempted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, SHARE, Ints, PoolHistory


@dataclass(frozen=True)
class Absence:
    """A request that had lost all its blocks, until it was processed again.

    Attributes
    ----------
    request : int
        Its number.
    lost_step : int
        The first step without it: its blocks were gone before.
    back_step : int
        The step that processed it again.
    """

    request: int
    lost_step: int
    back_step: int

    @property
    def steps(self) -> int:
        """Steps that it missed."""
        return self.back_step - self.lost_step


def first_steps(history: PoolHistory) -> dict[int, int]:
    """The first step that processed each request."""
    requests, places = np.unique(history.part_request, return_index=True)
    return {int(r): int(history.part_step[p]) for r, p in zip(requests, places, strict=True)}


def absences(history: PoolHistory) -> list[Absence]:
    """Every preemption after which the request came back, in the order of the requests.

    A request is preempted when it gives up its last block between two steps that process it.
    """
    change = np.where(np.isin(history.kind, (ALLOCATE, SHARE)), 1, -1)
    change[history.kind == EVICT] = 0
    found = []
    for request in np.unique(history.part_request).tolist():
        mine = history.request == request
        moments = history.moment[mine & (change != 0)]
        held = np.cumsum(change[mine & (change != 0)])
        steps = history.part_step[history.part_request == request]
        lost = moments[held == 0]
        after = np.searchsorted(steps, lost)
        again = (after > 0) & (after < len(steps))
        # What it took and gave back before it was processed is one absence.
        backs, firsts = np.unique(steps[after[again]], return_index=True)
        for back, first in zip(backs.tolist(), firsts.tolist(), strict=True):
            found.append(Absence(request, int(lost[again][first]), back))
    return found


def between(begins: list[int], ends: list[int], steps: int) -> Ints:
    """How many of the spans each step lies in, ends not counted: int64 [step]."""
    change = np.zeros(steps + 1, np.int64)
    np.add.at(change, np.array(begins, np.int64), 1)
    np.add.at(change, np.array(ends, np.int64), -1)
    return np.cumsum(change)[:-1]
