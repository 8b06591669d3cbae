"""Sizes: of folders, and as people write them (4GiB, 80GB, 1500)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvtrace.errors import InputError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}


def parse_bytes(text: int | str, what: str, example: str) -> int:
    """Read a number of bytes, at least 1, with or without a unit.

    Parameters
    ----------
    text : int or str
        `1500`, `4GiB`, `80GB`; a bare letter is the power of two: `4G` is 4 GiB.
    what : str
        What it is the size of, for the error.
    example : str
        What to write instead, for the error.

    Raises
    ------
    InputError
        Where it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise InputError(
            f"{what} is {text!r}; bytes with or without a unit were expected; write {example}"
        )
    return int(float(match[1]) * unit)


def directory_bytes(path: Path) -> int:
    """Bytes of all files under a directory; files that vanish meanwhile do not count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += Path(folder, name).stat().st_size
            except FileNotFoundError:
                continue
    return total
