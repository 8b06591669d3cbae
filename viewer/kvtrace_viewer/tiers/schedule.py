"""The tier model: what each request finds where, what moves over which link, and when.

A link t joins tier t to the tier above it; both directions are queues that carry one block at a
time. Times are whole nanoseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.tiers.residency import Longs, Residency, put, take, touch, victim


class Workload(NamedTuple):
    """Requests in order; see `BlockStream`.

    Attributes
    ----------
    blocks : int32 [access]
    starts : int64 [request + 1]
    tokens : int32 [access]
    is_output : bool [access]
    next_access : int64 [access]
    arrival_ns, prompt_tokens : int64 [request]
    """

    blocks: NDArray[np.int32]
    starts: Longs
    tokens: NDArray[np.int32]
    is_output: NDArray[np.bool_]
    next_access: Longs
    arrival_ns: Longs
    prompt_tokens: Longs


class Machine(NamedTuple):
    """How long things take, and the rules.

    Attributes
    ----------
    read_ns, write_ns : int64 [tier]
        Of one block over the link to the tier above.
    latency_ns : int64 [tier]
        Before the first block that a request moves over a link, either way.
    compute_ns : float
        Of one prompt token.
    layers : int
        Loads of a layer hide behind the computing of the layers before: the last layer's share
        of the computing comes after the last load. 0: computing waits for all loads.
    order : int
        Number of the eviction policy.
    write_through : bool
        Copy down what is computed at once, rather than what is pushed out.
    prefetch : bool
        Loads begin when a request arrives, rather than when it starts.
    always_load : bool
        Load whatever is found, rather than as much as ends soonest.
    """

    read_ns: Longs
    write_ns: Longs
    latency_ns: Longs
    compute_ns: float
    layers: int
    order: int
    write_through: bool
    prefetch: bool
    always_load: bool


class Ledger(NamedTuple):
    """What is counted, all int64.

    Attributes
    ----------
    found : [request, tier]
        Prompt blocks that were used from each tier.
    recomputed : [request]
        Prompt blocks that were found, and computed anew because that ended sooner.
    missed : [request]
        Prompt blocks computed because they, or one before them, were nowhere.
    up, down : [request, tier]
        Blocks moved over the link above each tier.
    dropped : [request]
        Blocks of which no copy is left.
    occupancy : [request, tier]
        Blocks held after the request.
    start_ns, end_ns : [request]
        When it began, and when its first token was there.
    work_ns : [request]
        Computing; start to end less this is the stall.
    backlog_ns : [request]
        How far the writes down were behind at its end.
    """

    found: Longs
    recomputed: Longs
    missed: Longs
    up: Longs
    down: Longs
    dropped: Longs
    occupancy: Longs
    start_ns: Longs
    end_ns: Longs
    work_ns: Longs
    backlog_ns: Longs


def new_ledger(requests: int, tiers: int) -> Ledger:
    """A ledger with nothing in it."""
    return Ledger(
        *(
            np.zeros((requests, tiers) if name in _BY_TIER else requests, np.int64)
            for name in Ledger._fields
        )
    )


_BY_TIER = ("found", "up", "down", "occupancy")


class _Links(NamedTuple):
    """Until when each link is busy, and which request used it last: int64 [tier]."""

    up_free: Longs
    down_free: Longs
    up_user: Longs
    down_user: Longs


@jit
def run(work: Workload, machine: Machine, at: Residency, ledger: Ledger) -> None:
    """Serve the requests one after another in the order of the stream.

    A request whose blocks do not fit into the first tier together is refused: its end is -1.
    """
    tiers = len(at.filled)
    links = _Links(*_four(tiers))
    following = np.zeros(len(at.pinned), np.int64)
    index = np.zeros(len(at.pinned), np.int64)
    longest = 0
    for r in range(len(work.starts) - 1):
        longest = max(longest, work.starts[r + 1] - work.starts[r])
    loads = np.empty(longest, np.int64)
    engine_free = 0
    for r in range(len(work.starts) - 1):
        at.moves[1] = r
        start = max(work.arrival_ns[r], engine_free)
        ledger.start_ns[r] = start
        if _pin(work, at, r) > at.capacity[0]:
            ledger.end_ns[r] = -1
            ledger.occupancy[r] = at.filled
            continue
        present, prefix, num_loads = _look_up(work, at, ledger, r, loads)
        issued = work.arrival_ns[r] if machine.prefetch else start
        chosen = _choose(work, machine, at, links, r, loads[:num_loads], present, start, issued)
        done = _load(work, machine, at, links, ledger, r, loads[:chosen], issued)
        for i in loads[:chosen]:
            present += work.tokens[i]
        ledger.recomputed[r] = num_loads - chosen
        prompt = 0
        for i in range(work.starts[r], work.starts[r + 1]):
            prompt += not work.is_output[i]
        ledger.missed[r] = prompt - prefix
        work_ns, end = _end(machine, work.prompt_tokens[r] - present, chosen, start, done)
        end = max(end, _settle(work, machine, at, links, ledger, r, start, end, following, index))
        ledger.work_ns[r] = work_ns
        ledger.end_ns[r] = end
        ledger.backlog_ns[r] = max(0, links.down_free.max() - end)
        ledger.occupancy[r] = at.filled
        engine_free = end


@jit
def _four(tiers: int) -> tuple[Longs, Longs, Longs, Longs]:
    free = np.zeros(tiers, np.int64)
    user = np.full(tiers, -1, np.int64)
    return free, free.copy(), user, user.copy()


@jit
def _pin(work: Workload, at: Residency, r: int) -> int:
    """Pin a request's blocks; returns how many different ones there are."""
    different = 0
    for i in range(work.starts[r], work.starts[r + 1]):
        if at.pinned[work.blocks[i]] != r:
            at.pinned[work.blocks[i]] = r
            different += 1
    return different


