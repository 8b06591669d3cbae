"""vLLM's own allocator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, push_tail, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, is_pinned
from kvtrace_viewer.blocks.policy import (
    HIT,
    MISS,
    REFUSED,
    UNREAD,
    BlockPolicy,
    Hits,
    Outcome,
    parameter,
)
from kvtrace_viewer.blocks.stream import BlockStream, Counts, Ids
from kvtrace_viewer.replay.jit import jit

Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class VLLM(BlockPolicy):
    """Allocate as vLLM does: whole requests, prefix hits only, blocks in use never evicted.

    From its documentation of automatic prefix caching. A request is looked up block by block
    until the first miss, full blocks of the prompt only, and never all of them: the last token is
    always computed, so at most (tokens - 1) // block_size. What it then lacks is taken from the
    head of a queue of free blocks, which evicts what was cached there. A finished request's blocks
    join the queue's tail, its last block first; blocks that cannot be cached, not being full,
    join at the head.

    A request finishes when `in_flight` others have come after it, or when the stream says so where
    requests hold their blocks by it, or earlier where its blocks are needed: then the new one
    waits for the oldest. vLLM pins nothing; a pinned block is a cached one that nobody frees.
    Blocks of generated tokens are allocated and cached with the rest. A block that is computed
    twice is cached once (vLLM keeps both). It never asks for blocks that are not full, nor for
    what was generated, and it stops at the first miss, whatever else is counted.
    """

    name: ClassVar[str] = "vllm"
    needs_full_blocks: ClassVar[bool] = True

    in_flight: int = parameter(1, "requests that hold their blocks at once", "requests", 1)

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        lengths = np.diff(stream.starts)
        # Sources that list full blocks only have a last one that takes a place all the same.
        needs = np.maximum(lengths, -(-stream.prompt_tokens // stream.block_size))
        lookups = (np.maximum(stream.prompt_tokens, 1) - 1) // stream.block_size
        whole = np.repeat(stream.prompt_tokens // stream.block_size, lengths)
        ends = self._ends(needs <= capacity, guard)
        evictions, refused = _vllm(
            stream.blocks,
            stream.starts,
            stream.is_full,
            stream.is_full & (stream.index < whole),
            needs,
            lookups,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(needs)]),
            stream.num_blocks,
            capacity,
            ends,
            np.argsort(ends, kind="stable"),
            hits,
            guard,
        )
        notes = []
        if refused:
            notes.append(
                f"vllm: {refused} requests find no room in {capacity} blocks and never run:"
                " all misses"
            )
        return Outcome(hits, evictions, tuple(notes))

    def _ends(self, runs: Flags, guard: Guard | None) -> Counts:
        """First request after the end of each: int64 [request]; of those that run."""
        if guard is not None and len(guard.ends):
            return guard.ends
        which = np.flatnonzero(runs)
        later = which[self.in_flight :]
        ends = np.full(len(runs), len(runs), np.int64)
        ends[which[: len(later)]] = later
        return ends


@jit
def _vllm(
    blocks: Ids,
    starts: Counts,
    is_full: Flags,
    is_asked: Flags,
    needs: Counts,
    lookups: Counts,
    firsts: Counts,
    num_blocks: int,
    capacity: int,
    ends: Counts,
    order: Counts,
    hits: Hits,
    guard: Guard | None,
) -> tuple[int, int]:
    # The pool's places are the nodes; the queue's next is at its tail.
    links = new_links(capacity, 1)
    for place in range(capacity):
        push_head(links, capacity, place)
    cached = np.full(capacity, -1, np.int32)
    place_of = np.full(num_blocks, -1, np.int32)
    users = np.zeros(capacity, np.int32)
    places = np.empty(firsts[-1], np.int32)
    # Requests that run: none before `oldest`; those before `ended` in the order of the ends do not.
    runs = np.zeros(len(starts) - 1, np.bool_)
    oldest = 0
    ended = 0
    kept = np.zeros(0 if guard is None else num_blocks, np.bool_)
    free = capacity
    evictions = 0
    refused = 0
    for r in range(len(starts) - 1):
        mine = blocks[starts[r] : starts[r + 1]]
        own = places[firsts[r] : firsts[r + 1]]
        for i in range(starts[r], starts[r + 1]):
            hits[i] = MISS if is_asked[i] else UNREAD
            hold(guard, blocks[i], i)
        if needs[r] > capacity:
            refused += 1
            continue
        while ended < len(order) and ends[order[ended]] <= r:
            if runs[order[ended]]:
                runs[order[ended]] = False
                free += _finish(links, cached, users, places, firsts, order[ended])
            ended += 1
        found, taken = _look_up(links, mine, place_of, users, own, hits[starts[r] :], lookups[r])
        free -= taken
        while free < needs[r] - found and oldest < r:
            if runs[oldest]:
                runs[oldest] = False
                free += _finish(links, cached, users, places, firsts, oldest)
            oldest += 1
        if free < needs[r] - found:
            # Only where blocks are pinned.
            free += _give_back(links, users, own[:found])
            for i in range(starts[r], starts[r + 1]):
                hits[i] = REFUSED if is_asked[i] else UNREAD
            refused += 1
            continue
        evictions += _allocate(links, cached, place_of, users, own, found)
        free -= needs[r] - found
        for n in range(found, len(mine)):
            if is_full[starts[r] + n] and place_of[mine[n]] < 0:
                cached[own[n]] = mine[n]
                place_of[mine[n]] = own[n]
        runs[r] = True
        if guard is not None:
            free -= _pin(links, mine, place_of, users, kept, guard)
    return evictions, refused


@jit
def _look_up(
    links: Ids, mine: Ids, place_of: Ids, users: Ids, own: Ids, hits: Hits, most: int
) -> tuple[int, int]:
    """Take the cached blocks of a prefix; returns how many, and how many of them were free."""
    found = 0
    taken = 0
    while found < min(most, len(mine)) and hits[found] != UNREAD and place_of[mine[found]] >= 0:
        place = place_of[mine[found]]
        if users[place] == 0:
            unlink(links, place)
            taken += 1
        users[place] += 1
        own[found] = place
        hits[found] = HIT
        found += 1
    return found, taken


@jit
def _allocate(links: Ids, cached: Ids, place_of: Ids, users: Ids, own: Ids, found: int) -> int:
    """Take free places for the rest of a request; returns the cached blocks that they evict."""
    evicted = 0
    for n in range(found, len(own)):
        place = pop_tail(links, len(cached))
        users[place] = 1
        own[n] = place
        if cached[place] >= 0:
            place_of[cached[place]] = -1
            cached[place] = -1
            evicted += 1
    return evicted


@jit
def _finish(links: Ids, cached: Ids, users: Ids, places: Ids, firsts: Counts, request: int) -> int:
    """Free a request's blocks, the last first; returns how many nobody else uses."""
    freed = 0
    end = len(cached)
    for n in range(firsts[request + 1] - 1, firsts[request] - 1, -1):
        place = places[n]
        users[place] -= 1
        if users[place] == 0:
            freed += 1
            if cached[place] >= 0:
                push_head(links, end, place)
            else:
                push_tail(links, end, place)
    return freed


@jit
def _give_back(links: Ids, users: Ids, own: Ids) -> int:
    """Let the cached blocks go that a request took; returns how many nobody else uses."""
    freed = 0
    for place in own[::-1]:
        users[place] -= 1
        if users[place] == 0:
            push_head(links, len(users), place)
            freed += 1
    return freed


@jit
def _pin(links: Ids, mine: Ids, place_of: Ids, users: Ids, kept: Flags, guard: Guard | None) -> int:
    """Count one more user of each pinned block of a request, for good; free places taken."""
    taken = 0
    for block in mine:
        place = place_of[block]
        if place >= 0 and not kept[block] and is_pinned(guard, block):
            kept[block] = True
            if users[place] == 0:
                unlink(links, place)
                taken += 1
            users[place] += 1
    return taken
