"""Following a live publisher: one loop that receives, asks again for what is missing, commits."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from kvtrace.writer import TraceWriter
from kvtrace_recorder.importers.kv_events.decode import Batch, decode_batch
from kvtrace_recorder.importers.kv_events.dump import DumpWriter
from kvtrace_recorder.importers.kv_events.intake import Intake, source_of
from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.kv_events.records import Record, unpack
from kvtrace_recorder.importers.kv_events.stream import (
    Frames,
    Malformed,
    Received,
    Subscriber,
)
from kvtrace_recorder.importers.kv_events.watch import Source
from kvtrace_recorder.importers.kv_events.write import EventWriter
from kvtrace_recorder.progress import ProgressLine

#: Seconds after which a replay socket that does not answer is given up for this time.
REPLAY_TIMEOUT_S = 5.0
#: Seconds without any message after which a hint is due.
HINT_S = 5.0
#: Seconds for taking what has arrived, once asked to stop.
DRAIN_S = 2.0
COMMIT_S = 0.25
#: Every commit is a file per table, and a reader opens them all: after COMMIT_S times this number
#: of seconds commits become rarer, so that a day has some 10,000 and not 350,000.
COMMITS_AT_FULL_PACE = 1000


class Follower:
    """Turns what a subscriber receives into a trace, in order, holes filled where possible.

    While the replay socket is asked, live messages wait; what it sends is written first.

    Parameters
    ----------
    subscriber : Subscriber
        The sockets.
    writer : TraceWriter
        The trace; the caller closes it.
    dump : DumpWriter or None
        Where messages are kept as well.
    """

    def __init__(
        self, subscriber: Subscriber, writer: TraceWriter, dump: DumpWriter | None
    ) -> None:
        self._subscriber = subscriber
        self._dump = dump
        self._problems = Problems()
        self.events = EventWriter(writer, self._problems)
        self._intake = Intake(self.events, self._problems)
        self._waiting: deque[tuple[Frames, Record]] = deque()
        self._asked: dict[Source, int] = {}
        self._asking = False
        self._deadline = 0.0
        self._last_source = Source("", None)
        self._silent = False
        self._dirty = False
        self.messages = 0

    def step(self, timeout_ms: int) -> bool:
        """Receive for at most `timeout_ms`; whether anything came."""
        came = False
        for received in self._subscriber.receive(timeout_ms):
            came = True
            self._receive(received)
        if self._asking and time.monotonic() > self._deadline:
            self._silent = True
            self._stop_asking()
        return came

    def commit(self) -> bool:
        """Make what was received visible; False where there was nothing new."""
        if not self._dirty:
            return False
        self._dirty = False
        self.events.commit()
        if self._dump is not None:
            self._dump.flush()
        return True

    def finish(self) -> None:
        """Write what still waits."""
        while self._waiting:
            self._take(*self._waiting.popleft(), final=True)
        self.events.finish()

    def problems(self) -> list[str]:
        """A line for every kind of thing that could not be read."""
        return self._problems.lines()

    def _receive(self, received: Received) -> None:
        if isinstance(received, Malformed):
            reason = f"{received.frames} frames; topic, sequence and payload were expected"
            self._problems.note("kv event messages", reason)
            self._dirty = True
        elif isinstance(received, Frames):
            record = self._record(received)
            if received.replayed:
                self._take(received, record, final=True)
            elif self._asking:
                self._waiting.append((received, record))
            else:
                self._take(received, record)
        elif self._asking:
            self._silent = False
            self._stop_asking()

    def _stop_asking(self) -> None:
        self._asking = False
        while self._waiting and not self._asking:
            self._take(*self._waiting.popleft())

    def _take(self, frames: Frames, record: Record, *, final: bool = False) -> None:
        """Write a message, unless the ones missing before it can still be asked for."""
        verdict = self._intake.judge(record)
        source = source_of(record)
        expected = self._intake.watch.expected(source)
        asked = self._asked.get(source) == expected or not self._subscriber.can_replay
        if verdict.missing and not final and not asked:
            self._asked[source] = expected
            self._waiting.appendleft((frames, record))
            self._subscriber.ask_again(verdict.missing[0])
            self._asking, self._deadline = True, time.monotonic() + REPLAY_TIMEOUT_S
            return
        place = f"message {record.sequence}"
        if self._intake.take(record, verdict, self._why_missing(expected), place):
            self.messages += 1
            self._dirty = True
            if self._dump is not None:
                self._dump.add(record.topic.encode(), frames.sequence, frames.payload)

    def _why_missing(self, expected: int) -> str:
        came = "published before the first one that came" if not expected else "did not come"
        if not self._subscriber.can_replay:
            return f"{came}; --replay names a socket that may still have them"
        what = "did not answer" if self._silent else "did not have them"
        return f"{came}, and the replay socket {what}"

    def _record(self, frames: Frames) -> Record:
        try:
            batch = decode_batch(unpack(frames.payload))
        except ValueError as error:
            # It still counts in the sequence: of the publisher that spoke last.
            batch = Batch(None, self._last_source.rank)
            batch.problems.append(("kv event messages", str(error)))
        if frames.topic is None:
            return Record(self._last_source.topic, frames.sequence, batch)
        record = Record(frames.topic.decode(errors="replace"), frames.sequence, batch)
        self._last_source = source_of(record)
        return record


def follow(
    subscriber: Subscriber,
    out: Path,
    *,
    dump: Path | None,
    seconds: float | None,
    idle_seconds: float | None,
    force: bool,
    command: list[str],
) -> list[str]:
    """Record what a publisher says until SIGINT, SIGTERM or a limit ends it.

    Parameters
    ----------
    subscriber : Subscriber
        The sockets.
    out : pathlib.Path
        The trace to make.
    dump : pathlib.Path, optional
        A file for the messages as they came.
    seconds : float, optional
        End after this time.
    idle_seconds : float, optional
        End after this time without a message.
    force : bool
        Replace an existing trace, and an existing dump.
    command : list of str
        Kept in the trace.

    Returns
    -------
    list of str
        A line for every kind of thing that could not be read.
    """
    with ExitStack() as stack:
        keeper = (
            None if dump is None else stack.enter_context(closing(DumpWriter(dump, force=force)))
        )
        stop = stack.enter_context(_stop())
        writer = stack.enter_context(
            TraceWriter(out, command=command, detail="events", force=force)
        )
        follower = Follower(subscriber, writer, keeper)
        _loop(follower, subscriber, stop, seconds, idle_seconds)
        follower.finish()
    return follower.problems()


def _loop(
    follower: Follower,
    subscriber: Subscriber,
    stop: threading.Event,
    seconds: float | None,
    idle_seconds: float | None,
) -> None:
    started = heard = committed = time.monotonic()
    progress = _Progress(follower, subscriber)
    end_by = math.inf
    while True:
        ending = stop.is_set()
        came = follower.step(0 if ending else 50)
        now = time.monotonic()
        end_by = min(end_by, now + DRAIN_S) if ending else end_by
        heard = now if came else heard
        pace = max(COMMIT_S, (now - started) / COMMITS_AT_FULL_PACE)
        if now - committed >= pace and follower.commit():
            committed = now
        progress.show(now - started, now - heard)
        over = seconds is not None and now - started >= seconds
        idle = idle_seconds is not None and now - heard >= idle_seconds
        # Asked to stop, it still takes what has already arrived.
        if over or idle or (ending and (not came or now >= end_by)):
            break
    progress.clear()


@contextmanager
def _stop() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one of either acts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Progress:
    """A line on a terminal, and a hint where nothing comes."""

    def __init__(self, follower: Follower, subscriber: Subscriber) -> None:
        self._follower = follower
        self._subscriber = subscriber
        self._line = ProgressLine(sys.stderr.isatty())
        self._hinted = False

    def show(self, running_s: float, silent_s: float) -> None:
        """Rewrite the line; hint once."""
        if not self._hinted and not self._follower.messages and running_s >= HINT_S:
            self._hinted = True
            self.clear()
            print(self._hint(), file=sys.stderr, flush=True)
        if not self._line.is_enabled:
            return
        events = self._follower.events
        line = f"kvtrace: {events.events:,} events, {events.blocks:,} blocks"
        if silent_s >= 1:
            line += f", silent for {silent_s:.0f} s"
        self._line.show(f"{line}; Ctrl-C ends")

    def clear(self) -> None:
        """Remove the line."""
        self._line.clear()

    def _hint(self) -> str:
        if self._subscriber.connected:
            return (
                f"kvtrace: connected to {self._subscriber.endpoint}, no event yet: they come with"
                " requests, where the server runs with prefix caching and KV events switched on;"
                " still waiting"
            )
        return (
            f"kvtrace: nobody answers at {self._subscriber.endpoint} yet; a server started with"
            " --kv-events-config and this endpoint was expected; still waiting"
        )
