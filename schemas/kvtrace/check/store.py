"""Checking one store: its journal, every file the journal lists, and every array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvtrace import tables
from kvtrace.array_reader import RowArrayReader, open_array
from kvtrace.arrays import TAIL, tail_name
from kvtrace.check.report import Problem, Status
from kvtrace.checksums import file_sum
from kvtrace.errors import TraceError
from kvtrace.journal import JournalState, decode_line, split_lines
from kvtrace.layout import ARRAYS, JOURNAL, METADATA, TABLES
from kvtrace.segments import read_segment
from kvtrace.store import StoreReader

#: Rows that are decoded at a time.
ROWS = 1024


@dataclass
class StoreCheck:
    """One store under check.

    Attributes
    ----------
    trace, directory : pathlib.Path
        The trace, and the store in it.
    state : JournalState
        What its journal's whole lines add up to, up to the first damaged one.
    """

    trace: Path
    directory: Path
    state: JournalState = field(default_factory=JournalState)
    files: int = 0
    nbytes: int = 0
    #: Files known to differ; nothing is read from them again.
    broken: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The store's path in the trace."""
        return self.directory.relative_to(self.trace).as_posix()

    def problem(self, file: str, what: str, lost: str, status: Status = Status.DAMAGED) -> Problem:
        """A problem of a file of the store."""
        self.broken.add(file)
        return Problem(status, f"{self.name}/{file}", what, lost)

    def run(self) -> Iterator[Problem]:
        """Everything of the store itself, cheapest first."""
        yield from self.check_journal()
        yield from self.check_files()
        yield from self.check_segments()
        yield from self.check_arrays()

    def check_journal(self) -> Iterator[Problem]:
        """Its lines, up to the first damaged one; sets `state`."""
        try:
            lines = split_lines((self.directory / JOURNAL).read_bytes())
        except OSError as error:
            yield self.problem(JOURNAL, str(error), "everything in this folder")
            return
        for number, line in enumerate(lines, start=1):
            entry = decode_line(line)
            if entry is not None:
                self.state.apply(entry)
                continue
            if line.endswith(b"\n"):
                what = f"line {number} of {len(lines)} is not what was written"
                yield self.problem(JOURNAL, what, f"what came after {self.state.rows} rows")
            else:
                what = f"its last {len(line)} bytes are no whole line: never committed"
                yield self.problem(JOURNAL, what, "", Status.CUT_OFF)
            return

    def check_files(self) -> Iterator[Problem]:
        """Length and checksum of every file that the journal lists."""
        for name, expected in self.state.files.items():
            try:
                found = file_sum(self.directory / name)
            except OSError as error:
                yield self.problem(name, error.strerror or str(error), self.lost(name))
                continue
            self.files += 1
            self.nbytes += found.size
            if found != expected:
                what = (
                    f"{found.size} bytes with CRC-32C {found.crc32c};"
                    f" {expected.size} with {expected.crc32c} were written"
                )
                yield self.problem(name, what, self.lost(name))

    def check_segments(self) -> Iterator[Problem]:
        """That every segment has its table's columns; those without a checksum are read whole."""
        schemas = tables.arrow_schemas()
        for table, names in self.state.segments.items():
            for name in names:
                if name in self.broken or table not in schemas:
                    continue
                try:
                    read_segment(self.directory / name, schemas[table], self.state.files.get(name))
                except (TraceError, pa.ArrowException) as error:
                    yield self.problem(name, str(error), self.lost(name))

    def check_arrays(self) -> Iterator[Problem]:
        """What arrays declare, and every chunk that no checksum of the journal covers."""
        declared = self.state.arrays or dict.fromkeys(self._array_folders(), "")
        for name in declared:
            if name.endswith(TAIL):
                # Read with the array it belongs to.
                continue
            file = f"{ARRAYS}/{name}/zarr.json"
            try:
                array = open_array(self.directory / ARRAYS, name, self.state.arrays)
            except (TraceError, OSError, ValueError) as error:
                if file not in self.broken:
                    yield self.problem(file, str(error), f"array {name}")
                continue
            # Row arrays of format 1.0 do not say what their axes are.
            axes: Any = array.attrs.get("axes", ["row"])
            if axes[0] == "row":
                yield from self._check_rows(name)
            elif not self.state.files:
                yield from self._check_static(name)

    def _array_folders(self) -> list[str]:
        found = (self.directory / ARRAYS).glob("*/zarr.json")
        return sorted(path.parent.name for path in found)

    def _check_rows(self, name: str) -> Iterator[Problem]:
        """Decode what a commit may still change, and all of format 1.0; the rest was compared."""
        state = self.state
        try:
            reader = RowArrayReader(
                self.directory / ARRAYS, name, lambda: (state.rows, state.closed), state.arrays
            )
            start = reader.changing_from if state.files else 0
            for first in range(start, state.rows, ROWS):
                reader.read(first, min(first + ROWS, state.rows))
        except (TraceError, OSError) as error:
            # What a commit listed was compared before: this is of the rows behind it.
            place = tail_name(name) if tail_name(name) in state.arrays else name
            yield self.problem(f"{ARRAYS}/{place}", str(error), self.lost(f"{ARRAYS}/{place}"))

    def _check_static(self, name: str) -> Iterator[Problem]:
        try:
            StoreReader(self.directory).static(name)
        except (TraceError, OSError) as error:
            yield self.problem(f"{ARRAYS}/{name}", str(error), f"array {name}")

    def lost(self, file: str) -> str:
        """What a file holds, in words."""
        kind, name, *rest = file.split("/")
        if kind == TABLES:
            count = len(self.state.segments.get(name, ()))
            return f"rows of table {name}: 1 of its {count} segments"
        # Chunks stood in folders by their number up to kvtrace 0.1.0: c/1/0 is c.1.0 now.
        chunk = ".".join(rest).split(".")
        if chunk[0] == "c" and len(chunk) > 2 and not name.endswith(TAIL):
            return self._lost_rows(name, int(chunk[1]), int(chunk[2]))
        if name.endswith(TAIL):
            return f"rows of array {name.removesuffix(TAIL)} since its last full shard"
        return "" if name == METADATA else f"array {name}"

    def _lost_rows(self, name: str, shard: int, lane: int) -> str:
        try:
            array = open_array(self.directory / ARRAYS, name, self.state.arrays)
        except (TraceError, OSError, ValueError):
            return f"array {name}"
        size = (array.shards or array.chunks)[0]
        first, last = shard * size, min((shard + 1) * size, self.state.rows) - 1
        return f"{name} of {self._layer(name, lane)}, rows {first} to {last}"

    def _layer(self, name: str, lane: int) -> str:
        try:
            store = StoreReader(self.directory)
            groups = {row["name"]: row for row in store.table("array_catalog").to_pylist()}
            group = groups[name]["array_group"]
            for row in store.table("layers").to_pylist():
                if (row["array_group"], row["array_index"]) == (group, lane):
                    return f"layer {row['layer']}"
        except (TraceError, KeyError):
            pass
        return f"index {lane} of axis 1"
