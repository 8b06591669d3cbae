"""How long blocks live, how long they lie idle, and how soon they are used again.

The three quantities that vLLM exports as `vllm:kv_block_lifetime_seconds`,
`vllm:kv_block_idle_before_evict_seconds` and `vllm:kv_block_reuse_gap_seconds`, under these names.
vLLM observes a sample of the blocks, with the last four accesses of each, when one is taken for
something else, cached or not: its lifetimes last until then. Here every block that came to an end
is counted, with all its accesses; it ends when it is free, and only cached blocks lie idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, FREE, SHARE, PoolHistory

LIFETIME = "kv_block_lifetime_seconds"
IDLE = "kv_block_idle_before_evict_seconds"
GAP = "kv_block_reuse_gap_seconds"


@dataclass
class Residency:
    """One block from its allocation until it is free again.

    Attributes
    ----------
    block, request : int
        The block, and the request that it was allocated to (-1: unknown).
    born_ns : int
        When it was allocated.
    ended_ns : int or None
        When it became free; None where it had not at the end.
    ended_by : str or None
        free, where its contents were not kept, or evict.
    accesses_ns : list of int
        When it was given to a request that found it there.
    max_references : int
        The most requests that held it at once.
    """

    block: int
    request: int
    born_ns: int
    ended_ns: int | None
    ended_by: str | None
    accesses_ns: list[int]
    max_references: int

    @property
    def lifetime_s(self) -> float | None:
        """From allocation to end."""
        return None if self.ended_ns is None else (self.ended_ns - self.born_ns) / 1e9

    @property
    def idle_before_evict_s(self) -> float | None:
        """From the last access, or the allocation, to the eviction; None where not evicted."""
        if self.ended_ns is None or self.ended_by != "evict":
            return None
        last = self.accesses_ns[-1] if self.accesses_ns else self.born_ns
        return (self.ended_ns - last) / 1e9

    @property
    def reuse_gaps_s(self) -> list[float]:
        """Between one access and the next; the allocation is none."""
        return [(b - a) / 1e9 for a, b in zip(self.accesses_ns, self.accesses_ns[1:], strict=False)]


def residencies(history: PoolHistory) -> list[Residency]:
    """Every stay of a block in the pool, in the order of their allocations."""
    found: list[Residency] = []
    live: dict[int, tuple[Residency, int]] = {}
    columns = (history.kind, history.block, history.request, history.ts_ns)
    for kind, block, request, ts_ns in zip(*(c.tolist() for c in columns), strict=True):
        if kind == ALLOCATE or block not in live:
            if kind in (ALLOCATE, SHARE):
                one = Residency(block, request, ts_ns, None, None, [], 1)
                found.append(one)
                live[block] = (one, 1)
            continue
        one, users = live[block]
        if kind == SHARE:
            users += 1
            one.accesses_ns.append(ts_ns)
            one.max_references = max(one.max_references, users)
        elif kind != EVICT:
            users -= 1
        live[block] = (one, users)
        if kind == EVICT or (kind == FREE and users == 0):
            one.ended_ns, one.ended_by = ts_ns, "evict" if kind == EVICT else "free"
            del live[block]
    return found


def spread(values: list[float]) -> dict[str, float | int] | None:
    """Count, mean, median and 95th percentile; None of nothing."""
    if not values:
        return None
    return {
        "count": len(values),
        "mean": float(np.mean(values)),
        "p50": float(np.percentile(values, 50)),
        "p95": float(np.percentile(values, 95)),
    }


def metrics(stays: list[Residency]) -> dict[str, dict[str, float | int] | None]:
    """The three quantities, by vLLM's names."""
    lifetimes = [one.lifetime_s for one in stays]
    idle = [one.idle_before_evict_s for one in stays]
    return {
        LIFETIME: spread([x for x in lifetimes if x is not None]),
        IDLE: spread([x for x in idle if x is not None]),
        GAP: spread([gap for one in stays for gap in one.reuse_gaps_s]),
    }
