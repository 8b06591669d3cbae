"""LRU hits at every capacity, in one pass; by a sample of the blocks where a stream is long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.accounting import Accounting
from kvtrace_viewer.blocks.distances import stack_distances, worst_so_far
from kvtrace_viewer.blocks.stream import BlockStream, dense_ids

#: Samples that a sampled curve is made of, each of other blocks; their spread is its error.
SAMPLES = 8
_Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LRUCurve:
    """What an LRU cache of every capacity hits.

    Attributes
    ----------
    accesses : int
        In the accounting's unit.
    hits : numpy.ndarray
        float64 [capacity + 1], by capacity from 0 to all distinct blocks; whole numbers where
        the curve is exact.
    evictions : numpy.ndarray
        float64 [capacity + 1].
    error : numpy.ndarray or None
        float64 [capacity + 1], twice the standard error of the hit ratio; None where exact.
    """

    accesses: int
    hits: _Numbers
    evictions: _Numbers
    error: _Numbers | None = None

    def at(self, capacity: int) -> int:
        """Index of a capacity; beyond all blocks nothing changes."""
        return min(capacity, len(self.hits) - 1)


def lru_curve(stream: BlockStream, accounting: Accounting | None = None) -> LRUCurve:
    """LRU at every capacity, exactly, in one pass (Mattson's stack distances).

    Counting by prefix is exact too: a block is reached at the capacities at which it and all
    before it hit, so at those of the largest distance up to it.
    """
    accounting = accounting or Accounting()
    if accounting.blocks == "full":
        stream = stream.full_blocks()
    distances = stack_distances(stream.blocks, stream.num_blocks)
    misses = len(distances) - np.cumsum(_histogram(distances, stream.num_blocks, None))
    evictions = np.maximum(0, misses - np.arange(stream.num_blocks + 1))
    if accounting.hits == "prefix":
        worst_so_far(distances, stream.starts)
    weights = stream.tokens if accounting.unit == "token" else None
    hits = np.cumsum(_histogram(distances, stream.num_blocks, weights))
    accesses = stream.accesses if weights is None else int(weights.sum())
    return LRUCurve(accesses, hits, evictions)


def _histogram(
    distances: NDArray[np.int32], num_blocks: int, weights: NDArray[np.int32] | None
) -> _Numbers:
    """Accesses by distance, 0 to num_blocks; first accesses, of no distance, left out."""
    found = np.bincount(distances, weights, minlength=num_blocks + 2)[: num_blocks + 1]
    return found.astype(np.float64)


def sampled_lru_curve(
    stream: BlockStream, rate: float, accounting: Accounting | None = None
) -> LRUCurve:
    """LRU at every capacity from a share of the blocks, with its error.

    SHARDS (Waldspurger et al., FAST 2015): all accesses of the blocks whose hash (splitmix64) is
    small, their distances scaled up, and what the sample has too few or too many accesses added
    at distance 1 (the paper's adjustment: a single hot block may be a twentieth of a stream). It
    is done on eight disjoint samples of an eighth of the rate each; the mean is the curve, twice
    its standard error the error.

    Parameters
    ----------
    stream : BlockStream
        The stream.
    rate : float
        Share of the blocks, above 0 and at most 1.
    accounting : Accounting, optional
        Hits must be counted per block: a sample has no prefixes.

    Raises
    ------
    InputError
        For a rate or an accounting that cannot be.
    """
    accounting = accounting or Accounting()
    if not 0 < rate <= 1:
        raise InputError(
            f"sample {rate} is no share of the blocks; above 0 and at most 1 was expected; give"
            " --sample 0.1, say"
        )
    if accounting.hits == "prefix":
        raise InputError(
            "a sample of the blocks has no prefixes; --hits block was expected with --sample;"
            " leave one of the two out"
        )
    if accounting.blocks == "full":
        stream = stream.full_blocks()
    hashes = _splitmix64(np.arange(stream.num_blocks, dtype=np.uint64))
    limit = np.uint64(min(rate * 2.0**64, 2.0**64 - 2048))
    chosen = np.where(hashes <= limit, (hashes % np.uint64(SAMPLES)).astype(np.int64), -1)
    group = chosen[stream.blocks]
    weights = stream.tokens if accounting.unit == "token" else None
    ratios = np.array(
        [_ratios(stream, group == g, rate / SAMPLES, weights) for g in range(SAMPLES)]
    )
    mean = ratios.mean(axis=0)
    error = 2 * ratios.std(axis=0, ddof=1) / np.sqrt(SAMPLES)
    accesses = stream.accesses if weights is None else int(weights.sum())
    misses = (1 - mean) * stream.accesses
    evictions = np.maximum(0.0, misses - np.arange(stream.num_blocks + 1))
    return LRUCurve(accesses, mean * accesses, evictions, error)


def _ratios(
    stream: BlockStream,
    kept: NDArray[np.bool_],
    rate: float,
    weights: NDArray[np.int32] | None,
) -> _Numbers:
    """Hit ratio by capacity, from the accesses kept."""
    blocks, number = dense_ids(stream.blocks[kept].astype(np.int64))
    distances = stack_distances(blocks, number)
    mine = None if weights is None else weights[kept]
    total = stream.accesses if weights is None else int(weights.sum())
    histogram = _histogram(distances, number, mine)
    expected = rate * total
    if number:
        histogram[1] += expected - (len(blocks) if mine is None else int(mine.sum()))
    hits = np.cumsum(histogram) / max(expected, 1e-300)
    scaled = np.arange(stream.num_blocks + 1) * rate
    # Between whole distances of the sample the curve is straight.
    return np.asarray(np.clip(np.interp(scaled, np.arange(len(hits)), hits), 0, 1))


def _splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
