"""Blocks that must stay: pinned ones, and those of requests in service, under any policy.

A policy keeps its own order, and evicts the first block in it that may go. So there is one form
for all: for each access, the access from which on its block may go again, as far as that access
says. A pinned block may never go, one that a request holds may when the request has ended. Where
no block may go, what comes does not come in, which is told apart from a miss (`REFUSED`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: Instead of an access: never.
FOREVER = np.iinfo(np.int64).max


class Guard(NamedTuple):
    """What a run must not evict, and when; kernels are compiled without where it is None.

    Attributes
    ----------
    until : numpy.ndarray
        int64 [access]: the access from which on the block may go, as far as this one says; more
        than its own index, `FOREVER` where the block is pinned.
    stays : numpy.ndarray
        int64 [block], of the run: the same of all accesses so far.
    full : numpy.ndarray
        int64 [1], of the run: before this access nothing can be evicted.
    ends : numpy.ndarray
        int64 [request]: the first request that comes after each has ended; empty where requests
        hold nothing.
    """

    until: Counts
    stays: Counts
    full: Counts
    ends: Counts


def new_guard(until: Counts, num_blocks: int, ends: Counts | None = None) -> Guard:
    """A guard for one run."""
    if ends is None:
        ends = np.empty(0, np.int64)
    return Guard(until, np.zeros(num_blocks, np.int64), np.zeros(1, np.int64), ends)


@jit
def hold(guard: Guard | None, block: int, i: int) -> None:
    """Note that access `i` is of a block; to be called for every access, before it is served."""
    if guard is not None:
        guard.stays[block] = max(guard.stays[block], guard.until[i])


@jit
def may_go(guard: Guard | None, block: int, i: int) -> bool:
    """Whether a block may be evicted at access `i`."""
    if guard is None:
        return True
    return bool(guard.stays[block] <= i)


@jit
def is_pinned(guard: Guard | None, block: int) -> bool:
    """Whether a block may never be evicted."""
    if guard is None:
        return False
    return bool(guard.stays[block] == FOREVER)


@jit
def is_full(guard: Guard | None, i: int) -> bool:
    """Whether it is known that no block may go at access `i`."""
    if guard is None:
        return False
    return bool(i < guard.full[0])


@jit
def refuse(guard: Guard | None, i: int) -> None:
    """Note that no block may go: not before the next one of all may."""
    if guard is not None and i >= guard.full[0]:
        least = FOREVER
        for stays in guard.stays:
            if i < stays < least:
                least = stays
        guard.full[0] = least


@jit
def last_free(links: Ids, sentinel: int, guard: Guard | None, i: int) -> int:
    """The node nearest a list's tail that may go; the list's sentinel where none may.

    Pinned nodes in the way are set apart.
    """
    node = int(links[sentinel, 0])
    if guard is not None:
        if i < guard.full[0]:
            return sentinel
        while node != sentinel and guard.stays[node] > i:
            node = pass_over(links, node, guard)
    return node


@jit
def pass_over(links: Ids, node: int, guard: Guard) -> int:
    """The node before one that must stay; if that is pinned it is linked to itself.

    So it is not in the way again, and still is what `unlink` can take out of a list. A list may
    then hold fewer nodes than are counted as its own.
    """
    before, behind = int(links[node, 0]), links[node, 1]
    if guard.stays[node] == FOREVER:
        links[before, 1] = behind
        links[behind, 0] = before
        links[node, 0] = node
        links[node, 1] = node
    return before
