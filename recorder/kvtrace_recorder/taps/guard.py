"""A tap is a guest in the model's process: its errors are reported once, and it goes silent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class UnrecordableError(Exception):
    """What a tap saw is outside what a trace can hold; the message says what and why."""


class TapGuard:
    """Runs the taps' code.

    Parameters
    ----------
    strict : bool
        Let a tap's error through to the model instead.
    report : callable
        Told the tap's name and the reason, once for each tap.
    """

    def __init__(self, *, strict: bool, report: Callable[[str, str], None]) -> None:
        self._strict = strict
        self._report = report
        self.silent: dict[str, str] = {}

    def run(self, tap: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Call a tap's code; None where it raised, now or before. Interrupts go through."""
        if tap in self.silent:
            return None
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if self._strict:
                raise
            reason = f"the {tap} tap failed and went silent: {type(error).__name__}: {error}"
            self.silent[tap] = reason
            # Not warnings.warn: where warnings are errors it would raise into the model.
            print(f"kvtrace: {reason}", file=sys.stderr)
            self._report(tap, reason)
            return None
