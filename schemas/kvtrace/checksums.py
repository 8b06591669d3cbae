"""Checksums of a trace's files: CRC-32C, as in Zarr's own codec.

Every byte that a reader uses stands under one: a chunk under its codec's, a file that is written
once under the journal's, a line of the journal under its own (CRC-32), the manifest and what an
array declares of itself under that of their JSON, whatever its white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from kvtrace.errors import TraceError

_BLOCK = 1 << 20
#: Field of a JSON document that holds the checksum of the others.
FIELD = "checksum"


class FileSum(NamedTuple):
    """What a file must be: its length and checksum."""

    size: int
    crc32c: str


def crc32c(data: Any) -> str:
    """CRC-32C of a buffer in eight hex digits."""
    return f"{extend_sum(0, data):08x}"


def extend_sum(crc: int, data: Any) -> int:
    """CRC-32C of what `crc` is of, with a buffer behind it."""
    # google_crc32c takes no memoryview, but an array over one.
    return google_crc32c.extend(crc, np.frombuffer(data, np.uint8)) if len(data) else crc


def file_sum(path: Path) -> FileSum:
    """Length and checksum of a file as it is."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            crc = google_crc32c.extend(crc, block)
    return FileSum(size, f"{crc:08x}")


def verify_file(path: Path, expected: FileSum) -> None:
    """Compare a file that never changes with what was written; once, while it stays as it is.

    Raises
    ------
    TraceError
        Where it is missing or differs.
    """
    try:
        stat = path.stat()
        found = _sum_of(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise damaged(path, str(error)) from error
    if found != expected:
        raise damaged(path, f"it is {found}, {expected} was written")


@lru_cache(maxsize=1 << 16)
def _sum_of(path: Path, size: int, mtime_ns: int) -> FileSum:
    # Size and time are part of the key, so that a file that was touched is read again.
    return file_sum(path)


def damaged(path: Path, why: str) -> TraceError:
    """The error for a file that is not what was written."""
    return TraceError(
        f"{path} is damaged ({why}); what was written was expected;"
        " `kvtrace check` says what is still usable, --repair puts the rest aside"
    )


def document_sum(document: Mapping[str, Any]) -> str:
    """Checksum of a JSON document without its field `checksum`."""
    rest = {name: value for name, value in document.items() if name != FIELD}
    return crc32c(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def declaration_sum(metadata: bytes) -> str:
    """Checksum of an array's zarr.json without its number of rows, which grows."""
    document: dict[str, Any] = json.loads(metadata)
    document["shape"] = [None, *document["shape"][1:]]
    return document_sum(document)