@jit
def _tier_of(at: Residency, block: int) -> int:
    for tier in range(len(at.filled)):
        if at.held[tier, block]:
            return tier
    return -1


@jit
def _look_up(
    work: Workload, at: Residency, ledger: Ledger, r: int, loads: Longs
) -> tuple[int, int, int]:
    """Find the prompt's blocks up to the first that lies nowhere.

    Returns the tokens in the first tier, the blocks found, and how many accesses were written
    into `loads`: those of blocks that lie in lower tiers.
    """
    present = 0
    prefix = 0
    num_loads = 0
    for i in range(work.starts[r], work.starts[r + 1]):
        tier = _tier_of(at, work.blocks[i])
        if tier < 0 or work.is_output[i]:
            break
        prefix += 1
        if tier == 0:
            ledger.found[r, 0] += 1
            present += work.tokens[i]
        else:
            loads[num_loads] = i
            num_loads += 1
    return present, prefix, num_loads


@jit
def _cross_up(
    machine: Machine, up_free: Longs, up_user: Longs, tier: int, r: int, ready: int
) -> int:
    """Bring one block from a tier to the first, link by link; when it is there."""
    for link in range(tier, 0, -1):
        begin = max(up_free[link], ready)
        if up_user[link] != r:
            up_user[link] = r
            begin += machine.latency_ns[link]
        ready = begin + machine.read_ns[link]
        up_free[link] = ready
    return ready


@jit
def _choose(
    work: Workload,
    machine: Machine,
    at: Residency,
    links: _Links,
    r: int,
    loads: Longs,
    present: int,
    start: int,
    issued: int,
) -> int:
    """How many of the loads end the request soonest; the rest is computed anew."""
    if machine.always_load or len(loads) == 0:
        return len(loads)
    up_free, up_user = links.up_free.copy(), links.up_user.copy()
    _, least = _end(machine, work.prompt_tokens[r] - present, 0, start, issued)
    best = 0
    for k in range(len(loads)):
        tier = _tier_of(at, work.blocks[loads[k]])
        done = _cross_up(machine, up_free, up_user, tier, r, issued)
        present += work.tokens[loads[k]]
        _, end = _end(machine, work.prompt_tokens[r] - present, k + 1, start, done)
        if end <= least:
            best, least = k + 1, end
    return best


