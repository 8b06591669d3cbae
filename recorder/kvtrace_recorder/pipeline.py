"""The one thread that owns the trace: takes steps from a bounded queue and writes them.

The model's threads only append to the queue. Log-sum-exps, token texts and everything on disk are
this thread's work, in numpy: a torch thread setting would reach the model's own threads.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque

from kvtrace.writer import TraceWriter
from kvtrace_recorder.messages import Message, StepRecord
from kvtrace_recorder.progress import ProgressLine
from kvtrace_recorder.scribe import Scribe, Texts

#: A live reader is this far behind at most, as long as the disk keeps up.
COMMIT_SECONDS = 0.3
COMMIT_BYTES = 8 << 20

QUEUE_FULL = (
    "the writer was slower than the model and its queue was full; whole steps are dropped, and"
    " the rest of their requests with them (record with on_full='wait' to slow the model instead)"
)


class Pipeline:
    """A queue bounded by bytes and the thread that empties it into a trace.

    Parameters
    ----------
    writer : TraceWriter
        From here on this pipeline's thread is its only user.
    texts : Texts
        Asked in the writer thread.
    queue_bytes : int
        Steps waiting may hold this many bytes; a single larger step is let through alone.
    on_full : {"drop", "wait"}
        Drop whole steps, or make the model wait.
    progress : bool or None
        A line on standard error; None: only where that is a terminal.
    """

    def __init__(
        self,
        writer: TraceWriter,
        texts: Texts,
        *,
        queue_bytes: int,
        on_full: str,
        progress: bool | None,
    ) -> None:
        self._writer = writer
        self._scribe = Scribe(writer, texts)
        self._limit = queue_bytes
        self._waits = on_full == "wait"
        self._progress = ProgressLine(sys.stderr.isatty() if progress is None else progress)
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._complete = False
        self._uncommitted = 0
        self.failure: BaseException | None = None
        self.dropped_tokens = 0
        self._thread = threading.Thread(target=self._run, name="kvtrace-writer", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows written so far."""
        return self._writer.rows

    @property
    def steps(self) -> int:
        """Steps written so far, with or without rows."""
        return self._scribe.steps

    @property
    def requests(self) -> int:
        """Requests written so far."""
        return self._scribe.requests

    @property
    def gap_reasons(self) -> dict[str, int]:
        """What is missing from the trace and how much, by reason."""
        return dict(self._scribe.reasons)

    def submit(self, step: StepRecord) -> str | None:
        """Queue a step. Returns why its rows were given up, None where they were not."""
        with self._changed:
            while self.failure is None and self._is_full(step) and self._waits:
                self._changed.wait(0.1)
            if self.failure is not None:
                return f"the writer failed: {self.failure!r}"
            dropped = QUEUE_FULL if self._is_full(step) else None
            if dropped:
                self.dropped_tokens += step.num_tokens
                step = step.without_rows(dropped)
            self._push(step, step.nbytes)
        return dropped

    def put(self, message: Message) -> None:
        """Queue a small message, whatever the queue holds."""
        with self._changed:
            self._push(message, 0)

    def close(self, *, complete: bool) -> None:
        """Write what is queued, close the trace and end the thread."""
        with self._changed:
            self._stopping, self._complete = True, complete
            self._changed.notify_all()
        self._thread.join()

    def _is_full(self, step: StepRecord) -> bool:
        return self._bytes > 0 and self._bytes + step.nbytes > self._limit

    def _push(self, message: Message, nbytes: int) -> None:
        self._messages.append(message)
        self._bytes += nbytes
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._drain()
            self._scribe.flush()
            self._writer.close(complete=self._complete)
        except BaseException as error:  # noqa: BLE001 - the host goes on; close() reports it
            with self._changed:
                self.failure = error
                self._messages.clear()
                self._changed.notify_all()
            self._close_after_failure()
        finally:
            self._progress.clear()

    def _close_after_failure(self) -> None:
        try:
            self._writer.close(complete=False)
        except Exception as error:  # noqa: BLE001 - the first failure is the one to report
            print(f"kvtrace: the trace could not be sealed: {error}", file=sys.stderr)

    def _drain(self) -> None:
        due = time.monotonic() + COMMIT_SECONDS
        while True:
            message = self._next(due - time.monotonic())
            if message is not None:
                self._scribe.write(message)
                self._done(message)
            elif self._stopping:
                return
            if self._uncommitted > COMMIT_BYTES or time.monotonic() >= due:
                self._scribe.commit()
                self._uncommitted = 0
                self._progress.show(self._writer.rows, self._scribe.nbytes, self._bytes)
                due = time.monotonic() + COMMIT_SECONDS

    def _next(self, timeout: float) -> Message | None:
        with self._changed:
            if not self._messages and not self._stopping:
                self._changed.wait(max(0.0, timeout))
            return self._messages.popleft() if self._messages else None

    def _done(self, message: Message) -> None:
        if isinstance(message, StepRecord):
            self._uncommitted += message.nbytes
            with self._changed:
                self._bytes -= message.nbytes
                self._changed.notify_all()
