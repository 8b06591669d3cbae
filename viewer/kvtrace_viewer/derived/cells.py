"""Values of a query's result as a grid can show them."""

from __future__ import annotations

import math
from typing import Any

MAX_EXACT_INTEGER = 2**53


def cell(value: Any) -> Any:
    """Make a value safe for JSON without changing what it says.

    Integers past 2^53 go as text (a browser would round them, and time.time_ns() is past it), NaN
    and infinities too; dates, lists and the rest as DuckDB's Python values print.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < MAX_EXACT_INTEGER else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
