"""Policies over many capacities: the points of a hit-ratio curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.accounting import Accounting
from kvtrace_viewer.blocks.curve import LRUCurve, lru_curve, sampled_lru_curve
from kvtrace_viewer.blocks.policies.lru import LRU
from kvtrace_viewer.blocks.policy import BlockPolicy
from kvtrace_viewer.blocks.result import BlockResult
from kvtrace_viewer.blocks.run import check_capacities, replay_blocks
from kvtrace_viewer.blocks.spec import parse_block_policy
from kvtrace_viewer.blocks.stream import BlockStream

#: Points of a curve whose capacities were not given.
POINTS = 24


def curve_capacities(stream: BlockStream, points: int = POINTS) -> list[int]:
    """Capacities from a thousandth of the distinct blocks to all, evenly by ratio."""
    least, most = max(1, stream.num_blocks // 1000), max(1, stream.num_blocks)
    return sorted({round(size) for size in np.geomspace(least, most, points)})


def replay_curves(
    stream: BlockStream,
    policies: Sequence[str | BlockPolicy],
    capacities: Sequence[int] = (),
    accounting: Accounting | None = None,
    sample: float | None = None,
    progress: Callable[[float], None] | None = None,
    pin: int = 0,
    hold: int | str = 0,
) -> list[BlockResult]:
    """Run a stream through every policy at the capacities of a curve, in parallel.

    LRU is not run at all where no block must stay: one pass gives it at every capacity.

    Parameters
    ----------
    stream, policies, accounting, progress, pin, hold
        As `replay_blocks` takes them.
    capacities : sequence of int
        Where none is given, those of `curve_capacities`.
    sample : float, optional
        LRU from this share of the blocks (`sampled_lru_curve`); no other policy can be.

    Raises
    ------
    InputError
        As `replay_blocks`, and for another policy than lru with `sample`, or blocks that must stay.
    """
    accounting = accounting or Accounting()
    chosen = {policy.spec: policy for policy in map(parse_block_policy, policies)}
    others = [policy for policy in chosen.values() if pin or hold or not isinstance(policy, LRU)]
    if sample is not None and others:
        which = f"{others[0].name} with blocks that must stay" if pin or hold else others[0].name
        raise InputError(
            f"{which} cannot be run on a sample of the blocks; only lru was expected with"
            " --sample; leave one of the two out"
        )
    sizes = sorted(set(capacities)) or curve_capacities(stream)
    check_capacities(sizes)
    found: dict[str, list[BlockResult]] = {}
    for result in replay_blocks(stream, others, sizes, accounting, progress, pin, hold):
        found.setdefault(result.policy, []).append(result)
    if len(others) < len(chosen):
        curve = (
            lru_curve(stream, accounting)
            if sample is None
            else sampled_lru_curve(stream, sample, accounting)
        )
        notes = stream.notes
        if sample is not None:
            notes = (*notes, f"lru: from a sample of {sample:g} of the blocks (SHARDS)")
        found[LRU.name] = [_point(stream, curve, size, accounting, notes) for size in sizes]
    return [result for spec in chosen for result in found[spec]]


def _point(
    stream: BlockStream,
    curve: LRUCurve,
    capacity: int,
    accounting: Accounting,
    notes: tuple[str, ...],
) -> BlockResult:
    at = curve.at(capacity)
    return BlockResult(
        policy=LRU.name,
        parameters={},
        capacity=capacity,
        requests=stream.requests,
        accesses=curve.accesses,
        hits=round(curve.hits[at]),
        evictions=round(curve.evictions[at]),
        accounting=accounting,
        notes=notes,
        error=None if curve.error is None else float(curve.error[at]),
    )
