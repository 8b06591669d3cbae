"""What a policy's scores must be; a policy of the user's own may err."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.cache import Scores
from kvtrace_viewer.replay.kernels import has_nan

if TYPE_CHECKING:
    from kvtrace_viewer.replay.policy import Policy

Shape = tuple[int, ...]


def check_scores(
    policy: Policy, method: str, scores: object, rows: NDArray[np.int64], *shapes: Shape
) -> Scores:
    """Return the scores as they are if float32, else as float64.

    Parameters
    ----------
    policy, method
        Who scored, and by which of its methods.
    rows : int64 [cut]
        The rows of the decisions.
    shapes
        What is accepted.

    Raises
    ------
    InputError
        For another shape, for what are no numbers, and for NaN: a cut cannot rank it.
    """
    found = np.asarray(scores)
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    if found.dtype.kind not in "biuf":
        text = f"returned {type(scores).__name__}; numbers {wanted} were expected"
        raise InputError(f"{_where(policy, method)} {text}; return one float for each key")
    if found.shape not in shapes:
        text = f"returned scores {list(found.shape)}; {wanted} were expected"
        raise InputError(f"{_where(policy, method)} {text}; return one score for each key")
    found = found if found.dtype == np.float32 else found.astype(np.float64, copy=False)
    if has_nan(found.reshape(-1)):
        *_, key = at = tuple(int(x[0]) for x in np.nonzero(np.isnan(found)))
        row = rows[at[-2] if len(at) > 1 else 0]
        text = f"returned NaN at row {row} for key {key}; a number was expected"
        raise InputError(f"{_where(policy, method)} {text}; give it a score, or -inf")
    return found


def _where(policy: Policy, method: str) -> str:
    """File and line of the method."""
    function = inspect.unwrap(getattr(type(policy), method))
    line = function.__code__.co_firstlineno
    return f"{inspect.getsourcefile(function)} line {line}: {type(policy).__name__}.{method}"
