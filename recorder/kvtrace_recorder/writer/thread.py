"""The writer as a thread of the model's process, for where no process can be started."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kvtrace_recorder.messages import Message
from kvtrace_recorder.writer.loop import Status, describe, write_trace
from kvtrace_recorder.writer.process import Answer
from kvtrace_recorder.writer.slabs import Slab


class WriterThread:
    """Writes one trace; the same calls as `kvtrace_recorder.writer.process.WriterProcess`.

    Parameters
    ----------
    options : dict
        Arguments of `kvtrace.writer.TraceWriter`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._messages: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self.ended = False
        self.complete = False
        self._thread = threading.Thread(
            target=write_trace, args=(self, options), name="kvtrace-write", daemon=True
        )
        self._thread.start()

    #: None: this process.
    pid = None

    def send(self, number: int, message: Message, slabs: Sequence[Slab]) -> None:
        """Hand a message over."""
        self._messages.put((number, message))

    def forget(self, slab: Slab) -> None:
        """Nothing: the memory is this process's own."""

    def end(self, *, complete: bool) -> None:
        """No further message will come."""
        self.complete = complete
        self._messages.put(None)

    def answers(self) -> Iterator[Answer]:
        """What the writer says, until it has ended."""
        while (found := self._answers.get()) is not None:
            yield found

    def wait(self) -> int:
        """Wait for its end."""
        self._thread.join()
        return 0

    # ---- what the writer asks; see `kvtrace_recorder.writer.loop.Source`

    def opened(self) -> None:
        """The trace has been made."""
        self._answers.put(Answer("opened", True, None))

    def next(self, timeout: float) -> tuple[int, Message] | None:
        """The next message."""
        try:
            found = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        self.ended = found is None
        return found

    def written(self, number: int, status: Status) -> None:
        """A message has been written."""
        self._answers.put(Answer("written", number, asdict(status)))

    def closed(self, status: Status, failure: BaseException | None) -> None:
        """The last word."""
        reason = None if failure is None else describe(failure)
        self._answers.put(Answer("closed", reason, asdict(status)))
        self._answers.put(None)
