"""The one recording of a process, and what becomes of it in a forked child."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from kvtrace.errors import TraceError

if TYPE_CHECKING:
    from kvtrace_recorder.session.recording import Recording

# Re-entered where a signal's handler ends a recording that is just beginning or ending.
_lock = threading.RLock()
_active: list[Recording] = []
_watches_forks = False


def begin(recording: Recording) -> None:
    """Make it this process's recording.

    Raises
    ------
    TraceError
        Where another one runs.
    """
    global _watches_forks
    with _lock:
        if _active:
            raise TraceError(
                f"a recording into {_active[0].path} is running in this process; one at a time"
                " was expected; leave its `with` block first"
            )
        _active.append(recording)
        if not _watches_forks:
            os.register_at_fork(after_in_child=_forked)
            _watches_forks = True


def end() -> None:
    """It runs no longer."""
    _active.clear()


def _forked() -> None:
    """A child must not write into its parent's trace: neither steps nor the end of it."""
    global _lock
    # Another thread may have held it, and that thread is not here to let go.
    _lock = threading.RLock()
    if _active:
        _active.pop().leave_to_parent()
