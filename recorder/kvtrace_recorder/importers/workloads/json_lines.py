"""JSON lines, gzipped or not, read as a stream."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvtrace.errors import InputError
from kvtrace_recorder.importers.kv_events.problems import Problems

_GZIP = b"\x1f\x8b"
#: A longer line is no request (a million block hashes take 20 MB).
_MOST_BYTES = 1 << 28


class JsonLines:
    """Reads the objects of a file, one a line; lines that hold none are counted.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    problems : Problems
        Where bad lines are counted.
    where : str
        What stands before "line 7" in the name of a place.

    Raises
    ------
    InputError
        Where the file cannot be opened.
    """

    def __init__(self, path: Path, problems: Problems, where: str = "") -> None:
        self._path = path
        self._where = where
        self._problems = problems
        try:
            self._raw = path.open("rb")
            self._size = max(1, path.stat().st_size)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}); a file of JSON lines was expected;"
                " check the path"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()

    @property
    def share(self) -> float:
        """Share of the file that was read."""
        return self._raw.tell() / self._size

    def objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every object with its place, "line 7"."""
        try:
            for number, line in self._lines():
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    found = None
                place = f"{self._where}line {number}"
                if isinstance(found, dict):
                    yield place, found
                else:
                    self._problems.note("lines", "no JSON object", place)
        except (OSError, EOFError) as error:
            # Cut off in the middle of its gzip stream: what came before it stands.
            self._problems.note("rest of the file", f"{self._path} ends badly: {error}")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        packed = self._raw.peek(2)[:2] == _GZIP
        file: Any = gzip.GzipFile(fileobj=self._raw) if packed else self._raw
        number = 0
        while line := file.readline(_MOST_BYTES):
            number += 1
            if len(line) == _MOST_BYTES:
                self._problems.note("rest of the file", "a line without end", f"line {number}")
                return
            yield number, line
