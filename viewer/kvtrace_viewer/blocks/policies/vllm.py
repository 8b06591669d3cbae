"""vLLM's own allocator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, push_tail, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits, Outcome, parameter
from kvtrace_viewer.blocks.stream import BlockStream, Counts, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class VLLM(BlockPolicy):
    """Allocate as vLLM does: whole requests, prefix hits only, blocks in use never evicted.

    From its documentation of automatic prefix caching. A request is looked up block by block
    until the first miss, full blocks of the prompt only, and never all of them: the last token is
    always computed, so at most (tokens - 1) // block_size. What it then lacks is taken from the
    head of a queue of free blocks, which evicts what was cached there. A finished request's blocks
    join the queue's tail, its last block first; blocks that cannot be cached, not being full,
    join at the head.

    A request finishes when `in_flight` others have come after it, or earlier where its blocks are
    needed: then the new one waits for the oldest. Blocks of generated tokens are allocated and
    cached with the rest. A block that is computed twice is cached once (vLLM keeps both). It never
    asks for blocks that are not full, nor for what was generated, and it stops at the first miss,
    whatever else is counted.
    """

    name: ClassVar[str] = "vllm"
    needs_full_blocks: ClassVar[bool] = True

    in_flight: int = parameter(1, "requests that hold their blocks at once", "requests", 1)

    def run(self, stream: BlockStream, capacity: int) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        lengths = np.diff(stream.starts)
        # Sources that list full blocks only have a last one that takes a place all the same.
        needs = np.maximum(lengths, -(-stream.prompt_tokens // stream.block_size))
        lookups = (np.maximum(stream.prompt_tokens, 1) - 1) // stream.block_size
        whole = np.repeat(stream.prompt_tokens // stream.block_size, lengths)
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
            min(self.in_flight, max(1, stream.requests)),
            hits,
        )
        notes = []
        if refused:
            notes.append(
                f"vllm: {refused} requests need more than {capacity} blocks and never run:"
                " all misses"
            )
        return Outcome(hits, evictions, tuple(notes))


@jit
def _vllm(
    blocks: Ids,
    starts: Counts,
    is_full: NDArray[np.bool_],
    is_asked: NDArray[np.bool_],
    needs: Counts,
    lookups: Counts,
    firsts: Counts,
    num_blocks: int,
    capacity: int,
    in_flight: int,
    hits: Hits,
) -> tuple[int, int]:
    # The pool's places are the nodes; the queue's next is at its tail.
    links = new_links(capacity, 1)
    for place in range(capacity):
        push_head(links, capacity, place)
    cached = np.full(capacity, -1, np.int32)
    place_of = np.full(num_blocks, -1, np.int32)
    users = np.zeros(capacity, np.int32)
    # Places of every request, and the requests that run, oldest first.
    places = np.empty(firsts[-1], np.int32)
    running = np.empty(in_flight, np.int64)
    oldest = 0
    count = 0
    free = capacity
    evictions = 0
    refused = 0
    for r in range(len(starts) - 1):
        start, stop = starts[r], starts[r + 1]
        for i in range(start, stop):
            if not is_asked[i]:
                hits[i] = 2
        if needs[r] > capacity:
            refused += 1
            continue
        if count == in_flight:
            free += _finish(links, cached, users, places, firsts, running[oldest])
            oldest = (oldest + 1) % in_flight
            count -= 1
        found = 0
        while found < min(lookups[r], stop - start):
            i = start + found
            if hits[i] == 2 or place_of[blocks[i]] < 0:
                break
            hits[i] = 1
            place = place_of[blocks[i]]
            if users[place] == 0:
                unlink(links, place)
                free -= 1
            users[place] += 1
            places[firsts[r] + found] = place
            found += 1
        while free < needs[r] - found:
            free += _finish(links, cached, users, places, firsts, running[oldest])
            oldest = (oldest + 1) % in_flight
            count -= 1
        for n in range(found, needs[r]):
            place = pop_tail(links, capacity)
            free -= 1
            users[place] = 1
            places[firsts[r] + n] = place
            if cached[place] >= 0:
                place_of[cached[place]] = -1
                cached[place] = -1
                evictions += 1
        for n in range(found, stop - start):
            block = blocks[start + n]
            if is_full[start + n] and place_of[block] < 0:
                place = places[firsts[r] + n]
                cached[place] = block
                place_of[block] = place
        running[(oldest + count) % in_flight] = r
        count += 1
    return evictions, refused


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
