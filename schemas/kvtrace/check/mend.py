"""Finding one wrong bit: small files whose checksum is known are put right, and proven so.

CRC-32 and CRC-32C tell any three wrong bits of files this small from none: what agrees with the
checksum after one bit is turned is what was written, unless four or more bits were wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvtrace.checksums import FileSum, crc32c
from kvtrace.journal import JournalState, decode_line, split_lines
from kvtrace.layout import JOURNAL

#: Every bit is tried: larger files would take minutes.
LARGEST = 16 * 1024


def mended(data: bytes, is_right: Callable[[bytes], bool]) -> bytes | None:
    """`data` with the one bit turned that makes it right; None where there is none."""
    if len(data) > LARGEST:
        return None
    trial = bytearray(data)
    for at in range(len(trial)):
        for bit in range(8):
            trial[at] ^= 1 << bit
            if is_right(bytes(trial)):
                return bytes(trial)
            trial[at] ^= 1 << bit
    return None


def mended_journal(path: Path) -> bytes | None:
    """A journal with its damaged lines put right; None where one cannot be, or none is damaged."""
    found = []
    for line in split_lines(path.read_bytes()):
        if decode_line(line) is None:
            right = mended(line, _are_lines)
            if right is None:
                return None
            line = right
        found.append(line)
    return b"".join(found)


def _are_lines(data: bytes) -> bool:
    # Two, where the wrong bit was in the newline between them.
    return all(decode_line(line) is not None for line in split_lines(data))


def mended_file(store: Path, name: str, state: JournalState) -> bytes | None:
    """A file that a store's journal lists, put right; None where it cannot be."""
    if name == JOURNAL or name not in state.files:
        return None
    expected = state.files[name]
    try:
        data = (store / name).read_bytes()
    except OSError:
        return None
    if len(data) != expected.size:
        return None
    return mended(data, lambda trial: FileSum(len(trial), crc32c(trial)) == expected)
