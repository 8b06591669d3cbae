"""What stands in an attention score beside q k^T: its scale, and ALiBi.

Measured rather than looked up: a number that a model's code does not announce, or that a new
version names otherwise, is still what the scores say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace_recorder.taps.guard import UnrecordableError

Doubles = NDArray[np.float64]
#: Below this a score hides its key: masks hold a type's lowest number, a share of it, or -10,000.
_HIDDEN = {torch.float16: -3e3}
#: Rounding of the scores of a type, relative.
_ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Keys from which a straight line can be told from any other bias.
FEWEST_KEYS = 4


@dataclass(frozen=True)
class Measured:
    """What explains some scores.

    Attributes
    ----------
    scale : float
        Factor on q k^T.
    slopes : numpy.ndarray or None
        [q_head], zeros without a bias; None where there is one and too few keys to tell which.
    slack : float
        What the slopes may be wrong by.
    keys : int
        Keys that were seen; a single one shows no bias.
    """

    scale: float
    slopes: Doubles | None
    slack: float
    keys: int


def hidden_below(dtype: torch.dtype) -> float:
    """The score under which a key counts as hidden."""
    return _HIDDEN.get(dtype, -9e3)


def measure(
    scores: Doubles,
    products: Doubles,
    positions: Doubles,
    scales: Iterable[float],
    dtype: torch.dtype,
) -> Measured:
    """Find the scale and the ALiBi slopes that make scores of products q k^T.

    Parameters
    ----------
    scores, products : numpy.ndarray
        [q_head, key], one query's, visible keys only. A constant is lost in the softmax, so it
        is no bias.
    positions : numpy.ndarray
        [key]
    scales : iterable of float
        To try before any other.
    dtype : torch.dtype
        That the scores were computed in.

    Returns
    -------
    Measured
        The numbers.

    Raises
    ------
    UnrecordableError
        Where no scale and slopes explain the scores.
    """
    tried = [*scales, _ratio(scores, products)]
    for scale in tried:
        limit = _limit(scores, scale * products, dtype)
        if np.abs(scores - scale * products).max(initial=0.0) <= limit:
            return Measured(scale, np.zeros(len(scores)), limit, len(positions))
    if len(positions) < FEWEST_KEYS:
        return Measured(tried[0], None, 0.0, len(positions))
    bent = [_without_line(values, positions) for values in (scores, products)]
    for scale in [*tried, _ratio(*bent)]:
        limit = _limit(scores, scale * products, dtype)
        bias = scores - scale * products
        if np.abs(_without_line(bias, positions)).max(initial=0.0) <= limit:
            slack = limit / len(positions)
            return Measured(scale, _slopes(bias, positions), slack, len(positions))
    raise UnrecordableError(
        "an attention's scores, or its mask, hold more than a scaled q k^T and ALiBi"
    )


def _limit(scores: Doubles, products: Doubles, dtype: torch.dtype) -> float:
    # Of the bias only float32's rounding is forgiven: what ALiBi loses in 16 bits is far more
    # than attention can bear, and the trace would not show it.
    rounding = _ROUNDING.get(dtype, 2e-5) * (1 + np.abs(products).max(initial=0.0))
    return float(rounding + 5e-7 * np.abs(scores).max(initial=0.0))


def _slopes(values: Doubles, positions: Doubles) -> Doubles:
    apart = positions - positions.mean()
    return np.asarray((values @ apart) / max(float(apart @ apart), 1.0))


def _without_line(values: Doubles, positions: Doubles) -> Doubles:
    """What is left of values [q_head, key] when mean and slope are taken off."""
    centred = values - values.mean(axis=1, keepdims=True)
    apart = positions - positions.mean()
    return np.asarray(centred - _slopes(values, positions)[:, None] * apart)


def _ratio(scores: Doubles, products: Doubles) -> float:
    """The factor on products that comes closest to scores."""
    return float((scores * products).sum() / max(float((products**2).sum()), 1e-30))
