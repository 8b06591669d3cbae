"""The last rows before each of a block's decisions, for policies in which these vote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block

Doubles = NDArray[np.float64]


def voting_rows(block: Block, first_cut: int, window: int) -> tuple[NDArray[np.float32], int]:
    """Attention [query head, row, key] from the first row that votes at a block's first cut on.

    Once for all decisions and budgets; valid as long as `block.attention`. Returned too: the
    first of the rows.
    """
    first = max(first_cut + 1 - window, 0)
    if first >= block.start:
        return block.attention[:, first - block.start :], first
    return block.head.attention(first, block.stop), first


def window_sums(values: Doubles, window: int) -> Doubles:
    """Sums of `window` neighbours along the axis before the last, without ever subtracting.

    Neighbours are the end of one group of `window` and the beginning of the next: each is summed
    towards the border between them. (A difference of sums leaves rounding where nothing is.)

    Returns
    -------
    float64, as `values` [..., row, key], window - 1 rows fewer
    """
    count = values.shape[-2] - window + 1
    found = np.empty((*values.shape[:-2], count, values.shape[-1]))
    for first in range(0, count, window):
        some = min(window, count - first)
        ends = values[..., first : first + window, :][..., ::-1, :].cumsum(axis=-2)[..., ::-1, :]
        found[..., first : first + some, :] = ends[..., :some, :]
        begins = values[..., first + window : first + window + some - 1, :].cumsum(axis=-2)
        found[..., first + 1 : first + some, :] += begins
    return found