@jit
def _end(machine: Machine, tokens: int, loads: int, start: int, done: int) -> tuple[int, int]:
    """Nanoseconds of computing, and when it ends; the last token is always computed."""
    work_ns = int(np.ceil(max(tokens, 1) * machine.compute_ns))
    if loads == 0:
        return work_ns, start + work_ns
    if machine.layers == 0:
        return work_ns, max(start, done) + work_ns
    last_layer = -(-work_ns // machine.layers)
    return work_ns, max(start + work_ns, done + last_layer)


@jit
def _load(
    work: Workload,
    machine: Machine,
    at: Residency,
    links: _Links,
    ledger: Ledger,
    r: int,
    loads: Longs,
    issued: int,
) -> int:
    """Bring blocks up; when the last one is there. They are put into the first tier later."""
    done = issued
    for i in loads:
        block = work.blocks[i]
        tier = _tier_of(at, block)
        if tier <= 0:
            # The sequence has the block twice: the first time has brought it.
            ledger.found[r, 0] += 1
            continue
        ledger.found[r, tier] += 1
        done = max(done, _cross_up(machine, links.up_free, links.up_user, tier, r, issued))
        for link in range(1, tier + 1):
            ledger.up[r, link] += 1
        if machine.write_through:
            _touch_below(work, machine, at, ledger, r, i, tier)
        else:
            take(at, tier, block)
    return done


@jit
def _touch_below(
    work: Workload, machine: Machine, at: Residency, ledger: Ledger, r: int, i: int, tier: int
) -> None:
    """A copy that is read is used, and what it is staged through keeps it too."""
    block = work.blocks[i]
    index = i - work.starts[r]
    touch(at, tier, block, machine.order, i, index, work.next_access[i])
    for above in range(tier - 1, 0, -1):
        if at.capacity[above]:
            if at.filled[above] == at.capacity[above]:
                leaving = victim(at, above, r)
                take(at, above, leaving)
                ledger.dropped[r] += _tier_of(at, leaving) < 0
            put(at, above, block, machine.order, i, index, work.next_access[i])


@jit
def _settle(
    work: Workload,
    machine: Machine,
    at: Residency,
    links: _Links,
    ledger: Ledger,
    r: int,
    start: int,
    end: int,
    following: Longs,
    index: Longs,
) -> int:
    """Put the request's blocks into the first tier; when the last room in it was free."""
    free = start
    for i in range(work.starts[r], work.starts[r + 1]):
        block = work.blocks[i]
        following[block] = work.next_access[i]
        index[block] = i - work.starts[r]
        if at.held[0, block]:
            touch(at, 0, block, machine.order, i, index[block], following[block])
            continue
        if at.filled[0] == at.capacity[0]:
            gone = victim(at, 0, r)
            take(at, 0, gone)
            if machine.write_through:
                ledger.dropped[r] += _tier_of(at, gone) < 0
            else:
                done = _push_down(machine, at, links, ledger, r, gone, start, i, following, index)
                free = max(free, done)
        put(at, 0, block, machine.order, i, index[block], following[block])
        if machine.write_through:
            _write_down(work, machine, at, links, ledger, r, i, end, index[block])
        else:
            below = _other_copy(at, block)
            if below > 0:
                # Computed anew: the copy below is of no more use.
                take(at, below, block)
    return free


@jit
def _other_copy(at: Residency, block: int) -> int:
    for tier in range(1, len(at.filled)):
        if at.held[tier, block]:
            return tier
    return -1


@jit
def _cross_down(
    machine: Machine, links: _Links, ledger: Ledger, link: int, r: int, ready: int
) -> int:
    begin = max(links.down_free[link], ready)
    if links.down_user[link] != r:
        links.down_user[link] = r
        begin += machine.latency_ns[link]
    links.down_free[link] = begin + machine.write_ns[link]
    ledger.down[r, link] += 1
    return int(links.down_free[link])


@jit
def _push_down(
    machine: Machine,
    at: Residency,
    links: _Links,
    ledger: Ledger,
    r: int,
    block: int,
    start: int,
    access: int,
    following: Longs,
    index: Longs,
) -> int:
    """Move a block one tier down, and what has to leave there further; when the first is free."""
    freed = start
    ready = start
    for tier in range(1, len(at.filled)):
        if _room_below(at, tier) == 0:
            break
        ready = _cross_down(machine, links, ledger, tier, r, ready)
        if tier == 1:
            freed = ready
        if at.capacity[tier] == 0:
            continue
        leaving = -1
        if at.filled[tier] == at.capacity[tier]:
            leaving = victim(at, tier, r)
            take(at, tier, leaving)
        put(at, tier, block, machine.order, access, index[block], following[block])
        if leaving < 0:
            return freed
        block = leaving
    ledger.dropped[r] += 1
    return freed


@jit
def _room_below(at: Residency, tier: int) -> int:
    room = 0
    for below in range(tier, len(at.filled)):
        room += at.capacity[below]
    return room


@jit
def _write_down(
    work: Workload,
    machine: Machine,
    at: Residency,
    links: _Links,
    ledger: Ledger,
    r: int,
    i: int,
    end: int,
    index: int,
) -> None:
    """Copy a block that was computed into every tier below that has it not."""
    block = work.blocks[i]
    ready = end
    for tier in range(1, len(at.filled)):
        if at.held[tier, block] or _room_below(at, tier) == 0:
            continue
        ready = _cross_down(machine, links, ledger, tier, r, ready)
        if at.capacity[tier] == 0:
            continue
        if at.filled[tier] == at.capacity[tier]:
            leaving = victim(at, tier, r)
            take(at, tier, leaving)
            ledger.dropped[r] += _tier_of(at, leaving) < 0
        put(at, tier, block, machine.order, i, index, work.next_access[i])
