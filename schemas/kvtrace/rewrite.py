"""Writing a store anew from what another one holds: large segments, full shards, other numbers.

Everything goes through the reader and the writer, so what is written was checked, and no form of
it is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kvtrace import tables
from kvtrace.arrays import Geometry
from kvtrace.store import StoreReader, StoreWriter

#: Rows of a segment: as many as a reader of one column of numbers likes to see at once.
SEGMENT_ROWS = 1 << 20
#: Rows of an array that was added to while recording are added in these portions.
SUM_ROWS = 1 << 14

#: Takes a table's name and some of its rows; gives as many.
Change = Callable[[str, pa.Table], pa.Table]
Tell = Callable[[], None]


def count_parts(store: StoreReader) -> int:
    """How many parts a store is rewritten in: segments, and lanes of arrays."""
    segments = sum(map(len, store.state.segments.values()))
    arrays = [name for name in store.array_names() if store.axes(name)[0] == "row"]
    return segments + sum(store.array(name).shape[1] for name in arrays)


@dataclass(frozen=True)
class Rewrite:
    """How a store is written anew.

    Attributes
    ----------
    change : callable
        What becomes of a table's rows.
    extra : dict of str to pyarrow.Table
        Rows that the source lacks.
    first_segment : int
        Number of the first segment: above all of the source's where both may be seen.
    tell : callable
        Called after every part (see `count_parts`).
    """

    change: Change = lambda table, rows: rows
    extra: dict[str, pa.Table] | None = None
    first_segment: int = 0
    tell: Tell = lambda: None

    def run(self, source: StoreReader, directory: Path) -> None:
        """Write what `source` holds into `directory`, which must not exist.

        A store whose writer died is closed in its new form, and stays incomplete.

        Raises
        ------
        TraceError
            Where the source is damaged.
        """
        writer = StoreWriter(directory, first_segment=self.first_segment)
        try:
            for name in tables.arrow_schemas():
                self._copy_table(source, writer, name)
            for name in source.array_names():
                self._copy_array(source, writer, name)
            writer.close(complete=source.complete)
        except BaseException:
            writer.close(complete=False)
            raise

    def _copy_table(self, source: StoreReader, writer: StoreWriter, name: str) -> None:
        waiting = 0
        for part in source.parts(name):
            writer.append_table(name, self.change(name, part))
            waiting += part.num_rows
            self.tell()
            if waiting >= SEGMENT_ROWS:
                writer.commit()
                waiting = 0
        if self.extra and name in self.extra:
            writer.append_table(name, self.extra[name])

    def _copy_array(self, source: StoreReader, writer: StoreWriter, name: str) -> None:
        axes = source.axes(name)
        if axes[0] != "row":
            writer.put_static(name, source.static(name), ",".join(axes))
            return
        array = source.array(name)
        rows, tail = array.shape[0], array.shape[1:]
        declare = writer.declare_sums if array.is_summed else writer.declare_array
        declare(name, tail=tail, dtype=str(array.dtype), axes=",".join(axes))
        height = SUM_ROWS if array.is_summed else Geometry.of(tail, array.dtype).shard
        for lane in range(tail[0]):
            for start in range(0, rows, height):
                values = array.read(start, min(start + height, rows), lane)
                if not array.is_summed:
                    writer.append_lane(name, lane, values)
                    continue
                # What nobody wrote stays unknown.
                held = np.flatnonzero(np.isfinite(values).reshape(len(values), -1).any(axis=1))
                writer.add_rows(name, lane, start + held, values[held])
            self.tell()
