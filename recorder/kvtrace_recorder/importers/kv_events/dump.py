"""Dumps of KV events: JSON lines, or msgpack objects one after the other; either gzipped.

Files are read as a stream, so memory does not grow with them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from kvtrace.errors import InputError
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.kv_events.records import Record, read_record

#: What JSON lines begin with: an object, an array, space, a byte order mark.
_JSON = b"{[ \t\r\n\xef"
_GZIP = b"\x1f\x8b"
#: A record longer than this is no KV event (a million tokens take 5 MB).
_MAX_RECORD = 1 << 28
_CHUNK = 1 << 16


class DumpReader:
    """Reads the records of a dump.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    problems : Problems
        Where records that cannot be read are counted.

    Raises
    ------
    InputError
        Where the file cannot be opened.
    """

    def __init__(self, path: Path, problems: Problems) -> None:
        self._path = path
        self._problems = problems
        try:
            self._raw = path.open("rb")
            self._size = max(1, path.stat().st_size)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); a dump of KV events, or tcp://HOST:PORT"
                " of a publisher was expected; check the path"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    @property
    def share(self) -> float:
        """Share of the file that was read."""
        return self._raw.tell() / self._size

    def records(self) -> Iterator[tuple[str, Record]]:
        """Every record with its place, "line 7" or "record 7"; bad ones are counted."""
        unit = "record"
        try:
            file, first = self._content()
            unit = "line" if first in _JSON else "record"
            objects = self._lines(file) if unit == "line" else self._packed(file)
            for number, found in objects:
                place = f"{unit} {number}"
                try:
                    yield place, read_record(found)
                except ValueError as error:
                    self._problems.note(f"{unit}s of the dump", str(error), place)
        except (OSError, EOFError) as error:
            # A dump cut off in the middle of its gzip stream: what came before it stands.
            self._problems.note("rest of the dump", f"{self._path} ends badly: {error}")

    def _content(self) -> tuple[Any, bytes]:
        start = self._raw.peek(2)[:2]
        if start != _GZIP:
            return self._raw, start[:1]
        file = gzip.GzipFile(fileobj=self._raw)
        return file, file.peek(1)[:1]

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                self._problems.note("lines of the dump", "no JSON", f"line {number}")

    def _packed(self, file: BinaryIO) -> Iterator[tuple[int, Any]]:
        unpacker = msgpack.Unpacker(
            strict_map_key=False, unicode_errors="replace", max_buffer_size=_MAX_RECORD
        )
        number = fed = read = 0
        while data := file.read(_CHUNK):
            fed += len(data)
            try:
                unpacker.feed(data)
                for found in unpacker:
                    number, read = number + 1, unpacker.tell()
                    yield number, found
            except (ValueError, RecursionError, msgpack.UnpackException):
                # Nothing marks where the next record begins.
                why = "no msgpack: it and all behind it are lost"
                self._problems.note("rest of the dump", why, f"record {number + 1}")
                return
        if read < fed:
            why = "cut off in the middle"
            self._problems.note("records of the dump", why, f"record {number + 1}")


class DumpWriter:
    """Keeps messages as they came, to be imported again: msgpack of [topic, sequence, payload].

    Parameters
    ----------
    path : pathlib.Path
        The file to make.
    force : bool
        Replace one that is there.

    Raises
    ------
    InputError
        Where the file is there, or cannot be made.
    """

    def __init__(self, path: Path, *, force: bool) -> None:
        try:
            self._file = path.open("wb" if force else "xb")
        except FileExistsError as error:
            raise InputError(
                f"{path} exists; a new file was expected for --dump; choose another, or --force"
            ) from error
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}); --dump takes a file to write;"
                " choose another place"
            ) from error

    def add(self, topic: bytes, sequence: int, payload: bytes) -> None:
        """Add one message."""
        self._file.write(msgpack.packb([topic, sequence, payload]))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
