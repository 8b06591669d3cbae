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
    """Compile as `jit` does, where sums may be rounded as BLAS rounds them.

    In another order, and product and sum at once: equal on one machine, to rounding on all.
    """
    fastmath = {"reassoc", "contract"}
    return cast(Callable[P, R], njit(nogil=True, cache=True, fastmath=fastmath)(function))


def jit_least(function: Callable[P, R]) -> Callable[P, R]:
    """Compile as `jit` does, for numbers among which is no NaN, and both zeros are equal.

    Without the promise a minimum is not one instruction.
    """
    return cast(Callable[P, R], njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})(function))


def jit_divide(function: Callable[P, R]) -> Callable[P, R]:
    """Compile as `jit` does, where nothing is divided by zero.

    Looking for it at every division keeps them from being vector instructions.
    """
    return cast(Callable[P, R], njit(nogil=True, cache=True, error_model="numpy")(function))
