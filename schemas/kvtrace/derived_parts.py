"""The files of derived tables, `cache/derived/`: parts that are written once, of some requests.

A trace that grows gets another part with the requests that changed; the older parts stay as they
are, and `made_from.json`, which is replaced in one go, says which requests each still stands for.
So a reader finds the tables of one state of the trace, or none.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kvtrace import tables
from kvtrace.checksums import FIELD, FileSum, document_sum, file_sum, verify_file
from kvtrace.errors import TraceError
from kvtrace.layout import CACHE

DIRECTORY = f"{CACHE}/derived"
_STATE = "made_from.json"
#: Rows of a table that are written together.
_GROUP_ROWS = 100_000

Commits = Mapping[int, int]
Columns = dict[str, Any]


@dataclass
class Part:
    """A folder of `cache/derived`.

    Attributes
    ----------
    name : str
        Of the folder.
    rows : int
        Rows of all its tables.
    made_of : dict of int to dict
        The requests that it stands for, and what each was made of.
    outdated : list of int
        Requests in its files that a later part stands for.
    files : dict of str to FileSum
        What its files must be.
    """

    name: str
    rows: int = 0
    made_of: dict[int, dict[str, Any]] = field(default_factory=dict)
    outdated: list[int] = field(default_factory=list)
    files: dict[str, FileSum] = field(default_factory=dict)

    @property
    def live(self) -> int:
        """About how many of the rows it still stands for: requests are taken as equally long."""
        return self.rows * len(self.made_of) // (len(self.made_of) + len(self.outdated))

    def give_up(self, requests: Collection[int]) -> None:
        """Stand no longer for some requests."""
        gone = [one for one in requests if self.made_of.pop(one, None) is not None]
        self.outdated += gone


@dataclass
class Made:
    """What is there.

    Attributes
    ----------
    commits : dict of int to int
        By rank, of the state that the tables are of.
    parts : list of Part
        Oldest first; each request is in one.
    """

    commits: dict[int, int] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def made_of(self) -> dict[int, tuple[Part, dict[str, Any]]]:
        """By request: the part that stands for it, and what it was made of."""
        return {request: (part, of) for part in self.parts for request, of in part.made_of.items()}

    def scans(self, folder: Path) -> dict[str, str]:
        """SELECT of each derived table."""
        return {
            name: " union all by name ".join(_scan(folder, part, name) for part in self.parts)
            for name in tables.DERIVED_TABLES
            if self.parts
        }


def read_made(folder: Path) -> Made:
    """What is there, its files compared with what was written; nothing where anything differs."""
    try:
        found = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        # The definitions too: another version may compute something else.
        if found["definitions"] != _definitions() or found[FIELD] != document_sum(found):
            return Made()
        made = Made(_by_number(found["commits"]), [_part(one) for one in found["parts"]])
        for part in made.parts:
            for name, expected in part.files.items():
                verify_file(folder / part.name / name, expected)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TraceError):
        # Missing, of another version, or damaged: made again.
        return Made()
    return made


def publish_made(folder: Path, made: Made) -> None:
    """Let readers find this from now on, and remove what nobody reads any more."""
    state = {
        "definitions": _definitions(),
        "commits": made.commits,
        "parts": [vars(part) for part in made.parts],
    }
    temporary = folder / f".{_STATE}"
    # As it will be read: numbers of requests are JSON's keys, and so text.
    document = json.loads(json.dumps(state))
    document[FIELD] = document_sum(document)
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(folder / _STATE)
    keep = {_STATE, *(part.name for part in made.parts)}
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
        # Where somebody reads, the next one clears up.
        for path in folder.iterdir() if alone else ():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)
            elif path.name not in keep:
                path.unlink()


@contextmanager
def held(trace: Path) -> Iterator[None]:
    """Keep what is there now until the end, whoever makes it anew meanwhile."""
    with _locked(trace / DIRECTORY, fcntl.LOCK_SH):
        yield


@contextmanager
def making(trace: Path) -> Iterator[None]:
    """Keep other threads and processes from making the tables; they wait.

    Raises
    ------
    OSError
        Where the trace cannot be written.
    """
    (trace / DIRECTORY).mkdir(parents=True, exist_ok=True)
    with _locked(trace / CACHE, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[bool]:
    """Hold a lock, which dies with the process; whether it was to be had."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, how)
            got = True
        except BlockingIOError:
            got = False
        yield got
    finally:
        os.close(handle)


class PartWriter:
    """Writes one part.

    Parameters
    ----------
    folder : pathlib.Path
        `cache/derived` of the trace.
    name : str
        Of the part.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.part = Part(name)
        self.directory = folder / name
        # Of a process that was killed while it made one.
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self._tables = {one: _TableWriter(self.directory, one) for one in tables.DERIVED_TABLES}

    def add(self, table: str, columns: Columns) -> None:
        """Add rows of a table."""
        schema = tables.derived_schemas()[table]
        arrays = {f.name: pa.array(columns[f.name]).cast(f.type) for f in schema}
        self._tables[table].add(pa.table(arrays, schema=schema))

    @property
    def rows(self) -> int:
        """Rows so far, of all tables."""
        return sum(writer.written for writer in self._tables.values())

    def absorb(self, folder: Path, part: Part) -> None:
        """Take over what another part stands for, but for the sums of what has not grown since."""
        gone = pa.array(part.outdated, pa.int64())
        for name, writer in self._tables.items():
            with pq.ParquetFile(folder / part.name / f"{name}.parquet") as file:
                for batch in file.iter_batches(_GROUP_ROWS):
                    rows = pa.Table.from_batches([batch])
                    writer.add(rows.filter(pc.invert(pc.is_in(rows["request"], gone))))
        self.part.made_of |= part.made_of

    def close(self) -> Part:
        """Finish the files."""
        for writer in self._tables.values():
            writer.close()
        self.part.rows = self.rows
        names = sorted(path.name for path in self.directory.iterdir())
        self.part.files = {name: file_sum(self.directory / name) for name in names}
        return self.part


class _TableWriter:
    """Writes one table, many heads to a row group."""

    def __init__(self, folder: Path, name: str) -> None:
        schema = tables.derived_schemas()[name]
        self._writer = pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd")
        self._pending: list[pa.Table] = []
        self._waiting = 0
        self.written = 0

    def add(self, rows: pa.Table) -> None:
        self._pending.append(rows)
        self._waiting += rows.num_rows
        self.written += rows.num_rows
        if self._waiting >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._waiting = [], 0


def _scan(folder: Path, part: Part, table: str) -> str:
    path = str((folder / part.name / f"{table}.parquet").resolve()).replace("'", "''")
    left = ", ".join(map(str, part.outdated))
    return f"select * from read_parquet('{path}')" + (
        f" where request not in ({left})" if left else ""
    )


def _definitions() -> str:
    # Of parts too: their form is older than a number in them.
    return tables.digest(tables.derived_ddl(), "parts")


def _part(found: dict[str, Any]) -> Part:
    files = {name: FileSum(*expected) for name, expected in found["files"].items()}
    made_of = _by_number(found["made_of"])
    return Part(found["name"], found["rows"], made_of, found["outdated"], files)


def _by_number(found: dict[str, Any]) -> dict[int, Any]:
    return {int(number): value for number, value in found.items()}
