"""From the taps to the writer: bounded by bytes, and off the model's thread as far as can be.

The taps copy rows into slabs of shared memory and append messages to a queue. One thread looks up
token texts and sends; the writer is a process of its own, because a second thread that runs
Python takes the interpreter from the model at every operation. Where no process can be started,
a thread writes instead.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from kvtrace.console import human_bytes
from kvtrace.errors import TraceError
from kvtrace_recorder.messages import DecodeSteps, Message, ModelInfo, StepBatch, Vocabulary
from kvtrace_recorder.progress import ProgressLine
from kvtrace_recorder.writer.loop import Status
from kvtrace_recorder.writer.process import Answer, WriterProcess
from kvtrace_recorder.writer.slabs import Slab, SlabPool
from kvtrace_recorder.writer.thread import WriterThread

#: How often to look whether something waits for a model that does not come.
TICK_SECONDS = 0.2

_GONE = "the writer's process ended before the recording"
QUEUE_FULL = (
    "the writer was slower than the model and its queue was full; whole steps are dropped, and"
    " the rest of their requests with them (record with on_full='wait' to slow the model instead)"
)


class Texts(Protocol):
    """Gives the text of a token; see `kvtrace_recorder.tokens.texts`."""

    def of(self, source: str, token_id: int) -> str | None:
        """Text of a token of the model that came from `source`; None where unknown."""


class Pipeline:
    """The way of a recording's messages to its trace.

    Parameters
    ----------
    options : dict
        Arguments of `kvtrace.writer.TraceWriter`, plain values.
    texts : Texts
        Asked in the sending thread.
    queue_bytes : int
        Rows waiting to be written may hold this many bytes; a single larger step is let through
        alone.
    on_full : {"drop", "wait"}
        Drop whole steps, or make the model wait.
    progress : bool or None
        A line on standard error; None: only where that is a terminal.
    on_tick : callable
        Called every `TICK_SECONDS` from a thread of its own: it may wait for room, which only
        the others make.

    Raises
    ------
    TraceError
        Where the trace cannot be made.
    """

    def __init__(
        self,
        options: dict[str, Any],
        texts: Texts,
        *,
        queue_bytes: int,
        on_full: str,
        progress: bool | None,
        on_tick: Callable[[], None],
    ) -> None:
        self._texts = texts
        self._limit = queue_bytes
        self._waits = on_full == "wait"
        self._progress = ProgressLine(sys.stderr.isatty() if progress is None else progress)
        self._pool = SlabPool()
        self._queue: deque[tuple[int, Message, Sequence[Slab]]] = deque()
        self._unwritten: dict[int, tuple[Message, Sequence[Slab]]] = {}
        #: Bytes of rows that are not written yet.
        self.queued_bytes = 0
        self._numbers = 0
        lock = threading.RLock()
        #: Of one lock: something to send has come, and room has.
        self._arrived, self._changed = threading.Condition(lock), threading.Condition(lock)
        self._ended = threading.Event()
        self._stopping = self._complete = self._closed = False
        self._sources: dict[int, str] = {}
        self._sent_ids: dict[str, set[int]] = {}
        self._on_tick = on_tick
        self.status = Status()
        self.failure: str | None = None
        self.dropped_tokens = 0
        self._writer, self._answers = _open_writer(options)
        self._threads = [
            threading.Thread(target=run, name=f"kvtrace-{name}", daemon=True)
            for name, run in (
                ("send", self._send_all),
                ("hear", self._hear),
                ("tick", self._tick),
            )
        ]
        for thread in self._threads:
            thread.start()

    def reserve(self, nbytes: int, admitted: bool = False, step_bytes: int = 0) -> Slab | None:
        """Memory for rows, which the writer can see.

        Parameters
        ----------
        nbytes : int
            Room needed.
        admitted : bool
            Whether earlier rows of the same step have been let in: then these are.
        step_bytes : int
            What the whole step will need, where that is known and more.

        Returns
        -------
        Slab or None
            None where the step must be dropped; `refusal` says why.

        Raises
        ------
        OSError
            Where the system gives no memory.
        """
        asked = max(nbytes, step_bytes)
        with self._changed:
            while not admitted and self._waits and self._is_full(asked):
                self._changed.wait(0.1)
            if self.failure is not None or (not admitted and self._is_full(asked)):
                return None
            self.queued_bytes += nbytes
        try:
            slab = self._pool.get(nbytes)
        except BaseException:
            with self._changed:
                self.queued_bytes -= nbytes
                self._changed.notify_all()
            raise
        slab.charged = nbytes
        return slab

    @property
    def writer_pid(self) -> int | None:
        """Process that writes; None where a thread of this one does."""
        return self._writer.pid

    @property
    def refusal(self) -> str:
        """Why `reserve` gave nothing."""
        return QUEUE_FULL if self.failure is None else f"the writer failed: {self.failure}"

    def give_back(self, slabs: Sequence[Slab]) -> None:
        """Slabs that no message will carry."""
        with self._changed:
            self._free(slabs)

    def put(self, message: Message, slabs: Sequence[Slab] = ()) -> None:
        """Queue a message; its arrays stand in these slabs, or are small."""
        with self._changed:
            if self.failure is not None:
                self._lose(message, slabs)
                return
            self._numbers += 1
            self._queue.append((self._numbers, message, slabs))
            self._arrived.notify_all()

    def close(self, *, complete: bool) -> None:
        """Write what is queued, close the trace and end the writer."""
        self._ended.set()
        with self._changed:
            self._stopping, self._complete = True, complete
            self._arrived.notify_all()
        for thread in self._threads:
            thread.join()
        self._writer.wait()
        self._pool.close()
        self._progress.clear()

    def _is_full(self, nbytes: int) -> bool:
        return (
            self.failure is None
            and self.queued_bytes > 0
            and self.queued_bytes + nbytes > self._limit
        )

    def _free(self, slabs: Sequence[Slab]) -> None:
        for slab in slabs:
            self.queued_bytes -= slab.charged
            if not self._pool.put(slab):
                self._writer.forget(slab)
        self._changed.notify_all()

    # ---- the sending thread

    def _send_all(self) -> None:
        try:
            while (found := self._next()) is not None:
                number, message, slabs = found
                for slab in slabs:
                    slab.settle()
                self._send_texts(message)
                self._writer.send(number, message, slabs)
        except OSError:
            self._fail(_GONE)
        except Exception as error:  # noqa: BLE001 - the host goes on; close() reports it
            self._fail(f"{type(error).__name__}: {error}")
        try:
            # Also after a failure on this side: else the writer would wait for more for ever.
            self._writer.end(complete=self._complete and self.failure is None)
        except OSError:
            self._fail(_GONE)

    def _next(self) -> tuple[int, Message, Sequence[Slab]] | None:
        with self._changed:
            while True:
                if self._queue and self.failure is None:
                    found = self._queue.popleft()
                    self._unwritten[found[0]] = found[1:]
                    return found
                if self._stopping or self.failure is not None:
                    return None
                self._arrived.wait()

    def _send_texts(self, message: Message) -> None:
        if isinstance(message, ModelInfo):
            self._sources[message.key] = message.source
        if not isinstance(message, StepBatch | DecodeSteps):
            return
        source = self._sources[message.model]
        sent = self._sent_ids.setdefault(source, set())
        new = message.known_ids - sent
        if new:
            sent |= new
            ids = sorted(new)
            texts = [self._texts.of(source, x) for x in ids]
            self._writer.send(0, Vocabulary(source, ids, texts), ())

    # ---- the ticking thread

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._on_tick()

    # ---- the hearing thread

    def _hear(self) -> None:
        try:
            for answer in self._answers:
                self._take(answer)
        except OSError:
            self._fail(_GONE)
        except Exception as error:  # noqa: BLE001 - the host goes on; close() reports it
            self._fail(f"{type(error).__name__}: {error}")
        if not self._closed:
            self._fail(_GONE)

    def _take(self, answer: Answer) -> None:
        with self._changed:
            if answer.status is not None:
                self.status = Status(**answer.status)
            if answer.kind == "written":
                _, slabs = self._unwritten.pop(answer.value, (None, ()))
                self._free(slabs)
            else:
                self._closed = True
                if answer.value is not None:
                    self._fail(answer.value)
            self._changed.notify_all()
        self._show()

    def _show(self) -> None:
        status = self.status
        if self._progress.is_enabled and status.rows:
            self._progress.show(
                f"kvtrace: {status.rows:,} tokens, {human_bytes(status.nbytes)},"
                f" {human_bytes(self.queued_bytes)} queued"
            )

    def _fail(self, reason: str) -> None:
        with self._changed:
            self.failure = self.failure or reason
            for message, slabs in self._unwritten.values():
                self._lose(message, slabs)
            for _, message, slabs in self._queue:
                self._lose(message, slabs)
            self._unwritten.clear()
            self._queue.clear()
            self._arrived.notify_all()
            self._changed.notify_all()

    def _lose(self, message: Message, slabs: Sequence[Slab]) -> None:
        """Nobody will write this."""
        if isinstance(message, StepBatch | DecodeSteps):
            self.dropped_tokens += message.num_rows
        self._free(slabs)


def _open_writer(
    options: dict[str, Any],
) -> tuple[WriterProcess | WriterThread, Iterator[Answer]]:
    """A writer that has made the trace, and what it will say."""
    # The thread is for embedded interpreters, and systems that let us start nothing.
    for kind in (WriterProcess, WriterThread):
        try:
            writer = kind(options)
        except OSError:
            continue
        answers = writer.answers()
        first = next(answers, None)
        if first is not None and first.kind == "opened":
            return writer, answers
        writer.wait()
        if first is not None:
            raise TraceError(str(first.value))
    raise TraceError(
        f"the writer of {options['path']} did not start; a process or a thread was expected;"
        " see the messages above"
    )
