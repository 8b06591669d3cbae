"""Records on their way into the trace: order is watched, duplicates are dropped."""

from __future__ import annotations

from kvtrace_recorder.importers.kv_events.problems import Problems
from kvtrace_recorder.importers.kv_events.records import Record
from kvtrace_recorder.importers.kv_events.watch import SequenceWatch, Source, Verdict
from kvtrace_recorder.importers.kv_events.write import EventWriter


class Intake:
    """Takes records one after the other.

    Attributes
    ----------
    duplicates : int
        Records dropped because they were there before.
    """

    def __init__(self, events: EventWriter, problems: Problems) -> None:
        self._events = events
        self._problems = problems
        self.watch = SequenceWatch()
        self.duplicates = 0

    def judge(self, record: Record) -> Verdict:
        """What the record's sequence number says; a record without one is always in order."""
        if record.sequence is None:
            return Verdict()
        return self.watch.judge(source_of(record), record.sequence, record.batch.ts_ns)

    def take(self, record: Record, verdict: Verdict, why_missing: str, place: str) -> bool:
        """Write a record, and what is missing before it; False for a duplicate.

        Parameters
        ----------
        record : Record
            The record.
        verdict : Verdict
            From `judge`.
        why_missing : str
            Why the messages missing before it are lost.
        place : str
            Where it stands, for what cannot be read of it.
        """
        if verdict.duplicate:
            self.duplicates += 1
            return False
        source = source_of(record)
        if verdict.restarted and record.sequence is not None:
            last = self.watch.expected(source) - 1
            self._events.restart(source, last, record.sequence, record.batch.ts_ns)
        if verdict.missing:
            self._events.lost(source, verdict.missing, why_missing)
        if record.sequence is not None:
            self.watch.accept(source, record.sequence, record.batch.ts_ns)
        for what, reason in record.batch.problems:
            self._problems.note(what, reason, place)
        self._events.write(source, record.batch)
        return True


def source_of(record: Record) -> Source:
    """The publisher that a record is from."""
    return Source(record.topic, record.batch.rank)
