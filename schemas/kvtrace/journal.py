"""The journal: an append-only file whose last whole line says what of a store is visible.

Each line is the CRC-32 of its JSON in eight hex digits, a space, the JSON. A last line that was cut
off never was: everything before it stands. A whole line with another checksum is damage, for lines
are appended by one call and taken back where that fails.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtrace.checksums import FileSum, damaged
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
    files : dict of str to FileSum
        What files must be that no longer change, by their path in the store; empty in a store
        of format 1.0.
    arrays : dict of str to str
        Checksum of what each array's zarr.json declares; see `checksums.declaration_sum`.
    """

    commits: int = 0
    rows: int = 0
    segments: dict[str, list[str]] = field(default_factory=dict)
    closed: bool = False
    complete: bool = False
    files: dict[str, FileSum] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)

    def clear(self) -> None:
        """Begin anew; those who hold a part of it see that."""
        self.commits = self.rows = 0
        self.closed = self.complete = False
        for part in (self.segments, self.files, self.arrays):
            part.clear()

    def apply(self, entry: dict[str, Any]) -> None:
        """Fold one committed line in."""
        self.commits += 1
        self.rows = int(entry["rows"])
        for table, files in entry["segments"].items():
            self.segments.setdefault(table, []).extend(files)
        self.files |= {name: FileSum(*found) for name, found in entry.get("files", {}).items()}
        self.arrays |= entry.get("arrays", {})
        self.closed = bool(entry["closed"])
        self.complete = bool(entry["complete"])


class JournalWriter:
    """Appends commits and holds a lock that dies with the process.

    The lock is how a reader tells a recording in progress from one that was killed.

    Parameters
    ----------
    path : pathlib.Path
        Made; must not exist.
    durable : bool
        Whether a line has reached the disk when `append` returns.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        self._durable = durable
        # Without a buffer of its own: a forked child would write out what it inherited in one.
        self._file = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def append(
        self,
        rows: int,
        segments: dict[str, list[str]],
        *,
        closed: bool,
        complete: bool,
        files: dict[str, FileSum] | None = None,
        arrays: dict[str, str] | None = None,
    ) -> None:
        """Commit: one write call, so a killed process leaves a whole line or a torn last one.

        Raises
        ------
        OSError
            Where the disk does not take the line; nothing of it is left then.
        """
        entry = {"rows": rows, "segments": segments, "closed": closed, "complete": complete}
        # Absent where there is nothing to say: most commits declare no array.
        more = {"files": files, "arrays": arrays}
        entry |= {name: found for name, found in more.items() if found}
        line = encode_line(entry)
        start = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "the journal's line was cut off")
        except OSError:
            # The next line must not follow half of this one.
            self._file.truncate(start)
            self._file.seek(start)
            raise
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Release the lock."""
        self._file.close()


class JournalReader:
    """Follows a journal; `refresh` reads only what was added since.

    A store that is compacted gets another journal of the same name, which is then read from its
    beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = JournalState()
        self._offset = 0
        #: Which file was read last.
        self.inode = 0
        self.refresh()

    def refresh(self) -> JournalState:
        """Fold in the lines committed since the last call.

        Raises
        ------
        TraceError
            Where the journal is missing or a line is damaged.
        """
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode:
                    self.state.clear()
                    self._offset, self.inode = 0, inode
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError as error:
            raise TraceError(
                f"{self.path} is missing; a store begins with its journal; restore the file"
            ) from error
        for line in split_lines(data):
            entry = decode_line(line)
            if entry is None and line.endswith(b"\n"):
                raise damaged(self.path, f"line {self.state.commits + 1}")
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


def encode_line(entry: dict[str, Any]) -> bytes:
    """A line of the journal."""
    body = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their newlines, and nothing else that Python takes for the end of a line."""
    *whole, rest = data.split(b"\n")
    return [*(line + b"\n" for line in whole), *([rest] if rest else [])]


def decode_line(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is cut off or damaged."""
    if not line.endswith(b"\n") or len(line) < 10:
        return None
    body = line[9:-1]
    if line[:9] != b"%08x " % zlib.crc32(body):
        return None
    entry: dict[str, Any] = json.loads(body)
    return entry
