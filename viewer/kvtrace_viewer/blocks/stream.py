"""The one form of every block stream: requests in order, each a list of block ids."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Ids = NDArray[np.int32]
Counts = NDArray[np.int64]

#: Contents are looked up directly where they span no more than this many times their number.
_DIRECT = 8


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
    request_ids : numpy.ndarray
        int64 [request], the trace's numbers of the requests; empty where it gives none.
    output_tokens : numpy.ndarray
        int64 [request], tokens that were generated; empty where not known.
    end_ns : numpy.ndarray
        int64 [request], when each had ended, on the clock of `arrival_ns`, which then ascends;
        empty where not known.
    positions : numpy.ndarray
        int32 [access], index of each in its request where some were taken out; empty where none.
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
    request_ids: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    output_tokens: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    end_ns: Counts = field(default_factory=lambda: np.empty(0, np.int64))
    positions: Ids = field(default_factory=lambda: np.empty(0, np.int32))
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
        if len(self.positions):
            return self.positions
        lengths = np.diff(self.starts)
        first = np.repeat(self.starts[:-1], lengths)
        return (np.arange(self.accesses) - first).astype(np.int32)

    @cached_property
    def next_access(self) -> Counts:
        """Index of the next access of the same block: int64 [access]; `accesses` where none."""
        return _next_access(self.blocks, self.num_blocks)

    def full_blocks(self) -> BlockStream:
        """The same without the accesses of blocks that are not full."""
        return self if self.is_full.all() else self._kept(self.is_full)

    def only(self, kept: NDArray[np.bool_]) -> BlockStream:
        """The same with some of the accesses, each with the index that it has now.

        Parameters
        ----------
        kept : numpy.ndarray
            bool [access].
        """
        return replace(self._kept(kept), positions=self.index[kept])

    def _kept(self, kept: NDArray[np.bool_]) -> BlockStream:
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
    contents = np.ascontiguousarray(contents, np.int64)
    ids = np.empty(len(contents), np.int32)
    if not len(contents):
        return ids, 0
    least, most = int(contents.min()), int(contents.max())
    if most - least < _DIRECT * len(contents):
        return ids, int(_direct_ids(contents, least, most - least + 1, ids))
    return ids, int(_hashed_ids(contents, ids))


@jit
def _direct_ids(contents: Counts, least: int, width: int, ids: Ids) -> int:
    """Contents that are nearly dense: a table with a place for each."""
    table = np.full(width, -1, np.int32)
    count = 0
    for i in range(len(contents)):
        at = contents[i] - least
        if table[at] < 0:
            table[at] = count
            count += 1
        ids[i] = table[at]
    return count


@jit
def _hashed_ids(contents: Counts, ids: Ids) -> int:
    """Open addressing, four times as large at half full; the hash is splitmix64's last step.

    A row of the table is a content and its id + 1, side by side: one miss of the cache.
    """
    size = 1 << 14
    table = np.zeros((size, 2), np.int64)
    count = 0
    for i in range(len(contents)):
        key = contents[i]
        at = _slot(key, size)
        while table[at, 1] > 0 and table[at, 0] != key:
            at = (at + 1) & (size - 1)
        if table[at, 1] == 0:
            count += 1
            table[at, 0] = key
            table[at, 1] = count
            ids[i] = count - 1
            if 2 * count > size:
                table = _larger(table)
                size = len(table)
        else:
            ids[i] = table[at, 1] - 1
    return count


@jit
def _slot(key: np.int64, size: int) -> np.int64:
    z = np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) & np.uint64(size - 1))


@jit
def _larger(table: Counts) -> Counts:
    size = 4 * len(table)
    found = np.zeros((size, 2), np.int64)
    for old in range(len(table)):
        if table[old, 1] > 0:
            at = _slot(table[old, 0], size)
            while found[at, 1] > 0:
                at = (at + 1) & (size - 1)
            found[at, 0] = table[old, 0]
            found[at, 1] = table[old, 1]
    return found


@jit
def _next_access(blocks: Ids, num_blocks: int) -> Counts:
    found = np.empty(len(blocks), np.int64)
    seen = np.full(num_blocks, len(blocks), np.int64)
    for i in range(len(blocks) - 1, -1, -1):
        found[i] = seen[blocks[i]]
        seen[blocks[i]] = i
    return found
