"""Giving the ranks of a trace other numbers, in every table that names them or what is theirs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from kvtrace.ranks import NUMBERS_PER_RANK, is_numbered

#: Columns that hold the rank itself.
RANK_COLUMNS = frozenset({"run", "rank"})


def renumbered(table: str, rows: pa.Table, ranks: Mapping[int, int]) -> pa.Table:
    """Rows of a table with the numbers of other ranks.

    Parameters
    ----------
    table : str
        Its name.
    rows : pyarrow.Table
        Some of its rows.
    ranks : mapping of int to int
        The new rank of each old one.
    """
    for index, name in enumerate(rows.column_names):
        if name in RANK_COLUMNS or is_numbered(table, name):
            size = 1 if name in RANK_COLUMNS else NUMBERS_PER_RANK
            column = _moved(rows[name], ranks, size)
            rows = rows.set_column(index, rows.schema.field(name), column)
    return rows


def _moved(column: pa.ChunkedArray, ranks: Mapping[int, int], size: int) -> pa.Array:
    missing = column.is_null().to_numpy()
    values = column.fill_null(0).to_numpy()
    olds = np.array(sorted(ranks), np.int64)
    news = np.array([ranks[rank] for rank in olds.tolist()], np.int64)
    at = np.minimum(np.searchsorted(olds, values // size), len(olds) - 1)
    moved = (news - olds)[at] * size
    return pa.array(values + moved, column.type, mask=missing)
