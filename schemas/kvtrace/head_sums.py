"""Sums over one head's attention map, in one pass: what keys receive, and what rows look like.

The rows are added a block at a time, so what a request's first blocks add up to can be kept, and a
request that has grown needs only the rest: with the same result to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.head_map import MAX_BLOCK_WEIGHTS, HeadMap

Sums = NDArray[np.float64]
Ids = NDArray[np.int64]

BLOCK_ROWS = 64
#: A weight below this share of its row's largest counts as none (H2O, Zhang et al. 2023, 3.1).
SPARSE_SHARE = 0.01
#: ln of what is too small to matter; below it exp() makes denormals, which are slow.
LEAST = np.float32(-80)


@dataclass(frozen=True)
class KeySums:
    """What each key of a head received, [key].

    Attributes
    ----------
    queries
        Kept queries that see the key.
    received, uniform
        Attention from them, and what it would be were each uniform.
    far, far_queries
        Attention from the queries more than a distance later, and how many they are.
    seen_at_end
        Whether the last token's query can see the key: a sliding window drops old ones.
    """

    queries: Ids
    received: Sums
    uniform: Sums
    far: Sums
    far_queries: Ids
    seen_at_end: NDArray[np.bool_]


@dataclass(frozen=True)
class RowMeans:
    """Means over the rows of a head whose query was kept.

    Attributes
    ----------
    queries
        How many rows.
    entropy
        -sum a ln a, in nats; None without rows.
    entropy_share
        The same over ln(visible keys), of rows that see at least two; None without such rows.
    sparsity
        Share of visible keys with less than 1% of the row's largest weight.
    local_share
        Share of attention on keys at most a distance away.
    """

    queries: int
    entropy: float | None
    entropy_share: float | None
    sparsity: float | None
    local_share: float | None


@dataclass(frozen=True)
class Subtotal:
    """What the first blocks of a head's rows add up to.

    Attributes
    ----------
    rows : int
        Kept rows in them.
    received, far : numpy.ndarray
        [key], as in `KeySums`; keys behind the end have received nothing yet.
    of_rows : numpy.ndarray
        [4]: sums over the rows of entropy, entropy share, sparsity and local share.
    """

    rows: int
    received: Sums
    far: Sums
    of_rows: Sums


@dataclass(frozen=True)
class HeadSums:
    """Both, and what a longer request of the same beginning may start from."""

    keys: KeySums
    rows: RowMeans
    whole_blocks: Subtotal


def block_rows(num_keys: int) -> int:
    """Rows that are added at a time, for so many keys: fewer of a long request."""
    return max(1, min(BLOCK_ROWS, MAX_BLOCK_WEIGHTS // max(1, num_keys)))


def head_sums(head: HeadMap, distance: int, before: Subtotal | None = None) -> HeadSums:
    """Sum a head's map over its queries and over its keys.

    The map is computed a block of rows at a time and only sums are kept.

    Parameters
    ----------
    head : HeadMap
        One query head of one request.
    distance : int
        In tokens: a key is far from the queries more than this many positions later.
    before : Subtotal, optional
        What the request's first rows add up to, by the same distance and `block_rows`: those are
        not computed again.
    """
    rows = head.kept_rows()
    first, last = head.seen_by(rows)
    visible = last - first
    step = block_rows(head.num_keys)
    start = before.rows if before else 0
    whole = start + (len(rows) - start) // step * step
    sums = _grown(before, head.num_keys)
    sums = _added(head, rows[:whole], distance, sums)
    total = _added(head, rows, distance, sums)
    means = _row_means(visible, total.of_rows)
    keys = _key_sums(head, rows, distance, total.received, total.far)
    return HeadSums(keys, means, sums)


def _grown(before: Subtotal | None, num_keys: int) -> Subtotal:
    received, far = np.zeros(num_keys), np.zeros(num_keys)
    if before is None:
        return Subtotal(0, received, far, np.zeros(4))
    received[: len(before.received)] = before.received
    far[: len(before.far)] = before.far
    return Subtotal(before.rows, received, far, before.of_rows)


def _added(head: HeadMap, rows: Ids, distance: int, before: Subtotal) -> Subtotal:
    """The sums over `rows`, of which `before` has the first."""
    received, far, of_rows = (x.copy() for x in (before.received, before.far, before.of_rows))
    first, last = head.seen_by(rows)
    step = block_rows(head.num_keys)
    for at in range(before.rows, len(rows), step):
        part = rows[at : at + step]
        start, stop = int(first[at]), int(last[at : at + step].max())
        exponents, hidden, edge = head.exponents(part, start, stop)
        exponents[:, edge:][hidden] = LEAST
        np.maximum(exponents, LEAST, out=exponents)
        weights = np.exp(exponents)
        weights[:, edge:][hidden] = 0
        received[start:stop] += weights.sum(axis=0)
        # Keys this far before the block are far from all of its queries: no mask needed.
        near = max(start, min(stop, int(part[0]) - distance)) - start
        far[start : start + near] += weights[:, :near].sum(axis=0)
        later = part[:, None] - np.arange(start + near, stop)
        far[start + near : stop] += np.where(later > distance, weights[:, near:], 0).sum(axis=0)
        visible = (last - first)[at : at + step]
        entropy = -np.einsum("ij,ij->i", weights, exponents).astype(np.float64)
        strong = np.count_nonzero(
            weights >= SPARSE_SHARE * weights.max(axis=1, keepdims=True), axis=1
        )
        local = np.where(abs(later) <= distance, weights[:, near:], 0).sum(axis=1)
        several = visible > 1
        of_rows += [
            entropy.sum(),
            (entropy[several] / np.log(visible[several])).sum(),
            (1 - strong / np.maximum(1, visible)).sum(),
            local.sum(dtype=np.float64),
        ]
    return Subtotal(len(rows), received, far, of_rows)


def _key_sums(head: HeadMap, rows: Ids, distance: int, received: Sums, far: Sums) -> KeySums:
    """Who sees which key follows from positions alone."""
    keys = np.arange(head.num_keys, dtype=np.int64)
    first, last = head.seeing(keys)
    start, stop = np.searchsorted(rows, first), np.searchsorted(rows, last)
    beyond = np.clip(np.searchsorted(rows, keys + distance, side="right"), start, stop)
    low, high = head.seen_by(rows)
    shares = np.append(0.0, np.cumsum(1 / np.maximum(1, high - low)))
    return KeySums(
        queries=stop - start,
        received=received,
        uniform=shares[stop] - shares[start],
        far=far,
        far_queries=stop - beyond,
        seen_at_end=last >= head.num_tokens,
    )


def _row_means(visible: Ids, sums: Sums) -> RowMeans:
    several = int(np.count_nonzero(visible > 1))
    counts = (len(visible), several, len(visible), len(visible))
    means = [float(total / n) if n else None for total, n in zip(sums, counts, strict=True)]
    return RowMeans(len(visible), *means)
