"""Which tokens of a recorded run lie where under a replay's kept sets, and who wants them.

What the replay kept is hot (first tier), what it evicted is cold (second tier) from the row after
which it went. One pass: attention rows are recomputed 64 at a time, as the replay does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import BLOCK_ROWS, Floats, Head
from kvtrace_viewer.replay.cache import left_window
from kvtrace_viewer.replay.engine import blocks
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.kernels import NEVER, Doubles, Ints, Longs


@dataclass(eq=False)
class HeadPlacement:
    """One KV head of one layer of one request.

    Attributes
    ----------
    cold_after : int32 [token]
        Row after which a token went to the second tier; `NEVER` where it stayed.
    left_after : int32 [token]
        Row after which it left the model's own window, and no tier needs to hold it; or `NEVER`.
    fetched : int64 [row]
        Cold keys that some query head of the row needs.
    hits, misses : int64 [row]
        Needed (query head, key) pairs, hot and cold.
    retained, late, lost : float64 [row]
        Attention on hot keys, on fetched ones, and on cold ones that were not fetched; summed over
        the query heads.
    fetches : int64 [token]
        Rows that fetched it.
    late_of : float64 [token]
        Attention that those paid to it, over the query heads.
    """

    cold_after: Ints
    left_after: Ints
    fetched: Longs
    hits: Longs
    misses: Longs
    retained: Doubles
    late: Doubles
    lost: Doubles
    fetches: Longs
    late_of: Doubles

    @classmethod
    def empty(cls, cold_after: Ints, left_after: Ints) -> HeadPlacement:
        """Nothing seen yet."""
        tokens = len(cold_after)

        def counts() -> Longs:
            return np.zeros(tokens, np.int64)

        def sums() -> Doubles:
            return np.zeros(tokens)

        return cls(
            cold_after,
            left_after,
            fetched=counts(),
            hits=counts(),
            misses=counts(),
            retained=sums(),
            late=sums(),
            lost=sums(),
            fetches=counts(),
            late_of=sums(),
        )


def place_head(head: Head, evicted_at: Ints, first: int, share: float) -> HeadPlacement:
    """Pass over the rows of one head.

    Parameters
    ----------
    head : Head
        Its q, k and log-sum-exps.
    evicted_at : int32 [token]
        Row after which the replay evicted a token; -1: never.
    first : int
        Rows from here on are looked at; those without a recorded query are left out.
    share : float
        Threshold of being needed, in uniform shares: a[i,j] >= share / (i+1).
    """
    gone = np.where(evicted_at < 0, NEVER, evicted_at).astype(np.int32)
    left = left_window(head.tokens, head.window)
    # What leaves the model's own window goes nowhere: no later query sees it.
    found = HeadPlacement.empty(np.where(gone < left, gone, NEVER).astype(np.int32), left)
    buffer = np.empty(head.group * BLOCK_ROWS * head.tokens, dtype=np.float32)
    for start, stop in blocks(head):
        if stop <= first:
            continue
        rows = head.rows(start, stop, buffer)
        _place_rows(
            rows,
            start,
            (np.arange(start, stop) >= first) & head.has_query[start:stop],
            found.cold_after,
            share,
            found.fetched,
            found.hits,
            found.misses,
            found.retained,
            found.late,
            found.lost,
            found.fetches,
            found.late_of,
        )
    return found


@jit
def _place_rows(
    attention: Floats,
    start: int,
    is_wanted: NDArray[np.bool_],
    cold_after: Ints,
    share: float,
    fetched: Longs,
    hits: Longs,
    misses: Longs,
    retained: Doubles,
    late: Doubles,
    lost: Doubles,
    fetches: Longs,
    late_of: Doubles,
) -> None:
    """Sort what each row of attention [query head, row, key] pays by where the key lies."""
    group, rows, stop = attention.shape
    needs = np.zeros(stop, np.uint8)
    for r in range(rows):
        query = start + r
        if not is_wanted[r]:
            continue
        limit = share / (query + 1)
        for g in range(group):
            row = attention[g, r]
            for j in range(query + 1):
                needed = row[j] >= limit
                if cold_after[j] >= query:
                    retained[query] += row[j]
                    hits[query] += needed
                elif needed:
                    misses[query] += 1
                    needs[j] = 1
        for g in range(group):
            row = attention[g, r]
            for j in range(query):
                if cold_after[j] >= query:
                    continue
                if needs[j]:
                    late[query] += row[j]
                    late_of[j] += row[j]
                else:
                    lost[query] += row[j]
        for j in range(query):
            fetched[query] += needs[j]
            fetches[j] += needs[j]
            needs[j] = 0
