"""Reading the committed rows of an array, also while it is being written; see `kvtrace.arrays`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from kvtrace.arrays import tail_name
from kvtrace.checksums import damaged, declaration_sum
from kvtrace.errors import TraceError
from kvtrace.layout import METADATA

Array = NDArray[Any]


class RowArrayReader:
    """Reads committed rows of one array, also while it is being written.

    Parameters
    ----------
    folder : pathlib.Path
        The `arrays.zarr` folder.
    name : str
        Name of the array.
    state : callable
        Re-reads the journal and returns (committed rows, whether the store is closed).
    declared : mapping of str to str
        Checksums of what arrays declare, by name; empty in a trace of format 1.0.
    generation : callable
        Says which store is there: another number after it was compacted.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        state: Callable[[], tuple[int, bool]],
        declared: Mapping[str, str],
        generation: Callable[[], int] = lambda: 0,
    ) -> None:
        self._folder, self._name, self._state = folder, name, state
        self._declared = declared
        self._generation = generation
        self._opened = generation()
        self._rows, self._closed = state()
        try:
            self._open()
        except FileNotFoundError as error:
            # The writer may have closed the store between our reading the journal and this.
            was_closed = self._closed
            self._rows, self._closed = state()
            if was_closed or not self._closed:
                raise damaged(folder / name, str(error)) from error
            self._open()

    def _open(self) -> None:
        self._sealed = open_array(self._folder, self._name, self._declared)
        #: Of an array that is added to (see kvtrace.sums) every row stands in the array itself.
        self._whole = self._sealed.shards is None
        self._tail = None if self._closed or self._whole else self._open_tail()
        # The shard size is the array's own: another version may choose another.
        self._shard = (self._sealed.shards or self._sealed.chunks)[0]
        if self._sealed.shape[0] < self._sealed_rows():
            what = f"it has {self._sealed.shape[0]} rows, {self._sealed_rows()} were committed"
            raise damaged(self._folder / self._name / METADATA, what)

    def _open_tail(self) -> zarr.Array[Any]:
        return open_array(self._folder, tail_name(self._name), self._declared)

    @property
    def shape(self) -> tuple[int, ...]:
        """Committed rows, lanes, and the rest."""
        return (self._rows, *self._sealed.shape[1:])

    @property
    def changing_from(self) -> int:
        """First row whose chunk may still be written again; the committed rows where none."""
        if self._closed:
            return self._rows
        return 0 if self._whole else self._sealed_rows()

    @property
    def is_summed(self) -> bool:
        """Whether its rows are added to after they were written; see `kvtrace.sums`."""
        return self._whole

    @property
    def dtype(self) -> np.dtype[Any]:
        """Stored type."""
        return np.dtype(self._sealed.dtype)

    def read(self, start: int, stop: int, lane: int | None = None) -> Array:
        """Rows [start, stop), of one lane `[row, ...]` or of all `[row, lane, ...]`.

        Raises
        ------
        IndexError
            For rows that are not committed.
        TraceError
            Where what was committed is damaged.
        """
        while True:
            if not 0 <= start <= stop <= self._rows:
                self._refresh()
                if not 0 <= start <= stop <= self._rows:
                    raise IndexError(f"rows {start}:{stop} of {self._rows}")
            sealed = self._sealed_rows()
            try:
                values = self._read(start, stop, lane)
            except FileNotFoundError as error:
                # The writer closed the store and removed the tail between two of our reads.
                if not self._refresh():
                    raise damaged(self._folder / self._name, str(error)) from error
                continue
            except TraceError:
                # What looks damaged may be half of the old store and half of the compacted one.
                if self._generation() == self._opened:
                    raise
                self._refresh()
                continue
            # A tail chunk may be deleted only after a commit that seals its rows: if none came
            # while we read, or nothing came from the tail, what we read is whole.
            if stop <= sealed and self._generation() == self._opened:
                return values
            if not self._refresh():
                return values

    def _refresh(self) -> bool:
        """Re-read the journal; whether what this reader must read from has moved."""
        sealed, closed, opened = self._sealed_rows(), self._closed, self._opened
        self._opened = self._generation()
        self._rows, self._closed = self._state()
        moved = self._opened != opened or self._sealed_rows() != sealed or self._closed != closed
        if moved or self._rows > self._sealed.shape[0]:
            self._open()
        return moved

    def _sealed_rows(self) -> int:
        if self._closed or self._whole:
            return self._rows
        return self._rows // self._shard * self._shard

    def _read(self, start: int, stop: int, lane: int | None) -> Array:
        sealed = self._sealed_rows()
        where: Any = slice(None) if lane is None else lane
        parts: list[Array] = []
        if start < sealed:
            parts.append(self._fetch(self._name, self._sealed, start, min(stop, sealed), where))
        if stop > sealed and self._tail is not None:
            if stop > self._tail.shape[0]:
                self._tail = self._open_tail()
            tail = tail_name(self._name)
            parts.append(self._fetch(tail, self._tail, max(start, sealed), stop, where))
        if not parts:
            return np.asarray(self._sealed[0:0, where])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _fetch(self, name: str, array: zarr.Array[Any], start: int, stop: int, where: Any) -> Array:
        path = self._folder / name
        if stop > array.shape[0]:
            # zarr clips a slice in silence.
            raise damaged(path, f"it has {array.shape[0]} rows, row {stop - 1} was committed")
        try:
            return np.asarray(array[start:stop, where])
        except DAMAGE as error:
            raise damaged(path, f"rows {start} to {stop - 1}: {error}") from error


#: What zarr raises over a chunk that is not what was written: its checksum, its size.
DAMAGE = (ValueError, RuntimeError, TypeError)


def open_array(folder: Path, name: str, declared: Mapping[str, str]) -> zarr.Array[Any]:
    """Open an array for reading, if it is what it was declared as.

    Parameters
    ----------
    folder : pathlib.Path
        The `arrays.zarr` folder.
    name : str
        Name of the array.
    declared : mapping of str to str
        Checksums of declarations by name; an array that is not in it is not checked.

    Raises
    ------
    TraceError
        Where it declares something else.
    """
    if name in declared:
        metadata = folder / name / METADATA
        try:
            found = declaration_sum(metadata.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(metadata, str(error)) from error
        if found != declared[name]:
            raise damaged(metadata, "its declaration changed")
    return zarr.open_array(folder / name, mode="r")
