"""Writes messages into a trace until none will come: the same in a process and in a thread."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvtrace.errors import KvtraceError
from kvtrace.writer import TraceWriter
from kvtrace_recorder.messages import DecodeSteps, Message, StepBatch
from kvtrace_recorder.scribe import Scribe

#: A live reader is this far behind at most, as long as the disk keeps up.
COMMIT_SECONDS = 0.25
#: Rows that no full shard holds at a commit are written twice: a quarter of it halved the speed.
COMMIT_BYTES = 64 << 20

_OF_THE_DISK = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


@dataclass
class Status:
    """What has been written so far.

    Attributes
    ----------
    rows, steps, requests : int
        Counts of the trace.
    nbytes : int
        Raw bytes of the rows.
    reasons : dict of str to int
        What is missing from the trace and how much, by reason.
    """

    rows: int = 0
    steps: int = 0
    requests: int = 0
    nbytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class Source(Protocol):
    """Where messages come from, and who is told what became of them."""

    def opened(self) -> None:
        """The trace has been made."""

    def next(self, timeout: float) -> tuple[int, Message] | None:
        """The next message and its number; None when none came in time, or none will."""

    @property
    def ended(self) -> bool:
        """Whether no further message will come."""

    @property
    def complete(self) -> bool:
        """Whether the recording reached its end, once it has ended."""

    def written(self, number: int, status: Status) -> None:
        """A message has been written; its arrays are no longer needed."""

    def closed(self, status: Status, failure: BaseException | None) -> None:
        """Nothing more will be written; why, where something failed."""


def write_trace(source: Source, options: dict[str, Any]) -> None:
    """Make a trace and write into it what `source` gives; its errors go to the source.

    Parameters
    ----------
    source : Source
        Gives the messages.
    options : dict
        Arguments of `kvtrace.writer.TraceWriter`.
    """
    status = Status()
    try:
        writer = TraceWriter(**options)
    except BaseException as error:  # noqa: BLE001 - the source reports it
        source.closed(status, error)
        return
    failure: BaseException | None = None
    try:
        source.opened()
        scribe = Scribe(writer)
        _drain(source, scribe, lambda: _update(status, writer, scribe))
        scribe.finish()
        _update(status, writer, scribe)
        writer.close(complete=source.complete)
    except BaseException as error:  # noqa: BLE001 - the host goes on; the source reports it
        failure = error
        _close_after_failure(writer)
    source.closed(status, failure)


def describe(failure: BaseException) -> str:
    """A failure in one line."""
    text = str(failure)
    if isinstance(failure, OSError) and failure.errno in _OF_THE_DISK:
        # Which of the trace's files it was is of no use: such a disk takes none.
        return (
            f"{failure.strerror}; a disk that takes it was expected; make room or record elsewhere"
        )
    return text if isinstance(failure, KvtraceError) else f"{type(failure).__name__}: {text}"


def _drain(source: Source, scribe: Scribe, status: Callable[[], Status]) -> None:
    due, waiting = 0.0, 0
    while True:
        found = source.next(max(0.0, due - time.monotonic()) if waiting else COMMIT_SECONDS)
        if found is not None:
            if not waiting:
                due = time.monotonic() + COMMIT_SECONDS
            number, message = found
            scribe.write(message)
            waiting += _size(message)
            source.written(number, status())
        elif source.ended:
            return
        # Nothing is written while nothing comes: an idle server's journal does not grow.
        if waiting and (waiting > COMMIT_BYTES or time.monotonic() >= due):
            scribe.commit()
            waiting = 0


def _size(message: Message) -> int:
    return 1 + (message.nbytes if isinstance(message, StepBatch | DecodeSteps) else 0)


def _update(status: Status, writer: TraceWriter, scribe: Scribe) -> Status:
    status.rows, status.steps = writer.rows, scribe.steps
    status.requests, status.nbytes = scribe.requests, scribe.nbytes
    status.reasons = dict(scribe.reasons)
    return status


def _close_after_failure(writer: TraceWriter) -> None:
    # The first failure is the one to report.
    with contextlib.suppress(Exception):
        writer.close(complete=False)
