"""A store: a folder of tables and row arrays under one journal.

What one recording process writes is a store, and what one replay writes is a store. Order of a
commit: array chunks, table segments, then the journal line that makes both visible.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

from kvtrace import tables
from kvtrace.array_reader import DAMAGE, RowArrayReader, open_array
from kvtrace.arrays import TAIL, RowArrayWriter, tail_name
from kvtrace.checksums import damaged, declaration_sum, verify_file
from kvtrace.chunks import COMPRESSORS
from kvtrace.errors import TraceError
from kvtrace.files import ChunkStore, FileWriter, sync
from kvtrace.journal import JournalReader, JournalState, JournalWriter
from kvtrace.layout import ARRAYS, JOURNAL, METADATA, TABLES
from kvtrace.segments import encode_segment, read_segment
from kvtrace.sums import SumArrayWriter

Array = NDArray[Any]


class StoreWriter:
    """Writes a store; one thread owns it.

    Parameters
    ----------
    directory : pathlib.Path
        Created; must not exist as a store yet.
    durable : bool
        Whether a commit outlives a power cut: chunks, segments, their folders and the journal
        reach the disk in this order before `commit` returns.
    first_segment : int
        Number of the first segment.
    """

    def __init__(self, directory: Path, *, durable: bool = False, first_segment: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._files = FileWriter(directory, durable=durable)
        self._journal = JournalWriter(directory / JOURNAL, durable=durable)
        self._group = zarr.open_group(ChunkStore(directory / ARRAYS, self._files), mode="w-")
        if durable:
            sync(directory)
        # Arrays whose declarations the journal does not have yet.
        self._undeclared: list[str] = []
        self._arrays: dict[str, RowArrayWriter] = {}
        self._sums: dict[str, SumArrayWriter] = {}
        self._pending: dict[str, list[pa.Table]] = {}
        self._segments = first_segment
        self._closed = False
        self.rows = 0
        self.commit()

    def declare_array(self, name: str, *, tail: tuple[int, ...], dtype: str, axes: str) -> None:
        """Create an array of shape [row, *tail].

        Parameters
        ----------
        name : str
            Name under `arrays.zarr`.
        tail : tuple of int
            Shape behind the row axis; its first axis is the lane that rows may arrive by.
        dtype : str
            numpy name of the stored type.
        axes : str
            Comma-separated names of all axes, kept as the array's `axes` attribute.
        """
        self._arrays[name] = RowArrayWriter(
            self._group, self._files, name, tail, np.dtype(dtype), axes.split(",")
        )
        self._undeclared += [name, tail_name(name)]

    def declare_sums(self, name: str, *, tail: tuple[int, ...], dtype: str, axes: str) -> None:
        """Create an array of shape [row, *tail] for `add_rows`; parameters as `declare_array`."""
        self._sums[name] = SumArrayWriter(self._group, name, tail, np.dtype(dtype), axes.split(","))
        self._undeclared.append(name)

    def add_rows(self, name: str, lane: int, rows: NDArray[np.int64], values: Array) -> None:
        """Add `values [n, *tail[1:]]` to rows of a lane that were made by `declare_sums`."""
        self._sums[name].add(lane, rows, values)

    def put_static(self, name: str, values: Array, axes: str) -> None:
        """Write an array that has no row axis (a weight matrix, say), whole."""
        self._group.create_array(
            name, data=values, compressors=COMPRESSORS, attributes={"axes": axes.split(",")}
        )
        self._undeclared.append(name)

    def append(self, table: str, values: Mapping[str, Sequence[Any] | Array]) -> None:
        """Buffer rows of a table until the next commit; columns not given are null."""
        batch = tables.to_arrow(table, values)
        if batch.num_rows:
            self._pending.setdefault(table, []).append(batch)

    def append_table(self, table: str, rows: pa.Table) -> None:
        """The same, of rows in the table's own schema."""
        if rows.num_rows:
            self._pending.setdefault(table, []).append(rows)

    def append_lane(self, name: str, lane: int, values: Array) -> None:
        """Add rows to one lane of an array: `values [n, *tail[1:]]`."""
        self._arrays[name].append(lane, values)

    def append_rows(self, name: str, values: Array) -> None:
        """Add rows to all lanes of an array: `values [n, *tail]`."""
        for lane in range(values.shape[1]):
            self._arrays[name].append(lane, values[:, lane])

    def pad(self, name: str, lane: int, rows: int) -> None:
        """Bring a lane to `rows` rows with the fill value."""
        self._arrays[name].pad(lane, rows)

    def commit(self, rows: int | None = None) -> None:
        """Make everything appended so far visible.

        Parameters
        ----------
        rows : int, optional
            Rows that every lane of every array has; default: what the arrays agree on.

        Raises
        ------
        OSError
            Where the disk does not take it, now or at any time before.
        """
        # What could not be written is missing: what was committed before stands, and nothing more.
        self._files.check()
        self.rows = self._agreed_rows() if rows is None else rows
        for array in self._arrays.values():
            array.write_tail(self.rows)
        for sums in self._sums.values():
            sums.reserve(self.rows)
        self._commit_line(closed=False, complete=False)
        for array in self._arrays.values():
            array.drop_tail_before(self.rows)

    def close(self, *, complete: bool = True) -> None:
        """Seal the arrays and close the journal; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._files.check()
            self.rows = self._agreed_rows()
            for array in self._arrays.values():
                array.finish(self.rows)
            for sums in self._sums.values():
                sums.finish(self.rows)
            for name in self._arrays:
                self._files.forget(f"{ARRAYS}/{tail_name(name)}/")
            self._commit_line(closed=True, complete=complete)
            for array in self._arrays.values():
                array.drop_tail()
        finally:
            self._journal.close()

    def abandon(self) -> None:
        """End where the last commit stands; further calls do nothing."""
        self._closed = True
        self._journal.close()

    def _agreed_rows(self) -> int:
        counts = {
            array.rows(lane) for array in self._arrays.values() for lane in range(array.tail[0])
        }
        if len(counts) > 1:
            raise ValueError(f"lanes of {self.directory} hold different numbers of rows: {counts}")
        return counts.pop() if counts else self.rows

    def _commit_line(self, *, closed: bool, complete: bool) -> None:
        segments = {name: [self._write_segment(name)] for name in list(self._pending)}
        declared, self._undeclared = self._undeclared, []
        arrays = {
            name: declaration_sum((self.directory / ARRAYS / name / METADATA).read_bytes())
            for name in declared
        }
        files = self._files.take(lambda name: closed or not self._changes(name))
        self._files.sync_folders()
        try:
            self._journal.append(
                self.rows, segments, closed=closed, complete=complete, files=files, arrays=arrays
            )
        except OSError as error:
            # What the line would have listed is in no later one.
            self._files.failure = error
            raise

    def _changes(self, file: str) -> bool:
        """Whether a file may be written again: what an array declares, tails and sums."""
        kind, name, *rest = file.split("/")
        if kind != ARRAYS:
            return False
        return not rest or rest == [METADATA] or name in self._sums or name.endswith(TAIL)

    def _write_segment(self, table: str) -> str:
        name = f"{TABLES}/{table}/{self._segments:08d}.parquet"
        self._segments += 1
        self._files.write(name, encode_segment(pa.concat_tables(self._pending.pop(table))))
        return name


class StoreReader:
    """Reads a store, finished or not.

    Raises
    ------
    TraceError
        Where the folder has no journal.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._journal = JournalReader(directory / JOURNAL)
        self._arrays: dict[str, RowArrayReader] = {}

    def refresh(self) -> None:
        """See what was committed since."""
        self._journal.refresh()

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self._journal.state.rows

    @property
    def complete(self) -> bool:
        """Whether the writer finished without an error."""
        return self._journal.state.complete

    @property
    def closed(self) -> bool:
        """Whether the writer finished at all."""
        return self._journal.state.closed

    @property
    def writer_alive(self) -> bool:
        """Whether a process is still writing."""
        return not self.closed and self._journal.writer_alive()

    @property
    def state(self) -> JournalState:
        """What the journal says, as of the last refresh."""
        return self._journal.state

    def segments(self, table: str) -> list[Path]:
        """Committed Parquet files of a table, in order of writing.

        Raises
        ------
        TraceError
            Where one is not what was written.
        """
        found = []
        for name in self.state.segments.get(table, []):
            path = self.directory / name
            if name in self.state.files:
                verify_file(path, self.state.files[name])
            found.append(path)
        return found

    def table(self, name: str) -> pa.Table:
        """All committed rows of a table, in order of writing.

        Raises
        ------
        TraceError
            Where a segment that the journal lists is missing or damaged.
        """
        while True:
            try:
                parts = list(self.parts(name))
            except TraceError:
                # The store may have been compacted meanwhile, and its old segments be gone.
                if not self.is_replaced():
                    raise
                self.refresh()
                continue
            return pa.concat_tables(parts) if parts else tables.arrow_schemas()[name].empty_table()

    def parts(self, name: str) -> Iterator[pa.Table]:
        """The rows of `table`, segment by segment."""
        schema = tables.arrow_schemas()[name]
        state = self.state
        return (
            read_segment(self.directory / file, schema, state.files.get(file))
            for file in state.segments.get(name, [])
        )

    def generation(self) -> int:
        """Which store is there now: another number after it was compacted."""
        return self._journal.path.stat().st_ino

    def is_replaced(self) -> bool:
        """Whether another store, or none, is there now."""
        try:
            return self.generation() != self._journal.inode
        except FileNotFoundError:
            return True

    def array_names(self) -> list[str]:
        """Names of its arrays, with a row axis or without."""
        folders = sorted((self.directory / ARRAYS).iterdir())
        return [x.name for x in folders if not x.name.endswith(TAIL) and self.has_array(x.name)]

    def axes(self, name: str) -> list[str]:
        """Names of an array's axes."""
        found = zarr.open_array(self.directory / ARRAYS / name, mode="r").attrs.get("axes")
        if found is not None:
            return [str(axis) for axis in found]  # type: ignore[union-attr]
        # A resize had lost them, up to format 1.0.
        catalog = {row["name"]: row["axes"] for row in self.table("array_catalog").to_pylist()}
        return str(catalog.get(name, "row,layer,kv_head")).split(",")

    def has_array(self, name: str) -> bool:
        """Whether the store has an array of this name."""
        if self.state.arrays:
            return name in self.state.arrays
        # Format 1.0: or a store without arrays.
        return (self.directory / ARRAYS / name / METADATA).exists()

    def array(self, name: str) -> RowArrayReader:
        """A row array, clipped at the committed rows.

        Raises
        ------
        TraceError
            Where there is none of this name.
        """
        if name not in self._arrays:
            if not self.has_array(name):
                raise TraceError(
                    f"{self.directory} has no array {name!r}; it was not recorded;"
                    " record again with more detail"
                )
            self._arrays[name] = RowArrayReader(
                self.directory / ARRAYS,
                name,
                self._array_state,
                self.state.arrays,
                self.generation,
            )
        return self._arrays[name]

    def static(self, name: str) -> Array:
        """An array without a row axis, whole.

        Raises
        ------
        TraceError
            Where it is damaged.
        """
        array = open_array(self.directory / ARRAYS, name, self.state.arrays)
        try:
            return np.asarray(array[...])
        except DAMAGE as error:
            raise damaged(self.directory / ARRAYS / name, str(error)) from error

    def _array_state(self) -> tuple[int, bool]:
        state = self._journal.refresh()
        return state.rows, state.closed


def publish(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one of the same name."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
