"""How this package compiles its inner loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile with numba, cached on disk (10 s cold, 0.5 s cached), without the GIL.

    No fastmath: reordered sums would make results differ from machine to machine.
    """
    return cast(Callable[P, R], njit(nogil=True, cache=True)(function))


def jit_sum(function: Callable[P, R]) -> Callable[P, R]:
    """Compile as `jit` does, where a sum may be taken in another order, as BLAS does too.

    The order is that of the machine's vectors: equal on one machine, to rounding on all.
    """
    return cast(Callable[P, R], njit(nogil=True, cache=True, fastmath={"reassoc"})(function))
