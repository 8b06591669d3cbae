"""The journal: an append-only file whose last whole line says what of a store is visible.

Each line is the CRC-32 of its JSON in eight hex digits, a space, the JSON. A line that is cut off
or damaged ends the journal: everything before it stands, nothing after it exists.
"""

from __future__ import annotations

import errno
import fcntl
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtrace.errors import TraceError


@dataclass
class JournalState:
    """What the committed lines of a journal add up to.

    Attributes
    ----------
    commits : int
        Number of lines.
    rows : int
        Rows of every array that may be read.
    segments : dict of str to list of str
        Parquet files per table, in order of writing, relative to the store.
    closed : bool
        Whether the writer finished; then no array has an open tail.
    complete : bool
        Whether it finished without an error.
    """

    commits: int = 0
    rows: int = 0
    segments: dict[str, list[str]] = field(default_factory=dict)
    closed: bool = False
    complete: bool = False

    def apply(self, entry: dict[str, Any]) -> None:
        """Fold one committed line in."""
        self.commits += 1
        self.rows = int(entry["rows"])
        for table, files in entry["segments"].items():
            self.segments.setdefault(table, []).extend(files)
        self.closed = bool(entry["closed"])
        self.complete = bool(entry["complete"])


class JournalWriter:
    """Appends commits and holds a lock that dies with the process.

    The lock is how a reader tells a recording in progress from one that was killed.
    """

    def __init__(self, path: Path) -> None:
        # Without a buffer of its own: a forked child would write out what it inherited in one.
        self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def append(
        self, rows: int, segments: dict[str, list[str]], *, closed: bool, complete: bool
    ) -> None:
        """Commit: one write call, so a killed process leaves a whole line or a torn last one."""
        entry = {"rows": rows, "segments": segments, "closed": closed, "complete": complete}
        body = json.dumps(entry, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the journal's line was cut off")

    def close(self) -> None:
        """Release the lock."""
        self._file.close()


class JournalReader:
    """Follows a journal; `refresh` reads only what was added since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = JournalState()
        self._offset = 0
        self.refresh()

    def refresh(self) -> JournalState:
        """Fold in the lines committed since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError as error:
            raise TraceError(
                f"{self.path} is missing; a store begins with its journal; restore the file"
            ) from error
        for line in data.splitlines(keepends=True):
            entry = _decode(line)
            if entry is None:
                break
            self._offset += len(line)
            self.state.apply(entry)
        return self.state

    def writer_alive(self) -> bool:
        """Whether a process still holds the journal for writing."""
        with self.path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False


def _decode(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n") or len(line) < 10:
        return None
    body = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(body):
        return None
    entry: dict[str, Any] = json.loads(body)
    return entry
