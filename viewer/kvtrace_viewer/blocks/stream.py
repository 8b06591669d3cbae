"""The one form of every block stream: requests in order, each a list of block ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockStream:
    """Which blocks the requests of a workload asked for, in order.

    Attributes
    ----------
    blocks : numpy.ndarray
        int32 [access], dense ids: 0 is the first block ever seen, 1 the next other one, ...
    starts : numpy.ndarray
        int64 [request + 1], where the accesses of each request begin, and where the last end.
    tokens : numpy.ndarray
        int32 [access], tokens in the block.
    is_output : numpy.ndarray
        bool [access], whether it holds nothing but generated tokens.
    arrival_ns : numpy.ndarray
        int64 [request], on the source's clock.
    prompt_tokens : numpy.ndarray
        int64 [request].
    block_size : int
        Tokens of a full block.
    num_blocks : int
        Distinct blocks.
    namespaces : tuple of (str or None)
        Of each request where the source has several; empty where one.
    source : str
        What the stream was made from, for people.
    notes : tuple of str
        What must be known to read results, for people.
    """

    blocks: Ids
    starts: Counts
    tokens: Ids
    is_output: NDArray[np.bool_]
    arrival_ns: Counts
    prompt_tokens: Counts
    block_size: int
    num_blocks: int
    namespaces: tuple[str | None, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def accesses(self) -> int:
        """Number of accesses."""
        return len(self.blocks)

    @property
    def requests(self) -> int:
        """Number of requests."""
        return len(self.starts) - 1

    @cached_property
    def is_full(self) -> NDArray[np.bool_]:
        """Whether each access is of a full block: bool [access]."""
        return self.tokens >= self.block_size

    @cached_property
    def index(self) -> Ids:
        """Index of each access in its request: int32 [access]."""
        lengths = np.diff(self.starts)
        first = np.repeat(self.starts[:-1], lengths)
        return (np.arange(self.accesses) - first).astype(np.int32)

    @cached_property
    def next_access(self) -> Counts:
        """Index of the next access of the same block: int64 [access]; `accesses` where none."""
        return _next_access(self.blocks, self.num_blocks)

    def full_blocks(self) -> BlockStream:
        """The same without the accesses of blocks that are not full."""
        if self.is_full.all():
            return self
        kept = self.is_full
        before = np.concatenate([[0], np.cumsum(kept)])
        blocks, number = dense_ids(self.blocks[kept].astype(np.int64))
        return replace(
            self,
            blocks=blocks,
            starts=before[self.starts],
            tokens=self.tokens[kept],
            is_output=self.is_output[kept],
            num_blocks=number,
        )


def dense_ids(contents: Counts) -> tuple[Ids, int]:
    """Number contents in the order in which they first come.

    Parameters
    ----------
    contents : numpy.ndarray
        int64 [access], any numbers.

    Returns
    -------
    ids : numpy.ndarray
        int32 [access].
    number : int
        Distinct contents.
    """
    ids = np.empty(len(contents), np.int32)
    return ids, int(_dense_ids(np.ascontiguousarray(contents, np.int64), ids))


@jit
def _dense_ids(contents: Counts, ids: Ids) -> int:
    """Open addressing, doubled at half full; the hash is splitmix64's last step."""
    size = 1 << 12
    keys = np.empty(size, np.int64)
    slots = np.full(size, -1, np.int32)
    count = 0
    for i in range(len(contents)):
        key = contents[i]
        at = _slot(key, size)
        while slots[at] >= 0 and keys[at] != key:
            at = (at + 1) & (size - 1)
        if slots[at] < 0:
            keys[at] = key
            slots[at] = count
            count += 1
            ids[i] = count - 1
            if 2 * count > size:
                keys, slots, size = _doubled(keys, slots, size)
        else:
            ids[i] = slots[at]
    return count


@jit
def _slot(key: np.int64, size: int) -> np.int64:
    z = np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) & np.uint64(size - 1))


@jit
def _doubled(keys: Counts, slots: Ids, size: int) -> tuple[Counts, Ids, int]:
    larger = 2 * size
    new_keys = np.empty(larger, np.int64)
    new_slots = np.full(larger, -1, np.int32)
    for old in range(size):
        if slots[old] >= 0:
            at = _slot(keys[old], larger)
            while new_slots[at] >= 0:
                at = (at + 1) & (larger - 1)
            new_keys[at] = keys[old]
            new_slots[at] = slots[old]
    return new_keys, new_slots, larger


@jit
def _next_access(blocks: Ids, num_blocks: int) -> Counts:
    found = np.empty(len(blocks), np.int64)
    seen = np.full(num_blocks, len(blocks), np.int64)
    for i in range(len(blocks) - 1, -1, -1):
        found[i] = seen[blocks[i]]
        seen[blocks[i]] = i
    return found
