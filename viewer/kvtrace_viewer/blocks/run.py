"""`replay_blocks`: a block stream through policies and capacities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.accounting import Accounting
from kvtrace_viewer.blocks.holding import Holding, check_holding, holding_of
from kvtrace_viewer.blocks.plugins import mistakes_explained
from kvtrace_viewer.blocks.policy import BlockPolicy
from kvtrace_viewer.blocks.result import BlockResult
from kvtrace_viewer.blocks.spec import parse_block_policy
from kvtrace_viewer.blocks.stream import BlockStream


def replay_blocks(
    stream: BlockStream,
    policies: Sequence[str | BlockPolicy],
    capacities: Sequence[int],
    accounting: Accounting | None = None,
    progress: Callable[[float], None] | None = None,
    pin: int = 0,
    hold: int | str = 0,
) -> list[BlockResult]:
    """Run a stream through every policy at every capacity, in parallel.

    Parameters
    ----------
    stream : BlockStream
        From `read_stream`, or made by hand.
    policies : sequence of str or BlockPolicy
        `name[:key=value,...]`, or policy objects.
    capacities : sequence of int
        Blocks that the cache holds.
    accounting : Accounting, optional
        What counts; by default every hit of every block, by block.
    progress : callable, optional
        Told the share done, 0 to 1.
    pin : int
        First blocks of every prompt that are never evicted.
    hold : int or str
        Requests that hold their blocks at once, or "service" (`holding_of`).

    Returns
    -------
    list of BlockResult
        Policy by policy, each at every capacity; a pair given twice counts once.

    Raises
    ------
    InputError
        For an unknown policy, parameter or accounting, a capacity below 1, and for blocks that
        are to stay where that cannot be (`holding_of`, `check_holding`).

    Examples
    --------
    >>> replay_blocks(stream, ["lru", "s3fifo:small=0.2"], [1000, 10000])      # doctest: +SKIP
    """
    chosen = {policy.spec: policy for policy in map(parse_block_policy, policies)}
    check_capacities(capacities)
    accounting = accounting or Accounting()
    if accounting.blocks == "full":
        stream = stream.full_blocks()
    holding = holding_of(stream, pin, hold)
    check_holding(holding, list(chosen.values()))
    pairs = [(policy, size) for policy in chosen.values() for size in dict.fromkeys(capacities)]
    results = []
    # The kernels let the GIL go.
    with ThreadPoolExecutor(min(len(pairs) or 1, os.cpu_count() or 1)) as pool:
        for result in pool.map(lambda pair: _run(stream, pair, accounting, holding), pairs):
            results.append(result)
            if progress:
                progress(len(results) / len(pairs))
    return results


def check_capacities(capacities: Sequence[int]) -> None:
    """Refuse a capacity below 1."""
    for capacity in capacities:
        if capacity < 1:
            raise InputError(
                f"capacity {capacity} holds no block; a number of blocks of at least 1 was"
                " expected; give another --capacity"
            )


def _run(
    stream: BlockStream,
    pair: tuple[BlockPolicy, int],
    accounting: Accounting,
    holding: Holding | None,
) -> BlockResult:
    policy, capacity = pair
    with mistakes_explained():
        if holding is None:
            outcome = policy.run(stream, capacity)
        else:
            outcome = policy.run(stream, capacity, holding.guard())
    accesses, hits = accounting.count(stream, outcome.hits)
    notes = (*stream.notes, *outcome.notes)
    held = None
    if holding is not None:
        held = holding.held(outcome)
        notes += (holding.note(held, capacity),)
    if policy.name == "belady" and holding is not None:
        notes += ("belady: no bound that is proven where blocks must stay",)
    if policy.name == "belady" and accounting != Accounting(blocks=accounting.blocks):
        notes += ("belady: a bound for hits per block; counted otherwise another may beat it",)
    return BlockResult(
        policy=policy.spec,
        parameters={**policy.parameters(), **_asked(holding)},
        capacity=capacity,
        requests=stream.requests,
        accesses=accesses,
        hits=hits,
        evictions=outcome.evictions,
        accounting=accounting,
        notes=notes,
        held=held,
    )


def _asked(holding: Holding | None) -> dict[str, int | str]:
    """What was asked to stay, among the parameters of a run."""
    if holding is None:
        return {}
    return {name: value for name in ("pin", "hold") if (value := getattr(holding, name))}
