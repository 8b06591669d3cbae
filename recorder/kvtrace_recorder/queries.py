"""The queries of rows of which some have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
#: Picks some rows of an array.
Index = slice | Rows


@dataclass(frozen=True)
class Queries:
    """The queries of some rows.

    Attributes
    ----------
    q : numpy.ndarray or None
        [query, q_head, head_dim] of the rows that have one.
    has_query : numpy.ndarray
        [row] of bool.
    positions : numpy.ndarray
        [row], in the request.
    """

    q: NDArray[Any] | None
    has_query: NDArray[np.bool_]
    positions: Rows

    def of(self, share: Index) -> tuple[NDArray[Any] | None, Index, Rows]:
        """Queries, rows and positions of those of some rows that have a query."""
        if self.q is None or len(self.q) == len(self.has_query):
            return None if self.q is None else self.q[share], share, self.positions[share]
        rows = np.arange(len(self.has_query))[share]
        rows = rows[self.has_query[rows]]
        at = np.cumsum(self.has_query) - 1
        return self.q[at[rows]], rows, self.positions[rows]
