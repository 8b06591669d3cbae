"""How full the pool was, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, KEEP, SHARE, Ints, PoolHistory
from kvtrace_viewer.allocation.waits import absences, between, first_steps
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, eq=False)
class Occupancy:
    """The pool while each step ran; all int64 [step].

    Attributes
    ----------
    held : blocks that a request holds.
    cached : blocks that nobody holds, kept for their contents.
    free : all others.
    shared : blocks that several requests hold.
    references : entries of all block tables.
    unused_slots : token slots of held blocks without a token: internal fragmentation.
    running, waiting : requests of the step; requests that had come and had no step yet.
    preempted : requests that had given up all blocks and waited to come back.
    tokens : tokens that the step processed.
    """

    held: Ints
    cached: Ints
    free: Ints
    shared: Ints
    references: Ints
    unused_slots: Ints
    running: Ints
    waiting: Ints
    preempted: Ints
    tokens: Ints

    def internal_fragmentation(self, block_size: int) -> NDArray[np.float64]:
        """Unused share of the slots of held blocks, by step; 0 where none are held."""
        return self.unused_slots / np.maximum(1, self.held * block_size)


def occupancy(history: PoolHistory) -> Occupancy:
    """Follow a history."""
    numbers, dense = np.unique(
        np.concatenate([history.request, history.part_request]), return_inverse=True
    )
    events = len(history.request)
    blocks = max(history.num_blocks, int(history.block.max(initial=-1)) + 1)
    counts = _follow(
        history.moment,
        history.kind,
        dense[:events],
        history.block,
        history.index,
        history.part_step,
        dense[events:],
        history.part_past + history.part_count,
        history.steps,
        blocks,
        max(1, len(numbers)),
        history.block_size,
    )
    held, cached, shared, references, unused = counts
    steps = history.steps
    return Occupancy(
        held=held,
        cached=cached,
        free=blocks - held - cached,
        shared=shared,
        references=references,
        unused_slots=unused,
        running=np.bincount(history.part_step, minlength=steps).astype(np.int64),
        waiting=_waiting(history),
        preempted=_preempted(history),
        tokens=np.bincount(history.part_step, weights=history.part_count, minlength=steps).astype(
            np.int64
        ),
    )


def _waiting(history: PoolHistory) -> Ints:
    """Requests that had come and had no step yet."""
    first = first_steps(history)
    begins = [min(history.arrival_step.get(one, step), step) for one, step in first.items()]
    return between(begins, list(first.values()), history.steps)


def _preempted(history: PoolHistory) -> Ints:
    """Requests that had given up all blocks and had not come back."""
    gone = absences(history)
    return between([one.lost_step for one in gone], [one.back_step for one in gone], history.steps)


@jit
def _follow(
    moment: Ints,
    kind: Ints,
    request: Ints,
    block: Ints,
    index: Ints,
    part_step: Ints,
    part_request: Ints,
    length_after: Ints,
    steps: int,
    blocks: int,
    requests: int,
    block_size: int,
) -> Ints:
    found = np.zeros((5, steps), np.int64)
    users = np.zeros(blocks, np.int64)
    is_cached = np.zeros(blocks, np.bool_)
    table = np.zeros(requests, np.int64)
    length = np.zeros(requests, np.int64)
    held = 0
    cached = 0
    shared = 0
    references = 0
    unused = 0
    event = 0
    part = 0
    for step in range(steps):
        while event < len(moment) and moment[event] <= step:
            b, r, k = block[event], request[event], kind[event]
            event += 1
            if k == EVICT:
                if is_cached[b]:
                    is_cached[b] = False
                    cached -= 1
                continue
            unused -= max(0, table[r] * block_size - length[r])
            if k in (ALLOCATE, SHARE):
                if is_cached[b]:
                    is_cached[b] = False
                    cached -= 1
                users[b] += 1
                table[r] += 1
                references += 1
                if users[b] == 1:
                    held += 1
                elif users[b] == 2:
                    shared += 1
            else:
                users[b] -= 1
                table[r] -= 1
                references -= 1
                if users[b] == 1:
                    shared -= 1
                elif users[b] == 0:
                    held -= 1
                    if k == KEEP:
                        is_cached[b] = True
                        cached += 1
                if table[r] == 0:
                    length[r] = 0
            # A prefix that is shared is full before the request's own first token.
            if k == SHARE and length[r] == index[event - 1] * block_size:
                length[r] += block_size
            unused += max(0, table[r] * block_size - length[r])
        while part < len(part_step) and part_step[part] <= step:
            r = part_request[part]
            unused -= max(0, table[r] * block_size - length[r])
            length[r] = length_after[part]
            unused += max(0, table[r] * block_size - length[r])
            part += 1
        found[0, step] = held
        found[1, step] = cached
        found[2, step] = shared
        found[3, step] = references
        found[4, step] = unused
    return found
