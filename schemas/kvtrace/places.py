"""Where the rows of several ranks stand in one array over all of them, such as `evicted_at`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from kvtrace.ranks import NUMBERS_PER_RANK

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlaces:
    """Rank after rank, each rank's rows in their order.

    Attributes
    ----------
    counts : mapping of int to int
        Rows of each rank, in the order in which they stand.
    """

    counts: Mapping[int, int]

    @property
    def rows(self) -> int:
        """Rows of all ranks: length of the axis."""
        return sum(self.counts.values())

    @property
    def first(self) -> dict[int, int]:
        """By rank: index of its first row."""
        return dict(zip(self.counts, accumulate(self.counts.values(), initial=0), strict=False))

    def of(self, rows: Ids) -> Ids:
        """Index of some rows of one rank on axis 0: int64, as many."""
        if not len(rows):
            return rows
        rank = int(rows[0]) // NUMBERS_PER_RANK
        return rows - rank * NUMBERS_PER_RANK + self.first[rank]
