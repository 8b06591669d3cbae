"""Making a rank whole again without what is damaged in it.

Tables that say what rows are cannot miss a part: without it every later row would be another
token. So the rank then ends at the commit before. Of all else only the damaged part goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kvtrace import tables
from kvtrace.array_reader import RowArrayReader
from kvtrace.arrays import TAIL, tail_name
from kvtrace.check.store import StoreCheck
from kvtrace.checksums import file_sum
from kvtrace.errors import TraceError
from kvtrace.files import FileWriter
from kvtrace.journal import JournalState, decode_line, encode_line, split_lines
from kvtrace.layout import ARRAYS, JOURNAL, METADATA, TABLES
from kvtrace.segments import encode_segment

#: Tables of which every row is needed to know what the others are about.
ESSENTIAL = frozenset(
    ("runs", "models", "layers", "requests", "forks", "rows", "tokens", "steps", "array_catalog")
)


class Rebuild:
    """Rewrites one rank's journal.

    Parameters
    ----------
    trace, folder : pathlib.Path
        The trace, and the rank's folder.
    broken : set of str
        Files and arrays that are damaged, relative to the folder.
    """

    def __init__(self, trace: Path, folder: Path, broken: set[str]) -> None:
        self._check = StoreCheck(trace, folder)
        self._folder = folder
        # Without what it declares, nothing in an array can be read.
        self._broken = {
            str(Path(file).parent) if file.endswith(f"/{METADATA}") else file for file in broken
        }
        #: What the whole lines of the journal say, in order; and how many stand before damage.
        self.lines, self._whole = _read_lines(folder / JOURNAL)
        self._all = _state(self.lines)

    def run(self, put_aside: Callable[[Path], None]) -> list[tuple[str, str]]:
        """Rewrite it, handing over what is given up; files and what was lost with each."""
        kept = _state(self.lines[: self._end()])
        self._check.state = self._all
        lost = [(file, self._check.lost(file) if "/" in file else "") for file in self._broken]
        if kept.rows < self._all.rows or JOURNAL in self._broken:
            lost.append((JOURNAL, f"rows {kept.rows} to {self._all.rows - 1}"))
        if not self._is_sealed():
            self._seal()
        for file in sorted({JOURNAL, *self._broken}):
            put_aside(self._folder / file)
        self._write(kept, lost)
        for name in self._all.arrays:
            if name.endswith(TAIL):
                put_aside(self._folder / ARRAYS / name)
        return lost

    def _end(self) -> int:
        """How many lines stand: those before damage, and before the first that needs what is."""
        for number, line in enumerate(self.lines[: self._whole]):
            for table, names in line["segments"].items():
                if table in ESSENTIAL and not self._broken.isdisjoint(names):
                    return number
        return self._whole

    def _is_sealed(self) -> bool:
        """Whether the recording was closed, even if the line that says so is lost."""
        tails = [name for name in self._all.arrays if name.endswith(TAIL)]
        return self._all.closed or not any(
            (self._folder / ARRAYS / name).exists() for name in tails
        )

    def _seal(self) -> None:
        """Write what stands in the tails of a cut-off recording into the arrays themselves."""
        rows, folder = self._all.rows, self._folder / ARRAYS
        for name in self._all.arrays:
            if tail_name(name) not in self._all.arrays or f"{ARRAYS}/{name}" in self._broken:
                continue
            sealed = zarr.open_array(folder / name, mode="r+")
            sealed.resize((rows, *sealed.shape[1:]))
            try:
                reader = RowArrayReader(folder, name, lambda: (rows, False), self._all.arrays)
                first = reader.changing_from
                values = reader.read(first, rows)
            except TraceError:
                # A damaged tail: its rows stay NaN.
                values = np.empty((0, 0))
            for lane in range(values.shape[1]):
                sealed[first:rows, lane] = values[:, lane]

    def _write(self, kept: JournalState, lost: list[tuple[str, str]]) -> None:
        files = FileWriter(self._folder)
        gap = f"{TABLES}/gaps/repair-{time.time_ns()}.parquet"
        files.write(gap, encode_segment(_gaps(lost)))
        names = {
            table: [file for file in found if file not in self._broken]
            for table, found in kept.segments.items()
        }
        names["gaps"] = [*names.get("gaps", []), gap]
        arrays = {
            name: declared
            for name, declared in self._all.arrays.items()
            if (self._folder / ARRAYS / name).exists() and not name.endswith(TAIL)
        }
        segments = [file for found in names.values() for file in found]
        entry = {
            "rows": kept.rows,
            "segments": names,
            "closed": True,
            "complete": self._all.complete and kept.rows == self._all.rows,
            "files": {
                name: file_sum(self._folder / name) for name in (*segments, *self._chunks(arrays))
            },
            "arrays": arrays,
        }
        files.write(JOURNAL, encode_line(entry))

    def _chunks(self, arrays: dict[str, str]) -> Iterator[str]:
        yield f"{ARRAYS}/{METADATA}"
        for name in arrays:
            for path in sorted((self._folder / ARRAYS / name).rglob("*")):
                if path.is_file() and not path.name.endswith(".partial"):
                    yield path.relative_to(self._folder).as_posix()


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    found: list[dict[str, Any]] = []
    whole: int | None = None
    try:
        lines = split_lines(path.read_bytes())
    except OSError:
        return [], 0
    for line in lines:
        entry = decode_line(line)
        if entry is not None:
            found.append(entry)
        elif whole is None:
            whole = len(found)
    return found, len(found) if whole is None else whole


def _state(lines: list[dict[str, Any]]) -> JournalState:
    state = JournalState()
    for line in lines:
        state.apply(line)
    return state


def _gaps(lost: list[tuple[str, str]]) -> Any:
    now = time.time_ns()
    count = len(lost)
    return tables.to_arrow(
        "gaps",
        {
            "ts_ns": np.full(count, now),
            "what": [what or file for file, what in lost],
            "count": np.ones(count, np.int64),
            "reason": [f"damaged on disk: {file}, in quarantine" for file, _ in lost],
        },
    )
