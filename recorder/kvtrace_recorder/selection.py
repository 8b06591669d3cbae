"""What of a model's attention is kept: layers, heads, queries, bytes; as asked for.

Plain values, parsed in one place for Python and the command line. What follows from them while
recording is `kvtrace_recorder.session.keeping`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.numbers import Numbers, parse_numbers
from kvtrace.sizes import parse_bytes

Bools = NDArray[np.bool_]

MAX_BYTES = "4GiB"
LAST_QUERIES = 64


@dataclass(frozen=True)
class Queries:
    """Which queries of a prompt are kept; every later token's is.

    Attributes
    ----------
    last : int or None
        Only of the last so many.
    every : int or None
        Only those whose position is a multiple, and the last.
    """

    last: int | None = None
    every: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether none is left out."""
        return self.last is None and self.every is None

    def is_wider_than(self, last: int) -> bool:
        """Whether more than the last so many may be kept."""
        return self.last is None or self.last > last

    def of(self, position: int, count: int, prompt_tokens: int) -> Bools:
        """Which of `count` tokens from `position` on keep their query."""
        positions = np.arange(position, position + count)
        found = np.ones(count, bool)
        if self.last is not None:
            found &= positions >= prompt_tokens - self.last
        if self.every is not None:
            found &= (positions % self.every == 0) | (positions >= prompt_tokens - 1)
        return found

    def __str__(self) -> str:
        given = {"last": self.last, "every": self.every}
        return ",".join(f"{k}={v}" for k, v in given.items() if v is not None) or "all"


@dataclass(frozen=True)
class Selection:
    """What is kept of what the detail names.

    Attributes
    ----------
    layers : frozenset of int or None
        The model's layer numbers; None keeps all.
    heads : tuple of int or None
        KV heads of every layer, ascending; their query heads come with them.
    queries : Queries
        Of prompts.
    max_bytes : int or None
        Bytes of arrays and rows, before compression, above which nothing more is kept; what comes
        before is thinned so that it lasts.
    """

    layers: frozenset[int] | None = None
    heads: tuple[int, ...] | None = None
    queries: Queries = Queries()
    max_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As column `runs.selection` keeps it."""
        return {
            "layers": None if self.layers is None else sorted(self.layers),
            "heads": None if self.heads is None else list(self.heads),
            "queries": str(self.queries),
            "max_bytes": self.max_bytes,
        }


def parse_selection(
    layers: Numbers = None,
    heads: Numbers = None,
    queries: str = "all",
    max_bytes: int | str | None = MAX_BYTES,
) -> Selection:
    """Read what the user asked for.

    Parameters
    ----------
    layers, heads : str, sequence of int or None
        Numbers from 0, such as "0,4-7"; None is all.
    queries : str
        all, last=N or every=N.
    max_bytes : int, str or None
        Bytes, or a number with a unit (4GiB, 500MB); None or "none" is no limit.

    Raises
    ------
    InputError
        For anything else.
    """
    chosen = parse_numbers("layers", layers)
    kept = parse_numbers("heads", heads)
    return Selection(
        None if chosen is None else frozenset(chosen),
        kept,
        _queries(queries),
        _bytes(max_bytes),
    )


def check_verify(verify: bool, detail: str) -> None:
    """Refuse a self-check of what is not recorded.

    Raises
    ------
    InputError
        Where attention outputs could not be recomputed.
    """
    if verify and detail != "qkv":
        raise InputError(
            f"verify was asked for with detail {detail}; outputs are recomputed from q, k and v;"
            " record with --detail qkv"
        )


def _queries(given: str) -> Queries:
    if given == "all":
        return Queries()
    match = re.fullmatch(r"(last|every)=([1-9]\d*)", str(given))
    if match is None:
        raise InputError(
            f"queries is {given!r}; all, last=N or every=N was expected; write --queries last=64"
        )
    number = int(match[2])
    return Queries(last=number) if match[1] == "last" else Queries(every=number)


def _bytes(given: int | str | None) -> int | None:
    if given is None or given == "none":
        return None
    return parse_bytes(given, "max-bytes", "--max-bytes 4GiB, or none")
