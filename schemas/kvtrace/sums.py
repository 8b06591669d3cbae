"""Row arrays that are added to after their rows were written: `received`.

What a key has received grows until its prompt ends, which may be steps after its row was
committed. So these arrays have no shards and no tail: small chunks that zarr replaces atomically,
each read, added to and written again. A reader sees the sum over the queries written so far, and
NaN in rows that have none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from kvtrace.arrays import CHUNK_KEYS, Geometry, fill_value
from kvtrace.chunks import COMPRESSORS

Rows = NDArray[np.int64]


class SumArrayWriter:
    """Writes one such array.

    Parameters
    ----------
    group : zarr.Group
        Where the array is created.
    name : str
        Name of the array.
    tail : tuple of int
        Shape behind the row axis: (lanes, ...).
    dtype : numpy dtype
        Stored type, a float.
    axes : list of str
        Names of all axes.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        tail: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: list[str],
    ) -> None:
        chunk = Geometry.of(tail, dtype).chunk
        self._tail = tail
        self._array: zarr.Array[Any] = group.create_array(
            name,
            shape=(chunk, *tail),
            chunks=(chunk, 1, *tail[1:]),
            dtype=dtype,
            fill_value=fill_value(dtype),
            compressors=COMPRESSORS,
            chunk_key_encoding=CHUNK_KEYS,
            config={"write_empty_chunks": False},
            attributes={"axes": axes},
        )

    def add(self, lane: int, rows: Rows, values: NDArray[Any]) -> None:
        """Add `values [n, *tail[1:]]` to some rows of a lane, which ascend; NaN counts as zero."""
        if not len(rows):
            return
        self.reserve(int(rows[-1]) + 1)
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
            first, last = int(rows[part[0]]), int(rows[part[-1]]) + 1
            held = np.nan_to_num(np.asarray(self._array[first:last, lane]))
            self._array[first:last, lane] = held + values[part]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows."""
        if rows > self._array.shape[0]:
            self._array.resize((max(rows, 2 * self._array.shape[0]), *self._tail))

    def finish(self, rows: int) -> None:
        """Cut the array to its length."""
        self._array.resize((rows, *self._tail))
