"""Which rows make up each request: its own rows in order, and what its forks brought or took.

Writers and readers follow the same rule, so it stands once, here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Fork:
    """Before row `row` was processed, `request` became the first `tokens` tokens of `source`.

    Forks of one row happen at once: each finds its source as it stood before all of them.

    Attributes
    ----------
    row : int
        The first row that was processed after.
    request, source : int
        Numbers of requests; equal for a crop.
    tokens : int
        Tokens kept.
    """

    row: int
    request: int
    source: int
    tokens: int


class Sequences:
    """Requests as lists of rows, growing and forking."""

    def __init__(self) -> None:
        self._rows: dict[int, Ids] = {}
        self._tokens: dict[int, int] = {}

    def rows(self, request: int) -> Ids:
        """Row of each token of a request: int64 [token]; a view until the request changes."""
        held = self._rows.get(request)
        return np.empty(0, np.int64) if held is None else held[: self._tokens[request]]

    def extend(self, request: int, rows: Ids, positions: Ids | None = None) -> None:
        """Put rows at the end of a request, or at `positions`, of which the last one counts."""
        start = self._tokens.get(request, 0)
        stop = start + len(rows) if positions is None else max(start, int(positions.max()) + 1)
        held = self._rows.get(request)
        if held is None or stop > len(held):
            # Doubled, so that a request that grows by single tokens is not copied at each.
            grown = np.empty(max(stop, 2 * start, 64), np.int64)
            grown[:start] = self.rows(request)
            held = self._rows[request] = grown
        held[slice(start, stop) if positions is None else positions] = rows
        self._tokens[request] = stop

    def fork(self, forks: Iterable[Fork]) -> None:
        """Apply the forks of one row."""
        # A crop takes no copy: the rows behind its end are written over by what follows.
        cropped = []
        copied = []
        for fork in forks:
            if fork.source == fork.request:
                cropped.append(fork)
            else:
                copied.append((fork.request, self.rows(fork.source)[: fork.tokens].copy()))
        for fork in cropped:
            if fork.request in self._tokens:
                self._tokens[fork.request] = min(fork.tokens, self._tokens[fork.request])
        for request, rows in copied:
            self._rows[request], self._tokens[request] = rows, len(rows)

    def drop(self, request: int) -> None:
        """Forget a request."""
        self._rows.pop(request, None)
        self._tokens.pop(request, None)


def rows_by_request(row: Ids, request: Ids, position: Ids, forks: list[Fork]) -> dict[int, Ids]:
    """Rows of every request by position, from the columns of tables `rows` and `forks`.

    Of rows with one request and position the last one counts. Requests without a token are left
    out; one whose tokens all come from its source is not.

    Parameters
    ----------
    row, request, position : numpy.ndarray
        int64 [row], in any order.
    forks : list of Fork
        In any order.

    Returns
    -------
    dict of int to numpy.ndarray
        By request in ascending order: int64 [token].
    """
    forked = np.array(sorted({n for f in forks for n in (f.request, f.source)}), np.int64)
    apart = np.isin(request, forked) if len(forked) else np.zeros(len(row), bool)
    found = _latest(row[~apart], request[~apart], position[~apart])
    if forks:
        found |= _replayed(row[apart], request[apart], position[apart], forks)
    return dict(sorted(found.items()))


def _latest(row: Ids, request: Ids, position: Ids) -> dict[int, Ids]:
    """Requests that never forked, all at once."""
    order = np.lexsort((row, position, request))
    row, request, position = row[order], request[order], position[order]
    last = np.ones(len(row), bool)
    last[:-1] = (request[1:] != request[:-1]) | (position[1:] != position[:-1])
    row, request = row[last], request[last]
    names, starts = np.unique(request, return_index=True)
    parts = np.split(row, starts[1:]) if len(row) else []
    return {int(name): part for name, part in zip(names, parts, strict=True)}


def _replayed(row: Ids, request: Ids, position: Ids, forks: list[Fork]) -> dict[int, Ids]:
    """Requests that forked, from fork to fork in the order of the rows."""
    order = np.lexsort((row, request))
    row, request, position = row[order], request[order], position[order]
    names, starts, counts = np.unique(request, return_index=True, return_counts=True)
    bounds = zip(names.tolist(), starts.tolist(), (starts + counts).tolist(), strict=True)
    waiting = {number: (start, stop) for number, start, stop in bounds}
    sequences = Sequences()

    def advance(number: int, before: int | None) -> None:
        """Add a request's own rows below `before`."""
        start, stop = waiting.get(number, (0, 0))
        end = stop if before is None else start + int(np.searchsorted(row[start:stop], before))
        if end > start:
            sequences.extend(number, row[start:end], position[start:end])
            waiting[number] = (end, stop)

    by_row: dict[int, list[Fork]] = {}
    for fork in forks:
        by_row.setdefault(fork.row, []).append(fork)
    for at in sorted(by_row):
        for number in {n for fork in by_row[at] for n in (fork.request, fork.source)}:
            advance(number, at)
        sequences.fork(by_row[at])
    numbers = {n for fork in forks for n in (fork.request, fork.source)} | set(waiting)
    for number in numbers:
        advance(number, None)
    return {n: rows.copy() for n in numbers if len(rows := sequences.rows(n))}
