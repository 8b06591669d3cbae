"""SIGTERM is how a server is stopped: its trace is whole, where the end can still be written."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

#: What was put there, and by which process: a child that it forks has it, too.
_put: list[tuple[object, int]] = []


def end_on_sigterm(finish: Callable[[], object]) -> Callable[[], None]:
    """Where SIGTERM would end this process, call `finish` first; it then ends as it would have.

    A program's own handler is left alone, and may take this one's place at any time (a server's
    does, and raises the signal again once it has shut down). A child that the program forks ends
    as it would without this.

    Parameters
    ----------
    finish : callable
        Called in a thread of its own, and the program runs on meanwhile: the main thread may hold
        a lock that `finish`, or a thread that it waits for, needs. Its errors are printed.

    Returns
    -------
    callable
        Puts back what was there.
    """
    before, pid = signal.getsignal(signal.SIGTERM), os.getpid()
    is_main = threading.current_thread() is threading.main_thread()
    is_parents = any(before is handler and pid != owner for handler, owner in _put)
    if not is_main or (before is not signal.SIG_DFL and not is_parents):
        return lambda: None

    def handle(number: int, frame: FrameType | None) -> None:
        # First of all: a second SIGTERM is not made to wait.
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != pid:
            _end()
        # No daemon: where the program ends meanwhile, the interpreter waits for it.
        ending = threading.Thread(target=_end, args=(finish,), name="kvtrace-end", daemon=False)
        try:
            ending.start()
        except RuntimeError:
            # The interpreter is about to end, or the system has no room for a thread.
            _end()

    signal.signal(signal.SIGTERM, handle)
    _put[:] = [(handle, pid)]

    def undo() -> None:
        if signal.getsignal(signal.SIGTERM) is handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return undo


def _end(finish: Callable[[], object] | None = None) -> None:
    """End this process by SIGTERM, whose handling is the system's again."""
    try:
        if finish is not None:
            finish()
    except Exception as error:  # noqa: BLE001 - the process ends as it was told to
        print(f"kvtrace: the trace's end was not written: {error}", file=sys.stderr)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
