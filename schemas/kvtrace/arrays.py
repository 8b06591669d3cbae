"""Growing Zarr arrays that can be read while they are written.

Axis 0 is the row, axis 1 the lane (a layer): rows arrive lane by lane. Full shards are written
once and never touched again, because zarr opens a shard once per byte range and a rewrite would
let a reader mix two versions. Rows behind the last full shard stand in a small unsharded tail
array, whose chunks zarr replaces atomically; a value that was committed there never changes.
Arrays are sized ahead of the data (growing the shape on append shows zeros to a reader), and
readers clip at the committed row count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.chunk_key_encodings import ChunkKeyEncodingParams

from kvtrace.chunks import COMPRESSORS, TAIL_COMPRESSORS, ChunkEncoder
from kvtrace.files import FileWriter
from kvtrace.layout import ARRAYS

#: zarr-python costs about 0.5 ms per inner chunk, whatever its size; a shard is written as one.
CHUNK_BYTES = 256 * 1024
CHUNKS_PER_SHARD = 8
#: A tail's last chunk is rewritten at every commit, so it is small: of narrow rows, too.
TAIL_BYTES = 1024 * 1024
TAIL_ROWS = 1024

#: Names of chunks: "c", and their number along every axis.
CHUNK_KEYS: ChunkKeyEncodingParams = {"name": "default", "separator": "."}

TAIL = ".tail"

Array = NDArray[Any]


def tail_name(name: str) -> str:
    """Name of the array that holds the rows behind the last full shard of `name`."""
    return name + TAIL


def fill_value(dtype: np.dtype[Any]) -> float | int:
    """What a cell holds that nobody wrote: never a plausible value."""
    return float("nan") if dtype.kind == "f" else -1


@dataclass(frozen=True)
class Geometry:
    """Rows per inner chunk, per shard and per tail chunk; all powers of two."""

    chunk: int
    shard: int
    tail: int

    @classmethod
    def of(cls, tail: tuple[int, ...], dtype: np.dtype[Any]) -> Geometry:
        """Geometry of an array of shape [row, *tail]."""
        lane_bytes = int(np.prod(tail[1:], dtype=np.int64)) * dtype.itemsize
        chunk = _power_of_two(CHUNK_BYTES // max(1, lane_bytes))
        shard = chunk * CHUNKS_PER_SHARD
        rows = _power_of_two(TAIL_BYTES // max(1, lane_bytes * tail[0]))
        return cls(chunk, shard, min(shard, rows, TAIL_ROWS))


def _power_of_two(number: int) -> int:
    return 1 << max(0, max(1, number).bit_length() - 1)


class RowArrayWriter:
    """Writes one array, lane by lane.

    Parameters
    ----------
    group : zarr.Group
        Where the array and its tail are declared.
    files : FileWriter
        Writes their chunks, of a folder above the group's.
    name : str
        Name of the array.
    tail : tuple of int
        Shape behind the row axis: (lanes, ...).
    dtype : numpy dtype
        Stored type.
    axes : list of str
        Names of all axes.
    """

    def __init__(
        self,
        group: zarr.Group,
        files: FileWriter,
        name: str,
        tail: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: list[str],
    ) -> None:
        self.name, self.tail, self.dtype = name, tail, dtype
        self.geometry = Geometry.of(tail, dtype)
        self._group, self._files = group, files
        self._encoder = ChunkEncoder(dtype)
        self._tail_encoder = ChunkEncoder(dtype, tail=True)
        self._nothing = fill_value(dtype)
        rows, lanes = self.geometry.shard, tail[0]
        common: dict[str, Any] = {
            "dtype": dtype,
            "fill_value": self._nothing,
            # One folder for all: three for every shard cost as much as what they hold.
            "chunk_key_encoding": CHUNK_KEYS,
            # Set later, they would be lost again: a resize writes what the array was made with.
            "attributes": {"axes": axes},
        }
        self._sealed = group.create_array(
            name,
            shape=(rows, *tail),
            shards=(rows, 1, *tail[1:]),
            chunks=(self.geometry.chunk, 1, *tail[1:]),
            compressors=COMPRESSORS,
            **common,
        )
        self._tail: zarr.Array[Any] | None = group.create_array(
            tail_name(name),
            shape=(rows, *tail),
            chunks=(self.geometry.tail, *tail),
            compressors=TAIL_COMPRESSORS,
            **common,
        )
        # One open shard a lane; start[lane] is its first row, fill[lane] the rows it holds.
        self._open = np.empty((lanes, rows, *tail[1:]), dtype)
        self._start = np.zeros(lanes, np.int64)
        self._fill = np.zeros(lanes, np.int64)
        # Which of its stretches hold more than the fill value: the others are never written.
        self._stretch = min(self.geometry.chunk, self.geometry.tail)
        self._held = np.zeros((lanes, rows // self._stretch), bool)
        self._tailed = 0
        self._tail_chunks: set[int] = set()

    def rows(self, lane: int) -> int:
        """Rows that the lane has received."""
        return int(self._start[lane] + self._fill[lane])

    def append(self, lane: int, values: Array) -> None:
        """Add rows `values [n, *tail[1:]]` to a lane; a shard that fills up is written at once."""
        done = 0
        while done < len(values):
            part = values[done : done + self._room(lane)]
            self._held[lane, self._stretches(lane, len(part))] = True
            self._put(lane, len(part), part)
            done += len(part)

    def pad(self, lane: int, rows: int) -> None:
        """Bring a lane to `rows` rows with the fill value: rows of another model."""
        while (missing := rows - self.rows(lane)) > 0:
            self._put(lane, min(missing, self._room(lane)), self._nothing)

    def write_tail(self, rows: int) -> None:
        """Make rows [last full shard, rows) readable; every lane must have exactly `rows` rows."""
        size, step = self.geometry.shard, self.geometry.tail
        sealed = rows // size * size
        first = max(sealed, self._tailed // step * step)
        if rows > first and self._tail is not None:
            _reserve(self._tail, rows)
            for start in range(first - sealed, rows - sealed, step):
                self._write_tail_chunk(sealed, start, min(start + step, rows - sealed))
        self._tailed = rows

    def drop_tail_before(self, rows: int) -> None:
        """Delete tail chunks of rows that full shards hold; call after the commit that says so."""
        sealed = rows // self.geometry.shard * self.geometry.shard
        held = {number for number in self._tail_chunks if number * self.geometry.tail < sealed}
        for number in held:
            self._files.remove(self._file(tail_name(self.name), number))
        self._tail_chunks -= held

    def finish(self, rows: int) -> None:
        """Write the last, partial shard and cut the array to its length."""
        count = rows % self.geometry.shard
        if count:
            _reserve(self._sealed, rows)
            # A chunk is whole, whatever the array's length.
            self._open[:, count : -(-count // self.geometry.chunk) * self.geometry.chunk] = (
                self._nothing
            )
            for lane in range(self.tail[0]):
                self._write_shard(lane)
        self._sealed.resize((rows, *self.tail))

    def drop_tail(self) -> None:
        """Delete the tail array; call after the commit that closes the store."""
        self._tail = None
        del self._group[tail_name(self.name)]

    def _room(self, lane: int) -> int:
        return self.geometry.shard - int(self._fill[lane])

    def _stretches(self, lane: int, count: int) -> slice:
        """Stretches of the open shard that the lane's next `count` rows lie in."""
        fill = int(self._fill[lane])
        return slice(fill // self._stretch, -(-(fill + count) // self._stretch))

    def _put(self, lane: int, count: int, values: Array | float) -> None:
        fill = int(self._fill[lane])
        self._open[lane, fill : fill + count] = values
        self._fill[lane] += count
        if not self._room(lane):
            _reserve(self._sealed, self.rows(lane))
            self._write_shard(lane)
            self._start[lane] += self.geometry.shard
            self._fill[lane] = 0
            self._held[lane] = False

    def _write_shard(self, lane: int) -> None:
        chunks = self._open[lane].reshape(-1, self.geometry.chunk, *self.tail[1:])
        held = self._held[lane].reshape(len(chunks), -1).any(axis=1)
        if held.any():
            parts = self._encoder.shard(
                [chunk if wanted else None for chunk, wanted in zip(chunks, held, strict=True)]
            )
            number = int(self._start[lane]) // self.geometry.shard
            self._files.write(self._file(self.name, number, lane), *parts)

    def _write_tail_chunk(self, sealed: int, start: int, stop: int) -> None:
        """Write rows [start, stop) of the open shards, the first of which is row `sealed`."""
        if self._held[:, start // self._stretch : -(-stop // self._stretch)].any():
            chunk = np.full((self.geometry.tail, *self.tail), self._nothing, self.dtype)
            chunk[: stop - start] = self._open[:, start:stop].swapaxes(0, 1)
            number = (sealed + start) // self.geometry.tail
            parts = self._tail_encoder.chunk(chunk)
            self._files.write(self._file(tail_name(self.name), number), *parts)
            self._tail_chunks.add(number)

    def _file(self, name: str, number: int, lane: int = 0) -> str:
        """File of a chunk or shard: of the axes behind the lane there is one."""
        return f"{ARRAYS}/{name}/c.{number}.{lane}{'.0' * (len(self.tail) - 1)}"


def _reserve(array: zarr.Array[Any], rows: int) -> None:
    if rows > array.shape[0]:
        array.resize((max(rows, 2 * array.shape[0]), *array.shape[1:]))
