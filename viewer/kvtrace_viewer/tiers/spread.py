"""Times in a few numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 95, 99)


def spread(times: NDArray[Any]) -> dict[str, float] | None:
    """Mean and percentiles in seconds; None of nothing."""
    if not len(times):
        return None
    found = {"mean": float(times.mean()) / 1e9}
    for percent, value in zip(PERCENTILES, np.percentile(times, PERCENTILES), strict=True):
        found[f"p{percent}"] = float(value) / 1e9
    found["total"] = float(times.sum()) / 1e9
    return found
