"""Numbers as users give them: "0,4-7"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvtrace.errors import InputError

#: As the user gives numbers: "0,4-7", or a sequence.
Numbers = str | Sequence[int] | None


def parse_numbers(name: str, given: Numbers) -> tuple[int, ...] | None:
    """Numbers from 0 and ranges of them, ascending; None for None, which is all.

    Parameters
    ----------
    name : str
        The option, for what the error says.
    given : str, sequence of int or None
        "0,4-7", or [0, 4, 5, 6, 7].

    Raises
    ------
    InputError
        For anything else, and for no number at all.
    """
    if given is None:
        return None
    parts = given.split(",") if isinstance(given, str) else list(given)
    found: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(part))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise InputError(
                f"{name} is {given!r}; numbers from 0 and ranges were expected; write"
                f" --{name} 0,4-7"
            )
        found.update(range(first, last + 1))
    if not found:
        raise InputError(f"{name} is empty; at least one number was expected; leave it out for all")
    return tuple(sorted(found))
