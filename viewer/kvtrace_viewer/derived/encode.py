"""Attention weights as bytes for the canvas: 0 is "nothing here", 1 to 255 the scaled weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LOG_FLOOR = 1e-5

Scale = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _log(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    decades = -np.log10(LOG_FLOOR)
    scaled: NDArray[np.float32] = 1 + np.log10(np.maximum(weights, LOG_FLOOR)) / decades
    return scaled


# Each maps a weight in [0, 1] to [0, 1]; app.js holds the inverses for the colour bar.
SCALES: dict[str, Scale] = {"linear": lambda weights: weights, "sqrt": np.sqrt, "log": _log}


def encode(weights: NDArray[np.float32], scale: str) -> NDArray[np.uint8]:
    """Encode weights for the canvas.

    Parameters
    ----------
    weights
        Attention weights in [0, 1], any shape; NaN where a query cannot see a key.
    scale
        A name of `SCALES`.

    Returns
    -------
    uint8 of the same shape: 0 where NaN, else 1 + round(254 * scaled weight).
    """
    visible = ~np.isnan(weights)
    scaled = SCALES[scale](np.where(visible, np.clip(weights, 0, 1), 0).astype(np.float32))
    codes = 1 + np.rint(254 * scaled)
    return np.where(visible, codes, 0).astype(np.uint8)
