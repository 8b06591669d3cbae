"""Sums over one head's attention map, in one pass: what keys receive, and what rows look like."""

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
class HeadSums:
    """Both."""

    keys: KeySums
    rows: RowMeans


def head_sums(head: HeadMap, distance: int) -> HeadSums:
    """Sum a head's map over its queries and over its keys.

    The map is computed a block of rows at a time and only sums are kept.

    Parameters
    ----------
    head : HeadMap
        One query head of one request.
    distance : int
        In tokens: a key is far from the queries more than this many positions later.
    """
    rows = head.kept_rows()
    first, last = head.seen_by(rows)
    visible = last - first
    received, far = np.zeros(head.num_keys), np.zeros(head.num_keys)
    entropy, local = np.zeros(len(rows)), np.zeros(len(rows))
    strong = np.zeros(len(rows), np.int64)
    step = max(1, min(BLOCK_ROWS, MAX_BLOCK_WEIGHTS // max(1, head.num_keys)))
    for at in range(0, len(rows), step):
        part = slice(at, at + step)
        start, stop = int(first[part].min()), int(last[part].max())
        exponents, hidden, edge = head.exponents(rows[part], start, stop)
        exponents[:, edge:][hidden] = LEAST
        np.maximum(exponents, LEAST, out=exponents)
        weights = np.exp(exponents)
        weights[:, edge:][hidden] = 0
        entropy[part] = -np.einsum("ij,ij->i", weights, exponents)
        strong[part] = np.count_nonzero(
            weights >= SPARSE_SHARE * weights.max(axis=1, keepdims=True), axis=1
        )
        received[start:stop] += weights.sum(axis=0)
        # Keys this far before the block are far from all of its queries: no mask needed.
        near = max(start, min(stop, int(rows[part][0]) - distance)) - start
        far[start : start + near] += weights[:, :near].sum(axis=0)
        later = rows[part, None] - np.arange(start + near, stop)
        far[start + near : stop] += np.where(later > distance, weights[:, near:], 0).sum(axis=0)
        local[part] = np.where(abs(later) <= distance, weights[:, near:], 0).sum(axis=1)
    means = _row_means(visible, entropy, strong, local)
    return HeadSums(_key_sums(head, rows, distance, received, far), means)


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


def _row_means(visible: Ids, entropy: Sums, strong: Ids, local: Sums) -> RowMeans:
    several = visible > 1
    shares = entropy[several] / np.log(visible[several])
    return RowMeans(
        queries=len(visible),
        entropy=_mean(entropy),
        entropy_share=_mean(shares),
        sparsity=_mean(1 - strong / np.maximum(1, visible)),
        local_share=_mean(local),
    )


def _mean(values: Sums) -> float | None:
    return float(values.mean()) if len(values) else None
